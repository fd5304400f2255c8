"""The JAX primitive of attention's forward pass and its rules: types, batching, differentiation (refused) and lowering.

Operands are those present, in the order of `OPERAND_NAMES`. Each has the same number of leading axes, of full size or 1
(which broadcasts): `vmap` adds one per level. Results are out[, lse].
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
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxlib.mlir.dialects import stablehlo

from heed._jax import axes, devices, ffi_target, partition
from heed._problem import OPERAND_NAMES, AttentionStatics, Spec, attention_text, function_of

attention_fwd_p = Primitive("heed_attention_fwd")
attention_fwd_p.multiple_results = True


def result_names(statics: AttentionStatics) -> tuple[str, ...]:
    return ("out", "lse") if statics.return_lse else ("out",)


def _problem_text(statics: AttentionStatics, operands: Sequence[str], avals: Sequence[Any]) -> str:
    specs: dict[str, Spec] = {name: (str(aval.dtype), aval.shape) for name, aval in zip(operands, avals, strict=True)}
    return attention_text(statics, [specs.get(name) for name in OPERAND_NAMES])


# Types: shapes, varying manual axes and, under an explicit mesh, shardings.


def _result_shapes(operands: Sequence[str], avals: Sequence[Any], results: Sequence[str]) -> list[tuple[int, ...]]:
    layout = axes.layout_of(operands)
    sizes: dict[str, int] = {}
    for name, aval in zip(operands, avals, strict=True):
        for axis, size in zip(layout.names(name, aval.ndim), aval.shape, strict=True):
            sizes[axis] = max(sizes.get(axis, 0), size) if size != 1 else sizes.get(axis, 1)
    num_lead = layout.num_lead("q", avals[0].ndim)
    return [
        tuple(sizes[axis] for axis in layout.names(name, num_lead + len(layout.trailing[name]))) for name in results
    ]


def _mesh_axes_of(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _typed_axes(layout: axes.Layout, operands: Sequence[str], avals: Sequence[Any]) -> dict[str, Any]:
    """Which mesh axes each axis of the call is sharded over, from the operands' types. Raises on what cannot be."""
    what = layout.function
    found: dict[str, tuple[str, Any]] = {}
    for name, aval in zip(operands, avals, strict=True):
        spec = aval.sharding.spec
        if getattr(spec, "unreduced", None):
            raise ValueError(f"{what}: {name}: got a sharding {spec} with unreduced axes, expected a reduced array")
        for axis, entry in zip(layout.names(name, aval.ndim), spec, strict=True):
            if entry is None or entry is PartitionSpec.UNCONSTRAINED:
                continue
            if not axes.is_shardable(axis):
                raise layout.refuse_axis(name, axis, aval.shape, f"over {entry!r}")
            other, known = found.setdefault(axis, (name, entry))
            if known != entry:
                raise ValueError(
                    f"{what}: {name}: got {axis} sharded over {entry!r} where {other} has it over {known!r}, "
                    "expected the same mesh axes (move one of them with jax.sharding.reshard)."
                )
    return {axis: entry for axis, (_, entry) in found.items()}


def _check_disjoint(layout: axes.Layout, sharded: dict[str, Any]) -> None:
    """Two axes of the results cannot be sharded over one mesh axis."""
    taken: dict[str, str] = {}
    for axis, entry in sharded.items():
        for mesh_axis in _mesh_axes_of(entry):
            other = taken.setdefault(mesh_axis, axis)
            if other != axis:
                raise ValueError(
                    f"{layout.function}: got both {other} and {axis} sharded over mesh axis {mesh_axis!r}, by "
                    "different operands, expected different mesh axes (move an operand with jax.sharding.reshard)."
                )


def _num_shards(mesh: Any, entry: Any) -> int:
    ways = 1
    for mesh_axis in _mesh_axes_of(entry):
        ways *= mesh.shape[mesh_axis]
    return ways


def _typed_head_axes(layout: axes.Layout, sharded: dict[str, Any], q_heads: int, kv_heads: int, mesh: Any) -> Any:
    """The mesh axes of the query heads, after checking that they agree with those of the KV heads."""
    q_entry, kv_entry = sharded.get("q_heads"), sharded.get("kv_heads")
    if q_entry is None:
        return kv_entry
    ways = _num_shards(mesh, q_entry)
    if axes.kv_head_shards(q_heads, kv_heads, ways) is None:
        raise layout.refuse_heads(q_heads, kv_heads, ways)
    if kv_entry is not None and _mesh_axes_of(q_entry)[: len(_mesh_axes_of(kv_entry))] != _mesh_axes_of(kv_entry):
        raise ValueError(
            f"{layout.function}: got query heads sharded over {q_entry!r} and KV heads over {kv_entry!r}, expected "
            "the same mesh axes (move one of them with jax.sharding.reshard)."
        )
    return q_entry


def _abstract_eval(*avals: Any, statics: AttentionStatics, operands: tuple[str, ...]) -> list[Any]:
    results, layout = result_names(statics), axes.layout_of(operands)
    shapes = _result_shapes(operands, avals, results)
    q, k = avals[0], avals[1]
    mesh = next((aval.sharding.mesh for aval in avals if not aval.sharding.mesh.empty), q.sharding.mesh)
    sharded = _typed_axes(layout, operands, avals)
    if sharded:
        sharded["q_heads"] = _typed_head_axes(layout, sharded, q.shape[-2], k.shape[-2], mesh)
        sharded.pop("kv_heads", None)
        _check_disjoint(layout, sharded)
    typed = []
    for name, shape in zip(results, shapes, strict=True):
        entries = [sharded.get(axis) for axis in layout.names(name, len(shape))]
        entries = [None if size == 1 else entry for size, entry in zip(shape, entries, strict=True)]
        dtype = q.dtype if name == "out" else jnp.dtype(jnp.float32)
        sharding = NamedSharding(mesh, PartitionSpec(*entries))
        # `update` keeps what else a type has, such as the manual mesh axes that it varies over.
        typed.append(q.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding))
    return typed


attention_fwd_p.def_abstract_eval(_abstract_eval)


# Differentiation.


def _jvp(primals: Any, tangents: Any, *, operands: tuple[str, ...], **_: Any) -> Any:
    raise NotImplementedError(
        f"heed.{function_of(operands)} has no gradients yet: this version of heed has the forward pass only, so "
        "jax.grad, jax.vjp and jax.jvp do not work through it. Use jax.lax.stop_gradient on its operands if no "
        "gradient is meant to flow."
    )


ad.primitive_jvps[attention_fwd_p] = _jvp


# Batching.


def _batch(args: Sequence[Any], dims: Sequence[Any], **params: Any) -> tuple[list[Any], list[int]]:
    """The mapped axis becomes the first leading axis. An operand that is not mapped gets size 1 there: no copies."""
    moved = [
        jnp.expand_dims(x, 0) if dim is None else jnp.moveaxis(x, dim, 0) for x, dim in zip(args, dims, strict=True)
    ]
    results = attention_fwd_p.bind(*moved, **params)
    return results, [0] * len(results)


batching.primitive_batchers[attention_fwd_p] = _batch


# Lowering. The call is the same text for every platform (each has its own handler under the target's name), so one rule
# checks every platform that the program is for. What cannot be served raises here, with heed's own error type.


def _is_manual(context: Any) -> bool:
    """Whether the program that is being lowered is one device's share (inside `shard_map`): XLA will not divide it."""
    return isinstance(context, mlir.SPMDAxisContext) and set(context.manual_axes) == set(context.mesh.axis_names)


def _lower(ctx: Any, *values: Any, statics: AttentionStatics, operands: tuple[str, ...]) -> Any:
    text = _problem_text(statics, operands, ctx.avals_in)
    platforms = ctx.platforms or ctx.module_context.platforms
    devices.prepare(text, platforms, function_of(operands))
    ffi_target.register()
    partition.register()
    is_manual = _is_manual(ctx.module_context.axis_context)
    if not is_manual:
        partition.refuse_visible(operands, ctx.avals_in, values)
    result_types = [ffi_target.tensor_type(aval.shape, aval.dtype) for aval in ctx.avals_out]
    call = ffi_target.emit_call(values, result_types, text)
    if not is_manual:  # also for one device: an exported program may be called on sharded arrays
        call.operation.attributes["sdy.sharding_rule"] = partition.sharding_rule(
            {name: aval.shape for name, aval in zip(operands, ctx.avals_in, strict=True)},
            {name: aval.shape for name, aval in zip(result_names(statics), ctx.avals_out, strict=True)},
        )
    results = call.results
    if "cuda" in platforms:
        # Where a result is both used and written into a larger array (a scan's stacked outputs), XLA's GPU compiler
        # would make two calls of one, to write one result in place. It does not look through a barrier.
        results = stablehlo.OptimizationBarrierOp(list(results)).results
    return [_constrain(ctx, x, aval) for x, aval in zip(results, ctx.avals_out, strict=True)]


def _constrain(ctx: Any, value: Any, aval: Any) -> Any:
    """Under an explicit mesh the value gets the sharding that its type states."""
    if not aval.sharding.mesh.explicit_axes:
        return value
    constrain = functools.partial(jax.sharding.reshard, out_shardings=aval.sharding)
    lower = mlir.lower_fun(constrain, multiple_results=False)
    (constrained,) = lower(ctx.replace(avals_in=[aval], avals_out=[aval]), value)
    return constrained


# Not cacheable: the rule looks at where its operands come from.
mlir.register_lowering(attention_fwd_p, _lower, cacheable=False)


# Eager calls.


@functools.lru_cache(maxsize=1024)
def compiled(statics: AttentionStatics, operands: tuple[str, ...]) -> Any:
    """The jitted call for eager use: JAX's own fast path, with the static arguments in this cache's key."""

    def heed_flash_mha(*arrays: Any) -> Any:
        return attention_fwd_p.bind(*arrays, statics=statics, operands=operands)

    return jax.jit(heed_flash_mha)


@attention_fwd_p.def_impl
def _impl(*arrays: Any, statics: AttentionStatics, operands: tuple[str, ...]) -> Any:
    check_placement(operands, arrays)
    with jax.disable_jit(False):  # the only way to run is compiled, whatever the user set
        return compiled(statics, operands)(*arrays)


def check_placement(operands: Sequence[str], arrays: Sequence[Any]) -> None:
    """Refuses concrete arrays that are sharded along an axis that attention cannot keep sharded."""
    layout = axes.layout_of(operands)
    for name, array in zip(operands, arrays, strict=True):
        sharding = getattr(array, "sharding", None)
        if sharding is None or type(sharding) is SingleDeviceSharding or sharding.is_fully_replicated:
            continue
        local = sharding.shard_shape(array.shape)
        for axis, size, local_size in zip(layout.names(name, array.ndim), array.shape, local, strict=True):
            if local_size != size and not axes.is_shardable(axis):
                raise layout.refuse_axis(name, axis, array.shape, f"{-(-size // local_size)} ways")
