"""The list of named calls of heed.ops that tests and benchmarks share, and the inputs of each.

`CONFORMANCE` is what every backend must get right; `BENCHMARKS` are the rows that have a target. A name is stable:
inputs are seeded by it.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import numpy as np

from specs import DTYPES


class OpCase:
    """One call: a function of heed.ops, its arrays by parameter name, and its other arguments."""

    def __init__(self, function: str, arrays: dict[str, Any], statics: dict[str, Any]) -> None:
        self.function = function
        self.arrays = arrays
        self.statics = statics

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The names of the arrays that have a gradient."""
        floats = ("float32", "float16", "bfloat16")
        return tuple(name for name, x in self.arrays.items() if x.dtype.name in floats and name != "cos_sin_cache")


def _rng(name: str, seed: int, *more: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode()), *more])


@dataclasses.dataclass(frozen=True)
class ActSpec:
    """A gated activation of x [*lead, 2 * hidden]."""

    name: str
    activation: str = "silu"
    lead: tuple[int, ...] = (6,)
    hidden: int = 64
    dtype: str = "float32"
    numbers: str = "gaussian"  # gaussian, wide (gates of up to +-100), special (NaN and infinities)

    def case(self, seed: int = 0) -> OpCase:
        rng = _rng(self.name, seed)
        x = rng.standard_normal((*self.lead, 2 * self.hidden)) * 2
        if self.numbers == "wide":
            x[..., : self.hidden] = rng.uniform(-100, 100, (*self.lead, self.hidden))
        elif self.numbers == "special":
            flat = x.reshape(-1, 2 * self.hidden)
            flat[0, 0], flat[1, self.hidden], flat[2, 1], flat[3, self.hidden + 1] = np.nan, np.nan, np.inf, -np.inf
        return OpCase(f"{self.activation}_and_mul", {"x": x.astype(DTYPES[self.dtype])}, {})

    def num_bytes(self) -> int:
        """What is read and written."""
        return 3 * int(np.prod(self.lead)) * self.hidden * DTYPES[self.dtype].itemsize


@dataclasses.dataclass(frozen=True)
class RopeSpec:
    """A rotation of packed sequences. `gaps` are tokens outside every sequence: before, between and after them."""

    name: str
    lengths: tuple[int, ...] = (5, 0, 7, 1)
    gaps: int = 0
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    rotary_dim: int | None = None
    interleave: bool = False
    rope_scale: float | None = None
    rope_theta: float | None = None
    llama31: bool = False
    positions: str = "offsets"  # offsets, pos_ids, cache
    max_position: int = 4096
    dtype: str = "float32"

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths) + self.gaps * (len(self.lengths) + 1)

    def case(self, seed: int = 0) -> OpCase:
        rng = _rng(self.name, seed)
        dtype = DTYPES[self.dtype]
        arrays = {
            name: rng.standard_normal((self.num_tokens, heads, self.head_dim)).astype(dtype)
            for name, heads in (("q", self.num_q_heads), ("k", self.num_kv_heads))
        }
        statics = {name: getattr(self, name) for name in ("rotary_dim", "rope_scale", "rope_theta")}
        statics = {name: value for name, value in statics.items() if value is not None}
        if self.interleave:
            statics["interleave"] = True
        if self.positions == "offsets":
            begins = np.cumsum([0, *self.lengths]) + self.gaps
            arrays["indptr"] = begins.astype(np.int32)
            arrays["offsets"] = rng.integers(0, self.max_position, len(self.lengths)).astype(np.int32)
            function = "apply_llama31_rope" if self.llama31 else "apply_rope"
            return OpCase(function, arrays, statics)
        arrays["pos_ids"] = rng.integers(0, self.max_position, self.num_tokens).astype(np.int32)
        if self.positions == "pos_ids":
            return OpCase("apply_rope_pos_ids", arrays, statics)
        rotary_dim = statics.pop("rotary_dim", self.head_dim)
        angles = rng.uniform(-np.pi, np.pi, (self.max_position, rotary_dim // 2))
        arrays["cos_sin_cache"] = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
        return OpCase("apply_rope_with_cos_sin_cache", arrays, statics)

    def num_bytes(self) -> int:
        """What is read and written."""
        heads = self.num_q_heads + self.num_kv_heads
        return 2 * self.num_tokens * heads * self.head_dim * DTYPES[self.dtype].itemsize


@dataclasses.dataclass(frozen=True)
class NormSpec:
    """An RMS norm of x [*lead, hidden], with or without a residual."""

    name: str
    lead: tuple[int, ...] = (6,)
    hidden: int = 64
    residual: bool = False
    eps: float | None = None
    dtype: str = "float32"
    numbers: str = "gaussian"  # gaussian, skewed (rows of very different sizes), special (a row with NaN, one with inf)

    def case(self, seed: int = 0) -> OpCase:
        rng = _rng(self.name, seed)
        shape = (*self.lead, self.hidden)
        x = rng.standard_normal(shape)
        if self.numbers == "skewed":
            x = x * 10.0 ** rng.uniform(-3, 3, (*self.lead, 1))
        elif self.numbers == "special":
            flat = x.reshape(-1, self.hidden)
            flat[0, 0], flat[1, -1] = np.nan, np.inf
        dtype = DTYPES[self.dtype]
        arrays = {"x": x.astype(dtype)}
        if self.residual:
            arrays["residual"] = rng.standard_normal(shape).astype(dtype)
        arrays["weight"] = rng.uniform(0.5, 1.5, self.hidden).astype(dtype)
        statics = {} if self.eps is None else {"eps": self.eps}
        return OpCase("fused_add_rms_norm" if self.residual else "rms_norm", arrays, statics)

    def num_bytes(self) -> int:
        """What is read and written."""
        return (4 if self.residual else 2) * int(np.prod(self.lead)) * self.hidden * DTYPES[self.dtype].itemsize


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """Attention of one query over kv_len keys."""

    name: str
    kv_len: int = 100
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    head_dim_v: int = -1  # -1: head_dim
    kv_layout: str | None = None
    window_left: int | None = None
    logits_soft_cap: float | None = None
    sm_scale: float | None = None
    rope_scale: float | None = None
    rope_theta: float | None = None
    alibi: bool = False
    sinks: bool = False
    batch_invariant: bool | None = None
    dtype: str = "float32"
    numbers: str = "gaussian"  # gaussian, large_logits (of about +-1e4), nan_hidden (before the window), nan_visible

    def case(self, seed: int = 0) -> OpCase:
        rng = _rng(self.name, seed)
        dtype = DTYPES[self.dtype]
        head_dim_v = self.head_dim if self.head_dim_v < 0 else self.head_dim_v
        q = rng.standard_normal((self.num_q_heads, self.head_dim))
        k = rng.standard_normal((self.kv_len, self.num_kv_heads, self.head_dim))
        v = rng.standard_normal((self.kv_len, self.num_kv_heads, head_dim_v))
        if self.numbers == "large_logits":
            q = q * (1e4 / np.sqrt(self.head_dim) / (self.sm_scale or self.head_dim**-0.5))
        elif self.numbers == "nan_hidden":
            hidden = self.kv_len - 1 - (self.window_left or 0)
            k[:hidden], v[:hidden] = np.nan, np.inf
        elif self.numbers == "nan_visible":
            v[self.kv_len // 2, 0, 0], k[self.kv_len // 3, -1, 0] = np.nan, np.nan
        arrays = {"q": q.astype(dtype), "k": k.astype(dtype), "v": v.astype(dtype)}
        if self.kv_layout == "HND":
            arrays |= {name: arrays[name].swapaxes(0, 1).copy() for name in "kv"}
        if self.alibi:
            slopes = 2.0 ** (-8.0 * (np.arange(self.num_q_heads) + 1) / self.num_q_heads)
            arrays["alibi_slopes"] = slopes.astype(np.float32)
        if self.sinks:
            arrays["sinks"] = rng.standard_normal(self.num_q_heads).astype(np.float32)
        names = ("kv_layout", "window_left", "logits_soft_cap", "sm_scale", "rope_scale", "rope_theta",
                 "batch_invariant")  # fmt: skip
        statics = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return OpCase("single_decode", arrays, statics | {"return_lse": True})

    def num_bytes(self) -> int:
        """What is read: K and V."""
        head_dim_v = self.head_dim if self.head_dim_v < 0 else self.head_dim_v
        return self.kv_len * self.num_kv_heads * (self.head_dim + head_dim_v) * DTYPES[self.dtype].itemsize


OpSpec = ActSpec | RopeSpec | NormSpec | DecodeSpec

_ALL = ("float32", "float16", "bfloat16")

ACTIVATIONS = [
    *(ActSpec(f"{act}_{dtype}", act, dtype=dtype) for act in ("silu", "gelu", "gelu_tanh") for dtype in _ALL),
    *(ActSpec(f"{act}_wide_{dtype}", act, dtype=dtype, hidden=97, numbers="wide")
      for act in ("silu", "gelu", "gelu_tanh") for dtype in _ALL),
    *(ActSpec(f"{act}_special", act, hidden=40, numbers="special") for act in ("silu", "gelu", "gelu_tanh")),
    *(ActSpec(f"silu_h{hidden}", hidden=hidden, dtype="float16", lead=(5,)) for hidden in (1, 2, 3, 7, 17, 59, 1021)),
    ActSpec("silu_vector", lead=(), hidden=33),
    ActSpec("silu_rank_4", lead=(2, 3, 5), hidden=31, dtype="bfloat16"),
    ActSpec("silu_no_rows", lead=(0,), hidden=16),
    ActSpec("silu_no_rows_rank_3", lead=(3, 0), hidden=16),
    ActSpec("gelu_one_row", "gelu", lead=(1,), hidden=300),
    ActSpec("gelu_tanh_wide_row", "gelu_tanh", lead=(3,), hidden=14336, dtype="bfloat16"),
    ActSpec("silu_many_rows", lead=(1031,), hidden=24, dtype="float16"),
]  # fmt: skip

ROPES = [
    *(RopeSpec(f"rope_{dtype}", dtype=dtype) for dtype in _ALL),
    *(RopeSpec(f"rope_interleaved_{dtype}", dtype=dtype, interleave=True, gaps=2) for dtype in _ALL),
    RopeSpec("rope_gaps", gaps=3),
    RopeSpec("rope_partial", rotary_dim=24, head_dim=80, dtype="bfloat16"),
    RopeSpec("rope_partial_interleaved", rotary_dim=32, head_dim=96, interleave=True, dtype="float16"),
    RopeSpec("rope_rotary_2", rotary_dim=2, head_dim=5),
    RopeSpec("rope_odd_head", rotary_dim=58, head_dim=59, num_q_heads=3, num_kv_heads=1),
    RopeSpec("rope_head_2", head_dim=2, num_q_heads=1, num_kv_heads=1),
    RopeSpec("rope_head_128", head_dim=128, num_q_heads=8, dtype="bfloat16", lengths=(37, 64)),
    RopeSpec("rope_head_256", head_dim=256, dtype="float16"),
    RopeSpec("rope_scaled", rope_scale=4.0, rope_theta=5e5),
    RopeSpec("rope_far", max_position=1 << 20),
    RopeSpec("rope_far_interleaved", max_position=1 << 20, interleave=True, head_dim=128, dtype="float16"),
    RopeSpec("rope_one_token", lengths=(1,), num_q_heads=1, num_kv_heads=3),
    RopeSpec("rope_many_sequences", lengths=tuple(i % 4 for i in range(97)), head_dim=16),
    RopeSpec("rope_one_long_sequence", lengths=(523,), head_dim=32, dtype="float16"),
    RopeSpec("rope_no_tokens", lengths=(0, 0)),
    RopeSpec("rope_no_sequences", lengths=(), gaps=4),
    RopeSpec("rope_llama31", llama31=True, head_dim=128, max_position=30000),
    RopeSpec("rope_llama31_bfloat16", llama31=True, dtype="bfloat16", rope_scale=32.0, max_position=100000),
    RopeSpec("rope_llama31_interleaved", llama31=True, interleave=True, rotary_dim=32, gaps=1),
    *(RopeSpec(f"rope_pos_ids_{dtype}", positions="pos_ids", dtype=dtype) for dtype in _ALL),
    RopeSpec("rope_pos_ids_options", positions="pos_ids", rotary_dim=20, head_dim=40, interleave=True, rope_scale=2.0,
             rope_theta=1e5),
    RopeSpec("rope_pos_ids_no_tokens", positions="pos_ids", lengths=()),
    *(RopeSpec(f"rope_cache_{dtype}", positions="cache", dtype=dtype, max_position=50) for dtype in _ALL),
    RopeSpec("rope_cache_options", positions="cache", rotary_dim=22, head_dim=37, interleave=True, max_position=1),
]  # fmt: skip

NORMS = [
    *(NormSpec(f"norm_{dtype}", dtype=dtype) for dtype in _ALL),
    *(NormSpec(f"norm_add_{dtype}", dtype=dtype, residual=True) for dtype in _ALL),
    *(NormSpec(f"norm_skewed_{dtype}", dtype=dtype, hidden=200, lead=(17,), numbers="skewed") for dtype in _ALL),
    *(NormSpec(f"norm_h{hidden}", hidden=hidden, lead=(4,), eps=1e-5) for hidden in (1, 2, 3, 7, 61, 1021)),
    *(NormSpec(f"norm_h{hidden}", hidden=hidden, lead=(3,), dtype="bfloat16") for hidden in (4096, 8192, 12289)),
    NormSpec("norm_add_h1021", hidden=1021, residual=True, dtype="float16", lead=(5,)),
    NormSpec("norm_vector", lead=(), hidden=48),
    NormSpec("norm_rank_4", lead=(2, 3, 4), hidden=40, residual=True, dtype="float16"),
    NormSpec("norm_no_rows", lead=(0,), hidden=32),
    NormSpec("norm_add_no_rows", lead=(2, 0), hidden=32, residual=True),
    NormSpec("norm_many_rows", lead=(1027,), hidden=24, dtype="bfloat16"),
    NormSpec("norm_large_eps", eps=10.0),
    NormSpec("norm_special", numbers="special"),
]  # fmt: skip

DECODES = [
    *(DecodeSpec(f"decode_{dtype}", dtype=dtype) for dtype in _ALL),
    *(DecodeSpec(f"decode_tutorial_{dtype}", 512, 16, 4, dtype=dtype) for dtype in ("float16", "bfloat16")),
    *(DecodeSpec(f"decode_s{kv_len}", kv_len, dtype="float16") for kv_len in (1, 2, 3, 17, 127, 128, 257, 1031)),
    DecodeSpec("decode_empty", 0),
    DecodeSpec("decode_empty_sinks", 0, sinks=True, dtype="bfloat16"),
    *(DecodeSpec(f"decode_group_{group}", 67, 2 * group, 2, 32, dtype="bfloat16") for group in (1, 3, 5, 7, 8, 12, 16)),
    DecodeSpec("decode_mqa", 90, 64, 1, 16),
    *(DecodeSpec(f"decode_d{head_dim}", 70, head_dim=head_dim, dtype="float16")
      for head_dim in (1, 2, 8, 24, 59, 72, 80, 96, 112, 128, 192, 256)),
    *(DecodeSpec(f"decode_f32_d{head_dim}", 41, head_dim=head_dim) for head_dim in (1, 59, 128, 256)),
    DecodeSpec("decode_d192_v128", 150, 8, 2, 192, 128, dtype="bfloat16"),
    DecodeSpec("decode_d64_v96", 77, 4, 2, 64, 96),
    DecodeSpec("decode_hnd", 133, 6, 3, 64, kv_layout="HND", dtype="float16"),
    DecodeSpec("decode_hnd_f32", 33, 4, 4, 20, 12, kv_layout="HND"),
    DecodeSpec("decode_window_0", 50, window_left=0),
    DecodeSpec("decode_window_33", 300, window_left=33, dtype="bfloat16"),
    DecodeSpec("decode_window_beyond", 40, window_left=1000),
    DecodeSpec("decode_window_hides_nan", 200, window_left=20, numbers="nan_hidden", dtype="float16"),
    DecodeSpec("decode_nan", 64, numbers="nan_visible"),
    DecodeSpec("decode_softcap", 120, logits_soft_cap=5.0, dtype="float16"),
    DecodeSpec("decode_scale", 120, sm_scale=0.7),
    DecodeSpec("decode_alibi", 300, 8, 2, alibi=True, dtype="float16"),
    DecodeSpec("decode_sinks", 45, sinks=True),
    DecodeSpec("decode_rope", 211, rope_theta=1e4, dtype="float16"),
    DecodeSpec("decode_rope_f32", 97, 4, 1, 48, rope_scale=4.0),
    DecodeSpec("decode_rope_hnd", 64, 4, 2, 32, kv_layout="HND", rope_theta=5e5, rope_scale=2.0, dtype="bfloat16"),
    DecodeSpec("decode_large_logits", 200, numbers="large_logits"),
    DecodeSpec("decode_large_logits_bfloat16", 200, numbers="large_logits", dtype="bfloat16"),
    DecodeSpec("decode_batch_invariant", 1500, 8, 2, batch_invariant=True, dtype="float16"),
    DecodeSpec("decode_long", 9001, 8, 2, 64, dtype="bfloat16"),
    DecodeSpec("decode_everything", 517, 6, 2, 40, 24, "HND", 400, 20.0, 0.3, 2.0, 3e4, True, True, True, "float16"),
    DecodeSpec("decode_everything_f32", 130, 6, 3, 18, 7, "NHD", 100, 8.0, 0.4, 1.5, None, True, True, False),
]  # fmt: skip

CONFORMANCE: list[OpSpec] = [*ACTIVATIONS, *ROPES, *NORMS, *DECODES]

BENCHMARKS: list[OpSpec] = [
    *(ActSpec(f"bench_silu_t{tokens}", lead=(tokens,), hidden=14336, dtype="bfloat16") for tokens in (16, 1024, 16384)),
    *(RopeSpec(f"bench_rope_t{tokens}", (tokens,), 0, 32, 8, 128, dtype="bfloat16") for tokens in (64, 4096, 32768)),
    NormSpec("bench_norm_16384", (16384,), 4096, dtype="bfloat16"),
    NormSpec("bench_norm_add_16384", (16384,), 4096, residual=True, dtype="bfloat16"),
    *(DecodeSpec(f"bench_decode_{dtype}_s{kv_len}", kv_len, 32, 8, 128, dtype=dtype)
      for dtype in ("float16", "bfloat16") for kv_len in (2048, 8192, 65536)),
]  # fmt: skip

BY_NAME: dict[str, OpSpec] = {spec.name: spec for spec in CONFORMANCE + BENCHMARKS}
