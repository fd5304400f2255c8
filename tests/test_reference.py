"""The oracle itself, against loops that spell out the definition and against jax.nn.dot_product_attention."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from expected import expected, expected_of
from heed import reference
from specs import BY_NAME, CONFORMANCE, AttentionSpec, make_inputs


def loops(spec: AttentionSpec) -> tuple[np.ndarray, np.ndarray]:
    """One query and one key at a time, in Python floats: shares nothing with reference.py."""
    inputs = make_inputs(spec)
    q, k, v = (x.astype(np.float64) for x in (inputs.q, inputs.k, inputs.v))
    ids = inputs.arrays.get("segment_ids")
    q_ids, kv_ids = (ids if isinstance(ids, tuple) else (ids, ids)) if ids is not None else (None, None)
    scale = spec.softmax_scale if spec.softmax_scale is not None else 1 / math.sqrt(spec.head_dim_qk)
    left, right = spec.window_size
    offset = spec.kv_len - spec.q_len if spec.causal_align == "bottom_right" else 0
    out = np.zeros((spec.batch, spec.q_len, spec.num_q_heads, spec.head_dim_v))
    lse = np.full((spec.batch, spec.num_q_heads, spec.q_len), -np.inf)
    for b, h, i in np.ndindex(spec.batch, spec.num_q_heads, spec.q_len):
        kv_head = h * spec.num_kv_heads // spec.num_q_heads
        weights = []
        for j in range(spec.kv_len):
            if spec.is_causal and j > i + offset:
                continue
            if left >= 0 and j < i + offset - left:
                continue
            if right >= 0 and not spec.is_causal and j > i + offset + right:
                continue
            if q_ids is not None and kv_ids is not None and q_ids[b, i] != kv_ids[b, j]:
                continue
            score = scale * math.fsum(q[b, i, h] * k[b, j, kv_head])
            if spec.softcap:
                score = spec.softcap * math.tanh(score / spec.softcap)
            if spec.alibi:
                score -= float(inputs.arrays["alibi_slopes"][h]) * abs(i + offset - j)
            weights.append((score, j))
        terms = [score for score, _ in weights]
        if spec.sinks:
            terms.append(float(inputs.arrays["sinks"][h]))
        if terms:
            top = max(terms)
            lse[b, h, i] = top + math.log(math.fsum(math.exp(term - top) for term in terms))
        for score, j in weights:
            out[b, i, h] += math.exp(score - lse[b, h, i]) * v[b, j, kv_head]
    return out, lse


attention_forward: Any = reference.attention_forward  # mypy would match unpacked operands with every parameter

SMALL: dict[str, Any] = {"q_len": 11, "kv_len": 13, "num_q_heads": 4, "head_dim_qk": 5, "head_dim_v": 3, "batch": 2}
DEFINITIONS = [
    AttentionSpec("ref_full", **SMALL),
    AttentionSpec("ref_causal", is_causal=True, **SMALL),
    AttentionSpec("ref_causal_q_longer", is_causal=True, **{**SMALL, "q_len": 19}),
    AttentionSpec("ref_top_left", is_causal=True, causal_align="top_left", **SMALL),
    AttentionSpec("ref_window", window_size=(3, 2), **SMALL),
    AttentionSpec("ref_window_left", window_size=(3, -1), **SMALL),
    AttentionSpec("ref_window_right", window_size=(-1, 2), causal_align="top_left", **SMALL),
    AttentionSpec("ref_window_causal", window_size=(3, 5), is_causal=True, **SMALL),
    AttentionSpec("ref_softcap", softcap=2.0, softmax_scale=1.3, **SMALL),
    AttentionSpec("ref_sinks", sinks=True, is_causal=True, **{**SMALL, "q_len": 19}),
    AttentionSpec("ref_alibi", alibi=True, **SMALL),
    AttentionSpec("ref_alibi_top_left", alibi=True, causal_align="top_left", **SMALL),
    AttentionSpec("ref_segments", segments="cross", **SMALL),
    AttentionSpec("ref_packed", segments="packed", **{**SMALL, "q_len": 13}),
    AttentionSpec("ref_kv_len_0", sinks=True, **{**SMALL, "kv_len": 0}),
    AttentionSpec("ref_large", numbers="large_logits", **SMALL),
    AttentionSpec(
        "ref_all", is_causal=True, window_size=(6, 1), softcap=3.0, sinks=True, alibi=True, segments="cross", **SMALL
    ),
]


@pytest.mark.parametrize("spec", DEFINITIONS, ids=lambda spec: spec.name)
def test_float64_reference_is_the_definition(spec: AttentionSpec) -> None:
    inputs = make_inputs(spec)
    out, lse = reference.attention_forward(inputs.q, inputs.k, inputs.v, **spec.static_options(), **inputs.arrays)
    want_out, want_lse = loops(spec)
    assert out.dtype == lse.dtype == np.float64
    # Both are float64 and sum in different orders: they differ by a few roundings of the largest log-sum-exp.
    assert np.array_equal(np.isneginf(lse), np.isneginf(want_lse))
    scale = max(1.0, np.abs(want_lse[np.isfinite(want_lse)]).max(initial=0.0))
    assert np.abs(out - want_out).max(initial=0.0) < 1e-13 * scale
    seen = np.isfinite(lse)
    assert np.abs(lse[seen] - want_lse[seen]).max(initial=0.0) < 1e-13 * scale


# XLA's tanh is less exact than NumPy's: a soft cap is compared where the output's rounding is larger.
@pytest.mark.parametrize(
    "spec",
    [spec for spec in DEFINITIONS if not spec.softcap] + CONFORMANCE[:9] + [BY_NAME["softcap_gqa"]],
    ids=lambda spec: spec.name,
)
def test_jnp_reference_obeys_the_rule(spec: AttentionSpec) -> None:
    jnp = pytest.importorskip("jax.numpy")
    # float16, whose rounding of P and out both have: with a handful of keys NumPy's float32 is exact by luck.
    spec = dataclasses.replace(spec, dtype="float16")
    inputs = make_inputs(spec)
    options = spec.static_options() | inputs.arrays
    out, lse = reference.naive_attention_forward(*(jnp.asarray(x) for x in (inputs.q, inputs.k, inputs.v)), **options)
    expected_of(spec).check(out, lse, spec.name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"window_size": (9, 4)},
        {"softmax_scale": 0.4},
        {"is_causal": True, "window_size": (9, -1)},
    ],
    ids=str,
)
def test_agrees_with_jax_nn(options: dict[str, Any]) -> None:
    jax = pytest.importorskip("jax")
    spec = AttentionSpec("jax_nn", q_len=30, kv_len=30, num_q_heads=4, head_dim_qk=16)
    inputs = make_inputs(spec)
    left, right = options.get("window_size", (-1, -1))
    peer = jax.nn.dot_product_attention(
        inputs.q, inputs.k, inputs.v,
        scale=options.get("softmax_scale"),
        is_causal=options.get("is_causal", False),
        local_window_size=None if (left, right) == (-1, -1) else (left, max(right, 0)),
    )  # fmt: skip
    expected(inputs.q, inputs.k, inputs.v, **options).check(peer, None, "jax.nn.dot_product_attention")


def test_leading_axes_broadcast() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((3, 1, 2, 7, 4, 8)), rng.standard_normal((1, 2, 2, 9, 2, 8))
    v, sinks = rng.standard_normal((1, 1, 2, 9, 2, 6)), rng.standard_normal((3, 1, 4))
    ids = (rng.integers(0, 2, (1, 2, 2, 7)), rng.integers(0, 2, (1, 1, 2, 9)))
    slopes = rng.random((1, 2, 4))
    out, lse = reference.attention_forward(q, k, v, sinks=sinks, segment_ids=ids, alibi_slopes=slopes)
    assert out.shape == (3, 2, 2, 7, 4, 6) and lse.shape == (3, 2, 2, 4, 7)
    for m, n in np.ndindex(3, 2):
        want = reference.attention_forward(
            q[m, 0],
            k[0, n],
            v[0, 0],
            sinks=sinks[m, 0],
            segment_ids=(ids[0][0, n], ids[1][0, 0]),
            alibi_slopes=slopes[0, n],
        )
        assert np.array_equal(out[m, n], want[0]) and np.array_equal(lse[m, n], want[1])


@pytest.mark.parametrize("hidden", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("xp_name", ["numpy", "jax.numpy"])
def test_hidden_numbers_never_matter(hidden: float, xp_name: str) -> None:
    xp = pytest.importorskip(xp_name)
    spec = AttentionSpec("hidden", q_len=12, kv_len=12, is_causal=True)
    inputs = make_inputs(spec)
    want = expected(inputs.q[:, :6], inputs.k[:, :6], inputs.v[:, :6], is_causal=True)
    inputs.k[:, 6:] = hidden
    inputs.v[:, 6:] = hidden
    out, lse = attention_forward(*(xp.asarray(x) for x in (inputs.q, inputs.k, inputs.v)), is_causal=True)
    assert np.isfinite(np.asarray(out[:, :6])).all() and np.isnan(np.asarray(out[:, 6:])).all()
    want.check(np.asarray(out[:, :6], np.float32), np.asarray(lse[..., :6], np.float32), xp_name)


def test_visible_specials_propagate() -> None:
    q, k, v = (np.ones((1, 4, 1, 3)) for _ in range(3))
    v[0, 1, 0], v[0, 2, 0] = (np.nan, np.inf, 1.0), (1.0, 1.0, -np.inf)
    out, _ = reference.attention_forward(q, k, v, is_causal=True)
    nan, inf = np.nan, np.inf
    want = np.array([[1, 1, 1], [nan, inf, 1], [nan, inf, -inf], [nan, inf, -inf]])
    assert np.array_equal(out[0, :, 0], want, equal_nan=True)
    v[0, 3, 0, 1] = -inf
    out, _ = reference.attention_forward(q, k, v, is_causal=True)
    assert np.isnan(out[0, 3, 0, 1])
    k[0, 3, 0, 0] = nan
    out, lse = reference.attention_forward(q, k, v, is_causal=True)
    assert np.isnan(out[0, 3]).all() and np.isnan(lse[0, 0, 3]) and np.isfinite(lse[0, 0, :3]).all()


def test_works_under_strict_jax_settings_and_jit() -> None:
    jax = pytest.importorskip("jax")
    spec = AttentionSpec(
        "ref_strict", is_causal=True, window_size=(6, 1), sinks=True, alibi=True, segments="cross", **SMALL
    )
    inputs = make_inputs(spec)
    options = spec.static_options()
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        out, lse = jax.jit(lambda q, k, v, arrays: reference.attention_forward(q, k, v, **options, **arrays))(
            inputs.q, inputs.k, inputs.v, inputs.arrays
        )
    expected_of(spec).check(out, lse, "strict JAX")


def test_does_not_import_jax() -> None:
    code = (
        "import sys, numpy as np\nfrom heed import reference\n"
        "x = np.ones((1, 2, 1, 4), np.float32)\nreference.attention_forward(x, x, x)\nassert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_naive_rounds_like_a_plain_implementation() -> None:
    inputs = make_inputs(BY_NAME["full_bfloat16"])
    out, lse = reference.naive_attention_forward(inputs.q, inputs.k, inputs.v)
    oracle, oracle_lse = reference.attention_forward(inputs.q, inputs.k, inputs.v)
    assert out.dtype == inputs.q.dtype and lse.dtype == np.float32
    error = np.abs(out.astype(np.float64) - oracle).max() / np.abs(oracle).max()
    assert 2.0**-12 < error < 2.0**-6  # that of bfloat16, not that of float32
    assert np.abs(lse - oracle_lse).max() < 1e-5


def test_specs_describe_what_they_say() -> None:
    assert len(CONFORMANCE) >= 60
    assert {spec.dtype for spec in CONFORMANCE} == {"float32", "float16", "bfloat16"}
    assert BY_NAME["b1_s4096_h8_8_d128_float32"].flops() == 4 * 4096 * 4096 * 8 * 128
    causal = BY_NAME["b1_s4096_h8_8_d128_causal_float32"].flops() / BY_NAME["b1_s4096_h8_8_d128_float32"].flops()
    assert 0.5 < causal < 0.501
    skewed = BY_NAME["skewed_float32"]
    inputs = make_inputs(skewed)
    _, lse = reference.attention_forward(inputs.q, inputs.k, inputs.v)
    assert 60 < np.median(lse[0]) - np.median(lse[1:]) < 110
    large = BY_NAME["large_logits_float32"]
    inputs = make_inputs(large)
    _, lse = reference.attention_forward(inputs.q, inputs.k, inputs.v)
    assert lse.max() > 1e4
