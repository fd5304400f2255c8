"""The oracle: attention written as its definition, in NumPy or jax.numpy, in float32 or float64.

Nothing here is fast and nothing is shared with the kernels. One function per op:

- `attention_forward`: the definition, evaluated in `compute_dtype`. NumPy in float64 is the oracle of the tests.
- `naive_attention_forward`: what a plain implementation gives at the inputs' own dtype. Its error is the yardstick of
  the tolerance rule.
- `attention_forward_varlen`, `naive_attention_forward_varlen`: the same, one packed sequence after the other.

JAX is imported only when a JAX array is met.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or jax.Array

__all__ = [
    "attention_forward",
    "attention_forward_varlen",
    "naive_attention_forward",
    "naive_attention_forward_varlen",
    "visible_keys",
]


@np.errstate(invalid="ignore", over="ignore", divide="ignore")  # inputs may hold NaN and infinities, caps be tiny
def attention_forward(
    q: Array,
    k: Array,
    v: Array,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    *,
    segment_ids: Array | tuple[Array, Array] | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    causal_align: str = "bottom_right",
    compute_dtype: Any = None,
    storage_dtype: Any = None,
) -> tuple[Array, Array]:
    """Softmax attention by its definition.

    q [*lead, B, Lq, Hq, D], k [*lead, B, Lk, Hk, D], v [*lead, B, Lk, Hk, Dv], sinks and alibi_slopes [*lead, Hq],
    segment ids [*lead, B, Lq] and [*lead, B, Lk]. Leading axes broadcast.

    Everything is computed in `compute_dtype` (default: float64 for NumPy, float32 for JAX). If `storage_dtype` is
    given, the probabilities are rounded to it before they meet v, and so is the output.

    Returns out [*lead, B, Lq, Hq, Dv] and lse [*lead, B, Hq, Lq], the natural log of the softmax denominator (sink
    included). A row without visible keys has out 0 and lse -inf, or its sink. What a mask hides contributes nothing at
    all, even where k or v hold NaN there; what is visible follows IEEE arithmetic.
    """
    xp = _namespace(q, k, v, sinks, alibi_slopes, segment_ids)
    compute = np.dtype(compute_dtype if compute_dtype is not None else (np.float64 if xp is np else np.float32))
    q, k, v = (xp.asarray(x).astype(compute) for x in (q, k, v))
    rank = max(x.ndim for x in (q, k, v))
    q, k, v = (_to_rank(x, rank) for x in (q, k, v))
    q_len, num_q_heads, head_dim = q.shape[-3:]
    kv_len, num_kv_heads = k.shape[-3:-1]
    group = num_q_heads // num_kv_heads
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else float(softmax_scale)

    queries = _heads_first(xp, q)  # [*lead, B, Hq, Lq, D]
    keys = xp.repeat(_heads_first(xp, k), group, axis=-3)
    values = xp.repeat(_heads_first(xp, v), group, axis=-3)

    scores = _matmul(xp, queries, xp.swapaxes(keys, -1, -2)) * scale  # [*lead, B, Hq, Lq, Lk]
    if softcap:
        scores = softcap * xp.tanh(scores / softcap)
    offset = kv_len - q_len if causal_align == "bottom_right" else 0
    rows, columns = xp.arange(q_len)[:, None], xp.arange(kv_len)[None, :]
    if alibi_slopes is not None:
        slopes = _to_rank(xp.asarray(alibi_slopes).astype(compute)[..., None, :, None, None], rank)
        distance = xp.abs(rows + offset - columns).astype(compute)
        scores = scores - slopes * _to_rank(distance, rank)
    visible = _to_rank(visible_keys(xp, q_len, kv_len, is_causal, window_size, causal_align), rank)
    if segment_ids is not None:
        q_ids, kv_ids = segment_ids if isinstance(segment_ids, (tuple, list)) else (segment_ids, segment_ids)
        same = xp.asarray(q_ids)[..., :, None] == xp.asarray(kv_ids)[..., None, :]
        visible = visible & _to_rank(same[..., None, :, :], rank)
    scores = xp.where(visible, scores, -xp.inf)

    top = xp.max(scores, axis=-1, initial=-math.inf)  # [*lead, B, Hq, Lq]
    sink = None
    if sinks is not None:
        sink = _to_rank(xp.asarray(sinks).astype(compute)[..., None, :, None], rank - 1)
        top = xp.maximum(top, sink)
    top = xp.where(top == -math.inf, xp.zeros_like(top), top)
    weights = xp.where(visible, xp.exp(scores - top[..., None]), xp.zeros_like(scores))
    total = xp.sum(weights, axis=-1)
    if sink is not None:
        total = total + xp.exp(sink - top)
    is_empty = total == 0
    positive_total = xp.where(is_empty, xp.ones_like(total), total)
    lse = xp.where(is_empty, -math.inf, top + xp.log(positive_total))
    probabilities = weights / positive_total[..., None]
    if storage_dtype is not None:
        probabilities = probabilities.astype(storage_dtype).astype(compute)
    out = _weighted_sum(xp, probabilities, xp.broadcast_to(visible, probabilities.shape), values)
    out = _heads_first(xp, out)  # the swap is its own inverse
    lse = xp.broadcast_to(lse, (*out.shape[:-3], num_q_heads, q_len))  # leading axes that only v has
    return (out if storage_dtype is None else out.astype(storage_dtype)), lse


def naive_attention_forward(q: Array, k: Array, v: Array, *args: Any, **kwargs: Any) -> tuple[Array, Array]:
    """What a plain implementation gives: float32 arithmetic, probabilities and output rounded to the dtype of q."""
    return attention_forward(q, k, v, *args, compute_dtype=np.float32, storage_dtype=q.dtype, **kwargs)


def attention_forward_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    *,
    seqused_k: Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    causal_align: str = "bottom_right",
    compute_dtype: Any = None,
    storage_dtype: Any = None,
) -> tuple[Array, Array]:
    """`attention_forward` of each packed sequence by itself.

    q [*lead, Tq, Hq, D], k [*lead, Tk, Hk, D], v [*lead, Tk, Hk, Dv], cu_seqlens [*lead, B + 1], seqused_k [*lead, B],
    sinks and alibi_slopes [*lead, Hq]. Leading axes broadcast. Lengths are read here, so they cannot be traced; values
    out of range are clamped to what q and k hold.

    Returns out [*lead, Tq, Hq, Dv] and lse [*lead, Hq, Tq]. Rows outside every sequence have out 0 and lse -inf.
    """
    xp = _namespace(q, k, v, sinks, alibi_slopes)
    options = {
        "softmax_scale": softmax_scale, "is_causal": is_causal, "window_size": window_size, "softcap": softcap,
        "causal_align": causal_align, "compute_dtype": compute_dtype, "storage_dtype": storage_dtype,
    }  # fmt: skip
    operands = [(q, 3), (k, 3), (v, 3), (sinks, 1), (alibi_slopes, 1)]
    operands += [(x if x is None else np.asarray(x), 1) for x in (cu_seqlens_q, cu_seqlens_k, seqused_k)]
    lead = np.broadcast_shapes(*(x.shape[: x.ndim - rank] for x, rank in operands if x is not None))

    def to_lead(x: Array, rank: int) -> Array:
        return (np if isinstance(x, np.ndarray) else xp).broadcast_to(x, lead + x.shape[x.ndim - rank :])

    whole: list[Any] = [None if x is None else to_lead(x, rank) for x, rank in operands]
    compute = np.dtype(compute_dtype if compute_dtype is not None else (np.float64 if xp is np else np.float32))
    total_q, num_q_heads = q.shape[-3:-1]
    out = xp.zeros((*lead, total_q, num_q_heads, v.shape[-1]), compute if storage_dtype is None else storage_dtype)
    lse = xp.full((*lead, num_q_heads, total_q), -math.inf, compute)
    for at in np.ndindex(*lead):
        rows: list[Any] = [None if x is None else x[at] for x in whole]
        for queries, keys in _sequences(total_q, k.shape[-3], *rows[5:]):
            part = [x[None] for x in (rows[0][queries], rows[1][keys], rows[2][keys])]
            part_out, part_lse = attention_forward(*part, sinks=rows[3], alibi_slopes=rows[4], **options)
            out = _put(out, (*at, queries), part_out[0])
            lse = _put(lse, (*at, slice(None), queries), part_lse[0])
    return out, lse


def naive_attention_forward_varlen(q: Array, k: Array, v: Array, *args: Any, **kwargs: Any) -> tuple[Array, Array]:
    """What a plain implementation gives: float32 arithmetic, probabilities and output rounded to the dtype of q."""
    return attention_forward_varlen(q, k, v, *args, compute_dtype=np.float32, storage_dtype=q.dtype, **kwargs)


def _sequences(
    total_q: int, total_k: int, cu_seqlens_q: Array, cu_seqlens_k: Array | None, seqused_k: Array | None
) -> Iterator[tuple[slice, slice]]:
    """Each sequence's queries and keys."""

    def bounds(cu_seqlens: Array, index: int, total: int) -> tuple[int, int]:
        begin = min(max(int(cu_seqlens[index]), 0), total)
        return begin, min(max(int(cu_seqlens[index + 1]), begin), total)

    for index in range(len(cu_seqlens_q) - 1):
        first_key, end = bounds(cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, index, total_k)
        if seqused_k is not None:
            end = first_key + min(max(int(seqused_k[index]), 0), end - first_key)
        yield slice(*bounds(cu_seqlens_q, index, total_q)), slice(first_key, end)


def _put(array: Array, index: tuple[Any, ...], values: Array) -> Array:
    if not isinstance(array, np.ndarray):
        return array.at[index].set(values)
    array[index] = values
    return array


def visible_keys(
    xp: Any, q_len: int, kv_len: int, is_causal: bool, window_size: tuple[int, int], causal_align: str
) -> Array:
    """Which keys each query sees, bool [Lq, Lk]: i + offset - left <= j <= i + offset + right, -1 meaning unbounded."""
    left, right = window_size
    if is_causal:
        right = 0
    offset = kv_len - q_len if causal_align == "bottom_right" else 0
    diagonal, column = xp.arange(q_len)[:, None] + offset, xp.arange(kv_len)[None, :]
    visible = xp.ones((q_len, kv_len), dtype=bool)
    if left >= 0:
        visible = visible & (column >= diagonal - min(left, q_len + kv_len))
    if right >= 0:
        visible = visible & (column <= diagonal + min(right, q_len + kv_len))
    return visible


def _namespace(*operands: Any) -> Any:
    """numpy, or jax.numpy if any operand is a JAX array."""
    jax = sys.modules.get("jax")
    if jax is not None:
        flat = [x for operand in operands for x in (operand if isinstance(operand, (tuple, list)) else (operand,))]
        if any(isinstance(x, jax.Array) for x in flat):
            return jax.numpy
    return np


def _to_rank(x: Array, rank: int) -> Array:
    """Leading axes of size 1, so that ranks agree before anything broadcasts."""
    return x.reshape((1,) * (rank - x.ndim) + x.shape)


def _heads_first(xp: Any, x: Array) -> Array:
    return xp.swapaxes(x, -2, -3)


def _matmul(xp: Any, a: Array, b: Array) -> Array:
    if xp is np:
        return np.matmul(a, b)
    return xp.matmul(a, b, precision="highest")


def _weighted_sum(xp: Any, weights: Array, visible: Array, values: Array) -> Array:
    """weights @ values in which a hidden key adds nothing, whatever its value is.

    A plain product would turn a hidden NaN into 0 * NaN. So the finite values are summed, and what the visible NaN and
    infinite ones do to a sum is worked out by counting them.
    """
    finite = xp.isfinite(values)
    if xp is np and finite.all():
        return _matmul(xp, weights, values)
    total = _matmul(xp, weights, xp.where(finite, values, xp.zeros_like(values)))

    def meets(keys: Array, what: Array) -> Array:
        return _matmul(xp, keys.astype(total.dtype), what.astype(total.dtype)) > 0

    infinite = xp.isinf(values)
    has_positive = meets(visible & (weights > 0), infinite & (values > 0))
    has_negative = meets(visible & (weights > 0), infinite & (values < 0))
    has_nan = (
        meets(visible, xp.isnan(values)) | meets(visible & (weights == 0), infinite) | (has_positive & has_negative)
    )
    total = xp.where(has_positive, math.inf, total)
    total = xp.where(has_negative, -math.inf, total)
    return xp.where(has_nan | xp.isnan(_matmul(xp, weights, xp.ones_like(values))), math.nan, total)
