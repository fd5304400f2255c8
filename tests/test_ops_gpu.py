"""heed.ops on a GPU from PyTorch and CuPy: repeats, streams, CUDA graphs, devices, and more than 2^31 elements.

Conformance is in test_ops.py, through the faces torch_gpu and cupy_gpu; JAX on GPUs is in test_jax_ops_gpu.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from conftest import from_cupy, from_torch, to_cupy, to_torch
from heed import ops
from small_op_faces import call_of, case_of, cotangents_of, expected, face_of
from small_op_specs import CONFORMANCE, ActSpec, DecodeSpec, NormSpec, OpCase, OpSpec, RopeSpec
from tolerance import assert_agree

pytestmark = pytest.mark.gpu


@pytest.fixture
def torch() -> Iterator[Any]:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    yield torch
    torch.cuda.empty_cache()


LARGE: dict[str, OpSpec] = {
    "silu": ActSpec("gpu_silu", lead=(777,), hidden=14336, dtype="bfloat16"),
    "gelu odd": ActSpec("gpu_gelu", "gelu", (3000,), 1021, "float16"),
    "rope": RopeSpec("gpu_rope", (1000, 0, 2093), 1, 32, 8, 128, dtype="bfloat16"),
    "rope odd": RopeSpec("gpu_rope_odd", (777,), 0, 5, 3, 59, 58, dtype="float16", interleave=True),
    "norm": NormSpec("gpu_norm", (1500,), 4096, dtype="bfloat16"),
    "norm add": NormSpec("gpu_norm_add", (999,), 8191, residual=True, dtype="float16"),
    "decode": DecodeSpec("gpu_decode", 8192, 32, 8, 128, dtype="bfloat16"),
    "decode float32": DecodeSpec("gpu_decode_float32", 5000, 8, 8, 64),
    "decode everything": DecodeSpec(
        "gpu_decode_everything", 6001, 12, 2, 80, 59, "HND", 5500, 30.0, None, 2.0, 5e5, True, True, None, "float16"
    ),
}


def on_gpu(case: OpCase, device: str = "cuda:0") -> dict[str, Any]:
    return {name: to_torch(x, device) for name, x in case.arrays.items()}


def bits(torch: Any, tensor: Any) -> Any:
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


@pytest.mark.parametrize("name", LARGE)
def test_1000_repeats_are_bitwise_equal(name: str, torch: Any) -> None:
    case = LARGE[name].case()
    call, arrays = call_of(case), on_gpu(case)
    first = call(arrays)
    differing = torch.zeros((), dtype=torch.int64, device="cuda:0")
    for i in range(1000):
        # What the allocator hands out next, workspaces too, holds other numbers each time.
        poison = [torch.full_like(x, float(i % 7) - 3.0) for x in first]
        del poison
        for x, y in zip(call(arrays), first, strict=True):
            differing += (bits(torch, x) != bits(torch, y)).any()
    assert int(differing) == 0, f"{name}: {int(differing)} results differ from those of the first call"
    for want, x in zip(expected(case), first, strict=True):
        want.check(from_torch(x), name)


@pytest.mark.parametrize("name", ["silu", "gelu odd", "rope", "norm", "norm add"])
def test_gradients_repeat_bit_for_bit(name: str, torch: Any) -> None:
    case = LARGE[name].case()
    cotangents = [to_torch(x) for x in cotangents_of(case)]

    def gradients() -> list[Any]:
        arrays = on_gpu(case)
        leaves = [arrays[key].requires_grad_() for key in case.differentiable]
        found: list[Any] = list(torch.autograd.grad(call_of(case)(arrays), leaves, cotangents))
        return found

    first = gradients()
    for _ in range(30):
        poison = [torch.full_like(x, 3.0) for x in first]
        del poison
        assert all(torch.equal(bits(torch, x), bits(torch, y)) for x, y in zip(gradients(), first, strict=True))


@pytest.mark.parametrize("spec", CONFORMANCE, ids=lambda spec: spec.name)
def test_the_gpu_agrees_with_the_cpu(spec: OpSpec, torch: Any) -> None:
    case, wants = case_of(spec)
    both = face_of("numpy")(case), face_of("torch:cuda")(case)
    for want, x, y in zip(wants, *both, strict=True):
        assert_agree(x, y, want.naive, want.oracle, want.dtype, f"{spec.name}: {want.name}")


# Streams. The side stream is kept busy before it writes the operands, and does not wait for the default stream: a call
# that ran anywhere else would read zeros.


def assert_runs_on_current_stream(torch: Any, name: str, device: str) -> None:
    case = LARGE[name].case()
    call, arrays = call_of(case), on_gpu(case, device)
    with torch.cuda.device(device):
        warm = call(arrays)  # nothing is compiled while the stream is busy
        late = {key: torch.zeros_like(x) for key, x in arrays.items()}
        side = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)  # about 0.1 s
            for key, x in late.items():
                x.copy_(arrays[key])
            results = call(late)
            is_early = not side.query()
        side.synchronize()
    assert is_early, "the call waited for the stream: it must only launch"
    for x, y in zip(results, warm, strict=True):
        assert x.device == y.device and torch.equal(bits(torch, x), bits(torch, y)), name


@pytest.mark.parametrize("name", LARGE)
def test_a_side_stream_of_torch(name: str, torch: Any) -> None:
    assert_runs_on_current_stream(torch, name, "cuda:0")


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", LARGE)
def test_another_gpu(name: str, torch: Any) -> None:
    """Its memory and its stream, while another device is the current one."""
    assert_runs_on_current_stream(torch, name, "cuda:1")
    case = LARGE[name].case()
    with torch.cuda.device("cuda:0"):
        results = call_of(case)(on_gpu(case, "cuda:1"))
    for want, x in zip(expected(case), results, strict=True):
        assert str(x.device) == "cuda:1"
        want.check(from_torch(x), name)


@pytest.mark.parametrize("name", ["silu", "rope", "norm add", "decode"])
def test_a_side_stream_of_cupy(name: str) -> None:
    cupy = pytest.importorskip("cupy")
    case = LARGE[name].case()
    if next(iter(case.arrays.values())).dtype.name == "bfloat16":
        cast = {key: x.astype(np.float16) if x.dtype.name == "bfloat16" else x for key, x in case.arrays.items()}
        case = OpCase(case.function, cast, case.statics)
    call, arrays = call_of(case), {key: to_cupy(x) for key, x in case.arrays.items()}
    spin = cupy.RawKernel(
        'extern "C" __global__ void spin(long long n) { long long t = clock64(); while (clock64() - t < n) {} }', "spin"
    )
    warm = call(arrays)
    spin((1,), (1,), (np.int64(1),))
    late = {key: cupy.zeros_like(x) for key, x in arrays.items()}
    side = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with side:
        spin((1,), (1,), (np.int64(200_000_000),))
        for key, x in late.items():
            x[...] = arrays[key]
        results = call(late)
        is_early = not side.done
    side.synchronize()
    assert is_early, "the call waited for the stream: it must only launch"
    for x, y in zip(results, warm, strict=True):
        assert from_cupy(x).tobytes() == from_cupy(y).tobytes()


@pytest.mark.parametrize("name", LARGE)
def test_captured_graphs_replay_with_new_data(name: str, torch: Any) -> None:
    """Lengths and positions are data too: what the capture saw may not be frozen into the graph."""
    spec = LARGE[name]
    case = spec.case()
    call, arrays = call_of(case), on_gpu(case)
    call(arrays)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(arrays)
    for seed in (1, 2, 3):
        other = spec.case(seed)
        if "indptr" in other.arrays:
            ends = other.arrays["indptr"]
            other.arrays["indptr"] = np.sort(np.random.default_rng(seed).integers(0, ends[-1] + 1, ends.size)).astype(
                np.int32
            )
        for key, x in arrays.items():
            x.copy_(to_torch(other.arrays[key]))
        for x in results:
            x.fill_(77)
        graph.replay()
        torch.cuda.synchronize()
        for want, x in zip(expected(other), results, strict=True):
            want.check(from_torch(x), f"{name}, replay {seed}")


# More than 2^31 elements: what the last rows give is what they give by themselves.


def test_activations_of_more_than_2_31_elements(torch: Any) -> None:
    x = torch.empty(66000, 2 * 16400, dtype=torch.bfloat16, device="cuda").normal_()
    out = ops.silu_and_mul(x)
    for rows in (slice(0, 3), slice(33000, 33003), slice(-3, None)):
        assert torch.equal(out[rows], ops.silu_and_mul(x[rows].clone()))


def test_norms_of_more_than_2_31_elements(torch: Any) -> None:
    x = torch.empty(280000, 8192, dtype=torch.float16, device="cuda").normal_()
    weight = torch.rand(8192, device="cuda").to(torch.float16)
    out = ops.rms_norm(x, weight)
    for rows in (slice(0, 3), slice(140000, 140003), slice(-3, None)):
        assert torch.equal(out[rows], ops.rms_norm(x[rows].clone(), weight))


def test_rotations_of_more_than_2_31_elements(torch: Any) -> None:
    num_tokens = 140000
    q = torch.empty(num_tokens, 128, 128, dtype=torch.float16, device="cuda").normal_()
    k = q[:, :1].clone()

    def rotate(rows: slice) -> Any:
        length = len(range(*rows.indices(num_tokens)))
        ends, start = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, length], [rows.start or 0]))
        return ops.apply_rope(q[rows], k[rows], ends, start)

    whole = rotate(slice(0, num_tokens))
    for begin in (0, 70000, num_tokens - 3):
        rows = slice(begin, begin + 3)
        for x, y in zip(whole, rotate(rows), strict=True):
            assert torch.equal(x[rows], y)


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_caches_of_more_than_2_31_elements(kv_layout: str, torch: Any) -> None:
    """A window over the last keys: those of the last heads lie beyond the 2^31st element."""
    kv_len, heads, seen = 1_060_000, 16, 100
    shape = (kv_len, heads, 128) if kv_layout == "NHD" else (heads, kv_len, 128)
    k, v = (torch.empty(shape, dtype=torch.float16, device="cuda").normal_() for _ in range(2))
    q = torch.randn(32, 128, device="cuda").to(torch.float16)
    options: dict[str, Any] = {"kv_layout": kv_layout, "return_lse": True}
    found = ops.single_decode(q, k, v, window_left=seen - 1, **options)
    tail = (slice(-seen, None),) if kv_layout == "NHD" else (slice(None), slice(-seen, None))
    arrays = {"q": from_torch(q), "k": from_torch(k[tail].clone()), "v": from_torch(v[tail].clone())}
    for want, x in zip(expected(OpCase("single_decode", arrays, options)), found, strict=True):
        want.check(from_torch(x), kv_layout)
