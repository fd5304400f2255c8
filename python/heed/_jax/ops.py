"""The ops that JAX programs call: how each is named, what it takes and returns, and who answers for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from heed._problem import (
    BWD_OPERAND_NAMES,
    GRADIENT_NAMES,
    OPERAND_NAMES,
    AttentionStatics,
    Spec,
    attention_bwd_text,
    attention_text,
    resolve_attention,
    resolve_attention_bwd,
)

WORKSPACE = "workspace"


@dataclass(frozen=True)
class Op:
    """One op, on every platform.

    Attributes:
        stem: its name in every layer.
        operand_names: all that a call may have, in order.
        write: the problem's text, from the static arguments and dtype and shape of each of these (None: absent).
        resolve: what the text resolves to on a target.
        results: the names of the results of a call that has some operands and returns its LSE or does not. The
            workspace is not among them.
        partial_results: those that are sums over query heads: devices that share a KV head each have a part.
        has_workspace: whether the custom call has one more result, scratch memory. Its last axis depends on the target.
    """

    stem: str
    operand_names: tuple[str, ...]
    write: Callable[[AttentionStatics, Sequence[Spec | None]], str]
    resolve: Callable[[str, str], Any]
    results: Callable[[Collection[str], bool], tuple[str, ...]]
    partial_results: tuple[str, ...] = ()
    has_workspace: bool = False

    @property
    def target_name(self) -> str:
        """The custom call's name. Compiled programs carry it: a change of what the call means changes the version."""
        return f"heed.{self.stem}.v1"

    def text(self, statics: AttentionStatics, operands: Sequence[str], tensors: Sequence[Any]) -> str:
        """The problem's text. `tensors` have dtype and shape, and are those of `operands`."""
        specs = {name: (str(x.dtype), tuple(x.shape)) for name, x in zip(operands, tensors, strict=True)}
        return self.write(statics, [specs.get(name) for name in self.operand_names])

    def present(self, tensors: Sequence[Any]) -> tuple[str, ...]:
        """The names of the operands that are not None."""
        return tuple(name for name, x in zip(self.operand_names, tensors, strict=True) if x is not None)


def _fwd_results(_: Collection[str], returns_lse: bool) -> tuple[str, ...]:
    return ("out", "lse") if returns_lse else ("out",)


def _bwd_results(operands: Collection[str], _: bool) -> tuple[str, ...]:
    return tuple(name for name in GRADIENT_NAMES if name.removeprefix("d") in operands)


ATTENTION_FWD = Op("attention_fwd", OPERAND_NAMES, attention_text, resolve_attention, _fwd_results)
ATTENTION_BWD = Op(
    "attention_bwd",
    BWD_OPERAND_NAMES,
    attention_bwd_text,
    resolve_attention_bwd,
    _bwd_results,
    partial_results=("dk", "dv"),
    has_workspace=True,
)
OPS = (ATTENTION_FWD, ATTENTION_BWD)
