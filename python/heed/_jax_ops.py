"""The small ops on JAX arrays and tracers: validates once, on unbatched shapes, and binds the primitives.

Each function is named by its op's stem and takes the operands in the order of its `operand_names`, absent ones None.
"""

from __future__ import annotations

from typing import Any

from heed import _jax_attention as _jax_attention  # checks versions, registers heed's custom calls
from heed._jax import rope_rules, small_vjp
from heed._jax.operands import prepare
from heed._jax.ops import ACT_AND_MUL, ATTENTION_DECODE, RMS_NORM, ROPE
from heed._jax.primitive import compiled
from heed._small_ops import ActStatics, DecodeStatics, NormStatics, RopeStatics


def act_and_mul(statics: ActStatics, x: Any) -> Any:
    """out of x."""
    present, arrays, is_traced = prepare(ACT_AND_MUL, statics, (x,))
    if is_traced:
        return small_vjp.act_and_mul(statics, *arrays)
    return compiled(ACT_AND_MUL, statics, present)(*arrays)[0]


def rope(
    statics: RopeStatics, q: Any, k: Any, indptr: Any = None, offsets: Any = None, pos_ids: Any = None,
    cos_sin_cache: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """q_rope and k_rope."""
    present, arrays, is_traced = prepare(ROPE, statics, (q, k, indptr, offsets, pos_ids, cos_sin_cache))
    if is_traced:
        return rope_rules.rope(statics, present, arrays)
    q_rope, k_rope = compiled(ROPE, statics, present)(*arrays)
    return q_rope, k_rope


def rms_norm(statics: NormStatics, x: Any, weight: Any, residual: Any = None) -> Any:
    """out, or (out, sum) if there is a residual."""
    present, arrays, is_traced = prepare(RMS_NORM, statics, (x, weight, residual))
    if is_traced:
        results = small_vjp.rms_norm(statics, present, tuple(arrays))
    else:
        results = compiled(RMS_NORM, statics, present)(*arrays)
    return results[0] if residual is None else tuple(results)


def attention_decode(
    statics: DecodeStatics, q: Any, k: Any, v: Any, sinks: Any = None, alibi_slopes: Any = None
) -> Any:
    """out, or (out, lse)."""
    present, arrays, is_traced = prepare(ATTENTION_DECODE, statics, (q, k, v, sinks, alibi_slopes))
    if is_traced:
        results = small_vjp.attention_decode(statics, present, tuple(arrays))
    else:
        results = compiled(ATTENTION_DECODE, statics, present)(*arrays)
    return tuple(results) if statics.return_lse else results[0]
