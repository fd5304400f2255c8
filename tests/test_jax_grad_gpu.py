"""Gradients on GPUs through JAX: transforms, programs that repeat, memory, several GPUs.

Conformance is in test_flash_mha_grad.py, through the faces.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import heed
from conftest import gpu_devices
from expected import expected_gradients, expected_gradients_varlen
from heed.reference import Gradients
from jax_cases import OPERANDS, OPTIONS, attend
from jax_grad_cases import (
    BACKWARD,
    COTANGENTS,
    DIFFERENTIABLE,
    FORWARD,
    axes_of,
    gradients,
    make_case,
    make_varlen_case,
    operands_of,
    rows_of,
)
from test_jax_sharding import COMMUNICATION

pytestmark = pytest.mark.gpu

SIZES = {"q_len": 130, "kv_len": 190, "head_dim": 64}
ALL = (*OPERANDS, *COTANGENTS)


def on_gpu(operands: Any) -> Any:
    return jax.device_put(operands, gpu_devices()[0])


def check_case(found: Mapping[str, Any], operands: Mapping[str, np.ndarray], what: str) -> None:
    """Asserts the tolerance rule for all gradients of one call."""
    cotangents = operands["dout"], operands["dlse"]
    arrays = {name: x for name, x in operands_of(operands).items() if name not in ("q", "k", "v")}
    expected: Any = expected_gradients_varlen
    if "q_segment_ids" in arrays:
        expected = expected_gradients
        arrays["segment_ids"] = (arrays.pop("q_segment_ids"), arrays.pop("kv_segment_ids"))
    want = expected(cotangents, tuple(operands[name] for name in "qkv"), **arrays, **OPTIONS)
    want.check(Gradients(*(np.asarray(found[name]) for name in DIFFERENTIABLE)), what)


def test_jit_eager_and_vmap() -> None:
    operands = make_case(**SIZES)
    check_case(jax.jit(gradients)(on_gpu(operands)), operands, "jit")
    check_case(gradients(on_gpu(operands)), operands, "eager")
    stacked = make_case(lead=dict.fromkeys(ALL, (3,)), **SIZES)
    found = jax.jit(jax.vmap(gradients))(on_gpu(stacked))
    assert all(x.devices() == {gpu_devices()[0]} for x in found.values())
    for i in range(3):
        check_case({name: x[i] for name, x in found.items()}, rows_of(stacked, ALL, i), f"vmap, row {i}")


@pytest.mark.parametrize(
    "mapped",
    [("q",), ("k", "v"), ("q", "sinks"), COTANGENTS, ("kv_segment_ids", "alibi_slopes")],
    ids="_".join,
)
def test_only_some_operands_mapped(mapped: tuple[str, ...]) -> None:
    operands = make_case(lead=dict.fromkeys(mapped, (3,)), **SIZES)
    found = jax.jit(jax.vmap(gradients, in_axes=(axes_of(mapped, ALL),)))(on_gpu(operands))
    for i in range(3):
        check_case({name: x[i] for name, x in found.items()}, rows_of(operands, mapped, i), f"row {i}")


@pytest.mark.parametrize("mapped", [("q", "cu_seqlens_q"), ("k", "v", "seqused_k"), COTANGENTS], ids="_".join)
def test_packed_sequences(mapped: tuple[str, ...]) -> None:
    operands = make_varlen_case(lead=dict.fromkeys(mapped, (3,)), total_q=150, total_k=210, head_dim=64)
    found = jax.jit(jax.vmap(gradients, in_axes=(axes_of(mapped, operands),)))(on_gpu(operands))
    for i in range(3):
        check_case({name: x[i] for name, x in found.items()}, rows_of(operands, mapped, i), f"row {i}")


@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_layers(remat: bool) -> None:
    """The gradients of each layer are those of the layer by itself, on what it got; and there is no second call."""
    layers = 3
    case = make_case(**SIZES | {"kv_len": 130})
    k, v = (np.stack([case[name] * np.float32(0.5 + i) for i in range(layers)]) for name in "kv")
    v = v[..., :64]
    q, dout = case["q"], case["dout"][..., :64]

    def layer(x: Any, kv: Any) -> Any:
        return heed.flash_mha(x, *kv, deterministic=True, **OPTIONS), x

    step = jax.checkpoint(layer) if remat else layer

    def run(q: Any, kv: Any) -> Any:
        _, pull, inputs = jax.vjp(lambda q, kv: jax.lax.scan(step, q, kv), q, kv, has_aux=True)
        return pull(dout), inputs

    call = jax.jit(run)
    placed = on_gpu((q, (k, v)))
    text = str(call.lower(*placed).compile().as_text())
    assert text.count(f'custom_call_target="{BACKWARD}"') == 1
    assert text.count(f'custom_call_target="{FORWARD}"') == 1 + remat
    (dq, (dk, dv)), inputs = call(*placed)
    inputs, cotangent = np.asarray(inputs), dout

    def one_layer(q: Any, k: Any, v: Any, dout: Any) -> Any:
        return jax.vjp(lambda *x: heed.flash_mha(*x, deterministic=True, **OPTIONS), q, k, v)[1](dout)

    for i in reversed(range(layers)):
        want = expected_gradients((cotangent, None), (inputs[i], k[i], v[i]), **OPTIONS)
        found = [np.asarray(x) for x in jax.jit(one_layer)(*on_gpu((inputs[i], k[i], v[i], cotangent)))]
        want.check(Gradients(found[0], np.asarray(dk[i]), np.asarray(dv[i])), f"layer {i}")
        cotangent = found[0]
    assert np.isfinite(np.asarray(dq)).all() and np.asarray(dq).any()


def test_a_training_step_repeats_bitwise_where_that_is_promised() -> None:
    """Also where XLA replays it as a CUDA graph."""
    operands = on_gpu({name: x for name, x in make_case(batch=3, **SIZES).items() if name in ("q", "k", "v")})

    def loss(x: dict[str, Any]) -> Any:
        return jnp.sum(heed.flash_mha(x["q"], x["k"], x["v"], deterministic=True, **OPTIONS) ** 2)

    step = jax.jit(jax.value_and_grad(loss))
    first = jax.tree.leaves(step(operands))
    for i in range(30):
        for x, y in zip(jax.tree.leaves(step(operands)), first, strict=True):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), f"step {i}"


def test_donated_operands() -> None:
    operands = {name: x for name, x in make_case(**SIZES).items() if name in ("q", "k", "v")}

    def step(x: dict[str, Any]) -> Any:
        def loss(x: dict[str, Any]) -> Any:
            return jnp.sum(heed.flash_mha(x["q"], x["k"], x["v"], deterministic=True, **OPTIONS) ** 2)

        return jax.tree.map(lambda p, g: p - 0.1 * g, x, jax.grad(loss)(x))

    want = jax.jit(step)(on_gpu(operands))
    got = jax.jit(step, donate_argnums=0)(jax.tree.map(jnp.array, on_gpu(operands)))
    for name in operands:
        np.testing.assert_array_equal(np.asarray(got[name]), np.asarray(want[name]), err_msg=name)


def test_cpu_and_gpu_in_one_process() -> None:
    operands = make_case(**SIZES)
    call = jax.jit(gradients)
    for device in (gpu_devices()[0], jax.devices("cpu")[0]):
        found = call(jax.device_put(operands, device))
        assert all(x.devices() == {device} for x in found.values())
        check_case(found, operands, str(device))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_is_linear_in_the_sequence(dtype: str) -> None:
    """S 16k, H 16, D 128: inputs, outputs, one float32 dQ and O(S * H)."""
    batch, length, heads, dim = 1, 16384, 16, 128
    on_device = jax.sharding.SingleDeviceSharding(gpu_devices()[0])
    tensor = jax.ShapeDtypeStruct((batch, length, heads, dim), dtype, sharding=on_device)
    lse = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32, sharding=on_device)
    elements = batch * length * heads * dim

    def backward(q: Any, k: Any, v: Any, out: Any, lse: Any, dout: Any) -> Any:
        return heed.flash_mha_bwd(dout, q, k, v, out, lse, is_causal=True)[:3]

    found: Any = jax.jit(backward).lower(tensor, tensor, tensor, tensor, lse, tensor).compile().memory_analysis()
    outputs = 3 * elements * np.dtype(jnp.dtype(dtype)).itemsize
    assert found.output_size_in_bytes + found.temp_size_in_bytes <= outputs + 4 * elements + 64 * length * heads


# Several GPUs.


@pytest.mark.multi_gpu
@pytest.mark.parametrize("how", ["jit", "shard_map"])
@pytest.mark.parametrize("axis, kv_heads", [("batch", 2), ("heads", 2), ("heads", 1)])
def test_multi_sharded_gradients(axis: str, kv_heads: int, how: str) -> None:
    """Two GPUs that share a KV head add up its gradient; no other communication but the sum over the batch."""
    operands = make_case(batch=4, kv_heads=kv_heads, **SIZES)
    mesh = Mesh(np.array(gpu_devices()[:2]), ("x",))
    if axis == "batch":
        specs = {name: P() if x.ndim == 1 else P("x") for name, x in operands.items()}
    else:
        kv = P(None, None, "x") if kv_heads > 1 else P()
        specs = {name: P() for name in operands} | {"q": P(None, None, "x"), "k": kv, "v": kv}
        specs |= {"sinks": P("x"), "alibi_slopes": P("x"), "dout": P(None, None, "x"), "dlse": P(None, "x")}
    arrays = {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in operands.items()}
    function: Any = gradients
    if how == "shard_map":
        outputs = {name: specs[name] for name in DIFFERENTIABLE}
        function = jax.shard_map(gradients, mesh=mesh, in_specs=(specs,), out_specs=outputs)
    call = jax.jit(function)
    text = str(call.lower(arrays).compile().as_text()).replace("all-reduce-start", "all-reduce")
    shares = axis == "batch" or kv_heads == 1
    assert set(COMMUNICATION.findall(text)) == ({"all-reduce"} if shares else set())
    check_case(call(arrays), operands, f"{axis} over two GPUs")


@pytest.mark.multi_gpu
def test_multi_every_device() -> None:
    operands = make_case(**SIZES)
    for device in gpu_devices():
        found = jax.jit(gradients)(jax.device_put(operands, device))
        assert all(x.devices() == {device} for x in found.values())
        check_case(found, operands, str(device))


def test_the_forward_pass_of_a_gradient_is_that_of_a_call() -> None:
    """The LSE that is kept for the backward pass changes nothing."""
    operands = on_gpu(operands_of(make_case(**SIZES)))
    out, lse = jax.jit(attend)(operands)
    results = jax.jit(lambda x: jax.vjp(attend, x)[0])(operands)
    np.testing.assert_array_equal(np.asarray(results[0]), np.asarray(out))
    np.testing.assert_array_equal(np.asarray(results[1]), np.asarray(lse))
