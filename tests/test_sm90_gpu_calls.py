"""How the Hopper attention forward kernel is called on a Hopper GPU: memory layouts, streams, CUDA graphs, JAX.

Its results are judged in test_sm90_gpu.py.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import heed
from conftest import each_array, from_torch, gpu_devices, to_torch
from expected import expected, expected_gradients
from heed.reference import Gradients
from sm90_cases import Call, bits, call_of, expected_call, expected_result, hopper_torch, require_served
from specs import AttentionSpec
from test_gpu_eager import capture
from varlen_specs import VarlenSpec

pytestmark = pytest.mark.gpu

DENSE = AttentionSpec("sm90_dense", 3, 261, 333, 24, 8, 128, dtype="bfloat16", is_causal=True)
HALF = AttentionSpec("sm90_half", 2, 300, 300, 32, 32, 128, dtype="float16")
PACKED = VarlenSpec("sm90_packed", (300, 5, 0, 129, 401), num_q_heads=24, num_kv_heads=8, head_dim_qk=128,
                    dtype="bfloat16", is_causal=True)  # fmt: skip
FEW = AttentionSpec("sm90_few", 1, 100, 150, 4, 4, 128, dtype="bfloat16", is_causal=True)
PARTS = AttentionSpec("sm90_parts", 1, 200, 6000, 6, 2, 128, dtype="bfloat16")  # tiles that blocks share by steps
EVERY = {spec.name: spec for spec in (DENSE, HALF, PACKED, FEW, PARTS)}


@pytest.fixture
def torch() -> Any:
    return hopper_torch()


def bound(call: Call, backend: str | None = "sm90") -> tuple[Callable[..., Any], list[Any]]:
    """The call as a function of q, k and v on the GPU, and those."""
    arrays = each_array(to_torch, call.arrays)
    function = functools.partial(
        getattr(heed, call.function), return_lse=True, backend=backend, **arrays, **call.statics
    )
    return function, [to_torch(x) for x in call.operands]


def same(torch: Any, found: Any, want: Any) -> bool:
    return all(torch.equal(bits(torch, x), bits(torch, y)) for x, y in zip(found, want, strict=True))


def check(found: Any, spec: Any, what: str) -> None:
    expected_result(spec).check(from_torch(found[0]), from_torch(found[1]), what)


# Layouts. Each arranges [B, L, H, D], or [T, H, D], in other memory, all of which is NaN where x is not.


def _wide(torch: Any, x: Any, shape: tuple[int, ...]) -> Any:
    return torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)


def _put(view: Any, x: Any) -> Any:
    view.copy_(x)
    return view


def heads_first(torch: Any, x: Any) -> Any:
    return x.transpose(-3, -2).contiguous().transpose(-3, -2)


def tokens_outermost(torch: Any, x: Any) -> Any:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def wide_rows(torch: Any, x: Any) -> Any:
    return _put(_wide(torch, x, (*x.shape[:-1], x.shape[-1] + 24))[..., 8:-16], x)


def tokens_inside(torch: Any, x: Any) -> Any:
    shape = (*x.shape[:-3], x.shape[-3] + 300, *x.shape[-2:])
    return _put(_wide(torch, x, shape)[..., 140:-160, :, :], x)


def every_third_token(torch: Any, x: Any) -> Any:
    return _put(_wide(torch, x, (*x.shape[:-3], 3 * x.shape[-3], *x.shape[-2:]))[..., 1::3, :, :], x)


def every_second_head(torch: Any, x: Any) -> Any:
    return _put(_wide(torch, x, (*x.shape[:-2], 2 * x.shape[-2], x.shape[-1]))[..., ::2, :], x)


def every_second_sequence(torch: Any, x: Any) -> Any:
    return _put(_wide(torch, x, (2 * len(x), *x.shape[1:]))[::2], x)


def fused(torch: Any, x: Any) -> Any:
    """As if q, k and v were columns of one product."""
    return _put(_wide(torch, x, (*x.shape[:-2], 3, *x.shape[-2:]))[..., 1, :, :], x)


def one_element_on(torch: Any, x: Any) -> Any:
    return _put(_wide(torch, x, (x.numel() + 1,))[1:].view(x.shape), x)


def odd_rows(torch: Any, x: Any) -> Any:
    return _put(_wide(torch, x, (*x.shape[:-1], x.shape[-1] + 3))[..., :-3], x)


def every_second_element(torch: Any, x: Any) -> Any:
    return _put(_wide(torch, x, (*x.shape[:-1], 2 * x.shape[-1]))[..., ::2], x)


SERVED = (heads_first, tokens_outermost, wide_rows, tokens_inside, every_third_token, every_second_head,
          every_second_sequence, fused)  # fmt: skip
REFUSED = (one_element_on, odd_rows, every_second_element)


@pytest.mark.parametrize("spec", [DENSE, PACKED], ids=lambda spec: spec.name)
@pytest.mark.parametrize("arrange", SERVED, ids=lambda arrange: arrange.__name__)
def test_any_strides_that_tma_takes(arrange: Any, spec: Any, torch: Any) -> None:
    if arrange in (every_second_sequence, tokens_outermost) and spec is PACKED:
        pytest.skip("packed operands have no batch")
    call = call_of(spec)
    require_served(call)
    function, operands = bound(call)
    want = function(*operands)
    check(want, spec, "dense memory")
    arranged = [arrange(torch, x) for x in operands]
    assert same(torch, function(*arranged), want), "the same numbers, elsewhere"
    for index in range(3):  # each operand has strides of its own
        mixed = [arranged[i] if i == index else operands[i] for i in range(3)]
        assert same(torch, function(*mixed), want), "qkv"[index]
    assert all(torch.equal(x, y) for x, y in zip(arranged, operands, strict=True)), "inputs are only read"


@pytest.mark.parametrize("spec", [DENSE, PACKED], ids=lambda spec: spec.name)
@pytest.mark.parametrize("arrange", REFUSED, ids=lambda arrange: arrange.__name__)
def test_other_strides_get_another_kernel(arrange: Any, spec: Any, torch: Any) -> None:
    """Unless this one is asked for by name: then the error says what it needs."""
    call = call_of(spec)
    require_served(call)
    forced, operands = bound(call)
    automatic, _ = bound(call, None)
    for index in range(3):
        mixed = [arrange(torch, x) if i == index else x for i, x in enumerate(operands)]
        check(automatic(*mixed), spec, "qkv"[index])
        with pytest.raises(ValueError, match=rf"{'qkv'[index]}: got .* sm90_attention_fwd"):
            forced(*mixed)
    check(forced(*operands), spec, "after the errors")


def test_operands_that_repeat_in_memory(torch: Any) -> None:
    """Strides of 0 are nobody's to refuse."""
    call = call_of(DENSE)
    automatic, (q, k, v) = bound(call, None)
    for change in ((q, k[:1].expand(k.shape), v[:1].expand(v.shape)), (q[:, :, :1].expand(q.shape), k, v)):
        found = automatic(*change)
        want = expected(*(from_torch(x.contiguous()) for x in change), is_causal=True)
        want.check(from_torch(found[0]), from_torch(found[1]), "stride 0")


# Memory.


@pytest.mark.parametrize("name", EVERY)
def test_only_outputs_and_the_workspace_are_allocated(name: str, torch: Any) -> None:
    call = call_of(EVERY[name])
    require_served(call)
    function, operands = bound(call)
    function(*operands)
    explained = heed.explain(
        getattr(heed, call.function), *operands, return_lse=True, backend="sm90",
        **each_array(to_torch, call.arrays), **call.statics,
    )  # fmt: skip
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    results = function(*operands)
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    assert allocated == 2 + (explained.workspace_bytes > 0) and all(x.is_contiguous() for x in results)
    assert explained.workspace_bytes <= (4096 if name != PARTS.name else 2**25)


def test_whatever_the_workspace_held(torch: Any) -> None:
    """Counters and flags start from memory that nobody has cleared: garbage, or what another launch left there."""
    calls = []
    for spec in (DENSE, HALF, PACKED, PARTS):
        require_served(call_of(spec))
        function, operands = bound(call_of(spec))
        calls.append((function, operands, function(*operands)))
    rng = np.random.default_rng(0)
    for i in range(150):
        value = (0, -1, 1, 2**31 - 1, 0x7FC00000, int(rng.integers(-(2**31), 2**31)))[i % 6]
        poison = [torch.full((4 * n,), value, dtype=torch.int32, device="cuda") for n in (1, 2, 4, 16, 64, 128, 2**21)]
        if i % 5 != 4:  # otherwise the last launch's is still there
            del poison
        function, operands, want = calls[int(rng.integers(4))]
        assert same(torch, function(*operands), want), f"call {i}, over {value}"


# Streams.


def test_two_streams_at_once(torch: Any) -> None:
    """Each launch hands out its own tiles."""
    calls = []
    for spec in (DENSE, PACKED):
        require_served(call_of(spec))
        function, operands = bound(call_of(spec))
        calls.append((function, operands, function(*operands)))
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    differing = torch.zeros(len(streams), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    for i in range(300):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                function, operands, want = calls[(index + i // 50) % len(calls)]
                for x, y in zip(function(*operands), want, strict=True):
                    differing[index] += (bits(torch, x) != bits(torch, y)).any()
    torch.cuda.synchronize()
    assert differing.tolist() == [0] * len(streams)


def test_streams_of_several_threads(torch: Any) -> None:
    cases = []
    for spec in EVERY.values():
        require_served(call_of(spec))
        function, operands = bound(call_of(spec))
        cases.append((function, operands, function(*operands)))
    torch.cuda.synchronize()
    failures: list[str] = []

    def work(index: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for i in range(40):
                    function, operands, want = cases[(index + i) % len(cases)]
                    if not same(torch, function(*operands), want):
                        failures.append(f"thread {index}, call {i} differs")
        except Exception as error:  # shown by the main thread
            failures.append(f"thread {index}: {error!r}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[:10]


def test_a_call_only_launches(torch: Any) -> None:
    """On a busy side stream: the host does not wait, and the kernel does."""
    call = call_of(DENSE)
    require_served(call)
    function, operands = bound(call)
    want = function(*operands)
    late = [torch.zeros_like(x) for x in operands]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        for x, y in zip(late, operands, strict=True):
            x.copy_(y)
        found = function(*late)
        is_early = not side.query()
    side.synchronize()
    assert is_early and same(torch, found, want)


@pytest.mark.multi_gpu
def test_multi_every_device(torch: Any) -> None:
    """At once, on a side stream of each."""
    results = []
    for index in range(2):
        with torch.cuda.device(index), torch.cuda.stream(torch.cuda.Stream()):
            operands = [to_torch(x, f"cuda:{index}") for x in call_of(DENSE).operands]
            found = [heed.flash_mha(*operands, is_causal=True, return_lse=True, backend="sm90") for _ in range(20)]
            results.append(found)
    for index, found in enumerate(results):
        torch.cuda.synchronize(index)
        check(found[0], DENSE, f"cuda:{index}")
        assert all(same(torch, one, found[0]) for one in found)


# CUDA graphs.


@pytest.mark.parametrize("name", EVERY)
def test_a_captured_call_replays_with_new_data(name: str, torch: Any) -> None:
    spec = EVERY[name]
    require_served(call_of(spec))
    function, operands = bound(call_of(spec))
    function(*operands)
    graph, captured = capture(torch, lambda: function(*operands))
    for seed in range(4):
        for x, new in zip(operands, call_of(spec, seed).operands, strict=True):
            x.copy_(to_torch(new))
        for _ in range(3):  # a replay leaves nothing behind that the next one would stumble over
            for x in captured:
                x.fill_(123.0)
            graph.replay()
        expected_result(spec, seed).check(*map(from_torch, captured), f"replay {seed}")


def test_a_captured_call_replays_with_new_lengths(torch: Any) -> None:
    call = call_of(PACKED)
    require_served(call)
    operands = [to_torch(x) for x in call.operands]
    offsets = to_torch(call.arrays["cu_seqlens_q"])

    def attend() -> Any:
        return heed.flash_mha_varlen(*operands, offsets, is_causal=True, return_lse=True, backend="sm90")

    attend()
    graph, captured = capture(torch, attend)
    for ends in ([0, 835, 835, 835, 835, 835], [0, 1, 129, 257, 500, 700], [3, 130, 400, 401, 528, 835]):
        cu_seqlens = np.array(ends, np.int32)
        offsets.copy_(to_torch(cu_seqlens))
        for x in captured:
            x.fill_(float("nan"))
        graph.replay()
        want = expected_call(call._replace(arrays={"cu_seqlens_q": cu_seqlens}))
        want.check(*map(from_torch, captured), f"ends {ends}")


def test_two_replays_of_a_graph_on_two_streams(torch: Any) -> None:
    """Two graphs of one call have memory of their own, and so do their launches."""
    require_served(call_of(DENSE))
    function, operands = bound(call_of(DENSE))
    want = function(*operands)
    graphs = [capture(torch, lambda: function(*operands)) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(100):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(same(torch, captured, want) for _, captured in graphs)


# JAX. (Command buffers: test_gpu_programs.py.)


@pytest.fixture
def hopper() -> Any:
    device = gpu_devices()[0]
    if str(device.compute_capability) != "9.0":
        pytest.skip("this is no Hopper GPU")
    return device


def on(device: Any, call: Call) -> Any:
    return jax.device_put((call.operands, call.arrays), device)


@pytest.mark.parametrize("name", EVERY)
def test_jit_and_eager(name: str, hopper: Any) -> None:
    call = call_of(EVERY[name])
    require_served(call)
    operands, arrays = on(hopper, call)
    attend = functools.partial(getattr(heed, call.function), return_lse=True, backend="sm90", **call.statics)
    first = attend(*operands, **arrays)
    expected_result(EVERY[name]).check(*map(np.asarray, first), "eager")
    jitted = jax.jit(attend)
    for _ in range(20):
        for x, y in zip(jitted(*operands, **arrays), first, strict=True):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("mapped", ["qkv", "q", "kv"])
@pytest.mark.parametrize("backend", ["sm90", None])
def test_vmap(backend: str | None, mapped: str, hopper: Any) -> None:
    """Operands that only some rows of have are another kernel's; by name, the kernel may say so."""
    spec = AttentionSpec("sm90_vmap", 2, 140, 170, 16, 8, 128, dtype="bfloat16", is_causal=True)
    calls = [call_of(spec, seed) for seed in range(3)]
    operands = [
        np.stack([call.operands[i] for call in calls]) if name in mapped else calls[0].operands[i]
        for i, name in enumerate("qkv")
    ]
    attend = functools.partial(heed.flash_mha, is_causal=True, return_lse=True, backend=backend)
    axes = tuple(0 if name in mapped else None for name in "qkv")
    try:
        out, lse = jax.jit(jax.vmap(attend, in_axes=axes))(*jax.device_put(operands, hopper))
    except heed.UnsupportedError as error:
        assert backend == "sm90" and mapped != "qkv" and "shared along" in str(error)
        return
    for row in range(3):
        one = [x[row] if name in mapped else x for name, x in zip("qkv", operands, strict=True)]
        expected(*one, is_causal=True).check(np.asarray(out[row]), np.asarray(lse[row]), f"row {row}")


def test_vmap_of_packed_sequences(hopper: Any) -> None:
    calls = [call_of(PACKED, seed) for seed in range(2)]
    operands = jax.device_put([np.stack(x) for x in zip(*(call.operands for call in calls), strict=True)], hopper)
    offsets = jax.device_put(calls[0].arrays["cu_seqlens_q"], hopper)

    def attend(q: Any, k: Any, v: Any) -> Any:
        return heed.flash_mha_varlen(q, k, v, offsets, is_causal=True, return_lse=True)

    out, lse = jax.jit(jax.vmap(attend))(*operands)
    for row in range(2):
        expected_result(PACKED, row).check(np.asarray(out[row]), np.asarray(lse[row]), f"row {row}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients(dtype: str, hopper: Any) -> None:
    """Forward by this kernel, backward by the portable one, from its output and LSE."""
    spec = AttentionSpec("sm90_grad", 2, 150, 190, 16, 8, 128, dtype=dtype, is_causal=True, sinks=True)
    call = call_of(spec)
    require_served(call)
    (q, k, v), arrays = on(hopper, call)
    dout, dlse = (np.random.default_rng(1).standard_normal(shape) for shape in (q.shape, (2, 16, 150)))
    cotangents = dout.astype(q.dtype), dlse.astype(np.float32)

    def attend(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        return heed.flash_mha(q, k, v, sinks=sinks, is_causal=True, return_lse=True)

    found = heed.explain(heed.flash_mha, q, k, v, is_causal=True, return_lse=True, **arrays)
    assert found.chosen == "sm90_attention_fwd", found

    @jax.jit
    def gradients(*operands: Any) -> Any:
        return jax.vjp(attend, *operands)[1](tuple(map(jnp.asarray, cotangents)))

    dq, dk, dv, dsinks = map(np.asarray, gradients(q, k, v, arrays["sinks"]))
    want = expected_gradients(cotangents, call.operands, is_causal=True, sinks=call.arrays["sinks"])
    fields = dict.fromkeys(Gradients._fields) | {"dq": dq, "dk": dk, "dv": dv, "dsinks": dsinks}
    want.check(Gradients(**fields), f"gradients, {dtype}")


def test_in_a_scan_beside_itself(hopper: Any) -> None:
    """Two calls that do not depend on each other in each step of one program."""
    spec = AttentionSpec("sm90_scan", 1, 300, 300, 64, 64, 128, dtype="bfloat16", is_causal=True)
    call = call_of(spec)
    require_served(call)
    (q, k, v), _ = on(hopper, call)
    attend = functools.partial(heed.flash_mha, is_causal=True, backend="sm90")

    @jax.jit
    def loop(q: Any) -> Any:
        def step(carry: Any, _: None) -> Any:
            first, second = attend(carry, k, v), attend(carry, v, k)
            return first, (first, second, carry)

        return jax.lax.scan(step, q, None, length=6)[1]

    first, second, carries = loop(q)
    for i in range(6):
        for found, (x, y) in ((first, (k, v)), (second, (v, k))):
            want = attend(carries[i], x, y)
            assert np.asarray(found[i]).tobytes() == np.asarray(want).tobytes(), f"step {i}"


SHARDED = AttentionSpec("sm90_sharded", 2, 300, 300, 64, 16, 128, dtype="bfloat16", is_causal=True)
# The whole call needs no workspace, and half of it has tiles in parts.
SHARDED_PARTS = AttentionSpec("sm90_sharded_parts", 1, 128, 2048, 64, 64, 128, dtype="bfloat16")


@pytest.mark.multi_gpu
@pytest.mark.parametrize(
    ("spec", "axis"), [(SHARDED, 0), (SHARDED, 2), (SHARDED_PARTS, 2)], ids=["batch", "heads", "parts"]
)
def test_multi_a_sharded_call_divides_its_workspace(spec: AttentionSpec, axis: int, hopper: Any) -> None:
    mesh = Mesh(np.array(gpu_devices()[:2]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec(*("x" if i == axis else None for i in range(4))))
    whole = call_of(spec).operands
    attend = jax.jit(functools.partial(heed.flash_mha, is_causal=spec.is_causal, return_lse=True, backend="sm90"))
    out, lse = attend(*(jax.device_put(x, sharding) for x in whole))
    assert out.sharding.is_equivalent_to(sharding, out.ndim)
    expected_result(spec).check(np.asarray(out), np.asarray(lse), f"axis {axis}")
    for i in range(2):  # the bits of a call of its own, which has the workspace that it needs
        own, _ = attend(*(jax.device_put(np.split(x, 2, axis)[i], gpu_devices()[i]) for x in whole))
        assert np.asarray(own).tobytes() == np.split(np.asarray(out), 2, axis)[i].tobytes(), f"share {i}"
