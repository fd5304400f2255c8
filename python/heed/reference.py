"""The oracle: attention written as its definition, in NumPy or jax.numpy, in float32 or float64.

Nothing here is fast and nothing is shared with the kernels. One function per op:

- `attention_forward`: the definition, evaluated in `compute_dtype`. NumPy in float64 is the oracle of the tests.
- `naive_attention_forward`: what a plain implementation gives at the inputs' own dtype. Its error is the yardstick of
  the tolerance rule.
- `attention_backward`, `naive_attention_backward`: the gradients by their formulas, in NumPy (JAX differentiates
  `attention_forward` itself, which is what these are tested against).
- `*_varlen`: the same, one packed sequence after the other.

JAX is imported only when a JAX array is met.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

Array = Any  # numpy.ndarray or jax.Array

__all__ = [
    "Gradients",
    "attention_backward",
    "attention_backward_varlen",
    "attention_forward",
    "attention_forward_varlen",
    "naive_attention_backward",
    "naive_attention_backward_varlen",
    "naive_attention_forward",
    "naive_attention_forward_varlen",
    "visible_keys",
]


class Gradients(NamedTuple):
    """What the backward pass gives. dsinks and dalibi_slopes are None where those operands are absent."""

    dq: Array
    dk: Array
    dv: Array
    dsinks: Array | None = None
    dalibi_slopes: Array | None = None


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
    xp = namespace_of(q, k, v, sinks, alibi_slopes, segment_ids)
    compute = np.dtype(compute_dtype if compute_dtype is not None else (np.float64 if xp is np else np.float32))
    q, k, v = (xp.asarray(x).astype(compute) for x in (q, k, v))
    rank = max(x.ndim for x in (q, k, v))
    q, k, v = (_to_rank(x, rank) for x in (q, k, v))
    q_len, num_q_heads = q.shape[-3:-1]
    scores, visible, _, _ = _scores(
        xp, q, k, softmax_scale, is_causal, window_size, segment_ids, softcap, alibi_slopes, causal_align
    )
    values = xp.repeat(_heads_first(xp, v), num_q_heads // v.shape[-2], axis=-3)

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


class _Scores(NamedTuple):
    values: Array  # [*lead, B, Hq, Lq, Lk], -inf where hidden
    visible: Array  # bool, broadcasts against values
    cap_slope: Array | None  # what the soft cap's derivative multiplies gradients by, as values; None without a cap
    distance: Array  # |distance from the diagonal| [1.., Lq, Lk]


def _scores(
    xp: Any,
    q: Array,
    k: Array,
    softmax_scale: float | None,
    is_causal: bool,
    window_size: tuple[int, int],
    segment_ids: Array | tuple[Array, Array] | None,
    softcap: float | None,
    alibi_slopes: Array | None,
    causal_align: str,
) -> _Scores:
    """Scaled, capped, biased and masked products of q and k, which are of one rank and computed in their own dtype."""
    q_len, num_q_heads, head_dim = q.shape[-3:]
    kv_len, num_kv_heads = k.shape[-3:-1]
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else float(softmax_scale)
    queries = _heads_first(xp, q)  # [*lead, B, Hq, Lq, D]
    keys = xp.repeat(_heads_first(xp, k), num_q_heads // num_kv_heads, axis=-3)
    scores = _matmul(xp, queries, xp.swapaxes(keys, -1, -2)) * scale  # [*lead, B, Hq, Lq, Lk]
    cap_slope = None
    if softcap:
        saturation = xp.tanh(scores / softcap)
        scores, cap_slope = softcap * saturation, 1 - saturation * saturation
    offset = kv_len - q_len if causal_align == "bottom_right" else 0
    rows, columns = xp.arange(q_len)[:, None], xp.arange(kv_len)[None, :]
    distance = _to_rank(xp.abs(rows + offset - columns).astype(q.dtype), q.ndim)
    if alibi_slopes is not None:
        slopes = _to_rank(xp.asarray(alibi_slopes).astype(q.dtype)[..., None, :, None, None], q.ndim)
        scores = scores - slopes * distance
    visible = _to_rank(visible_keys(xp, q_len, kv_len, is_causal, window_size, causal_align), q.ndim)
    if segment_ids is not None:
        q_ids, kv_ids = segment_ids if isinstance(segment_ids, (tuple, list)) else (segment_ids, segment_ids)
        same = xp.asarray(q_ids)[..., :, None] == xp.asarray(kv_ids)[..., None, :]
        visible = visible & _to_rank(same[..., None, :, :], q.ndim)
    return _Scores(xp.where(visible, scores, -xp.inf), visible, cap_slope, distance)


def naive_attention_forward(q: Array, k: Array, v: Array, *args: Any, **kwargs: Any) -> tuple[Array, Array]:
    """What a plain implementation gives: float32 arithmetic, probabilities and output rounded to the dtype of q."""
    return attention_forward(q, k, v, *args, compute_dtype=np.float32, storage_dtype=q.dtype, **kwargs)


@np.errstate(invalid="ignore", over="ignore", divide="ignore")
def attention_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array | None = None,
    lse: Array | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    *,
    dlse: Array | None = None,
    segment_ids: Array | tuple[Array, Array] | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    causal_align: str = "bottom_right",
    compute_dtype: Any = np.float64,
    storage_dtype: Any = None,
) -> Gradients:
    """The gradients of `sum(dout * out) + sum(dlse * lse)` by their formulas, in NumPy.

    With P = exp(scores - lse): `dP = dout v^T`, `dS = P * (dP - rowsum(dout * out) + dlse)`, `dv = P^T dout`,
    `dq = scale * dS' k`, `dk = scale * dS'^T q` where dS' is dS times the soft cap's derivative, `dalibi_slopes =
    sum(dS * -distance)` and `dsinks = sum(exp(sinks - lse) * (dlse - rowsum(dout * out)))`.

    Operands are those of `attention_forward`, which also gives out and lse where they are None; dout is like out, dlse
    like lse (None: 0). Everything is computed in `compute_dtype`. If `storage_dtype` is given, P and dS' are rounded to
    it before they meet another matrix, and so are dq, dk and dv.

    Returns dq, dk and dv of the shapes of q, k and v, but with the leading axes of all operands together; dsinks and
    dalibi_slopes [*lead, Hq]. What a mask hides contributes nothing, even where q, k, v or dout hold NaN there.
    """
    if out is None or lse is None:
        out, lse = attention_forward(
            q, k, v, softmax_scale, is_causal, window_size, segment_ids=segment_ids, softcap=softcap, sinks=sinks,
            alibi_slopes=alibi_slopes, causal_align=causal_align, compute_dtype=compute_dtype,
            storage_dtype=storage_dtype,
        )  # fmt: skip
    dlse = np.zeros((1,) * lse.ndim, compute_dtype) if dlse is None else dlse
    rank = max(x.ndim + plus for x, plus in ((q, 0), (k, 0), (v, 0), (out, 0), (dout, 0), (lse, 1), (dlse, 1)))
    q, k, v, out, dout = (_to_rank(np.asarray(x).astype(compute_dtype), rank) for x in (q, k, v, out, dout))
    lse, dlse = (_to_rank(np.asarray(x).astype(compute_dtype), rank - 1) for x in (lse, dlse))
    num_q_heads, num_kv_heads = q.shape[-2], k.shape[-2]
    group = num_q_heads // num_kv_heads
    scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else float(softmax_scale)
    scores, visible, cap_slope, distance = _scores(
        np, q, k, softmax_scale, is_causal, window_size, segment_ids, softcap, alibi_slopes, causal_align
    )
    scores, visible = np.broadcast_arrays(scores, visible)
    queries, douts = _heads_first(np, q), _heads_first(np, dout)  # [*lead, B, Hq, Lq, D]
    keys, values = (np.repeat(_heads_first(np, x), group, axis=-3) for x in (k, v))

    has_keys = lse != -math.inf  # [*lead, B, Hq, Lq]
    visible = visible & has_keys[..., None]
    probabilities = np.where(visible, np.exp(scores - lse[..., None]), 0)
    delta = np.sum(douts * _heads_first(np, out), axis=-1) - dlse
    dscores = np.where(visible, probabilities * (_matmul(np, douts, np.swapaxes(values, -1, -2)) - delta[..., None]), 0)
    dproducts = dscores if cap_slope is None else np.where(visible, dscores * cap_slope, 0)

    def stored(x: Array) -> Array:
        return x if storage_dtype is None else x.astype(storage_dtype)

    def over_group(x: Array) -> Array:  # [*lead, B, Hq, Lk, n] -> [*lead, B, Lk, Hk, n]
        grouped = x.reshape(*x.shape[:-3], num_kv_heads, group, *x.shape[-2:]) if group else x[..., None, :, :]
        return _heads_first(np, grouped.sum(axis=-3))

    weights = stored(probabilities).astype(compute_dtype)
    dproducts = stored(dproducts).astype(compute_dtype)
    turned = [np.swapaxes(x, -1, -2) for x in (dproducts, weights, visible)]
    dq = scale * _heads_first(np, _product(dproducts, visible, keys))
    dk = scale * over_group(_product(turned[0], turned[2], queries))
    dv = over_group(_product(turned[1], turned[2], douts))
    dsinks = dslopes = None
    if sinks is not None:
        share = np.exp(_to_rank(np.asarray(sinks).astype(compute_dtype)[..., None, :, None], rank - 1) - lse)
        dsinks = np.where(has_keys, share * -delta, 0).sum(axis=(-3, -1))
    if alibi_slopes is not None:
        dslopes = np.where(visible, dscores * -distance, 0).sum(axis=(-4, -2, -1))
    lead = np.broadcast_shapes(
        *(x.shape[:-4] for x in (dproducts, dq, dk, dv)), *(x.shape[:-1] for x in (dsinks, dslopes) if x is not None)
    )

    def whole(x: Array, rank: int) -> Array:
        return np.array(np.broadcast_to(x, lead + x.shape[x.ndim - rank :]))

    return Gradients(
        *(whole(stored(x), 4) for x in (dq, dk, dv)),
        *(None if x is None else whole(x, 1) for x in (dsinks, dslopes)),
    )


def naive_attention_backward(dout: Array, q: Array, k: Array, v: Array, *args: Any, **kwargs: Any) -> Gradients:
    """What a plain implementation gives: float32 arithmetic, P, dS and the gradients rounded to the dtype of q."""
    return attention_backward(dout, q, k, v, *args, compute_dtype=np.float32, storage_dtype=q.dtype, **kwargs)


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
    xp = namespace_of(q, k, v, sinks, alibi_slopes)
    options = {
        "softmax_scale": softmax_scale, "is_causal": is_causal, "window_size": window_size, "softcap": softcap,
        "causal_align": causal_align, "compute_dtype": compute_dtype, "storage_dtype": storage_dtype,
    }  # fmt: skip
    compute = np.dtype(compute_dtype if compute_dtype is not None else (np.float64 if xp is np else np.float32))
    total_q, num_q_heads = q.shape[-3:-1]
    lead, parts = _sequences(
        xp, [(q, 3), (k, 3), (v, 3), (sinks, 1), (alibi_slopes, 1)], cu_seqlens_q, cu_seqlens_k, seqused_k
    )
    out = xp.zeros((*lead, total_q, num_q_heads, v.shape[-1]), compute if storage_dtype is None else storage_dtype)
    lse = xp.full((*lead, num_q_heads, total_q), -math.inf, compute)
    for at, queries, keys, rows in parts:
        part = [x[None] for x in (rows[0][queries], rows[1][keys], rows[2][keys])]
        part_out, part_lse = attention_forward(*part, sinks=rows[3], alibi_slopes=rows[4], **options)
        out = _put(out, (*at, queries), part_out[0])
        lse = _put(lse, (*at, slice(None), queries), part_lse[0])
    return out, lse


def naive_attention_forward_varlen(q: Array, k: Array, v: Array, *args: Any, **kwargs: Any) -> tuple[Array, Array]:
    """What a plain implementation gives: float32 arithmetic, probabilities and output rounded to the dtype of q."""
    return attention_forward_varlen(q, k, v, *args, compute_dtype=np.float32, storage_dtype=q.dtype, **kwargs)


def attention_backward_varlen(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array | None,
    lse: Array | None,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array | None = None,
    *,
    dlse: Array | None = None,
    seqused_k: Array | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    compute_dtype: Any = np.float64,
    storage_dtype: Any = None,
    **options: Any,
) -> Gradients:
    """`attention_backward` of each packed sequence by itself; rows outside every sequence have gradients 0.

    Operands and options are those of `attention_forward_varlen`, which also gives out and lse where they are None.
    """
    options |= {"compute_dtype": compute_dtype, "storage_dtype": storage_dtype}
    lead, parts = _sequences(
        np,
        [(q, 3), (k, 3), (v, 3), (sinks, 1), (alibi_slopes, 1), (dout, 3), (out, 3), (lse, 2), (dlse, 2)],
        cu_seqlens_q, cu_seqlens_k, seqused_k,
    )  # fmt: skip
    dtype = compute_dtype if storage_dtype is None else storage_dtype
    dq, dk, dv = (np.zeros((*lead, *x.shape[-3:]), dtype) for x in (q, k, v))
    of_heads = [None if x is None else np.zeros((*lead, q.shape[-2]), compute_dtype) for x in (sinks, alibi_slopes)]
    for at, queries, keys, rows in parts:
        part = [x[None] for x in (rows[5][queries], rows[0][queries], rows[1][keys], rows[2][keys])]
        part += [None if rows[6] is None else rows[6][queries][None]]
        part += [None if x is None else x[:, queries][None] for x in rows[7:9]]
        found = attention_backward(*part[:6], dlse=part[6], sinks=rows[3], alibi_slopes=rows[4], **options)
        for whole, rows_of, one in ((dq, queries, found.dq), (dk, keys, found.dk), (dv, keys, found.dv)):
            _put(whole, (*at, rows_of), one[0])
        for total, one in zip(of_heads, found[3:], strict=True):
            if total is not None:
                total[at] += one
    return Gradients(dq, dk, dv, *of_heads)


def naive_attention_backward_varlen(dout: Array, q: Array, k: Array, v: Array, *args: Any, **kwargs: Any) -> Gradients:
    """What a plain implementation gives: float32 arithmetic, P, dS and the gradients rounded to the dtype of q."""
    return attention_backward_varlen(dout, q, k, v, *args, compute_dtype=np.float32, storage_dtype=q.dtype, **kwargs)


def _sequences(
    xp: Any,
    operands: list[tuple[Any, int]],
    cu_seqlens_q: Array,
    cu_seqlens_k: Array | None,
    seqused_k: Array | None,
) -> tuple[tuple[int, ...], Iterator[tuple[tuple[int, ...], slice, slice, list[Any]]]]:
    """All operands' leading axes together and, for each of their indices, each sequence: (index, its queries, its keys,
    the operands there). Operands come with their rank without leading axes, q and k first.
    """
    lengths = [(x if x is None else np.asarray(x), 1) for x in (cu_seqlens_q, cu_seqlens_k, seqused_k)]
    lead = np.broadcast_shapes(*(x.shape[: x.ndim - rank] for x, rank in operands + lengths if x is not None))
    total_q, total_k = operands[0][0].shape[-3], operands[1][0].shape[-3]

    def to_lead(x: Array, rank: int) -> Array:
        return (np if isinstance(x, np.ndarray) else xp).broadcast_to(x, lead + x.shape[x.ndim - rank :])

    def bounds(cu_seqlens: Array, index: int, total: int) -> tuple[int, int]:
        begin = min(max(int(cu_seqlens[index]), 0), total)
        return begin, min(max(int(cu_seqlens[index + 1]), begin), total)

    def parts() -> Iterator[tuple[tuple[int, ...], slice, slice, list[Any]]]:
        whole: list[Any] = [None if x is None else to_lead(x, rank) for x, rank in operands + lengths]
        for at in np.ndindex(*lead):
            rows: list[Any] = [None if x is None else x[at] for x in whole]
            *rows, cu_q, cu_k, used = rows
            for index in range(len(cu_q) - 1):
                first_key, end = bounds(cu_q if cu_k is None else cu_k, index, total_k)
                if used is not None:
                    end = first_key + min(max(int(used[index]), 0), end - first_key)
                yield at, slice(*bounds(cu_q, index, total_q)), slice(first_key, end), rows

    return lead, parts()


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


def namespace_of(*operands: Any) -> Any:
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


def _product(weights: Array, visible: Array, values: Array) -> Array:
    """weights @ values in NumPy where a hidden pair adds nothing, and what is visible follows IEEE arithmetic."""
    if np.isfinite(values).all():
        return _matmul(np, weights, values)
    visible = np.broadcast_to(visible, weights.shape)
    total = np.zeros((*np.broadcast_shapes(weights.shape[:-2], values.shape[:-2]), weights.shape[-2], values.shape[-1]))
    total = total.astype(weights.dtype)
    for i in range(weights.shape[-1]):
        total += np.where(visible[..., :, i, None], weights[..., :, i, None] * values[..., i, None, :], 0)
    return total
