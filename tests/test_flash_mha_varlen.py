"""flash_mha_varlen: conformance of every named spec through every face and platform, and what packing promises."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import heed
from conftest import FACES, Face, face_of
from expected import expected, expected_of_varlen, expected_varlen
from heed import reference
from specs import DTYPES, AttentionSpec, make_inputs
from varlen_specs import UNEVEN, UNEVEN_KV, VARLEN, VARLEN_BY_NAME, VarlenSpec, make_varlen_inputs, used_rows

flash_mha_varlen: Any = heed.flash_mha_varlen  # mypy would match unpacked options with every parameter


def call(face: Face, spec: VarlenSpec, **overrides: Any) -> tuple[np.ndarray, np.ndarray]:
    inputs = make_varlen_inputs(spec)
    return face(inputs.q, inputs.k, inputs.v, arrays=inputs.arrays, **(spec.static_options() | overrides))


@pytest.mark.parametrize("spec", VARLEN, ids=lambda spec: spec.name)
def test_spec(spec: VarlenSpec, flash_mha_varlen_face: Face) -> None:
    out, lse = call(flash_mha_varlen_face, spec)
    expected_of_varlen(spec).check(out, lse, spec.name)
    cu_q = make_varlen_inputs(spec).arrays["cu_seqlens_q"]
    outside = np.r_[0 : cu_q[0], cu_q[-1] : out.shape[0]]
    assert (out[outside] == 0).all() and np.isneginf(lse[:, outside]).all()


def test_every_class_has_its_specs() -> None:
    """The list must not lose the rows that stand for a bug class."""
    lens = [(s.q_lens, s.q_lens if s.kv_lens is None else s.kv_lens) for s in VARLEN]
    assert ((76, 34, 146), (1, 1, 1)) in lens and ((), ()) in lens and ((0, 0, 0), (0, 0, 0)) in lens
    assert any(q and q[0] == 0 for q, _ in lens) and any(q and q[-1] == 0 for q, _ in lens)
    assert any(max(q, default=0) > 0 and max(k, default=0) == 0 for q, k in lens)
    assert any(max(q, default=0) == 0 and max(k, default=0) > 0 for q, k in lens)
    for numbers in ("large_logits", "skewed", "nan_unused"):
        assert {s.dtype for s in VARLEN if s.numbers == numbers} == set(DTYPES)
    assert any(s.used and s.numbers == "nan_unused" for s in VARLEN)
    assert any(s.used and max(s.used) > max(s.kv_lens or ()) for s in VARLEN)
    assert {s.head_dim_qk for s in VARLEN} >= {1, 3, 8, 32, 59, 64, 72, 128, 192, 256}


# What it is equal to -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_lengths_are_a_batch(dtype: str, is_causal: bool, flash_mha_varlen_face: Face) -> None:
    spec = AttentionSpec("as_batch", batch=3, q_len=70, kv_len=90, num_q_heads=4, dtype=dtype, is_causal=is_causal)
    inputs = make_inputs(spec)
    flat = [x.reshape(-1, *x.shape[2:]) for x in (inputs.q, inputs.k, inputs.v)]
    lengths = {"cu_seqlens_q": np.arange(4, dtype=np.int32) * 70, "cu_seqlens_k": np.arange(4, dtype=np.int32) * 90}
    out, lse = flash_mha_varlen_face(*flat, arrays=lengths, is_causal=is_causal)
    want = expected(inputs.q, inputs.k, inputs.v, is_causal=is_causal)
    want.check(out.reshape(inputs.q.shape), lse.reshape(4, 3, 70).swapaxes(0, 1), "as a batch")


def test_it_is_what_segment_ids_say(flash_mha_varlen_face: Face) -> None:
    """Without causal masks and windows, packed sequences are segments of one sequence."""
    spec = VARLEN_BY_NAME["varlen_cross_float32"]
    inputs = make_varlen_inputs(spec)
    assert spec.kv_lens is not None
    ids = [np.repeat(np.arange(len(lens)), lens)[None] for lens in (spec.q_lens, spec.kv_lens)]
    want = expected(inputs.q[None], inputs.k[None], inputs.v[None], segment_ids=(ids[0], ids[1]))
    out, lse = call(flash_mha_varlen_face, spec)
    want.check(out[None], lse[None], "as segments")


def test_arguments_work_by_position() -> None:
    inputs = make_varlen_inputs(VARLEN_BY_NAME["varlen_cross_float32"])
    q, k, v = inputs.q, inputs.k, inputs.v
    cu_q, cu_k = inputs.arrays["cu_seqlens_q"], inputs.arrays["cu_seqlens_k"]
    by_position = flash_mha_varlen(q, k, v, cu_q, cu_k, 200, 203, 0.3, True, (5, 3))
    by_name = flash_mha_varlen(
        q=q, k=k, v=v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=200, max_seqlen_k=203, softmax_scale=0.3,
        is_causal=True, window_size=(5, 3),
    )  # fmt: skip
    assert np.array_equal(by_position, by_name)
    with pytest.raises(TypeError, match="positional"):
        flash_mha_varlen(q, k, v, cu_q, cu_k, 200, 203, 0.3, True, (5, 3), np.zeros(7, np.int32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_equivalent_spellings_agree(dtype: str) -> None:
    """Arguments that mean the same give the same, bit for bit."""
    inputs = make_varlen_inputs(VarlenSpec("varlen_spellings", q_lens=(30, 0, 41), head_dim_qk=16, dtype=dtype))
    q, k, v, cu = inputs.q, inputs.k, inputs.v, inputs.arrays["cu_seqlens_q"]

    def same(first: dict[str, Any], second: dict[str, Any]) -> None:
        results = [
            flash_mha_varlen(q, k, v, **({"cu_seqlens_q": cu} | options), return_lse=True)
            for options in (first, second)
        ]
        for a, b in zip(*results, strict=True):
            assert np.array_equal(a, b), f"{first} against {second}"

    lens = np.array([30, 0, 41])
    same({}, {"cu_seqlens_k": cu})
    same({}, {"seqused_k": lens})
    same({}, {"seqused_k": lens + 5})
    same({}, {"max_seqlen_q": 41, "max_seqlen_k": 41})
    same({}, {"max_seqlen_q": 1000, "max_seqlen_k": np.int64(71)})
    same({}, {"softmax_scale": 0.25})
    same({}, {"softcap": 0.0})
    same({}, {"backend": "cpu"})
    same({}, {"deterministic": True})
    same({"is_causal": True}, {"is_causal": True, "window_size": (-1, 17)})
    same({"seqused_k": lens // 2}, {"seqused_k": (lens // 2).astype(np.uint8)})
    wide = np.empty((4, 2), np.int32)
    wide[:, 0] = cu
    for other in ("int64", "uint32", "int16", "uint8"):
        same({}, {"cu_seqlens_q": cu.astype(other)})
    same({}, {"cu_seqlens_q": wide[:, 0]})
    same({}, {"cu_seqlens_q": cu[::-1].copy()[::-1]})
    frozen = cu.copy()
    frozen.flags.writeable = False
    same({}, {"cu_seqlens_q": frozen})


@pytest.mark.parametrize("name", ["varlen_everything", "varlen_causal_bfloat16", "varlen_all_empty", "varlen_no_keys"])
def test_out_is_the_same_with_and_without_lse(name: str) -> None:
    spec = VARLEN_BY_NAME[name]
    inputs = make_varlen_inputs(spec)
    options = spec.static_options() | inputs.arrays
    alone = flash_mha_varlen(inputs.q, inputs.k, inputs.v, **options)
    out, lse = flash_mha_varlen(inputs.q, inputs.k, inputs.v, return_lse=True, **options)
    assert np.array_equal(alone, out)
    total_q = inputs.q.shape[0]
    assert alone.shape == (total_q, spec.num_q_heads, spec.head_dim_v) and alone.dtype == spec.np_dtype
    assert lse.shape == (spec.num_q_heads, total_q) and lse.dtype == np.float32


# What never matters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window_size": (9, 4), "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_do_not_leak(dtype: str, options: dict[str, Any], flash_mha_varlen_face: Face) -> None:
    """Other numbers, even NaN, in every second sequence leave the other ones as they are, bit for bit."""
    spec = VarlenSpec("varlen_leak", q_lens=(40, 3, 70, 1, 64, 20), kv_lens=(33, 64, 5, 80, 1, 31), dtype=dtype)
    inputs = make_varlen_inputs(spec)
    before = flash_mha_varlen_face(inputs.q, inputs.k, inputs.v, arrays=inputs.arrays, **options)
    cu_q, cu_k = inputs.arrays["cu_seqlens_q"], inputs.arrays["cu_seqlens_k"]
    kept = np.zeros(inputs.q.shape[0], bool)
    q, k, v = inputs.q.copy(), inputs.k.copy(), inputs.v.copy()
    for i in range(6):
        if i % 2:
            kept[cu_q[i] : cu_q[i + 1]] = True
        else:
            q[cu_q[i] : cu_q[i + 1]], k[cu_k[i] : cu_k[i + 1]], v[cu_k[i] : cu_k[i + 1]] = 7.0, np.nan, np.inf
    after = flash_mha_varlen_face(q, k, v, arrays=inputs.arrays, **options)
    assert np.array_equal(before[0][kept], after[0][kept]) and np.array_equal(before[1][:, kept], after[1][:, kept])
    assert np.isnan(after[0][~kept].astype(np.float32)).any()
    assert np.isfinite(after[0][kept].astype(np.float32)).all()


@pytest.mark.parametrize("hidden", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_used_never_reaches_an_output(dtype: str, hidden: float, flash_mha_varlen_face: Face) -> None:
    """Rows of q outside, keys outside, and keys beyond seqused_k, right next to those that count."""
    spec = VarlenSpec(
        "varlen_unused", q_lens=(40, 0, 70), kv_lens=(60, 9, 77), used=(31, 4, 65), outside=(17, 20), dtype=dtype,
        head_dim_qk=40, is_causal=True,
    )  # fmt: skip
    inputs = make_varlen_inputs(spec)
    clean = call(flash_mha_varlen_face, spec)
    rows, keys = used_rows(
        spec, inputs.arrays["cu_seqlens_q"], inputs.arrays["cu_seqlens_k"], len(inputs.q), len(inputs.k)
    )
    q, k, v = inputs.q.copy(), inputs.k.copy(), inputs.v.copy()
    q[~rows], k[~keys], v[~keys] = hidden, hidden, hidden
    spoilt = flash_mha_varlen_face(q, k, v, arrays=inputs.arrays, **spec.static_options())
    for before, after in zip(clean, spoilt, strict=True):
        assert np.array_equal(before, after)
    expected_of_varlen(spec).check(*clean, "clean")


def test_queries_without_keys_are_exactly_empty(flash_mha_varlen_face: Face) -> None:
    """In an empty sequence, above a causal diagonal and outside of all: out 0; lse -inf, or in a sequence the sink."""
    spec = VarlenSpec("varlen_empty_rows", q_lens=(5, 60, 9), kv_lens=(0, 20, 9), outside=(3, 4), is_causal=True)
    inputs = make_varlen_inputs(spec)
    empty = np.r_[3 : 3 + 5 + 40]  # the first sequence, and what the second's diagonal leaves without a key
    outside = np.r_[0:3, 77:81]
    full = np.r_[48:77]
    out, lse = flash_mha_varlen_face(inputs.q, inputs.k, inputs.v, arrays=inputs.arrays, is_causal=True)
    assert (out[empty] == 0).all() and (out[outside] == 0).all() and np.isneginf(lse[:, empty]).all()
    assert (out[full] != 0).any(axis=-1).all() and np.isfinite(lse[:, full]).all()
    assert np.isneginf(lse[:, outside]).all()
    sinks = np.array([3.0, -2.5], np.float32)
    arrays = inputs.arrays | {"sinks": sinks}
    out, lse = flash_mha_varlen_face(inputs.q, inputs.k, inputs.v, arrays=arrays, is_causal=True)
    assert (out[empty] == 0).all() and (out[outside] == 0).all()
    assert (
        np.array_equal(lse[:, empty], np.broadcast_to(sinks[:, None], (2, 45))) and np.isneginf(lse[:, outside]).all()
    )


# Lengths on the device -----------------------------------------------------------------------------------------------

DEVICE_FACES = [row for row in FACES if row.values[0] != "numpy"]
JAX_PLATFORMS = [
    pytest.param(str(row.values[0]).partition(":")[2], id=str(row.id), marks=row.marks)
    for row in FACES
    if str(row.values[0]).startswith("jax_jit")
]


@pytest.mark.parametrize("face", DEVICE_FACES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_out_of_range_are_clamped(dtype: str, face: str) -> None:
    """Traced lengths and those on a device cannot be refused: they are clamped to what q and k hold."""
    spec = VarlenSpec("varlen_clamped", q_lens=(30, 41), kv_lens=(50, 21), num_q_heads=4, dtype=dtype)
    inputs = make_varlen_inputs(spec)
    limit = 2**31 - 1
    lengths: list[dict[str, Any]] = [
        {"cu_seqlens_q": [-5, 30, 71], "cu_seqlens_k": [0, 50, 71]},
        {"cu_seqlens_q": [0, 30, 100], "cu_seqlens_k": [0, 50, 1000]},
        {"cu_seqlens_q": [0, 30, limit], "cu_seqlens_k": [-limit - 1, 50, limit]},
        {"cu_seqlens_q": [-limit, -7, 40], "cu_seqlens_k": [20, 30, 60]},
        {"cu_seqlens_q": [10, 90, 100], "cu_seqlens_k": [90, 100, 110]},
        {"cu_seqlens_q": [0, 30, 71], "cu_seqlens_k": [50, 20, 71]},
        {"cu_seqlens_q": [0, 30, 71], "cu_seqlens_k": [0, 50, 71], "seqused_k": [-3, 1000]},
        {"cu_seqlens_q": [0, 30, 71], "cu_seqlens_k": [0, 50, 71], "seqused_k": [-limit - 1, limit]},
    ]
    for values in lengths:
        arrays = {name: np.array(x, np.int32) for name, x in values.items()}
        for options in ({}, {"is_causal": True}):
            want = expected_varlen(inputs.q, inputs.k, inputs.v, **arrays, **options)
            out, lse = face_of("flash_mha_varlen", face)(inputs.q, inputs.k, inputs.v, arrays=arrays, **options)
            want.check(out, lse, f"{values} {options}")


@pytest.mark.parametrize("face", DEVICE_FACES)
def test_any_lengths_at_all_are_safe(face: str, seed: int) -> None:
    """Random bits as lengths: what comes out is undefined, but it comes, and the next call is none the worse."""
    rng = np.random.default_rng(seed)
    spec = VarlenSpec(
        "varlen_wild", q_lens=(60, 40), kv_lens=(80, 20), outside=(0, 30), head_dim_qk=32, dtype="float16"
    )
    inputs = make_varlen_inputs(spec)
    call_face = face_of("flash_mha_varlen", face)
    for _ in range(30):
        scale = int(rng.choice([2, 200, 2**31 - 1]))
        arrays = {
            name: rng.integers(-scale, scale, size, endpoint=True).astype(np.int32)
            for name, size in (("cu_seqlens_q", 12), ("cu_seqlens_k", 12), ("seqused_k", 11))
        }
        out, lse = call_face(inputs.q, inputs.k, inputs.v, arrays=arrays, is_causal=True)
        assert out.shape == inputs.q.shape and lse.shape == (2, 130)
        # Sorted, the same lengths have a meaning.
        arrays |= {name: np.sort(arrays[name]) for name in ("cu_seqlens_q", "cu_seqlens_k")}
        want = expected_varlen(inputs.q, inputs.k, inputs.v, **arrays, is_causal=True)
        out, lse = call_face(inputs.q, inputs.k, inputs.v, arrays=arrays, is_causal=True)
        want.check(out, lse, str(arrays))


@pytest.mark.parametrize("platform", JAX_PLATFORMS)
def test_one_program_serves_all_lengths(platform: str) -> None:
    """A compiled call runs again with other lengths: nothing of an earlier run stays."""
    jax = pytest.importorskip("jax")
    spec = VarlenSpec("varlen_replay", q_lens=(100,), kv_lens=(150,), num_q_heads=4, head_dim_qk=32, dtype="bfloat16")
    inputs = make_varlen_inputs(spec)
    device = jax.devices(platform)[0]
    traces = []

    def attend(cu_q: Any, cu_k: Any, used: Any) -> Any:
        traces.append(1)
        return flash_mha_varlen(
            *on_device, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, seqused_k=used, is_causal=True, return_lse=True
        )

    on_device = jax.device_put((inputs.q, inputs.k, inputs.v), device)
    jitted = jax.jit(attend)
    for q_lens, kv_lens, used in (
        ((30, 0, 70, 0), (150, 0, 0, 0), (150, 0, 0, 0)),
        ((0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0)),
        ((100, 0, 0, 0), (50, 0, 0, 100), (20, 0, 0, 7)),
        ((1, 2, 3, 4), (40, 30, 20, 10), (40, 30, 20, 10)),
        ((0, 0, 0, 100), (0, 0, 0, 150), (0, 0, 0, 150)),
        ((30, 0, 70, 0), (150, 0, 0, 0), (150, 0, 0, 0)),
    ):
        cu_q, cu_k = (np.cumsum([0, *lens]).astype(np.int32) for lens in (q_lens, kv_lens))
        arrays = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "seqused_k": np.array(used, np.int32)}
        out, lse = jitted(*jax.device_put(tuple(arrays.values()), device))
        want = expected_varlen(inputs.q, inputs.k, inputs.v, is_causal=True, **arrays)
        want.check(np.asarray(out), np.asarray(lse), str((q_lens, kv_lens, used)))
    assert len(traces) == 1


# Determinism ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["varlen_everything", "varlen_many_tiny", "varlen_very_uneven", "varlen_decode"])
def test_repeats_are_bitwise_equal(name: str, flash_mha_varlen_face: Face) -> None:
    spec = VARLEN_BY_NAME[name]
    results = {b"".join(x.tobytes() for x in call(flash_mha_varlen_face, spec)) for _ in range(10)}
    assert len(results) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_alone_is_the_same(dtype: str, flash_mha_varlen_face: Face) -> None:
    """A sequence's rows obey the rule for its own oracle, wherever in a batch it lies."""
    spec = VarlenSpec("varlen_alone", q_lens=UNEVEN, kv_lens=UNEVEN_KV, is_causal=True, dtype=dtype)
    inputs = make_varlen_inputs(spec)
    out, lse = call(flash_mha_varlen_face, spec)
    cu_q, cu_k = inputs.arrays["cu_seqlens_q"], inputs.arrays["cu_seqlens_k"]
    for i in range(len(UNEVEN)):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        alone = expected(inputs.q[None, rows], inputs.k[None, keys], inputs.v[None, keys], is_causal=True)
        alone.check(out[None, rows], lse[None, :, rows], f"sequence {i}")


# The oracle ----------------------------------------------------------------------------------------------------------


def loops(spec: VarlenSpec) -> tuple[np.ndarray, np.ndarray]:
    """One query and one key at a time, in Python floats: shares nothing with reference.py."""
    inputs = make_varlen_inputs(spec)
    q, k, v = (x.astype(np.float64) for x in (inputs.q, inputs.k, inputs.v))
    cu_q = inputs.arrays["cu_seqlens_q"]
    cu_k = inputs.arrays.get("cu_seqlens_k", cu_q)
    scale = spec.softmax_scale if spec.softmax_scale is not None else 1 / math.sqrt(spec.head_dim_qk)
    left, right = spec.window_size
    right = 0 if spec.is_causal else right
    out = np.zeros((len(q), spec.num_q_heads, spec.head_dim_v))
    lse = np.full((spec.num_q_heads, len(q)), -np.inf)
    for b, h in np.ndindex(len(spec.q_lens), spec.num_q_heads):
        q_len, kv_len = int(cu_q[b + 1] - cu_q[b]), int(cu_k[b + 1] - cu_k[b])
        kv_len = kv_len if spec.used is None else min(kv_len, spec.used[b])
        offset = kv_len - q_len if spec.causal_align == "bottom_right" else 0
        for i in range(q_len):
            row, weights = int(cu_q[b]) + i, []
            for j in range(kv_len):
                if (left >= 0 and j < i + offset - left) or (right >= 0 and j > i + offset + right):
                    continue
                score = scale * math.fsum(q[row, h] * k[cu_k[b] + j, h * spec.num_kv_heads // spec.num_q_heads])
                if spec.softcap:
                    score = spec.softcap * math.tanh(score / spec.softcap)
                if spec.alibi:
                    score -= float(inputs.arrays["alibi_slopes"][h]) * abs(i + offset - j)
                weights.append((score, j))
            terms = [score for score, _ in weights] + ([float(inputs.arrays["sinks"][h])] if spec.sinks else [])
            if terms:
                top = max(terms)
                lse[h, row] = top + math.log(math.fsum(math.exp(term - top) for term in terms))
            for score, j in weights:
                out[row, h] += math.exp(score - lse[h, row]) * v[cu_k[b] + j, h * spec.num_kv_heads // spec.num_q_heads]
    return out, lse


TINY: dict[str, Any] = {
    "q_lens": (4, 0, 7, 1), "kv_lens": (6, 2, 5, 0), "num_q_heads": 4, "head_dim_qk": 5, "head_dim_v": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    "spec",
    [
        VarlenSpec("varlen_ref", **TINY),
        VarlenSpec("varlen_ref_self", **(TINY | {"kv_lens": None})),
        VarlenSpec("varlen_ref_causal", is_causal=True, outside=(3, 2), **TINY),
        VarlenSpec("varlen_ref_used", is_causal=True, used=(3, 2, 9, 0), **TINY),
        VarlenSpec("varlen_ref_top_left", window_size=(3, 1), causal_align="top_left", used=(3, 2, 4, 0), **TINY),
        VarlenSpec("varlen_ref_empty", q_lens=(), outside=(2, 3), sinks=True),
        VarlenSpec(
            "varlen_ref_all", is_causal=True, window_size=(4, 1), softcap=3.0, sinks=True, alibi=True, outside=(1, 2),
            used=(6, 1, 3, 0), **TINY,
        ),
    ],
    ids=lambda spec: spec.name,
)  # fmt: skip
def test_float64_reference_is_the_definition(spec: VarlenSpec) -> None:
    inputs = make_varlen_inputs(spec)
    options = spec.static_options() | inputs.arrays
    out, lse = reference.attention_forward_varlen(inputs.q, inputs.k, inputs.v, **options)
    want_out, want_lse = loops(spec)
    assert out.dtype == lse.dtype == np.float64 and out.shape == want_out.shape and lse.shape == want_lse.shape
    assert np.array_equal(np.isneginf(lse), np.isneginf(want_lse))
    assert np.abs(out - want_out).max(initial=0.0) < 1e-13
    seen = np.isfinite(lse)
    assert np.abs(lse[seen] - want_lse[seen]).max(initial=0.0) < 1e-13


def test_jnp_reference_obeys_the_rule() -> None:
    jnp = pytest.importorskip("jax.numpy")
    spec = VarlenSpec(
        "varlen_jnp", q_lens=(9, 0, 20), kv_lens=(9, 4, 20), used=(8, 4, 30), outside=(3, 2), numbers="nan_unused",
        dtype="float16", sinks=True,
    )  # fmt: skip
    inputs = make_varlen_inputs(spec)
    q, k, v = (jnp.asarray(x) for x in (inputs.q, inputs.k, inputs.v))
    out, lse = reference.naive_attention_forward_varlen(q, k, v, **inputs.arrays)
    expected_of_varlen(spec).check(np.asarray(out), np.asarray(lse), spec.name)


def test_leading_axes_broadcast() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((2, 1, 9, 4, 8)), rng.standard_normal((1, 3, 11, 2, 8)), rng.random((1, 1, 11, 2, 6))
    cu_q = np.array([[[0, 4, 9]], [[2, 2, 7]]])
    used, sinks = rng.integers(0, 7, (1, 3, 2)), rng.random((2, 1, 4))
    out, lse = reference.attention_forward_varlen(q, k, v, cu_q, np.array([[[0, 5, 11]]]), seqused_k=used, sinks=sinks)
    assert out.shape == (2, 3, 9, 4, 6) and lse.shape == (2, 3, 4, 9)
    for m, n in np.ndindex(2, 3):
        want = reference.attention_forward_varlen(
            q[m, 0], k[0, n], v[0, 0], cu_q[m, 0], np.array([0, 5, 11]), seqused_k=used[0, n], sinks=sinks[m, 0]
        )
        assert np.array_equal(out[m, n], want[0]) and np.array_equal(lse[m, n], want[1])
