"""flash_mha_bwd and flash_mha_varlen_bwd: the gradients as functions of their own, and what autograd is made of."""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any, NamedTuple

from heed._arrays import DLPackOps, common_kind
from heed._attention import Operands, eager_operands, require_operands, split_segment_ids, torch_wants_grad
from heed._attention_varlen import check_lengths, require_cu_seqlens
from heed._problem import (
    BWD_OPERAND_NAMES,
    GRADIENT_NAMES,
    OPERAND_NAMES,
    AttentionStatics,
    OpResolution,
    Spec,
    attention_bwd_text,
    attention_statics,
    require_kernel,
    require_rank,
    resolve_attention_bwd,
)


class AttentionGradients(NamedTuple):
    """What `flash_mha_bwd` and `flash_mha_varlen_bwd` return.

    Attributes:
        dq: shape and dtype of q.
        dk: shape and dtype of k.
        dv: shape and dtype of v.
        dsinks: float32 `[num_q_heads]`; None where sinks are absent.
        dalibi_slopes: float32 `[num_q_heads]`; None where alibi_slopes are absent.
    """

    dq: Any
    dk: Any
    dv: Any
    dsinks: Any = None
    dalibi_slopes: Any = None


def flash_mha_bwd(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    *,
    dlse: Any = None,
    segment_ids: Any = None,
    softcap: float | None = None,
    sinks: Any = None,
    alibi_slopes: Any = None,
    causal_align: str = "bottom_right",
    deterministic: bool = False,
    backend: str | None = None,
) -> AttentionGradients:
    """The gradients of `flash_mha`: of `sum(dout * out) + sum(dlse * lse)` with respect to its operands.

    `jax.grad` and PyTorch's autograd call it through `flash_mha`. It is for those who write their own: NumPy and CuPy
    have no autograd, and a training loop may want to hold `out` and `lse` itself. Nothing of the size
    q_len x kv_len is in memory: scores are computed again from q, k and lse.

    Gradients of queries that see no key are 0 (only their sink gets one), and what a mask hides contributes exactly 0,
    whatever q, k, v or dout hold there. Sums are float32; on a GPU, float16 and bfloat16 round probabilities and score
    gradients to that dtype before they meet another matrix, as any 16-bit attention does.

    Args:
        dout: `[batch, q_len, num_q_heads, head_dim_v]`, dtype of q: the gradient of out.
        q, k, v: as they were given to `flash_mha`; so are all arguments of the same names.
        out, lse: what `flash_mha(..., return_lse=True)` returned for them.
        dlse: float32 `[batch, num_q_heads, q_len]`: the gradient of lse. None: lse was not used.
        deterministic: results are bitwise reproducible, or the call raises. On the CPU they always are. On a GPU
            the default adds in whatever order blocks finish. PyTorch's `use_deterministic_algorithms(True)` turns
            it on as well.
        backend: None chooses; "cpu" or "sm80" forces a kernel family.

    Returns:
        `AttentionGradients(dq, dk, dv, dsinks, dalibi_slopes)`, arrays of the kind that was given. Gradients of k and v
        are summed over the query heads that share a KV head, those of sinks and slopes over batch and queries.

    Raises:
        ValueError, TypeError, UnsupportedError, RuntimeError: as `flash_mha`.
        NotImplementedError: the gradients are to be differentiated again.
    """
    statics = attention_statics(
        softmax_scale=softmax_scale,
        is_causal=is_causal,
        causal_align=causal_align,
        window_size=window_size,
        softcap=softcap,
        return_lse=False,
        deterministic=deterministic,
        backend=backend,
    )
    ids = split_segment_ids(segment_ids)
    return _differentiate(
        "flash_mha_bwd", statics, (q, k, v, sinks, alibi_slopes, *ids, None, None, None, out, lse, dout, dlse)
    )


def flash_mha_varlen_bwd(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int = -1,
    max_seqlen_k: int = -1,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    *,
    seqused_k: Any = None,
    dlse: Any = None,
    softcap: float | None = None,
    sinks: Any = None,
    alibi_slopes: Any = None,
    causal_align: str = "bottom_right",
    deterministic: bool = False,
    backend: str | None = None,
) -> AttentionGradients:
    """The gradients of `flash_mha_varlen`: of `sum(dout * out) + sum(dlse * lse)` with respect to its operands.

    `flash_mha_bwd` on packed sequences. Rows of q outside every sequence have gradient 0, and so have keys that no
    sequence uses; what q, k, v, dout and dlse hold there does not matter.

    Args:
        dout: `[total_q, num_q_heads, head_dim_v]`, dtype of q: the gradient of out.
        q, k, v: as they were given to `flash_mha_varlen`; so are all arguments of the same names.
        out, lse: what `flash_mha_varlen(..., return_lse=True)` returned for them.
        dlse: float32 `[num_q_heads, total_q]`: the gradient of lse. None: lse was not used.
        deterministic, backend: as in `flash_mha_bwd`.

    Returns:
        `AttentionGradients(dq, dk, dv, dsinks, dalibi_slopes)`, arrays of the kind that was given.

    Raises:
        ValueError, TypeError, UnsupportedError, RuntimeError: as `flash_mha_varlen`.
        NotImplementedError: the gradients are to be differentiated again.
    """
    statics = attention_statics(
        softmax_scale=softmax_scale,
        is_causal=is_causal,
        causal_align=causal_align,
        window_size=window_size,
        softcap=softcap,
        return_lse=False,
        deterministic=deterministic,
        backend=backend,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    operands = (q, k, v, sinks, alibi_slopes, None, None, cu_seqlens_q, cu_seqlens_k, seqused_k)
    require_cu_seqlens(cu_seqlens_q)
    check_lengths(statics, operands)
    return _differentiate("flash_mha_varlen_bwd", statics, (*operands, out, lse, dout, dlse))


def _differentiate(function_name: str, statics: AttentionStatics, operands: Operands) -> AttentionGradients:
    """Runs the backward pass on arrays of any one kind, or stages it if they are traced."""
    require_operands(BWD_OPERAND_NAMES, operands)
    kind = common_kind(BWD_OPERAND_NAMES, operands)
    if kind == "jax":
        require_rank(function_name, operands[0].shape)
        from heed import _jax_attention

        return AttentionGradients(*_jax_attention.attention_bwd(statics, operands))
    if kind == "torch" and torch_wants_grad(operands):
        from heed import _torch

        return AttentionGradients(*_torch.attention_bwd(function_name, statics, operands))
    return run_bwd_eagerly(kind, function_name, statics, operands)


@functools.lru_cache(maxsize=4096)
def _resolved(
    function_name: str, statics: AttentionStatics, specs: tuple[Spec | None, ...], target: str
) -> tuple[str, OpResolution]:
    """The problem's text and what it resolves to. Raises on what is wrong or cannot be served."""
    text = attention_bwd_text(statics, specs)
    resolution = resolve_attention_bwd(text, target)
    require_kernel(resolution, function_name, target)
    return text, resolution


def run_bwd_eagerly(kind: str, function_name: str, statics: AttentionStatics, operands: Operands) -> AttentionGradients:
    """Runs on NumPy arrays or another framework's, at once. `operands` follow BWD_OPERAND_NAMES."""
    ops = DLPackOps(kind, operands[0])
    operands, specs = eager_operands(ops, BWD_OPERAND_NAMES, operands)
    require_rank(function_name, specs[0][1] if specs[0] is not None else ())
    if kind == "torch" and sys.modules["torch"].are_deterministic_algorithms_enabled():
        statics = dataclasses.replace(statics, deterministic=True)
    text, resolution = _resolved(function_name, statics, specs, ops.target())
    results = [ops.empty(shape, dtype) for dtype, shape in resolution.results]  # the workspace is the last
    inputs = [
        ops.view(value, name) for name, value in zip(BWD_OPERAND_NAMES, operands, strict=True) if value is not None
    ]
    ops.run("attention_bwd", text, *inputs, *map(ops.view_out, results))
    names = [name for name, value in zip(GRADIENT_NAMES, operands, strict=False) if value is not None]
    gradients = dict(zip(names, results, strict=False))
    is_per_batch_row = operands[OPERAND_NAMES.index("cu_seqlens_q")] is None
    for name in names[3:]:
        if is_per_batch_row:
            gradients[name] = ops.sum_over_first(gradients[name])
    return AttentionGradients(**gradients)
