"""Attention as a differentiable function: what its forward and backward pass are, and what is kept in between."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from heed._jax.ops import ATTENTION_BWD, ATTENTION_FWD
from heed._jax.primitive import PRIMITIVES, Operands
from heed._problem import FIRST_INTEGER_OPERAND, OPERAND_NAMES, AttentionStatics

Arrays = tuple[Any, ...]
Residuals = tuple[Arrays, Any, Any]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attention(statics: AttentionStatics, operands: Operands, arrays: Arrays) -> Arrays:
    """out[, lse] of the operands that are present."""
    return tuple(PRIMITIVES[ATTENTION_FWD].bind(*arrays, statics=statics, operands=operands))


def _forward(statics: AttentionStatics, operands: Operands, arrays: Arrays) -> tuple[Arrays, Residuals]:
    """The results are what is kept, under names that policies of `jax.checkpoint` may choose by."""
    with_lse = dataclasses.replace(statics, return_lse=True)
    out, lse = PRIMITIVES[ATTENTION_FWD].bind(*arrays, statics=with_lse, operands=operands)
    out, lse = checkpoint_name(out, "heed_attention_out"), checkpoint_name(lse, "heed_attention_lse")
    return ((out, lse) if statics.return_lse else (out,)), (arrays, out, lse)


def _backward(
    statics: AttentionStatics, operands: Operands, residuals: Residuals, cotangents: Arrays
) -> tuple[tuple[Any | None, ...]]:
    arrays, out, lse = residuals
    names = (*operands, "out", "lse", "dout", "dlse")[: len(operands) + 2 + len(cotangents)]
    gradients = attention_bwd(statics, names, (*arrays, out, lse, *cotangents))
    return (tuple(_of_operand(gradients.get(name), x) for name, x in zip(operands, arrays, strict=True)),)


attention.defvjp(_forward, _backward)


def _of_operand(gradient: Any | None, operand: Any) -> Any | None:
    """Integers have no gradient."""
    return None if gradient is None else like(gradient, jax.typeof(operand))


def like(gradient: Any, aval: Any) -> Any:
    """Under an explicit mesh a gradient is sharded as its operand is, whose type this is."""
    sharding = aval.sharding
    if not sharding.mesh.explicit_axes or jax.typeof(gradient).sharding == sharding:
        return gradient
    return jax.sharding.reshard(gradient, sharding)


def attention_bwd(statics: AttentionStatics, operands: Operands, arrays: Sequence[Any]) -> dict[str, Any]:
    """The gradients by the names of their operands, those of per-head values summed over the batch."""
    statics = dataclasses.replace(statics, return_lse=False)  # one problem, whatever the forward pass returned
    results = PRIMITIVES[ATTENTION_BWD].bind(*arrays, statics=statics, operands=operands)
    names = [name for name in OPERAND_NAMES[:FIRST_INTEGER_OPERAND] if name in operands]
    return {
        name: jnp.sum(x, axis=0) if name in ("sinks", "alibi_slopes") and x.ndim == 2 else x
        for name, x in zip(names, results, strict=True)
    }
