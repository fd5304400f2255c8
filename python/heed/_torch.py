"""PyTorch's autograd over the eager functions. Imported only when tensors that require grad are met."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from heed._attention import Operands, run_eagerly
from heed._attention_bwd import run_bwd_eagerly
from heed._problem import OPERAND_NAMES, AttentionStatics


def attention(function_name: str, statics: AttentionStatics, operands: Operands) -> Any:
    """Attention on tensors of which some require grad. Returns out or (out, lse), both with their history."""
    out, lse = _Attention.apply(function_name, dataclasses.replace(statics, return_lse=True), *operands)
    return (out, lse) if statics.return_lse else out


def attention_bwd(function_name: str, statics: AttentionStatics, operands: Operands) -> Any:
    """The gradients of attention, as tensors that say so if they are differentiated. See BWD_OPERAND_NAMES."""
    return _AttentionBwd.apply(function_name, statics, *operands)


def no_forward_mode(function_name: str) -> NotImplementedError:
    """For a dual number that meets a function without a derivative in forward mode."""
    return NotImplementedError(
        f"heed.{function_name}: got a tensor with a tangent (torch.autograd.forward_ad, torch.func.jvp), expected "
        "derivatives in reverse mode only (torch.autograd.grad, torch.func.grad)"
    )


class _Attention(torch.autograd.Function):
    """(function name, statics, *operands) -> out, lse."""

    @staticmethod
    def forward(function_name: str, statics: AttentionStatics, *operands: Any) -> Any:
        return run_eagerly("torch", function_name, statics, operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.function_name, ctx.statics, *operands = inputs
        ctx.save_for_backward(*operands, *output)
        ctx.set_materialize_grads(False)  # an lse that nobody uses has no gradient to read

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        *operands, out, lse = ctx.saved_tensors
        dout, dlse = cotangents
        dout = torch.zeros_like(out) if dout is None else dout
        statics = dataclasses.replace(ctx.statics, return_lse=False)
        gradients = attention_bwd(f"{ctx.function_name}_bwd", statics, (*operands, out, lse, dout, dlse))
        return (None, None, *gradients, *(None for _ in OPERAND_NAMES[len(gradients) :]))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise no_forward_mode(ctx.function_name)


class _AttentionBwd(torch.autograd.Function):
    """(function name, statics, *operands) -> dq, dk, dv, dsinks, dalibi_slopes. It has no gradient of its own."""

    @staticmethod
    def forward(function_name: str, statics: AttentionStatics, *operands: Any) -> Any:
        return tuple(run_bwd_eagerly("torch", function_name, statics, operands))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.function_name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise NotImplementedError(
            f"heed.{ctx.function_name}: got a derivative of its gradients, expected first derivatives only: the "
            "backward pass is a kernel that has no derivative itself"
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise no_forward_mode(ctx.function_name)
