"""One test per bug class that backward passes of attention libraries have shipped.

Head dims, group sizes, D_qk != D_v, zero lengths, tails and large logits are rows of the named specs, whose gradients
test_flash_mha_grad.py checks (test_correctness_classes.py keeps the rows there). Graphs, streams and races of a GPU are
in test_grad_gpu.py, mapped axes in test_jax_grad_vmap.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import heed
from expected import expected_gradients, expected_gradients_varlen, judge
from grad_faces import GRAD_FACES, GradFace, bwd_of, grad_face_of
from heed._arrays import numpy_view
from heed._lib import function
from heed._problem import BWD_OPERAND_NAMES, attention_bwd_text, attention_statics, resolve_attention_bwd
from heed.reference import Gradients
from specs import DTYPES, AttentionSpec, make_inputs
from test_correctness_classes import CHANGES, sparse
from tolerance import assert_close


@pytest.fixture(params=GRAD_FACES)
def face(request: pytest.FixtureRequest) -> GradFace:
    return grad_face_of(request.param)


def draw(spec: AttentionSpec, seed: int = 0) -> tuple[Any, Any, dict[str, Any]]:
    """Operands, cotangents without NaN, arrays."""
    inputs = make_inputs(spec, seed)
    rng = np.random.default_rng([7, seed])
    dout = rng.standard_normal((spec.batch, spec.q_len, spec.num_q_heads, spec.head_dim_v)).astype(spec.np_dtype)
    dlse = rng.standard_normal((spec.batch, spec.num_q_heads, spec.q_len)).astype(np.float32)
    return (inputs.q, inputs.k, inputs.v), (dout, dlse), inputs.arrays


# Rows without keys, and what a mask hides ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_without_keys_have_gradient_0(dtype: str, face: GradFace) -> None:
    """...and give none, whatever their cotangents hold."""
    spec = AttentionSpec("blind", q_len=100, kv_len=37, num_q_heads=4, is_causal=True, dtype=dtype)
    (q, k, v), (dout, dlse), _ = draw(spec)
    dout[:, :63], dlse[..., :63], q[:, :63] = np.nan, np.inf, np.nan
    found = face("flash_mha", (q, k, v), (dout, dlse), {}, is_causal=True)
    assert not found.dq[:, :63].any()
    seeing = (q[:, 63:], k, v), (dout[:, 63:], dlse[..., 63:])
    want = expected_gradients(seeing[1], seeing[0], is_causal=True)
    want.check(found._replace(dq=found.dq[:, 63:]), "the rest")


def test_a_sink_learns_from_queries_without_keys(face: GradFace) -> None:
    """Their LSE is the sink itself: its gradient is theirs."""
    spec = AttentionSpec("blind_sinks", q_len=100, kv_len=37, num_q_heads=4, is_causal=True, sinks=True)
    operands, (_, dlse), arrays = draw(spec)
    dout = np.zeros((2, 100, 4, 64), np.float32)
    dlse[..., 63:] = 0.0
    found = face("flash_mha", operands, (dout, dlse), arrays, is_causal=True)
    expected_gradients((dout, dlse), operands, is_causal=True, **arrays).check(found, "sinks")
    assert found.dsinks is not None and found.dsinks.all() and not any(x.any() for x in found[:3])


@pytest.mark.parametrize("hidden", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_numbers_never_reach_a_gradient(dtype: str, hidden: float, face: GradFace) -> None:
    """Two documents token by token: one holds NaN or infinity in every operand, right next to the other's numbers."""
    spec = AttentionSpec("hidden_grad", q_len=75, kv_len=75, num_q_heads=4, head_dim_qk=40, dtype=dtype)
    operands, (dout, dlse), _ = draw(spec)
    is_spoilt = np.arange(75) % 3 == 1
    ids = np.where(is_spoilt, 7, 0)[None].repeat(2, 0).astype(np.int32)
    for x in (*operands, dout):
        x[:, is_spoilt] = hidden
    dlse[..., is_spoilt] = hidden
    found = face("flash_mha", operands, (dout, dlse), {"segment_ids": ids}, is_causal=True)
    clean = np.flatnonzero(~is_spoilt)
    q, k, v = (x[:, clean] for x in operands)
    want = expected_gradients((dout[:, clean], dlse[..., clean]), (q, k, v), is_causal=True)
    want.check(Gradients(*(x[:, clean] for x in found[:3])), f"beside {hidden}")


@pytest.mark.parametrize("hidden", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [{"is_causal": True}, {"window_size": (20, 3)}], ids=["causal", "window"])
def test_keys_that_a_query_does_not_see_do_not_reach_its_gradient(
    options: dict[str, Any], hidden: float, face: GradFace
) -> None:
    """The tile that the mask cuts holds keys that are NaN to some queries and hidden from others."""
    spec = AttentionSpec("hidden_keys", q_len=75, kv_len=75, num_q_heads=4, head_dim_qk=40)
    (q, k, v), (dout, dlse), _ = draw(spec)
    want = expected_gradients((dout, dlse), (q, k, v), **options)
    k, v = k.copy(), v.copy()
    k[:, 41:], v[:, 41:] = hidden, hidden
    found = face("flash_mha", (q, k, v), (dout, dlse), {}, **options)
    blind = slice(0, 38)
    kept = [x[:, blind] for x in (want.oracle.dq, want.naive(8).dq, found.dq)]
    assert_close(kept[2], kept[1], kept[0], np.float32, f"dq beside {hidden}")


def test_packed_rows_outside_every_sequence_give_nothing(face: GradFace) -> None:
    rng = np.random.default_rng(0)
    q, k, v, dout = rng.standard_normal((4, 60, 2, 32)).astype(np.float32)
    dlse = rng.standard_normal((2, 60)).astype(np.float32)
    arrays = {"cu_seqlens_q": np.array([7, 20, 20, 41], np.int32), "seqused_k": np.array([9, 3, 30], np.int32)}
    is_used = np.zeros(60, bool)
    is_used[7:41] = True
    is_key = is_used.copy()
    is_key[16:20] = False
    clean = expected_gradients_varlen((dout, dlse), (q, k, v), is_causal=True, **arrays)
    for x in (q, dout):
        x[~is_used] = np.nan
    dlse[:, ~is_used] = np.nan
    k[~is_key], v[~is_key] = np.nan, np.inf
    found = face("flash_mha_varlen", (q, k, v), (dout, dlse), arrays, is_causal=True)
    clean.check(found, "packed")
    assert not found.dq[~is_used].any() and not found.dk[~is_key].any() and not found.dv[~is_key].any()


# LSE far from 0 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"q_len": 192, "kv_len": 192, "segments": "packed"},
        {"q_len": 192, "kv_len": 192, "window_size": (70, 0), "dtype": "bfloat16"},
        {"q_len": 1, "kv_len": 128, "dtype": "float16"},
        {"q_len": 64, "kv_len": 448, "is_causal": True},
        {"q_len": 192, "kv_len": 192, "is_causal": True, "sinks": True, "alibi": True},
    ],
    ids=["segments", "window", "one_query", "causal", "sinks"],
)
@pytest.mark.parametrize("level", [-100.0, -3000.0, 100.0, 3000.0])
def test_lse_far_below_and_above_what_exp_can_take(level: float, changes: dict[str, Any], face: GradFace) -> None:
    """exp(-lse) overflows where lse is below -88.7: exp(score - lse) must not be taken apart."""
    spec = AttentionSpec("far_lse", num_q_heads=4, softmax_scale=1.0, **changes)
    options = spec.static_options()

    def check(seed: int) -> None:
        (q, k, v), cotangents, arrays = draw(spec, seed)
        q[..., 1:] *= q.dtype.type(0.25)  # scores spread by a few around the level
        q[..., 0], k[..., 0] = abs(level) ** 0.5, np.sign(level) * abs(level) ** 0.5
        if spec.sinks:
            arrays["sinks"] += np.float32(level)
        _, lse = heed.flash_mha(q, k, v, return_lse=True, **arrays, **options)
        assert (np.sign(lse) == np.sign(level)).all() and (np.abs(lse) > 88).all()
        found = face("flash_mha", (q, k, v), cotangents, arrays, **options)
        assert all(np.isfinite(x.astype(np.float32)).all() for x in found if x is not None)
        expected_gradients(cotangents, (q, k, v), **arrays, **options).check(found, f"lse about {level}")

    judge(check)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits_stay_finite(dtype: str, face: GradFace) -> None:
    """Scores of +-1e4 with one winner per row, ties among them: conformance has the rule, this the worst of them."""
    rng = np.random.default_rng(0)
    q = np.where(rng.random((1, 66, 2, 32)) < 0.5, -18.0, 18.0).astype(DTYPES[dtype])
    k, v = q[:, ::-1].copy(), rng.standard_normal(q.shape).astype(DTYPES[dtype])
    dout = rng.standard_normal(q.shape).astype(DTYPES[dtype])
    for options in ({}, {"is_causal": True}, {"softcap": 30.0}):
        found = face("flash_mha", (q, k, v), (dout, None), {}, softmax_scale=1.0, **options)
        assert all(np.isfinite(x.astype(np.float32)).all() for x in found[:3])


# 32-bit overflow -----------------------------------------------------------------------------------------------------


def run_bwd_into(arrays: dict[str, Any], results: dict[str, np.ndarray], **options: Any) -> None:
    """The exported function, which writes where the caller says."""
    statics = attention_statics(
        **{
            "softmax_scale": None, "is_causal": False, "causal_align": "bottom_right", "window_size": (-1, -1),
            "softcap": None, "return_lse": False, "deterministic": False, "backend": None,
        } | options
    )  # fmt: skip
    given = [arrays.get(name) for name in BWD_OPERAND_NAMES]
    text = attention_bwd_text(statics, [None if x is None else (x.dtype.name, x.shape) for x in given])
    *_, (_, workspace_shape) = resolve_attention_bwd(text, "cpu").results
    workspace = np.empty(workspace_shape, np.float32)
    views = [numpy_view(x) for x in given if x is not None] + list(map(numpy_view, results.values()))
    function("attention_bwd")(text, *views, workspace)


@pytest.mark.parametrize("axis", ["batch", "tokens", "heads"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_strides_beyond_32_bits(axis: str, dtype: str) -> None:
    """Elements of every tensor lie more than 2^31 elements apart along one axis."""
    spec = AttentionSpec("overflow_grad", 3, 3, 3, 3, 3, 72, dtype=dtype, is_causal=True)
    (q, k, v), (dout, dlse), _ = draw(spec)
    out, lse = heed.flash_mha(q, k, v, is_causal=True, return_lse=True)
    far = 2**31 + 72 if axis == "tokens" else 3 * 2**30 + 72
    strides = {"batch": (far, 216, 72, 1), "tokens": (72, far, 216, 1), "heads": (72, 216, far, 1)}[axis]

    def spread(array: np.ndarray) -> np.ndarray:
        memory = sparse(2 * far + 9 * 72, array.dtype)
        steps = strides if array.ndim == 4 else tuple(strides[i] for i in (0, 2, 1))
        view = np.lib.stride_tricks.as_strided(memory, array.shape, [s * array.itemsize for s in steps])
        view[...] = array
        return view

    given = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": dout, "dlse": dlse}
    results = {f"d{name}": spread(np.zeros_like(x)) for name, x in (("q", q), ("k", k), ("v", v))}
    run_bwd_into({name: spread(x) for name, x in given.items()}, results, is_causal=True)
    want = expected_gradients((dout, dlse), (q, k, v), is_causal=True)
    want.check(Gradients(**{name: np.ascontiguousarray(x) for name, x in results.items()}), f"far {axis}")


def test_more_rows_than_32_bits_of_offsets() -> None:
    """B 28800, H 15, L 16, D 72: batch rows of the gradients lie as far apart as that, and farther, with few tokens.

    All batch rows of the inputs are the same memory, so that one row's oracle serves for all.
    """
    spec = AttentionSpec("video", batch=1, q_len=1, kv_len=5, num_q_heads=15, num_kv_heads=15, head_dim_qk=72)
    (q, k, v), (dout, dlse), _ = draw(spec)
    out, lse = heed.flash_mha(q, k, v, return_lse=True)
    want = expected_gradients((dout, dlse), (q, k, v))
    batch, stride = 2880, 50 * 16 * 15 * 72

    def all_rows(x: np.ndarray) -> np.ndarray:
        return np.broadcast_to(x, (batch, *x.shape[1:]))

    given = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": dout, "dlse": dlse}
    results = {}
    for name, x in (("dq", q), ("dk", k), ("dv", v)):
        memory = sparse(batch * stride, np.float32)
        results[name] = np.lib.stride_tricks.as_strided(
            memory, (batch, *x.shape[1:]), [stride * 4, 15 * 72 * 4, 72 * 4, 4]
        )
    assert batch * stride > 2**31
    run_bwd_into({name: all_rows(x) for name, x in given.items()}, results)
    want.check(Gradients(*(x[-1:] for x in results.values())), "last batch row")
    for name, x in results.items():
        assert (x == x[:1]).all(), f"{name}: batch rows differ"


# Accepted but ignored ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", CHANGES)
def test_every_argument_changes_the_gradients(what: str, face: GradFace) -> None:
    """...and with each one they are right."""
    less = {name: value for name, value in CHANGES[what].items() if name == "is_causal" and len(CHANGES[what]) > 1}
    if what.endswith("align") and what != "causal_align":
        less = {name: value for name, value in CHANGES[what].items() if name != "causal_align"}

    def check(seed: int) -> None:
        operands, cotangents, _ = draw(AttentionSpec("ignored", q_len=30, kv_len=40), seed)
        results = []
        for options in (less, CHANGES[what]):
            arrays = {name: options[name] for name in ("sinks", "alibi_slopes", "segment_ids") if name in options}
            statics = {name: value for name, value in options.items() if name not in arrays}
            found = face("flash_mha", operands, cotangents, arrays, **statics)
            expected_gradients(cotangents, operands, **options).check(found, what)
            results.append(found)
        assert all(not np.array_equal(x, y) for x, y in zip(results[0][:3], results[1][:3], strict=True))

    judge(check)


@pytest.mark.parametrize("what", ["dout", "dlse", "out", "lse"])
def test_every_array_of_the_backward_pass_changes_the_gradients(what: str) -> None:
    operands, (dout, dlse), _ = draw(AttentionSpec("ignored", q_len=30, kv_len=40))
    out, lse = heed.flash_mha(*operands, return_lse=True)
    given: dict[str, Any] = {"dout": dout, "dlse": dlse, "out": out, "lse": lse}
    backward: Any = heed.flash_mha_bwd
    q, k, v = operands
    before = backward(q=q, k=k, v=v, **given)
    after = backward(q=q, k=k, v=v, **given | {what: given[what] + np.float32(0.5)})
    assert not np.array_equal(before.dq, after.dq) and not np.array_equal(before.dk, after.dk)
    assert np.array_equal(before.dv, after.dv) == (what in ("dlse", "out"))


def test_backend_is_honoured_or_refused() -> None:
    operands, cotangents, _ = draw(AttentionSpec("backend"))
    bwd_of("flash_mha", operands, cotangents, {}, backend="cpu")
    out, lse = heed.flash_mha(*operands, return_lse=True)
    q, k, v = operands
    for backend in ("sm80", "sm90"):
        with pytest.raises(heed.UnsupportedError, match=r"flash_mha_bwd: no kernel serves this call on target cpu"):
            heed.flash_mha_bwd(cotangents[0], q, k, v, out, lse, backend=backend)


# Head-major layout, strange scales -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [4, 8])
def test_head_major_layout_is_only_strides(kv_heads: int) -> None:
    spec = AttentionSpec("hnd_grad", q_len=33, kv_len=47, num_q_heads=8, num_kv_heads=kv_heads)
    operands, cotangents, _ = draw(spec)
    turned = tuple(np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in operands)
    found = bwd_of("flash_mha", turned, cotangents, {})
    expected_gradients(cotangents, operands).check(found, "HND")


@pytest.mark.parametrize("options", [{"softmax_scale": 0.0}, {"softcap": 1e-40}, {"softcap": 1e4}], ids=str)
def test_scales_and_caps_of_any_size(options: dict[str, Any], face: GradFace) -> None:
    spec = AttentionSpec("scales_grad", q_len=50, kv_len=70, num_q_heads=4, dtype="float16")

    def check(seed: int) -> None:
        operands, cotangents, _ = draw(spec, seed)
        found = face("flash_mha", operands, cotangents, {}, **options)
        assert all(np.isfinite(x.astype(np.float32)).all() for x in found[:3])
        expected_gradients(cotangents, operands, **options).check(found, str(options))

    judge(check)


@pytest.mark.parametrize("sinks", [(20, -1e30, 5, -np.inf), (88, -88, 0, 1)], ids=str)
def test_sinks_of_any_size(sinks: tuple[float, ...], face: GradFace) -> None:
    spec = AttentionSpec("sinks_grad", q_len=50, kv_len=23, num_q_heads=4, dtype="float16", is_causal=True)
    arrays = {"sinks": np.array(sinks, np.float32)}

    def check(seed: int) -> None:
        operands, cotangents, _ = draw(spec, seed)
        found = face("flash_mha", operands, cotangents, arrays, is_causal=True)
        expected_gradients(cotangents, operands, is_causal=True, **arrays).check(found, f"sinks {sinks}")

    judge(check)
