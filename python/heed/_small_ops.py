"""The small ops (activations, rotary embeddings, norms, decode) as problems: statics, texts, and the eager path."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from heed._arrays import DLPackOps
from heed._problem import OpResolution, Spec, operands_text, require_kernel, resolve_op

# The operands of each op, in the order in which all faces pass them.
ACT_NAMES = ("x",)
ACT_BWD_NAMES = ("x", "dout")
ROPE_NAMES = ("q", "k", "indptr", "offsets", "pos_ids", "cos_sin_cache")
ROPE_INTEGERS = ("indptr", "offsets", "pos_ids")
RMS_NORM_NAMES = ("x", "weight", "residual")
RMS_NORM_BWD_NAMES = ("x", "weight", "dout", "dsum")
DECODE_NAMES = ("q", "k", "v", "sinks", "alibi_slopes")

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
KV_LAYOUTS = ("NHD", "HND")


# What is fixed while tracing. Hashable: part of every cache key.


@dataclass(frozen=True)
class ActStatics:
    """Of a gated activation and of its gradient."""

    activation: str = "silu"
    backend: str | None = None


@dataclass(frozen=True)
class RopeStatics:
    """Of a rotation; its gradient is the inverse one.

    Attributes:
        rotary_dim: None is the head dim, or what the cos_sin_cache has.
        llama31: (low_freq_factor, high_freq_factor, old_context_len) where frequencies are scaled as in Llama 3.1.
    """

    rotary_dim: int | None = None
    interleave: bool = False
    scale: float = 1.0
    theta: float = 1e4
    llama31: tuple[float, float, float] | None = None
    inverse: bool = False
    backend: str | None = None


@dataclass(frozen=True)
class NormStatics:
    """Of an RMS norm and of its gradient."""

    eps: float = 1e-6
    backend: str | None = None


@dataclass(frozen=True)
class DecodeStatics:
    """Of attention of one query.

    Attributes:
        rope: (scale, theta) where queries and keys are rotated.
    """

    kv_layout: str = "NHD"
    window_left: int = -1
    softcap: float = 0.0
    scale: float | None = None
    rope: tuple[float, float] | None = None
    return_lse: bool = False
    batch_invariant: bool = False
    backend: str | None = None


# Texts. Their schema is in `src/core/small_problems.h`; `specs` follow the names above, None where one is absent.


def act_and_mul_text(statics: ActStatics, specs: Sequence[Spec | None], is_backward: bool = False) -> str:
    """`specs` follow `ACT_NAMES`, or `ACT_BWD_NAMES`."""
    stem, names = ("act_and_mul_bwd", ACT_BWD_NAMES) if is_backward else ("act_and_mul", ACT_NAMES)
    return f"{stem}.v1{operands_text(names, specs)};activation={statics.activation};backend={statics.backend or 'auto'}"


def rope_text(statics: RopeStatics, specs: Sequence[Spec | None]) -> str:
    """`specs` follow `ROPE_NAMES`."""
    llama31 = ";llama31=0"
    if statics.llama31 is not None:
        llama31 = ";llama31=1;low={};high={};context={}".format(*(value.hex() for value in statics.llama31))
    return (
        f"rope.v1{operands_text(ROPE_NAMES, specs)}"
        f";rotary_dim={statics.rotary_dim or 0};interleave={int(statics.interleave)}"
        f";scale={statics.scale.hex()};theta={statics.theta.hex()}{llama31};inverse={int(statics.inverse)}"
        f";backend={statics.backend or 'auto'}"
    )


def rms_norm_text(statics: NormStatics, specs: Sequence[Spec | None], is_backward: bool = False) -> str:
    """`specs` follow `RMS_NORM_NAMES`, or `RMS_NORM_BWD_NAMES`."""
    stem, names = ("rms_norm_bwd", RMS_NORM_BWD_NAMES) if is_backward else ("rms_norm", RMS_NORM_NAMES)
    x, weight = specs[:2]
    num_row_axes = 0 if x is None or weight is None else len(x[1]) - len(weight[1])
    return (
        f"{stem}.v1{operands_text(names, specs)};rows={num_row_axes};eps={statics.eps.hex()}"
        f";backend={statics.backend or 'auto'}"
    )


def attention_decode_text(statics: DecodeStatics, specs: Sequence[Spec | None]) -> str:
    """`specs` follow `DECODE_NAMES`."""
    scale = "default" if statics.scale is None else statics.scale.hex()
    rope = "none" if statics.rope is None else ",".join(value.hex() for value in statics.rope)
    return (
        f"attention_decode.v1{operands_text(DECODE_NAMES, specs)};layout={statics.kv_layout}"
        f";window={statics.window_left};softcap={statics.softcap.hex()};scale={scale};rope={rope}"
        f";lse={int(statics.return_lse)};batch_invariant={int(statics.batch_invariant)}"
        f";backend={statics.backend or 'auto'}"
    )


def resolve(stem: str, text: str, target: str) -> OpResolution:
    """Validates a problem and picks its kernel for the target. Raises on what is wrong, under the names of heed.ops."""
    try:
        return resolve_op(stem, text, target)
    except ValueError as error:
        message = str(error)
        if message.startswith("softcap:"):  # as everyone but this function's model calls it
            raise ValueError(f"logits_soft_cap{message.removeprefix('softcap')}") from None
        raise


# The ops, and the eager path.


@dataclass(frozen=True)
class SmallOp:
    """One op as its callers see it.

    Attributes:
        stem: its name in every layer.
        names: all operands that a call may have.
        write: the problem's text.
        axes: how the axes of some operands are written. The native library takes further leading axes (they come from
            `vmap`); the public functions do not.
        integers: the operands that are cast to int32.
        has_workspace: whether the last result is scratch memory of the kernel.
    """

    stem: str
    names: tuple[str, ...]
    write: Callable[[Any, Sequence[Spec | None]], str]
    axes: tuple[tuple[str, str], ...] = ()
    integers: tuple[str, ...] = ()
    has_workspace: bool = False

    def require_ranks(self, shapes: Sequence[Sequence[Any] | None]) -> None:
        """Raises ValueError for an operand of another rank than the public functions take."""
        named = dict(zip(self.names, shapes, strict=True))
        for name, axes in self.axes:
            shape = named[name]
            if shape is None:
                continue
            is_open = axes.startswith("[...")
            rank = axes.count(",") + (not is_open)
            if len(shape) == rank or (is_open and len(shape) > rank):
                continue
            more = " or more" if is_open else ""
            hint = "" if is_open else " (jax.vmap maps over further axes)"
            raise ValueError(
                f"{name}: got shape [{', '.join(map(str, shape))}] of rank {len(shape)}, expected rank {rank}{more}: "
                f"{axes}{hint}"
            )


ACT_AND_MUL = SmallOp("act_and_mul", ACT_NAMES, act_and_mul_text)
ACT_AND_MUL_BWD = SmallOp("act_and_mul_bwd", ACT_BWD_NAMES, functools.partial(act_and_mul_text, is_backward=True))
ROPE = SmallOp(
    "rope",
    ROPE_NAMES,
    rope_text,
    axes=(("q", "[tokens, num_q_heads, head_dim]"),),
    integers=ROPE_INTEGERS,
)
RMS_NORM = SmallOp("rms_norm", RMS_NORM_NAMES, rms_norm_text, axes=(("weight", "[hidden]"), ("x", "[..., hidden]")))
RMS_NORM_BWD = SmallOp(
    "rms_norm_bwd",
    RMS_NORM_BWD_NAMES,
    functools.partial(rms_norm_text, is_backward=True),
    axes=(("weight", "[hidden]"), ("x", "[..., hidden]")),
    has_workspace=True,
)
ATTENTION_DECODE = SmallOp(
    "attention_decode",
    DECODE_NAMES,
    attention_decode_text,
    axes=(("q", "[num_q_heads, head_dim]"),),
    has_workspace=True,
)


class Call(NamedTuple):
    """One call of a public function: what runs, with what.

    Attributes:
        function: the function's name, as in `ops.rms_norm`.
        operands: in the order of the op's names, None where one is absent.
    """

    function: str
    op: SmallOp
    statics: Any
    operands: tuple[Any, ...]


def call_of(
    function: str, op: SmallOp, statics: Any, operands: Mapping[str, Any], optional: Sequence[str] = ()
) -> Call:
    """The call with these operands, of which only the `optional` ones may be None."""
    for name, value in operands.items():
        if value is None and name not in optional:
            raise TypeError(f"{name}: got None, expected an array")
    return Call(function, op, statics, tuple(map(operands.get, op.names)))


@functools.lru_cache(maxsize=4096)
def _resolved(
    op: SmallOp, function_name: str, statics: Any, specs: tuple[Spec | None, ...], target: str
) -> tuple[str, OpResolution]:
    """The problem's text and what it resolves to. Raises on what is wrong or cannot be served."""
    op.require_ranks([None if spec is None else spec[1] for spec in specs])
    text = op.write(statics, specs)
    resolution = resolve(op.stem, text, target)
    require_kernel(resolution, function_name, target)
    return text, resolution


def run_eagerly(kind: str, op: SmallOp, function_name: str, statics: Any, operands: Sequence[Any]) -> tuple[Any, ...]:
    """Runs on NumPy arrays or another framework's, at once. `operands` follow the op's names, None where absent.

    Returns its results without the workspace, of the same kind.
    """
    ops, given, text, resolution = resolve_eagerly(kind, op, function_name, statics, operands)
    results = tuple(ops.empty(shape, dtype) for dtype, shape in resolution.results)
    ops.run(op.stem, text, *(ops.view(value, name) for name, value in given), *map(ops.view_out, results))
    return results[:-1] if op.has_workspace else results


def resolve_eagerly(
    kind: str, op: SmallOp, function_name: str, statics: Any, operands: Sequence[Any]
) -> tuple[DLPackOps, list[tuple[str, Any]], str, OpResolution]:
    """What `run_eagerly` does before anything runs: raises on what is wrong or cannot be served.

    Returns what the arrays' kind can do, the operands that are there, the problem's text and what it resolves to.
    """
    ops = DLPackOps(kind, operands[0], op.names[0])
    given = [(name, value) for name, value in zip(op.names, operands, strict=True) if value is not None]
    if op.integers:
        given = [(name, ops.to_int32(name, value) if name in op.integers else value) for name, value in given]
    specs = {name: ops.spec(name, value) for name, value in given}
    text, resolution = _resolved(op, function_name, statics, tuple(map(specs.get, op.names)), ops.target())
    return ops, given, text, resolution


# What only NumPy arrays let one check before a call: their values. Wrong shapes and dtypes are left to what follows.


def check_indptr(indptr: Any, q: Any) -> None:
    """Raises ValueError for rows of sequences that decrease or that q does not have."""
    if not _is_integers(indptr):
        return
    decreases = indptr[1:] < indptr[:-1]
    if decreases.any():
        at = int(decreases.argmax())
        raise ValueError(
            f"indptr: got {indptr[at + 1]} after {indptr[at]} at index {at + 1}, expected values that do not decrease"
        )
    if indptr[0] < 0:
        raise ValueError(f"indptr: got {indptr[0]} at index 0, expected values of 0 or more")
    shape = tuple(getattr(q, "shape", ()))
    if len(shape) == 3 and isinstance(shape[0], int) and indptr[-1] > shape[0]:
        raise ValueError(
            f"indptr: got {indptr[-1]} as the end of the last sequence, expected at most {shape[0]}, the rows of q"
        )


def check_pos_ids(pos_ids: Any, cos_sin_cache: Any) -> None:
    """Raises ValueError for positions that the table does not have."""
    shape = tuple(getattr(cos_sin_cache, "shape", ()))
    if not _is_integers(pos_ids) or len(shape) != 2 or not isinstance(shape[0], int):
        return
    low, high = int(pos_ids.min()), int(pos_ids.max())
    if low < 0 or high >= shape[0]:
        at = int(pos_ids.argmin() if low < 0 else pos_ids.argmax())
        raise ValueError(
            f"pos_ids: got {pos_ids[at]} at index {at}, expected rows of cos_sin_cache, 0 to {shape[0] - 1}"
        )


def _is_integers(value: Any) -> bool:
    is_plain = isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray)
    return is_plain and value.ndim == 1 and value.dtype.kind in "iu" and value.size > 0
