"""The list of named attention problems that tests and benchmarks share, and the inputs of each.

`CONFORMANCE` is what every backend must get right; `BENCHMARKS` are the rows that `make bench` times (the tests check
sampled rows of them). A name is stable: inputs are seeded by it, and benchmark results are stored under it.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import ml_dtypes
import numpy as np

from heed import reference

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """One call of flash_mha: shapes, dtype, options, and which kind of numbers to feed it."""

    name: str
    batch: int = 2
    q_len: int = 64
    kv_len: int = 64
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
    segments: str = (
        "none"  # none, packed (three documents), padded (tail hidden, NaN there), cross (own ids for q and kv)
    )
    numbers: str = "gaussian"  # gaussian, positive, large_logits, skewed, nan_hidden, nan_visible, integer

    def __post_init__(self) -> None:
        if self.head_dim_v < 0:
            object.__setattr__(self, "head_dim_v", self.head_dim_qk)

    @property
    def np_dtype(self) -> np.dtype[Any]:
        return DTYPES[self.dtype]

    def static_options(self) -> dict[str, Any]:
        """The keyword arguments of flash_mha that are Python values (those that differ from its defaults)."""
        fields = ("softmax_scale", "is_causal", "causal_align", "window_size", "softcap")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: getattr(self, name) for name in fields if getattr(self, name) != defaults[name]}

    def flops(self) -> float:
        """Additions and multiplications of the two products, over the pairs that causal masks and windows keep."""
        left, right = self.window_size
        right = 0 if self.is_causal else right
        offset = self.kv_len - self.q_len if self.causal_align == "bottom_right" else 0
        rows = np.arange(self.q_len)
        first = np.clip(rows + offset - left, 0, self.kv_len) if left >= 0 else np.zeros_like(rows)
        last = np.clip(rows + offset + right + 1, 0, self.kv_len) if right >= 0 else np.full_like(rows, self.kv_len)
        pairs = float(np.maximum(last - first, 0).sum())
        return 2.0 * self.batch * self.num_q_heads * pairs * (self.head_dim_qk + self.head_dim_v)


@dataclasses.dataclass
class AttentionInputs:
    """q, k and v, and the keyword arguments that are arrays."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    arrays: dict[str, Any]


def make_inputs(spec: AttentionSpec, seed: int = 0) -> AttentionInputs:
    """NumPy inputs, drawn in float64 and rounded to the spec's dtype: the same for the same spec name and seed."""
    rng = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
    q = rng.standard_normal((spec.batch, spec.q_len, spec.num_q_heads, spec.head_dim_qk))
    k = rng.standard_normal((spec.batch, spec.kv_len, spec.num_kv_heads, spec.head_dim_qk))
    v = rng.standard_normal((spec.batch, spec.kv_len, spec.num_kv_heads, spec.head_dim_v))
    arrays: dict[str, Any] = {}
    if spec.sinks:
        arrays["sinks"] = rng.standard_normal(spec.num_q_heads).astype(np.float32)
    if spec.alibi:
        slopes = 2.0 ** (-8.0 * (np.arange(spec.num_q_heads) + 1) / spec.num_q_heads)
        arrays["alibi_slopes"] = slopes.astype(np.float32)
    if spec.segments != "none":
        arrays["segment_ids"] = _segment_ids(spec, rng)

    if spec.numbers == "positive":
        v = np.abs(v) + 0.5
    elif spec.numbers == "large_logits":  # logits of about +-1e4
        q = q * (1e4 / np.sqrt(spec.head_dim_qk) / (spec.softmax_scale or spec.head_dim_qk**-0.5))
    elif spec.numbers == "integer":  # every score an exact integer of up to +-1e4, with ties and near ties
        q = np.round(q).clip(-2, 2)
        k = np.round(k).clip(-2, 2)
        q[..., 0], k[..., 0] = 100.0, 100.0 * rng.integers(-1, 2, size=k.shape[:-1])
    elif spec.numbers == "skewed":  # sequence 0 has an LSE about 80 above the rest
        direction = np.ones(spec.head_dim_qk) / np.sqrt(spec.head_dim_qk)
        scale = spec.softmax_scale or spec.head_dim_qk**-0.5
        q[0] += direction * np.sqrt(80.0 / scale)
        k[0] += direction * np.sqrt(80.0 / scale)
    elif (
        spec.numbers == "nan_hidden"
    ):  # the last half of the keys: hidden by the spec's causal mask from the first rows
        k[:, spec.kv_len // 2 :], v[:, spec.kv_len // 2 :] = np.nan, np.inf
    elif spec.numbers == "nan_visible":
        v[0, spec.kv_len // 2, 0, 0] = np.nan
        v[0, spec.kv_len // 3, 0, -1] = np.inf
        q[-1, spec.q_len // 2, -1, 0] = np.nan
        k[-1, spec.kv_len // 2, 0, 0] = np.nan
    elif spec.numbers != "gaussian":
        raise ValueError(f"{spec.name}: numbers: got {spec.numbers!r}")
    if spec.segments == "padded":
        hidden = arrays["segment_ids"][1] < 0
        k[hidden], v[hidden] = np.nan, np.inf
    dtype = spec.np_dtype
    return AttentionInputs(q.astype(dtype), k.astype(dtype), v.astype(dtype), arrays)


def make_cotangents(spec: AttentionSpec, seed: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
    """dout and, for about half of the specs, dlse: the same for the same spec name and seed.

    Queries that see no key, and have no sink, get NaN: no gradient may depend on them.
    """
    key = zlib.crc32(spec.name.encode())
    rng = np.random.default_rng([seed, key, 1])
    dout = rng.standard_normal((spec.batch, spec.q_len, spec.num_q_heads, spec.head_dim_v)).astype(spec.np_dtype)
    dlse = rng.standard_normal((spec.batch, spec.num_q_heads, spec.q_len)).astype(np.float32)
    if not spec.sinks:
        ids = make_inputs(spec, seed).arrays.get("segment_ids")
        visible = np.broadcast_to(
            reference.visible_keys(
                np, spec.q_len, spec.kv_len, spec.is_causal, spec.window_size, spec.causal_align
            ),
            (spec.batch, spec.q_len, spec.kv_len),
        )  # fmt: skip
        if ids is not None:
            q_ids, kv_ids = ids if isinstance(ids, tuple) else (ids, ids)
            visible = visible & (q_ids[:, :, None] == kv_ids[:, None, :])
        is_blind = ~visible.any(-1)
        dout[is_blind] = np.nan
        dlse.swapaxes(1, 2)[is_blind] = np.nan
    return dout, dlse if key % 2 else None


def _segment_ids(spec: AttentionSpec, rng: np.random.Generator) -> Any:
    if spec.segments == "packed":
        cuts = np.sort(rng.integers(1, spec.q_len, size=(spec.batch, 2)), axis=1)
        return (np.arange(spec.q_len)[None, :, None] >= cuts[:, None, :]).sum(-1).astype(np.int32)
    if spec.segments == "padded":  # queries past a length belong to no key
        q_ids = np.zeros((spec.batch, spec.q_len), np.int32)
        kv_ids = np.zeros((spec.batch, spec.kv_len), np.int32)
        for row in range(spec.batch):
            q_ids[row, int(rng.integers(1, spec.q_len)) :] = -1
            kv_ids[row, int(rng.integers(1, spec.kv_len)) :] = -2
        return q_ids, kv_ids
    if spec.segments == "cross":
        return (
            rng.integers(0, 3, size=(spec.batch, spec.q_len)).astype(np.int32),
            rng.integers(0, 4, size=(spec.batch, spec.kv_len)).astype(np.int32),
        )
    raise ValueError(f"{spec.name}: segments: got {spec.segments!r}")


def _every_dtype(name: str, **fields: Any) -> list[AttentionSpec]:
    return [AttentionSpec(f"{name}_{dtype}", dtype=dtype, **fields) for dtype in DTYPES]


def _conformance() -> list[AttentionSpec]:
    spec = AttentionSpec
    specs: list[AttentionSpec] = []

    # Dtypes, full and causal, over several tiles.
    specs += _every_dtype("full", q_len=150, kv_len=203)
    specs += _every_dtype("causal", q_len=203, kv_len=203, is_causal=True)
    specs += _every_dtype("causal_gqa_d128", q_len=97, kv_len=131, num_q_heads=8, head_dim_qk=128, is_causal=True)

    # Head dims: peers' users run odd ones.
    dtypes = list(DTYPES)
    for i, head_dim in enumerate((8, 16, 32, 59, 72, 80, 96, 112, 128, 192, 224, 255, 256)):
        specs.append(
            spec(
                f"head_dim_{head_dim}",
                q_len=37,
                kv_len=70,
                head_dim_qk=head_dim,
                is_causal=i % 2 == 0,
                dtype=dtypes[i % 3],
            )
        )
    for head_dim in (1, 3, 7):
        specs.append(
            spec(f"head_dim_{head_dim}", batch=1, q_len=9, kv_len=23, head_dim_qk=head_dim, numbers="positive")
        )
    for i, (qk, head_dim_v) in enumerate(((192, 128), (128, 96), (64, 256), (40, 17), (17, 40))):
        specs.append(
            spec(f"head_dim_{qk}_v_{head_dim_v}", q_len=33, kv_len=90, head_dim_qk=qk, head_dim_v=head_dim_v,
                 is_causal=i % 2 == 1, dtype=dtypes[i % 3])
        )  # fmt: skip

    # Groups of query heads per KV head.
    for group in (2, 3, 4, 5, 6, 7, 8, 12):
        specs.append(
            spec(f"gqa_{group}", q_len=19, kv_len=45, num_q_heads=2 * group, head_dim_qk=32, is_causal=True,
                 dtype=dtypes[group % 3])
        )  # fmt: skip
    specs.append(spec("gqa_64_over_4", batch=1, q_len=17, kv_len=65, num_q_heads=64, num_kv_heads=4, head_dim_qk=32))
    specs.append(
        spec("mqa_64", batch=1, q_len=17, kv_len=65, num_q_heads=64, num_kv_heads=1, head_dim_qk=32, is_causal=True)
    )

    # Lengths: nothing, one, primes, tails, more queries than keys.
    specs += [
        spec("q_len_0", q_len=0, kv_len=33),
        spec("kv_len_0", q_len=33, kv_len=0),
        spec("kv_len_0_sinks", q_len=5, kv_len=0, sinks=True),
        spec("both_len_0", q_len=0, kv_len=0),
        spec("batch_0", batch=0),
        spec("len_1", batch=1, q_len=1, kv_len=1, is_causal=True),
        spec("q_len_1", q_len=1, kv_len=257, head_dim_qk=32),
        spec("q_len_1_causal", q_len=1, kv_len=257, num_q_heads=8, is_causal=True, dtype="bfloat16"),
        spec("kv_len_1", q_len=257, kv_len=1, dtype="float16"),
        spec("kv_len_1_causal", q_len=65, kv_len=1, is_causal=True),
        spec("primes", batch=3, q_len=131, kv_len=521, head_dim_qk=64),
        spec("primes_causal", batch=1, q_len=521, kv_len=131, head_dim_qk=64, is_causal=True),
        spec("q_longer_causal", q_len=300, kv_len=77, is_causal=True, dtype="bfloat16"),
        spec("kv_longer_causal", q_len=77, kv_len=300, is_causal=True, dtype="float16"),
        spec("tail_64", batch=1, q_len=192, kv_len=192, is_causal=True),
        spec("many_heads", batch=5, q_len=3, kv_len=11, num_q_heads=13, num_kv_heads=13, head_dim_qk=24),
    ]

    # Alignment and windows.
    specs += [
        spec("top_left_causal", q_len=90, kv_len=130, is_causal=True, causal_align="top_left"),
        spec(
            "top_left_causal_q_longer", q_len=130, kv_len=90, is_causal=True, causal_align="top_left", dtype="bfloat16"
        ),
        spec("top_left_window", q_len=90, kv_len=130, window_size=(20, 7), causal_align="top_left"),
        spec("top_left_window_q_longer", q_len=400, kv_len=90, window_size=(20, 7), causal_align="top_left"),
        spec("window_left", q_len=160, kv_len=160, window_size=(30, -1)),
        spec("window_right", q_len=160, kv_len=160, window_size=(-1, 30)),
        spec("window_both", q_len=131, kv_len=257, window_size=(40, 9), dtype="float16"),
        spec("window_left_0", q_len=131, kv_len=257, window_size=(200, 0), dtype="bfloat16"),
        spec("window_0_0", q_len=70, kv_len=70, window_size=(0, 0)),
        spec("window_0_right", q_len=70, kv_len=140, window_size=(0, 5)),
        spec("window_wider_than_all", q_len=70, kv_len=140, window_size=(2**31 + 5, 2**40)),
        spec("window_causal", q_len=300, kv_len=300, window_size=(64, -1), is_causal=True),
        spec("window_causal_overrides_right", q_len=100, kv_len=150, window_size=(64, 20), is_causal=True),
        spec("window_q_longer", q_len=200, kv_len=60, window_size=(10, 10)),
        spec("window_333", batch=1, q_len=300, kv_len=4096, num_q_heads=8, head_dim_qk=128, window_size=(333, 0)),
        spec(
            "window_2048_2080", batch=1, q_len=2048, kv_len=2080, head_dim_qk=16, window_size=(128, 0), dtype="bfloat16"
        ),
    ]

    # Score functions, sinks, segments.
    specs += [
        spec("scale_0.3", softmax_scale=0.3),
        spec("scale_0", softmax_scale=0.0, q_len=33, kv_len=49, numbers="positive"),
        spec("scale_negative", softmax_scale=-0.25, is_causal=True),
        spec("softcap", softcap=5.0, softmax_scale=1.0, q_len=70, kv_len=130),
        spec("softcap_causal", softcap=30.0, softmax_scale=0.5, q_len=70, kv_len=130, is_causal=True, dtype="bfloat16"),
        spec("softcap_gqa", softcap=50.0, num_q_heads=8, q_len=70, kv_len=130, dtype="float16"),
        spec("sinks", sinks=True, num_q_heads=4, q_len=70, kv_len=130),
        spec("sinks_causal_empty_rows", sinks=True, num_q_heads=4, q_len=130, kv_len=70, is_causal=True,
             dtype="bfloat16"),
        spec("sinks_window", sinks=True, q_len=130, kv_len=130, window_size=(16, 0), dtype="float16"),
        spec("alibi", alibi=True, num_q_heads=8, num_kv_heads=8, q_len=70, kv_len=70, head_dim_qk=32),
        spec("alibi_causal", alibi=True, num_q_heads=8, q_len=90, kv_len=130, is_causal=True, dtype="bfloat16"),
        spec("alibi_top_left", alibi=True, num_q_heads=4, q_len=90, kv_len=130, is_causal=True,
             causal_align="top_left"),
        spec("alibi_q_longer", alibi=True, num_q_heads=4, q_len=130, kv_len=90, dtype="float16"),
        spec("segments_packed", segments="packed", batch=8, q_len=128, kv_len=128, num_q_heads=4, num_kv_heads=4,
             head_dim_qk=16, dtype="float16"),
        spec("segments_packed_causal", segments="packed", batch=3, q_len=150, kv_len=150, is_causal=True,
             dtype="bfloat16"),
        spec("segments_cross", segments="cross", q_len=70, kv_len=150, num_q_heads=6),
        spec("segments_packed_d128", segments="packed", q_len=150, kv_len=150, is_causal=True, head_dim_qk=128,
             dtype="bfloat16"),
        spec("segments_packed_d96", segments="packed", q_len=90, kv_len=90, head_dim_qk=96, dtype="float16"),
        spec("segments_padded", segments="padded", q_len=100, kv_len=170, dtype="float16"),
        spec("segments_padded_causal", segments="padded", q_len=140, kv_len=140, is_causal=True),
        spec("everything", batch=3, q_len=110, kv_len=170, num_q_heads=6, num_kv_heads=2, head_dim_qk=72, head_dim_v=40,
             softmax_scale=0.2, is_causal=True, window_size=(90, 3), softcap=8.0, sinks=True, alibi=True,
             segments="cross"),
        spec("everything_top_left", batch=2, q_len=170, kv_len=110, num_q_heads=4, num_kv_heads=2, head_dim_qk=48,
             causal_align="top_left", window_size=(60, 30), softcap=20.0, sinks=True, alibi=True, segments="cross",
             dtype="bfloat16"),
    ]  # fmt: skip

    # Numbers that are not unit Gaussians.
    specs += _every_dtype("large_logits", q_len=70, kv_len=130, numbers="large_logits")
    specs += _every_dtype("skewed", batch=4, q_len=40, kv_len=90, numbers="skewed", is_causal=True)
    specs += _every_dtype("nan_hidden", q_len=100, kv_len=100, is_causal=True, numbers="nan_hidden")
    specs += [
        spec("integer_logits", q_len=50, kv_len=130, softmax_scale=1.0, numbers="integer"),
        spec("large_logits_sinks", q_len=50, kv_len=130, numbers="large_logits", sinks=True),
        spec("nan_visible", q_len=50, kv_len=130, numbers="nan_visible"),
        spec("nan_visible_window", q_len=130, kv_len=130, window_size=(20, 4), numbers="nan_visible", dtype="float16"),
        spec("nan_visible_causal", q_len=130, kv_len=130, is_causal=True, numbers="nan_visible", dtype="bfloat16"),
    ]
    return specs


def _benchmarks() -> list[AttentionSpec]:
    specs = []
    for dtype in ("float32", "bfloat16"):
        for causal in (False, True):
            tail = ("_causal" if causal else "") + f"_{dtype}"
            for batch, length, heads, kv_heads, head_dim in (
                (1, 2048, 8, 8, 64),
                (1, 4096, 8, 8, 128),
                (4, 512, 16, 4, 128),
            ):
                specs.append(
                    AttentionSpec(f"b{batch}_s{length}_h{heads}_{kv_heads}_d{head_dim}{tail}", batch, length, length,
                                  heads, kv_heads, head_dim, dtype=dtype, is_causal=causal)
                )  # fmt: skip
        specs.append(
            AttentionSpec(f"b1_s4096_h8_8_d128_window256_{dtype}", 1, 4096, 4096, 8, 8, 128, dtype=dtype,
                          is_causal=True, window_size=(255, 0))
        )  # fmt: skip
    specs += [
        AttentionSpec(f"decode_s{length}_h32_8_d128_bfloat16", 1, 1, length, 32, 8, 128, dtype="bfloat16")
        for length in (2048, 32768)
    ]
    return specs


CONFORMANCE: list[AttentionSpec] = _conformance()
BENCHMARKS: list[AttentionSpec] = _benchmarks()
BY_NAME: dict[str, AttentionSpec] = {spec.name: spec for spec in CONFORMANCE + BENCHMARKS}
assert len(BY_NAME) == len(CONFORMANCE) + len(BENCHMARKS), "spec names must be unique"
