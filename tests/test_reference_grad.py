"""The oracle's gradients: against JAX's float64 autodiff of the oracle's forward pass, and against its differences."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest

from expected import expected_gradients, gradient_case
from heed import reference
from specs import BY_NAME, AttentionSpec, make_cotangents, make_inputs
from varlen_specs import VARLEN_BY_NAME, VarlenSpec, make_varlen_cotangents, make_varlen_inputs

attention_backward: Any = reference.attention_backward  # mypy would match unpacked operands with every parameter
attention_backward_varlen: Any = reference.attention_backward_varlen
attention_forward: Any = reference.attention_forward

SPECS: list[AttentionSpec | VarlenSpec] = [
    *(BY_NAME[name] for name in (
        "full_float32", "causal_gqa_d128_float16", "head_dim_59", "head_dim_128_v_96", "head_dim_17_v_40", "gqa_3",
        "mqa_64", "kv_len_0_sinks", "both_len_0", "batch_0", "q_len_1", "kv_len_1_causal", "q_longer_causal",
        "top_left_causal_q_longer", "window_both", "window_0_0", "window_causal_overrides_right", "scale_0.3",
        "scale_negative", "softcap", "sinks", "sinks_causal_empty_rows", "alibi_causal", "alibi_top_left",
        "alibi_q_longer", "segments_cross", "segments_padded", "everything", "everything_top_left",
        "large_logits_float32", "large_logits_sinks", "integer_logits", "skewed_float32",
    )),
    *(VARLEN_BY_NAME[name] for name in (
        "varlen_empty_first", "varlen_no_keys_sinks", "varlen_all_empty_with_rows", "varlen_few_keys_causal",
        "varlen_one_sequence", "varlen_everything",
    )),
]  # fmt: skip
FLOATS = ("sinks", "alibi_slopes")


def in_float64(spec: AttentionSpec | VarlenSpec) -> tuple[list[Any], dict[str, Any], dict[str, Any], Any]:
    """(operands, arrays with gradients, arrays without, cotangents). JAX differentiates 0 * NaN, so NaN is made 0."""
    if isinstance(spec, VarlenSpec):
        inputs, cotangents = make_varlen_inputs(spec), make_varlen_cotangents(spec)
    else:
        inputs, cotangents = make_inputs(spec), make_cotangents(spec)
    floats = {name: inputs.arrays[name].astype(np.float64) for name in FLOATS if name in inputs.arrays}
    others = {name: x for name, x in inputs.arrays.items() if name not in FLOATS}

    def plain(x: Any) -> Any:
        return x if x is None else np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)

    return [plain(x) for x in (inputs.q, inputs.k, inputs.v)], floats, others, [plain(x) for x in cotangents]


def x64(jax: Any) -> contextlib.AbstractContextManager[Any]:
    found: contextlib.AbstractContextManager[Any] = (
        jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64(True)
    )
    return found


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_agrees_with_autodiff_in_float64(spec: AttentionSpec | VarlenSpec) -> None:
    jax = pytest.importorskip("jax")
    operands, floats, others, (dout, dlse) = in_float64(spec)
    options = {name: x for name, x in spec.static_options().items() if not name.startswith("max_seqlen")}
    is_varlen = isinstance(spec, VarlenSpec)
    forward: Any = reference.attention_forward_varlen if is_varlen else reference.attention_forward

    def loss(operands: Any, floats: dict[str, Any]) -> Any:
        out, lse = forward(*operands, **floats, **others, **options, compute_dtype=np.float64)
        total = (out * dout).sum()
        return total if dlse is None else total + jax.numpy.where(jax.numpy.isfinite(lse), lse * dlse, 0.0).sum()

    with x64(jax):
        given = jax.tree.map(jax.numpy.asarray, (operands, floats))
        want, want_floats = jax.jit(jax.grad(loss, (0, 1)))(*given)
        wanted: list[Any] = [*want, *(want_floats.get(name) for name in FLOATS)]
        wanted = [None if x is None else np.asarray(x) for x in wanted]
    backward = attention_backward_varlen if is_varlen else attention_backward
    found = backward(dout, *operands, None, None, dlse=dlse, **floats, **others, **options)
    # Both are float64 and round differently, by what logits of 1e4 lose: P is off by 1e4 times 2^-53 and a bit. Where
    # gradients vanish, what cancels is as large as the operands.
    largest = max(np.abs(x).max(initial=0.0) for x in (*operands, dout))
    for name, x, y in zip(found._fields, found, wanted, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == np.float64 and x.shape == y.shape
            bound = 5e-12 * np.abs(y).max(initial=0.0) + 1e-13 * largest
            assert np.abs(x - y).max(initial=0.0) <= bound, name


@pytest.mark.parametrize(
    "name", ["everything", "everything_top_left", "softcap_gqa", "sinks", "alibi", "segments_cross"]
)
def test_agrees_with_differences(name: str) -> None:
    """Along random directions in all operands at once: shares neither formulas nor a tape with anything."""
    spec = BY_NAME[name]
    operands, floats, others, _ = in_float64(spec)
    rng = np.random.default_rng(3)
    options = others | spec.static_options()
    out, lse = attention_forward(*operands, **floats, **options)
    dout, dlse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
    gradients = attention_backward(dout, *operands, out, lse, dlse=dlse, **floats, **options)
    named: list[Any] = [*operands, floats.get("sinks"), floats.get("alibi_slopes")]
    directions: list[Any] = [None if x is None else rng.standard_normal(x.shape) for x in named]

    def loss(step: float) -> float:
        q, k, v, *rest = (None if x is None else x + step * d for x, d in zip(named, directions, strict=True))
        moved = dict(zip(FLOATS, rest, strict=True))
        out, lse = attention_forward(q, k, v, **moved, **options)
        return float((out * dout).sum() + np.where(np.isfinite(lse), lse, 0.0).ravel() @ dlse.ravel())

    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True) if g is not None)
    h = 1e-4  # an error of h^4 and one of 2^-53 times the loss over h
    difference = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    size = sum(float(np.abs(g * d).sum()) for g, d in zip(gradients, directions, strict=True) if g is not None)
    assert abs(slope - difference) < 1e-9 * size


def test_given_out_and_lse_are_used() -> None:
    spec = BY_NAME["everything"]
    inputs, (dout, dlse) = make_inputs(spec), make_cotangents(spec)
    operands, options = (inputs.q, inputs.k, inputs.v), spec.static_options() | inputs.arrays
    out, lse = attention_forward(*operands, **options)
    want = attention_backward(dout, *operands, **options, dlse=dlse)
    same = attention_backward(dout, *operands, out, lse, **options, dlse=dlse)
    other = attention_backward(dout, *operands, out + 0.5, lse - 0.5, **options, dlse=dlse)
    for x, y, z in zip(want, same, other, strict=True):
        assert np.array_equal(x, y)
        assert x is want.dv or not np.allclose(x, z)
    assert np.allclose(other.dv, want.dv * np.exp(0.5))


def test_leading_axes_broadcast() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((3, 1, 2, 7, 4, 8)), rng.standard_normal((1, 2, 2, 9, 2, 8))
    v, sinks = rng.standard_normal((1, 1, 2, 9, 2, 6)), rng.standard_normal((3, 1, 4))
    slopes, dlse = rng.random((1, 2, 4)), rng.standard_normal((1, 1, 2, 4, 7))
    dout = rng.standard_normal((1, 2, 2, 7, 4, 6))
    found = attention_backward(dout, q, k, v, sinks=sinks, alibi_slopes=slopes, dlse=dlse)
    assert [x.shape[:2] for x in found] == [(3, 2)] * 5
    for m, n in np.ndindex(3, 2):
        want = attention_backward(
            dout[0, n], q[m, 0], k[0, n], v[0, 0], sinks=sinks[m, 0], alibi_slopes=slopes[0, n], dlse=dlse[0, 0]
        )
        for x, y in zip(found, want, strict=True):
            assert np.allclose(x[m, n], y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hidden", [np.nan, np.inf, -np.inf])
def test_hidden_numbers_never_matter(hidden: float) -> None:
    """Pair by pair: what one query must not see may be what another one sees."""
    rng = np.random.default_rng(0)
    q, k, v, dout = map(np.array, rng.standard_normal((4, 1, 12, 2, 5)))
    want = attention_backward(dout[:, :6], q[:, :6], k[:, :6], v[:, :6], is_causal=True)
    k[:, 6:], v[:, 6:] = hidden, hidden
    found = attention_backward(dout, q, k, v, is_causal=True)
    assert np.allclose(found.dq[:, :6], want.dq, rtol=1e-12, atol=1e-12)
    assert np.isnan(found.dq[:, 6:]).all() and np.isnan(found.dk[:, :6]).all()  # visible there
    ids = np.repeat([0, 1], 6)[None]
    found = attention_backward(dout, q, k, v, is_causal=True, segment_ids=ids)
    for x, y in zip(found[:3], want[:3], strict=True):
        assert np.allclose(x[:, :6], y, rtol=1e-12, atol=1e-12)
    dout[:, 6:], q[:, 6:] = hidden, hidden
    found = attention_backward(dout, q, k, v, is_causal=True, segment_ids=ids)
    for x, y in zip(found[:3], want[:3], strict=True):
        assert np.allclose(x[:, :6], y, rtol=1e-12, atol=1e-12)


def test_queries_without_keys_give_nothing_but_to_their_sink() -> None:
    rng = np.random.default_rng(0)
    q, dout = rng.standard_normal((2, 1, 5, 2, 4))
    k, v = rng.standard_normal((2, 1, 3, 2, 4))
    dout[:, :2] = np.nan
    found = attention_backward(dout, q, k, v, is_causal=True)
    assert not found.dq[:, :2].any() and all(np.isfinite(x).all() for x in found[:3])
    dlse = rng.standard_normal((1, 2, 5))
    dout[:, :2] = 0.0
    found = attention_backward(dout, q, k, v, is_causal=True, sinks=np.zeros(2), dlse=dlse)
    seeing = attention_backward(dout[:, 2:], q[:, 2:], k, v, is_causal=True, sinks=np.zeros(2), dlse=dlse[..., 2:])
    assert np.allclose(found.dsinks - seeing.dsinks, dlse[0, :, :2].sum(-1))  # their lse is the sink itself


def test_naive_rounds_like_a_plain_implementation() -> None:
    case = gradient_case(BY_NAME["full_bfloat16"])
    dout, dlse = case.cotangents
    found = reference.naive_attention_backward(dout, *case.operands, dlse=dlse)
    assert {x.dtype for x in found[:3]} == {case.operands[0].dtype}
    for x, oracle in zip(found[:3], case.expected.oracle[:3], strict=True):
        error = np.abs(x.astype(np.float64) - oracle).max() / np.abs(oracle).max()
        assert 2.0**-12 < error < 2.0**-5  # that of bfloat16, not that of float32


# The yardstick -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_yardstick_sees_small_errors(dtype: str) -> None:
    """Worst of several evaluations or not: what a wrong formula or one sloppy rounding too many does, fails."""
    spec = AttentionSpec("yardstick", q_len=40, kv_len=60, num_q_heads=4, sinks=True, alibi=True, dtype=dtype)
    inputs, (dout, _) = make_inputs(spec), make_cotangents(spec)
    dlse = np.random.default_rng(0).standard_normal((2, 4, 40)).astype(np.float32)
    operands = inputs.q, inputs.k, inputs.v
    want = expected_gradients((dout, dlse), operands, **inputs.arrays)
    good = reference.naive_attention_backward(dout, *operands, dlse=dlse, **inputs.arrays)
    want.check(good, "naive")
    eps = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    for name, x in good._asdict().items():
        # Half a percent of one element, or sixty-four units in the last place of what is stored.
        step = max(0.005, 64 * eps) if x.ndim == 1 else 64 * eps
        bad = x.astype(np.float64)
        bad.flat[bad.size // 2] += step * np.abs(bad).max()
        with pytest.raises(AssertionError, match=name):
            want.check(good._replace(**{name: bad.astype(x.dtype)}), "spoilt")
    without = reference.naive_attention_backward(dout, *operands, **inputs.arrays)
    with pytest.raises(AssertionError, match="dq"):
        want.check(without, "no dlse")
    with pytest.raises(AssertionError, match="dsinks: got"):
        want.check(good._replace(dsinks=None), "no dsinks")
