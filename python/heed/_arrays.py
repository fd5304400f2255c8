"""Arrays of any framework, eagerly: which kind they are, and views of their memory for the native library."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm_ffi

from heed._problem import Spec


def is_jax(value: Any) -> bool:
    """Whether the value is a JAX array or a tracer. Does not import JAX: without it, there are none."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.Array)


def kind_of(name: str, value: Any) -> str:
    """ "jax", "numpy", or the top-level module of another DLPack array's type ("torch", "cupy", ...)."""
    if is_jax(value):
        return "jax"
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: got a masked array, expected a plain one: masked elements would take part")
    if isinstance(value, np.ndarray):
        return "numpy"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):  # subclasses live in modules of their own
        return "torch"
    if hasattr(value, "__dlpack__"):
        return type(value).__module__.partition(".")[0]
    raise TypeError(
        f"{name}: got {type(value).__module__}.{type(value).__qualname__}, expected an array (JAX, NumPy, or any other "
        "with DLPack)"
    )


def common_kind(names: Sequence[str], values: Sequence[Any]) -> str:
    """The kind of all arrays that are there. JAX with NumPy counts as JAX; other kinds do not mix."""
    kinds = {name: kind_of(name, value) for name, value in zip(names, values, strict=True) if value is not None}
    distinct = set(kinds.values())
    if "jax" in distinct and distinct <= {"jax", "numpy"}:
        return "jax"
    if len(distinct) > 1:
        shown = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
        raise TypeError(f"arrays of different kinds: got {shown}; expected one kind for all")
    return distinct.pop()


@functools.cache
def _dtype_name(dtype: np.dtype[Any]) -> str:
    return dtype.name  # NumPy composes it anew each time, which takes 3 us


def numpy_spec(name: str, array: np.ndarray[Any, Any]) -> Spec:
    """dtype and shape of a NumPy array, which must be in native byte order and have whole strides."""
    if not array.dtype.isnative:
        raise TypeError(f"{name}: got dtype {array.dtype.str} in foreign byte order, expected native byte order")
    if array.itemsize == 0 or array.dtype.fields is not None:
        raise TypeError(f"{name}: got dtype {array.dtype}, expected float32, float16 or bfloat16")
    if any(stride % array.itemsize for stride, size in zip(array.strides, array.shape, strict=True) if size > 1):
        raise ValueError(f"{name}: got strides {array.strides} in bytes, expected multiples of {array.itemsize}")
    return _dtype_name(array.dtype), array.shape


def numpy_view(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The array in a form that the native library takes: DLPack refuses read-only memory and bfloat16.

    The view shares memory and is only read where the original is read-only. bfloat16 travels as its bits.
    """
    is_bfloat16 = _dtype_name(array.dtype) == "bfloat16"
    is_whole = not any(stride % array.itemsize for stride in array.strides)  # false for axes of size 1 at most
    if array.flags.writeable and not is_bfloat16 and is_whole:
        return array
    dtype = np.dtype(np.uint16) if is_bfloat16 else array.dtype
    if array.size == 0:
        return np.empty(array.shape, dtype)
    low, high = np.lib.array_utils.byte_bounds(array)
    memory: Any = (ctypes.c_char * (high - low)).from_address(low)
    offset = array.__array_interface__["data"][0] - low
    strides = tuple(stride if size > 1 else 0 for stride, size in zip(array.strides, array.shape, strict=True))
    return np.ndarray(array.shape, dtype, memory, offset, strides)


class DLPackOps:
    """What the eager path needs of one kind of array: dtype and shape, a view for the library, and new arrays."""

    def __init__(self, kind: str, like: Any) -> None:
        self.kind = kind
        self.like = like

    def spec(self, name: str, value: Any) -> Spec:
        if self.kind == "numpy":
            return numpy_spec(name, value)
        tensor = self.view(value, name)
        return str(tensor.dtype), tuple(tensor.shape)

    def view(self, value: Any, name: str = "array") -> Any:
        if self.kind == "numpy":
            return numpy_view(value)
        if getattr(value, "requires_grad", False):
            raise TypeError(
                f"{name}: got a tensor that requires grad, expected value.detach(): heed has no torch autograd"
            )
        try:
            return tvm_ffi.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise TypeError(
                f"{name}: got an array that DLPack cannot share, expected one that it can: {error}"
            ) from None

    def target(self) -> str:
        """Where a call on these arrays runs: "cpu", or the GPU's architecture."""
        if self.kind == "numpy":
            return "cpu"
        device_type, index = self.like.__dlpack_device__()
        if int(device_type) == tvm_ffi.DLDeviceType.kDLCPU:
            return "cpu"
        if int(device_type) != tvm_ffi.DLDeviceType.kDLCUDA:
            raise TypeError(f"q: got an array on DLPack device type {int(device_type)}, expected the CPU or a CUDA GPU")
        if self.kind == "torch":
            torch = sys.modules["torch"]
            major, minor = torch.cuda.get_device_capability(index)
            return f"sm_{major}{minor}"
        return "cuda"

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A new array of this kind on the device of the inputs. Kinds that cannot make arrays get NumPy's."""
        if self.kind == "torch":
            torch = sys.modules["torch"]
            return torch.empty(shape, dtype=getattr(torch, dtype), device=self.like.device)
        is_same = self.spec("q", self.like)[0] == dtype
        namespace = getattr(self.like, "__array_namespace__", None)
        if self.kind != "numpy" and namespace is not None:
            xp = namespace()
            return xp.empty(shape, dtype=self.like.dtype if is_same else getattr(xp, dtype), device=self.like.device)
        return np.empty(shape, self.like.dtype if is_same and self.kind == "numpy" else dtype)

    def view_out(self, value: Any) -> Any:
        return numpy_view(value) if isinstance(value, np.ndarray) else tvm_ffi.from_dlpack(value)

    def to_int32(self, name: str, value: Any) -> Any:
        """Integer arrays of any width as int32. NumPy values are checked; other kinds wrap as their own cast does."""
        if self.kind == "numpy":
            return numpy_to_int32(name, value)
        dtype = self.spec(name, value)[0]
        if dtype == "int32":
            return value
        if not dtype.startswith(("int", "uint")):
            raise TypeError(f"{name}: got dtype {dtype}, expected an integer dtype")
        if self.kind == "torch":
            return value.to(sys.modules["torch"].int32)
        return value.astype("int32") if hasattr(value, "astype") else numpy_to_int32(name, np.from_dlpack(value))


def numpy_to_int32(name: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """An integer array as int32. Values that do not fit raise ValueError."""
    if array.dtype == np.int32:
        return array
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name}: got dtype {array.dtype}, expected an integer dtype")
    limits = np.iinfo(np.int32)
    if array.size and (int(array.min()) < limits.min or int(array.max()) > limits.max):
        raise ValueError(f"{name}: got values from {array.min()} to {array.max()}, expected values that fit int32")
    return array.astype(np.int32)
