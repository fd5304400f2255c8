"""The types of a call's results: shapes and, under an explicit mesh, shardings. Here is refused what types can tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from heed._jax import axes


def result_types(operands: Sequence[str], avals: Sequence[Any], results: Sequence[str]) -> list[Any]:
    """The abstract values of results, in the dtype of q but for the statistics and gradients of per-head values."""
    layout = axes.layout_of(operands)
    q, k = avals[0], avals[1]
    mesh = next((aval.sharding.mesh for aval in avals if not aval.sharding.mesh.empty), q.sharding.mesh)
    sharded = _typed_axes(layout, operands, avals)
    if sharded:
        sharded["q_heads"] = _typed_head_axes(layout, sharded, q.shape[-2], k.shape[-2], mesh)
        _check_disjoint(layout, {axis: entry for axis, entry in sharded.items() if axis != "kv_heads"})
    typed = []
    for name, shape in zip(results, _result_shapes(layout, operands, avals, results), strict=True):
        entries = [sharded.get(axis) for axis in layout.names(name, len(shape))]
        entries = [None if size == 1 else entry for size, entry in zip(shape, entries, strict=True)]
        dtype = np.dtype(np.float32) if name in ("lse", "dsinks", "dalibi_slopes") else q.dtype
        sharding = NamedSharding(mesh, PartitionSpec(*entries))
        # `update` keeps what else a type has, such as the manual mesh axes that it varies over.
        typed.append(q.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding))
    return typed


def _result_shapes(
    layout: axes.Layout, operands: Sequence[str], avals: Sequence[Any], results: Sequence[str]
) -> list[tuple[int, ...]]:
    sizes: dict[str, int] = {}
    for name, aval in zip(operands, avals, strict=True):
        for axis, size in zip(layout.names(name, aval.ndim), aval.shape, strict=True):
            if size != 1 or axis not in sizes:  # 1: a leading axis that broadcasts. No "<": sizes may be symbols
                sizes[axis] = size
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
