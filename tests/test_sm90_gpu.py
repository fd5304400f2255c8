"""The Hopper attention forward kernel on a Hopper GPU, asked for by name: right results, whatever it is given.

Results are judged against the float64 oracle and against the portable kernel. How it is called (layouts, streams,
graphs, JAX) is in test_sm90_gpu_calls.py; the same kernel also serves the conformance tests of the other files, where
it is the automatic choice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import heed
from conftest import each_array, from_torch, to_torch
from expected import Expected, expected, judge
from sm90_cases import (
    COURSES,
    DTYPES_16,
    EDGES,
    NAMED,
    NUM_RANDOM,
    TILE,
    Call,
    Spec,
    bits,
    call_of,
    every_end,
    expected_call,
    expected_result,
    hopper_torch,
    random_spec,
    require_served,
    run_torch,
    steep_call,
    strange_call,
)
from specs import DTYPES, AttentionSpec
from tolerance import assert_agree
from varlen_specs import VarlenSpec

pytestmark = pytest.mark.gpu

FEW_ROWS = 512


@pytest.fixture
def torch() -> Any:
    return hopper_torch()


def check(torch: Any, call: Call, want: Expected, what: str, judges_lse: bool = True) -> None:
    """Asserts the rule of tests/tolerance.py for the kernel's result, and for how far it is from the portable one's."""
    require_served(call)
    out, lse = run_torch(torch, call)
    want.check(out, lse if judges_lse else None, what)
    other_out, other_lse = run_torch(torch, call, "sm80")
    assert_agree(out, other_out, want.naive_out, want.out, out.dtype, f"{what}, beside sm80: out")
    assert_agree(lse, other_lse, want.naive_lse, want.lse, np.float32, f"{what}, beside sm80: lse")


def check_spec(torch: Any, spec: Spec) -> None:
    """The same for a spec. In few rows a plain result may be right to the last bit by luck: other numbers are tried."""
    require_served(call_of(spec))  # before the oracle's work

    def check_draw(seed: int) -> None:
        check(torch, call_of(spec, seed), expected_result(spec, seed), f"{spec.name}, draw {seed}")

    if expected_result(spec).lse.size < FEW_ROWS:
        judge(check_draw)
    else:
        check_draw(0)


# Conformance.


# The LSE of a row that sees one key is its score. Tensor cores truncate where they add products up: from 192 of them on
# the largest error is 0.9 to 1.6 times the rule's bound, in both kernels, bit for bit.
ONE_LONG_SCORE = [spec for spec in NAMED if spec.name.startswith("kv_len_1-") and spec.head_dim_qk >= 192]


@pytest.mark.parametrize("spec", NAMED, ids=lambda spec: spec.name)
def test_named_specs(spec: Spec, torch: Any) -> None:
    if spec in ONE_LONG_SCORE:
        check(torch, call_of(spec), expected_result(spec), spec.name, judges_lse=False)
    else:
        check_spec(torch, spec)


@pytest.mark.parametrize("spec", ONE_LONG_SCORE, ids=lambda spec: spec.name)
@pytest.mark.xfail(strict=True, raises=AssertionError, reason="tensor cores truncate sums of products")
def test_lse_of_one_long_score(spec: Spec, torch: Any) -> None:
    check_spec(torch, spec)


@pytest.mark.parametrize("number", range(NUM_RANDOM))
def test_random_problems(number: int, torch: Any) -> None:
    check_spec(torch, random_spec(number))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("q_len", EDGES[::2])
def test_short_sequences(q_len: int, is_causal: bool, torch: Any) -> None:
    """From one query and one key up."""
    for i, kv_len in enumerate(EDGES[q_len % 3 :: 3]):
        align = ("bottom_right", "top_left")[i % 2]
        spec = AttentionSpec(f"short_{q_len}_{kv_len}", 1, q_len, kv_len, 2, 1, 128, dtype=DTYPES_16[(i // 2) % 2],
                             is_causal=is_causal, causal_align=align)  # fmt: skip
        check_spec(torch, spec)


# Ends of sequences at every place of a tile.


@pytest.mark.parametrize("dtype", DTYPES_16)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("first", range(1, TILE + 1, 32))
def test_packed_sequences_end_anywhere(first: int, is_causal: bool, dtype: str, torch: Any) -> None:
    check_spec(torch, every_end(first, is_causal, dtype))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("first", range(1, TILE + 1, 16))
def test_dense_sequences_end_anywhere(first: int, is_causal: bool, torch: Any) -> None:
    """Inside of memory that is NaN on all sides."""
    rng = np.random.default_rng([first, is_causal])
    for end in range(first, first + 16):
        dtype = DTYPES_16[end % 2]
        q_len, kv_len = end + TILE * (end % 3 == 0), (end * 53) % TILE + 1 + TILE * (end % 2)
        arrays, views = [], []
        for length in (q_len, kv_len, kv_len):
            x = rng.standard_normal((2, length, 2, 128)).astype(DTYPES[dtype])
            wide = torch.full((4, length + 300, 4, 136), float("nan"), dtype=getattr(torch, dtype), device="cuda")
            view = wide[1:3, 150 : 150 + length, 1:3, :128]
            view.copy_(to_torch(x))
            arrays.append(x)
            views.append(view)
        align = ("bottom_right", "top_left")[end % 2]
        options: dict[str, Any] = {"is_causal": is_causal, "causal_align": align}
        out, lse = heed.flash_mha(*views, return_lse=True, backend="sm90", **options)
        want = expected(*arrays, **options)
        want.check(from_torch(out), from_torch(lse), f"q_len {q_len}, kv_len {kv_len}, {dtype}")


@pytest.mark.parametrize("dtype", DTYPES_16)
def test_lengths_that_only_the_device_knows(dtype: str, torch: Any) -> None:
    """One problem, many lengths: the memory beyond all of them stays NaN."""
    count, capacity = 6, 300
    spec = VarlenSpec("device_lengths", (1,) * count, (capacity,) * count, num_q_heads=4, head_dim_qk=128, dtype=dtype,
                      is_causal=True)  # fmt: skip
    call = call_of(spec)
    require_served(call)
    q, k, v = call.operands
    rng = np.random.default_rng(0)
    q = rng.standard_normal((count * 40, *q.shape[1:])).astype(q.dtype)
    for _ in range(12):
        q_lens = rng.multinomial(len(q) - 11, rng.dirichlet(np.ones(count)))
        used = rng.integers(0, capacity + 1, count)
        hidden = np.arange(capacity) >= used[:, None]
        new_k, new_v = (np.where(hidden.reshape(-1)[:, None, None], np.nan, x).astype(x.dtype) for x in (k, v))
        arrays = {
            "cu_seqlens_q": np.cumsum([0, *q_lens]).astype(np.int32),
            "cu_seqlens_k": (np.arange(count + 1) * capacity).astype(np.int32),
            "seqused_k": used.astype(np.int32),
        }
        new_q = q.copy()
        new_q[q_lens.sum() :] = np.nan
        one = Call("flash_mha_varlen", (new_q, new_k, new_v), arrays, {"is_causal": True})
        check(torch, one, expected_call(one), f"lengths {q_lens}, used {used}")


# The checked redo: scores that outgrow a stale maximum, in all rows, in some, with the growth of either dtype.


@pytest.mark.parametrize("dtype", DTYPES_16)
@pytest.mark.parametrize("top", [8.0, 20.0, 60.0, 1e4])
@pytest.mark.parametrize("course", COURSES)
def test_steep_scores(course: str, top: float, dtype: str, torch: Any) -> None:
    for is_causal in (False, True):
        call = steep_call(course, top, dtype, is_causal)
        check(torch, call, expected_call(call), f"{course} to {top:g}, {dtype}, causal {is_causal}")


@pytest.mark.parametrize("dtype", DTYPES_16)
def test_steep_scores_in_a_window_and_in_packed_sequences(dtype: str, torch: Any) -> None:
    call = steep_call("growing", 1e4, dtype, False, q_len=500)
    call = call._replace(statics={"window_size": (150, 20)})
    check(torch, call, expected_call(call), f"window, {dtype}")
    ends = np.array([0, 130, 131, 400, 523], np.int32)
    call = steep_call("peaks", 200.0, dtype, False, q_len=523)
    packed = Call(
        "flash_mha_varlen", (call.operands[0][0], call.operands[1][0], call.operands[2][0]), {"cu_seqlens_q": ends},
        {"is_causal": True},
    )  # fmt: skip
    check(torch, packed, expected_call(packed), f"packed, {dtype}")


@pytest.mark.parametrize("top", [9.0, 35.0])
@pytest.mark.parametrize("dtype", DTYPES_16)
def test_sums_that_overflow_unless_they_are_scaled(dtype: str, top: float, torch: Any) -> None:
    """The last keys' exponentials are large beside the first block's, and v is near the largest numbers."""
    q, k, v = (call := steep_call("last_block", top, dtype, False)).operands
    largest = 3e4 if dtype == "float16" else 1e30
    call = call._replace(operands=(q, k, (np.sign(v.astype(np.float32)) * largest).astype(v.dtype)))
    check(torch, call, expected_call(call), f"{dtype}, {top:g}")


# Values that are not finite.


@pytest.mark.parametrize("dtype", DTYPES_16)
@pytest.mark.parametrize("first", range(0, 60, 10))
def test_values_that_are_not_finite(first: int, dtype: str, torch: Any) -> None:
    """NaN and infinities are where the reference has them, and nowhere else."""
    for number in range(first, first + 10):
        call = strange_call(number, dtype)
        check(torch, call, expected_call(call), f"strange {number}, {dtype}")


@pytest.mark.parametrize("dtype", DTYPES_16)
@pytest.mark.parametrize("operand", ["q", "k", "v"])
def test_an_infinity_at_every_kind_of_place(operand: str, dtype: str, torch: Any) -> None:
    """One in each call: the rows that see it, and no others, show it."""
    spec = AttentionSpec("infinities", 1, 200, 300, 2, 2, 128, dtype=dtype, is_causal=True)
    clean = call_of(spec)
    for i, token in enumerate((0, 15, 63, 64, 127, 128, 199)):
        for value in (np.inf, -np.inf, np.nan):
            operands = [x.copy() for x in clean.operands]
            operands["qkv".index(operand)][0, token, i % 2, 5 * i] = value
            call = clean._replace(operands=tuple(operands))
            check(torch, call, expected_call(call), f"{value} in {operand} at {token}")


def test_a_head_of_nothing_but_infinities(torch: Any) -> None:
    spec = AttentionSpec("all_infinite", 1, 140, 260, 2, 2, 128, dtype="bfloat16")
    clean = call_of(spec)
    for name in "qkv":
        operands = [x.copy() for x in clean.operands]
        operands["qkv".index(name)][:, :, 0] = np.inf
        call = clean._replace(operands=tuple(operands))
        check(torch, call, expected_call(call), f"all of {name}")


# Repeats.


@pytest.mark.parametrize("dtype", DTYPES_16)
def test_10000_repeats_of_a_packed_causal_problem_are_bitwise_equal(dtype: str, torch: Any) -> None:
    lengths = tuple(3 + i * 89 % 290 for i in range(16))
    spec = VarlenSpec("repeats", lengths, num_q_heads=16, num_kv_heads=4, head_dim_qk=128, dtype=dtype, is_causal=True)
    check_spec(torch, spec)
    call = call_of(spec)
    operands = [to_torch(x) for x in call.operands]
    arrays = each_array(to_torch, call.arrays)

    def attend() -> Any:
        return heed.flash_mha_varlen(*operands, return_lse=True, backend="sm90", **arrays, **call.statics)

    first = attend()
    num_blocks = torch.cuda.get_device_properties(0).multi_processor_count
    assert 16 * sum(-(-n // TILE) for n in lengths) > 2 * num_blocks, "blocks are to take tiles in turns"
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for i in range(10_000):
        results = attend()
        for x, y in zip(results, first, strict=True):
            differing += (bits(torch, x) != bits(torch, y)).any()
        if i % 64 == 0:  # what the allocator hands out next holds other numbers
            del results
            poison = [torch.full_like(x, float(i % 7) - 3.0) for x in first]
            del poison
    assert int(differing) == 0, f"{int(differing)} results of 20000 differ from those of the first call"


def test_a_tile_does_not_depend_on_its_neighbours(torch: Any) -> None:
    """A sequence alone, and among others: the same bits, whichever block computes it."""
    spec = AttentionSpec("alone", 5, 300, 300, 32, 8, 128, dtype="bfloat16", is_causal=True)
    call = call_of(spec)
    require_served(call)
    out, lse = run_torch(torch, call)
    for i in (0, 3):
        alone = call._replace(operands=tuple(x[i : i + 1] for x in call.operands))
        out_alone, lse_alone = run_torch(torch, alone)
        assert out_alone.tobytes() == out[i : i + 1].tobytes() and lse_alone.tobytes() == lse[i : i + 1].tobytes()


# Options one by one where the named specs have them in company.


@pytest.mark.parametrize("group", [1, 2, 3, 4, 8, 16, 64])
def test_groups_of_query_heads(group: int, torch: Any) -> None:
    spec = AttentionSpec(f"group_{group}", 2, 65, 140, group * (1 if group == 64 else 2), 1 if group == 64 else 2, 128,
                         dtype=DTYPES_16[group % 2], is_causal=True)  # fmt: skip
    check_spec(torch, spec)


@pytest.mark.parametrize("window", [(0, 0), (1, 0), (127, 0), (128, 0), (129, 3), (-1, 5), (300, -1), (5, 200)])
def test_windows(window: tuple[int, int], torch: Any) -> None:
    for i, (q_len, kv_len) in enumerate(((400, 400), (130, 390), (390, 130))):
        for align in ("bottom_right", "top_left"):
            spec = AttentionSpec(f"window_{window}_{i}_{align}", 1, q_len, kv_len, 2, 2, 128, dtype=DTYPES_16[i % 2],
                                 window_size=window, causal_align=align, sinks=i == 1)  # fmt: skip
            check_spec(torch, spec)


def test_without_lse(torch: Any) -> None:
    spec = AttentionSpec("without_lse", 2, 200, 333, 4, 2, 128, dtype="bfloat16")
    call = call_of(spec)
    require_served(call)
    operands = [to_torch(x) for x in call.operands]
    out = heed.flash_mha(*operands, backend="sm90")
    assert out.shape == operands[0].shape
    expected_result(spec).check(from_torch(out), None, "without lse")


def test_a_problem_of_more_than_2_to_the_31_elements(torch: Any) -> None:
    """Sampled heads of one that passes 32-bit offsets in elements, in one operand at least."""
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free GPU memory")
    batch, tokens, heads = 1100, 128, 128
    q = torch.randn(batch, tokens, heads, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(batch, tokens, 1, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    assert q.numel() > 2**31
    out = heed.flash_mha(q, k, v, is_causal=True, backend="sm90")
    for b, h in ((0, 0), (batch - 1, heads - 1), (batch // 2, 77)):
        one = [x[b : b + 1, :, at : at + 1].contiguous() for x, at in ((q, h), (k, 0), (v, 0))]
        want = expected(*map(from_torch, one), is_causal=True)
        want.check(from_torch(out[b : b + 1, :, h : h + 1].contiguous()), None, f"sequence {b}, head {h}")


def test_keys_beyond_32_bits(torch: Any) -> None:
    """Dense and packed: the only keys that count lie more than 2^31 elements on."""
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free GPU memory")
    far, tail, window = 2**24, 300, (150, 0)
    k, v = (torch.randn(far + tail, 1, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(130, 2, 128, device="cuda", dtype=torch.bfloat16)
    assert k.numel() > 2**31
    near = [from_torch(x[far:]) for x in (k, v)]
    want = expected(from_torch(q)[None], *(x[None] for x in near), window_size=window)  # no row looks farther back
    found = heed.flash_mha(q[None], k[None], v[None], window_size=window, return_lse=True, backend="sm90")
    want.check(*map(from_torch, found), "dense")
    rows, keys = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 0, 130], [0, far, far + tail]))
    out, lse = heed.flash_mha_varlen(q, k, v, rows, keys, window_size=window, return_lse=True, backend="sm90")
    want.check(from_torch(out[None]), from_torch(lse[None]), "packed")
