"""The types of a call's results: shapes and, under an explicit mesh, shardings. Here is refused what types can tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from heed._jax import axes
from heed._jax.ops import Call

_FLOAT32_RESULTS = ("lse", "dsinks", "dalibi_slopes", "dweight")


def result_types(call: Call, avals: Sequence[Any]) -> list[Any]:
    """The abstract values of a call's results: statistics and sums in float32, the others in the dtype of q or x."""
    layout, operands = call.layout, tuple(call.operands)
    first = avals[0]
    mesh = next((aval.sharding.mesh for aval in avals if not aval.sharding.mesh.empty), first.sharding.mesh)
    sharded = _typed_axes(layout, operands, avals)
    if sharded:
        if layout.has_heads and layout.heads_are_tied:
            sharded["q_heads"] = _typed_head_axes(layout, sharded, *layout.heads(call.operands), mesh)
        else:
            _check_disjoint(layout, {axis: entry for axis, entry in sharded.items() if axis != "q_heads"})
        _check_disjoint(layout, {axis: entry for axis, entry in sharded.items() if axis != "kv_heads"})
    by_name = dict(zip(operands, avals, strict=True))
    own = {result: by_name[operand] for operand, result in call.op.own_results}
    typed = []
    for name, shape in zip(call.results, _result_shapes(call), strict=True):
        entries = [sharded.get(axis) for axis in layout.names(name, len(shape))]
        entries = [None if size == 1 else entry for size, entry in zip(shape, entries, strict=True)]
        dtype = np.dtype(np.float32) if name in _FLOAT32_RESULTS else first.dtype
        sharding = NamedSharding(mesh, PartitionSpec(*entries))
        # `update` keeps what else a type has, such as the manual mesh axes that it varies over.
        like = own.get(name, first)
        typed.append(like.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding))
    return typed


def _result_shapes(call: Call) -> list[tuple[int, ...]]:
    layout, sizes = call.layout, dict[str, int]()
    for name, shape in call.operands.items():
        for axis, size in zip(layout.names(name, len(shape)), shape, strict=True):
            if size != 1 or axis not in sizes:  # 1: a leading axis that broadcasts
                sizes[axis] = size
    for axis, whole in layout.halves.items():
        sizes[axis] = sizes[whole] // 2
    first, shape = next(iter(call.operands.items()))
    num_lead = layout.num_lead(first, len(shape))
    return [
        tuple(sizes[axis] for axis in layout.names(name, num_lead + len(layout.trailing[name])))
        for name in call.results
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
            if not layout.is_shardable(axis):
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
