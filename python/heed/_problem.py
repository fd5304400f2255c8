"""The problem: one attention call as the text that the native library validates and resolves, before anything runs."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from heed._errors import UnsupportedError
from heed._lib import function

OPERAND_NAMES = (
    "q", "k", "v", "sinks", "alibi_slopes",
    "q_segment_ids", "kv_segment_ids", "cu_seqlens_q", "cu_seqlens_k", "seqused_k",
)  # fmt: skip
FIRST_INTEGER_OPERAND = 5  # from here on operands are int32: ids and lengths
COTANGENT_NAMES = ("out", "lse", "dout", "dlse")
BWD_OPERAND_NAMES = OPERAND_NAMES + COTANGENT_NAMES
GRADIENT_NAMES = ("dq", "dk", "dv", "dsinks", "dalibi_slopes")
"""Of the first five operands, in their order: what the backward pass returns, the last two where those are given."""
BACKENDS = ("cpu", "sm80", "sm90")
CAUSAL_ALIGNS = ("bottom_right", "top_left")

Spec = tuple[str, tuple[int, ...]]
"""A dtype's name and a shape."""


def function_of(operands: Collection[str]) -> str:
    """The public function that a call with these operands is one of."""
    return "flash_mha_varlen" if "cu_seqlens_q" in operands else "flash_mha"


@dataclass(frozen=True)
class AttentionStatics:
    """What is fixed while tracing. Hashable: it is part of every cache key."""

    softmax_scale: float | None = None
    is_causal: bool = False
    causal_align: str = "bottom_right"
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    return_lse: bool = False
    deterministic: bool = False
    backend: str | None = None
    max_seqlen: tuple[int, int] = (-1, -1)  # of flash_mha_varlen: the longest sequence of q and of k


@dataclass(frozen=True)
class Candidate:
    """One kernel that was considered, and why it declined (empty: it serves the problem)."""

    name: str
    backend: str
    reason: str


@dataclass(frozen=True)
class Resolution:
    """What a valid problem returns, and which kernel serves it.

    Attributes:
        workspace_shape: float32 that the kernel has a use for, private to it. Its last axis is 0 where it has none: the
            call then gets no workspace.
    """

    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    out_dtype: str
    workspace_shape: tuple[int, ...]
    chosen: str | None
    workspace_bytes: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class OpResolution:
    """What a valid problem of any op but attention's forward returns, and which kernel serves it.

    Attributes:
        results: dtype and shape of each result, the last of which is the workspace (float32, private to the kernel)
            where the op has one. Attention's backward: dq, dk, dv, then dsinks and dalibi_slopes where those operands
            are there (float32, one per batch row), then the workspace.
    """

    results: tuple[Spec, ...]
    chosen: str | None
    workspace_bytes: int
    candidates: tuple[Candidate, ...]

    @property
    def workspace_shape(self) -> tuple[int, ...]:
        """The last result's shape, for an op that has a workspace."""
        return self.results[-1][1]


def wrong_kind(name: str, value: Any, expected: str) -> TypeError:
    kind = type(value).__name__
    if hasattr(value, "aval") or hasattr(value, "__jax_array__"):  # a tracer, or a JAX array
        return TypeError(
            f"{name}: got a JAX value ({kind}), expected {expected}. It must be a Python value while tracing: pass it "
            f"through static_argnames=('{name}',) of jax.jit, or close over it."
        )
    return TypeError(f"{name}: got {value!r} of type {kind}, expected {expected}")


def real_value(name: str, value: Any) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (numbers.Real, np.floating, np.integer)):
        raise wrong_kind(name, value, "a Python float")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: got {str(value)[:40]}..., expected a finite number") from None


def flag_value(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise wrong_kind(name, value, "True or False")
    return bool(value)


def integer_value(name: str, value: Any, expected: str = "a Python integer") -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise wrong_kind(name, value, expected)
    if not -(2**63) <= int(value) < 2**63:
        raise ValueError(f"{name}: got {value}, expected {expected} that fits 64 bits")
    return int(value)


def choice_value(name: str, value: Any, allowed: Sequence[str]) -> str:
    if not isinstance(value, str):
        raise wrong_kind(name, value, "one of " + ", ".join(map(repr, allowed)))
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, allowed))}")
    return value


def attention_statics(
    *,
    softmax_scale: Any,
    is_causal: Any,
    causal_align: Any,
    window_size: Any,
    softcap: Any,
    return_lse: Any,
    deterministic: Any,
    backend: Any,
    max_seqlen_q: Any = -1,
    max_seqlen_k: Any = -1,
) -> AttentionStatics:
    """Checks the kinds of the static arguments (their values are checked with the problem)."""
    if not isinstance(window_size, (tuple, list)):
        raise wrong_kind("window_size", window_size, "a pair of Python integers")
    if len(window_size) != 2:
        raise ValueError(f"window_size: got {window_size!r}, expected a pair of Python integers")
    left, right = (integer_value("window_size", side, "a pair of Python integers") for side in window_size)
    return AttentionStatics(
        softmax_scale=None if softmax_scale is None else real_value("softmax_scale", softmax_scale),
        is_causal=flag_value("is_causal", is_causal),
        causal_align=choice_value("causal_align", causal_align, CAUSAL_ALIGNS),
        window_size=(left, right),
        softcap=0.0 if softcap is None else real_value("softcap", softcap),
        return_lse=flag_value("return_lse", return_lse),
        deterministic=flag_value("deterministic", deterministic),
        backend=None if backend is None else choice_value("backend", backend, BACKENDS),
        max_seqlen=(integer_value("max_seqlen_q", max_seqlen_q), integer_value("max_seqlen_k", max_seqlen_k)),
    )


def _shape_text(name: str, shape: Sequence[Any]) -> str:
    for size in shape:
        if not isinstance(size, (int, np.integer)):
            raise ValueError(
                f"{name}: got the symbolic dimension {size} in shape ({', '.join(map(str, shape))}), expected constant "
                "sizes. heed chooses kernels from sizes: export once per shape."
            )
    return ",".join(str(int(size)) for size in shape)


def require_rank(function_name: str, shape: Sequence[Any]) -> None:
    """The native library takes further leading axes (they come from `vmap`); the public functions do not."""
    is_varlen = "varlen" in function_name
    axes = "[total_q, num_q_heads, head_dim]" if is_varlen else "[batch, q_len, num_q_heads, head_dim]"
    rank = axes.count(",") + 1
    if len(shape) > rank:
        raise ValueError(
            f"q: got shape [{', '.join(map(str, shape))}] of rank {len(shape)}, expected rank {rank}: {axes} "
            "(jax.vmap maps over further axes)"
        )


def operands_text(names: Sequence[str], specs: Sequence[Spec | None]) -> str:
    return "".join(
        f";{name}={spec[0]}[{_shape_text(name, spec[1])}]"
        for name, spec in zip(names, specs, strict=True)
        if spec is not None
    )


def _options_text(statics: AttentionStatics, is_varlen: bool, lse: str) -> str:
    scale = "default" if statics.softmax_scale is None else statics.softmax_scale.hex()
    left, right = statics.window_size
    max_seqlen = ";max_seqlen={},{}".format(*statics.max_seqlen) if is_varlen else ""
    return (
        f";scale={scale};causal={int(statics.is_causal)};align={statics.causal_align}"
        f";window={left},{right}{max_seqlen};softcap={statics.softcap.hex()}{lse}"
        f";deterministic={int(statics.deterministic)};backend={statics.backend or 'auto'}"
    )


def _is_varlen(specs: Sequence[Spec | None]) -> bool:
    return specs[OPERAND_NAMES.index("cu_seqlens_q")] is not None


def attention_text(statics: AttentionStatics, specs: Sequence[Spec | None]) -> str:
    """The problem's text (its schema is in `src/core/problem.h`); `specs` follow `OPERAND_NAMES`."""
    options = _options_text(statics, _is_varlen(specs), f";lse={int(statics.return_lse)}")
    return "attention_fwd.v1" + operands_text(OPERAND_NAMES, specs) + options


def attention_bwd_text(statics: AttentionStatics, specs: Sequence[Spec | None]) -> str:
    """The backward problem's text (`src/core/attention_bwd_problem.h`); `specs` follow `BWD_OPERAND_NAMES`."""
    options = _options_text(statics, _is_varlen(specs), "")
    return "attention_bwd.v1" + operands_text(BWD_OPERAND_NAMES, specs) + options


@functools.lru_cache(maxsize=4096)
def resolve_attention(text: str, target: str) -> Resolution:
    """Validates the problem and picks its kernel for the target ("cpu", "sm_80", "sm_90a", ...).

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, what it got and what was expected.
    """
    found = _resolve("attention_fwd_resolve", text, target)
    return Resolution(
        out_shape=tuple(found["out_shape"]),
        lse_shape=tuple(found["lse_shape"]),
        out_dtype=str(found["out_dtype"]),
        workspace_shape=tuple(found["workspace_shape"]),
        chosen=str(found["chosen"]) or None,
        workspace_bytes=int(found["workspace_bytes"]),
        candidates=tuple(Candidate(*map(str, row)) for row in found["candidates"]),
    )


def resolve_attention_bwd(text: str, target: str) -> OpResolution:
    """`resolve_attention` of a backward problem (`attention_bwd_text`). Raises the same."""
    return resolve_op("attention_bwd", text, target)


@functools.lru_cache(maxsize=4096)
def resolve_op(stem: str, text: str, target: str) -> OpResolution:
    """`resolve_attention` of the problem of another op, by its stem. Raises the same."""
    found = _resolve(f"{stem}_resolve", text, target)
    return OpResolution(
        results=tuple((str(dtype), tuple(map(int, shape))) for dtype, shape in found["results"]),
        chosen=str(found["chosen"]) or None,
        workspace_bytes=int(found["workspace_bytes"]),
        candidates=tuple(Candidate(*map(str, row)) for row in found["candidates"]),
    )


def _resolve(export: str, text: str, target: str) -> Any:
    try:
        return function(export)(text, target)
    except (ValueError, TypeError) as error:
        raise type(error)(str(error)) from None  # without the native frames


def require_kernel(resolution: Resolution | OpResolution, what: str, target: str) -> None:
    """Raises UnsupportedError, with every candidate's reason, if no kernel serves the problem on the target."""
    if resolution.chosen is not None:
        return
    reasons = {candidate.name: candidate.reason for candidate in resolution.candidates}
    lines = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
    raise UnsupportedError(f"{what}: no kernel serves this call on target {target}:{lines}", reasons)
