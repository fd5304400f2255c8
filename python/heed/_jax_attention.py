"""Attention on JAX arrays and tracers: validates once, on unbatched shapes, and binds the primitive."""

# mypy: disable-error-code="no-untyped-call"
# JAX leaves parts of its API untyped.
from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from heed._versions import check_versions

check_versions(required=True)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from heed._arrays import numpy_to_int32  # noqa: E402
from heed._jax import axes, ffi_target, partition  # noqa: E402
from heed._jax.primitive import attention_fwd_p, check_placement, compiled  # noqa: E402
from heed._problem import (  # noqa: E402
    FIRST_INTEGER_OPERAND,
    OPERAND_NAMES,
    AttentionStatics,
    Spec,
    attention_text,
    function_of,
    require_kernel,
    resolve_attention,
)

__all__ = ["attention", "export_checks", "register_targets"]


def register_targets() -> None:
    """Tells XLA about heed's custom calls, for programs that were compiled or exported elsewhere."""
    ffi_target.register()
    partition.register()


def export_checks() -> list[Any]:
    """What `jax.export.export(..., disabled_checks=...)` needs to export programs that call heed.

    The process that runs such a program needs heed's targets as well: this call registers them there.
    """
    register_targets()
    return [jax.export.DisabledSafetyCheck.custom_call(ffi_target.TARGET_NAME)]


@functools.lru_cache(maxsize=4096)
def _validated(statics: AttentionStatics, operands: tuple[tuple[Any, tuple[int, ...]] | None, ...]) -> tuple[str, ...]:
    """Validates dtypes and shapes, once for each. Returns the names of the operands that are present."""
    specs: list[Spec | None] = [None if x is None else (x[0].name, x[1]) for x in operands]
    text = attention_text(statics, specs)
    resolution = resolve_attention(text, "cpu")  # raises on what is wrong, whoever serves it
    present = axes.present_operands([x is not None for x in operands])
    if statics.backend is not None and resolve_attention(text, "cuda").chosen is None:
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


def attention(statics: AttentionStatics, operands: Sequence[Any]) -> Any:
    """Attention on JAX values; `operands` follow `OPERAND_NAMES`, absent ones are None. Returns out or (out, lse)."""
    first = FIRST_INTEGER_OPERAND
    operands = (*operands[:first], *map(_to_int32, OPERAND_NAMES[first:], operands[first:]))
    present = _validated(statics, tuple([None if x is None else (x.dtype, x.shape) for x in operands]))
    arrays = [x for x in operands if x is not None]
    if any(isinstance(x, jax.core.Tracer) for x in arrays):
        values = _same_varying_axes([jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in arrays])
        results = attention_fwd_p.bind(*values, statics=statics, operands=present)
    else:
        check_placement(present, arrays)
        results = compiled(statics, present)(*arrays)
    return tuple(results) if statics.return_lse else results[0]


register_targets()
