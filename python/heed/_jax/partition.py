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
from typing import Any

from jaxlib import xla_client
from jaxlib.mlir import ir

from heed._jax import axes, ffi_target
from heed._jax.tiling import Shape, Split, Tiling


def sharding_rule(operands: Mapping[str, Shape], results: Mapping[str, Shape]) -> Any:
    """The Shardy rule for propagation (call it inside an MLIR context).

    Batch, heads and leading axes share factors between tensors. A size-1 leading axis that broadcasts, a token axis and
    a head dim have a factor of their own in every tensor: nothing propagates along them. With grouped heads the query
    head axis is the product of the KV heads and the group.
    """
    sizes: dict[str, int] = {}
    layout = axes.layout_of(operands)
    q_heads = _size(layout, operands, "q", "q_heads")
    kv_heads = _size(layout, operands, "k", "kv_heads")
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


def _size(layout: axes.Layout, shapes: Mapping[str, Shape], name: str, axis: str) -> int:
    shape = shapes[name]
    return shape[layout.names(name, len(shape)).index(axis)]


def refuse_visible(names: Sequence[str], avals: Sequence[Any], values: Sequence[Any]) -> None:
    """Refuses while lowering what the program states about its operands, so that the error is a plain ValueError.

    What only propagation finds is refused by the partitioner, whose errors XLA wraps in its own.
    """
    layout = axes.layout_of(names)
    for name, aval, value in zip(names, avals, values, strict=True):
        # Its text: #sdy.sharding<@mesh, [{"x"}, {}, {"y", ?}, {}]>, one pair of braces per axis.
        braces = re.findall(r"\{([^{}]*)\}", _stated_sharding(value))
        for axis, dim in zip(layout.names(name, aval.ndim), braces, strict=False):
            mesh_axes = re.findall(r'"[^"]+"', dim)
            if mesh_axes and not axes.is_shardable(axis):
                raise layout.refuse_axis(name, axis, aval.shape, f"over {', '.join(mesh_axes)}")


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
    operands: Mapping[str, Shape],
    results: Mapping[str, Shape],
    tilings: Mapping[str, Tiling],
) -> Split:
    """The finest division that some tensor's tiles suggest and for which every device already holds its operands."""
    layout = axes.layout_of(operands)
    for name, shape in operands.items():
        for axis, ways in zip(layout.names(name, len(shape)), tilings[name].tiles, strict=True):
            if ways > 1 and not axes.is_shardable(axis):
                raise layout.refuse_axis(name, axis, shape, f"{ways} ways")
    q_heads, kv_heads = _size(layout, operands, "q", "q_heads"), _size(layout, operands, "k", "kv_heads")
    shapes = {**operands, **results}
    splits = []
    for name in ("q", "out", "k", *(name for name in shapes if name not in ("q", "out", "k"))):
        split = Split.along(layout, name, shapes[name], tilings[name], q_heads, kv_heads)
        if split is not None:
            splits.append(split)
    splits.sort(key=lambda split: -math.prod(split.devices.shape[:-2]))  # stable: q first among equals
    for split in splits:
        if all(tilings[name].covers(split.tiling(name, shape), shape) for name, shape in operands.items()):
            return split
    ways = tilings["q"].tiles[layout.names("q", len(operands["q"])).index("q_heads")]
    if axes.kv_head_shards(q_heads, kv_heads, ways) is None:
        raise layout.refuse_heads(q_heads, kv_heads, ways)
    raise ValueError(
        f"{layout.function}: the operands' shardings do not fit together: "
        + "; ".join(_describe(layout, name, shape, tilings[name]) for name, shape in operands.items())
        + ". No device would hold what its share needs, and heed never moves an input silently: shard batch and heads "
        "of all operands along the same mesh axes (jax.lax.with_sharding_constraint moves an operand on purpose)."
    )


def _describe(layout: axes.Layout, name: str, shape: Shape, tiling: Tiling) -> str:
    cut = [
        f"{axis} {ways} ways"
        for axis, ways in zip(layout.names(name, len(shape)), tiling.tiles, strict=True)
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
    if any(sharding.is_manual() for sharding in shardings.values()):
        # Inside shard_map the shapes are those of one device already.
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
    raise NotImplementedError("heed on several devices needs the Shardy partitioner (jax_use_shardy_partitioner)")


@functools.cache
def register() -> None:
    """Gives XLA the partitioner of heed's custom call, once."""
    ffi_target.register_partitioner(_no_gspmd, _partition, _no_gspmd)
