"""The list of named problems of packed sequences, and the inputs of each.

`VARLEN` is what every backend must get right. A name is stable: inputs are seeded by it.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import numpy as np

from specs import DTYPES, AttentionInputs


@dataclasses.dataclass(frozen=True)
class VarlenSpec:
    """One call of flash_mha_varlen: the sequences' lengths, sizes, dtype, options, and the kind of numbers."""

    name: str
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...] | None = None  # None: cu_seqlens_q serves for k too
    used: tuple[int, ...] | None = None  # seqused_k
    outside: tuple[int, int] = (0, 0)  # rows of q and of k before the first and after the last sequence
    has_max_seqlen: bool = False  # pass the least upper bounds
    num_q_heads: int = 2
    num_kv_heads: int = 2
    head_dim_qk: int = 64
    head_dim_v: int = -1  # -1: head_dim_qk
    dtype: str = "float32"
    softmax_scale: float | None = None
    is_causal: bool = False
    causal_align: str = "bottom_right"
    window_size: tuple[int, int] = (-1, -1)
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    numbers: str = "gaussian"  # gaussian, positive, large_logits, skewed, nan_unused (all that no sequence uses is NaN)

    def __post_init__(self) -> None:
        if self.head_dim_v < 0:
            object.__setattr__(self, "head_dim_v", self.head_dim_qk)

    @property
    def np_dtype(self) -> np.dtype[Any]:
        return DTYPES[self.dtype]

    def static_options(self) -> dict[str, Any]:
        """The keyword arguments of flash_mha_varlen that are Python values (those that differ from its defaults)."""
        fields = ("softmax_scale", "is_causal", "causal_align", "window_size", "softcap")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        options = {name: getattr(self, name) for name in fields if getattr(self, name) != defaults[name]}
        if self.has_max_seqlen:
            kv_lens = self.q_lens if self.kv_lens is None else self.kv_lens
            options |= {"max_seqlen_q": max(self.q_lens), "max_seqlen_k": max(kv_lens)}
        return options


def make_varlen_inputs(spec: VarlenSpec, seed: int = 0) -> AttentionInputs:
    """NumPy inputs, drawn in float64 and rounded to the spec's dtype: the same for the same spec name and seed."""
    rng = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
    before, after = spec.outside
    cu_q = (before + np.cumsum([0, *spec.q_lens])).astype(np.int32)
    cu_k = cu_q if spec.kv_lens is None else (before + np.cumsum([0, *spec.kv_lens])).astype(np.int32)
    total_q, total_k = int(cu_q[-1]) + after, int(cu_k[-1]) + after
    q = rng.standard_normal((total_q, spec.num_q_heads, spec.head_dim_qk))
    k = rng.standard_normal((total_k, spec.num_kv_heads, spec.head_dim_qk))
    v = rng.standard_normal((total_k, spec.num_kv_heads, spec.head_dim_v))
    arrays: dict[str, Any] = {"cu_seqlens_q": cu_q}
    if spec.kv_lens is not None:
        arrays["cu_seqlens_k"] = cu_k
    if spec.used is not None:
        arrays["seqused_k"] = np.array(spec.used, np.int32)
    if spec.sinks:
        arrays["sinks"] = rng.standard_normal(spec.num_q_heads).astype(np.float32)
    if spec.alibi:
        slopes = 2.0 ** (-8.0 * (np.arange(spec.num_q_heads) + 1) / spec.num_q_heads)
        arrays["alibi_slopes"] = slopes.astype(np.float32)

    scale = spec.softmax_scale or spec.head_dim_qk**-0.5
    if spec.numbers == "positive":
        v = np.abs(v) + 0.5
    elif spec.numbers == "large_logits":  # logits of about +-1e4
        q = q * (1e4 / np.sqrt(spec.head_dim_qk) / scale)
    elif spec.numbers == "skewed":  # the first sequence has an LSE about 80 above the rest
        q[: cu_q[1], :, 0] = k[: cu_k[1], :, 0] = np.sqrt(80.0 / scale)
    elif spec.numbers == "nan_unused":
        rows, keys = used_rows(spec, cu_q, cu_k, total_q, total_k)
        q[~rows], k[~keys], v[~keys] = np.nan, np.nan, np.inf
    elif spec.numbers != "gaussian":
        raise ValueError(f"{spec.name}: numbers: got {spec.numbers!r}")
    dtype = spec.np_dtype
    return AttentionInputs(q.astype(dtype), k.astype(dtype), v.astype(dtype), arrays)


def make_varlen_cotangents(spec: VarlenSpec, seed: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
    """dout and, for about half of the specs, dlse; NaN in rows that belong to no sequence."""
    inputs = make_varlen_inputs(spec, seed)
    cu_q, cu_k = inputs.arrays["cu_seqlens_q"], inputs.arrays.get("cu_seqlens_k", inputs.arrays["cu_seqlens_q"])
    key = zlib.crc32(spec.name.encode())
    rng = np.random.default_rng([seed, key, 1])
    dout = rng.standard_normal((*inputs.q.shape[:2], spec.head_dim_v)).astype(spec.np_dtype)
    dlse = rng.standard_normal(dout.shape[1::-1]).astype(np.float32)
    rows, _ = used_rows(spec, cu_q, cu_k, len(inputs.q), len(inputs.k))
    dout[~rows], dlse[:, ~rows] = np.nan, np.nan
    return dout, dlse if key % 2 else None


def used_rows(
    spec: VarlenSpec, cu_q: np.ndarray, cu_k: np.ndarray, total_q: int, total_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of q belong to a sequence, and which keys count in one."""
    rows, keys = np.zeros(total_q, bool), np.zeros(total_k, bool)
    rows[cu_q[0] : cu_q[-1]] = True
    for i in range(len(spec.q_lens)):
        end = cu_k[i + 1] if spec.used is None else min(cu_k[i] + spec.used[i], cu_k[i + 1])
        keys[cu_k[i] : end] = True
    return rows, keys


UNEVEN = (5, 64, 0, 1, 130, 17, 200)
UNEVEN_KV = (9, 1, 33, 0, 75, 150, 203)


def _every_dtype(name: str, **fields: Any) -> list[VarlenSpec]:
    return [VarlenSpec(f"{name}_{dtype}", dtype=dtype, **fields) for dtype in DTYPES]


def _lengths_and_options() -> list[VarlenSpec]:
    spec = VarlenSpec
    cross: dict[str, Any] = {"q_lens": UNEVEN, "kv_lens": UNEVEN_KV}
    # Dtypes, one array of lengths and two, full and causal.
    specs = _every_dtype("varlen", q_lens=UNEVEN)
    specs += _every_dtype("varlen_causal", q_lens=UNEVEN, is_causal=True)
    specs += _every_dtype("varlen_cross", **cross)
    specs += _every_dtype("varlen_cross_causal", is_causal=True, num_q_heads=8, head_dim_qk=128, **cross)

    # Lengths: nothing, one, first, last, all; no sequence at all; no rows at all; many tiny ones, one alone.
    specs += [
        spec("varlen_empty_first", q_lens=(0, 0, 40, 7), kv_lens=(0, 3, 50, 8)),
        spec("varlen_empty_last", q_lens=(40, 7, 0, 0), kv_lens=(50, 8, 2, 0), is_causal=True, dtype="float16"),
        spec("varlen_no_keys", q_lens=(40, 7, 3), kv_lens=(0, 0, 0), dtype="bfloat16"),
        spec("varlen_no_keys_sinks", q_lens=(40, 7, 3), kv_lens=(0, 5, 0), sinks=True),
        spec("varlen_no_queries", q_lens=(0, 0), kv_lens=(20, 5)),
        spec("varlen_all_empty", q_lens=(0, 0, 0)),
        spec("varlen_all_empty_with_rows", q_lens=(0, 0, 0), outside=(11, 7), sinks=True),
        spec("varlen_no_sequences", q_lens=()),
        spec("varlen_no_sequences_with_rows", q_lens=(), kv_lens=(), outside=(30, 40), sinks=True, dtype="float16"),
        spec("varlen_few_keys", q_lens=(76, 34, 146), kv_lens=(1, 1, 1)),
        spec("varlen_few_keys_causal", q_lens=(76, 34, 146), kv_lens=(1, 1, 1), is_causal=True, dtype="bfloat16"),
        spec("varlen_one_sequence", q_lens=(131,), kv_lens=(257,), is_causal=True),
        spec("varlen_one_token_each", q_lens=(1,) * 9, is_causal=True),
        spec("varlen_many_tiny", q_lens=tuple(i * 7 % 11 for i in range(200)), is_causal=True, num_q_heads=4,
             head_dim_qk=32, dtype="bfloat16"),
        spec("varlen_decode", q_lens=(1,) * 6, kv_lens=(1, 700, 33, 0, 257, 64), num_q_heads=8, is_causal=True,
             dtype="bfloat16"),
        spec("varlen_tile_edges", q_lens=(15, 16, 17, 63, 64, 65, 127, 128, 129), is_causal=True, dtype="float16"),
        spec("varlen_very_uneven", q_lens=(900, 3, 1, 64, 300), kv_lens=(3, 900, 64, 1, 300), head_dim_qk=32),
        spec("varlen_primes", q_lens=(131, 2, 61), kv_lens=(7, 521, 59), head_dim_qk=64, num_q_heads=3, num_kv_heads=1),
    ]  # fmt: skip

    # Rows outside every sequence; keys that do not count.
    specs += [
        spec("varlen_outside", outside=(13, 90), **cross),
        spec("varlen_outside_causal", q_lens=UNEVEN, outside=(70, 5), is_causal=True, sinks=True, dtype="float16"),
        spec("varlen_outside_nan", outside=(13, 90), numbers="nan_unused", dtype="bfloat16", **cross),
        spec("varlen_used", used=(4, 0, 33, 0, 74, 100, 1), **cross),
        spec("varlen_used_more_than_there_are", used=(900, 1, 2**31 - 1, 5, 75, 150, 300), dtype="float16", **cross),
        spec("varlen_used_none", used=(0,) * 7, sinks=True, **cross),
        spec("varlen_used_causal", used=(4, 0, 33, 0, 74, 100, 1), is_causal=True, dtype="bfloat16", **cross),
        spec("varlen_used_self", q_lens=UNEVEN, used=(5, 60, 0, 0, 100, 20, 150), is_causal=True),
        spec("varlen_used_window_top_left", used=(9, 1, 20, 0, 60, 10, 180), window_size=(30, 5),
             causal_align="top_left", **cross),
    ]  # fmt: skip
    specs += _every_dtype("varlen_used_nan", used=(4, 0, 33, 0, 74, 100, 1), numbers="nan_unused", **cross)
    specs += [
        spec("varlen_max_seqlen", has_max_seqlen=True, **cross),
        spec("varlen_max_seqlen_causal", q_lens=UNEVEN, has_max_seqlen=True, is_causal=True, dtype="bfloat16"),
        spec("varlen_max_seqlen_zero", q_lens=(0, 0), kv_lens=(0, 0), outside=(20, 20), has_max_seqlen=True),
    ]
    return specs


def _sizes_and_scores() -> list[VarlenSpec]:
    spec = VarlenSpec
    cross: dict[str, Any] = {"q_lens": UNEVEN, "kv_lens": UNEVEN_KV}
    small: dict[str, Any] = {"q_lens": (37, 0, 5, 70), "kv_lens": (70, 9, 2, 41)}
    specs = []
    # Head dims and groups.
    dtypes = list(DTYPES)
    for i, (qk, v) in enumerate(((1, 1), (3, 7), (8, 8), (59, 59), (72, 72), (128, 128), (192, 128), (128, 96),
                                 (64, 256), (256, 256), (40, 17))):  # fmt: skip
        specs.append(spec(f"varlen_head_dim_{qk}_v_{v}", head_dim_qk=qk, head_dim_v=v, is_causal=i % 2 == 0,
                          dtype="float32" if qk < 8 else dtypes[i % 3],
                          numbers="positive" if qk < 8 else "gaussian", **small))  # fmt: skip
    specs += [
        spec(f"varlen_gqa_{group}", num_q_heads=2 * group, head_dim_qk=32, is_causal=True, dtype=dtypes[group % 3],
             **small)
        for group in (2, 3, 4, 7, 8)
    ]  # fmt: skip
    specs.append(spec("varlen_mqa_64", num_q_heads=64, num_kv_heads=1, head_dim_qk=32, **small))

    # Masks and scores.
    specs += [
        spec("varlen_top_left_causal", is_causal=True, causal_align="top_left", **cross),
        spec("varlen_window", window_size=(20, 7), dtype="float16", **cross),
        spec("varlen_window_left_0", window_size=(40, 0), **cross),
        spec("varlen_window_causal", q_lens=UNEVEN, window_size=(32, -1), is_causal=True, dtype="bfloat16"),
        spec("varlen_window_top_left", window_size=(20, 7), causal_align="top_left", dtype="bfloat16", **cross),
        spec("varlen_window_0_0", q_lens=UNEVEN, window_size=(0, 0)),
        spec("varlen_window_wider_than_all", window_size=(2**31 + 5, 2**40), **cross),
        spec("varlen_scale", softmax_scale=0.3, **cross),
        spec("varlen_softcap", softcap=20.0, softmax_scale=0.5, is_causal=True, dtype="bfloat16", **cross),
        spec("varlen_sinks", sinks=True, is_causal=True, num_q_heads=4, outside=(3, 4), **cross),
        spec("varlen_alibi", alibi=True, num_q_heads=8, head_dim_qk=32, **cross),
        spec("varlen_alibi_causal", alibi=True, num_q_heads=4, is_causal=True, dtype="bfloat16", **cross),
        spec("varlen_alibi_top_left", alibi=True, num_q_heads=4, is_causal=True, causal_align="top_left", **cross),
        spec("varlen_everything", num_q_heads=6, num_kv_heads=2, head_dim_qk=72, head_dim_v=40, softmax_scale=0.2,
             is_causal=True, window_size=(90, 3), softcap=8.0, sinks=True, alibi=True, outside=(5, 6),
             used=(4, 1, 33, 0, 60, 150, 190), has_max_seqlen=True, **cross),
        spec("varlen_everything_top_left", num_q_heads=4, head_dim_qk=48, causal_align="top_left",
             window_size=(60, 30), softcap=20.0, sinks=True, alibi=True, outside=(2, 0),
             used=(9, 0, 3, 0, 75, 120, 203), dtype="bfloat16", **cross),
    ]  # fmt: skip
    specs += _every_dtype("varlen_large_logits", numbers="large_logits", **cross)
    skewed: dict[str, Any] = {"q_lens": (40, 90, 7, 130), "kv_lens": (90, 150, 60, 200)}  # no row sees few keys
    specs += _every_dtype("varlen_skewed", numbers="skewed", is_causal=True, **skewed)
    return specs


VARLEN: list[VarlenSpec] = _lengths_and_options() + _sizes_and_scores()
VARLEN_BY_NAME: dict[str, VarlenSpec] = {spec.name: spec for spec in VARLEN}
assert len(VARLEN_BY_NAME) == len(VARLEN), "spec names must be unique"
