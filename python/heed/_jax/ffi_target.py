"""The XLA custom call that runs attention: its name, its registration for every platform, and how it is written."""

# mypy: disable-error-code="no-untyped-call"
# JAX leaves parts of its API untyped.
from __future__ import annotations

import ctypes
import functools
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import xla_bridge  # callbacks for plugins: JAX has no public name for them
from jax.interpreters import mlir
from jaxlib import xla_client
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func, stablehlo

from heed import _lib

TARGET_NAME = "heed.attention_fwd.v1"
_registration = threading.Lock()


@functools.cache
def register() -> None:
    """Registers the target with XLA, once per process (also when this module is reloaded).

    On CUDA the call has two stages, one function serving both: `initialize` runs before each run of a program, outside
    of command buffers, and loads what a program from another process needs; `execute` launches. That calls may be
    captured into command buffers is what the function itself answers when XLA asks. JAX hands the registration to its
    CUDA plugin once there is one.
    """
    with _registration:
        if TARGET_NAME not in xla_client.custom_call_targets("Host"):
            library = ctypes.CDLL(str(_lib.library_dir() / "libheed_ffi.so"))
            on_cpu = jax.ffi.pycapsule(library.heed_xla_attention_fwd)
            on_cuda = jax.ffi.pycapsule(library.heed_xla_attention_fwd_cuda)
            jax.ffi.register_ffi_target(TARGET_NAME, {"initialize": on_cuda, "execute": on_cuda}, platform="CUDA")
            jax.ffi.register_ffi_target(TARGET_NAME, on_cpu, platform="cpu")


def register_partitioner(
    propagate: Callable[..., Any], partition: Callable[..., Any], infer: Callable[..., Any]
) -> None:
    """Gives XLA the functions that divide the call over devices: the XLA of this process, and that of each plugin."""
    give: Callable[..., None] = functools.partial(
        xla_client.register_custom_call_partitioner,
        name=TARGET_NAME,
        prop_user_sharding=propagate,
        partition=partition,
        infer_sharding_from_operands=infer,
        can_side_effecting_have_replicated_sharding=True,
    )
    give()
    xla_bridge.register_plugin_callbacks(give)


def _row_major_layouts(types: Sequence[Any]) -> ir.Attribute:
    ranks = [ir.RankedTensorType(t).rank for t in types]
    index = ir.IndexType.get()
    return ir.ArrayAttr.get(
        [ir.DenseIntElementsAttr.get(np.arange(rank, dtype=np.int64)[::-1].copy(), type=index) for rank in ranks]
    )


def emit_call(operands: Sequence[Any], result_types: Sequence[Any], problem: str) -> Any:
    """Writes one custom call at the current insertion point and returns the operation."""
    return stablehlo.CustomCallOp(
        list(result_types),
        list(operands),
        call_target_name=ir.StringAttr.get(TARGET_NAME),
        has_side_effect=ir.BoolAttr.get(False),
        backend_config=ir.DictAttr.get({"problem": ir.StringAttr.get(problem)}),
        api_version=mlir.i32_attr(4),
        called_computations=ir.ArrayAttr.get([]),
        operand_layouts=_row_major_layouts([x.type for x in operands]),
        result_layouts=_row_major_layouts(result_types),
    )


TensorType = tuple[tuple[int, ...], Any]
"""A shape and a NumPy dtype."""


def tensor_type(shape: Sequence[int], dtype: Any) -> Any:
    return ir.RankedTensorType.get(list(shape), mlir.dtype_to_ir_type(np.dtype(dtype)))


def module_bytecode(operands: Sequence[TensorType], results: Sequence[TensorType], problem: str) -> bytes:
    """A StableHLO module whose main function is one call: what XLA inlines on each device."""
    with mlir.make_ir_context() as context, ir.Location.unknown(context):
        module = ir.Module.create()
        operand_types, result_types = ([tensor_type(*t) for t in tensors] for tensors in (operands, results))
        with ir.InsertionPoint(module.body):
            main = func.FuncOp("main", ir.FunctionType.get(operand_types, result_types))
            main.attributes["sym_visibility"] = ir.StringAttr.get("public")
            block = main.add_entry_block()
        with ir.InsertionPoint(block):
            func.ReturnOp(emit_call(list(block.arguments), result_types, problem).results)
        bytecode: bytes = mlir.module_to_bytecode(module)
    return bytecode


_PROBLEM = re.compile(r'problem\s*=\s*"([^"]*)"')


def problem_of(backend_config: bytes | str) -> str:
    """The problem's text, out of the attributes that `emit_call` wrote."""
    text = backend_config.decode() if isinstance(backend_config, bytes) else backend_config
    match = _PROBLEM.search(text)
    if match is None:
        raise ValueError(f"{TARGET_NAME}: got attributes {text!r}, expected a problem")
    return match.group(1)


_OPERAND = re.compile(r";(\w+)=(\w+)\[([\d,]*)\]")


def operand_names(problem: str) -> tuple[str, ...]:
    """The operands that a problem's text lists, in their order."""
    return tuple(name for name, _, _ in _OPERAND.findall(problem))


def with_shapes(problem: str, shapes: dict[str, tuple[int, ...]]) -> str:
    """The same problem on operands of other shapes."""
    return _OPERAND.sub(lambda m: f";{m[1]}={m[2]}[{','.join(map(str, shapes[m[1]]))}]", problem)
