"""How XLA splits a call over devices: the Shardy rule and the partitioner of heed's custom calls.

Leading axes, heads and what else may be divided (a batch, the rows of a norm) split with no communication, but for two
cases. Where query heads are divided more finely than KV heads, each of the devices that share a KV head has a part of
its gradient. Where rows are divided, each device has a part of the gradient of the weight. These parts are summed.

The partitioner sees how every operand really lies on the devices and takes a split only if each device already holds
all that its share needs; anything else is an error, because XLA would otherwise move data silently. Both rule and
partitioner belong to the target's name and read the problem from the call itself, so programs carry no Python object:
exported and cached multi-device programs work in other processes.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxlib import xla_client
from jaxlib.mlir import ir

from heed._jax import axes, devices, ffi_target
from heed._jax.ops import OPS, WORKSPACE, Call, Op, call_of
from heed._jax.tiling import Shape, Split, Tiling


def sharding_rule(call: Call, results: Mapping[str, Shape]) -> Any:
    """The Shardy rule for propagation (call it inside an MLIR context).

    Heads, leading axes and others that may be divided share factors between tensors. A size-1 leading axis that
    broadcasts and an axis that stays whole (tokens, a head dim) have a factor of their own in every tensor: nothing
    propagates along them. With grouped heads the query head axis is the product of the KV heads and the group; heads
    that are not tied have nothing in common.
    """
    sizes: dict[str, int] = {}
    layout, operands = call.layout, call.operands
    full_shape = next(iter(results.values()))  # its leading axes have their full size
    q_heads, kv_heads = layout.heads(operands)
    group = q_heads // max(kv_heads, 1)
    is_grouped = layout.heads_are_tied and 1 < kv_heads < q_heads

    def dim_factors(name: str, shape: Shape, position: int, axis: str) -> list[str]:
        size = shape[position]
        full = full_shape[position] if axis.startswith("lead") else size
        if size != full or not layout.is_shardable(axis):
            axis = f"{name}:{axis}"
        elif axis == "q_heads" and is_grouped:
            sizes["group"], sizes["kv_heads"] = group, kv_heads
            return ["kv_heads", "group"]
        elif axis == "kv_heads" and kv_heads == q_heads and layout.heads_are_tied:
            axis = "q_heads"
        sizes[axis] = size
        return [axis]

    mapped = [
        [dim_factors(name, shape, i, axis) for i, axis in enumerate(layout.names(name, len(shape)))]
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


def refuse_visible(call: Call, values: Sequence[Any]) -> None:
    """Refuses while lowering what the program states about its operands, so that the error is a plain ValueError.

    What only propagation finds is refused by the partitioner, whose errors XLA wraps in its own.
    """
    layout = call.layout
    for (name, shape), value in zip(call.operands.items(), values, strict=True):
        # Its text: #sdy.sharding<@mesh, [{"x"}, {}, {"y", ?}, {}]>, one pair of braces per axis.
        braces = re.findall(r"\{([^{}]*)\}", _stated_sharding(value))
        for axis, dim in zip(layout.names(name, len(shape)), braces, strict=False):
            mesh_axes = re.findall(r'"[^"]+"', dim)
            if mesh_axes and not layout.is_shardable(axis):
                raise layout.refuse_axis(name, axis, shape, f"over {', '.join(mesh_axes)}")


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


def choose_split(
    layout: axes.Layout,
    operands: Mapping[str, Shape],
    results: Mapping[str, Shape],
    tilings: Mapping[str, Tiling],
) -> Split:
    """The finest division that some tensor's tiles suggest and for which every device already holds its operands."""
    for name, shape in operands.items():
        for axis, ways in zip(layout.names(name, len(shape)), tilings[name].tiles, strict=True):
            if ways > 1 and not layout.is_shardable(axis):
                raise layout.refuse_axis(name, axis, shape, f"{ways} ways")
    num_heads = layout.heads(operands)
    kv_tiles = layout.size({"k": tilings["k"].tiles}, "k", "kv_heads") if layout.has_heads else 1
    shapes = {**operands, **results}
    splits: list[Split] = []
    first = [name for name in ("q", "x", "out", "k") if name in shapes]
    for name in (*first, *(name for name in shapes if name not in first)):
        splits += Split.along(layout, name, shapes[name], tilings[name], num_heads, kv_tiles)
    splits.sort(key=lambda split: -math.prod(split.devices.shape[:-2]))  # stable: q or x first among equals
    for split in splits:
        if all(tilings[name].covers(split.tiling(name, shape), shape) for name, shape in operands.items()):
            return split
    if layout.has_heads and layout.heads_are_tied:
        ways = layout.size({"q": tilings["q"].tiles}, "q", "q_heads")
        if axes.kv_head_shards(*num_heads, ways) is None:
            raise layout.refuse_heads(*num_heads, ways)
    raise ValueError(
        f"{layout.function}: the operands' shardings do not fit together: "
        + "; ".join(_describe(layout, name, shape, tilings[name]) for name, shape in operands.items())
        + f". No device would hold what its share needs, and heed never moves an input silently: shard {layout.instead}"
        " of all operands along the same mesh axes (jax.lax.with_sharding_constraint moves an operand on purpose)."
    )


def _describe(layout: axes.Layout, name: str, shape: Shape, tiling: Tiling) -> str:
    cut = [
        f"{axis} {ways} ways"
        for axis, ways in zip(layout.names(name, len(shape)), tiling.tiles, strict=True)
        if ways > 1
    ]
    return f"{name} has {' and '.join(cut)}" if cut else f"{name} is whole on every device"


def _partition(
    op: Op,
    platform: str,
    operand_shapes: Sequence[Any],
    operand_shardings: Sequence[Any],
    result_shape: Any,
    result_sharding: Any,
    backend_config: bytes,
) -> tuple[bytes, list[Any], Any]:
    """XLA's callback: the per-device program, and how its operands and results are sharded.

    The workspace is that of a device's share. The whole call's may be smaller, or not be there at all.
    """
    attributes = ffi_target.attributes_of(op, backend_config)
    call = call_of(op, attributes["problem"])
    operand_names = tuple(call.operands)
    is_tuple = result_shape.is_tuple()
    result_shapes = list(result_shape.tuple_shapes()) if is_tuple else [result_shape]
    result_shardings = list(result_sharding.tuple_elements()) if is_tuple else [result_sharding]
    has_workspace = len(result_shapes) > len(call.results)
    result_names = (*call.results, WORKSPACE) if has_workspace else call.results

    names = (*operand_names, *result_names)
    xla_shapes = dict(zip(names, (*operand_shapes, *result_shapes), strict=True))
    shardings = dict(zip(names, (*operand_shardings, *result_shardings), strict=True))
    sums: dict[int, Any] = {}
    if any(sharding.is_manual() for sharding in shardings.values()):
        # Inside shard_map the shapes are those of one device already.
        local = {name: tuple(shape.dimensions()) for name, shape in xla_shapes.items()}
    else:
        split = _choose_split(call, result_names, xla_shapes, shardings)
        shardings = {name: split.tiling(name, tuple(shape.dimensions())).to_xla() for name, shape in xla_shapes.items()}
        local = {name: tuple(shardings[name].tile(shape).dimensions()) for name, shape in xla_shapes.items()}
        for name in op.partial_results:
            sharers = split.sharers(name, tuple(xla_shapes[name].dimensions()))
            if sharers is not None:
                groups = _ids_of_all(sharers, attributes.get("groups", ""), split.layout)
                sums[result_names.index(name)] = groups
    share = call.on(local)
    types = {name: (local[name], xla_shapes[name].numpy_dtype()) for name in names}
    called = [types[name] for name in call.results]
    workspace = devices.workspace_of_share(op, share, platform)
    if has_workspace:
        *axes_of_heads, floats = local[WORKSPACE]
        workspace = (*axes_of_heads, max(floats, workspace[-1] if workspace else 0))
    if workspace is not None:
        called.append((workspace, np.float32))
    module = ffi_target.module_bytecode(
        op,
        [types[name] for name in operand_names],
        [types[name] for name in result_names],
        share,
        sums,
        called,
    )
    outputs = [shardings[name] for name in result_names]
    packed = xla_client.HloSharding.tuple_sharding(result_shape, outputs) if is_tuple else outputs[0]
    return module, [shardings[name] for name in operand_names], packed


def device_groups(context: Any) -> str:
    """For a program inside a `shard_map` over some mesh axes: the groups of devices that XLA divides the call over.

    There XLA counts devices from 0 in each group. Their numbers in the program are "0,1;2,3", or "unknown" where the
    order within a group is not known, which is with several axes that are not manual. Elsewhere the text is empty.
    """
    manual = set(getattr(context, "manual_axes", ()))
    if not manual:
        return ""
    sizes = dict(context.mesh.shape)
    automatic = [i for i, (name, size) in enumerate(sizes.items()) if name not in manual and size > 1]
    if len(automatic) != 1:
        return "unknown"
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    groups = np.moveaxis(ids, automatic[0], -1).reshape(-1, ids.shape[automatic[0]])
    return ";".join(",".join(map(str, group)) for group in groups)


def _ids_of_all(groups: np.ndarray, outer: str, layout: axes.Layout) -> np.ndarray:
    """The groups of devices by their numbers in the program, where they were counted within each outer group."""
    if not outer:
        return groups
    if outer == "unknown":
        got, expected, of = (
            ("query heads divided more finely than KV heads", "KV heads divided as the query heads are", "k and v")
            if layout.has_heads
            else ("rows divided", "whole rows", "weight")
        )
        raise ValueError(
            f"{layout.function}: got {got} inside a shard_map over some mesh axes, with several axes left to the "
            f"compiler, expected {expected}: heed cannot tell over which devices to sum the gradients of {of}. Make "
            "more mesh axes manual (axis_names)."
        )
    ids = np.array([[int(i) for i in group.split(",")] for group in outer.split(";")])
    return np.concatenate(ids[:, groups])


def _choose_split(
    call: Call, result_names: Sequence[str], xla_shapes: Mapping[str, Any], found: Mapping[str, Any]
) -> Split:
    """The division that the call takes, from the shardings that XLA found."""
    shapes = {name: tuple(shape.dimensions()) for name, shape in xla_shapes.items()}
    parsed = {name: Tiling.parse(sharding, len(shapes[name])) for name, sharding in found.items()}
    num_devices = max((tiling.devices.size for tiling in parsed.values() if tiling is not None), default=1)
    tilings = {
        name: Tiling.whole(len(shapes[name]), num_devices) if tiling is None else tiling
        for name, tiling in parsed.items()
    }
    return choose_split(call.layout, call.operands, {name: shapes[name] for name in result_names}, tilings)


def _no_gspmd(*_: Any) -> Any:
    raise NotImplementedError("heed on several devices needs the Shardy partitioner (jax_use_shardy_partitioner)")


@functools.cache
def register() -> None:
    """Gives XLA the partitioners of heed's custom calls, once."""
    for op in OPS:
        ffi_target.register_partitioner(op, _no_gspmd, functools.partial(_partition, op), _no_gspmd)
