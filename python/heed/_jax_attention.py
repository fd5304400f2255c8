"""Attention on JAX arrays and tracers: validates once, on unbatched shapes, and binds the primitive."""

# mypy: disable-error-code="no-untyped-call"
# JAX leaves parts of its API untyped.
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from heed._versions import check_versions

check_versions(required=True)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from heed._arrays import numpy_to_int32  # noqa: E402
from heed._jax import ffi_target, partition, vjp  # noqa: E402
from heed._jax.ops import ATTENTION_BWD, ATTENTION_FWD, OPS, Op  # noqa: E402
from heed._jax.primitive import check_placement, compiled  # noqa: E402
from heed._problem import (  # noqa: E402
    FIRST_INTEGER_OPERAND,
    GRADIENT_NAMES,
    OPERAND_NAMES,
    AttentionStatics,
    function_of,
    require_kernel,
)

__all__ = ["attention", "attention_bwd", "export_checks", "register_targets"]


def register_targets() -> None:
    """Tells XLA about heed's custom calls, for programs that were compiled or exported elsewhere."""
    ffi_target.register()
    partition.register()


def export_checks() -> list[Any]:
    """What `jax.export.export(..., disabled_checks=...)` needs to export programs that call heed.

    The process that runs such a program needs heed's targets as well: this call registers them there.
    """
    register_targets()
    return [jax.export.DisabledSafetyCheck.custom_call(op.target_name) for op in OPS]


@dataclasses.dataclass(frozen=True)
class _Described:
    dtype: str
    shape: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def _validated(
    op: Op, statics: AttentionStatics, operands: tuple[tuple[Any, tuple[int, ...]] | None, ...]
) -> tuple[str, ...]:
    """Validates dtypes and shapes, once for each. Returns the names of the operands that are present."""
    present = op.present(operands)
    text = op.text(statics, present, [_Described(x[0].name, x[1]) for x in operands if x is not None])
    resolution = op.resolve(text, "cpu")  # raises on what is wrong, whoever serves it
    if statics.backend is not None and op.resolve(text, "cuda").chosen is None:
        require_kernel(resolution, function_of(present), "cpu")  # served on no platform: no need to wait
    return present


def _same_varying_axes(arrays: Sequence[Any]) -> list[Any]:
    """Inside `shard_map` every operand of a primitive must vary over the same manual mesh axes."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    union = frozenset[str]().union(*varying)
    return [
        jax.lax.pcast(x, tuple(sorted(union - own)), to="varying") if own != union else x
        for x, own in zip(arrays, varying, strict=True)
    ]


def _to_int32(name: str, x: Any) -> Any:
    """Integers of any width as int32. NumPy values are checked; JAX's are clamped to what int32 holds."""
    if x is None or x.dtype == jnp.int32:
        return x
    if isinstance(x, np.ndarray):
        return numpy_to_int32(name, x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name}: got dtype {x.dtype}, expected an integer dtype")
    wide, narrow = jnp.iinfo(x.dtype), jnp.iinfo(jnp.int32)
    if wide.max > narrow.max:
        x = jnp.clip(x, max(wide.min, narrow.min), narrow.max)
    return x.astype(jnp.int32)


def _prepare(op: Op, statics: AttentionStatics, operands: Sequence[Any]) -> tuple[tuple[str, ...], list[Any], bool]:
    """The operands that are there: their names, their values, and whether any of these is traced."""
    first, last = FIRST_INTEGER_OPERAND, len(OPERAND_NAMES)
    integers = map(_to_int32, OPERAND_NAMES[first:], operands[first:last])
    operands = (*operands[:first], *integers, *operands[last:])
    present = _validated(op, statics, tuple([None if x is None else (x.dtype, x.shape) for x in operands]))
    arrays = [x for x in operands if x is not None]
    if any(isinstance(x, jax.core.Tracer) for x in arrays):
        arrays = [jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in arrays]
        # Outside of the differentiable function, so that gradients are summed over the axes that are added here.
        return present, _same_varying_axes(arrays), True
    check_placement(present, arrays)
    return present, arrays, False


def attention(statics: AttentionStatics, operands: Sequence[Any]) -> Any:
    """Attention on JAX values; `operands` follow `OPERAND_NAMES`, absent ones are None. Returns out or (out, lse)."""
    present, arrays, is_traced = _prepare(ATTENTION_FWD, statics, operands)
    if is_traced:
        results = vjp.attention(statics, present, tuple(arrays))
    else:
        results = compiled(ATTENTION_FWD, statics, present)(*arrays)
    return tuple(results) if statics.return_lse else results[0]


def attention_bwd(statics: AttentionStatics, operands: Sequence[Any]) -> tuple[Any | None, ...]:
    """The gradients of attention on JAX values; `operands` follow `BWD_OPERAND_NAMES`, absent ones are None.

    Returns one for each of `GRADIENT_NAMES`, None where its operand is absent.
    """
    present, arrays, _ = _prepare(ATTENTION_BWD, statics, operands)
    gradients = vjp.attention_bwd(statics, present, arrays)
    return tuple(gradients.get(name.removeprefix("d")) for name in GRADIENT_NAMES)


register_targets()
