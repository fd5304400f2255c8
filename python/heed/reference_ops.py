"""The oracles of heed.ops by their definitions, in NumPy or jax.numpy; `heed.reference` has those of attention.

A function evaluates the definition in `compute_dtype` (NumPy in float64 by default: the oracle), rounds what
it returns to `storage_dtype` if that is given, and its `naive_` sibling is what a plain implementation at the inputs'
own dtype gives: float32 arithmetic, rounded wherever such an implementation would store something.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from heed import reference
from heed.reference import namespace_of

Array = Any  # numpy.ndarray or jax.Array

__all__ = [
    "act_and_mul",
    "act_and_mul_backward",
    "apply_rope",
    "naive_act_and_mul",
    "naive_act_and_mul_backward",
    "naive_apply_rope",
    "naive_rms_norm",
    "naive_rms_norm_backward",
    "naive_single_decode",
    "naive_single_decode_backward",
    "rms_norm",
    "rms_norm_backward",
    "rope_frequencies",
    "rope_positions",
    "single_decode",
    "single_decode_backward",
]

_erf, _erfc = (np.frompyfunc(f, 1, 1) for f in (math.erf, math.erfc))


# Gated activations.


def act_and_mul(x: Array, activation: str = "silu", *, compute_dtype: Any = None, storage_dtype: Any = None) -> Array:
    """`activation(x[..., :H]) * x[..., H:]` of x [..., 2H]; activation is "silu", "gelu" or "gelu_tanh"."""
    xp, compute = _setting(x, compute_dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        gate, up = _halves(xp, x, compute)
        return _stored(_activation(xp, gate, activation) * up, storage_dtype)


def naive_act_and_mul(x: Array, activation: str = "silu") -> Array:
    """What a plain implementation gives."""
    return act_and_mul(x, activation, compute_dtype=np.float32, storage_dtype=x.dtype)


def act_and_mul_backward(
    x: Array, dout: Array, activation: str = "silu", *, compute_dtype: Any = np.float64, storage_dtype: Any = None
) -> Array:
    """The gradient of `sum(dout * act_and_mul(x))`, in NumPy: [..., 2H]."""
    with np.errstate(over="ignore", invalid="ignore"):
        gate, up = _halves(np, x, np.dtype(compute_dtype))
        dout = np.asarray(dout).astype(gate.dtype)
        dgate = dout * up * _slope(gate, activation)
        dup = dout * _activation(np, gate, activation)
    return _stored(np.concatenate([dgate, dup], axis=-1), storage_dtype)


def naive_act_and_mul_backward(x: Array, dout: Array, activation: str = "silu") -> Array:
    """What a plain implementation gives."""
    return act_and_mul_backward(x, dout, activation, compute_dtype=np.float32, storage_dtype=x.dtype)


def _halves(xp: Any, x: Array, compute: np.dtype[Any]) -> tuple[Array, Array]:
    x = xp.asarray(x).astype(compute)
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _activation(xp: Any, a: Array, name: str) -> Array:
    if name == "silu":
        return a / (1 + xp.exp(-a))
    if name == "gelu":
        return a * _normal_cdf(xp, a)
    return a * _tanh_cdf(xp, a)


def _slope(a: Array, name: str) -> Array:
    """The derivative of the activation."""
    one = a.dtype.type(1)
    if name == "silu":
        sigmoid = one / (one + np.exp(-a))
        return sigmoid * (one + a * (one - sigmoid))
    if name == "gelu":
        density = np.exp(-a * a / 2) * a.dtype.type(1 / math.sqrt(2 * math.pi))
        return _normal_cdf(np, a) + a * density
    cdf = _tanh_cdf(np, a)
    inner = a.dtype.type(math.sqrt(2 / math.pi)) * (one + a.dtype.type(3 * 0.044715) * a * a)
    return cdf + 2 * a * cdf * (one - cdf) * inner


# Both without cancellation in float64, where they are the oracle, and as one writes them in float32.


def _normal_cdf(xp: Any, a: Array) -> Array:
    scaled = a * a.dtype.type(math.sqrt(0.5))
    if a.dtype == np.float64:
        return (_erfc(-scaled).astype(a.dtype) if xp is np else sys.modules["jax"].scipy.special.erfc(-scaled)) / 2
    return (1 + (_erf(scaled).astype(a.dtype) if xp is np else sys.modules["jax"].scipy.special.erf(scaled))) / 2


def _tanh_cdf(xp: Any, a: Array) -> Array:
    inner = a.dtype.type(math.sqrt(2 / math.pi)) * (a + a.dtype.type(0.044715) * a * a * a)
    return 1 / (1 + xp.exp(-2 * inner)) if a.dtype == np.float64 else (1 + xp.tanh(inner)) / 2


# Rotary embeddings.


def apply_rope(
    q: Array,
    k: Array,
    indptr: Array | None = None,
    offsets: Array | None = None,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
    *,
    pos_ids: Array | None = None,
    cos_sin_cache: Array | None = None,
    llama31: tuple[float, float, float] | None = None,
    inverse: bool = False,
    compute_dtype: Any = None,
    storage_dtype: Any = None,
) -> tuple[Array, Array]:
    """Rotates q and k, [*lead, tokens, heads, head_dim], as `heed.ops.apply_rope` and its siblings.

    Positions come from indptr [*lead, B + 1] and offsets [*lead, B], or are pos_ids [*lead, tokens]; cosines and sines
    come from the frequencies, or are rows of cos_sin_cache [*lead, positions, rotary_dim] (clamped to it). llama31 is
    (low_freq_factor, high_freq_factor, old_context_len). Leading axes broadcast.
    """
    xp, compute = _setting((q, k), compute_dtype)
    if cos_sin_cache is not None:
        rotary_dim = cos_sin_cache.shape[-1]
    rotary_dim = q.shape[-1] if rotary_dim is None else rotary_dim
    is_rotated = None
    if pos_ids is None:
        positions, is_rotated = _positions(q.shape[-3], np.asarray(indptr), np.asarray(offsets))
    else:
        positions = np.asarray(pos_ids).astype(np.int64)
    if cos_sin_cache is not None:
        table = np.asarray(cos_sin_cache)
        rows = np.clip(positions, 0, table.shape[-2] - 1)
        lead = np.broadcast_shapes(table.shape[:-2], rows.shape[:-1])
        table = np.broadcast_to(table, lead + table.shape[-2:])
        rows = np.broadcast_to(rows, lead + rows.shape[-1:])
        found = np.take_along_axis(table, rows[..., None], axis=-2).astype(compute)
        cos, sin = found[..., : rotary_dim // 2], found[..., rotary_dim // 2 :]
    else:
        frequency = rope_frequencies(rotary_dim, rope_scale, rope_theta, llama31, compute)
        angle = positions[..., None].astype(compute) * frequency  # [*lead, tokens, rotary_dim / 2]
        cos, sin = np.cos(angle), np.sin(angle)
    if inverse:
        sin = -sin

    def rotate(x: Array) -> Array:
        x = xp.asarray(x).astype(compute)
        turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
        half = rotary_dim // 2
        a, b = (turned[..., 0::2], turned[..., 1::2]) if interleave else (turned[..., :half], turned[..., half:])
        c, s = cos[..., None, :], sin[..., None, :]
        pair = [a * c - b * s, a * s + b * c]
        if interleave:
            both = xp.stack(pair, axis=-1).reshape(*pair[0].shape[:-1], rotary_dim)
        else:
            both = xp.concatenate(pair, axis=-1)
        rest = xp.broadcast_to(rest, both.shape[:-1] + rest.shape[-1:])
        whole = xp.concatenate([both, rest], axis=-1)
        if is_rotated is not None:
            whole = xp.where(is_rotated[..., None, None], whole, x)
        return _stored(whole, storage_dtype)

    return rotate(q), rotate(k)


def naive_apply_rope(q: Array, k: Array, *args: Any, **kwargs: Any) -> tuple[Array, Array]:
    """What a plain implementation gives: the angle, too, is a float32 product."""
    return apply_rope(q, k, *args, compute_dtype=np.float32, storage_dtype=q.dtype, **kwargs)


def rope_positions(num_tokens: int, indptr: Array, offsets: Array) -> tuple[Array, Array]:
    """The position of every token of packed sequences, and whether it is in any: int64 and bool [num_tokens]."""
    positions, is_inside = np.zeros(num_tokens, np.int64), np.zeros(num_tokens, bool)
    for begin, end, offset in zip(indptr[:-1], indptr[1:], offsets, strict=True):
        rows = slice(int(begin), int(end))
        positions[rows] = int(offset) + np.arange(int(end) - int(begin))
        is_inside[rows] = True
    return positions, is_inside


def rope_frequencies(
    rotary_dim: int,
    scale: float = 1.0,
    theta: float = 1e4,
    llama31: tuple[float, float, float] | None = None,
    compute_dtype: Any = np.float64,
) -> Array:
    """What positions are multiplied with: [rotary_dim / 2], `theta^(-2j / rotary_dim)`, scaled."""
    compute = np.dtype(compute_dtype).type
    exponent = np.arange(0, rotary_dim, 2).astype(compute) / compute(rotary_dim)
    frequency = compute(1) / compute(theta) ** exponent
    if llama31 is None:
        return frequency / compute(scale)
    low, high, context = map(compute, llama31)
    turns = frequency * context / compute(2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0, 1).astype(compute)
    return frequency * (share + (1 - share) / compute(scale))


# Norms.


def rms_norm(
    x: Array,
    weight: Array,
    eps: float = 1e-6,
    residual: Array | None = None,
    *,
    compute_dtype: Any = None,
    storage_dtype: Any = None,
) -> tuple[Array, Array]:
    """`total / sqrt(mean(total^2) + eps) * weight`, and total: x, or x + residual rounded to x's dtype.

    x [..., H]; weight [H], or whatever broadcasts against x.
    """
    xp, compute = _setting((x, weight), compute_dtype)
    total = xp.asarray(x).astype(compute)
    if residual is not None:
        total = (total + xp.asarray(residual).astype(compute)).astype(x.dtype).astype(compute)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        out = total / xp.sqrt(xp.mean(total * total, axis=-1, keepdims=True) + compute.type(eps))
        out = out * xp.asarray(weight).astype(compute)
    return _stored(out, storage_dtype), _stored(total, storage_dtype)


def naive_rms_norm(x: Array, weight: Array, eps: float = 1e-6, residual: Array | None = None) -> tuple[Array, Array]:
    """What a plain implementation gives."""
    return rms_norm(x, weight, eps, residual, compute_dtype=np.float32, storage_dtype=x.dtype)


def rms_norm_backward(
    x: Array,
    weight: Array,
    dout: Array,
    dsum: Array | None = None,
    eps: float = 1e-6,
    *,
    compute_dtype: Any = np.float64,
    storage_dtype: Any = None,
) -> tuple[Array, Array]:
    """The gradients of `sum(dout * rms_norm(x)) + sum(dsum * x)`, in NumPy: dx like x, and dweight [H] over all rows.

    x is what was normalised: with a residual, the rounded sum. dweight is not rounded to `storage_dtype`.
    """
    compute = np.dtype(compute_dtype)
    x, weight, dout = (np.asarray(one).astype(compute) for one in (x, weight, dout))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        scale = compute.type(1) / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + compute.type(eps))
        normed, weighted = x * scale, dout * weight
        dx = (weighted - normed * np.mean(weighted * normed, axis=-1, keepdims=True)) * scale
        dweight = (dout * normed).reshape(-1, x.shape[-1]).sum(axis=0)
    if dsum is not None:
        dx = dx + np.asarray(dsum).astype(compute)
    return _stored(dx, storage_dtype), dweight


def naive_rms_norm_backward(
    x: Array, weight: Array, dout: Array, dsum: Array | None = None, eps: float = 1e-6
) -> tuple[Array, Array]:
    """What a plain implementation gives; dweight is float32."""
    return rms_norm_backward(x, weight, dout, dsum, eps, compute_dtype=np.float32, storage_dtype=x.dtype)


# Decode.


def single_decode(
    q: Array,
    k: Array,
    v: Array,
    *,
    kv_layout: str = "NHD",
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    compute_dtype: Any = None,
    storage_dtype: Any = None,
) -> tuple[Array, Array]:
    """Attention of one query, the last token, as `heed.ops.single_decode`.

    q [*lead, Hq, D], k [*lead, S, Hk, D] and v [*lead, S, Hk, Dv] (or [*lead, Hk, S, ...]), sinks and alibi_slopes
    [*lead, Hq]. Leading axes broadcast. With `storage_dtype`, q and k are rounded after they are rotated.

    Returns out [*lead, Hq, Dv] and lse [*lead, Hq].
    """
    options = {"compute_dtype": compute_dtype, "storage_dtype": storage_dtype}
    q, k, v = _attention_operands(q, k, v, kv_layout, rope_scale, rope_theta, **options)
    out, lse = reference.attention_forward(
        q, k, v, sm_scale, False, (window_left, -1), softcap=logits_soft_cap, sinks=sinks, alibi_slopes=alibi_slopes,
        **options,
    )  # fmt: skip
    return out[..., 0, 0, :, :], lse[..., 0, :, 0]


def naive_single_decode(q: Array, k: Array, v: Array, **kwargs: Any) -> tuple[Array, Array]:
    """What a plain implementation gives: rotated q and k, probabilities and output rounded to the dtype of q."""
    return single_decode(q, k, v, compute_dtype=np.float32, storage_dtype=q.dtype, **kwargs)


def single_decode_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array | None = None,
    lse: Array | None = None,
    *,
    dlse: Array | None = None,
    kv_layout: str = "NHD",
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    compute_dtype: Any = np.float64,
    storage_dtype: Any = None,
) -> reference.Gradients:
    """The gradients of `sum(dout * out) + sum(dlse * lse)`, in NumPy: those of attention, rotated back.

    out and lse are what `single_decode` gives where they are None.
    """
    options = {"compute_dtype": compute_dtype, "storage_dtype": storage_dtype}
    rotated = _attention_operands(q, k, v, kv_layout, rope_scale, rope_theta, **options)
    found = reference.attention_backward(
        dout[..., None, None, :, :], *rotated, None if out is None else out[..., None, None, :, :],
        None if lse is None else lse[..., None, :, None], sm_scale, False, (window_left, -1),
        dlse=None if dlse is None else dlse[..., None, :, None],
        softcap=logits_soft_cap, sinks=sinks, alibi_slopes=alibi_slopes, **options,
    )  # fmt: skip
    dq, dk, dv = found.dq[..., 0, 0, :, :], found.dk[..., 0, :, :, :], found.dv[..., 0, :, :, :]
    dq, dk = _rotate_decode(dq, dk, rope_scale, rope_theta, inverse=True, **options)
    if kv_layout == "HND":
        dk, dv = np.swapaxes(dk, -2, -3), np.swapaxes(dv, -2, -3)
    return found._replace(dq=dq, dk=dk, dv=dv)


def naive_single_decode_backward(dout: Array, q: Array, k: Array, v: Array, **kwargs: Any) -> reference.Gradients:
    """What a plain implementation gives: P, dS, rotated q and k and the gradients rounded to the dtype of q."""
    return single_decode_backward(dout, q, k, v, compute_dtype=np.float32, storage_dtype=q.dtype, **kwargs)


def _attention_operands(
    q: Array, k: Array, v: Array, kv_layout: str, rope_scale: float | None, rope_theta: float | None, **options: Any
) -> tuple[Array, Array, Array]:
    """q, k and v as attention takes them, [*lead, 1, tokens, heads, head_dim], rotated."""
    xp, _ = _setting((q, k, v), None)
    if kv_layout == "HND":
        k, v = xp.swapaxes(k, -2, -3), xp.swapaxes(v, -2, -3)
    q, k = _rotate_decode(q, k, rope_scale, rope_theta, inverse=False, **options)
    return q[..., None, None, :, :], k[..., None, :, :, :], v[..., None, :, :, :]


def _rotate_decode(
    q: Array, k: Array, rope_scale: float | None, rope_theta: float | None, inverse: bool, **options: Any
) -> tuple[Array, Array]:
    """q [*lead, Hq, D] at the position of the last of the keys [*lead, S, Hk, D], and those at theirs."""
    if rope_scale is None and rope_theta is None:
        return q, k
    rope = {
        "rope_scale": 1.0 if rope_scale is None else rope_scale,
        "rope_theta": 1e4 if rope_theta is None else rope_theta,
        "inverse": inverse,
    } | options
    num_keys = k.shape[-3]
    rows = q[..., None, :, :]
    rotated = apply_rope(rows, rows, pos_ids=np.array([max(num_keys - 1, 0)]), **rope)[0]
    return rotated[..., 0, :, :], apply_rope(k, k, pos_ids=np.arange(num_keys), **rope)[1]


# What they share.


def _setting(operands: Any, compute_dtype: Any) -> tuple[Any, np.dtype[Any]]:
    """numpy or jax.numpy, and what to compute in: by default float64 there and float32 here."""
    xp = namespace_of(operands)
    if compute_dtype is None:
        compute_dtype = np.float64 if xp is np else np.float32
    return xp, np.dtype(compute_dtype)


def _stored(x: Array, storage_dtype: Any) -> Array:
    with np.errstate(over="ignore"):
        return x if storage_dtype is None else x.astype(storage_dtype)


def _positions(num_tokens: int, indptr: Array, offsets: Array) -> tuple[Array, Array]:
    """`rope_positions` for every leading index."""
    lead = np.broadcast_shapes(indptr.shape[:-1], offsets.shape[:-1])
    indptr = np.broadcast_to(indptr, lead + indptr.shape[-1:])
    offsets = np.broadcast_to(offsets, lead + offsets.shape[-1:])
    positions, is_inside = np.zeros((*lead, num_tokens), np.int64), np.zeros((*lead, num_tokens), bool)
    for at in np.ndindex(*lead):
        positions[at], is_inside[at] = rope_positions(num_tokens, indptr[at], offsets[at])
    return positions, is_inside
