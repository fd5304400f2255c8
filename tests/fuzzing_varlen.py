"""Random problems of packed sequences for the fuzz tests, and ways to spoil them."""

from __future__ import annotations

from typing import Any

import numpy as np

from fuzzing import BAD_OPTIONS, OPERANDS, Case, draw_options, pick
from specs import DTYPES

LIMIT = 2**31 - 1


def draw_varlen_case(rng: np.random.Generator, *, max_lead: int, in_range: bool) -> Case:
    """A valid call of flash_mha_varlen. Mostly tiny, now and then several tiles large.

    in_range: lengths are what NumPy callers may pass; otherwise values out of range occur, which kernels clamp.
    """
    large = rng.random() < 0.03
    batch = int(rng.integers(0, 6))
    total_q, total_k = int(rng.integers(0, 150 if large else 20)), int(rng.integers(0, 300 if large else 30))
    kv_heads = 1 + int(rng.integers(3))
    heads = kv_heads * (1 + int(rng.integers(4)))
    head_dim = 1 + int(rng.integers(256 if large else 24))
    head_dim_v = head_dim if rng.random() < 0.5 else 1 + int(rng.integers(256 if large else 24))
    dtype = DTYPES[pick(rng, *DTYPES)]
    lead = tuple(
        int(rng.integers(0, 3)) if rng.random() < 0.1 else 1 + int(rng.integers(2))
        for _ in range(int(rng.integers(max_lead + 1)))
    )

    def leading() -> tuple[int, ...]:
        return tuple(1 if rng.random() < 0.4 else size for size in lead)

    def normal(*shape: int, step: float) -> np.ndarray:
        return np.round(rng.standard_normal((*leading(), *shape)).clip(-3, 3) / step) * step

    def ends(total: int) -> np.ndarray:
        low, high = (0, total) if in_range else pick(rng, (0, total), (-3, total + 3), (-LIMIT - 1, LIMIT))
        return np.sort(rng.integers(low, high, (*leading(), batch + 1), endpoint=True), axis=-1).astype(np.int32)

    q = normal(total_q, heads, head_dim, step=0.25) * (0.5 if head_dim < 32 else 0.125)
    k = normal(total_k, kv_heads, head_dim, step=0.25)
    v = np.abs(normal(total_k, kv_heads, head_dim_v, step=2.0**-10)) + 0.5
    q[..., 0], k[..., 0] = 4.0, 2.0 + 0.25 * k[..., 0]
    operands: dict[str, np.ndarray | None] = dict.fromkeys(OPERANDS)
    operands |= {"q": q.astype(dtype), "k": k.astype(dtype), "v": v.astype(dtype)}
    if rng.random() < 0.25:
        operands["sinks"] = (normal(heads, step=0.125) + 8.0).astype(np.float32)
    if rng.random() < 0.25:
        slopes = rng.integers(0, 9, (*leading(), heads)) / (1024.0 if large else 64.0)
        operands["alibi_slopes"] = slopes.astype(np.float32)
    has_own_keys = rng.random() < 0.7
    operands["cu_seqlens_q"] = ends(total_q if has_own_keys else min(total_q, total_k))
    if has_own_keys:
        operands["cu_seqlens_k"] = ends(total_k)
    if rng.random() < 0.4:
        low, high = (0, total_k + 2) if in_range else pick(rng, (0, total_k), (-2, total_k + 2), (-LIMIT - 1, LIMIT))
        operands["seqused_k"] = rng.integers(low, high, (*leading(), batch), endpoint=True).astype(np.int32)
    broadcast = np.broadcast_shapes(*(x.shape[: len(lead)] for x in operands.values() if x is not None))
    options = draw_options(rng, dtype)
    options |= {"max_seqlen_q": pick(rng, -1, total_q, total_q + 7), "max_seqlen_k": pick(rng, -1, total_k, LIMIT)}
    return Case(operands, options, bool(rng.random() < 0.6), broadcast)


def wild_lengths(rng: np.random.Generator, case: Case) -> None:
    """Random bits as lengths: what comes out means nothing, but it must come out."""
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k"):
        array = case.operands[name]
        if array is not None:
            high = pick(rng, 3, 40, LIMIT)
            case.operands[name] = rng.integers(-high - 1, high, array.shape, endpoint=True).astype(np.int32)


def spoil_varlen_call(rng: np.random.Generator, case: Case) -> dict[str, Any]:
    """Arguments that differ from the case's in a way that flash_mha_varlen must refuse."""
    q, k, v, cu_q = (case.operands[name] for name in ("q", "k", "v", "cu_seqlens_q"))
    assert q is not None and k is not None and v is not None and cu_q is not None
    batch = cu_q.shape[0] - 1
    if rng.random() < 0.3:
        name = pick(rng, *BAD_OPTIONS)
        return {name: pick(rng, *BAD_OPTIONS[name])}
    how = int(rng.integers(7))
    bad: tuple[Any, ...]
    if how == 0:
        which = pick(rng, "q", "k", "v")
        array: np.ndarray = {"q": q, "k": k, "v": v}[which]
        return {which: pick(rng, array[None], array[..., 0], array.astype(np.float64), array.astype(np.int32), None, 1)}
    if how == 1:
        bad = (None, 3, [0, 1], np.zeros((), np.int32), np.zeros((1, batch + 1), np.int32), np.zeros(0, np.int32),
               np.zeros(batch + 1), np.zeros(batch + 1, bool), np.full(batch + 1, 2**40))  # fmt: skip
        return {"cu_seqlens_q": pick(rng, *bad)}
    if how == 2:
        bad = (np.zeros(batch + 2, np.int32), np.zeros(batch, np.int32), np.zeros((batch + 1, 1), np.int32),
               np.zeros(batch + 1, np.float16), "cu", np.full(batch + 1, -1))  # fmt: skip
        return {"cu_seqlens_k": pick(rng, *bad)}
    if how == 3:
        bad = (np.zeros(batch + 1, np.int32), np.zeros((batch, 1), np.int32), np.zeros(batch), 3,
               np.full(batch + 1, -1))  # fmt: skip
        return {"seqused_k": pick(rng, *bad)}
    if how == 4:  # values
        name, total = pick(rng, ("cu_seqlens_q", len(q)), ("cu_seqlens_k", len(k)))
        spoilt = np.zeros(batch + 1, np.int64)
        spoilt[int(rng.integers(batch + 1)) :] = pick(rng, -1, -(2**31), total + 1, LIMIT)
        return {name: spoilt}
    if how == 5:
        name = pick(rng, "max_seqlen_q", "max_seqlen_k")
        return {name: pick(rng, -2, -(2**40), None, 1.5, "7", True, (1, 2), np.ones(2), 2**70)}
    return {"segment_ids": np.zeros((1, len(q)), np.int32)}
