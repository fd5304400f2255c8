"""PyTorch's autograd over `heed.ops`. Imported only when tensors are met that require grad or have a tangent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from heed import _attention
from heed._attention_bwd import run_bwd_eagerly
from heed._problem import AttentionStatics
from heed._small_ops import (
    ACT_AND_MUL_BWD,
    ATTENTION_DECODE,
    RMS_NORM_BWD,
    ROPE,
    Call,
    DecodeStatics,
    RopeStatics,
    resolve_eagerly,
    run_eagerly,
)
from heed._torch import no_forward_mode

Tensors = tuple[Any, ...]


def run(call: Call) -> Tensors:
    """Runs a call on tensors of which some require grad or have a tangent. Returns its results, with theirs."""
    named = dict(zip(call.op.names, call.operands, strict=True))
    cache = named.get("cos_sin_cache")
    if cache is not None and (cache.requires_grad or _attention.torch_has_tangent(cache)):
        what = "requires grad" if cache.requires_grad else "has a tangent"
        raise NotImplementedError(
            f"cos_sin_cache: got a tensor that {what}, expected a constant: the table has no gradient"
        )
    returns_lse = getattr(call.statics, "return_lse", None)
    statics = call.statics if returns_lse is None else dataclasses.replace(call.statics, return_lse=True)
    results: Tensors = _Forward.apply(call._replace(statics=statics, operands=()), *call.operands)
    if returns_lse is None:
        return results
    return results[: 1 + returns_lse]  # the rest is for the backward pass


class _Forward(torch.autograd.Function):
    """(call without its operands, *operands) -> results."""

    @staticmethod
    def forward(call: Call, *operands: Any) -> Any:
        if call.op is ATTENTION_DECODE and call.statics.rope is not None:
            return _rotated_decode(call, operands)
        return run_eagerly("torch", call.op, call.function, call.statics, operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: Tensors, output: Tensors) -> None:
        ctx.call, *operands = inputs
        kept = _RULES[ctx.call.op.stem].keep(tuple(operands), output)
        ctx.save_for_backward(*kept)
        if ctx.call.op is ROPE:
            ctx.save_for_forward(*kept)
        if ctx.call.op is ATTENTION_DECODE:
            ctx.mark_non_differentiable(*output[2:])
        # A result that nobody uses has no gradient to read; only a rotation has no other way to leave one out.
        ctx.set_materialize_grads(ctx.call.op is ROPE)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        if all(x is None for x in cotangents):  # what PyTorch calls an undefined gradient: zeros that nobody wrote
            return (None,) * (1 + len(ctx.call.op.names))
        return None, *_RULES[ctx.call.op.stem].differentiate(ctx.call, ctx.saved_tensors, cotangents)

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> Any:
        """A rotation is linear: the tangents are rotated. The other ops have no derivative in forward mode."""
        if ctx.call.op is not ROPE:
            raise no_forward_mode(ctx.call.function)
        return _Forward.apply(ctx.call, *tangents[:2], *ctx.saved_tensors)


class _Once(torch.autograd.Function):
    """(function's name, function of tensors, *tensors) -> its results, which have no gradient of their own."""

    @staticmethod
    def forward(name: str, function: Callable[..., Tensors], *tensors: Any) -> Any:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Tensors, output: Tensors) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise NotImplementedError(
            f"heed.{ctx.name}: got a derivative of its gradient, expected first derivatives only: the backward pass is "
            "a kernel that has no derivative itself"
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise no_forward_mode(ctx.name)


class _Rule(NamedTuple):
    """How one op is differentiated.

    Attributes:
        keep: what the backward pass needs of (operands, results).
        differentiate: (call, what was kept, cotangents or None of the results) -> gradients of the operands.
    """

    keep: Callable[[Tensors, Tensors], Tensors]
    differentiate: Callable[[Call, Tensors, Tensors], Tensors]


def _act_gradients(call: Call, kept: Tensors, cotangents: Tensors) -> Tensors:
    def gradients(x: Any, dout: Any) -> Tensors:
        return run_eagerly("torch", ACT_AND_MUL_BWD, call.function, call.statics, (x, dout))

    dx: Tensors = _Once.apply(call.function, gradients, *kept, *cotangents)
    return dx


def _rope_gradients(call: Call, kept: Tensors, cotangents: Tensors) -> Tensors:
    """The inverse rotation of the cotangents: an op of its own, so that it has a gradient too."""
    statics = dataclasses.replace(call.statics, inverse=not call.statics.inverse)
    dq, dk = _Forward.apply(call._replace(statics=statics), *cotangents, *kept)
    return dq, dk, None, None, None, None


def _norm_gradients(call: Call, kept: Tensors, cotangents: Tensors) -> Tensors:
    def gradients(total: Any, weight: Any, dout: Any, dsum: Any) -> Tensors:
        dx, dweight = run_eagerly("torch", RMS_NORM_BWD, call.function, call.statics, (total, weight, dout, dsum))
        return dx, dweight.to(weight.dtype)

    total, weight = kept
    dout, dsum = (*cotangents, None)[:2]
    dout = torch.zeros_like(total) if dout is None else dout
    dx, dweight = _Once.apply(call.function, gradients, total, weight, dout, dsum)
    return dx, dweight, dx if len(cotangents) > 1 else None


def _decode_gradients(call: Call, kept: Tensors, cotangents: Tensors) -> Tensors:
    def gradients(*tensors: Any) -> Tensors:
        return _decode_bwd(call.statics, *tensors)

    out = kept[-2]
    dout = torch.zeros_like(out) if cotangents[0] is None else cotangents[0].to(out.dtype)
    found: Tensors = _Once.apply(call.function, gradients, *kept, dout, cotangents[1])
    return found


def _rotated_decode(call: Call, operands: Tensors) -> Tensors:
    """out, lse and, if out is rounded, also what it was rounded from.

    They are attention's, of the very numbers that the backward pass computes scores from. Decode kernels differ in what
    they round of a rotated key, and probabilities from one kernel's scores and another one's LSE do not sum to 1.
    """
    resolve_eagerly("torch", call.op, call.function, call.statics, operands)  # says what is wrong as the kernel would
    q, k, v, *per_head = operands
    statics = dataclasses.replace(_attention_statics(call.statics), return_lse=True)
    given = (*_attention_operands(call.statics, q, k, v), *per_head, *(None,) * 5)
    out, lse = _attention.run_eagerly("torch", call.function, statics, given)
    out, lse = out[0, 0], lse[0, :, 0]
    return (out, lse) if out.dtype == q.dtype else (out.to(q.dtype), lse, out)


def _decode_bwd(
    statics: DecodeStatics, q: Any, k: Any, v: Any, sinks: Any, slopes: Any, out: Any, lse: Any, dout: Any, dlse: Any
) -> Tensors:
    """The gradients of q, k, v, sinks and slopes: attention's, of one query row, on what was rotated."""
    operands = (*_attention_operands(statics, q, k, v), sinks, slopes, *(None,) * 5)
    results = (out[None, None], lse[None, :, None], dout[None, None], None if dlse is None else dlse[None, :, None])
    found = run_bwd_eagerly("torch", "flash_mha_bwd", _attention_statics(statics), (*operands, *results))
    dq, dk = _rotate(statics, found.dq[0, 0], found.dk[0], inverse=True)
    dv = found.dv[0]
    if statics.kv_layout == "HND":
        dk, dv = dk.transpose(0, 1), dv.transpose(0, 1)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), found.dsinks, found.dalibi_slopes


def _attention_statics(statics: DecodeStatics) -> AttentionStatics:
    return AttentionStatics(
        softmax_scale=statics.scale,
        window_size=(statics.window_left, -1),
        softcap=statics.softcap,
        deterministic=True,
        backend=statics.backend,
    )


def _attention_operands(statics: DecodeStatics, q: Any, k: Any, v: Any) -> Tensors:
    """q, k and v of attention with one query. What is rotated is float32: it is rounded nowhere."""
    if statics.kv_layout == "HND":
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    if statics.rope is not None:
        q, k = _rotate(statics, q.float(), k.float(), inverse=False)
        v = v.float()
    return q[None, None], k[None], v[None]


def _rotate(statics: DecodeStatics, q: Any, k: Any, inverse: bool) -> tuple[Any, Any]:
    """q `[heads, head_dim]` at the position of the last key, and keys `[kv_len, heads, head_dim]` at theirs."""
    if statics.rope is None:
        return q, k
    scale, theta = statics.rope
    rope = RopeStatics(scale=scale, theta=theta, inverse=inverse, backend=statics.backend)

    def rotate(x: Any, pos_ids: Any) -> Any:  # the op rotates a pair: the other is as small as it can be
        return run_eagerly("torch", ROPE, "ops.single_decode", rope, (x, x[:, :1], None, None, pos_ids, None))[0]

    positions = torch.arange(k.shape[0], dtype=torch.int32, device=k.device)
    last = torch.full((1,), max(k.shape[0] - 1, 0), dtype=torch.int32, device=k.device)
    return rotate(q[None], last)[0], rotate(k, positions)


def _keep_decode(operands: Tensors, results: Tensors) -> Tensors:
    """The operands, and out and lse as exactly as they are known."""
    out, lse, *wide = results
    return *operands, *(wide or [out]), lse


def _keep_norm(operands: Tensors, results: Tensors) -> Tensors:
    """What was normalised, and the weight."""
    return results[1] if len(results) > 1 else operands[0], operands[1]


_RULES = {
    "act_and_mul": _Rule(lambda operands, _: operands, _act_gradients),
    "rope": _Rule(lambda operands, _: operands[2:], _rope_gradients),
    "rms_norm": _Rule(_keep_norm, _norm_gradients),
    "attention_decode": _Rule(_keep_decode, _decode_gradients),
}
