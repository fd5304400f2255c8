"""flash_mha_varlen: the public function, and the checks of lengths that lie in the host's memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from heed._attention import Operands, attend
from heed._problem import AttentionStatics, attention_statics


def flash_mha_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int = -1,
    max_seqlen_k: int = -1,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    *,
    seqused_k: Any = None,
    softcap: float | None = None,
    sinks: Any = None,
    alibi_slopes: Any = None,
    causal_align: str = "bottom_right",
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
) -> Any:
    """`flash_mha` on sequences of different lengths that lie one after the other, without padding.

    Sequence b has the queries `q[cu_seqlens_q[b] : cu_seqlens_q[b + 1]]` and the keys and values
    `[cu_seqlens_k[b] : cu_seqlens_k[b + 1]]`, or the first `seqused_k[b]` of them. Each sequence attends to itself
    alone: masks, windows and ALiBi go by its own two lengths. Lengths may be 0, anywhere.

    Lengths are read where they are, on the device: new values need no new trace and no synchronisation. The values of
    NumPy arrays are checked. Other arrays' values (traced, or on a device) are clamped to what q and k hold; memory
    outside the operands is never read or written, whatever the values are. Such values that decrease leave undefined
    rows (on a GPU these may stay unwritten).

    Args:
        q: `[total_q, num_q_heads, head_dim]`, float32, float16 or bfloat16. head_dim from 1 to 256.
        k: `[total_k, num_kv_heads, head_dim]`, dtype of q. num_q_heads is a multiple of num_kv_heads.
        v: `[total_k, num_kv_heads, head_dim_v]`, dtype of q. head_dim_v from 1 to 256 may differ from head_dim.
        cu_seqlens_q: integers `[batch + 1]`, not decreasing: where each sequence's queries begin and end. Rows
            of q before the first and after the last value belong to no sequence. Any integer dtype; cast to int32.
        cu_seqlens_k: the same for keys and values; None means cu_seqlens_q. What lies outside all sequences is not
            read.
        max_seqlen_q: an upper bound of the sequences' numbers of queries; -1 means total_q. Kernels may use it to plan
            their work; rows of a longer sequence past it are undefined.
        max_seqlen_k: the same for keys; -1 means total_k.
        softmax_scale: factor of the scores; None means `1 / sqrt(head_dim)`.
        is_causal: query i of a sequence sees keys up to its diagonal (see causal_align). Overrides the right side of
            window_size.
        window_size: `(left, right)` tokens kept on either side of the diagonal; -1 is unbounded.
        seqused_k: integers `[batch]`: how many of each sequence's keys count, at most all of them (clamped).
            The others may hold anything. None: all count.
        softcap: scores become `softcap * tanh(score / softcap)`; None or 0 is off.
        sinks: float32 `[num_q_heads]`: one raw logit per head that joins the softmax denominator (see `flash_mha`).
        alibi_slopes: float32 `[num_q_heads]`: scores get `-slope * |distance from the diagonal|`.
        causal_align: which corner a sequence's diagonal ends in: "bottom_right" (query i sits at key
            `i + kv_len - q_len`, by the sequence's own lengths, seqused_k included) or "top_left" (at key i).
        return_lse: also return the log-sum-exp of the scores.
        deterministic: results and gradients are bitwise reproducible, or the call raises. Only gradients on a GPU are
            not in any case (see `flash_mha_varlen_bwd`).
        backend: None chooses; "cpu", "sm80" or "sm90" forces a kernel family, in gradients too, for which there is no
            "sm90" yet.

    Returns:
        out `[total_q, num_q_heads, head_dim_v]` in q's dtype, or `(out, lse)` with lse float32
        `[num_q_heads, total_q]`, the natural log of the whole softmax denominator, sink included. A query that sees no
        key gets out 0 and lse -inf, or its sink. Rows outside every sequence get out 0 and lse -inf, also with sinks.

        Arrays of JAX, NumPy, PyTorch and other DLPack frameworks give arrays of the same kind. Kinds do not mix, but
        NumPy operands beside JAX ones count as JAX arrays.

        out and lse are differentiable with respect to q, k, v, sinks and alibi_slopes, by `jax.grad` and by PyTorch's
        autograd; `flash_mha_varlen_bwd` is the same as a function, for everyone else.

    Raises:
        ValueError: a shape or value is wrong, or lengths in a NumPy array are negative, decrease, reach beyond q or k,
            or exceed max_seqlen; a token axis or a length operand is sharded. The message names it, got and expected.
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
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    operands = (q, k, v, sinks, alibi_slopes, None, None, cu_seqlens_q, cu_seqlens_k, seqused_k)
    require_cu_seqlens(cu_seqlens_q)
    check_lengths(statics, operands)
    return attend("flash_mha_varlen", statics, operands)


def require_cu_seqlens(cu_seqlens_q: Any) -> None:
    if cu_seqlens_q is None:
        raise TypeError("cu_seqlens_q: got None, expected an integer array [batch + 1]")


def check_lengths(statics: AttentionStatics, operands: Operands) -> None:
    """Checks the values of lengths in NumPy arrays. Wrong shapes and dtypes are left to the checks that follow."""
    q, k = operands[:2]
    cu_q, cu_k, seqused_k = (x if _is_lengths(x) else None for x in operands[-3:])
    used = None
    if seqused_k is not None and seqused_k.size:
        if int(seqused_k.min()) < 0:
            at = int(seqused_k.argmin())
            raise ValueError(f"seqused_k: got {seqused_k[at]} for sequence {at}, expected 0 or more")
        used = seqused_k
    serves_k = operands[-2] is None
    if cu_q is not None:
        _check_cu_seqlens("cu_seqlens_q", cu_q, {"q": q, "k": k} if serves_k else {"q": q})
        _check_longest("max_seqlen_q", statics.max_seqlen[0], cu_q, None)
    if cu_k is not None:
        _check_cu_seqlens("cu_seqlens_k", cu_k, {"k": k})
    if operands[-1] is None or used is not None:
        _check_longest("max_seqlen_k", statics.max_seqlen[1], cu_q if serves_k else cu_k, used)


def _is_lengths(value: Any) -> bool:
    is_plain = isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray)
    return is_plain and value.ndim == 1 and value.dtype.kind in "iu" and value.size > 0


def _check_cu_seqlens(name: str, cu_seqlens: np.ndarray[Any, Any], arrays: dict[str, Any]) -> None:
    """`arrays` are those whose rows the values count."""
    decreases = cu_seqlens[1:] < cu_seqlens[:-1]
    if decreases.any():
        at = int(decreases.argmax())
        raise ValueError(
            f"{name}: got {cu_seqlens[at + 1]} after {cu_seqlens[at]} at index {at + 1}, expected values that do not "
            "decrease"
        )
    if cu_seqlens[0] < 0:
        raise ValueError(f"{name}: got {cu_seqlens[0]} at index 0, expected values of 0 or more")
    end = int(cu_seqlens[-1])
    for what, array in arrays.items():
        shape: tuple[Any, ...] = tuple(getattr(array, "shape", ()))
        if len(shape) != 3 or not isinstance(shape[0], (int, np.integer)):  # refused later, or a symbol
            continue
        if end > shape[0]:
            also = "" if what == name[-1] else ", which it serves for too, as there is no cu_seqlens_k"
            raise ValueError(
                f"{name}: got {end} as the end of the last sequence, expected at most {shape[0]}, the rows of "
                f"{what}{also}"
            )


def _check_longest(
    name: str, bound: int, cu_seqlens: np.ndarray[Any, Any] | None, used: np.ndarray[Any, Any] | None
) -> None:
    if bound < 0 or cu_seqlens is None or cu_seqlens.size < 2:
        return
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    if used is not None:
        if used.shape != lengths.shape:
            return
        lengths = np.minimum(lengths, used)
    longest = int(lengths.max())
    if longest > bound:
        raise ValueError(
            f"{name}: got {bound}, expected -1 or at least {longest}, the length of sequence {int(lengths.argmax())}"
        )
