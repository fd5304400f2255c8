"""heed.ops on a GPU in any memory layout, the sums of norms' gradients, and launches that overlap.

Conformance is in test_ops.py; repeats, streams, graphs and devices in test_ops_gpu.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import heed
from conftest import from_torch, to_torch
from heed._small_ops import RMS_NORM_BWD, NormStatics, run_eagerly
from small_op_faces import call_of, expected
from small_op_specs import BY_NAME, ActSpec, NormSpec, OpSpec, RopeSpec
from tolerance import assert_close

pytestmark = pytest.mark.gpu


@pytest.fixture
def torch() -> Iterator[Any]:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    yield torch
    torch.cuda.empty_cache()


def check(spec: OpSpec, results: list[Any], what: str) -> None:
    for want, result in zip(expected(spec.case()), results, strict=True):
        want.check(from_torch(result), f"{spec.name}, {what}")


# Memory layouts.

LAID_OUT: list[OpSpec] = [
    BY_NAME["silu_rank_4"],
    ActSpec("gpu_silu", lead=(3, 5), hidden=64, dtype="bfloat16"),
    RopeSpec("gpu_rope", (40, 3), 2, 8, 2, 128, dtype="float16"),
    RopeSpec("gpu_rope_interleaved", (40, 3), 2, 8, 2, 64, rotary_dim=32, interleave=True, dtype="bfloat16"),
    NormSpec("gpu_norm", (3, 5), 512, dtype="bfloat16"),
    NormSpec("gpu_norm_add", (3, 5), 2048, residual=True, dtype="float16"),
    BY_NAME["decode_tutorial_float16"],
]


def spaced(torch: Any, x: Any) -> Any:
    """Every second element of a tensor."""
    whole = torch.full((*x.shape, 2), 7.0, device=x.device).to(x.dtype)
    whole[..., 0] = x
    return whole[..., 0]


def odd_address(torch: Any, x: Any) -> Any:
    """Contiguous from one element after a multiple of 16 bytes."""
    memory = torch.empty(x.numel() + 1, device=x.device, dtype=x.dtype)
    return memory[1:].view(x.shape).copy_(x)


def padded_rows(torch: Any, x: Any) -> Any:
    """The first columns of wider rows, aligned to 16 bytes."""
    whole = torch.full((*x.shape[:-1], x.shape[-1] + 16), 7.0, device=x.device).to(x.dtype)
    whole[..., : x.shape[-1]] = x
    return whole[..., : x.shape[-1]]


def swapped_axes(torch: Any, x: Any) -> Any:
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim > 1 else x


@pytest.mark.parametrize("change", [spaced, odd_address, padded_rows, swapped_axes])
@pytest.mark.parametrize("spec", LAID_OUT, ids=lambda spec: spec.name)
def test_any_memory_layout(torch: Any, spec: OpSpec, change: Any) -> None:
    case = spec.case()
    arrays = {name: change(torch, to_torch(x, "cuda:0")) for name, x in case.arrays.items()}
    check(spec, call_of(case)(arrays), change.__name__)


# Sums over rows, and launches that overlap.


@pytest.mark.parametrize(("rows", "hidden"), [(3000, 128), (1000, 4096), (997, 61), (40, 16392)])
def test_weight_gradients_have_the_same_bits_and_add_all_rows(torch: Any, rows: int, hidden: int) -> None:
    """Also on a device that other kernels keep busy."""
    generator = torch.Generator("cuda:0").manual_seed(0)
    x, dout = (torch.randn(rows, hidden, device="cuda:0", generator=generator) for _ in range(2))
    weight = torch.ones(hidden, device="cuda:0")
    other = torch.cuda.Stream()
    found = []
    for _ in range(20):
        with torch.cuda.stream(other):
            torch.randn(1 << 22, device="cuda:0").sort()
        found.append(
            run_eagerly("torch", RMS_NORM_BWD, "ops.rms_norm", NormStatics(1e-6, None), (x, weight, dout, None))
        )
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for one in found[1:] for a, b in zip(found[0], one, strict=True))
    x64 = x.double()
    oracle = (dout.double() * x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + 1e-6)).sum(0)
    naive = (dout * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).sum(0)
    found_sum, naive_sum, oracle_sum = (one.cpu().numpy() for one in (found[0][1], naive, oracle))
    assert_close(found_sum, naive_sum, oracle_sum, np.float32, f"dweight of {rows} rows")


def test_calls_wait_for_what_was_written_just_before(torch: Any) -> None:
    """Each call reads what the one before wrote; kernels are made ready early."""
    x = torch.randn(300, 2 * 1024, device="cuda:0", dtype=torch.bfloat16)
    weight = torch.ones(1024, device="cuda:0", dtype=torch.bfloat16)

    def step(x: Any, wait: bool) -> Any:
        for _ in range(30):
            out = heed.ops.silu_and_mul(x)
            if wait:
                torch.cuda.synchronize()
            normed = heed.ops.rms_norm(out, weight)
            if wait:
                torch.cuda.synchronize()
            x = torch.cat([normed, out], dim=-1)
        return x

    assert torch.equal(step(x, wait=False), step(x, wait=True))


# More than 2^31 elements in rows that are not aligned: their kernel counts elements.


def test_odd_rows_of_more_than_2_to_the_31_elements(torch: Any) -> None:
    hidden = 32749
    rows = (1 << 31) // hidden + 3
    x = torch.zeros(rows, 2 * hidden, device="cuda:0", dtype=torch.bfloat16)
    chosen = [0, 1, rows // 2, rows - 2, rows - 1]
    x[chosen] = torch.randn(len(chosen), 2 * hidden, device="cuda:0").to(x.dtype)
    out = heed.ops.silu_and_mul(x)
    assert torch.equal(out[chosen], heed.ops.silu_and_mul(x[chosen].contiguous()))
    assert int((out != 0).any(dim=-1).sum()) == len(chosen)
