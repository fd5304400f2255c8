"""heed.ops: gated activations, rotary embeddings, RMS norms, and attention of one query over a KV cache.

Every function takes JAX arrays (under `jit`, `vmap`, `grad`, `scan` and with sharded leading axes too), NumPy arrays,
or any other with DLPack (PyTorch, CuPy), and returns arrays of the same kind; nothing is written in place. Kinds do not
mix, but NumPy operands beside JAX ones count as JAX arrays. JAX and PyTorch differentiate all of them.

Dtypes are float32, float16 and bfloat16, arithmetic is float32, and results are bitwise the same at every call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

from heed._arrays import common_kind
from heed._attention import torch_wants_grad
from heed._problem import BACKENDS, choice_value, flag_value, integer_value, real_value
from heed._small_ops import (
    ACT_AND_MUL,
    ATTENTION_DECODE,
    KV_LAYOUTS,
    RMS_NORM,
    ROPE,
    ActStatics,
    Call,
    DecodeStatics,
    NormStatics,
    RopeStatics,
    call_of,
    check_indptr,
    check_pos_ids,
    run_eagerly,
)

__all__ = [
    "apply_llama31_rope",
    "apply_rope",
    "apply_rope_pos_ids",
    "apply_rope_with_cos_sin_cache",
    "fused_add_rms_norm",
    "gelu_and_mul",
    "gelu_tanh_and_mul",
    "rms_norm",
    "silu_and_mul",
    "single_decode",
]

_P = ParamSpec("_P")


def _runs(describe: Callable[_P, Any]) -> Callable[_P, Any]:
    """A public function from one that only describes its call (which `heed.explain` reads from `__wrapped__`)."""

    @functools.wraps(describe)
    def function(*args: _P.args, **kwargs: _P.kwargs) -> Any:
        return _run(describe(*args, **kwargs))

    return function


def _run(call: Call) -> Any:
    """Runs a call on arrays of any one kind, or stages it if they are traced."""
    op, operands = call.op, call.operands
    kind = common_kind(op.names, operands)
    if kind == "jax":
        op.require_ranks([None if x is None else x.shape for x in operands])
        from heed import _jax_ops

        return getattr(_jax_ops, op.stem)(call.statics, *operands)
    if kind == "torch" and torch_wants_grad(operands):
        from heed import _torch_ops

        results = _torch_ops.run(call)
    else:
        results = run_eagerly(kind, op, call.function, call.statics, operands)
    return results if len(results) > 1 else results[0]


def _backend(value: Any) -> str | None:
    return None if value is None else choice_value("backend", value, BACKENDS)


# Gated activations.


def _act_and_mul(activation: str, x: Any, backend: Any) -> Call:
    return call_of(f"ops.{activation}_and_mul", ACT_AND_MUL, ActStatics(activation, _backend(backend)), {"x": x})


@_runs
def silu_and_mul(x: Any, *, backend: str | None = None) -> Any:
    """The gated SiLU of a feed-forward layer, SwiGLU (Shazeer 2020): `silu(x[..., :H]) * x[..., H:]`.

    `silu(a) = a / (1 + exp(-a))`, in float32, rounded once.

    Args:
        x: `[..., 2H]`, float32, float16 or bfloat16: the gates, then what they are multiplied with, as one matrix
            product gives both. H is 1 or more; any leading axes, none included.
        backend: None chooses; "cpu" or "sm80" forces a kernel family.

    Returns:
        `[..., H]`, of x's dtype and kind of array. Differentiable once with respect to x.

    Raises:
        ValueError: the last axis is odd or empty; the last axis is sharded.
        TypeError: a dtype or kind of array is wrong.
        UnsupportedError: no kernel serves the call where it would run; `.reasons` has each candidate's reason.
        RuntimeError: on a GPU: no driver, no compiler for a kernel that is not there yet, or what CUDA reports.
        NotImplementedError: its gradient is differentiated again, or a PyTorch tensor has a forward-mode tangent.
    """
    return _act_and_mul("silu", x, backend)


@_runs
def gelu_and_mul(x: Any, *, backend: str | None = None) -> Any:
    """The gated GELU of a feed-forward layer, GEGLU (Shazeer 2020): `gelu(x[..., :H]) * x[..., H:]`.

    `gelu(a) = a / 2 * (1 + erf(a / sqrt(2)))`, the exact one (Hendrycks and Gimpel 2016), in float32, rounded once.
    Arguments, result and errors are those of `silu_and_mul`.
    """
    return _act_and_mul("gelu", x, backend)


@_runs
def gelu_tanh_and_mul(x: Any, *, backend: str | None = None) -> Any:
    """The gated GELU by its tanh approximation: `gelu_tanh(x[..., :H]) * x[..., H:]`.

    `gelu_tanh(a) = a / 2 * (1 + tanh(sqrt(2 / pi) * (a + 0.044715 a^3)))` (Hendrycks and Gimpel 2016), in float32,
    rounded once. Arguments, result and errors are those of `silu_and_mul`.
    """
    return _act_and_mul("gelu_tanh", x, backend)


# Rotary embeddings.


def _rope_statics(
    rotary_dim: Any, interleave: Any, rope_scale: Any, rope_theta: Any, backend: Any, llama31: Any = None
) -> RopeStatics:
    if rotary_dim is not None:
        rotary_dim = integer_value("rotary_dim", rotary_dim, "None or a Python integer")
        if rotary_dim <= 0:
            raise ValueError(f"rotary_dim: got {rotary_dim}, expected None or an even number from 2 to head_dim")
    return RopeStatics(
        rotary_dim=rotary_dim,
        interleave=flag_value("interleave", interleave),
        scale=real_value("rope_scale", rope_scale),
        theta=real_value("rope_theta", rope_theta),
        llama31=llama31,
        backend=_backend(backend),
    )


@_runs
def apply_rope(
    q: Any,
    k: Any,
    indptr: Any,
    offsets: Any,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
    *,
    backend: str | None = None,
) -> Any:
    """Rotary position embeddings (Su et al. 2021) on packed sequences.

    Token r of sequence i, at row `indptr[i] + r`, sits at position `offsets[i] + r`. Pair j of the first rotary_dim
    elements of each head is rotated by `position / rope_scale * rope_theta^(-2j / rotary_dim)`; the elements after them
    stay, and so do rows outside every sequence. Angles are accurate to float32 at any position up to 2^20.

    Args:
        q: `[tokens, num_q_heads, head_dim]`, float32, float16 or bfloat16. head_dim from 1 to 256.
        k: `[tokens, num_kv_heads, head_dim]`, dtype of q.
        indptr: integers `[sequences + 1]`, not decreasing: sequence i has the rows from `indptr[i]` up to
            `indptr[i + 1]`. NumPy values are checked; JAX's and a GPU's are clamped to the rows that there are.
        offsets: integers `[sequences]`: the position of each sequence's first token. Any integer dtype, cast to int32.
        rotary_dim: how many elements of a head are rotated, even; None: all of them.
        interleave: pairs are `(2j, 2j + 1)`; otherwise `(j, j + rotary_dim / 2)`, as in Llama's usual checkpoints.
        rope_scale: positions are divided by it.
        rope_theta: base of the frequencies.
        backend: None chooses; "cpu" or "sm80" forces a kernel family.

    Returns:
        `(q_rope, k_rope)` of the shapes, dtype and kind of q and k. Differentiable with respect to both; the gradient
        is the inverse rotation and may be differentiated again. Forward mode works too.

    Raises:
        ValueError: a shape or value is wrong; an axis is sharded that cannot be. The message names it, got and
            expected.
        TypeError: a dtype or kind of array is wrong, or a traced value stands where a static one is needed.
        UnsupportedError: no kernel serves the call where it would run; `.reasons` has each candidate's reason.
        RuntimeError: on a GPU: no driver, no compiler for a kernel that is not there yet, or what CUDA reports.
    """
    check_indptr(indptr, q)
    statics = _rope_statics(rotary_dim, interleave, rope_scale, rope_theta, backend)
    return call_of("ops.apply_rope", ROPE, statics, {"q": q, "k": k, "indptr": indptr, "offsets": offsets})


@_runs
def apply_llama31_rope(
    q: Any,
    k: Any,
    indptr: Any,
    offsets: Any,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8.0,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    old_context_len: float = 8192.0,
    *,
    backend: str | None = None,
) -> Any:
    """`apply_rope` with the frequencies of Llama 3.1, which reaches beyond the context that it was trained on.

    A frequency f makes `t = f * old_context_len / (2 pi)` turns within the old context. Those that make at least
    high_freq_factor turns stay, those that make at most low_freq_factor are divided by rope_scale, and between them
    `f * (s + (1 - s) / rope_scale)` blends both, `s = (t - low_freq_factor) / (high_freq_factor - low_freq_factor)`.

    Args:
        q, k, indptr, offsets, rotary_dim, interleave, rope_theta, backend: as in `apply_rope`.
        rope_scale: low frequencies are divided by it. (Positions are not.)
        low_freq_factor, high_freq_factor: bounds of the blend, in turns; the high one is the greater.
        old_context_len: tokens of the context that the model was trained on first.

    Returns:
        `(q_rope, k_rope)`, as `apply_rope`, and the same errors.
    """
    check_indptr(indptr, q)
    llama31 = (
        real_value("low_freq_factor", low_freq_factor),
        real_value("high_freq_factor", high_freq_factor),
        real_value("old_context_len", old_context_len),
    )
    statics = _rope_statics(rotary_dim, interleave, rope_scale, rope_theta, backend, llama31)
    return call_of("ops.apply_llama31_rope", ROPE, statics, {"q": q, "k": k, "indptr": indptr, "offsets": offsets})


@_runs
def apply_rope_pos_ids(
    q: Any,
    k: Any,
    pos_ids: Any,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
    *,
    backend: str | None = None,
) -> Any:
    """`apply_rope` with the position of every token by itself.

    Args:
        q, k, rotary_dim, interleave, rope_scale, rope_theta, backend: as in `apply_rope`.
        pos_ids: integers `[tokens]`, in any order. Any integer dtype, cast to int32.

    Returns:
        `(q_rope, k_rope)`, as `apply_rope`, and the same errors.
    """
    statics = _rope_statics(rotary_dim, interleave, rope_scale, rope_theta, backend)
    return call_of("ops.apply_rope_pos_ids", ROPE, statics, {"q": q, "k": k, "pos_ids": pos_ids})


@_runs
def apply_rope_with_cos_sin_cache(
    q: Any, k: Any, pos_ids: Any, cos_sin_cache: Any, interleave: bool = False, *, backend: str | None = None
) -> Any:
    """`apply_rope_pos_ids` with cosines and sines from a table, whatever frequencies it was made from.

    Args:
        q, k, interleave, backend: as in `apply_rope`.
        pos_ids: integers `[tokens]`: rows of the table. NumPy values are checked; JAX's and a GPU's are clamped to it.
        cos_sin_cache: float32 `[positions, rotary_dim]`: the rotary_dim / 2 cosines of a position, then its sines. It
            is a constant: asking for its gradient raises NotImplementedError.

    Returns:
        `(q_rope, k_rope)`, as `apply_rope`, and the same errors.
    """
    check_pos_ids(pos_ids, cos_sin_cache)
    statics = RopeStatics(interleave=flag_value("interleave", interleave), backend=_backend(backend))
    operands = {"q": q, "k": k, "pos_ids": pos_ids, "cos_sin_cache": cos_sin_cache}
    return call_of("ops.apply_rope_with_cos_sin_cache", ROPE, statics, operands)


# Norms.


@_runs
def rms_norm(x: Any, weight: Any, eps: float = 1e-6, *, backend: str | None = None) -> Any:
    """Root mean square layer normalisation (Zhang and Sennrich 2019): `x / sqrt(mean(x^2) + eps) * weight`.

    The mean is over the last axis; everything is float32 and rounded once.

    Args:
        x: `[..., H]`, float32, float16 or bfloat16, H of 1 or more.
        weight: `[H]`, dtype of x.
        eps: added to the mean, 0 or more.
        backend: None chooses; "cpu" or "sm80" forces a kernel family.

    Returns:
        Shape, dtype and kind of x. Differentiable once with respect to x and weight; weight's gradient is summed in
        float32, in the same order at every call.

    Raises:
        ValueError, TypeError, UnsupportedError, RuntimeError, NotImplementedError: as `silu_and_mul`.
    """
    statics = NormStatics(real_value("eps", eps), _backend(backend))
    return call_of("ops.rms_norm", RMS_NORM, statics, {"x": x, "weight": weight})


@_runs
def fused_add_rms_norm(x: Any, residual: Any, weight: Any, eps: float = 1e-6, *, backend: str | None = None) -> Any:
    """`rms_norm` of a sum, and the sum: what stands between the blocks of a transformer, in one pass over memory.

    Args:
        x: `[..., H]`, float32, float16 or bfloat16: what a block returned.
        residual: shape and dtype of x: what it was given.
        weight, eps, backend: as in `rms_norm`.

    Returns:
        `(normed, total)`, both like x: `total = x + residual` in x's dtype, and `normed = rms_norm(total, weight, eps)`
        of that rounded sum. Nothing is overwritten. Both are differentiable, once.

    Raises:
        ValueError, TypeError, UnsupportedError, RuntimeError, NotImplementedError: as `silu_and_mul`.
    """
    statics = NormStatics(real_value("eps", eps), _backend(backend))
    return call_of("ops.fused_add_rms_norm", RMS_NORM, statics, {"x": x, "weight": weight, "residual": residual})


# Decode.


@_runs
def single_decode(
    q: Any,
    k: Any,
    v: Any,
    *,
    kv_layout: str = "NHD",
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention of one query token over the KV cache of one sequence: a decode step's attention.

    The query is the last of the S tokens, at position S - 1. For every visible key s, with
    `score_s = sm_scale * <q, k_s>`, soft-capped, then with ALiBi, then masked: `out = sum_s softmax(score)_s v_s`, in
    float32. K and V are read once for all query heads that share a KV head, and long caches are divided among the
    whole machine.

    Args:
        q: `[num_q_heads, head_dim]`, float32, float16 or bfloat16. head_dim from 1 to 256.
        k: `[kv_len, num_kv_heads, head_dim]`, or `[num_kv_heads, kv_len, head_dim]` with kv_layout "HND"; dtype of q.
            num_q_heads is a multiple of num_kv_heads: query head h reads KV head
            `h // (num_q_heads // num_kv_heads)`.
        v: `[kv_len, num_kv_heads, head_dim_v]` or `[num_kv_heads, kv_len, head_dim_v]`, dtype of q. head_dim_v from 1
            to 256 may differ from head_dim.
        kv_layout: "NHD" or "HND", the axes of k and v.
        window_left: keys that are visible before the last one; -1: all.
        logits_soft_cap: scores become `cap * tanh(score / cap)`; None or 0 is off.
        sm_scale: factor of the scores; None means `1 / sqrt(head_dim)`.
        rope_scale, rope_theta: if either is given, q and k are rotated first: pairs `(j, j + head_dim / 2)` by
            `position / rope_scale * rope_theta^(-2j / head_dim)`, key s at position s and the query at S - 1. The other
            then has its default, 1 or 1e4. With neither, nothing is rotated.
        alibi_slopes: float32 `[num_q_heads]`: scores get `-slope * (S - 1 - s)` (Press et al. 2022).
        sinks: float32 `[num_q_heads]`: one raw logit per head that joins the softmax denominator and carries no value.
        return_lse: also return the log-sum-exp of the scores.
        batch_invariant: bitwise the same result alone and beside any others under `jax.vmap`.
        backend: None chooses; "cpu" or "sm80" forces a kernel family.

    Returns:
        out `[num_q_heads, head_dim_v]` in q's dtype, or `(out, lse)` with lse float32 `[num_q_heads]`, the natural log
        of the softmax denominator, sink included (such lse must not be merged with others as if they were those of
        plain attention, or the sink counts twice). An empty cache gives out 0 and lse -inf, or the sink.

        Differentiable once with respect to q, k, v, sinks and alibi_slopes, by the kernels of `heed.flash_mha` and
        bitwise reproducibly. If q and k are rotated, both passes of a differentiated call compute in float32 what is
        rounded at the end only.

    Raises:
        ValueError, TypeError, UnsupportedError, RuntimeError, NotImplementedError: as `heed.flash_mha`.
    """
    rope = None
    if rope_scale is not None or rope_theta is not None:
        rope = (
            1.0 if rope_scale is None else real_value("rope_scale", rope_scale),
            1e4 if rope_theta is None else real_value("rope_theta", rope_theta),
        )
    statics = DecodeStatics(
        kv_layout=choice_value("kv_layout", kv_layout, KV_LAYOUTS),
        window_left=integer_value("window_left", window_left),
        softcap=0.0 if logits_soft_cap is None else real_value("logits_soft_cap", logits_soft_cap),
        scale=None if sm_scale is None else real_value("sm_scale", sm_scale),
        rope=rope,
        return_lse=flag_value("return_lse", return_lse),
        batch_invariant=flag_value("batch_invariant", batch_invariant),
        backend=_backend(backend),
    )
    operands = {"q": q, "k": k, "v": v, "sinks": sinks, "alibi_slopes": alibi_slopes}
    return call_of("ops.single_decode", ATTENTION_DECODE, statics, operands, optional=("sinks", "alibi_slopes"))
