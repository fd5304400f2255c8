"""Shared by all tests: four CPU devices for JAX, the marker `gpu`, the seed of random tests, the faces under test."""

from __future__ import annotations

import os
import sys

# Before anything imports JAX: sharding tests need several devices.
_DEVICES_FLAG = "--xla_force_host_platform_device_count"
if _DEVICES_FLAG not in os.environ.get("XLA_FLAGS", "") and "jax" not in sys.modules:
    os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + f" {_DEVICES_FLAG}=4").strip()
# Before anything imports NumPy: on a busy machine OpenBLAS threads spin for each other, and the oracle's many small
# products take a hundred times longer.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import functools  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU; skipped where JAX sees none")


@functools.cache
def gpu_devices() -> tuple[Any, ...]:
    import jax

    try:
        return tuple(jax.devices("cuda"))
    except RuntimeError:
        return ()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not gpu_devices():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="JAX sees no NVIDIA GPU"))


# One face of flash_mha on one platform: takes NumPy arrays, gives NumPy arrays (out, lse).
Face = Callable[..., tuple[np.ndarray, np.ndarray]]

FACES = [
    pytest.param("numpy", id="numpy"),
    pytest.param("jax_jit:cpu", id="jax_jit_cpu"),
    pytest.param("jax_jit:cuda", id="jax_jit_gpu", marks=pytest.mark.gpu),
]


@pytest.fixture(params=FACES)
def flash_mha_face(request: pytest.FixtureRequest) -> Face:
    """flash_mha through each face and platform, with return_lse=True. A new backend is one more row of FACES."""
    face, _, platform = str(request.param).partition(":")
    return _numpy_face if face == "numpy" else functools.partial(_jax_jit_face, platform)


def _numpy_face(q: Any, k: Any, v: Any, *, arrays: dict[str, Any], **statics: Any) -> tuple[np.ndarray, np.ndarray]:
    import heed

    out, lse = heed.flash_mha(q, k, v, return_lse=True, **arrays, **statics)
    assert type(out) is np.ndarray and type(lse) is np.ndarray
    return out, lse


def _jax_jit_face(
    platform: str, q: Any, k: Any, v: Any, *, arrays: dict[str, Any], **statics: Any
) -> tuple[np.ndarray, np.ndarray]:
    import jax

    import heed

    def call(q: Any, k: Any, v: Any, arrays: dict[str, Any]) -> Any:
        return heed.flash_mha(q, k, v, return_lse=True, **arrays, **statics)

    operands = jax.device_put((q, k, v, arrays), jax.devices(platform)[0])
    out, lse = jax.jit(call)(*operands)
    return np.asarray(out), np.asarray(lse)


@pytest.fixture
def seed() -> int:
    """HEED_FUZZ_SEED, or 0: every random test draws from it."""
    return int(os.environ.get("HEED_FUZZ_SEED", "0"))
