"""The backward benchmark's shapes, who takes part in each, and whether heed's gradients are right there.

A *step* is what training does with one attention layer: the forward pass (with what its gradient needs) and the
backward pass. Everyone reads the same tensors, and allocates with torch's allocator. heed is called eagerly, by
`flash_mha` and `flash_mha_bwd`; torch's backends go through autograd.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import gpu_contenders as forward
import heed
from gpu_contenders import Inputs, Row, Run
from packed import PackedRow

FWD_BWD_WORK, BWD_WORK = 3.5, 2.5  # in forward passes: two products there, five in the backward pass

# What is timed hot only: the backward pass by itself explains a step, and the targets speak of steps.
HOT_ONLY = ("heed bwd", "fa2 bwd", "cudnn bwd", "heed bwd deterministic")
BWD_ALONE = HOT_ONLY


def dense_rows(is_quick: bool) -> list[Row]:
    """The rows in the order of their importance."""
    rows = []
    for group, heads, head_dim in (("d128", 16, 128), ("d64", 32, 64), ("d256", 8, 256)):
        if is_quick:
            tokens: tuple[int, ...] = (1024, 8192) if group == "d128" else (2048,)
        else:
            tokens = forward.TOKENS if group == "d128" else (512, 1024, 4096, 16384)
        rows += [Row(group, s, heads, heads, head_dim, causal) for causal in (False, True) for s in tokens]
    gqa = ((True, 4096),) if is_quick else tuple((causal, s) for causal in (False, True) for s in (1024, 4096, 16384))
    rows += [Row("gqa", s, 32, 8, 128, causal) for causal, s in gqa]
    window_tokens = (16384,) if is_quick else (4096, 16384)
    rows += [Row("window", s, 32, 8, 128, True, 1024) for s in window_tokens]
    return rows


def packed_rows(is_quick: bool) -> list[tuple[PackedRow, PackedRow]]:
    return forward.packed_rows()[1 if is_quick else 0 :]


def make_inputs(row: Row, device: str) -> Inputs:
    """The forward benchmark's tensors, and a gradient of the output."""
    return _with_dout(forward.make_inputs(row, device))


def make_packed_inputs(row: PackedRow, device: str) -> Inputs:
    return _with_dout(forward.make_packed_inputs(row, device))


def _with_dout(x: Inputs) -> Inputs:
    import torch

    return dataclasses.replace(x, dout=torch.randn_like(x.q))


# Who takes part. Each function makes the inputs' caller for one row, or raises if it cannot serve it; every caller
# returns (dq, dk, dv).


def _options(row: Row) -> dict[str, Any]:
    return {"is_causal": row.is_causal, "window_size": (row.window, 0) if row.window >= 0 else (-1, -1)}


def heed_step(row: Row, x: Inputs, deterministic: bool = False) -> Run:
    options = _options(row)

    def run() -> Any:
        out, lse = heed.flash_mha(x.q, x.k, x.v, return_lse=True, deterministic=deterministic, **options)
        found = heed.flash_mha_bwd(x.dout, x.q, x.k, x.v, out, lse, deterministic=deterministic, **options)
        return found.dq, found.dk, found.dv

    return run


def heed_backward(row: Row, x: Inputs, deterministic: bool = False) -> Run:
    options = _options(row)
    out, lse = heed.flash_mha(x.q, x.k, x.v, return_lse=True, **options)

    def run() -> Any:
        found = heed.flash_mha_bwd(x.dout, x.q, x.k, x.v, out, lse, deterministic=deterministic, **options)
        return found.dq, found.dk, found.dv

    return run


def heed_deterministic_step(row: Row, x: Inputs) -> Run:
    return heed_step(row, x, deterministic=True)


def heed_deterministic_backward(row: Row, x: Inputs) -> Run:
    return heed_backward(row, x, deterministic=True)


def heed_full_causal_step(row: Row, x: Inputs) -> Run:
    """The window row without its window."""
    return heed_step(dataclasses.replace(row, window=-1), x)


Forward = Callable[[Row, Inputs], tuple[Callable[[], Any], tuple[Any, Any, Any], Any]]
"""Makes (a call that returns the output, the leaves q, k, v, the output's gradient)."""


def sdpa_forward(backend: str) -> Forward:
    """torch's scaled_dot_product_attention with one backend forced, in its own layout [B, H, S, D]."""

    def make(row: Row, x: Inputs) -> tuple[Callable[[], Any], tuple[Any, Any, Any], Any]:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = getattr(SDPBackend, backend)
        q, k, v = (t.detach().transpose(1, 2).requires_grad_() for t in (x.q, x.k, x.v))
        attend = torch.nn.functional.scaled_dot_product_attention

        def run() -> Any:
            with sdpa_kernel(chosen):
                return attend(q, k, v, is_causal=row.is_causal, enable_gqa=row.q_heads != row.kv_heads)

        return run, (q, k, v), x.dout.transpose(1, 2)

    return make


def fa2_window_forward(row: Row, x: Inputs) -> tuple[Callable[[], Any], tuple[Any, Any, Any], Any]:
    """torch's FA2 by its own operator, since scaled_dot_product_attention has no windows."""
    import torch

    attend = torch.ops.aten._flash_attention_forward
    q, k, v = (t.detach().requires_grad_() for t in (x.q, x.k, x.v))
    window = {"window_size_left": row.window, "window_size_right": 0}
    return (
        lambda: attend(q, k, v, None, None, row.tokens, row.tokens, 0.0, True, False, **window)[0],
        (q, k, v),
        x.dout,
    )


def torch_step(make: Forward) -> Callable[[Row, Inputs], Run]:
    def step(row: Row, x: Inputs) -> Run:
        import torch

        run, leaves, dout = make(row, x)
        return lambda: torch.autograd.grad(run(), leaves, dout)

    return step


def torch_backward(make: Forward) -> Callable[[Row, Inputs], Run]:
    def backward(row: Row, x: Inputs) -> Run:
        import torch

        run, leaves, dout = make(row, x)
        out = run()
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    return backward


_HEED = {
    "heed": heed_step,
    "heed deterministic": heed_deterministic_step,
    "heed bwd": heed_backward,
    "heed bwd deterministic": heed_deterministic_backward,
}
_FA2, _CUDNN = sdpa_forward("FLASH_ATTENTION"), sdpa_forward("CUDNN_ATTENTION")
_SDPA = {
    "fa2": torch_step(_FA2),
    "cudnn": torch_step(_CUDNN),
    "fa2 bwd": torch_backward(_FA2),
    "cudnn bwd": torch_backward(_CUDNN),
}
CONTENDERS: Mapping[str, Mapping[str, Callable[[Row, Inputs], Run]]] = {
    **{group: {**_HEED, **_SDPA} for group in ("d128", "d64", "d256")},
    "gqa": {"heed": heed_step, "heed deterministic": heed_deterministic_step, "fa2": _SDPA["fa2"],
            "cudnn": _SDPA["cudnn"]},
    "window": {"heed": heed_step, "heed deterministic": heed_deterministic_step,
               "heed full causal": heed_full_causal_step, "fa2": torch_step(fa2_window_forward)},
}  # fmt: skip


def heed_packed_step(row: PackedRow, x: Inputs, deterministic: bool = False) -> Run:
    options: dict[str, Any] = {"is_causal": row.is_causal, "deterministic": deterministic}

    def run() -> Any:
        out, lse = heed.flash_mha_varlen(x.q, x.k, x.v, x.offsets, return_lse=True, **options)
        found = heed.flash_mha_varlen_bwd(x.dout, x.q, x.k, x.v, out, lse, x.offsets, **options)
        return found.dq, found.dk, found.dv

    return run


def heed_deterministic_packed_step(row: PackedRow, x: Inputs) -> Run:
    return heed_packed_step(row, x, deterministic=True)


def fa2_packed_step(row: PackedRow, x: Inputs) -> Run:
    """torch's FA2 on packed sequences, which takes the longest length from the host."""
    import torch

    attend, longest = torch.ops.aten._flash_attention_forward, max(row.lengths)
    q, k, v = (t.detach().requires_grad_() for t in (x.q, x.k, x.v))

    def run() -> Any:
        out = attend(q, k, v, x.offsets, x.offsets, longest, longest, 0.0, row.is_causal, False)[0]
        return torch.autograd.grad(out, (q, k, v), x.dout)

    return run


# Whether heed's gradients are right: the tests' rule, on one KV head with its query heads.

_CHUNK_ROWS = 1024


def head_gradients(row: Row, q: Any, k: Any, v: Any, dout: Any, is_naive: bool) -> tuple[Any, Any, Any]:
    """(dq [G, S, D], dk [S, D], dv [S, D]) of a KV head and the G query heads that share it, by the definition.

    q, dout [G, S, D] and k, v [S, D]. In float64; or, naive, in float32 with the weights, their gradients and the
    results rounded to the inputs' dtype, as a plain implementation would.
    """
    import torch

    dtype, storage = (torch.float32, q.dtype) if is_naive else (torch.float64, torch.float64)

    def rounded(t: Any) -> Any:
        return t.to(storage).to(dtype)

    q, k, v, dout = (t.to(dtype) for t in (q, k, v, dout))
    scale = row.head_dim**-0.5
    keys = torch.arange(row.tokens, device=q.device)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for first in range(0, row.tokens, _CHUNK_ROWS):
        at = slice(first, first + _CHUNK_ROWS)
        distance = keys[at, None] - keys
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if row.is_causal:
            hidden |= distance < 0
        if row.window >= 0:
            hidden |= distance > row.window
        scores = torch.where(hidden, -torch.inf, q[:, at] @ k.T * scale)
        p = torch.softmax(scores, -1)
        del scores
        out = rounded(rounded(p) @ v)
        delta = (out * dout[:, at]).sum(-1, keepdim=True)
        ds = rounded(p * (dout[:, at] @ v.T - delta))
        dv += (rounded(p).transpose(1, 2) @ dout[:, at]).sum(0)
        dk += (ds.transpose(1, 2) @ q[:, at]).sum(0) * scale
        dq[:, at] = ds @ k * scale
        del p, ds
    return rounded(dq), rounded(dk), rounded(dv)


def wrong_gradients(row: Row, x: Inputs, found: tuple[Any, Any, Any], num_rows: int = 256) -> str | None:
    """What is wrong with (dq, dk, dv) in one KV head of one batch row, on tokens drawn at random, or None."""
    rng = np.random.default_rng(row.tokens + row.head_dim)
    group = row.q_heads // row.kv_heads
    b, h = int(rng.integers(row.batch)), int(rng.integers(row.kv_heads))
    heads = slice(h * group, (h + 1) * group)
    inputs = (x.q[b, :, heads].transpose(0, 1), x.k[b, :, h], x.v[b, :, h], x.dout[b, :, heads].transpose(0, 1))
    oracle = head_gradients(row, *inputs, is_naive=False)
    naive = head_gradients(row, *inputs, is_naive=True)
    dq, dk, dv = found
    found = (dq[b, :, heads].transpose(0, 1), dk[b, :, h], dv[b, :, h])
    # Not the first token: where it sees itself only, its dq is 0 but for rounding, which nothing can be judged by.
    some = np.sort(rng.choice(np.arange(1, row.tokens), min(num_rows, row.tokens - 1), replace=False))
    for name, *results in zip(("dq", "dk", "dv"), found, naive, oracle, strict=True):
        x_, naive_, oracle_ = (t[..., some, :].double().cpu().numpy() for t in results)
        wrong = forward.verdict(x_, naive_, oracle_, f"{name} of {row.label}")
        if wrong:
            return wrong
    return None


def wrong_packed_gradients(row: PackedRow, x: Inputs, found: tuple[Any, Any, Any]) -> str | None:
    """The same for packed sequences, each of which is a dense row of batch 1."""
    for begin, length in zip(row.offsets, row.lengths, strict=False):
        at = slice(begin, begin + length)
        one = Row("packed", length, row.heads, row.heads, row.head_dim, row.is_causal, batch_tokens=length)
        inputs = Inputs(x.q[None, at], x.k[None, at], x.v[None, at], dout=x.dout[None, at])
        dq, dk, dv = (t[None, at] for t in found)
        wrong = wrong_gradients(one, inputs, (dq, dk, dv), num_rows=64)
        if wrong:
            return f"the sequence at {begin}: {wrong}"
    return None
