"""Conformance: every named spec, through every face and platform, against the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import heed
from conftest import Face
from expected import expected, expected_of
from specs import BENCHMARKS, BY_NAME, CONFORMANCE, AttentionSpec, make_inputs

flash_mha: Any = heed.flash_mha  # mypy would match unpacked options with every parameter


def call(face: Face, spec: AttentionSpec, **overrides: Any) -> tuple[np.ndarray, np.ndarray]:
    inputs = make_inputs(spec)
    return face(inputs.q, inputs.k, inputs.v, arrays=inputs.arrays, **(spec.static_options() | overrides))


@pytest.mark.parametrize("spec", CONFORMANCE, ids=lambda spec: spec.name)
def test_spec(spec: AttentionSpec, flash_mha_face: Face) -> None:
    out, lse = call(flash_mha_face, spec)
    expected_of(spec).check(out, lse, spec.name)


@pytest.mark.parametrize("spec", BENCHMARKS, ids=lambda spec: spec.name)
def test_benchmark_rows_are_right(spec: AttentionSpec) -> None:
    """What is timed is also checked: blocks of rows from both ends and the middle, in the last KV head's group."""
    inputs = make_inputs(spec)
    options = spec.static_options()
    out, lse = flash_mha(inputs.q, inputs.k, inputs.v, return_lse=True, **options)
    group = spec.num_q_heads // spec.num_kv_heads
    heads, kv_heads = slice(-group, None), slice(-1, None)
    length = 16
    for start in sorted({0, (spec.q_len - length) // 2 + 3, spec.q_len - length} if spec.q_len > length else {0}):
        rows = slice(start, start + min(length, spec.q_len))
        # Cutting the keys after the last row's diagonal keeps bottom-right masks where they are.
        stop = spec.kv_len - (spec.q_len - rows.stop) if spec.is_causal else spec.kv_len
        want = expected(
            inputs.q[-1:, rows, heads], inputs.k[-1:, :stop, kv_heads], inputs.v[-1:, :stop, kv_heads], **options
        )
        want.check(out[-1:, rows, heads], lse[-1:, heads, rows], f"{spec.name} rows from {start}")


@pytest.mark.parametrize("name", ["everything", "everything_top_left", "causal_bfloat16", "kv_len_0", "q_len_0"])
def test_out_is_the_same_with_and_without_lse(name: str) -> None:
    spec = BY_NAME[name]
    inputs = make_inputs(spec)
    options = spec.static_options() | inputs.arrays
    alone = flash_mha(inputs.q, inputs.k, inputs.v, **options)
    out, lse = flash_mha(inputs.q, inputs.k, inputs.v, return_lse=True, **options)
    assert np.array_equal(alone, out)
    assert alone.shape == (spec.batch, spec.q_len, spec.num_q_heads, spec.head_dim_v) and alone.dtype == spec.np_dtype
    assert lse.shape == (spec.batch, spec.num_q_heads, spec.q_len) and lse.dtype == np.float32


def test_arguments_work_by_position() -> None:
    inputs = make_inputs(AttentionSpec("positions", window_size=(5, 3)))
    by_position = flash_mha(inputs.q, inputs.k, inputs.v, 0.3, True, (5, 3))
    by_name = flash_mha(q=inputs.q, k=inputs.k, v=inputs.v, softmax_scale=0.3, is_causal=True, window_size=(5, 3))
    assert np.array_equal(by_position, by_name)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_equivalent_spellings_agree(dtype: str) -> None:
    """Arguments that mean the same give the same, bit for bit."""
    spec = AttentionSpec("spellings", q_len=70, kv_len=90, num_q_heads=4, head_dim_qk=16, dtype=dtype)
    q, k, v = (getattr(make_inputs(spec), name) for name in "qkv")

    def same(first: dict[str, Any], second: dict[str, Any]) -> None:
        for a, b in zip(*(flash_mha(q, k, v, return_lse=True, **options) for options in (first, second)), strict=True):
            assert np.array_equal(a, b), f"{first} against {second}"

    ids = np.zeros((2, 70), np.int32), np.zeros((2, 90), np.int32)
    same({}, {"softmax_scale": 0.25})
    same({}, {"softcap": 0.0})
    same({}, {"window_size": [-1, -1]})
    same({}, {"backend": "cpu"})
    same({}, {"deterministic": True})
    same({"is_causal": True}, {"is_causal": True, "window_size": (-1, 17)})
    same({"window_size": (9, 4)}, {"window_size": (np.int64(9), np.int32(4))})
    same({"softmax_scale": 0.5}, {"softmax_scale": np.float64(0.5)})
    same({"segment_ids": ids}, {"segment_ids": tuple(x.astype(np.int64) for x in ids)})
    same({"segment_ids": ids}, {"segment_ids": list(ids)})
    same({"segment_ids": ids}, {"segment_ids": tuple(x.astype(np.uint8) for x in ids)})


@pytest.mark.parametrize("setting", ["rank_promotion", "dtype_promotion", "x64"])
def test_works_under_strict_jax_settings(setting: str) -> None:
    jax = pytest.importorskip("jax")
    contexts = {
        "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
        "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
        "x64": lambda: jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64(True),
    }
    spec = BY_NAME["everything"]
    inputs = make_inputs(spec)
    arrays = dict(inputs.arrays)
    if setting == "x64":
        arrays["segment_ids"] = tuple(ids.astype(np.int64) for ids in arrays["segment_ids"])
    with contexts[setting]():
        operands = jax.device_put((inputs.q, inputs.k, inputs.v, arrays), jax.devices("cpu")[0])
        options = spec.static_options() | {"return_lse": True}
        eager = flash_mha(*operands[:3], **operands[3], **options)
        jitted = jax.jit(lambda q, k, v, arrays: flash_mha(q, k, v, **arrays, **options))(*operands)
        abstract = jax.eval_shape(lambda q, k, v, arrays: flash_mha(q, k, v, **arrays, **options), *operands)
    for out, lse in (eager, jitted):
        expected_of(spec).check(np.asarray(out), np.asarray(lse), setting)
    assert [(x.shape, x.dtype) for x in abstract] == [(x.shape, x.dtype) for x in jitted]
