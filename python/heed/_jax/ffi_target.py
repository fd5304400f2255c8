"""The XLA custom calls that run heed's ops: their registration for every platform, and how they are written."""

# mypy: disable-error-code="no-untyped-call"
# JAX leaves parts of its API untyped.
from __future__ import annotations

import ctypes
import functools
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import xla_bridge  # callbacks for plugins: JAX has no public name for them
from jax.interpreters import mlir
from jaxlib import xla_client
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func, stablehlo

from heed import _lib
from heed._jax.ops import OPS, Op

_registration = threading.Lock()


@functools.cache
def register() -> None:
    """Registers the targets with XLA, once per process (also when this module is reloaded).

    On CUDA the call has two stages, one function serving both: `initialize` runs before each run of a program, outside
    of command buffers, and loads what a program from another process needs; `execute` launches. That calls may be
    captured into command buffers is what the function itself answers when XLA asks. JAX hands the registration to its
    CUDA plugin once there is one.
    """
    with _registration:
        for op in OPS:
            if op.target_name in xla_client.custom_call_targets("Host"):
                continue
            library = ctypes.CDLL(str(_lib.library_dir() / "libheed_ffi.so"))
            on_cpu = jax.ffi.pycapsule(getattr(library, f"heed_xla_{op.stem}"))
            on_cuda = jax.ffi.pycapsule(getattr(library, f"heed_xla_{op.stem}_cuda"))
            jax.ffi.register_ffi_target(op.target_name, {"initialize": on_cuda, "execute": on_cuda}, platform="CUDA")
            jax.ffi.register_ffi_target(op.target_name, on_cpu, platform="cpu")


def register_partitioner(
    op: Op, propagate: Callable[..., Any], partition: Callable[..., Any], infer: Callable[..., Any]
) -> None:
    """Gives XLA the functions that divide the call over devices: the XLA of this process, and that of each plugin.

    partition: its first argument is the platform. The XLA of this process compiles for CPUs, plugins for GPUs.
    """

    def give(c_api: Any = None) -> None:
        xla_client.register_custom_call_partitioner(
            name=op.target_name,
            prop_user_sharding=propagate,
            partition=functools.partial(partition, "cpu" if c_api is None else "cuda"),
            infer_sharding_from_operands=infer,
            can_side_effecting_have_replicated_sharding=True,
            c_api=c_api,
        )

    give()
    xla_bridge.register_plugin_callbacks(give)


def _row_major_layouts(types: Sequence[Any]) -> ir.Attribute:
    ranks = [ir.RankedTensorType(t).rank for t in types]
    index = ir.IndexType.get()
    return ir.ArrayAttr.get(
        [ir.DenseIntElementsAttr.get(np.arange(rank, dtype=np.int64)[::-1].copy(), type=index) for rank in ranks]
    )


def emit_call(op: Op, operands: Sequence[Any], result_types: Sequence[Any], problem: str, groups: str = "") -> Any:
    """Writes one custom call at the current insertion point and returns the operation.

    groups: what the partitioner is to be told of the devices that it does not see (`partition.device_groups`).
    """
    attributes = {"problem": problem} | ({"groups": groups} if groups else {})
    return stablehlo.CustomCallOp(
        list(result_types),
        list(operands),
        call_target_name=ir.StringAttr.get(op.target_name),
        has_side_effect=ir.BoolAttr.get(False),
        backend_config=ir.DictAttr.get({name: ir.StringAttr.get(text) for name, text in attributes.items()}),
        api_version=mlir.i32_attr(4),
        called_computations=ir.ArrayAttr.get([]),
        operand_layouts=_row_major_layouts([x.type for x in operands]),
        result_layouts=_row_major_layouts(result_types),
    )


TensorType = tuple[tuple[int, ...], Any]
"""A shape and a NumPy dtype."""


def tensor_type(shape: Sequence[int], dtype: Any) -> Any:
    return ir.RankedTensorType.get(list(shape), mlir.dtype_to_ir_type(np.dtype(dtype)))


def module_bytecode(
    op: Op,
    operands: Sequence[TensorType],
    results: Sequence[TensorType],
    problem: str,
    sums: Mapping[int, np.ndarray],
    called: Sequence[TensorType],
) -> bytes:
    """A StableHLO module whose main function is one call: what XLA inlines on each device.

    sums: results that are then summed over groups of devices, [groups, devices of a group].
    called: what the call returns. It is what the function returns, but for a workspace at its end, which nobody reads:
        the function returns as much of that as its own result has, if it has one.
    """
    with mlir.make_ir_context() as context, ir.Location.unknown(context):
        module = ir.Module.create()
        operand_types, result_types = ([tensor_type(*t) for t in tensors] for tensors in (operands, results))
        with ir.InsertionPoint(module.body):
            main = func.FuncOp("main", ir.FunctionType.get(operand_types, result_types))
            main.attributes["sym_visibility"] = ir.StringAttr.get("public")
            block = main.add_entry_block()
        with ir.InsertionPoint(block):
            called_types = [tensor_type(*t) for t in called]
            values = list(emit_call(op, list(block.arguments), called_types, problem).results)[: len(results)]
            if values[-1].type != result_types[-1]:
                shape, _ = results[-1]
                zeros, ones = ([n] * len(shape) for n in (0, 1))
                values[-1] = stablehlo.SliceOp(values[-1], zeros, list(shape), ones).result
            for index, groups in sums.items():
                values[index] = _emit_sum(values[index], groups)
            func.ReturnOp(values)
        bytecode: bytes = mlir.module_to_bytecode(module)
    return bytecode


_DEVICE_TO_DEVICE = 1  # the type of a channel between devices


def _emit_sum(value: Any, groups: np.ndarray) -> Any:
    """An all-reduce in float32: parts are rounded to their dtype once, and their sum once more."""
    narrow = ir.RankedTensorType(value.type)
    wide = ir.RankedTensorType.get(narrow.shape, ir.F32Type.get())
    is_wide = narrow == wide
    reduce = stablehlo.AllReduceOp(
        [wide],
        [value if is_wide else stablehlo.ConvertOp(wide, value).result],
        replica_groups=ir.DenseIntElementsAttr.get(np.ascontiguousarray(groups, dtype=np.int64)),
        channel_handle=stablehlo.ChannelHandle.get(1, _DEVICE_TO_DEVICE),  # XLA renumbers channels
        use_global_device_ids=ir.BoolAttr.get(True),
    )
    scalar = ir.RankedTensorType.get([], ir.F32Type.get())
    body = reduce.regions[0].blocks.append(scalar, scalar)
    with ir.InsertionPoint(body):
        stablehlo.ReturnOp([stablehlo.AddOp(*body.arguments).result])
    return reduce.result if is_wide else stablehlo.ConvertOp(narrow, reduce.result).result


_ATTRIBUTE = re.compile(r'(\w+)\s*=\s*"([^"]*)"')


def attributes_of(op: Op, backend_config: bytes | str) -> dict[str, str]:
    """What `emit_call` wrote: the problem's text, and the groups of devices if there are any."""
    text = backend_config.decode() if isinstance(backend_config, bytes) else backend_config
    attributes = dict(_ATTRIBUTE.findall(text))
    if "problem" not in attributes:
        raise ValueError(f"{op.target_name}: got attributes {text!r}, expected a problem")
    return attributes
