"""flash_mha, and what flash_mha_varlen shares with it: the eager path for arrays that are not JAX's."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

from heed._arrays import DLPackOps, common_kind
from heed._problem import (
    FIRST_INTEGER_OPERAND,
    OPERAND_NAMES,
    AttentionStatics,
    Resolution,
    Spec,
    attention_statics,
    attention_text,
    require_kernel,
    require_rank,
    resolve_attention,
)

Operands = tuple[Any, ...]
"""The operands of attention in the order of OPERAND_NAMES; None where one is absent."""


def flash_mha(
    q: Any,
    k: Any,
    v: Any,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    *,
    segment_ids: Any = None,
    softcap: float | None = None,
    sinks: Any = None,
    alibi_slopes: Any = None,
    causal_align: str = "bottom_right",
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
) -> Any:
    """Exact softmax attention without the score matrix in memory (Dao et al. 2022, "FlashAttention").

    For query i and every visible key j of its head, with `s_j = softmax_scale * <q_i, k_j>`, soft-capped, then with
    ALiBi, then masked: `out_i = sum_j softmax(s)_j v_j`. Scores, softmax and accumulation are float32 for every dtype.

    Args:
        q: `[batch, q_len, num_q_heads, head_dim]`, float32, float16 or bfloat16. head_dim from 1 to 256; multiples of 8
            are fastest.
        k: `[batch, kv_len, num_kv_heads, head_dim]`, dtype of q. num_q_heads is a multiple of num_kv_heads (1: MQA,
            fewer than num_q_heads: GQA; query head h reads KV head `h // (num_q_heads // num_kv_heads)`).
        v: `[batch, kv_len, num_kv_heads, head_dim_v]`, dtype of q. head_dim_v from 1 to 256 may differ from head_dim.
        softmax_scale: factor of the scores; None means `1 / sqrt(head_dim)`.
        is_causal: query i sees keys up to its diagonal (see causal_align). Overrides the right side of window_size.
        window_size: `(left, right)` tokens kept on either side of the diagonal; -1 is unbounded.
        segment_ids: integers `[batch, q_len]` (then q_len == kv_len), or a pair for q and kv, `[batch, q_len]` and
            `[batch, kv_len]`: a query sees keys of its own segment only. Any integer dtype; cast to int32.
        softcap: scores become `softcap * tanh(score / softcap)`; None or 0 is off.
        sinks: float32 `[num_q_heads]`: one raw logit per head, neither scaled nor capped, that joins the softmax
            denominator and carries no value.
        alibi_slopes: float32 `[num_q_heads]`: scores get `-slope * |distance from the diagonal|` (Press et al. 2022).
        causal_align: which corner the diagonal of causal masks, windows and ALiBi ends in: "bottom_right" (query i sits
            at key `i + kv_len - q_len`, as in FlashAttention from 2.1 on) or "top_left" (at key i).
        return_lse: also return the log-sum-exp of the scores.
        deterministic: results and gradients are bitwise reproducible, or the call raises. Only gradients on a GPU are
            not in any case (see `flash_mha_bwd`).
        backend: None chooses; "cpu", "sm80" or "sm90" forces a kernel family, in gradients too, for which there is no
            "sm90" yet.

    Returns:
        out `[batch, q_len, num_q_heads, head_dim_v]` in q's dtype, or `(out, lse)` with lse float32
        `[batch, num_q_heads, q_len]`, the natural log of the whole softmax denominator. A query that sees no key gets
        out 0 and lse -inf. With sinks the lse includes the sink (a query that sees no key: lse is the sink); such lse
        must not be merged as if they were those of plain attention, or the sink counts twice.

        JAX arrays give JAX arrays (under `jit`, `vmap`, `scan` and with sharded batch or heads too), NumPy arrays give
        NumPy arrays, PyTorch tensors give PyTorch tensors. Kinds do not mix, but NumPy operands beside JAX ones count
        as JAX arrays.

        out and lse are differentiable with respect to q, k, v, sinks and alibi_slopes, by `jax.grad` and by PyTorch's
        autograd; `flash_mha_bwd` is the same as a function, for everyone else.

    Raises:
        ValueError: a shape or value is wrong; a token axis is sharded. The message names it, got and expected. (Where
            only XLA's propagation finds the sharded axis, JAX raises its own error around that message.)
        TypeError: a dtype or kind of array is wrong, or a traced value stands where a static one is needed.
        UnsupportedError: no kernel serves the call where it would run; `.reasons` has each candidate's reason.
        RuntimeError: on a GPU: no driver, no compiler for a kernel that is not there yet, or what CUDA reports.
        NotImplementedError: its gradients are differentiated again, or a PyTorch tensor has a forward-mode tangent.
    """
    statics = attention_statics(
        softmax_scale=softmax_scale,
        is_causal=is_causal,
        causal_align=causal_align,
        window_size=window_size,
        softcap=softcap,
        return_lse=return_lse,
        deterministic=deterministic,
        backend=backend,
    )
    q_segment_ids, kv_segment_ids = split_segment_ids(segment_ids)
    return attend("flash_mha", statics, (q, k, v, sinks, alibi_slopes, q_segment_ids, kv_segment_ids, None, None, None))


def attend(function_name: str, statics: AttentionStatics, operands: Operands) -> Any:
    """Runs attention on arrays of any one kind, or stages it if they are traced."""
    require_operands(OPERAND_NAMES, operands)
    kind = common_kind(OPERAND_NAMES, operands)
    if kind == "jax":
        require_rank(function_name, operands[0].shape)
        from heed import _jax_attention

        return _jax_attention.attention(statics, operands)
    if kind == "torch" and torch_wants_grad(operands):
        from heed import _torch

        return _torch.attention(function_name, statics, operands)
    results = run_eagerly(kind, function_name, statics, operands)
    return results if statics.return_lse else results[0]


_REQUIRED = ("q", "k", "v", "out", "lse", "dout")


def require_operands(names: Sequence[str], values: Sequence[Any]) -> None:
    """Raises TypeError if an operand that has no default is None."""
    for name, value in zip(names, values, strict=True):
        if value is None and name in _REQUIRED:
            raise TypeError(f"{name}: got None, expected an array")


def torch_wants_grad(operands: Operands) -> bool:
    """Whether PyTorch is to record or differentiate what happens to these tensors."""
    given = [x for x in operands if x is not None]
    torch = sys.modules["torch"]
    return (any(x.requires_grad for x in given) and torch.is_grad_enabled()) or any(map(torch_has_tangent, given))


def torch_has_tangent(x: Any) -> bool:
    """Whether a tensor is a dual number of PyTorch's forward mode."""
    forward_ad = sys.modules["torch"].autograd.forward_ad
    # What this name holds is -1 outside of forward mode; to ask PyTorch for each tensor would cost a microsecond.
    if getattr(forward_ad, "_current_level", 0) < 0:
        return False
    return forward_ad.unpack_dual(x).tangent is not None


def split_segment_ids(segment_ids: Any) -> tuple[Any, Any]:
    """The segment ids of q and of kv, from one array for both or a pair."""
    if isinstance(segment_ids, (tuple, list)):
        if len(segment_ids) != 2 or any(ids is None for ids in segment_ids):
            raise ValueError(
                f"segment_ids: got a {type(segment_ids).__name__} of {len(segment_ids)}, expected one integer array "
                "[batch, q_len] or a pair of arrays for q and kv"
            )
        return segment_ids[0], segment_ids[1]
    return segment_ids, segment_ids


@functools.lru_cache(maxsize=4096)
def _resolved(
    function_name: str, statics: AttentionStatics, specs: tuple[Spec | None, ...], target: str
) -> tuple[str, Resolution]:
    """The problem's text and what it resolves to. Raises on what is wrong or cannot be served."""
    text = attention_text(statics, specs)
    resolution = resolve_attention(text, target)
    require_kernel(resolution, function_name, target)
    return text, resolution


def run_eagerly(kind: str, function_name: str, statics: AttentionStatics, operands: Operands) -> tuple[Any, ...]:
    """Runs on NumPy arrays or another framework's, at once. Returns (out,) or (out, lse) of the same kind."""
    ops = DLPackOps(kind, operands[0])
    operands, specs = eager_operands(ops, OPERAND_NAMES, operands)
    require_rank(function_name, specs[0][1] if specs[0] is not None else ())
    text, resolution = _resolved(function_name, statics, specs, ops.target())
    outputs = [ops.empty(resolution.out_shape, resolution.out_dtype)]
    if statics.return_lse:
        outputs.append(ops.empty(resolution.lse_shape, "float32"))
    scratch = [ops.empty(resolution.workspace_shape, "float32")] if resolution.workspace_bytes else []
    inputs = [ops.view(value, name) for name, value in zip(OPERAND_NAMES, operands, strict=True) if value is not None]
    ops.run("attention_fwd", text, *inputs, *map(ops.view_out, outputs + scratch))
    return tuple(outputs)


def eager_operands(
    ops: DLPackOps, names: Sequence[str], operands: Operands
) -> tuple[Operands, tuple[Spec | None, ...]]:
    """The operands with integers as int32, and their dtypes and shapes. `names` begin with OPERAND_NAMES."""
    first, last = FIRST_INTEGER_OPERAND, len(OPERAND_NAMES)
    if any(x is not None for x in operands[first:last]):
        integers = [
            None if x is None else ops.to_int32(name, x)
            for name, x in zip(names[first:last], operands[first:last], strict=True)
        ]
        operands = (*operands[:first], *integers, *operands[last:])
    specs = [None if value is None else ops.spec(name, value) for name, value in zip(names, operands, strict=True)]
    return operands, tuple(specs)
