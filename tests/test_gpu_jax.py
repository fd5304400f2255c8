"""JAX on GPUs: transforms, platforms, devices and shardings. Conformance is in test_flash_mha.py, through the faces."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import heed
from conftest import gpu_devices
from expected import expected, expected_of
from jax_cases import OPTIONS, attend, keywords, make_operands
from specs import AttentionSpec, make_inputs

pytestmark = pytest.mark.gpu

SMALL = AttentionSpec("gpu_small", q_len=130, kv_len=190, num_q_heads=4, is_causal=True, dtype="float16")
COMMUNICATION = re.compile(r"\b(all-gather|all-reduce|all-to-all|collective-permute|dynamic-slice)\b")


def small_inputs(device: Any) -> list[Any]:
    inputs = make_inputs(SMALL)
    return [jax.device_put(x, device) for x in (inputs.q, inputs.k, inputs.v)]


def check_case(results: Any, operands: dict[str, np.ndarray], what: str) -> None:
    out, lse = map(np.asarray, results)
    expected(**keywords(operands), **OPTIONS).check(out, lse, what)


def test_the_gpu_kernel_is_the_one_that_runs() -> None:
    q, k, v = small_inputs(gpu_devices()[0])
    found = heed.explain(heed.flash_mha, q, k, v)
    assert found.target.startswith("sm_") and found.is_served and found.chosen != "cpu_attention_fwd", found
    hlo = jax.jit(heed.flash_mha).lower(q, k, v).compile().as_text()
    assert "heed.attention_fwd.v1" in str(hlo)


def test_every_operand_under_jit_and_vmap() -> None:
    device = gpu_devices()[0]
    operands = make_operands()
    check_case(jax.jit(attend)(jax.device_put(operands, device)), operands, "jit")
    check_case(attend(jax.device_put(operands, device)), operands, "eager")
    rows = [make_operands(seed=seed) for seed in range(3)]
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    out, lse = jax.jit(jax.vmap(attend))(jax.device_put(stacked, device))
    for i, row in enumerate(rows):
        check_case((out[i], lse[i]), row, f"vmap, row {i}")


@pytest.mark.parametrize(
    "mapped", [("q",), ("k", "v"), ("q", "sinks"), ("kv_segment_ids", "alibi_slopes")], ids="_".join
)
def test_only_some_operands_mapped(mapped: tuple[str, ...]) -> None:
    rows = [make_operands(seed=seed) for seed in range(3)]
    operands = rows[0] | {name: np.stack([row[name] for row in rows]) for name in mapped}
    axes = ({name: 0 if name in mapped else None for name in operands},)
    out, lse = jax.jit(jax.vmap(attend, in_axes=axes))(jax.device_put(operands, gpu_devices()[0]))
    for i, row in enumerate(rows):
        check_case((out[i], lse[i]), rows[0] | {name: row[name] for name in mapped}, f"row {i}")


def test_in_a_scan() -> None:
    q, k, v = small_inputs(gpu_devices()[0])

    def step(carry: Any, _: None) -> Any:
        out = heed.flash_mha(carry, k, v, is_causal=True)
        return out, carry

    carries = np.asarray(jax.jit(lambda q: jax.lax.scan(step, q, None, length=4))(q)[1])
    for i in range(3):
        want = expected(carries[i], np.asarray(k), np.asarray(v), is_causal=True)
        want.check(carries[i + 1], None, f"step {i}")


def test_repeats_and_eager_calls_are_bitwise_equal() -> None:
    q, k, v = small_inputs(gpu_devices()[0])
    call = functools.partial(heed.flash_mha, is_causal=True, return_lse=True)
    first = jax.jit(call)(q, k, v)
    for i in range(50):
        results = call(q, k, v) if i % 2 else jax.jit(call)(q, k, v)
        for x, y in zip(results, first, strict=True):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), f"call {i}"


def test_cpu_and_gpu_in_one_process() -> None:
    """The same function, each time where its operands are."""
    call = jax.jit(functools.partial(heed.flash_mha, is_causal=True, return_lse=True))
    for device in (gpu_devices()[0], jax.devices("cpu")[0]):
        out, lse = call(*small_inputs(device))
        assert out.devices() == {device}
        expected_of(SMALL).check(np.asarray(out), np.asarray(lse), str(device))


def test_forced_backends() -> None:
    gpu, cpu = small_inputs(gpu_devices()[0]), small_inputs(jax.devices("cpu")[0])
    out, lse = jax.jit(functools.partial(heed.flash_mha, is_causal=True, return_lse=True, backend="sm80"))(*gpu)
    expected_of(SMALL).check(np.asarray(out), np.asarray(lse), "sm80")
    with pytest.raises(heed.UnsupportedError, match="cpu_attention_fwd: runs on the CPU only"):
        jax.jit(functools.partial(heed.flash_mha, backend="cpu"))(*gpu)
    with pytest.raises(heed.UnsupportedError, match="sm80_attention_fwd"):
        jax.jit(functools.partial(heed.flash_mha, backend="sm80"))(*cpu)


# Several GPUs.


@pytest.mark.multi_gpu
def test_multi_every_device() -> None:
    call = jax.jit(functools.partial(heed.flash_mha, is_causal=True, return_lse=True))
    for device in gpu_devices():
        out, lse = call(*small_inputs(device))
        assert out.devices() == lse.devices() == {device}
        expected_of(SMALL).check(np.asarray(out), np.asarray(lse), str(device))


@pytest.mark.multi_gpu
@pytest.mark.parametrize("axis", ["batch", "heads"])
@pytest.mark.parametrize("how", ["jit", "shard_map"])
def test_multi_sharded_calls_do_not_communicate(axis: str, how: str) -> None:
    operands = make_operands(batch=4)
    mesh = Mesh(np.array(gpu_devices()[:2]), ("x",))

    def spec(name: str, rank: int) -> PartitionSpec:
        if axis == "batch":
            return PartitionSpec() if rank == 1 else PartitionSpec("x")
        if "segment" in name:
            return PartitionSpec()
        return PartitionSpec("x") if rank == 1 else PartitionSpec(None, None, "x")

    specs = {name: spec(name, x.ndim) for name, x in operands.items()}
    outputs = (
        PartitionSpec("x") if axis == "batch" else PartitionSpec(None, None, "x"),
        PartitionSpec("x") if axis == "batch" else PartitionSpec(None, "x"),
    )
    arrays = {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in operands.items()}
    function: Any = attend
    if how == "shard_map":
        function = jax.shard_map(attend, mesh=mesh, in_specs=(specs,), out_specs=outputs)
    call = jax.jit(function)
    assert not COMMUNICATION.findall(str(call.lower(arrays).compile().as_text()))
    out, lse = call(arrays)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, outputs[0]), out.ndim)
    assert lse.sharding.is_equivalent_to(NamedSharding(mesh, outputs[1]), lse.ndim)
    check_case((out, lse), operands, f"{axis} over two GPUs")


@pytest.mark.multi_gpu
def test_multi_a_sharded_token_axis_is_refused() -> None:
    operands = make_operands(batch=2, q_len=8, kv_len=8)
    mesh = Mesh(np.array(gpu_devices()[:2]), ("x",))
    tokens = NamedSharding(mesh, PartitionSpec(None, "x"))
    q, k, v = (jax.device_put(operands[name], tokens) for name in "qkv")
    with pytest.raises(ValueError, match="q_tokens"):
        jax.jit(heed.flash_mha)(q, k, v)
