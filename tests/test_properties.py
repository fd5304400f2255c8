"""Properties that attention has for every input, checked on inputs that hypothesis makes up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import heed
from expected import expected
from specs import DTYPES, AttentionSpec, make_inputs
from varlen_specs import VarlenSpec, make_varlen_inputs

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LENGTHS = st.integers(1, 70)
# The tolerance rule measures against a plain implementation, which is exact by luck on few and short rows, and
# hypothesis finds them. Tests that use the rule take long rows, and dtypes whose rounding no order of summation avoids.
LONG_LENGTHS = st.integers(16, 70)
ROUNDING_DTYPES = ("float16", "bfloat16")
MASKS = st.fixed_dictionaries(
    {
        "is_causal": st.booleans(),
        "window_size": st.tuples(st.integers(-1, 40), st.integers(-1, 40)),
        "causal_align": st.sampled_from(["bottom_right", "top_left"]),
    }
)


@st.composite
def problems(draw: Any, lengths: Any = LENGTHS, dtypes: Any = tuple(DTYPES)) -> tuple[np.ndarray, ...]:
    group, kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    spec = AttentionSpec(
        f"property_{draw(st.integers(0, 1000))}",
        batch=draw(st.integers(1, 3)), q_len=draw(lengths), kv_len=draw(lengths),
        num_q_heads=group * kv_heads, num_kv_heads=kv_heads, head_dim_qk=draw(st.integers(8, 80)),
        dtype=draw(st.sampled_from(list(dtypes))),
    )  # fmt: skip
    inputs = make_inputs(spec)
    return inputs.q, inputs.k, inputs.v


def long_problems() -> Any:
    return problems(LONG_LENGTHS, ROUNDING_DTYPES)


def flash(*operands: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    out, lse = heed.flash_mha(*operands, return_lse=True, **options)
    return out, lse


@PROPERTY
@given(long_problems(), st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_matter(problem: Any, random: Any) -> None:
    q, k, v = problem
    order = list(range(k.shape[1]))
    random.shuffle(order)
    expected(q, k, v).check(*flash(q, k[:, order], v[:, order]), "shuffled keys")


@PROPERTY
@given(problems(), MASKS)
def test_batch_rows_and_heads_are_independent(problem: Any, mask: dict[str, Any]) -> None:
    q, k, v = problem
    group = q.shape[2] // k.shape[2]
    out, lse = flash(q, k, v, **mask)
    row, kv_head = slice(-1, None), slice(k.shape[2] - 1, k.shape[2])
    heads = slice((k.shape[2] - 1) * group, None)
    alone, alone_lse = flash(q[row][:, :, heads], k[row][:, :, kv_head], v[row][:, :, kv_head], **mask)
    assert np.array_equal(out[row][:, :, heads], alone) and np.array_equal(lse[row][:, heads], alone_lse)


@PROPERTY
@given(long_problems(), MASKS)
def test_constant_values_come_out(problem: Any, mask: dict[str, Any]) -> None:
    """Weights sum to one: where v is constant, so is what a row that sees anything gets."""
    q, k, v = problem
    v = np.full_like(v, 1.5)
    out, lse = flash(q, k, v, **mask)
    want = expected(q, k, v, **mask)
    want.check(out, lse, "constant values")
    seen = np.isfinite(lse).transpose(0, 2, 1)
    assert (out[~seen] == 0).all()


@PROPERTY
@given(problems(), MASKS)
def test_values_scale_and_negate_exactly(problem: Any, mask: dict[str, Any]) -> None:
    q, k, v = problem
    out, lse = flash(q, k, v, **mask)
    other, other_lse = flash(q, k, v * v.dtype.type(-2), **mask)
    # float16's smallest numbers have no room below; everything else doubles without rounding.
    at = np.abs(out.astype(np.float32)) > 1e-3
    assert np.array_equal(other[at], (out * out.dtype.type(-2))[at]) and np.array_equal(lse, other_lse)


@PROPERTY
@given(long_problems(), st.sampled_from([1.0, -3.0, 8.0]))
def test_shifting_all_logits_only_moves_the_lse(problem: Any, shift: float) -> None:
    """One more feature that is `shift` in every key and 1 in every query adds a constant to a row's logits."""
    q, k, v = problem
    if q.shape[-1] >= 256:
        return
    longer_q = np.concatenate([q, np.full_like(q[..., :1], 1)], axis=-1)
    longer_k = np.concatenate([k, np.full_like(k[..., :1], shift)], axis=-1)
    plain, moved = expected(q, k, v, softmax_scale=0.25), expected(longer_q, longer_k, v, softmax_scale=0.25)
    assert np.abs(plain.out - moved.out).max() < 1e-12 and np.abs(plain.lse + 0.25 * shift - moved.lse).max() < 1e-12
    moved.check(*flash(longer_q, longer_k, v, softmax_scale=0.25), "shifted logits")


@PROPERTY
@given(long_problems(), MASKS)
def test_reversed_tokens_swap_the_alignments(problem: Any, mask: dict[str, Any]) -> None:
    q, k, v = problem
    left, right = mask["window_size"]
    right = 0 if mask["is_causal"] else right
    other = "top_left" if mask["causal_align"] == "bottom_right" else "bottom_right"
    out, lse = flash(q[:, ::-1], k[:, ::-1], v[:, ::-1], window_size=(right, left), causal_align=other)
    expected(q, k, v, **mask).check(out[:, ::-1], lse[..., ::-1], "reversed")


@PROPERTY
@given(long_problems(), MASKS, st.integers(0, 69))
def test_splitting_queries_changes_nothing(problem: Any, mask: dict[str, Any], cut: int) -> None:
    """Under top-left masks the first queries are the same alone."""
    q, k, v = problem
    cut = min(cut, q.shape[1])
    mask = mask | {"causal_align": "top_left"}
    whole_out, whole_lse = flash(q, k, v, **mask)
    out, lse = flash(q[:, :cut], k, v, **mask)
    # Judged among all queries: alone, a single one would have to be as near as its naive result happens to be.
    out = np.concatenate([out, whole_out[:, cut:]], axis=1)
    lse = np.concatenate([lse, whole_lse[..., cut:]], axis=-1)
    expected(q, k, v, **mask).check(out, lse, "first queries")


@PROPERTY
@given(long_problems(), st.integers(0, 69))
def test_states_of_two_halves_merge_to_the_whole(problem: Any, cut: int) -> None:
    """The LSE is what its definition says: halves weighted with exp(lse) give the whole."""
    q, k, v = problem
    cut = min(cut, k.shape[1])
    (out_a, lse_a), (out_b, lse_b) = flash(q, k[:, :cut], v[:, :cut]), flash(q, k[:, cut:], v[:, cut:])
    whole = np.logaddexp(lse_a.astype(np.float64), lse_b)
    weight_a, weight_b = (np.exp(x - whole).transpose(0, 2, 1)[..., None] for x in (lse_a, lse_b))
    merged = weight_a * out_a.astype(np.float64) + weight_b * out_b.astype(np.float64)
    want = expected(q, k, v)
    # Two roundings of each half instead of one of the whole: judged at the dtype that holds both.
    coarse = np.dtype(np.float16) if q.dtype == np.float32 else DTYPES["bfloat16"]
    from tolerance import assert_close

    assert_close(merged.astype(coarse), want.out.astype(coarse), want.out, coarse, "merged halves")
    assert_close(whole.astype(np.float32), want.naive_lse, want.lse, np.float32, "merged lse")


def test_hypothesis_found_real_problems() -> None:
    """The strategies make what the tests above mean: several rows, heads and masks."""
    made: list[tuple[int, ...]] = []

    @PROPERTY
    @given(problems())
    def collect(problem: Any) -> None:
        made.append(problem[0].shape)

    collect()
    assert len(set(made)) > 20 and any(shape[0] > 1 and shape[2] > 2 for shape in made)


@pytest.mark.parametrize("name", ["softmax_scale", "softcap"])
def test_a_tiny_scale_or_a_huge_cap_is_the_limit(name: str) -> None:
    inputs = make_inputs(AttentionSpec("limits", q_len=20, kv_len=33))
    tiny = {"softmax_scale": 1e-30} if name == "softmax_scale" else {"softcap": 1e30}
    limit = {"softmax_scale": 0.0} if name == "softmax_scale" else {}
    out, lse = flash(inputs.q, inputs.k, inputs.v, **tiny)
    expected(inputs.q, inputs.k, inputs.v, **limit).check(out, lse, name)


# Packed sequences ----------------------------------------------------------------------------------------------------


@st.composite
def packs(draw: Any, lengths: Any = LENGTHS, dtypes: Any = tuple(DTYPES)) -> tuple[np.ndarray, ...]:
    """q, k and v of up to six sequences, and the lengths of each."""
    q_lens, kv_lens = (draw(st.lists(lengths, min_size=6, max_size=6)) for _ in range(2))
    keep = draw(st.integers(0, 6))
    group, kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    spec = VarlenSpec(
        f"varlen_property_{draw(st.integers(0, 1000))}", tuple(q_lens[:keep]), tuple(kv_lens[:keep]),
        num_q_heads=group * kv_heads, num_kv_heads=kv_heads, head_dim_qk=draw(st.integers(8, 80)),
        dtype=draw(st.sampled_from(list(dtypes))),
    )  # fmt: skip
    inputs = make_varlen_inputs(spec)
    return inputs.q, inputs.k, inputs.v, np.array(q_lens[:keep], int), np.array(kv_lens[:keep], int)


def ends(lens: np.ndarray) -> np.ndarray:
    return np.cumsum([0, *lens])


def flash_packed(q: Any, k: Any, v: Any, q_lens: Any, kv_lens: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    out, lse = heed.flash_mha_varlen(q, k, v, ends(q_lens), ends(kv_lens), return_lse=True, **options)
    return out, lse


@PROPERTY
@given(packs(st.integers(0, 70)), MASKS, st.randoms(use_true_random=False))
def test_the_order_of_sequences_does_not_matter(pack: Any, mask: dict[str, Any], random: Any) -> None:
    q, k, v, q_lens, kv_lens = pack
    order = list(range(len(q_lens)))
    random.shuffle(order)

    def rows(lens: np.ndarray) -> np.ndarray:
        at = ends(lens)
        return np.concatenate([np.arange(0), *(np.arange(at[i], at[i + 1]) for i in order)])

    out, lse = flash_packed(q, k, v, q_lens, kv_lens, **mask)
    moved = flash_packed(q[rows(q_lens)], k[rows(kv_lens)], v[rows(kv_lens)], q_lens[order], kv_lens[order], **mask)
    assert np.array_equal(out[rows(q_lens)], moved[0]) and np.array_equal(lse[:, rows(q_lens)], moved[1])


@PROPERTY
@given(packs(LONG_LENGTHS, ROUNDING_DTYPES), MASKS)
def test_each_packed_sequence_is_a_call_of_its_own(pack: Any, mask: dict[str, Any]) -> None:
    q, k, v, q_lens, kv_lens = pack
    out, lse = flash_packed(q, k, v, q_lens, kv_lens, **mask)
    at_q, at_k = ends(q_lens), ends(kv_lens)
    for i in range(len(q_lens)):
        rows, keys = slice(at_q[i], at_q[i + 1]), slice(at_k[i], at_k[i + 1])
        want = expected(q[None, rows], k[None, keys], v[None, keys], **mask)
        want.check(out[None, rows], lse[None, :, rows], f"sequence {i}")


@PROPERTY
@given(packs(st.integers(0, 70)), MASKS, st.integers(0, 2**32 - 1))
def test_seqused_is_a_shorter_sequence(pack: Any, mask: dict[str, Any], seed: int) -> None:
    """Keys that do not count might as well not be there."""
    q, k, v, q_lens, kv_lens = pack
    used = np.random.default_rng(seed).integers(0, kv_lens + 1) if len(kv_lens) else kv_lens
    at = ends(kv_lens)
    kept = np.concatenate([np.arange(0), *(np.arange(at[i], at[i] + used[i]) for i in range(len(used)))])
    out, lse = flash_packed(q, k, v, q_lens, kv_lens, seqused_k=used, **mask)
    short = flash_packed(q, k[kept], v[kept], q_lens, used, **mask)
    assert np.array_equal(out, short[0]) and np.array_equal(lse, short[1])
