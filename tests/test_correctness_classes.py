"""One test per bug class that attention libraries have shipped, as far as a forward pass can meet it.

Head dims, group sizes, D_qk != D_v, tails and odd sizes are rows of the named specs, and
`test_every_class_has_its_specs` keeps them there; this file holds what needs a test of its own. Gradients are in
test_grad_classes.py. Classes of other ops (merging, caches, paging) come with those ops.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import pytest

import heed
from conftest import Face
from expected import expected, expected_of
from heed import reference
from specs import BY_NAME, CONFORMANCE, DTYPES, AttentionSpec, make_inputs


def call(spec: AttentionSpec, **overrides: Any) -> tuple[np.ndarray, np.ndarray]:
    inputs = make_inputs(spec)
    options = spec.static_options() | inputs.arrays | overrides
    out, lse = heed.flash_mha(inputs.q, inputs.k, inputs.v, return_lse=True, **options)
    return out, lse


def test_every_class_has_its_specs() -> None:
    """The conformance list must not lose the rows that stand for a bug class."""
    head_dims = {spec.head_dim_qk for spec in CONFORMANCE}
    assert head_dims >= {1, 3, 7, 16, 32, 59, 64, 72, 80, 96, 112, 128, 192, 224, 256}
    assert {(s.head_dim_qk, s.head_dim_v) for s in CONFORMANCE} >= {(192, 128), (128, 96), (64, 256)}
    groups = {spec.num_q_heads // spec.num_kv_heads for spec in CONFORMANCE}
    assert groups >= {1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 64}
    assert any((s.q_len, s.kv_len, s.head_dim_qk) == (1, 257, 32) for s in CONFORMANCE)
    assert any((s.q_len, s.kv_len, s.window_size[0]) == (300, 4096, 333) for s in CONFORMANCE)
    assert any((s.q_len, s.kv_len) == (2048, 2080) for s in CONFORMANCE)
    assert {0, 1} <= {s.q_len for s in CONFORMANCE} and {0, 1} <= {s.kv_len for s in CONFORMANCE}
    assert any(s.is_causal and s.q_len > s.kv_len for s in CONFORMANCE)
    assert any(
        s.segments == "packed" and (s.batch, s.q_len, s.num_q_heads, s.head_dim_qk) == (8, 128, 4, 16)
        for s in CONFORMANCE
    )
    for numbers in ("large_logits", "skewed", "nan_hidden", "nan_visible"):
        assert {s.dtype for s in CONFORMANCE if s.numbers == numbers} == set(DTYPES)


# Finite mask sentinel ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing_are_exactly_empty(dtype: str, flash_mha_face: Face) -> None:
    spec = AttentionSpec("sentinel", q_len=100, kv_len=37, is_causal=True, dtype=dtype)
    inputs = make_inputs(spec)
    out, lse = flash_mha_face(inputs.q, inputs.k, inputs.v, arrays={}, is_causal=True)
    assert (out[:, :63] == 0).all() and np.isneginf(lse[..., :63]).all()
    assert np.isfinite(lse[..., 63:]).all() and (out[:, 63:] != 0).any(axis=-1).all()


def test_empty_rows_with_a_sink_have_its_lse() -> None:
    spec = AttentionSpec("sentinel_sink", q_len=100, kv_len=37, is_causal=True, sinks=True, num_q_heads=4)
    out, lse = call(spec)
    sinks = make_inputs(spec).arrays["sinks"]
    assert (out[:, :63] == 0).all() and np.array_equal(lse[..., :63], np.broadcast_to(sinks[None, :, None], (2, 4, 63)))


def test_a_sink_of_minus_infinity_is_no_sink() -> None:
    spec = AttentionSpec("no_sink", q_len=100, kv_len=37, is_causal=True, num_q_heads=4)
    plain, sunk = call(spec), call(spec, sinks=np.full(4, -np.inf, np.float32))
    assert np.isneginf(sunk[1][..., :63]).all()
    expected_of(spec).check(*plain, "without sinks")
    expected_of(spec).check(*sunk, "with sinks of -inf")


@pytest.mark.parametrize("score", [-524288.0, -5e4, -(2.0**60), -1e38])
def test_a_very_negative_score_is_not_masked(score: float, flash_mha_face: Face) -> None:
    q = np.full((1, 3, 1, 1), score, np.float32)
    k, v = np.ones((1, 5, 1, 1), np.float32), np.arange(1.0, 6.0, dtype=np.float32).reshape(1, 5, 1, 1)
    out, lse = flash_mha_face(q, k, v, arrays={}, softmax_scale=1.0, is_causal=True)
    want = expected(q, k, v, softmax_scale=1.0, is_causal=True)
    want.check(out, lse, f"score {score}")
    assert np.array_equal(out[0, :, 0, 0], np.array([2.0, 2.5, 3.0], np.float32))


# 0 * NaN -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["causal", "window", "segments", "top_left"])
def test_hidden_numbers_never_reach_an_output(mask: str, dtype: str, hidden: float, flash_mha_face: Face) -> None:
    """Hidden keys hold NaN or infinity right next to visible ones, inside the same tiles."""
    spec = AttentionSpec("hidden", q_len=75, kv_len=75, num_q_heads=4, head_dim_qk=40, dtype=dtype)
    inputs = make_inputs(spec)
    masks: dict[str, dict[str, Any]] = {
        "causal": {"is_causal": True},
        "window": {"window_size": (20, 3)},
        "segments": {},
        "top_left": {"is_causal": True, "causal_align": "top_left"},
    }
    options = masks[mask]
    arrays: dict[str, Any] = {}
    poisoned = np.arange(75) >= 41
    rows = np.arange(75) < 38  # the rows that see none of the poisoned keys
    if mask == "segments":
        poisoned = np.arange(75) % 3 == 1
        arrays["segment_ids"] = (
            np.zeros((2, 75), np.int32),
            np.where(poisoned, 7, 0)[None].repeat(2, 0).astype(np.int32),
        )
        rows = np.full(75, True)
    want = expected(inputs.q, inputs.k, inputs.v, **arrays, **options).rows(rows)
    k, v = inputs.k.copy(), inputs.v.copy()
    k[:, poisoned], v[:, poisoned] = hidden, hidden
    out, lse = flash_mha_face(inputs.q, k, v, arrays=arrays, **options)
    want.check(out[:, rows], lse[..., rows], f"{mask} hiding {hidden}")


def test_visible_numbers_that_are_not_finite_arrive(flash_mha_face: Face) -> None:
    """NaN and infinities anywhere: each output is what IEEE arithmetic makes of what its row sees, and nothing else."""
    rng = np.random.default_rng(0)
    masks: list[dict[str, Any]] = [{}, {"is_causal": True}, {"window_size": (2, 1)}, {"softcap": 2.0}]
    for _ in range(300 if "numpy" in str(flash_mha_face) else 20):
        operands = [rng.standard_normal((1, 12, heads, 4)).astype(np.float16) for heads in (2, 1, 1)]
        for array in operands:
            for _ in range(int(rng.integers(3))):
                at = tuple(int(rng.integers(size)) for size in array.shape)
                array[at] = (np.nan, np.inf, -np.inf)[int(rng.integers(3))]
        statics = masks[int(rng.integers(len(masks)))]
        arrays = {}
        if rng.random() < 0.3:
            arrays["segment_ids"] = rng.integers(0, 2, (1, 12)).astype(np.int32)
        out, lse = flash_mha_face(*operands, arrays=arrays, **statics)
        q, k, v = operands
        expected(q, k, v, **arrays, **statics).check(out, lse, f"{statics}")


@pytest.mark.parametrize("sinks", [(20, -1e30, 5, -np.inf), (88, -88, 0, 1), (np.nan, 0, np.inf, 1)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_sinks_of_any_size(sinks: tuple[float, ...], is_causal: bool) -> None:
    spec = AttentionSpec("sinks", q_len=50, kv_len=23, num_q_heads=4, dtype="float16", is_causal=is_causal)
    out, lse = call(spec, sinks=np.array(sinks, np.float32))
    inputs = make_inputs(spec)
    want = expected(inputs.q, inputs.k, inputs.v, is_causal=is_causal, sinks=np.array(sinks, np.float32))
    want.check(out, lse, f"sinks {sinks}")


@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-45, 1e20])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"softcap": 1e-30}], ids=str)
def test_scales_of_any_size_keep_empty_rows_empty(scale: float, options: dict[str, Any]) -> None:
    spec = AttentionSpec("scales", q_len=50, kv_len=23, num_q_heads=4, dtype="float16", is_causal=True)
    _, lse = call(spec, softmax_scale=scale, **options)
    assert np.isneginf(lse[..., :27]).all() and np.isfinite(lse[..., 27:]).all()


# Windows and segments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["window_left_0", "window_333", "window_2048_2080"])
def test_a_window_without_causal_hides_the_future(name: str) -> None:
    spec = BY_NAME[name]
    inputs = make_inputs(spec)
    before = heed.flash_mha(inputs.q, inputs.k, inputs.v, **spec.static_options())
    middle = spec.q_len // 2
    cut = middle + spec.kv_len - spec.q_len + 1  # the first key that row `middle` must not see
    k, v = inputs.k.copy(), inputs.v.copy()
    k[:, cut:], v[:, cut:] = -k[:, cut:], 100.0
    after = heed.flash_mha(inputs.q, k, v, **spec.static_options())
    assert np.array_equal(before[:, : middle + 1], after[:, : middle + 1])
    assert not np.array_equal(before[:, middle + 1 :], after[:, middle + 1 :])


def test_packed_documents_do_not_leak() -> None:
    spec = BY_NAME["segments_packed"]
    inputs = make_inputs(spec)
    ids = inputs.arrays["segment_ids"]
    out, lse = call(spec)
    for row, segment in ((0, 0), (0, 1), (3, 2), (7, 1)):
        at = ids[row] == segment
        alone = expected(inputs.q[row : row + 1, at], inputs.k[row : row + 1, at], inputs.v[row : row + 1, at])
        alone.check(out[row : row + 1, at], lse[row : row + 1][..., at], f"document {segment} of row {row}")


@pytest.mark.parametrize("extreme", [-(2**31), 2**31 - 1, 0, -1])
def test_every_segment_id_is_an_id(extreme: int) -> None:
    """No id is reserved, at either end of int32."""
    inputs = make_inputs(AttentionSpec("extreme_ids", q_len=20, kv_len=20))
    ids = np.where(np.arange(20) < 9, extreme, 5)[None].repeat(2, 0)
    plain = np.where(np.arange(20) < 9, 3, 5)[None].repeat(2, 0)
    got = heed.flash_mha(inputs.q, inputs.k, inputs.v, segment_ids=ids)
    assert np.array_equal(got, heed.flash_mha(inputs.q, inputs.k, inputs.v, segment_ids=plain))


# 32-bit overflow -----------------------------------------------------------------------------------------------------


def sparse(count: int, dtype: Any) -> np.ndarray:
    """Address space without memory: pages appear as they are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        return np.frombuffer(mmap.mmap(-1, count * np.dtype(dtype).itemsize, flags=flags), dtype)
    except OSError as error:
        pytest.skip(f"this machine limits address space: {error}")


@pytest.mark.parametrize("axis", ["batch", "tokens", "heads"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_strides_beyond_32_bits(axis: str, dtype: str) -> None:
    """Elements lie more than 2^31 elements apart along one axis, the last axis of the others staying dense."""
    spec = AttentionSpec(
        "overflow", batch=3, q_len=3, kv_len=3, num_q_heads=3, num_kv_heads=3, head_dim_qk=72, dtype=dtype
    )
    inputs = make_inputs(spec)
    far = 2**31 + 72 if axis == "tokens" else 3 * 2**30 + 72
    strides = {"batch": (far, 3 * 72, 72, 1), "tokens": (72, far, 216, 1), "heads": (72, 216, far, 1)}[axis]

    def spread(array: np.ndarray) -> np.ndarray:
        memory = sparse(2 * far + 9 * 72, array.dtype)
        view = np.lib.stride_tricks.as_strided(memory, array.shape, [s * array.itemsize for s in strides])
        view[...] = array
        return view

    out, lse = heed.flash_mha(spread(inputs.q), spread(inputs.k), spread(inputs.v), is_causal=True, return_lse=True)
    expected(inputs.q, inputs.k, inputs.v, is_causal=True).check(out, lse, f"far {axis}")


def test_more_rows_than_32_bits_of_offsets() -> None:
    """B 1600, H 16, L 729, D 72 has 1.3e9 elements: its batch rows lie as far apart here, with few tokens in each.

    All batch rows of the inputs are the same memory, so that one row's oracle serves for all.
    """
    spec = AttentionSpec("siglip", batch=1, q_len=1, kv_len=29, num_q_heads=16, num_kv_heads=16, head_dim_qk=72)
    inputs = make_inputs(spec)
    batch = 1600
    q, k, v = (np.broadcast_to(x, (batch, *x.shape[1:])) for x in (inputs.q, inputs.k, inputs.v))
    out, lse = heed.flash_mha(q, k, v, return_lse=True)
    want = expected(inputs.q, inputs.k, inputs.v)
    want.check(out[-1:], lse[-1:], "last batch row")
    assert (out == out[:1]).all() and (lse == lse[:1]).all()

    # The exported function writes where the caller says: rows 2^31 elements and more from the first.
    from heed._arrays import numpy_view
    from heed._lib import function

    stride = 16 * 729 * 72  # elements between batch rows of the full problem
    memory = sparse(batch * stride, np.float32)
    far = np.lib.stride_tricks.as_strided(memory, out.shape, [stride * 4, 16 * 72 * 4, 72 * 4, 4])
    text = (
        f"attention_fwd.v1;q=float32[{batch},1,16,72];k=float32[{batch},29,16,72];v=float32[{batch},29,16,72]"
        ";scale=default;causal=0;align=bottom_right;window=-1,-1;softcap=0x0p+0;lse=0;deterministic=0;backend=auto"
    )
    function("attention_fwd")(text, numpy_view(q), numpy_view(k), numpy_view(v), far)
    assert np.array_equal(far, out)


# Determinism and batch invariance ------------------------------------------------------------------------------------


def test_a_thousand_repeats_are_bitwise_equal() -> None:
    spec = AttentionSpec("repeat", q_len=40, kv_len=150, num_q_heads=4, head_dim_qk=32, is_causal=True, sinks=True)
    first_out, first_lse = call(spec)
    inputs = make_inputs(spec)
    for _ in range(1000):
        out, lse = heed.flash_mha(
            inputs.q,
            inputs.k,
            inputs.v,
            is_causal=True,
            sinks=inputs.arrays["sinks"],
            return_lse=True,
            deterministic=True,
        )
        assert out.tobytes() == first_out.tobytes() and lse.tobytes() == first_lse.tobytes()


@pytest.mark.parametrize(
    "name", ["everything", "window_333", "gqa_64_over_4", "primes_causal", "segments_padded", "alibi_causal"]
)
def test_ten_repeats_are_bitwise_equal(name: str) -> None:
    results = {b"".join(x.tobytes() for x in call(BY_NAME[name])) for _ in range(10)}
    assert len(results) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_is_the_same_in_any_batch(dtype: str) -> None:
    spec = AttentionSpec("batches", batch=5, q_len=70, kv_len=90, num_q_heads=4, is_causal=True, dtype=dtype)
    inputs = make_inputs(spec)
    out, lse = heed.flash_mha(inputs.q, inputs.k, inputs.v, is_causal=True, return_lse=True)
    for row in range(5):
        one = slice(row, row + 1)
        alone, alone_lse = heed.flash_mha(inputs.q[one], inputs.k[one], inputs.v[one], is_causal=True, return_lse=True)
        assert np.array_equal(alone, out[one]) and np.array_equal(alone_lse, lse[one])


def test_a_decoded_row_is_the_prefilled_row() -> None:
    """The last row alone against the same row of the whole: both obey the rule for the same oracle."""
    spec = AttentionSpec("decode_row", q_len=130, kv_len=130, num_q_heads=8, is_causal=True)
    inputs = make_inputs(spec)
    want = expected_of(spec).rows(slice(-1, None))
    out, lse = call(spec)
    want.check(out[:, -1:], lse[..., -1:], "prefilled")
    out, lse = heed.flash_mha(inputs.q[:, -1:], inputs.k, inputs.v, is_causal=True, return_lse=True)
    want.check(out, lse, "decoded")


# Accepted but ignored ------------------------------------------------------------------------------------------------

CHANGES: dict[str, dict[str, Any]] = {
    "softmax_scale": {"softmax_scale": 0.5},
    "is_causal": {"is_causal": True},
    "causal_align": {"is_causal": True, "causal_align": "top_left"},
    "window left": {"window_size": (3, -1)},
    "window right": {"window_size": (-1, 3)},
    "window under causal": {"is_causal": True, "window_size": (3, -1)},
    "window align": {"window_size": (3, 3), "causal_align": "top_left"},
    "softcap": {"softcap": 1.0},
    "sinks": {"sinks": np.array([0.5, -0.5], np.float32)},
    "alibi_slopes": {"alibi_slopes": np.array([0.5, 0.25], np.float32)},
    "alibi align": {"alibi_slopes": np.array([0.5, 0.25], np.float32), "causal_align": "top_left"},
    "segment_ids": {"segment_ids": (np.arange(30)[None].repeat(2, 0) % 2, np.arange(40)[None].repeat(2, 0) % 3)},
}


@pytest.mark.parametrize("what", CHANGES)
def test_every_argument_changes_the_result(what: str, flash_mha_face: Face) -> None:
    """...and with each one the result is right."""
    inputs = make_inputs(AttentionSpec("ignored", q_len=30, kv_len=40))
    results = []
    less = {name: value for name, value in CHANGES[what].items() if name == "is_causal" and len(CHANGES[what]) > 1}
    if what.endswith("align") and what != "causal_align":
        less = {name: value for name, value in CHANGES[what].items() if name != "causal_align"}
    for options in (less, CHANGES[what]):
        arrays = {name: options[name] for name in ("sinks", "alibi_slopes", "segment_ids") if name in options}
        statics = {name: value for name, value in options.items() if name not in arrays}
        out, lse = flash_mha_face(inputs.q, inputs.k, inputs.v, arrays=arrays, **statics)
        expected(inputs.q, inputs.k, inputs.v, **options).check(out, lse, what)
        results.append((out, lse))
    assert not np.array_equal(results[0][0], results[1][0]) and not np.array_equal(results[0][1], results[1][1])


def test_backend_is_honoured_or_refused() -> None:
    inputs = make_inputs(AttentionSpec("backend"))
    heed.flash_mha(inputs.q, inputs.k, inputs.v, backend="cpu")
    for backend in ("sm80", "sm90"):
        with pytest.raises(heed.UnsupportedError):
            heed.flash_mha(inputs.q, inputs.k, inputs.v, backend=backend)


# vmap, layout, large numbers -----------------------------------------------------------------------------------------


def test_mapped_rows_are_not_permuted() -> None:
    """q (1, 64, 28, 64) with 4 kv heads; several mapped rows, compared one by one."""
    jax = pytest.importorskip("jax")
    spec = AttentionSpec("vmap", batch=1, q_len=64, kv_len=64, num_q_heads=28, num_kv_heads=4, is_causal=True)
    rows = [make_inputs(spec, seed) for seed in range(3)]
    q, k, v = (np.stack([getattr(row, name) for row in rows]) for name in "qkv")
    out, lse = jax.vmap(lambda q, k, v: heed.flash_mha(q, k, v, is_causal=True, return_lse=True))(q, k, v)
    for seed in range(3):
        expected_of(spec, seed).check(np.asarray(out[seed]), np.asarray(lse[seed]), f"row {seed}")
    shared = jax.vmap(lambda q: heed.flash_mha(q, k[0], v[0], is_causal=True, return_lse=True))(q)
    for seed in range(3):
        want = expected(q[seed], k[0], v[0], is_causal=True)
        want.check(np.asarray(shared[0][seed]), np.asarray(shared[1][seed]), f"row {seed} with shared keys")


@pytest.mark.parametrize("kv_heads", [4, 8])
def test_head_major_layout_is_only_strides(kv_heads: int) -> None:
    spec = AttentionSpec("hnd", q_len=33, kv_len=47, num_q_heads=8, num_kv_heads=kv_heads)
    inputs = make_inputs(spec)
    q, k, v = (np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    out, lse = heed.flash_mha(q, k, v, return_lse=True)
    expected_of(spec).check(out, lse, "HND")


def test_scores_beyond_float32() -> None:
    """Scores overflow to infinity: never a finite lie. An infinite score makes its row NaN, as IEEE arithmetic does."""
    q = np.full((1, 2, 1, 4), 3e38, np.float32)
    out, lse = heed.flash_mha(q, q, np.ones_like(q), return_lse=True)
    assert not np.isfinite(out).any() and not np.isfinite(lse).any()


def test_lse_is_natural_log() -> None:
    q, k = np.zeros((1, 1, 1, 8), np.float32), np.zeros((1, 1000, 1, 8), np.float32)
    v = np.ones((1, 1000, 1, 8), np.float32)
    _, lse = heed.flash_mha(q, k, v, return_lse=True)
    want = expected(q, k, v)
    want.check(want.naive_out, lse, "1000 equal keys")
    assert abs(float(want.lse[0, 0, 0]) - np.log(1000)) < 1e-12


def test_the_oracle_is_not_the_library() -> None:
    """reference.py calls nothing of heed's."""
    from pathlib import Path

    source = Path(reference.__file__).read_text()
    assert "import heed" not in source and "from heed" not in source


@pytest.mark.parametrize("softcap", [1e-50, 1e-46, 1e-40, 1e-38])
def test_a_tiny_softcap_is_not_off(softcap: float, flash_mha_face: Face) -> None:
    """Scores are then 0 to float32: every visible key weighs the same."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 9, 2, 16)).astype(np.float32) for _ in range(3))
    out, lse = flash_mha_face(q, k, v, arrays={}, softcap=softcap)
    expected(q, k, v, softcap=softcap).check(out, lse, f"softcap {softcap}")


def test_the_largest_scale_does_not_overflow(flash_mha_face: Face) -> None:
    q = np.full((1, 2, 1, 1), 2e-19, np.float32)
    out, lse = flash_mha_face(q, q, np.ones_like(q), arrays={}, softmax_scale=3e38)
    expected(q, q, np.ones_like(q), softmax_scale=3e38).check(out, lse, "scale 3e38")
