"""heed.explain: which kernel a call gets, and why each other candidate declined. Nothing runs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from heed import ops
from heed._arrays import DLPackOps, common_kind, is_jax, kind_of
from heed._attention import Operands, flash_mha, require_operands, split_segment_ids
from heed._attention_bwd import flash_mha_bwd, flash_mha_varlen_bwd
from heed._attention_varlen import flash_mha_varlen, require_cu_seqlens
from heed._lib import function as library_function
from heed._problem import (
    BWD_OPERAND_NAMES,
    FIRST_INTEGER_OPERAND,
    OPERAND_NAMES,
    Candidate,
    Spec,
    attention_bwd_text,
    attention_statics,
    attention_text,
    require_rank,
    resolve_attention,
    resolve_attention_bwd,
)
from heed._small_ops import Call, resolve

_FORWARD = (flash_mha, flash_mha_varlen)
_BACKWARD = (flash_mha_bwd, flash_mha_varlen_bwd)
_SMALL_OPS = tuple(getattr(ops, name) for name in ops.__all__)
_INTEGERS = OPERAND_NAMES[FIRST_INTEGER_OPERAND:]


@dataclass(frozen=True)
class Explanation:
    """The answer of `heed.explain`. `print` it, or read its fields.

    Attributes:
        function: the explained function's name.
        target: where the call would run: "cpu", "sm_90a", ...
        problem: the call as the text that compiled programs carry.
        chosen: the name of the kernel that serves the call, or None.
        candidates: every candidate in the order tried, with its reason (empty for the chosen one).
        workspace_bytes: scratch memory that the caller's framework allocates for the call.
    """

    function: str
    target: str
    problem: str
    chosen: str | None
    candidates: tuple[Candidate, ...]
    workspace_bytes: int

    @property
    def is_served(self) -> bool:
        """Whether some kernel serves the call."""
        return self.chosen is not None

    @property
    def reasons(self) -> dict[str, str]:
        """Why each candidate that was not chosen declined."""
        return {row.name: row.reason for row in self.candidates if row.reason}

    def __str__(self) -> str:
        verdict = f"is served by {self.chosen}" if self.chosen else "is not served"
        width = max(len(row.name) for row in self.candidates)
        lines = [f"heed.{self.function} on {self.target} {verdict}"]
        for row in sorted(self.candidates, key=lambda row: bool(row.reason)):
            mark, text = ("->", "chosen") if not row.reason else ("  ", row.reason)
            lines.append(f"  {mark} {row.name:<{width}}  {text}")
        lines.append(f"  workspace: {self.workspace_bytes} bytes")
        fields = self.problem.split(";")
        operands = [field.replace("=", " ", 1) for field in fields[1:] if "[" in field]
        options = [_readable(field) for field in fields[1:] if "[" not in field]
        lines.append("  operands:  " + ", ".join(operands))
        lines.append("  options:   " + ", ".join(options))
        return "\n".join(lines)

    __repr__ = __str__


def _readable(option: str) -> str:
    """An option of the problem's text with its hexadecimal float, if it is one, in decimal."""
    name, _, value = option.partition("=")
    return f"{name} {float.fromhex(value):g}" if "0x" in value else f"{name} {value}"


def _default_target(names: Sequence[str], values: Sequence[Any]) -> str:
    """Where a call on these values would run. Raises on kinds of array that do not mix."""
    given = [value for value in values if value is not None]
    like = next((value for value in given if is_jax(value)), given[0])
    is_described = any(not is_jax(value) and not hasattr(value, "__dlpack__") for value in given)
    if is_described or common_kind(names, values) == "jax":
        jax = sys.modules.get("jax")
        if jax is None:  # shapes without arrays, and no JAX: heed's default
            return "cpu"
        devices = like.devices() if is_jax(like) and not isinstance(like, jax.core.Tracer) else jax.devices()
        device = next(iter(devices))
        if device.platform == "cpu":
            return "cpu"
        capability = str(getattr(device, "compute_capability", "")).replace(".", "")
        if not capability.isdigit():
            return "cuda"
        if device.process_index == jax.process_index():
            return str(library_function("cuda_target")(int(device.local_hardware_id)))
        return f"sm_{capability}"  # another process's GPU
    return DLPackOps(kind_of(names[0], like), like, names[0]).target()


def _spec(name: str, value: Any) -> Spec:
    """dtype and shape of an array or of anything that only describes one (`jax.ShapeDtypeStruct`)."""
    if hasattr(value, "__dlpack__") and not is_jax(value):
        return DLPackOps(kind_of(name, value), value).spec(name, value)
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an array or a jax.ShapeDtypeStruct")
    return str(value.dtype), tuple(value.shape)


def _integer_spec(name: str, value: Any) -> Spec:
    dtype, shape = _spec(name, value)
    return ("int32" if dtype.startswith(("int", "uint")) else dtype), shape


def explain(function: Callable[..., Any], /, *args: Any, target: str | None = None, **kwargs: Any) -> Explanation:
    """Says which kernel a call of `function` would get and why each other candidate declined, without running it.

    Args:
        function: a function of heed's: `heed.flash_mha`, `heed.flash_mha_varlen`, or the gradients of either,
            `heed.flash_mha_bwd` and `heed.flash_mha_varlen_bwd`, or one of `heed.ops`.
        *args, **kwargs: the call's arguments. Arrays may be `jax.ShapeDtypeStruct` or anything with shape and dtype.
        target: "cpu", or an architecture such as "sm_80" or "sm_90a", which need not be present. None: where the call
            would run.

    Raises:
        ValueError, TypeError: the arguments are wrong in a way that the call itself would refuse too.
    """
    if function in _SMALL_OPS:
        return _explain_small(inspect.unwrap(function)(*args, **kwargs), target)
    if function not in _FORWARD + _BACKWARD:
        known = ", ".join(f"heed.{one.__name__}" for one in _FORWARD + _BACKWARD)
        raise TypeError(f"explain: got {function!r}, expected a function of heed's: {known} or one of heed.ops")
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    is_forward = function in _FORWARD
    names = OPERAND_NAMES if is_forward else BWD_OPERAND_NAMES
    operands, options = _split_arguments(names, dict(bound.arguments))
    specs = [
        None if x is None else (_integer_spec if name in _INTEGERS else _spec)(name, x)
        for name, x in zip(names, operands, strict=True)
    ]
    statics = attention_statics(**({"return_lse": False} | options))
    require_rank(function.__name__, specs[0][1] if specs[0] is not None else ())
    where = target if target is not None else _default_target(names, operands)
    text = (attention_text if is_forward else attention_bwd_text)(statics, specs)
    resolution = (resolve_attention if is_forward else resolve_attention_bwd)(text, where)
    return Explanation(
        function=function.__name__,
        target=where,
        problem=text,
        chosen=resolution.chosen,
        candidates=resolution.candidates,
        workspace_bytes=resolution.workspace_bytes,
    )


def _explain_small(call: Call, target: str | None) -> Explanation:
    """The same for a described call of heed.ops."""
    op = call.op
    specs = [
        None if x is None else (_integer_spec if name in op.integers else _spec)(name, x)
        for name, x in zip(op.names, call.operands, strict=True)
    ]
    op.require_ranks([None if spec is None else spec[1] for spec in specs])
    where = target if target is not None else _default_target(op.names, call.operands)
    text = op.write(call.statics, specs)
    resolution = resolve(op.stem, text, where)
    return Explanation(
        function=call.function,
        target=where,
        problem=text,
        chosen=resolution.chosen,
        candidates=resolution.candidates,
        workspace_bytes=resolution.workspace_bytes,
    )


def _split_arguments(names: Sequence[str], given: dict[str, Any]) -> tuple[Operands, dict[str, Any]]:
    """A call's operands in the order of `names`, and its other arguments."""
    require_operands(names, [given.get(name) for name in names])
    if "cu_seqlens_q" in given:
        require_cu_seqlens(given["cu_seqlens_q"])
    ids = split_segment_ids(given.pop("segment_ids", None))
    given["q_segment_ids"], given["kv_segment_ids"] = ids
    return tuple(given.pop(name, None) for name in names), given
