"""What happens to the operands of a call before its primitive sees them: validated once, on unbatched shapes."""

# mypy: disable-error-code="no-untyped-call"
# JAX leaves parts of its API untyped.
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from heed._arrays import numpy_to_int32
from heed._jax.ops import Op
from heed._jax.primitive import check_placement
from heed._problem import require_kernel


@dataclasses.dataclass(frozen=True)
class _Described:
    dtype: str
    shape: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def _validated(op: Op, statics: Any, operands: tuple[tuple[Any, tuple[int, ...]] | None, ...]) -> tuple[str, ...]:
    """Validates dtypes and shapes, once for each. Returns the names of the operands that are present."""
    present = op.present(operands)
    described = [_Described(x[0].name, x[1]) for x in operands if x is not None]
    text = op.text(statics, present, described)
    resolution = op.resolve(text, "cpu")  # raises on what is wrong, whoever serves it
    if statics.backend is not None and op.resolve(text, "cuda").chosen is None:
        what = op.call(statics, present, described).layout.function
        require_kernel(resolution, what, "cpu")  # served on no platform: no need to wait
    return present


def _same_varying_axes(op: Op, names: Sequence[str], arrays: Sequence[Any]) -> list[Any]:
    """Inside `shard_map` the operands that a result depends on must vary over the same manual mesh axes.

    A result that depends on one operand of several, and on what these share, varies as that one and those do.
    """
    varying = {name: jax.typeof(x).manual_axis_type.varying for name, x in zip(names, arrays, strict=True)}
    separate = [operand for operand, _ in op.own_results]
    shared = frozenset[str]().union(*(axes for name, axes in varying.items() if name not in separate))
    if separate:
        wanted = {name: axes | shared if name in separate else axes for name, axes in varying.items()}
    else:
        wanted = dict.fromkeys(names, shared)
    return [
        jax.lax.pcast(x, tuple(sorted(wanted[name] - varying[name])), to="varying")
        if wanted[name] != varying[name]
        else x
        for name, x in zip(names, arrays, strict=True)
    ]


def _to_int32(name: str, x: Any) -> Any:
    """Integers of any width as int32. NumPy values are checked; JAX's are clamped to what int32 holds."""
    if x.dtype == jnp.int32:
        return x
    if isinstance(x, np.ndarray):
        return numpy_to_int32(name, x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name}: got dtype {x.dtype}, expected an integer dtype")
    wide, narrow = jnp.iinfo(x.dtype), jnp.iinfo(jnp.int32)
    if wide.max > narrow.max:
        x = jnp.clip(x, max(wide.min, narrow.min), narrow.max)
    return x.astype(jnp.int32)


def prepare(op: Op, statics: Any, operands: Sequence[Any]) -> tuple[tuple[str, ...], list[Any], bool]:
    """The operands that are there: their names, their values, and whether any of these is traced.

    `operands` follow the op's `operand_names`; absent ones are None.
    """
    operands = [
        x if x is None or name not in op.integers else _to_int32(name, x)
        for name, x in zip(op.operand_names, operands, strict=True)
    ]
    present = _validated(op, statics, tuple([None if x is None else (x.dtype, x.shape) for x in operands]))
    arrays = [x for x in operands if x is not None]
    if any(isinstance(x, jax.core.Tracer) for x in arrays):
        arrays = [jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in arrays]
        # Outside of the differentiable function, so that gradients are summed over the axes that are added here.
        return present, _same_varying_axes(op, present, arrays), True
    check_placement(op, statics, present, arrays)
    return present, arrays, False
