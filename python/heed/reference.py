"""The oracle: attention written as its definition, in NumPy or jax.numpy, in float32 or float64.

Nothing here is fast and nothing is shared with the kernels. One function per op:

- `attention_forward`: the definition, evaluated in `compute_dtype`. NumPy in float64 is the oracle of the tests.
- `naive_attention_forward`: what a plain implementation gives at the inputs' own dtype. Its error is the yardstick of
  the tolerance rule.

JAX is imported only when a JAX array is met.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or jax.Array

__all__ = ["attention_forward", "naive_attention_forward", "visible_keys"]


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
