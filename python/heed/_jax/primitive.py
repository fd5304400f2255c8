"""The JAX primitive of each op, and what primitives share: types, batching and lowering.

Operands are those present, in the order of the op's `operand_names`. Each has the same number of leading axes, of full
size or 1 (which broadcasts): `vmap` adds one per level. Results have all leading axes in full. No primitive but that of
`rope` (`rope_rules.py`) has a derivative: `vjp.py` and `small_vjp.py` make one that of another.
"""

# mypy: disable-error-code="no-untyped-call"
# JAX leaves parts of its API untyped.
from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import SingleDeviceSharding
from jaxlib.mlir.dialects import stablehlo

from heed._jax import devices, ffi_target, partition, types
from heed._jax.ops import OPS, WORKSPACE, Op

Operands = tuple[str, ...]


def _abstract_eval(op: Op, *avals: Any, statics: Any, operands: Operands) -> list[Any]:
    return types.result_types(op.call(statics, operands, avals), avals)


def _jvp(op: Op, primals: Any, tangents: Any, *, statics: Any, operands: Operands) -> Any:
    """Reached by differentiating a gradient, never by differentiating a function (which has a rule of its own)."""
    what = op.call(statics, operands, primals).layout.function
    raise NotImplementedError(
        f"heed.{what}: got a derivative of its gradient, expected first derivatives only. The backward pass is a "
        "kernel that has no derivative itself: jax.grad of jax.grad, jax.hessian and the like do not work through it. "
        "Put jax.lax.stop_gradient around the operands if the second derivative is not meant to flow."
    )


def _batch(
    primitive: Primitive, args: Sequence[Any], dims: Sequence[Any], **params: Any
) -> tuple[list[Any], list[int]]:
    """The mapped axis becomes the first leading axis. An operand that is not mapped gets size 1 there: no copies."""
    moved = [
        jnp.expand_dims(x, 0) if dim is None else jnp.moveaxis(x, dim, 0) for x, dim in zip(args, dims, strict=True)
    ]
    results = primitive.bind(*moved, **params)
    return results, [0] * len(results)


# Lowering. The call is the same text for every platform (each has its own handler under the target's name), so one rule
# checks every platform that the program is for. What cannot be served raises here, with heed's own error type.


def _is_manual(context: Any) -> bool:
    """Whether the program that is being lowered is one device's share (inside `shard_map`): XLA will not divide it."""
    return isinstance(context, mlir.SPMDAxisContext) and set(context.manual_axes) == set(context.mesh.axis_names)


def _lower(op: Op, ctx: Any, *values: Any, statics: Any, operands: Operands) -> Any:
    called = op.call(statics, operands, ctx.avals_in)
    platforms = ctx.platforms or ctx.module_context.platforms
    workspace = devices.prepare(op, called.problem, platforms, called.layout.function)
    ffi_target.register()
    partition.register()
    is_manual = _is_manual(ctx.module_context.axis_context)
    if not is_manual:
        partition.refuse_visible(called, values)
    shapes = dict(zip(called.results, [aval.shape for aval in ctx.avals_out], strict=True))
    result_types = [ffi_target.tensor_type(aval.shape, aval.dtype) for aval in ctx.avals_out]
    if workspace is not None:
        shapes[WORKSPACE] = workspace
        result_types.append(ffi_target.tensor_type(workspace, jnp.float32))
    groups = "" if is_manual else partition.device_groups(ctx.module_context.axis_context)
    call = ffi_target.emit_call(op, values, result_types, called.problem, groups)
    if not is_manual:  # also for one device: an exported program may be called on sharded arrays
        call.operation.attributes["sdy.sharding_rule"] = partition.sharding_rule(called, shapes)
    results = list(call.results)[: len(ctx.avals_out)]
    if "cuda" in platforms:
        # Where a result is both used and written into a larger array (a scan's stacked outputs), XLA's GPU compiler
        # would make two calls of one, to write one result in place. It does not look through a barrier.
        results = stablehlo.OptimizationBarrierOp(results).results
    return [_constrain(ctx, x, aval) for x, aval in zip(results, ctx.avals_out, strict=True)]


def _constrain(ctx: Any, value: Any, aval: Any) -> Any:
    """Under an explicit mesh the value gets the sharding that its type states."""
    if not aval.sharding.mesh.explicit_axes:
        return value
    constrain = functools.partial(jax.sharding.reshard, out_shardings=aval.sharding)
    lower = mlir.lower_fun(constrain, multiple_results=False)
    (constrained,) = lower(ctx.replace(avals_in=[aval], avals_out=[aval]), value)
    return constrained


def _define(op: Op) -> Primitive:
    primitive = Primitive(f"heed_{op.stem}")
    primitive.multiple_results = True
    primitive.def_abstract_eval(functools.partial(_abstract_eval, op))
    primitive.def_impl(functools.partial(run, op))
    ad.primitive_jvps[primitive] = functools.partial(_jvp, op)
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
    # Not cacheable: the rule looks at where its operands come from.
    mlir.register_lowering(primitive, functools.partial(_lower, op), cacheable=False)
    return primitive


# Eager calls.


def run(op: Op, *arrays: Any, statics: Any, operands: Operands) -> Any:
    """Runs the op on concrete arrays, at once."""
    check_placement(op, statics, operands, arrays)
    with jax.disable_jit(False):  # the only way to run is compiled, whatever the user set
        return compiled(op, statics, operands)(*arrays)


@functools.lru_cache(maxsize=1024)
def compiled(op: Op, statics: Any, operands: Operands) -> Any:
    """The jitted call for eager use: JAX's own fast path, with the static arguments in this cache's key."""
    primitive = PRIMITIVES[op]

    def call(*arrays: Any) -> Any:
        return primitive.bind(*arrays, statics=statics, operands=operands)

    call.__name__ = f"heed_{op.stem}"
    return jax.jit(call)


def check_placement(op: Op, statics: Any, operands: Sequence[str], arrays: Sequence[Any]) -> None:
    """Refuses concrete arrays that are sharded along an axis that cannot stay sharded."""
    for name, array in zip(operands, arrays, strict=True):
        sharding = getattr(array, "sharding", None)
        if sharding is None or type(sharding) is SingleDeviceSharding or sharding.is_fully_replicated:
            continue
        layout = op.call(statics, operands, arrays).layout
        local = sharding.shard_shape(array.shape)
        for axis, size, local_size in zip(layout.names(name, array.ndim), array.shape, local, strict=True):
            if local_size != size and not layout.is_shardable(axis):
                raise layout.refuse_axis(name, axis, array.shape, f"{-(-size // local_size)} ways")


PRIMITIVES = {op: _define(op) for op in OPS}
