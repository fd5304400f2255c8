"""The ops that JAX programs call: how each is named, what it takes and returns, and who answers for it."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heed import _small_ops
from heed._jax import layouts
from heed._jax.axes import Layout
from heed._problem import (
    BWD_OPERAND_NAMES,
    FIRST_INTEGER_OPERAND,
    GRADIENT_NAMES,
    OPERAND_NAMES,
    Spec,
    attention_bwd_text,
    attention_text,
    resolve_attention,
    resolve_attention_bwd,
)
from heed._small_ops import SmallOp

WORKSPACE = "workspace"
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Op:
    """One op, on every platform.

    Attributes:
        stem: its name in every layer.
        operand_names: all that a call may have, in order.
        integers: those of them that are int32.
        write: the problem's text, from the static arguments and dtype and shape of each of these (None: absent).
        resolve: what the text resolves to on a target.
        layout: the axes of a call's tensors, from the shapes of its operands and what else its text says.
        results: the names of a call's results, from the same. The workspace is not among them.
        partial_results: those that are sums over axes that may be divided: devices each have a part.
        has_workspace: whether the custom call has one more result, scratch memory. Its last axis depends on the target.
        may_lack_workspace: whether calls of kernels that have no use for one are without that result.
        own_results: (operand, result) where a result does not depend on the operands of the other pairs.
    """

    stem: str
    operand_names: tuple[str, ...]
    integers: tuple[str, ...]
    write: Callable[[Any, Sequence[Spec | None]], str]
    resolve: Callable[[str, str], Any]
    layout: Callable[[layouts.Shapes, layouts.Options], Layout]
    results: Callable[[layouts.Shapes, layouts.Options], tuple[str, ...]]
    partial_results: tuple[str, ...] = ()
    has_workspace: bool = False
    may_lack_workspace: bool = False
    own_results: tuple[tuple[str, str], ...] = ()

    # By name: a module that is loaded again makes the same ops anew.
    def __eq__(self, other: object) -> bool:
        return self.stem == getattr(other, "stem", None)

    def __hash__(self) -> int:
        return hash(self.stem)

    @property
    def target_name(self) -> str:
        """The custom call's name. Compiled programs carry it: a change of what the call means changes the version."""
        return f"heed.{self.stem}.v1"

    def text(self, statics: Any, operands: Sequence[str], tensors: Sequence[Any]) -> str:
        """The problem's text. `tensors` have dtype and shape, and are those of `operands`."""
        specs = {name: (str(x.dtype), tuple(x.shape)) for name, x in zip(operands, tensors, strict=True)}
        return self.write(statics, [specs.get(name) for name in self.operand_names])

    def present(self, tensors: Sequence[Any]) -> tuple[str, ...]:
        """The names of the operands that are not None."""
        return tuple(name for name, x in zip(self.operand_names, tensors, strict=True) if x is not None)

    def call(self, statics: Any, operands: Sequence[str], tensors: Sequence[Any]) -> Call:
        """The call with these operands. `tensors` have dtype and shape."""
        return call_of(self, self.text(statics, operands, tensors))


@dataclass(frozen=True)
class Call:
    """What a problem's text says of one call: its operands and their shapes, its results, the axes of all of them."""

    op: Op
    problem: str
    operands: Shapes
    results: tuple[str, ...]
    layout: Layout

    def on(self, shapes: Shapes) -> str:
        """The same problem on operands of other shapes."""
        return _OPERAND.sub(lambda m: f";{m[1]}={m[2]}[{','.join(map(str, shapes[m[1]]))}]", self.problem)


_OPERAND = re.compile(r";(\w+)=(\w+)\[([\d,]*)\]")
_OPTION = re.compile(r";(\w+)=([^;\[]*)(?=;|$)")


@functools.lru_cache(maxsize=4096)
def call_of(op: Op, problem: str) -> Call:
    """The call that a problem's text describes."""
    shapes = {name: tuple(int(n) for n in shape.split(",") if n) for name, _, shape in _OPERAND.findall(problem)}
    options = dict(_OPTION.findall(problem))
    return Call(op, problem, shapes, op.results(shapes, options), op.layout(shapes, options))


def _forward_results(_: layouts.Shapes, options: layouts.Options) -> tuple[str, ...]:
    return ("out", "lse") if options["lse"] == "1" else ("out",)


def _gradients(shapes: layouts.Shapes, _: layouts.Options) -> tuple[str, ...]:
    return tuple(name for name in GRADIENT_NAMES if name.removeprefix("d") in shapes)


def _norm_results(shapes: layouts.Shapes, _: layouts.Options) -> tuple[str, ...]:
    return ("out", "sum") if "residual" in shapes else ("out",)


def _small(op: SmallOp, layout: Any, results: Any, partial_results: tuple[str, ...] = ()) -> Op:
    resolve = functools.partial(_small_ops.resolve, op.stem)
    return Op(op.stem, op.names, op.integers, op.write, resolve, layout, results, partial_results, op.has_workspace)


ATTENTION_FWD = Op(
    "attention_fwd",
    OPERAND_NAMES,
    OPERAND_NAMES[FIRST_INTEGER_OPERAND:],
    attention_text,
    resolve_attention,
    layouts.attention,
    _forward_results,
    has_workspace=True,
    may_lack_workspace=True,
)
ATTENTION_BWD = Op(
    "attention_bwd",
    BWD_OPERAND_NAMES,
    ATTENTION_FWD.integers,
    attention_bwd_text,
    resolve_attention_bwd,
    layouts.attention,
    _gradients,
    partial_results=("dk", "dv"),
    has_workspace=True,
)
ACT_AND_MUL = _small(_small_ops.ACT_AND_MUL, layouts.act_and_mul, lambda *_: ("out",))
ACT_AND_MUL_BWD = _small(_small_ops.ACT_AND_MUL_BWD, layouts.act_and_mul, lambda *_: ("dx",))
ROPE = dataclasses.replace(
    _small(_small_ops.ROPE, layouts.rope, lambda *_: ("q_rope", "k_rope")),
    own_results=(("q", "q_rope"), ("k", "k_rope")),
)
RMS_NORM = _small(_small_ops.RMS_NORM, layouts.rms_norm, _norm_results)
RMS_NORM_BWD = _small(_small_ops.RMS_NORM_BWD, layouts.rms_norm, lambda *_: ("dx", "dweight"), ("dweight",))
ATTENTION_DECODE = _small(_small_ops.ATTENTION_DECODE, layouts.attention_decode, _forward_results)
OPS = (
    ATTENTION_FWD, ATTENTION_BWD, ACT_AND_MUL, ACT_AND_MUL_BWD, ROPE, RMS_NORM, RMS_NORM_BWD, ATTENTION_DECODE,
)  # fmt: skip
