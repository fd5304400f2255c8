"""Problems for the Hopper attention forward kernel: the named specs at its head dims and dtypes, random ones, and
inputs that lead it off its usual way (scores that outgrow a stale maximum, values that are not finite).

What it does not serve yet is skipped with the kernel's own reason; test_sm90_selection.py says what it must serve.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import heed
from conftest import each_array, from_torch, to_torch
from expected import Expected, expected, expected_of, expected_of_few_rows, expected_of_varlen, expected_varlen
from specs import BY_NAME, CONFORMANCE, DTYPES, AttentionSpec, make_inputs
from varlen_specs import VARLEN, VARLEN_BY_NAME, VarlenSpec, make_varlen_inputs

Spec = AttentionSpec | VarlenSpec
FEW_QUERIES = 8

DTYPES_16 = ("bfloat16", "float16")
HEAD_DIMS = ((128, 128), (64, 64), (80, 80), (96, 96), (192, 192), (256, 256), (192, 128))

# Rows and keys of a tile at head dim 128: lengths around its multiples, and those of a warp and a warpgroup, are edges.
TILE = 128


class Call(NamedTuple):
    """One call of heed, in NumPy arrays."""

    function: str
    operands: tuple[np.ndarray, np.ndarray, np.ndarray]
    arrays: dict[str, Any]
    statics: dict[str, Any]


def call_of(spec: Spec, seed: int = 0) -> Call:
    is_packed = isinstance(spec, VarlenSpec)
    x = make_varlen_inputs(spec, seed) if isinstance(spec, VarlenSpec) else make_inputs(spec, seed)
    return Call("flash_mha_varlen" if is_packed else "flash_mha", (x.q, x.k, x.v), x.arrays, spec.static_options())


def expected_result(spec: Spec, seed: int = 0) -> Expected:
    if isinstance(spec, VarlenSpec):
        return expected_of_varlen(spec, seed)
    return expected_of(spec, seed) if spec.q_len >= FEW_QUERIES else expected_of_few_rows(spec, seed)


def why_declined(call: Call, backend: str | None = "sm90") -> str:
    """The kernel's reason on a Hopper GPU, or nothing."""
    function = getattr(heed, call.function)
    found = heed.explain(function, *call.operands, **call.arrays, **call.statics, backend=backend, target="sm_90a")
    return "" if found.chosen == "sm90_attention_fwd" else found.reasons["sm90_attention_fwd"]


def require_served(call: Call) -> None:
    reason = why_declined(call)
    if reason:
        pytest.skip(f"sm90_attention_fwd {reason}")


def hopper_torch() -> Any:
    """PyTorch, where its first GPU is one that the kernel is for."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("this is no Hopper GPU")
    return torch


def bits(torch: Any, x: Any) -> Any:
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


def run_torch(torch: Any, call: Call, backend: str | None = "sm90") -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) by one backend. What the kernel gets for its results, and to work in, holds NaN before."""
    operands = [to_torch(x) for x in call.operands]
    arrays = each_array(to_torch, call.arrays)
    q, _, v = operands
    poison = [
        torch.full((*q.shape[:-1], v.shape[-1]), float("nan"), dtype=q.dtype, device=q.device),
        torch.full(q.shape[:-1], float("nan"), device=q.device),
        *(torch.full((n,), -1, dtype=torch.int32, device=q.device) for n in (4, 64, 256)),
    ]
    del poison
    out, lse = getattr(heed, call.function)(*operands, return_lse=True, **arrays, **call.statics, backend=backend)
    return from_torch(out), from_torch(lse)


# The named specs.


def variant(spec: Any, head_dims: tuple[int, int]) -> Any:
    """The spec at other head dims, and at 16 bits if it is not."""
    qk, v = head_dims
    dtype = spec.dtype if spec.dtype in DTYPES_16 else DTYPES_16[zlib.crc32(spec.name.encode()) % 2]
    name = f"{spec.name}-d{qk}" + (f"_{v}" if v != qk else "") + ("" if dtype == spec.dtype else f"-{dtype}")
    return dataclasses.replace(spec, name=name, head_dim_qk=qk, head_dim_v=v, dtype=dtype)


def _at_every_head_dim() -> list[Spec]:
    dense = (
        "full_bfloat16", "causal_float16", "causal_gqa_d128_bfloat16", "q_len_1_causal", "kv_len_1", "primes_causal",
        "top_left_window_q_longer", "window_both", "softcap_gqa", "sinks_causal_empty_rows", "alibi_causal",
        "segments_packed_causal", "everything", "large_logits_bfloat16", "nan_visible_causal",
    )  # fmt: skip
    packed = ("varlen_cross_causal_float16", "varlen_used_nan_bfloat16", "varlen_tile_edges", "varlen_everything")
    chosen: list[Any] = [BY_NAME[name] for name in dense] + [VARLEN_BY_NAME[name] for name in packed]
    return [variant(spec, dims) for dims in HEAD_DIMS[1:] for spec in chosen]


def _every_spec_at_128() -> list[Spec]:
    every: list[Any] = [*CONFORMANCE, *VARLEN]
    own = ("head_dim_", "varlen_head_dim_")  # they differ in the head dim alone
    return [variant(s, (128, 128)) for s in every if not s.name.endswith("_float32") and not s.name.startswith(own)]


def _many_tiles() -> list[Spec]:
    """More tiles than any GPU has multiprocessors, so that blocks take more than one; with an uneven end each."""
    dense: dict[str, Any] = {"batch": 2, "q_len": 257, "kv_len": 200, "num_q_heads": 32, "num_kv_heads": 8,
                             "head_dim_qk": 128, "dtype": "bfloat16"}  # fmt: skip
    lengths = tuple(7 + i * 61 % 300 for i in range(24))
    packed: dict[str, Any] = {"q_lens": lengths, "num_q_heads": 8, "head_dim_qk": 128, "dtype": "bfloat16"}
    return [
        AttentionSpec("many_tiles", **dense),
        AttentionSpec("many_tiles_causal", is_causal=True, **dense),
        AttentionSpec("many_tiles_window", window_size=(70, 10), **dense),
        VarlenSpec("many_tiles_packed", **packed),
        VarlenSpec("many_tiles_packed_causal", is_causal=True, **packed),
    ]


def _few_rows() -> list[Spec]:
    """Few rows of groups of heads, in more heads than any GPU has multiprocessors: up to 16 heads share a tile, if that
    power of two divides the group (they do: sm90_attention_fwd_tiles_test.cc).
    """
    specs: list[Spec] = []
    for i, q_len in enumerate((1, 3, 16, 33)):
        for j, group in enumerate((2, 3, 4, 6, 8, 16)):
            qk, v = ((128, 128), (64, 64), (256, 256), (192, 128))[(i + j) % 4]
            options: dict[str, Any] = {
                "batch": 160 // group + 1, "q_len": q_len, "kv_len": 150 + 10 * i + j, "num_q_heads": 2 * group,
                "num_kv_heads": 2, "head_dim_qk": qk, "head_dim_v": v, "sinks": j % 3 == 2,
                "dtype": "float16" if qk == v == 128 and i % 2 == 1 else "bfloat16",
            }  # fmt: skip
            mask: dict[str, Any] = {"is_causal": True, "causal_align": ("bottom_right", "top_left")[i % 2]}
            if j % 2 == 1:
                mask = {"window_size": (40, 2)}
            specs.append(AttentionSpec(f"few_rows_{q_len}_group_{group}", **options))
            specs.append(AttentionSpec(f"few_rows_{q_len}_group_{group}_masked", **options, **mask))
    return specs


def _tiles_in_parts() -> list[Spec]:
    """Fewer tiles than multiprocessors, or some more than a round of them: blocks share tiles by steps. With few rows,
    heads of a group share such tiles, and there may be a mask.
    """
    few: dict[str, Any] = {"batch": 1, "q_len": 200, "kv_len": 6000, "num_q_heads": 6, "num_kv_heads": 2}
    some: dict[str, Any] = {"batch": 1, "q_len": 1100, "kv_len": 1700, "num_q_heads": 16, "num_kv_heads": 4}
    own: dict[str, Any] = {"batch": 1, "q_len": 100, "kv_len": 6000, "num_q_heads": 3, "num_kv_heads": 3}
    group: dict[str, Any] = {"batch": 2, "q_len": 16, "kv_len": 6000, "num_q_heads": 16, "num_kv_heads": 2}
    d128: dict[str, Any] = {"head_dim_qk": 128, "dtype": "bfloat16"}
    d64: dict[str, Any] = {"head_dim_qk": 64, "dtype": "float16", "sinks": True}
    window: dict[str, Any] = {"causal_align": "top_left", "window_size": (-1, 4000)}
    return [
        AttentionSpec("parts_few", head_dim_qk=128, dtype="bfloat16", **few),
        AttentionSpec("parts_few_float16", head_dim_qk=64, dtype="float16", sinks=True, **few),
        AttentionSpec("parts_few_large_logits", head_dim_qk=128, dtype="bfloat16", numbers="large_logits", **few),
        AttentionSpec("parts_few_nan_visible", head_dim_qk=128, dtype="bfloat16", numbers="nan_visible", **few),
        AttentionSpec("parts_some", head_dim_qk=128, dtype="float16", **some),
        AttentionSpec("parts_some_d80", head_dim_qk=80, dtype="bfloat16", sinks=True, **{**some, "kv_len": 4000}),
        AttentionSpec("parts_causal", is_causal=True, **own, **d128),
        AttentionSpec("parts_causal_float16", is_causal=True, **own, **d64),
        AttentionSpec("parts_causal_large_logits", is_causal=True, numbers="large_logits", **own, **d128),
        AttentionSpec("parts_window", window_size=(5000, 0), **own, **d128),
        AttentionSpec("parts_top_left_window", **window, **own, **d64),
        AttentionSpec("parts_packs", **group, **d128),
        AttentionSpec("parts_packs_float16", **group, **d64),
        AttentionSpec("parts_packs_causal", is_causal=True, **group, **d128),
        AttentionSpec("parts_packs_causal_float16", is_causal=True, **group, **d64),
        AttentionSpec("parts_packs_causal_large_logits", is_causal=True, numbers="large_logits", **group, **d128),
        AttentionSpec("parts_packs_causal_nan_hidden", is_causal=True, numbers="nan_hidden", **group, **d128),
        AttentionSpec("parts_packs_causal_nan_visible", is_causal=True, numbers="nan_visible", **group, **d64),
        AttentionSpec("parts_packs_window", window_size=(3000, 2), **group, **d128),
        AttentionSpec("parts_packs_top_left_window", **window, **group, **d128),
        AttentionSpec("parts_packs_one_query", is_causal=True, **{**group, "q_len": 1}, **d128),
    ]


def _tall_tiles() -> list[Spec]:
    """Where the kernel takes tiles of 192 rows (it does: sm90_attention_fwd_tiles_test.cc): head dim 64, and so many
    heads that they are faster although sequences are short.
    """
    dense: dict[str, Any] = {"batch": 2, "q_len": 190, "kv_len": 450, "num_q_heads": 66, "num_kv_heads": 33,
                             "dtype": "bfloat16"}  # fmt: skip
    packed: dict[str, Any] = {"q_lens": (1333, 1790, 1500), "num_q_heads": 6, "num_kv_heads": 3, "dtype": "bfloat16"}
    return [
        AttentionSpec("tall_tiles", **dense),
        AttentionSpec("tall_tiles_float16", **{**dense, "dtype": "float16"}),
        AttentionSpec("tall_tiles_causal", is_causal=True, sinks=True, **dense),
        AttentionSpec("tall_tiles_top_left_window", causal_align="top_left", window_size=(150, 300), **dense),
        AttentionSpec("tall_tiles_large_logits", numbers="large_logits", **dense),
        AttentionSpec("tall_tiles_nan_hidden", is_causal=True, numbers="nan_hidden", **{**dense, "kv_len": 340}),
        AttentionSpec("tall_tiles_nan_visible", is_causal=True, numbers="nan_visible", **dense),
        VarlenSpec("tall_tiles_packed", **packed),
        VarlenSpec("tall_tiles_packed_window", window_size=(1300, 1300), **packed),
    ]


OWN: list[Spec] = [*_many_tiles(), *_few_rows(), *_tiles_in_parts(), *_tall_tiles()]
NAMED: list[Spec] = [*_every_spec_at_128(), *_at_every_head_dim(), *OWN]
NAMED_BY_NAME: dict[str, Spec] = {spec.name: spec for spec in NAMED}
assert len(NAMED_BY_NAME) == len(NAMED), "spec names must be unique"


# Random problems.

EDGES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 79, 80, 81, 96, 127, 128, 129, 159, 160, 176, 191, 192, 193,
         255, 256, 257, 319, 320, 383, 384, 385)  # fmt: skip


NUM_RANDOM = 160


def random_spec(number: int) -> Spec:
    """One of many problems that few tests would name. Its name tells how to draw it again."""
    rng = np.random.default_rng([number, 90])

    def chance(share: float) -> bool:
        return bool(rng.random() < share)

    def length() -> int:
        return int(rng.choice(EDGES)) if chance(0.6) else int(rng.integers(1, 400))

    group = int(rng.choice([1, 1, 2, 3, 4, 8]))
    kv_heads = int(rng.integers(1, 3))
    qk, v = HEAD_DIMS[0 if chance(0.6) else int(rng.integers(len(HEAD_DIMS)))]
    options: dict[str, Any] = {
        "num_q_heads": group * kv_heads,
        "num_kv_heads": kv_heads,
        "head_dim_qk": qk,
        "head_dim_v": v,
        "dtype": str(rng.choice(DTYPES_16)),
        "is_causal": chance(0.5),
        "causal_align": "top_left" if chance(0.3) else "bottom_right",
        "sinks": chance(0.2),
        "softcap": 12.0 if chance(0.1) else None,
        "alibi": chance(0.1),
        "softmax_scale": 0.07 if chance(0.2) else None,
    }
    if chance(0.4):
        options["window_size"] = tuple(-1 if chance(0.3) else int(rng.integers(0, 300)) for _ in range(2))
    name = f"random_{number}"
    if chance(0.4):
        count = int(rng.integers(1, 9))
        q_lens, kv_lens = (tuple(0 if chance(0.1) else length() for _ in range(count)) for _ in range(2))
        has_used = chance(0.5)
        used = tuple(int(rng.integers(0, n + 2)) for n in kv_lens) if has_used else None
        outside = (int(rng.integers(0, 9)), int(rng.integers(0, 200))) if chance(0.4) else (0, 0)
        return VarlenSpec(name, q_lens, kv_lens, used, outside, chance(0.5), numbers="nan_unused", **options)
    segments = "cross" if chance(0.1) else "none"
    return AttentionSpec(name, int(rng.integers(1, 4)), length(), length(), segments=segments, **options)


# Scores that outgrow the maximum which the kernel took from a tile's first keys. One column of q and k carries them,
# and noise is in the others.

COURSES = ("growing", "falling", "last_block", "alternating", "one_row", "one_warp", "peaks")


def steep_call(course: str, top: float, dtype: str, is_causal: bool, q_len: int = 200, kv_len: int = 523) -> Call:
    """Scores from about -top to top: rising or falling over all keys, jumping in the last block of keys, changing sign
    with each block, rising in one row of each 16, or in the rows of one warp of each 4, or with a peak at some keys.
    """
    rng = np.random.default_rng([zlib.crc32(course.encode()), int(top)])
    num_q_heads, num_kv_heads, head_dim = 4, 2, 128
    q = rng.standard_normal((1, q_len, num_q_heads, head_dim)) * 0.5
    k = rng.standard_normal((1, kv_len, num_kv_heads, head_dim)) * 0.5
    v = rng.standard_normal((1, kv_len, num_kv_heads, head_dim))
    rows, keys = np.arange(q_len), np.arange(kv_len)
    ramp = 2.0 * keys / (kv_len - 1) - 1
    of_keys = {
        "falling": -ramp,
        "last_block": np.where(keys >= (kv_len - 1) // TILE * TILE, 1.0, 0.0),
        "alternating": np.where(keys // TILE % 2 == 0, -1.0, 1.0) * (keys + 1) / kv_len,
        "peaks": np.where(keys % 97 == 60, keys / kv_len, -0.1),
    }.get(course, ramp)
    of_rows = {"one_row": rows % 16 == 5, "one_warp": rows // 16 % 4 == 2}.get(course, np.ones(q_len, bool))
    share = np.sqrt(top)  # of either factor: float16 ends at 65504
    q[..., 0] = (share * np.sqrt(head_dim) * of_rows)[None, :, None]
    k[..., 0] = (share * of_keys)[None, :, None]
    q, k, v = (x.astype(DTYPES[dtype]) for x in (q, k, v))
    return Call("flash_mha", (q, k, v), {}, {"is_causal": is_causal})


def strange_call(number: int, dtype: str) -> Call:
    """A few elements of q, k or v that are not finite, at tiles' edges more often than elsewhere."""
    rng = np.random.default_rng([number, 7])
    q_len, kv_len, num_q_heads, num_kv_heads, head_dim = 150, 280, 4, 2, 128
    q = rng.standard_normal((2, q_len, num_q_heads, head_dim))
    k, v = (rng.standard_normal((2, kv_len, num_kv_heads, head_dim)) for _ in range(2))
    edges = [0, 15, 16, 63, 64, 127, 128, 129]
    for _ in range(int(rng.integers(1, 4))):
        x = (q, k, v)[int(rng.integers(3))]
        token = int(rng.choice([*edges, x.shape[1] - 1])) if rng.random() < 0.7 else int(rng.integers(x.shape[1]))
        at = int(rng.integers(2)), token, int(rng.integers(x.shape[2])), int(rng.integers(head_dim))
        x[at] = rng.choice([np.nan, np.inf, -np.inf])
    options = ({}, {"is_causal": True}, {"window_size": (40, 9)})[number % 3]
    q, k, v = (x.astype(DTYPES[dtype]) for x in (q, k, v))
    return Call("flash_mha", (q, k, v), {}, options)


def expected_call(call: Call) -> Expected:
    """The oracle and the yardstick."""
    function: Callable[..., Expected] = expected if call.function == "flash_mha" else expected_varlen
    with np.errstate(all="ignore"):
        return function(*call.operands, **call.arrays, **call.statics)


# Sequences that end at every place of a tile.


def every_end(first: int, is_causal: bool, dtype: str, count: int = 32) -> VarlenSpec:
    """Packed sequences that end `first`, `first` + 1, ... rows after a tile's beginning, in one tile or the second.
    Keys end at other places; memory between the keys that count and the next sequence is NaN.
    """
    ends = [first + i for i in range(count)]
    q_lens = tuple(end + TILE * (end % 2) for end in ends)
    used = tuple((end * 37 - 1) % TILE + 1 + TILE * (end % 3) for end in ends)
    gaps = [end * 11 % 50 for end in ends]
    kv_lens = tuple(n + gap for n, gap in zip(used, gaps, strict=True))
    kind = "causal" if is_causal else "full"
    return VarlenSpec(
        f"ends_{first}_{kind}_{dtype}", q_lens, kv_lens, used, num_q_heads=1, num_kv_heads=1, head_dim_qk=128,
        dtype=dtype, is_causal=is_causal, numbers="nan_unused", outside=(3, 40),
    )  # fmt: skip
