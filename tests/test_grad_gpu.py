"""Gradients on a GPU: repeats, agreement with the CPU, streams, graphs, memory, sizes beyond 32 bits.

Conformance is in test_flash_mha_grad.py, through the faces torch_gpu, cupy_gpu, jax_jit_gpu and jax_eager_gpu.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
import pytest

import heed
from conftest import each_array, from_cupy, from_torch, to_cupy, to_torch
from expected import (
    GradientCase,
    expected_gradients,
    expected_gradients_varlen,
    gradient_case,
    judge,
    judge_gradients,
)
from grad_faces import bwd_of
from heed.reference import Gradients
from specs import BY_NAME, CONFORMANCE, AttentionSpec
from test_gpu_eager import LAYOUTS, arrange, bits, capture
from varlen_specs import UNEVEN, UNEVEN_KV, VARLEN, VarlenSpec

pytestmark = pytest.mark.gpu

flash_mha: Any = heed.flash_mha  # mypy would match unpacked options with every parameter
flash_mha_bwd: Any = heed.flash_mha_bwd
flash_mha_varlen: Any = heed.flash_mha_varlen
flash_mha_varlen_bwd: Any = heed.flash_mha_varlen_bwd


@pytest.fixture
def torch() -> Any:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    return torch


@pytest.fixture
def cupy() -> Any:
    return pytest.importorskip("cupy")


class Call:
    """A named spec's backward pass on tensors of one device, out and lse made beforehand."""

    dout: Any
    dlse: Any

    def __init__(self, spec: AttentionSpec | VarlenSpec, seed: int = 0, device: str = "cuda:0", **options: Any) -> None:
        convert = functools.partial(to_torch, device=device)
        self.case: GradientCase = gradient_case(spec, seed)
        self.operands = [convert(x) for x in self.case.operands]
        self.dout, self.dlse = (None if x is None else convert(x) for x in self.case.cotangents)
        self.options = each_array(convert, self.case.arrays) | self.case.statics
        self.out, self.lse = getattr(heed, self.case.function)(*self.operands, return_lse=True, **self.options)
        self.options |= {"dlse": self.dlse, **options}

    def __call__(self) -> Any:
        backward = getattr(heed, f"{self.case.function}_bwd")
        return backward(self.dout, *self.operands, self.out, self.lse, **self.options)

    def check(self, found: Any, what: str) -> None:
        self.case.expected.check(to_host(found), what)


def to_host(found: Any) -> Gradients:
    return Gradients(*(None if x is None else from_torch(x) for x in found))


def num_differing(torch: Any, found: Any, want: Any) -> Any:
    """How many gradients differ in any bit, as a tensor on the GPU."""
    pairs = [(x, y) for x, y in zip(found, want, strict=True) if x is not None and x.numel()]
    return sum((bits(torch, x) != bits(torch, y)).any().to(torch.int64) for x, y in pairs)


# Repeats.

# Every tile shape, dtype and way of dividing the work.
REPEATED: dict[str, AttentionSpec | VarlenSpec] = {
    "d64_causal": AttentionSpec("bwd_d64_causal", 2, 512, 512, 8, 8, 64, dtype="bfloat16", is_causal=True),
    "d128_gqa": AttentionSpec("bwd_d128_gqa", 1, 500, 700, 16, 4, 128, dtype="float16"),
    "d128_mqa_causal": AttentionSpec("bwd_d128_mqa", 2, 300, 300, 16, 1, 128, dtype="bfloat16", is_causal=True),
    "d256_window": AttentionSpec("bwd_d256", 1, 400, 400, 4, 4, 256, dtype="bfloat16", window_size=(100, 30)),
    "d192_v128": AttentionSpec("bwd_d192", 1, 200, 300, 4, 2, 192, 128, dtype="float16", is_causal=True),
    "d80_odd": AttentionSpec("bwd_d80", 3, 133, 317, 5, 5, 80, 59, dtype="float16", is_causal=True),
    "d32": AttentionSpec("bwd_d32", 2, 257, 257, 4, 2, 32, dtype="bfloat16", softcap=20.0),
    "float32": AttentionSpec("bwd_float32", 1, 300, 300, 8, 2, 64, dtype="float32", is_causal=True),
    "float32_d128": AttentionSpec("bwd_float32_d128", 1, 200, 250, 4, 2, 128, dtype="float32"),
    "long_keys": AttentionSpec("bwd_long_keys", 1, 16, 4096, 4, 1, 64, dtype="bfloat16"),
    "everything": BY_NAME["everything"],
    "everything_top_left": BY_NAME["everything_top_left"],
    "packed": VarlenSpec("bwd_packed", UNEVEN, UNEVEN_KV, num_q_heads=8, head_dim_qk=128, is_causal=True,
                         dtype="bfloat16", sinks=True, alibi=True),
}  # fmt: skip


@pytest.mark.parametrize("name", REPEATED)
def test_1000_repeats_are_bitwise_equal(name: str, torch: Any) -> None:
    call = Call(REPEATED[name], deterministic=True)
    first = call()
    differing = torch.zeros((), dtype=torch.int64, device="cuda:0")
    for i in range(1000):
        # What the allocator hands out next, workspace included, holds other numbers each time.
        poison = [torch.full_like(x, float(i % 7) - 3.0) for x in first if x is not None]
        del poison
        differing += num_differing(torch, call(), first)
    assert int(differing) == 0, f"{name}: {int(differing)} gradients of 1000 calls differ from those of the first"


@pytest.mark.parametrize("spec", [*CONFORMANCE, *VARLEN], ids=lambda spec: spec.name)
def test_10_repeats_are_bitwise_equal(spec: AttentionSpec | VarlenSpec, torch: Any) -> None:
    call = Call(spec, deterministic=True)
    first = call()
    differing = sum(num_differing(torch, call(), first) for _ in range(9))
    assert int(differing) == 0, f"{int(differing)} gradients of 9 calls differ from those of the first"


@pytest.mark.parametrize("name", REPEATED)
def test_the_default_agrees_with_the_deterministic_one(name: str, torch: Any) -> None:
    def check(seed: int) -> None:
        call = Call(REPEATED[name], seed)
        default = call()
        call.options["deterministic"] = True
        fixed = call()
        call.check(default, f"{name}, default")
        call.check(fixed, f"{name}, deterministic")
        call.case.expected.check_agree(to_host(default), to_host(fixed), f"{name}, default and deterministic")

    judge(check)


# CPU against GPU.


@pytest.mark.parametrize("spec", [*CONFORMANCE, *VARLEN], ids=lambda spec: spec.name)
def test_the_gpu_agrees_with_the_cpu(spec: AttentionSpec | VarlenSpec, torch: Any) -> None:
    def check(case: GradientCase) -> None:
        on_cpu = bwd_of(case.function, case.operands, case.cotangents, case.arrays, **case.statics)
        operands = [to_torch(x) for x in case.operands]
        cotangents = [None if x is None else to_torch(x) for x in case.cotangents]
        on_gpu = bwd_of(case.function, operands, cotangents, each_array(to_torch, case.arrays), **case.statics)
        case.expected.check_agree(to_host(on_gpu), on_cpu, spec.name)

    judge_gradients(spec, check)


# Streams. The side stream is kept busy before it writes the inputs, and does not wait for the default stream: a call
# that ran anywhere else would read zeros.

SMALL = AttentionSpec("gpu_small_bwd", q_len=130, kv_len=190, num_q_heads=4, is_causal=True, sinks=True, alibi=True,
                      dtype="float16")  # fmt: skip


def assert_runs_on_current_torch_stream(torch: Any, device: str, seed: int) -> None:
    with torch.cuda.device(device):
        call = Call(SMALL, seed, device)
        call()  # nothing is compiled while the stream is busy
        late, side = Call(SMALL, seed, device), torch.cuda.Stream()
        given = [*late.operands, late.out, late.lse, late.dout]
        copies = [x.clone() for x in given]
        for x in given:
            x.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)  # about 0.1 s
            for x, y in zip(given, copies, strict=True):
                x.copy_(y)
            found = late()
            is_early = not side.query()
        side.synchronize()
        assert is_early, "the call waited for the stream: it must only launch"
        assert all(str(x.device) == device for x in found)
        late.check(found, f"side stream of {device}")


def assert_runs_on_current_cupy_stream(cupy: Any, device: int, seed: int) -> None:
    case = gradient_case(SMALL, seed)
    spin = cupy.RawKernel(
        'extern "C" __global__ void spin(long long n) { long long t = clock64(); while (clock64() - t < n) {} }', "spin"
    )
    with cupy.cuda.Device(device):
        arrays = each_array(to_cupy, case.arrays) | case.statics
        operands = [to_cupy(x) for x in case.operands]
        dout, dlse = (None if x is None else to_cupy(x) for x in case.cotangents)
        out, lse = flash_mha(*operands, return_lse=True, **arrays)
        flash_mha_bwd(dout, *operands, out, lse, dlse=dlse, **arrays)
        spin((1,), (1,), (np.int64(1),))
        late = [cupy.zeros_like(x) for x in (dout, *operands, out, lse)]
        side = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.Device().synchronize()
        with side:
            spin((1,), (1,), (np.int64(200_000_000),))
            for x, y in zip(late, (dout, *operands, out, lse), strict=True):
                cupy.copyto(x, y)
            found = flash_mha_bwd(*late, dlse=dlse, **arrays)
            is_early = not side.done
        side.synchronize()
        assert is_early, "the call waited for the stream: it must only launch"
        assert all(x.device.id == device for x in found)
        host = Gradients(*(from_cupy(x) for x in found))
        case.expected.check(host, f"side stream of CuPy's device {device}")


def test_torch_calls_run_on_the_current_stream(torch: Any) -> None:
    judge(lambda seed: assert_runs_on_current_torch_stream(torch, "cuda:0", seed))


def test_cupy_calls_run_on_the_current_stream(cupy: Any) -> None:
    judge(lambda seed: assert_runs_on_current_cupy_stream(cupy, 0, seed))


def test_autograd_runs_on_the_stream_of_the_forward_pass(torch: Any) -> None:
    spec = AttentionSpec("gpu_autograd", q_len=130, kv_len=190, num_q_heads=4, is_causal=True, dtype="float16")

    def check(seed: int) -> None:
        case = gradient_case(spec, seed)
        leaves = [to_torch(x).requires_grad_() for x in case.operands]
        dout = to_torch(case.cotangents[0])
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(100_000_000)
            out = flash_mha(*(x * 1 for x in leaves), **case.statics)
            (out * dout).sum().backward()
        torch.cuda.synchronize()
        want = expected_gradients((case.cotangents[0], None), case.operands, **case.statics)
        want.check(to_host([*(x.grad for x in leaves), None, None]), "autograd")

    judge(check)


def test_calls_on_many_streams_and_threads_at_once(torch: Any) -> None:
    names = ["d64_causal", "d80_odd", "float32", "everything", "packed"]
    calls = [Call(REPEATED[name], deterministic=True) for name in names]
    wants = [call() for call in calls]
    torch.cuda.synchronize()
    failures: list[str] = []

    def work(index: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for i in range(40):
                    at = (index + i) % len(calls)
                    if int(num_differing(torch, calls[at](), wants[at])):
                        failures.append(f"thread {index}, call {i}: {names[at]} differs")
        except Exception as error:  # shown by the main thread
            failures.append(f"thread {index}: {error!r}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[:10]


# Several GPUs.


@pytest.mark.multi_gpu
def test_multi_torch_on_another_device_than_the_current_one(torch: Any) -> None:
    torch.cuda.set_device(0)  # whatever JAX left
    call = Call(BY_NAME["everything"], device="cuda:1")
    found = call()
    assert torch.cuda.current_device() == 0 and all(str(x.device) == "cuda:1" for x in found)
    judge(lambda seed: (other := Call(BY_NAME["everything"], seed, "cuda:1")).check(other(), "cuda:1"))
    case = call.case
    leaves = [to_torch(x, "cuda:1").requires_grad_() for x in case.operands]
    arrays = each_array(functools.partial(to_torch, device="cuda:1"), case.arrays)
    flash_mha(*leaves, **arrays, **case.statics).sum().backward()
    assert all(str(x.grad.device) == "cuda:1" and torch.isfinite(x.grad).all() for x in leaves)


@pytest.mark.multi_gpu
def test_multi_torch_on_a_side_stream_of_the_second_device(torch: Any) -> None:
    judge(lambda seed: assert_runs_on_current_torch_stream(torch, "cuda:1", seed))


@pytest.mark.multi_gpu
def test_multi_cupy_on_a_side_stream_of_the_second_device(cupy: Any) -> None:
    judge(lambda seed: assert_runs_on_current_cupy_stream(cupy, 1, seed))


@pytest.mark.multi_gpu
def test_multi_operands_on_different_devices_are_refused(torch: Any) -> None:
    call = Call(SMALL)
    call.dout = call.dout.to("cuda:1")
    with pytest.raises(ValueError, match="dout: got another device than q"):
        call()


# Memory.


def test_results_and_workspace_come_from_torchs_allocator(torch: Any) -> None:
    spec = AttentionSpec("gpu_memory", 2, 256, 256, 4, 2, 64, dtype="bfloat16", is_causal=True)
    call = Call(spec)
    call()
    workspace = heed.explain(
        flash_mha_bwd, call.dout, *call.operands, call.out, call.lse, **call.options
    ).workspace_bytes
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    found = call()
    count = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    assert count == 3 + (workspace > 0), f"{count} allocations for 3 gradients and a workspace of {workspace} bytes"
    assert all(x.is_cuda and x.is_contiguous() for x in found[:3])


def test_memory_of_a_long_sequence(torch: Any) -> None:
    """S 16k, H 16, D 128: at most inputs, outputs, one float32 dQ and a few numbers per row."""
    torch.cuda.empty_cache()
    length, heads, head_dim = 16384, 16, 128
    q, k, v, dout = (torch.randn(1, length, heads, head_dim, device="cuda:0", dtype=torch.bfloat16) for _ in range(4))
    out, lse = flash_mha(q, k, v, is_causal=True, return_lse=True)
    for deterministic in (False, True):
        options = {"is_causal": True, "deterministic": deterministic}
        flash_mha_bwd(dout, q, k, v, out, lse, **options)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = flash_mha_bwd(dout, q, k, v, out, lse, **options)
        peak = torch.cuda.max_memory_allocated() - before
        outputs = sum(x.numel() * x.element_size() for x in found[:3])
        allowed = outputs + 4 * q.numel() + 64 * length * heads + 2**23
        assert peak <= allowed, f"deterministic={deterministic}: {peak} bytes beside the inputs, expected {allowed}"
        del found


# Layouts.


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: str, torch: Any) -> None:
    spec = AttentionSpec("gpu_layouts", q_len=70, kv_len=90, num_q_heads=4, head_dim_qk=40, is_causal=True, dtype=dtype)

    def check(seed: int) -> None:
        case = gradient_case(spec, seed)
        q, k, v = (arrange(torch, to_torch(x), layout) for x in case.operands)
        dout = arrange(torch, to_torch(case.cotangents[0]), layout)
        out, lse = flash_mha(q, k, v, is_causal=True, return_lse=True)
        out, lse = arrange(torch, out, "sliced"), lse.transpose(1, 2).contiguous().transpose(1, 2)
        found = flash_mha_bwd(dout, q, k, v, out, lse, is_causal=True)
        dense = [from_torch(x.contiguous()) for x in (dout, q, k, v)]
        expected_gradients((dense[0], None), tuple(dense[1:]), is_causal=True).check(to_host(found), layout)

    judge(check)


# Sizes beyond 32 bits, in full.


def test_more_elements_than_32_bits(torch: Any) -> None:
    """B 28800, H 15, L 16, D 72: 4.98e8 elements and 2e9 bytes of float32 workspace; rows are checked by sample."""
    batch, length, heads, head_dim = 28800, 16, 15, 72
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("this needs 40 GB of GPU memory")
    generator = torch.Generator(device="cuda:0").manual_seed(0)
    shape = (batch, length, heads, head_dim)
    q, k, v, dout = (torch.randn(shape, generator=generator, device="cuda:0", dtype=torch.bfloat16) for _ in range(4))
    out, lse = flash_mha(q, k, v, is_causal=True, return_lse=True)
    found = flash_mha_bwd(dout, q, k, v, out, lse, is_causal=True)

    def check(first: int) -> None:
        rows = slice(first, first + 2)
        operands = tuple(from_torch(x[rows]) for x in (q, k, v))
        want = expected_gradients((from_torch(dout[rows]), None), operands, is_causal=True)
        want.check(Gradients(*(from_torch(x[rows]) for x in found[:3])), f"batch rows {rows}")

    for first in (0, batch // 2, batch - 8):
        judge(lambda seed, first=first: check(first + 2 * seed))  # type: ignore[misc]
    assert all(bool(torch.isfinite(x).all()) for x in found[:3])
    q = k = v = dout = out = lse = found = None
    torch.cuda.empty_cache()


# CUDA graphs.


def test_a_captured_step_replays_with_new_data(torch: Any) -> None:
    """Forward and backward in one graph; no state is left from the first run."""
    spec = AttentionSpec("gpu_graph", 3, 133, 317, 5, 5, 80, 59, dtype="float16", is_causal=True)
    case = gradient_case(spec)
    q, k, v, dout = (to_torch(x) for x in (*case.operands, case.cotangents[0]))

    def step() -> Any:
        out, lse = flash_mha(q, k, v, return_lse=True, **case.statics)
        return flash_mha_bwd(dout, q, k, v, out, lse, **case.statics)

    step()
    graph, captured = capture(torch, step)

    def check(seed: int) -> None:
        new = gradient_case(spec, seed)
        for x, y in zip((q, k, v, dout), (*new.operands, new.cotangents[0]), strict=True):
            x.copy_(to_torch(y))
        for x in captured[:3]:
            x.fill_(123.0)
        graph.replay()
        want = expected_gradients((new.cotangents[0], None), new.operands, **new.statics)
        want.check(to_host(captured), f"replay {seed}")

    for seed in range(3):
        judge(lambda draw, seed=seed: check(10 * draw + seed))  # type: ignore[misc]


def test_a_captured_call_takes_new_lengths(torch: Any) -> None:
    spec = VarlenSpec("gpu_graph_lengths", (40, 7, 90, 23), is_causal=True, num_q_heads=4, dtype="float16")
    call = Call(spec)
    options = {name: x for name, x in call.options.items() if name != "dlse"}

    def step() -> Any:
        out, lse = flash_mha_varlen(*call.operands, return_lse=True, **options)
        return flash_mha_varlen_bwd(call.dout, *call.operands, out, lse, **options)

    step()
    graph, captured = capture(torch, step)

    def check(ends: list[int], seed: int) -> None:
        new = gradient_case(spec, seed)
        for x, y in zip((*call.operands, call.dout), (*new.operands, new.cotangents[0]), strict=True):
            x.copy_(to_torch(y))
        options["cu_seqlens_q"].copy_(torch.tensor(ends, dtype=torch.int32))
        for x in captured[:3]:
            x.fill_(float("nan"))
        graph.replay()
        arrays = {"cu_seqlens_q": np.array(ends, np.int32)}
        want = expected_gradients_varlen((new.cotangents[0], None), new.operands, is_causal=True, **arrays)
        want.check(to_host(captured), f"lengths {ends}")

    for ends in ([0, 40, 47, 137, 160], [0, 0, 100, 101, 160], [5, 5, 5, 20, 33], [0, 160, 160, 160, 160]):
        judge(lambda seed, ends=ends: check(ends, seed))  # type: ignore[misc]


def test_a_first_call_may_be_captured(torch: Any) -> None:
    """Its kernels are compiled and loaded while the stream is captured: no other test has this cap and these dims."""
    spec = AttentionSpec("gpu_first_bwd", q_len=50, kv_len=60, head_dim_qk=88, head_dim_v=24, softcap=7.75,
                         is_causal=True, dtype="float16")  # fmt: skip
    call = Call(spec)
    torch.cuda.synchronize()
    graph, captured = capture(torch, call)

    def check(seed: int) -> None:
        new = Call(spec, seed)
        for x, y in zip(
            (*call.operands, call.out, call.lse, call.dout), (*new.operands, new.out, new.lse, new.dout), strict=True
        ):
            x.copy_(y)
        if call.dlse is not None:
            call.dlse.copy_(new.dlse)
        graph.replay()
        new.check(captured, "first call, captured")

    judge(check)


# What is refused.


def test_wrong_arguments_are_refused(torch: Any) -> None:
    call = Call(SMALL)
    dout = call.dout
    call.dout = dout.cpu()
    with pytest.raises(ValueError, match="dout: got another device than q"):
        call()
    call.dout = dout.float()
    with pytest.raises(TypeError, match="dout: got dtype float32"):
        call()
    call.dout = dout
    call.options["backend"] = "cpu"
    with pytest.raises(heed.UnsupportedError, match=r"cpu_attention_bwd: runs on the CPU only"):
        call()


def test_explain_names_the_gpu_kernel(torch: Any) -> None:
    call = Call(SMALL)
    found = heed.explain(flash_mha_bwd, call.dout, *call.operands, call.out, call.lse, **call.options)
    assert found.target.startswith("sm_") and found.is_served and found.chosen == "sm80_attention_bwd", found
