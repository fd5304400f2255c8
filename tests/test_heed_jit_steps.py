"""The modules of heed.jit in JAX programs, by the three steps of examples/tutorial.py, and that tutorial itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import gpu_devices
from small_op_faces import expected
from small_op_specs import BY_NAME, OpCase

jax = pytest.importorskip("jax")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import tutorial  # noqa: E402

PLATFORMS = [pytest.param("cpu", id="cpu"), pytest.param("gpu", id="gpu", marks=pytest.mark.gpu)]


@pytest.fixture(params=PLATFORMS)
def platform(request: pytest.FixtureRequest) -> Any:
    """The platform's name, with its first device as JAX's default."""
    device = gpu_devices()[0] if request.param == "gpu" else jax.devices("cpu")[0]
    with jax.default_device(device):
        yield request.param


def on_default(*arrays: np.ndarray) -> Any:
    return [jax.numpy.asarray(x) for x in arrays]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_three_steps(dtype: str, platform: str) -> None:
    for name, call in (("silu", tutorial.silu_and_mul), ("rope", tutorial.apply_rope)):
        case = BY_NAME[f"{name}_{dtype}"].case()
        found = call(*on_default(*case.arrays.values()), platform)
        for want, x in zip(expected(case), jax.tree.leaves(found), strict=True):
            want.check(np.asarray(x), f"{name} {dtype}")
    case = BY_NAME["decode_tutorial_bfloat16" if dtype == "bfloat16" else "decode_tutorial_float16"].case()
    operands = on_default(*(x.astype(np.float32) if dtype == "float32" else x for x in case.arrays.values()))
    found = tutorial.decode_attention(*operands, platform)
    same = OpCase(case.function, {name: np.asarray(x) for name, x in zip("qkv", operands, strict=True)}, case.statics)
    for want, x in zip(expected(same), found, strict=True):
        want.check(np.asarray(x), f"decode {dtype}")


def test_steps_under_vmap(platform: str) -> None:
    """vmap_method="broadcast_all" gives the functions one more axis, which they take as it is; twice, two more."""
    rng = np.random.default_rng(0)
    (x,) = on_default(rng.standard_normal((5, 3, 4, 14)).astype(np.float32))
    double = jax.vmap(jax.vmap(lambda x: tutorial.silu_and_mul(x, platform), 1), 0)(x)
    assert np.array_equal(np.asarray(double).swapaxes(1, 2), np.asarray(tutorial.silu_and_mul(x, platform)))
    q, k, indptr, offsets = on_default(
        rng.standard_normal((5, 7, 4, 16)).astype(np.float32),
        rng.standard_normal((7, 2, 16)).astype(np.float32),
        np.array([0, 3, 7], np.int32),
        rng.integers(0, 1000, (5, 2)).astype(np.int32),
    )

    def rope(q: Any, k: Any, indptr: Any, offsets: Any) -> Any:
        return tutorial.apply_rope(q, k, indptr, offsets, platform)

    for axes in ((0, None, None, 0), (0, None, None, None), (None, None, None, 0)):
        given = [
            x if axis == 0 or x.shape[0] != 5 else x[0] for x, axis in zip((q, k, indptr, offsets), axes, strict=True)
        ]
        mapped = jax.jit(jax.vmap(rope, axes))(*given)
        for i in range(5):
            one = rope(*(x if axis is None else x[i] for x, axis in zip(given, axes, strict=True)))
            for x, y in zip(mapped, one, strict=True):
                assert np.array_equal(np.asarray(x[i]), np.asarray(y)), f"axes {axes}, row {i}"


def test_all_three_compose_in_one_program(platform: str) -> None:
    rng = np.random.default_rng(0)
    gate_up, q, k, v = on_default(*(rng.standard_normal(shape).astype(np.float16)
                                    for shape in ((4, 128), (16, 64), (512, 4, 64), (512, 4, 64))))  # fmt: skip
    indptr, offsets = on_default(np.array([0, 1], np.int32), np.array([512], np.int32))

    def decode_step(gate_up: Any, q: Any, k: Any, v: Any, indptr: Any, offsets: Any) -> Any:
        rotated, _ = tutorial.apply_rope(q[None], k[:1], indptr, offsets, platform)
        return tutorial.silu_and_mul(gate_up, platform), *tutorial.decode_attention(rotated[0], k, v, platform)

    together = jax.jit(decode_step)(gate_up, q, k, v, indptr, offsets)
    for x, y in zip(together, decode_step(gate_up, q, k, v, indptr, offsets), strict=True):
        assert np.array_equal(np.asarray(x), np.asarray(y))


def test_empty_arrays_are_absent_ones(platform: str) -> None:
    """An empty array stands for a log-sum-exp that nobody wants, and for slopes that are not there."""
    case = BY_NAME["decode_tutorial_float16"].case()
    q, k, v = on_default(*case.arrays.values())
    target = tutorial.decode_target(platform, "float16", 64)
    shapes = [((16, 64), np.float16), ((tutorial.SCRATCH_BYTES // 2,), np.float16), ((0,), np.float32)]
    slopes = on_default(np.linspace(0, 1, 16, dtype=np.float32))[0]
    options = {"kv_layout_code": 0, "window_left": -1, "logits_soft_cap": 0.0, "sm_scale": 0.125}
    call = jax.ffi.ffi_call(target, [jax.ShapeDtypeStruct(*one) for one in shapes])
    none = jax.numpy.zeros(0, np.float32)
    plain, with_slopes = (call(q, k, v, x, **options, rope_scale=1.0, rope_theta=1e4)[0] for x in (none, slopes))
    assert np.array_equal(np.asarray(plain), np.asarray(tutorial.decode_attention(q, k, v, platform)[0]))
    arrays = case.arrays | {"alibi_slopes": np.asarray(slopes)}
    expected(OpCase(case.function, arrays, case.statics))[0].check(np.asarray(with_slopes), "with slopes")


def test_errors_reach_jax_with_the_arguments_name(platform: str) -> None:
    (x,) = on_default(np.ones((3, 7), np.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"input: got shape \[3, 7\]"):
        jax.block_until_ready(tutorial.silu_and_mul(x, platform))


def test_the_tutorial_runs_from_top_to_bottom(platform: str) -> None:
    command = [sys.executable, str(EXAMPLES / "tutorial.py"), "--device", platform]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("Every result is right.\n") and "All three in one jax.jit" in done.stdout


def test_the_tutorial_says_so_where_there_is_no_gpu() -> None:
    command = [sys.executable, str(EXAMPLES / "tutorial.py"), "--device", "gpu"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 2 and "got --device gpu" in done.stdout
