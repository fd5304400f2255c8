"""Gated activations, norms and decode as differentiable functions. (Rotary embeddings: `rope_rules.py`.)"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from heed._jax import rope_rules
from heed._jax.ops import ACT_AND_MUL, ACT_AND_MUL_BWD, ATTENTION_DECODE, ATTENTION_FWD, RMS_NORM, RMS_NORM_BWD
from heed._jax.primitive import PRIMITIVES, Operands
from heed._jax.vjp import attention_bwd, like
from heed._problem import AttentionStatics
from heed._small_ops import ActStatics, DecodeStatics, NormStatics, RopeStatics

Arrays = tuple[Any, ...]

# Gated activations. ---------------------------------------------------------------------------------------------------


def _act(statics: ActStatics, x: Any) -> Any:
    (out,) = PRIMITIVES[ACT_AND_MUL].bind(x, statics=statics, operands=("x",))
    return out


def _act_forward(statics: ActStatics, x: Any) -> tuple[Any, Any]:
    return _act(statics, x), x


def _act_backward(statics: ActStatics, x: Any, dout: Any) -> tuple[Any]:
    (dx,) = PRIMITIVES[ACT_AND_MUL_BWD].bind(x, dout, statics=statics, operands=("x", "dout"))
    return (like(dx, jax.typeof(x)),)


act_and_mul = jax.custom_vjp(_act, nondiff_argnums=(0,))
act_and_mul.defvjp(_act_forward, _act_backward)

# Norms. ---------------------------------------------------------------------------------------------------------------


def _norm(statics: NormStatics, operands: Operands, arrays: Arrays) -> Arrays:
    """out, or out and sum, of x and weight, or of x, weight and residual."""
    return tuple(PRIMITIVES[RMS_NORM].bind(*arrays, statics=statics, operands=operands))


def _norm_forward(statics: NormStatics, operands: Operands, arrays: Arrays) -> tuple[Arrays, Any]:
    """What is kept is what was normalised, and the operands only if their types say more (an explicit mesh)."""
    results = _norm(statics, operands, arrays)
    x, weight, *residual = arrays
    normalised = results[1] if residual else x
    typed = [y if jax.typeof(y) != jax.typeof(normalised) else None for y in (x, *residual)]
    return results, (normalised, weight, typed)


def _norm_backward(statics: NormStatics, operands: Operands, residuals: Any, cotangents: Arrays) -> tuple[Arrays]:
    normalised, weight, typed = residuals
    names = ("x", "weight", "dout", "dsum")[: 2 + len(cotangents)]
    dx, dweight = PRIMITIVES[RMS_NORM_BWD].bind(normalised, weight, *cotangents, statics=statics, operands=names)
    each = [like(dx, jax.typeof(normalised if y is None else y)) for y in typed]
    return ((each[0], like(dweight.astype(weight.dtype), jax.typeof(weight)), *each[1:]),)


rms_norm = jax.custom_vjp(_norm, nondiff_argnums=(0, 1))
rms_norm.defvjp(_norm_forward, _norm_backward)

# Decode. --------------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attention_decode(statics: DecodeStatics, operands: Operands, arrays: Arrays) -> Arrays:
    """out[, lse] of the operands that are present."""
    return tuple(PRIMITIVES[ATTENTION_DECODE].bind(*arrays, statics=statics, operands=operands))


def _decode_forward(statics: DecodeStatics, operands: Operands, arrays: Arrays) -> tuple[Arrays, Any]:
    """As attention's: the results are kept, under names that policies of `jax.checkpoint` may choose by.

    With a rotation they are attention's, of the very numbers that the backward pass computes scores from: decode
    kernels differ in what they round of a rotated key, and probabilities from one kernel's scores and another one's LSE
    do not sum to 1.
    """
    by_name = dict(zip(operands, arrays, strict=True))
    if statics.rope is None:
        with_lse = dataclasses.replace(statics, return_lse=True)
        out, lse = PRIMITIVES[ATTENTION_DECODE].bind(*arrays, statics=with_lse, operands=operands)
    else:
        given = _attention_operands(statics, by_name)
        options = dataclasses.replace(_attention_statics(statics), return_lse=True)
        out, lse = PRIMITIVES[ATTENTION_FWD].bind(*given.values(), statics=options, operands=tuple(given))
        out, lse = out[0, 0], lse[0, :, 0]
    out, lse = checkpoint_name(out, "heed_attention_out"), checkpoint_name(lse, "heed_attention_lse")
    rounded = out.astype(by_name["q"].dtype)
    return ((rounded, lse) if statics.return_lse else (rounded,)), (arrays, out, lse)


def _decode_backward(
    statics: DecodeStatics, operands: Operands, residuals: tuple[Arrays, Any, Any], cotangents: Arrays
) -> tuple[Arrays]:
    """The gradient of attention with one query, which is the last of its sequence."""
    arrays, out, lse = residuals
    by_name = dict(zip(operands, arrays, strict=True))
    given = _attention_operands(statics, by_name)
    dout, *dlse = cotangents
    given |= {"out": out[None, None], "lse": lse[None, :, None], "dout": dout.astype(out.dtype)[None, None]}
    if dlse:
        given["dlse"] = dlse[0][None, :, None]
    found = attention_bwd(_attention_statics(statics), tuple(given), tuple(given.values()))
    found["q"], found["k"], found["v"] = found["q"][0, 0], found["k"][0], found["v"][0]
    if statics.rope is not None:
        found["q"], found["k"] = _rotate(statics, found["q"], found["k"], inverse=True)
    if statics.kv_layout == "HND":
        found["k"], found["v"] = jnp.swapaxes(found["k"], 0, 1), jnp.swapaxes(found["v"], 0, 1)
    return (tuple(like(found[name].astype(x.dtype), jax.typeof(x)) for name, x in by_name.items()),)


def _attention_statics(statics: DecodeStatics) -> AttentionStatics:
    return AttentionStatics(
        softmax_scale=statics.scale,
        window_size=(statics.window_left, -1),
        softcap=statics.softcap,
        deterministic=True,
        backend=statics.backend,
    )


def _attention_operands(statics: DecodeStatics, by_name: dict[str, Any]) -> dict[str, Any]:
    """The operands of attention with one query, by name. What is rotated is float32: it is rounded nowhere."""
    q, k, v = by_name["q"], by_name["k"], by_name["v"]
    if statics.kv_layout == "HND":
        k, v = jnp.swapaxes(k, 0, 1), jnp.swapaxes(v, 0, 1)
    if statics.rope is not None:
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        q, k = _rotate(statics, q, k, inverse=False)
    given = {"q": q[None, None], "k": k[None], "v": v[None]}
    return given | {name: by_name[name] for name in ("sinks", "alibi_slopes") if name in by_name}


def _rotate(statics: DecodeStatics, q: Any, k: Any, inverse: bool) -> tuple[Any, Any]:
    """q `[heads, head_dim]` at the position of the last key, and keys `[kv_len, heads, head_dim]` at theirs."""
    assert statics.rope is not None
    scale, theta = statics.rope
    rope = RopeStatics(scale=scale, theta=theta, inverse=inverse, backend=statics.backend)
    positions = jnp.arange(k.shape[0], dtype=jnp.int32)
    last = jnp.full((1,), max(k.shape[0] - 1, 0), jnp.int32)
    return rope_rules.rotate(rope, q[None], last)[0], rope_rules.rotate(rope, k, positions)


attention_decode.defvjp(_decode_forward, _decode_backward)
