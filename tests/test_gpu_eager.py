"""PyTorch tensors and CuPy arrays on a GPU: their current stream, their allocator, their layouts, CUDA graphs, repeats.

Conformance is in test_flash_mha.py and test_flash_mha_varlen.py, through the faces torch_gpu and cupy_gpu.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
import pytest

import heed
from conftest import from_cupy, from_torch, to_cupy, to_torch
from expected import expected, expected_of
from specs import BY_NAME, CONFORMANCE, AttentionSpec, make_inputs
from tolerance import assert_agree

pytestmark = pytest.mark.gpu

flash_mha: Any = heed.flash_mha  # mypy would match unpacked options with every parameter


@pytest.fixture
def torch() -> Any:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    return torch


@pytest.fixture
def cupy() -> Any:
    return pytest.importorskip("cupy")


def torch_inputs(spec: AttentionSpec, device: str = "cuda:0") -> tuple[Any, Any, Any, dict[str, Any]]:
    inputs = make_inputs(spec)
    convert = functools.partial(to_torch, device=device)
    arrays = {
        name: tuple(map(convert, value)) if isinstance(value, tuple) else convert(value)
        for name, value in inputs.arrays.items()
    }
    return convert(inputs.q), convert(inputs.k), convert(inputs.v), arrays


SMALL = AttentionSpec("gpu_small", q_len=130, kv_len=190, num_q_heads=4, is_causal=True, dtype="float16")


# Repeats.

REPEATED = {
    "d64_causal": AttentionSpec("d64_causal", 2, 1024, 1024, 8, 8, 64, dtype="bfloat16", is_causal=True),
    "d128_gqa": AttentionSpec("d128_gqa", 1, 1000, 1500, 32, 8, 128, dtype="float16"),
    "d256_window": AttentionSpec("d256_window", 1, 700, 700, 4, 4, 256, dtype="bfloat16", window_size=(100, 30)),
    "d80_odd": AttentionSpec("d80_odd", 3, 333, 517, 5, 5, 80, 59, dtype="float16", is_causal=True),
    "float32": AttentionSpec("float32", 1, 600, 600, 8, 2, 64, dtype="float32", is_causal=True),
    "one_row": AttentionSpec("one_row", 4, 1, 4096, 32, 8, 128, dtype="bfloat16"),
    "everything": BY_NAME["everything"],
    "everything_top_left": BY_NAME["everything_top_left"],
}


def bits(torch: Any, tensor: Any) -> Any:
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


@pytest.mark.parametrize("name", REPEATED)
def test_1000_repeats_are_bitwise_equal(name: str, torch: Any) -> None:
    spec = REPEATED[name]
    q, k, v, arrays = torch_inputs(spec)
    call = functools.partial(flash_mha, q, k, v, return_lse=True, **arrays, **spec.static_options())
    first = call()
    differing = torch.zeros((), dtype=torch.int64, device=q.device)
    for i in range(1000):
        # What the allocator hands out next holds other numbers each time.
        poison = [torch.full_like(x, float(i % 7) - 3.0) for x in first]
        del poison
        for x, y in zip(call(), first, strict=True):
            differing += (bits(torch, x) != bits(torch, y)).any()
    assert int(differing) == 0, f"{name}: {int(differing)} results of 2000 differ from those of the first call"


# CPU against GPU.


@pytest.mark.parametrize("spec", CONFORMANCE, ids=lambda spec: spec.name)
def test_the_gpu_agrees_with_the_cpu(spec: AttentionSpec, torch: Any) -> None:
    inputs = make_inputs(spec)
    options = spec.static_options()
    cpu_out, cpu_lse = flash_mha(inputs.q, inputs.k, inputs.v, return_lse=True, **inputs.arrays, **options)
    q, k, v, arrays = torch_inputs(spec)
    out, lse = flash_mha(q, k, v, return_lse=True, **arrays, **options)
    want = expected_of(spec)
    assert_agree(from_torch(out), cpu_out, want.naive_out, want.out, cpu_out.dtype, f"{spec.name}: out")
    assert_agree(from_torch(lse), cpu_lse, want.naive_lse, want.lse, np.float32, f"{spec.name}: lse")


# Streams. The side stream is kept busy before it writes the inputs, and does not wait for the default stream: a call
# that ran anywhere else would read zeros.


def assert_runs_on_current_torch_stream(torch: Any, device: str) -> None:
    spec = SMALL
    q, k, v, _ = torch_inputs(spec, device)
    with torch.cuda.device(device):
        warm, _ = flash_mha(q, k, v, is_causal=True, return_lse=True)  # nothing is compiled while the stream is busy
        late = [torch.zeros_like(x) for x in (q, k, v)]
        side = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)  # about 0.1 s
            for x, y in zip(late, (q, k, v), strict=True):
                x.copy_(y)
            out, lse = flash_mha(*late, is_causal=True, return_lse=True)
            is_early = not side.query()
        side.synchronize()
    assert is_early, "the call waited for the stream: it must only launch"
    assert out.device == q.device and torch.equal(bits(torch, out), bits(torch, warm))
    expected_of(spec).check(from_torch(out), from_torch(lse), f"side stream of {device}")


def assert_runs_on_current_cupy_stream(cupy: Any, device: int) -> None:
    spec = SMALL
    inputs = make_inputs(spec)
    spin = cupy.RawKernel(
        'extern "C" __global__ void spin(long long n) { long long t = clock64(); while (clock64() - t < n) {} }', "spin"
    )
    with cupy.cuda.Device(device):
        q, k, v = map(to_cupy, (inputs.q, inputs.k, inputs.v))
        flash_mha(q, k, v, is_causal=True, return_lse=True)
        spin((1,), (1,), (np.int64(1),))
        late = [cupy.zeros_like(x) for x in (q, k, v)]
        side = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.Device().synchronize()
        with side:
            spin((1,), (1,), (np.int64(200_000_000),))
            for x, y in zip(late, (q, k, v), strict=True):
                cupy.copyto(x, y)
            out, lse = flash_mha(*late, is_causal=True, return_lse=True)
            is_early = not side.done
        side.synchronize()
        assert is_early, "the call waited for the stream: it must only launch"
        assert out.device.id == device and lse.device.id == device
        expected_of(spec).check(from_cupy(out), from_cupy(lse), f"side stream of CuPy's device {device}")


def test_torch_calls_run_on_the_current_stream(torch: Any) -> None:
    assert_runs_on_current_torch_stream(torch, "cuda:0")


def test_cupy_calls_run_on_the_current_stream(cupy: Any) -> None:
    assert_runs_on_current_cupy_stream(cupy, 0)


def test_calls_on_many_streams_and_threads_at_once(torch: Any) -> None:
    names = ["d64_causal", "d80_odd", "float32", "everything"]
    cases = []
    for name in names:
        spec = REPEATED[name]
        q, k, v, arrays = torch_inputs(spec)
        call = functools.partial(flash_mha, q, k, v, return_lse=True, **arrays, **spec.static_options())
        cases.append((call, call()))
    torch.cuda.synchronize()
    failures: list[str] = []

    def work(index: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for i in range(50):
                    call, want = cases[(index + i) % len(cases)]
                    for x, y in zip(call(), want, strict=True):
                        if not torch.equal(bits(torch, x), bits(torch, y)):
                            failures.append(f"thread {index}, call {i}: {names[(index + i) % len(names)]} differs")
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
    q, k, v, arrays = torch_inputs(BY_NAME["everything"], "cuda:1")
    options = BY_NAME["everything"].static_options()
    out, lse = flash_mha(q, k, v, return_lse=True, **arrays, **options)
    assert torch.cuda.current_device() == 0 and str(out.device) == str(lse.device) == "cuda:1"
    expected_of(BY_NAME["everything"]).check(from_torch(out), from_torch(lse), "cuda:1")


@pytest.mark.multi_gpu
def test_multi_torch_on_a_side_stream_of_the_second_device(torch: Any) -> None:
    assert_runs_on_current_torch_stream(torch, "cuda:1")


@pytest.mark.multi_gpu
def test_multi_cupy_on_a_side_stream_of_the_second_device(cupy: Any) -> None:
    assert_runs_on_current_cupy_stream(cupy, 1)


@pytest.mark.multi_gpu
def test_multi_operands_on_different_devices_are_refused(torch: Any) -> None:
    q, k, v, _ = torch_inputs(SMALL)
    with pytest.raises(ValueError, match="k: got another device than q"):
        flash_mha(q, k.to("cuda:1"), v)


# Memory.


def test_outputs_come_from_torchs_allocator_and_nothing_else_is_allocated(torch: Any) -> None:
    q, k, v, _ = torch_inputs(SMALL)
    flash_mha(q, k, v, return_lse=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    out, lse = flash_mha(q, k, v, return_lse=True)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == 2
    assert out.is_cuda and lse.is_cuda and out.is_contiguous() and lse.is_contiguous()


def test_outputs_come_from_cupys_allocator(cupy: Any) -> None:
    inputs = make_inputs(SMALL)
    q, k, v = map(to_cupy, (inputs.q, inputs.k, inputs.v))
    allocated: list[int] = []
    pool = cupy.get_default_memory_pool()

    def malloc(size: int) -> Any:
        allocated.append(size)
        return pool.malloc(size)

    with cupy.cuda.using_allocator(malloc):
        out, lse = flash_mha(q, k, v, return_lse=True)
    assert sorted(allocated) == sorted([out.nbytes, lse.nbytes])


# Layouts.

LAYOUTS = ("transposed", "sliced", "every_second", "broadcast", "offset", "row_padded")


def arrange(torch: Any, x: Any, layout: str) -> Any:
    """The numbers of x in memory that is laid out in another way."""
    if layout == "transposed":  # heads before tokens
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        wide = torch.zeros((*x.shape[:1], x.shape[1] + 5, *x.shape[2:]), dtype=x.dtype, device=x.device)
        wide[:, 3:-2] = x
        return wide[:, 3:-2]
    if layout == "every_second":  # not even the last axis is dense
        wide = torch.zeros((*x.shape[:-1], 2 * x.shape[-1]), dtype=x.dtype, device=x.device)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "broadcast":
        return x[:1].expand(x.shape)
    if layout == "offset":  # memory that is aligned to the element only
        flat = torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)
        flat[1:] = x.reshape(-1)
        return flat[1:].view(x.shape)
    wide = torch.zeros((*x.shape[:-1], x.shape[-1] + 3), dtype=x.dtype, device=x.device)
    wide[..., :-3] = x
    return wide[..., :-3]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: str, torch: Any) -> None:
    spec = AttentionSpec("gpu_layouts", q_len=70, kv_len=90, num_q_heads=4, head_dim_qk=40, is_causal=True, dtype=dtype)
    q, k, v, _ = torch_inputs(spec)
    operands = [arrange(torch, x, layout) for x in (q, k, v)]
    want = expected(*(from_torch(x.contiguous()) for x in operands), is_causal=True)
    out, lse = flash_mha(*operands, is_causal=True, return_lse=True)
    want.check(from_torch(out), from_torch(lse), layout)
    for x, y in zip(operands, (q, k, v), strict=True):
        assert layout == "broadcast" or torch.equal(x, y)  # inputs are only read


def test_cupy_layouts(cupy: Any) -> None:
    spec = AttentionSpec("gpu_layouts", q_len=70, kv_len=90, num_q_heads=4, head_dim_qk=40, dtype="float16")
    inputs = make_inputs(spec)
    operands = [cupy.asfortranarray(to_cupy(x))[:, ::-1] for x in (inputs.q, inputs.k, inputs.v)]  # negative strides
    want = expected(*(from_cupy(cupy.ascontiguousarray(x)) for x in operands))
    out, lse = flash_mha(*operands, return_lse=True)
    want.check(from_cupy(out), from_cupy(lse), "CuPy")


# Integer operands.


@pytest.mark.parametrize("dtype", ["int64", "uint8", "int16"])
def test_segment_ids_of_any_width(dtype: str, torch: Any, cupy: Any) -> None:
    spec = AttentionSpec("gpu_ids", q_len=70, kv_len=90, segments="cross", dtype="float16")
    inputs = make_inputs(spec)
    ids = [x.astype(dtype) for x in inputs.arrays["segment_ids"]]
    for convert, back in ((to_torch, from_torch), (to_cupy, from_cupy)):
        q, k, v = map(convert, (inputs.q, inputs.k, inputs.v))
        out, lse = flash_mha(q, k, v, segment_ids=tuple(map(convert, ids)), return_lse=True)
        expected_of(spec).check(back(out), back(lse), dtype)


# What is refused.


def test_wrong_arguments_are_refused(torch: Any) -> None:
    q, k, v, _ = torch_inputs(SMALL)
    with pytest.raises(ValueError, match="k: got another device than q"):
        flash_mha(q, k.cpu(), v)
    with pytest.raises(TypeError, match="q: got dtype float64"):
        flash_mha(q.double(), k.double(), v.double())
    with pytest.raises(heed.UnsupportedError, match=r"cpu_attention_fwd: runs on the CPU only"):
        flash_mha(q, k, v, backend="cpu")
    with pytest.raises(TypeError, match="arrays of different kinds"):
        flash_mha(q, from_torch(k), v)


def test_an_array_of_a_library_that_cannot_allocate_is_refused(torch: Any) -> None:
    import tvm_ffi

    q, k, v, _ = torch_inputs(SMALL)
    with pytest.raises(TypeError, match="q: got an array of tvm_ffi on a GPU"):
        flash_mha(*map(tvm_ffi.from_dlpack, (q, k, v)))


def test_explain_names_the_gpu_kernel(torch: Any) -> None:
    q, k, v, _ = torch_inputs(SMALL)
    found = heed.explain(flash_mha, q, k, v)
    assert found.target.startswith("sm_") and found.is_served and found.chosen != "cpu_attention_fwd", found


# CUDA graphs.


def capture(torch: Any, call: Any) -> tuple[Any, Any]:
    """A graph of the call, and its results, which every replay writes anew."""
    # In the default mode a call to CUDA by any other thread, such as JAX's, would end the capture.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = call()
    return graph, results


def test_a_captured_call_replays_with_new_data(torch: Any) -> None:
    spec = REPEATED["d80_odd"]
    q, k, v, _ = torch_inputs(spec)
    call = functools.partial(flash_mha, q, k, v, is_causal=True, return_lse=True)
    call()
    graph, captured = capture(torch, call)
    for seed in range(3):
        inputs = make_inputs(spec, seed)
        for x, new in zip((q, k, v), (inputs.q, inputs.k, inputs.v), strict=True):
            x.copy_(to_torch(new))
        for x in captured:
            x.fill_(123.0)
        graph.replay()
        out, lse = map(from_torch, captured)
        expected_of(spec, seed).check(out, lse, f"replay {seed}")


def test_a_first_call_may_be_captured(torch: Any) -> None:
    """Its kernel is compiled and loaded while the stream is captured: no other test has this soft cap and head dim."""
    spec = AttentionSpec("gpu_first_call", q_len=50, kv_len=60, head_dim_qk=88, head_dim_v=24, softcap=7.25,
                         is_causal=True, dtype="float16")  # fmt: skip
    q, k, v, arrays = torch_inputs(spec)
    call = functools.partial(flash_mha, q, k, v, return_lse=True, **arrays, **spec.static_options())
    torch.cuda.synchronize()
    graph, captured = capture(torch, call)
    graph.replay()
    expected_of(spec).check(from_torch(captured[0]), from_torch(captured[1]), "first call, captured")
