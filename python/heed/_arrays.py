"""Arrays of any framework, eagerly: which kind they are, and views of their memory for the native library."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm_ffi

from heed._lib import function
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


@functools.cache
def _torch_dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _cuda_target(index: int) -> str:
    return str(function("cuda_target")(index))


@functools.cache
def _cuda_device(index: int) -> Any:
    return tvm_ffi.device("cuda", index)


class DLPackOps:
    """What the eager path needs of one kind of array: dtype and shape, a view for the library, new arrays, and to run.

    `like` is an array of the call, called `name` in messages: everything happens where it is. PyTorch's and CuPy's
    functions allocate outputs, and their current stream of the device is the one that a call runs on.
    """

    def __init__(self, kind: str, like: Any, name: str = "q") -> None:
        self.kind = kind
        self.like = like
        self.name = name

    @functools.cached_property
    def cuda_index(self) -> int | None:
        """CUDA's ordinal of the device of `like`; None on the CPU."""
        if self.kind == "numpy":
            return None
        if self.kind == "torch":
            device = self.like.device
            if device.type not in ("cpu", "cuda"):
                raise TypeError(f"{self.name}: got a tensor on device {device}, expected the CPU or a CUDA GPU")
            return None if device.type == "cpu" else int(device.index)
        device_type, index = map(int, self.like.__dlpack_device__())
        if device_type == tvm_ffi.DLDeviceType.kDLCPU:
            return None
        if device_type not in (tvm_ffi.DLDeviceType.kDLCUDA, tvm_ffi.DLDeviceType.kDLCUDAManaged):
            raise TypeError(
                f"{self.name}: got an array on DLPack device type {device_type}, expected the CPU or a CUDA GPU"
            )
        return index

    def target(self) -> str:
        """Where a call on these arrays runs: "cpu", or the GPU's architecture."""
        return "cpu" if self.cuda_index is None else _cuda_target(self.cuda_index)

    def spec(self, name: str, value: Any) -> Spec:
        if self.kind == "numpy" or self.kind == "cupy":
            return numpy_spec(name, value)
        if self.kind == "torch":
            return _torch_dtype_name(value.dtype), tuple(value.shape)
        tensor = self.view(value, name)
        return str(tensor.dtype), tuple(tensor.shape)

    def view(self, value: Any, name: str = "array") -> Any:
        if self.kind == "numpy":
            return numpy_view(value)
        if self.kind == "torch":
            if value.requires_grad:  # autograd has its own path, which this is a part of
                value = value.detach()
            if value.is_neg():  # memory that holds the numbers' negatives, which DLPack cannot say
                value = value.resolve_neg()
        try:
            return tvm_ffi.from_dlpack(_cupy_capsule(value) if self.kind == "cupy" else value)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]  # some go on with native frames
            raise TypeError(
                f"{name}: got an array that DLPack cannot share, expected one that it can: {reason}"
            ) from None

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A new array of this kind on the device of the inputs. Kinds that cannot make arrays get NumPy's."""
        if self.kind == "torch":
            torch = sys.modules["torch"]
            return torch.empty(shape, dtype=getattr(torch, dtype), device=self.like.device)
        is_same = self.spec(self.name, self.like)[0] == dtype
        if self.kind == "cupy":
            cupy = sys.modules["cupy"]
            with self.like.device:
                return cupy.empty(shape, dtype=self.like.dtype if is_same else getattr(cupy, dtype))
        namespace = getattr(self.like, "__array_namespace__", None)
        if self.kind != "numpy" and namespace is not None:
            xp = namespace()
            return xp.empty(shape, dtype=self.like.dtype if is_same else getattr(xp, dtype), device=self.like.device)
        if self.cuda_index is not None:
            raise TypeError(
                f"{self.name}: got an array of {self.kind} on a GPU, expected one of JAX, PyTorch or CuPy, or one with "
                "__array_namespace__: heed allocates outputs with the library of its inputs"
            )
        return np.empty(shape, self.like.dtype if is_same and self.kind == "numpy" else dtype)

    def sum_over_first(self, value: Any) -> Any:
        """The sum over the first axis, where and in whose order everything of this call happens."""
        if self.kind == "cupy":
            with self.like.device:
                return value.sum(0)
        namespace = getattr(value, "__array_namespace__", None)
        return value.sum(0) if namespace is None else namespace().sum(value, axis=0)

    def view_out(self, value: Any) -> Any:
        return numpy_view(value) if isinstance(value, np.ndarray) else self.view(value, "out")

    def run(self, name: str, text: str, *views: Any) -> None:
        """Calls the native function on the views, on the current stream of the arrays' library."""
        if self.cuda_index is None:
            function(name)(text, *views)
            return
        if self.kind == "torch":
            stream = sys.modules["torch"].cuda.current_stream(self.cuda_index).cuda_stream
        elif self.kind == "cupy":
            with self.like.device:
                stream = sys.modules["cupy"].cuda.get_current_stream().ptr
        else:  # DLPack made the memory ready for the default stream
            stream = 0
        with tvm_ffi.use_raw_stream(_cuda_device(self.cuda_index), stream):
            function(name)(text, *views)

    def to_int32(self, name: str, value: Any) -> Any:
        """Integer arrays of any width as int32. NumPy values are checked; other kinds clamp to what int32 holds."""
        if self.kind == "numpy":
            return numpy_to_int32(name, value)
        dtype = self.spec(name, value)[0]
        if dtype == "int32":
            return value
        if not dtype.startswith(("int", "uint")):
            raise TypeError(f"{name}: got dtype {dtype}, expected an integer dtype")
        is_wide = dtype in ("int64", "uint32", "uint64")
        limits = np.iinfo(np.int32)
        if self.kind == "torch":
            torch = sys.modules["torch"]
            value = value.to(torch.int64).clamp(limits.min, limits.max) if is_wide else value
            return value.to(torch.int32)
        if self.kind == "cupy":
            with value.device:
                value = value.clip(0 if dtype[0] == "u" else limits.min, limits.max) if is_wide else value
                return value.astype(np.int32)
        return value.astype("int32") if hasattr(value, "astype") else numpy_to_int32(name, np.from_dlpack(value))


def _cupy_capsule(array: Any) -> Any:
    """DLPack's view of a CuPy array without any synchronisation. bfloat16 travels as its bits."""
    bits = array.view(np.uint16) if _dtype_name(array.dtype) == "bfloat16" else array
    return bits.__dlpack__(stream=-1)


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
