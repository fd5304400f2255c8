"""The derivatives of rotary embeddings. A rotation is linear in q and k, and its transpose is the inverse rotation.

So derivatives of every order and in both modes are rotations themselves, and nothing is kept for the backward pass but
the positions. Importing this module registers the rules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from heed._jax.ops import ROPE
from heed._jax.primitive import PRIMITIVES, Operands
from heed._jax.vjp import like
from heed._small_ops import RopeStatics

_ROPE = PRIMITIVES[ROPE]


def _jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, statics: RopeStatics, operands: Operands
) -> tuple[Sequence[Any], Sequence[Any]]:
    by_name = dict(zip(operands, tangents, strict=True))
    if "cos_sin_cache" in by_name and not isinstance(by_name["cos_sin_cache"], ad.Zero):
        raise NotImplementedError(
            "heed.ops.apply_rope_with_cos_sin_cache: got a derivative with respect to cos_sin_cache, expected "
            "derivatives with respect to q and k only: the table is a constant. Put jax.lax.stop_gradient around it."
        )
    q_and_k = [ad.instantiate_zeros(tangent) for tangent in tangents[:2]]
    params = {"statics": statics, "operands": operands}
    return _ROPE.bind(*primals, **params), _ROPE.bind(*q_and_k, *primals[2:], **params)


def _transpose(cotangents: Sequence[Any], *primals: Any, statics: RopeStatics, operands: Operands) -> list[Any | None]:
    inverse = dataclasses.replace(statics, inverse=not statics.inverse)
    rotated = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
    gradients = _ROPE.bind(*rotated, *primals[2:], statics=inverse, operands=operands)
    return [
        _summed(gradient, x.aval) if ad.is_undefined_primal(x) else None
        for gradient, x in zip(gradients, primals[:2], strict=True)
    ] + [None] * (len(primals) - 2)


def _summed(gradient: Any, aval: Any) -> Any:
    """The gradient of an operand whose leading axes of size 1 were broadcast."""
    axes = [i for i, (size, full) in enumerate(zip(aval.shape, gradient.shape, strict=True)) if size != full]
    return like(jnp.sum(gradient, axis=axes, keepdims=True) if axes else gradient, aval)


def rope(statics: RopeStatics, operands: Operands, arrays: Sequence[Any]) -> tuple[Any, Any]:
    """(q_rope, k_rope) of the operands that are present."""
    q_rope, k_rope = _ROPE.bind(*arrays, statics=statics, operands=operands)
    return q_rope, k_rope


def rotate(statics: RopeStatics, x: jax.Array, positions: jax.Array) -> jax.Array:
    """One tensor [tokens, heads, head_dim] at the given positions. The rotation of two takes a single head of zeros."""
    zeros = jnp.zeros((x.shape[0], 1, x.shape[2]), x.dtype)
    return rope(statics, ("q", "k", "pos_ids"), (x, zeros, positions))[0]


ad.primitive_jvps[_ROPE] = _jvp
ad.primitive_transposes[_ROPE] = _transpose
