"""Shared by all tests: JAX's devices, markers, the seed of random tests, the faces under test.

Tests marked `gpu` run only if they are asked for (`-m gpu`, which is what `make test-gpu` does); a run without that is
one of the CPU, on a machine with GPUs too. With HEED_REQUIRE_GPU=1 they fail the run where JAX sees no GPU, instead of
being skipped.
"""

from __future__ import annotations

import os
import re
import sys

# Before anything imports JAX: sharding tests need several devices.
_DEVICES_FLAG = "--xla_force_host_platform_device_count"
if _DEVICES_FLAG not in os.environ.get("XLA_FLAGS", "") and "jax" not in sys.modules:
    os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + f" {_DEVICES_FLAG}=4").strip()
# Several processes and libraries share the GPU: JAX is not to take most of its memory at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Before anything imports NumPy: on a busy machine OpenBLAS threads spin for each other, and the oracle's many small
# products take a hundred times longer.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import functools  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU; runs with -m gpu, skipped where JAX sees none")
    config.addinivalue_line("markers", "multi_gpu: needs two NVIDIA GPUs (and the marker gpu)")
    if not re.search(r"(?<!not )\bgpu\b", str(config.getoption("markexpr", ""))):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if os.environ.get("HEED_REQUIRE_GPU") == "1" and not gpu_devices():
        raise pytest.UsageError("HEED_REQUIRE_GPU=1: JAX sees no NVIDIA GPU (this needs pytest -m gpu and jax[cuda13])")


@functools.cache
def gpu_devices() -> tuple[Any, ...]:
    import jax

    try:
        return tuple(jax.devices("cuda"))
    except RuntimeError:
        return ()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, count in (("gpu", 1), ("multi_gpu", 2)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and len(gpu_devices()) < count:
            reason = f"JAX sees {len(gpu_devices())} NVIDIA GPUs, this needs {count} (and pytest -m gpu)"
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


# One face of flash_mha on one platform: takes NumPy arrays, gives NumPy arrays (out, lse).
Face = Callable[..., tuple[np.ndarray, np.ndarray]]

FACES = [
    pytest.param("numpy", id="numpy"),
    pytest.param("jax_jit:cpu", id="jax_jit_cpu"),
    pytest.param("jax_jit:cuda", id="jax_jit_gpu", marks=pytest.mark.gpu),
    pytest.param("jax_eager:cuda", id="jax_eager_gpu", marks=pytest.mark.gpu),
    pytest.param("torch:cuda", id="torch_gpu", marks=pytest.mark.gpu),
    pytest.param("cupy:cuda", id="cupy_gpu", marks=pytest.mark.gpu),
]


@pytest.fixture(params=FACES)
def flash_mha_face(request: pytest.FixtureRequest) -> Face:
    """flash_mha through each face and platform, with return_lse=True. A new backend is one more row of FACES."""
    return face_of("flash_mha", request.param)


@pytest.fixture(params=FACES)
def flash_mha_varlen_face(request: pytest.FixtureRequest) -> Face:
    """The same for flash_mha_varlen, whose lengths are among `arrays`."""
    return face_of("flash_mha_varlen", request.param)


def face_of(function: str, param: str) -> Face:
    """One of heed's functions through a row of FACES."""
    face, _, platform = param.partition(":")
    if face == "numpy":
        return functools.partial(_numpy_face, function)
    if face.startswith("jax"):
        return functools.partial(_jax_jit_face if face == "jax_jit" else _jax_eager_face, function, platform)
    return functools.partial({"torch": _torch_face, "cupy": _cupy_face}[face], function)


def _numpy_face(
    function: str, q: Any, k: Any, v: Any, *, arrays: dict[str, Any], **statics: Any
) -> tuple[np.ndarray, np.ndarray]:
    import heed

    out, lse = getattr(heed, function)(q, k, v, return_lse=True, **arrays, **statics)
    assert type(out) is np.ndarray and type(lse) is np.ndarray
    return out, lse


def _jax_jit_face(
    function: str, platform: str, q: Any, k: Any, v: Any, *, arrays: dict[str, Any], **statics: Any
) -> tuple[np.ndarray, np.ndarray]:
    import jax

    import heed

    def call(q: Any, k: Any, v: Any, arrays: dict[str, Any]) -> Any:
        return getattr(heed, function)(q, k, v, return_lse=True, **arrays, **statics)

    operands = jax.device_put((q, k, v, arrays), jax.devices(platform)[0])
    out, lse = jax.jit(call)(*operands)
    return np.asarray(out), np.asarray(lse)


def _jax_eager_face(
    function: str, platform: str, q: Any, k: Any, v: Any, *, arrays: dict[str, Any], **statics: Any
) -> tuple[np.ndarray, np.ndarray]:
    import jax

    import heed

    q, k, v, arrays = jax.device_put((q, k, v, arrays), jax.devices(platform)[0])
    out, lse = getattr(heed, function)(q, k, v, return_lse=True, **arrays, **statics)
    assert out.devices() == lse.devices() == q.devices()
    return np.asarray(out), np.asarray(lse)


def each_array(convert: Callable[[Any], Any], arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays converted; segment ids may be a pair."""
    return {
        name: tuple(map(convert, value)) if isinstance(value, (tuple, list)) else convert(value)
        for name, value in arrays.items()
    }


def _torch_face(
    function: str, q: Any, k: Any, v: Any, *, arrays: dict[str, Any], **statics: Any
) -> tuple[np.ndarray, np.ndarray]:
    torch = pytest.importorskip("torch")

    import heed

    q, k, v = map(to_torch, (q, k, v))
    out, lse = getattr(heed, function)(q, k, v, return_lse=True, **each_array(to_torch, arrays), **statics)
    assert isinstance(out, torch.Tensor) and out.device == q.device and lse.device == q.device
    return from_torch(out), from_torch(lse)


def to_torch(array: Any, device: str = "cuda:0") -> Any:
    """A copy of a NumPy array in PyTorch, which takes no bfloat16 from NumPy."""
    import torch

    array = np.array(array, order="C")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).to(device).view(torch.bfloat16)
    return torch.from_numpy(array).to(device)


def from_torch(tensor: Any) -> np.ndarray:
    import ml_dtypes
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)
    return tensor.cpu().numpy()


def _cupy_face(
    function: str, q: Any, k: Any, v: Any, *, arrays: dict[str, Any], **statics: Any
) -> tuple[np.ndarray, np.ndarray]:
    cupy = pytest.importorskip("cupy")

    import heed

    try:
        q, k, v = map(to_cupy, (q, k, v))
    except (TypeError, ValueError) as error:
        pytest.skip(f"CuPy {cupy.__version__} cannot hold {np.asarray(q).dtype}: {error}")
    out, lse = getattr(heed, function)(q, k, v, return_lse=True, **each_array(to_cupy, arrays), **statics)
    assert isinstance(out, cupy.ndarray) and out.device == q.device and lse.device == q.device
    return from_cupy(out), from_cupy(lse)


def to_cupy(array: Any) -> Any:
    """A copy of a NumPy array in CuPy, bfloat16 by way of its bits."""
    import cupy

    array = np.array(array, order="C")
    if array.dtype.name == "bfloat16":
        return cupy.asarray(array.view(np.uint16)).view(array.dtype)
    return cupy.asarray(array)


def from_cupy(array: Any) -> np.ndarray:
    if array.dtype.name == "bfloat16":
        return array.view(np.uint16).get().view(array.dtype)
    return array.get()


@pytest.fixture
def seed() -> int:
    """HEED_FUZZ_SEED, or 0: every random test draws from it."""
    return int(os.environ.get("HEED_FUZZ_SEED", "0"))
