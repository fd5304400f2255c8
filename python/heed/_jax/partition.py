"""How XLA splits an attention call over devices: the Shardy rule and the partitioner of heed's custom call.

Leading axes, batch and heads split with no communication. The partitioner sees how every operand really lies on the
devices and takes a split only if each device already holds all that its share needs; anything else is an error, because
XLA would otherwise move data silently. Both rule and partitioner belong to the target's name and read the problem from
the call itself, so programs carry no Python object: exported and cached multi-device programs work in other processes.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxlib import xla_client
from jaxlib.mlir import ir

from heed._jax import axes, ffi_target

Shape = tuple[int, ...]


def sharding_rule(operands: Mapping[str, Shape], results: Mapping[str, Shape]) -> Any:
    """The Shardy rule for propagation (call it inside an MLIR context).

    Batch, heads and leading axes share factors between tensors. A size-1 leading axis that broadcasts, a token axis and
    a head dim have a factor of their own in every tensor: nothing propagates along them. With grouped heads a query head
    axis is the product of the KV heads and the group.
    """
    sizes: dict[str, int] = {}
    q_heads = _size(operands, "q", "q_heads")
    kv_heads = _size(operands, "k", "kv_heads")
    group = q_heads // max(kv_heads, 1)
    is_grouped = 1 < kv_heads < q_heads

    def dim_factors(name: str, shape: Shape, position: int, axis: str) -> list[str]:
        size = shape[position]
        full = results["out"][position] if axis.startswith("lead") else size
        if size != full or not axes.is_shardable(axis):
            axis = f"{name}:{axis}"
        elif axis == "q_heads" and is_grouped:
            sizes["group"], sizes["kv_heads"] = group, kv_heads
            return ["kv_heads", "group"]
        elif axis == "kv_heads" and kv_heads == q_heads:
            axis = "q_heads"
        sizes[axis] = size
        return [axis]

    mapped = [
        [dim_factors(name, shape, i, axis) for i, axis in enumerate(axes.axis_names(name, len(shape)))]
        for name, shape in (*operands.items(), *results.items())
    ]
    symbols = {factor: _factor_symbol(i) for i, factor in enumerate(sizes)}

    def mapping(tensors: Sequence[Sequence[Sequence[str]]]) -> str:
        return ", ".join(
            "[" + ", ".join("".join(symbols[f] for f in factors) for factors in tensor) + "]" for tensor in tensors
        )

    n = len(operands)
    factor_sizes = ", ".join(f"{symbols[factor]}={size}" for factor, size in sizes.items())
    text = f"#sdy.op_sharding_rule<({mapping(mapped[:n])})->({mapping(mapped[n:])}) {{{factor_sizes}}}, custom>"
    return ir.Attribute.parse(text)


def _factor_symbol(index: int) -> str:
    """Shardy's names of factors: i to z, then z_1, z_2, ..."""
    return chr(ord("i") + index) if index < 18 else f"z_{index - 17}"


def _size(shapes: Mapping[str, Shape], name: str, axis: str) -> int:
    shape = shapes[name]
    return shape[axes.axis_names(name, len(shape)).index(axis)]


def refuse_visible(names: Sequence[str], avals: Sequence[Any], values: Sequence[Any]) -> None:
    """Refuses while lowering what the program states about its operands, so that the error is a plain ValueError.

    What only propagation finds is refused by the partitioner, whose errors XLA wraps in its own.
    """
    for name, aval, value in zip(names, avals, values, strict=True):
        # Its text: #sdy.sharding<@mesh, [{"x"}, {}, {"y", ?}, {}]>, one pair of braces per axis.
        braces = re.findall(r"\{([^{}]*)\}", _stated_sharding(value))
        for axis, dim in zip(axes.axis_names(name, aval.ndim), braces, strict=False):
            mesh_axes = re.findall(r'"[^"]+"', dim)
            if mesh_axes and not axes.is_shardable(axis):
                raise axes.refuse_axis(name, axis, aval.shape, f"over {', '.join(mesh_axes)}")


def _stated_sharding(value: Any) -> str:
    """The sharding of a value that is an argument of the program or was just constrained, else an empty text."""
    if isinstance(value.owner, ir.Block):
        attributes = value.owner.owner.attributes
        if "arg_attrs" not in attributes:
            return ""
        attributes, name = attributes["arg_attrs"][list(value.owner.arguments).index(value)], "sdy.sharding"
    elif value.owner.name == "sdy.sharding_constraint":
        attributes, name = value.owner.attributes, "sharding"
    else:
        return ""
    return str(attributes[name]) if name in attributes else ""


@dataclass(frozen=True)
class Tiling:
    """Which device holds which tile: `devices` has one axis per tensor axis, then one over manual mesh axes, then copies."""

    devices: np.ndarray

    @property
    def tiles(self) -> Shape:
        return self.devices.shape[:-2]

    @staticmethod
    def whole(rank: int, num_devices: int) -> Tiling:
        return Tiling(np.arange(num_devices).reshape((1,) * (rank + 1) + (num_devices,)))

    @staticmethod
    def parse(sharding: Any, rank: int) -> Tiling | None:
        """None: every device holds everything."""
        if not sharding.is_tiled():
            return None
        devices = np.asarray(sharding.tile_assignment_devices()).reshape(sharding.tile_assignment_dimensions())
        kinds = list(sharding.subgroup_types())
        if not kinds and sharding.replicate_on_last_tile_dim():
            kinds = [xla_client.OpSharding.Type.REPLICATED]
        manual = [rank + i for i, kind in enumerate(kinds) if kind == xla_client.OpSharding.Type.MANUAL]
        copies = [rank + i for i, kind in enumerate(kinds) if kind == xla_client.OpSharding.Type.REPLICATED]
        if len(manual) + len(copies) != devices.ndim - rank:
            raise ValueError(f"flash_mha: cannot read the sharding {sharding}: pass operands that are not unreduced")
        counts = [math.prod(devices.shape[i] for i in group) for group in (manual, copies)]
        devices = devices.transpose([*range(rank), *manual, *copies])
        return Tiling(devices.reshape(*devices.shape[:rank], *counts))

    def to_xla(self) -> Any:
        num_manual, num_copies = self.devices.shape[-2:]
        if num_manual == 1 and math.prod(self.tiles) == 1:
            return xla_client.HloSharding.replicate()
        kinds = xla_client.OpSharding.Type
        proto = xla_client.OpSharding()
        proto.type = kinds.OTHER
        proto.tile_assignment_dimensions = list(self.tiles)
        if num_manual > 1:
            proto.tile_assignment_dimensions = list(self.devices.shape)
            proto.last_tile_dims = [kinds.MANUAL, kinds.REPLICATED]
        elif num_copies > 1:
            proto.tile_assignment_dimensions = [*self.tiles, num_copies]
            proto.replicate_on_last_tile_dim = True
        proto.tile_assignment_devices = self.devices.reshape(-1).tolist()
        return xla_client.HloSharding.from_proto(proto)

    def covers(self, other: Tiling, shape: Shape) -> bool:
        """Whether every device's tile here contains its tile there, so that cutting it out needs no communication."""
        for axis, size in enumerate(shape):
            first, last = self._range(axis, size)
            other_first, other_last = other._range(axis, size)
            if ((other_last > other_first) & ((other_first < first) | (other_last > last))).any():
                return False
        return True

    def _range(self, axis: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Per device, the elements of an axis that it holds."""
        chunk = -(-size // self.tiles[axis])
        index = np.empty(self.devices.size, dtype=np.int64)
        index[self.devices.reshape(-1)] = np.indices(self.devices.shape)[axis].reshape(-1)
        return np.minimum(index * chunk, size), np.minimum((index + 1) * chunk, size)


@dataclass(frozen=True)
class Split:
    """One way to divide the call: device ids over [lead..., batch, KV head shards, shards per KV head, manual, copies]."""

    devices: np.ndarray

    @property
    def num_lead(self) -> int:
        return self.devices.ndim - 5

    @staticmethod
    def along(name: str, shape: Shape, tiling: Tiling, num_lead: int, q_heads: int, kv_heads: int) -> Split | None:
        """The division that follows one tensor's tiles. None if its heads cannot be divided so."""
        names = axes.axis_names(name, len(shape))
        wanted = [f"lead{i}" for i in range(num_lead)] + ["batch", "q_heads" if "q_heads" in names else "kv_heads"]
        kept = [names.index(axis) if axis in names else None for axis in wanted]
        rest = [i for i in range(len(names)) if i not in kept]  # token axes of a result: the tiles hold the same rows
        rank = len(shape)
        devices = tiling.devices.transpose([*(i for i in kept if i is not None), rank, *rest, rank + 1])
        counts = [1 if i is None else tiling.tiles[i] for i in kept]
        ways = counts.pop()
        kv_ways = axes.kv_head_shards(q_heads, kv_heads, ways)
        if kv_ways is None or (wanted[-1] == "kv_heads" and kv_ways != ways):
            return None
        manual = tiling.devices.shape[-2]
        return Split(devices.reshape(*counts, kv_ways, ways // kv_ways, manual, -1))

    def tiling(self, name: str, shape: Shape) -> Tiling:
        """How a tensor lies on the devices under this division."""
        lead = self.num_lead
        sources: dict[str, tuple[int, ...]] = {f"lead{i}": (i,) for i in range(lead)}
        sources |= {"batch": (lead,), "q_heads": (lead + 1, lead + 2), "kv_heads": (lead + 1,)}
        names = axes.axis_names(name, len(shape))
        kept = [
            () if axis.startswith("lead") and size == 1 else sources.get(axis, ())
            for axis, size in zip(names, shape, strict=True)
        ]
        used = [i for group in kept for i in group]
        copies = [i for i in range(self.devices.ndim) if i not in used and i != lead + 3]
        tiles = [math.prod(self.devices.shape[i] for i in group) for group in kept]
        devices = self.devices.transpose([*used, lead + 3, *copies])
        return Tiling(devices.reshape(*tiles, self.devices.shape[lead + 3], -1))


def choose_split(
    operands: Mapping[str, Shape],
    results: Mapping[str, Shape],
    tilings: Mapping[str, Tiling],
) -> Split:
    """The finest division that some tensor's tiles suggest and for which every device already holds its operands."""
    for name, shape in operands.items():
        for axis, ways in zip(axes.axis_names(name, len(shape)), tilings[name].tiles, strict=True):
            if ways > 1 and not axes.is_shardable(axis):
                raise axes.refuse_axis(name, axis, shape, f"{ways} ways")
    q_heads, kv_heads = _size(operands, "q", "q_heads"), _size(operands, "k", "kv_heads")
    num_lead = axes.num_lead_axes("q", len(operands["q"]))
    shapes = {**operands, **results}
    splits = []
    for name in ("q", "out", "k", *(name for name in shapes if name not in ("q", "out", "k"))):
        split = Split.along(name, shapes[name], tilings[name], num_lead, q_heads, kv_heads)
        if split is not None:
            splits.append(split)
    splits.sort(key=lambda split: -math.prod(split.devices.shape[:-2]))  # stable: q first among equals
    for split in splits:
        if all(tilings[name].covers(split.tiling(name, shape), shape) for name, shape in operands.items()):
            return split
    ways = _tiles_of(operands, tilings, "q", "q_heads")
    if axes.kv_head_shards(q_heads, kv_heads, ways) is None:
        raise axes.refuse_heads(q_heads, kv_heads, ways)
    raise ValueError(
        "flash_mha: the operands' shardings do not fit together: "
        + "; ".join(_describe(name, shape, tilings[name]) for name, shape in operands.items())
        + ". No device would hold what its share needs, and heed never moves an input silently: shard batch and heads "
        "of all operands along the same mesh axes (jax.lax.with_sharding_constraint moves an operand on purpose)."
    )


def _tiles_of(shapes: Mapping[str, Shape], tilings: Mapping[str, Tiling], name: str, axis: str) -> int:
    return tilings[name].tiles[axes.axis_names(name, len(shapes[name])).index(axis)]


def _describe(name: str, shape: Shape, tiling: Tiling) -> str:
    cut = [
        f"{axis} {ways} ways"
        for axis, ways in zip(axes.axis_names(name, len(shape)), tiling.tiles, strict=True)
        if ways > 1
    ]
    return f"{name} has {' and '.join(cut)}" if cut else f"{name} is whole on every device"


def _partition(
    operand_shapes: Sequence[Any],
    operand_shardings: Sequence[Any],
    result_shape: Any,
    result_sharding: Any,
    backend_config: bytes,
) -> tuple[bytes, list[Any], Any]:
    """XLA's callback: the per-device program, and how its operands and results are sharded."""
    problem = ffi_target.problem_of(backend_config)
    operand_names = ffi_target.operand_names(problem)
    is_tuple = result_shape.is_tuple()
    result_shapes = list(result_shape.tuple_shapes()) if is_tuple else [result_shape]
    result_shardings = list(result_sharding.tuple_elements()) if is_tuple else [result_sharding]
    result_names = ("out", "lse")[: len(result_shapes)]

    names = (*operand_names, *result_names)
    xla_shapes = dict(zip(names, (*operand_shapes, *result_shapes), strict=True))
    shardings = dict(zip(names, (*operand_shardings, *result_shardings), strict=True))
    if any(sharding.is_manual() for sharding in shardings.values()):  # inside shard_map: what XLA sees is a device's share
        local = {name: tuple(shape.dimensions()) for name, shape in xla_shapes.items()}
    else:
        shardings = _divide(operand_names, result_names, xla_shapes, shardings)
        local = {name: tuple(shardings[name].tile(shape).dimensions()) for name, shape in xla_shapes.items()}
    module = ffi_target.module_bytecode(
        [(local[name], xla_shapes[name].numpy_dtype()) for name in operand_names],
        [(local[name], xla_shapes[name].numpy_dtype()) for name in result_names],
        ffi_target.with_shapes(problem, local),
    )
    outputs = [shardings[name] for name in result_names]
    packed = xla_client.HloSharding.tuple_sharding(result_shape, outputs) if is_tuple else outputs[0]
    return module, [shardings[name] for name in operand_names], packed


def _divide(
    operand_names: Sequence[str], result_names: Sequence[str], xla_shapes: Mapping[str, Any], found: Mapping[str, Any]
) -> dict[str, Any]:
    """The shardings that the call takes, from those that XLA found."""
    shapes = {name: tuple(shape.dimensions()) for name, shape in xla_shapes.items()}
    parsed = {name: Tiling.parse(sharding, len(shapes[name])) for name, sharding in found.items()}
    num_devices = max((tiling.devices.size for tiling in parsed.values() if tiling is not None), default=1)
    tilings = {
        name: Tiling.whole(len(shapes[name]), num_devices) if tiling is None else tiling
        for name, tiling in parsed.items()
    }
    split = choose_split(
        {name: shapes[name] for name in operand_names}, {name: shapes[name] for name in result_names}, tilings
    )
    return {name: split.tiling(name, shape).to_xla() for name, shape in shapes.items()}


def _no_gspmd(*_: Any) -> Any:
    raise NotImplementedError("flash_mha on several devices needs the Shardy partitioner (jax_use_shardy_partitioner)")


@functools.cache
def register() -> None:
    """Gives XLA the partitioner of heed's custom call."""
    xla_client.register_custom_call_partitioner(
        ffi_target.TARGET_NAME, _no_gspmd, _partition, _no_gspmd, can_side_effecting_have_replicated_sharding=True
    )
