"""Kernels of heed inside JAX programs, step by step: `make tutorial`, or `python examples/tutorial.py`.

A transformer that answers one token at a time needs three kernels besides its matrix products: a gated activation, a
rotary embedding and attention of one query over a cache. This file calls them from JAX in two ways and checks every
result against plain JAX. It reads from top to bottom and runs on a GPU if JAX has one (--device decides).

1. By hand: `heed.jit` builds a module of compiled functions, `jax_tvm_ffi` tells XLA about one of them, `jax.ffi` calls
   it. This is what to do with any kernel that writes into memory it is given.
2. By `heed.ops`: the same kernels as ordinary functions. They have gradients, they map (`jax.vmap`) over any of their
   operands, and they stay sharded.
3. A layer of a Llama from them, and its next token.
"""

from __future__ import annotations

import argparse
import collections
import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

# On a GPU, XLA is to capture even programs as small as these into command buffers (CUDA graphs).
if __name__ == "__main__":
    _FLAGS = "--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL --xla_gpu_graph_min_graph_size=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()

import jax
import jax.numpy as jnp
import jax_tvm_ffi
import numpy as np

import heed
import llama
from heed import ops
from heed.jit import gen_act_and_mul_module, gen_rope_module, gen_single_decode_module

Array = jax.Array

# 1. By hand -----------------------------------------------------------------------------------------------------------
#
# A function of a module takes tensors that exist already, results among them, and returns nothing. XLA hands a target
# its results first, then its operands, then its attributes. So between the two stands a wrapper that reorders.

calls: collections.Counter[str] = collections.Counter()
"""How often XLA called each wrapper. Inside a command buffer it does so only to record."""


def register(name: str, wrapper: Callable[..., None], attributes: list[str], platform: str) -> str:
    """Tells XLA of the platform about the wrapper, under a name of its own. Returns that name."""
    target = f"tutorial.{name}.{platform}"

    def counted(*args: Any) -> None:
        calls[name] += 1
        wrapper(*args)

    jax_tvm_ffi.register_ffi_target(
        target,
        counted,
        arg_spec=["rets", "args", *(f"attrs.{attribute}" for attribute in attributes)],
        platform=platform,
        allow_cuda_graph=True,  # nothing but a launch happens in a call, so a graph may hold it
        pass_owned_tensor=True,
    )
    return target


# The gated activation: one operand, one result, one attribute, in the order that XLA has them. Nothing to reorder.


@functools.cache
def silu_target(platform: str) -> str:
    module = gen_act_and_mul_module("silu").build_and_load()  # silu_and_mul(out, input, enable_pdl)
    return register("silu_and_mul", lambda *args: module.silu_and_mul(*args), ["enable_pdl"], platform)


def silu_and_mul(x: Array, platform: str) -> Array:
    """silu(gate) * up of x [..., 2H], the gates and then what they are multiplied with."""
    out: Array = jax.ffi.ffi_call(
        silu_target(platform),
        jax.ShapeDtypeStruct((*x.shape[:-1], x.shape[-1] // 2), x.dtype),
        vmap_method="broadcast_all",  # another leading axis is one more axis of rows
    )(x, enable_pdl=False)
    return out


# The rotary embedding: two results, which the module's function has in the middle. Sequences lie packed one after the
# other; indptr says where each begins, offsets at which position its first token sits.


@functools.cache
def rope_target(platform: str) -> str:
    module = gen_rope_module().build_and_load()

    def wrapper(q_rope: Any, k_rope: Any, q: Any, k: Any, indptr: Any, offsets: Any, *attributes: Any) -> None:
        module.apply_rope(q, k, q_rope, k_rope, indptr, offsets, *attributes)

    return register("apply_rope", wrapper, ["rotary_dim", "interleave", "rope_scale", "rope_theta"], platform)


def apply_rope(
    q: Array, k: Array, indptr: Array, offsets: Array, platform: str, *, rope_theta: float = 1e4
) -> tuple[Array, Array]:
    """q [tokens, num_q_heads, head_dim] and k [tokens, num_kv_heads, head_dim], rotated by their tokens' positions."""
    rotated = jax.ffi.ffi_call(
        rope_target(platform),
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(k.shape, k.dtype)),
        vmap_method="broadcast_all",
    )(q, k, indptr, offsets, rotary_dim=q.shape[-1], interleave=False, rope_scale=1.0, rope_theta=rope_theta)
    return rotated[0], rotated[1]


# Attention of one query: a module for one dtype and head dim; scratch memory that XLA allocates as one more result; and
# operands that may be absent, for which an empty array stands.

SCRATCH_BYTES = 32 * 1024 * 1024


@functools.cache
def decode_target(platform: str, dtype: str, head_dim: int) -> str:
    module = gen_single_decode_module(dtype, dtype, dtype, head_dim, head_dim).build_and_load()

    def or_none(tensor: Any) -> Any:
        return None if tensor.shape[0] == 0 else tensor

    def wrapper(
        out: Any, tmp: Any, lse: Any, q: Any, k: Any, v: Any, slopes: Any, layout: int, window: int, *scalars: float
    ) -> None:
        module.run(q, k, v, tmp, out, or_none(lse), layout, window, or_none(slopes), *scalars)

    return register(
        f"single_decode_{dtype}_{head_dim}",
        wrapper,
        ["kv_layout_code", "window_left", "logits_soft_cap", "sm_scale", "rope_scale", "rope_theta"],
        platform,
    )


def decode_attention(q: Array, k: Array, v: Array, platform: str) -> tuple[Array, Array]:
    """q [num_q_heads, head_dim] over k and v [kv_len, num_kv_heads, head_dim]: the output and its log-sum-exp."""
    num_q_heads, head_dim = q.shape
    out, _, lse = jax.ffi.ffi_call(
        decode_target(platform, q.dtype.name, head_dim),
        (
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((SCRATCH_BYTES,), jnp.uint8),
            jax.ShapeDtypeStruct((num_q_heads,), jnp.float32),  # of shape (0,): not wanted
        ),
    )(
        q, k, v, jnp.empty((0,), jnp.float32), kv_layout_code=0, window_left=-1, logits_soft_cap=0.0,
        sm_scale=head_dim**-0.5, rope_scale=1.0, rope_theta=1e4,
    )  # fmt: skip
    return out, lse


# The same in plain JAX, in float32.


def plain_silu_and_mul(x: Array) -> Array:
    gate, up = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jax.nn.silu(gate) * up


def plain_rope(x: Array, positions: Array, theta: float = 1e4) -> Array:
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * theta ** (-jnp.arange(half) / half)  # [tokens, 1, head_dim / 2]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)], axis=-1)


def plain_decode(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    queries, keys, values = (x.astype(jnp.float32) for x in (q, k, v))
    queries = queries.reshape(k.shape[1], -1, q.shape[1])  # [num_kv_heads, group, head_dim]
    scores = jnp.einsum("hgd,shd->hgs", queries, keys, precision="highest") * q.shape[1] ** -0.5
    out = jnp.einsum("hgs,shd->hgd", jax.nn.softmax(scores), values, precision="highest")
    return out.reshape(q.shape), jax.nn.logsumexp(scores, axis=-1).reshape(-1)


def check(name: str, found: Any, want: Any, bound: float) -> None:
    """Prints how far results are apart, as a part of the largest number, and asserts that it is within the bound."""
    error = 0.0
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape, f"{name}: got {x.shape}, expected {y.shape}"
        error = max(error, float(np.abs(x - y).max() / np.abs(y).max()))
    print(f"  {name:<58} error {error:.1e}")
    assert error <= bound, f"{name}: the error is {error}, expected at most {bound}"


def normal(seed: int, *shape: int, dtype: Any = jnp.float16) -> Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, KV_LEN = 16, 4, 64, 512
HALF_BOUND, FLOAT_BOUND = 2e-3, 1e-5  # numbers of float16 have 11 bits, those of float32 have 24


def by_hand(platform: str) -> None:
    print("1. Kernels by hand, in three steps: build and load, register, call")
    x = normal(0, 32, 512)
    check("silu_and_mul", silu_and_mul(x, platform), plain_silu_and_mul(x), HALF_BOUND)

    q, k = normal(1, 16, 8, HEAD_DIM), normal(2, 16, 8, HEAD_DIM)
    indptr, offsets = jnp.array([0, 8, 16], jnp.int32), jnp.array([0, 100], jnp.int32)
    positions = jnp.concatenate([jnp.arange(8), 100 + jnp.arange(8)])
    want = plain_rope(q, positions), plain_rope(k, positions)
    check(
        "apply_rope: two sequences, at positions 0 and 100",
        apply_rope(q, k, indptr, offsets, platform),
        want,
        HALF_BOUND,
    )

    starts = jnp.array([[0, 100], [7, 3], [9000, 1]], jnp.int32)
    mapped = jax.vmap(lambda offsets: apply_rope(q, k, indptr, offsets, platform))(starts)
    one_by_one = [apply_rope(q, k, indptr, offsets, platform) for offsets in starts]
    check("apply_rope under vmap, against a Python loop", mapped, jax.tree.map(lambda *x: jnp.stack(x), *one_by_one), 0)

    q, k, v = normal(10, NUM_Q_HEADS, HEAD_DIM), *normal(11, 2, KV_LEN, NUM_KV_HEADS, HEAD_DIM)
    found = decode_attention(q, k, v, platform)
    check("decode_attention: 16 query heads on 4, 512 keys", found, plain_decode(q, k, v), HALF_BOUND)


def composed(platform: str) -> None:
    """All three as parts of one XLA program, which on a GPU is one CUDA graph."""
    print("   All three in one jax.jit")
    gate_up, q = normal(20, 4, 2 * HEAD_DIM), normal(21, 1, NUM_Q_HEADS, HEAD_DIM)
    k, v = normal(22, 2, KV_LEN, NUM_KV_HEADS, HEAD_DIM)
    indptr, offsets = jnp.array([0, 1], jnp.int32), jnp.array([KV_LEN], jnp.int32)

    @jax.jit
    def decode_step(gate_up: Array, q: Array, k: Array, v: Array) -> Any:
        rotated, _ = apply_rope(q, k[:1], indptr, offsets, platform)
        return silu_and_mul(gate_up, platform), *decode_attention(rotated[0], k, v, platform)

    program = decode_step.lower(gate_up, q, k, v).compile().as_text() or ""
    assert program.count('custom_call_target="tutorial.') == 3, program
    want = plain_silu_and_mul(gate_up), *plain_decode(plain_rope(q, offsets)[0].astype(q.dtype), k, v)
    check("silu_and_mul, apply_rope and decode_attention", decode_step(gate_up, q, k, v), want, HALF_BOUND)

    for _ in range(8):  # XLA records a command buffer anew while it meets new addresses
        jax.block_until_ready(decode_step(gate_up, q, k, v))
    calls.clear()
    steps = 50
    start = time.perf_counter()
    for _ in range(steps):
        jax.block_until_ready(decode_step(gate_up, q, k, v))
    seconds = time.perf_counter() - start
    print(f"  {1e6 * seconds / steps:.0f} us a step; in {steps} steps the three wrappers ran {calls.total()} times")
    if platform == "gpu":
        assert calls.total() < 3 * steps, "expected a command buffer, which runs without the wrappers"
    else:
        assert calls.total() == 3 * steps


# 2. By heed.ops -------------------------------------------------------------------------------------------------------


def by_ops() -> None:
    print("2. The same kernels by heed.ops")
    x = normal(30, 32, 512, dtype=jnp.float32)
    check("silu_and_mul", ops.silu_and_mul(x), plain_silu_and_mul(x), FLOAT_BOUND)
    gradient = jax.jit(jax.grad(lambda x: ops.silu_and_mul(x).var()))(x)
    check("its gradient", gradient, jax.grad(lambda x: plain_silu_and_mul(x).var())(x), FLOAT_BOUND)

    queries = normal(31, 5, NUM_Q_HEADS, HEAD_DIM, dtype=jnp.float32)
    k, v = normal(32, 2, KV_LEN, NUM_KV_HEADS, HEAD_DIM, dtype=jnp.float32)
    decode = functools.partial(ops.single_decode, return_lse=True)
    mapped = jax.jit(jax.vmap(decode, in_axes=(0, None, None)))(queries, k, v)
    one_by_one = [plain_decode(q, k, v) for q in queries]
    check(
        "single_decode, five queries mapped over one cache",
        mapped,
        jax.tree.map(lambda *x: jnp.stack(x), *one_by_one),
        FLOAT_BOUND,
    )

    def loss(attend: Callable[..., Any], k: Array) -> Array:
        return attend(queries[0], k, v)[0].var()

    want = jax.grad(functools.partial(loss, plain_decode))(k)
    check("its gradient, of the keys", jax.grad(functools.partial(loss, decode))(k), want, FLOAT_BOUND)


# 3. A layer of a Llama ------------------------------------------------------------------------------------------------

CONFIG = llama.LlamaConfig(
    num_layers=1, num_q_heads=8, num_kv_heads=2, head_dim=32, hidden_dim=256, ffn_dim=512, vocab_size=64
)


def project(x: Array, layer: llama.Layer) -> tuple[Array, Array, Array]:
    """Queries, keys and values of normalised tokens x [tokens, hidden]."""
    weights = (layer.w_q, CONFIG.num_q_heads), (layer.w_k, CONFIG.num_kv_heads), (layer.w_v, CONFIG.num_kv_heads)
    q, k, v = ((x @ w).reshape(len(x), num_heads, CONFIG.head_dim) for w, num_heads in weights)
    return q, k, v


def after_attention(x: Array, attended: Array, layer: llama.Layer) -> Array:
    """The rest of the layer, from what attention gave for tokens x [tokens, hidden]."""
    normed, x = ops.fused_add_rms_norm(attended.reshape(len(x), -1) @ layer.w_o, x, layer.ffn_norm, CONFIG.norm_eps)
    gate_up = normed @ jnp.concatenate([layer.w_gate, layer.w_up], axis=1)
    return x + ops.silu_and_mul(gate_up) @ layer.w_down


def decoder_layer(x: Array, layer: llama.Layer) -> tuple[Array, Array, Array]:
    """Tokens x [tokens, hidden] through the layer: what it returns, and the keys and values, for the tokens to come."""
    q, k, v = project(ops.rms_norm(x, layer.attention_norm, CONFIG.norm_eps), layer)
    indptr, offsets = jnp.array([0, len(x)], jnp.int32), jnp.zeros(1, jnp.int32)
    q, k = ops.apply_rope(q, k, indptr, offsets, rope_theta=CONFIG.rope_theta)
    attended = heed.flash_mha(q[None], k[None], v[None], is_causal=True)[0]
    return after_attention(x, attended, layer), k, v


def next_token(x: Array, keys: Array, values: Array, layer: llama.Layer) -> Array:
    """One token x [hidden] after those of the cache: its row of the layer's output."""
    rows = x[None]
    q, k, v = project(ops.rms_norm(rows, layer.attention_norm, CONFIG.norm_eps), layer)
    position = jnp.full(1, len(keys), jnp.int32)
    q, k = ops.apply_rope_pos_ids(q, k, position, rope_theta=CONFIG.rope_theta)
    attended = ops.single_decode(q[0], jnp.concatenate([keys, k]), jnp.concatenate([values, v]))
    return after_attention(rows, attended[None], layer)[0]


def plain_layer(x: Array, layer: llama.Layer) -> Array:
    """The layer as `llama.py` has it, on JAX's own functions: x [batch, tokens, hidden]."""
    rope = llama.rope_tables(x.shape[1], CONFIG.head_dim, CONFIG.rope_theta, x.dtype)
    qkv = llama.attention_inputs(x, layer, rope, CONFIG)
    x = x + jax.nn.dot_product_attention(*qkv, is_causal=True).reshape(*x.shape[:2], -1) @ layer.w_o
    return x + llama.feed_forward(x, layer, CONFIG)


def a_llama_layer() -> None:
    print("3. A layer of a Llama from heed's functions")
    params = llama.init_params(CONFIG)
    layer = params.layers[0]
    x = normal(40, 3, 48, CONFIG.hidden_dim, dtype=jnp.float32)  # [batch, tokens, hidden]
    with jax.default_matmul_precision("highest"):
        out, keys, values = jax.jit(jax.vmap(decoder_layer, in_axes=(0, None)))(x, layer)
        want = jax.jit(plain_layer)(x, layer)
        check("all tokens, three sequences mapped", out, want, FLOAT_BOUND)

        step = jax.jit(jax.vmap(next_token, in_axes=(0, 0, 0, None)))
        last = step(x[:, -1], keys[:, :-1], values[:, :-1], layer)
        check("the last token alone, over a cache of those before", last, want[:, -1], FLOAT_BOUND)

        def loss(forward: Callable[..., Array], layer: llama.Layer) -> Array:
            return forward(x, layer).var()

        def with_heed(x: Array, layer: llama.Layer) -> Array:
            return jax.vmap(lambda x: decoder_layer(x, layer)[0])(x)

        found, want = (jax.jit(jax.grad(functools.partial(loss, f)))(layer) for f in (with_heed, plain_layer))
        check("gradients of all nine weights", found, want, FLOAT_BOUND)


def main() -> int:
    parser = argparse.ArgumentParser(description="heed's kernels inside JAX programs, step by step.")
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    wanted = parser.parse_args().device
    try:
        device = jax.devices({"auto": None, "cpu": "cpu", "gpu": "cuda"}[wanted])[0]
    except RuntimeError as error:
        print(f"got --device {wanted}, expected one that JAX has: {error}")
        return 2
    platform = "cpu" if device.platform == "cpu" else "gpu"
    print(f"heed {heed.__version__}, JAX {jax.__version__}, on {device.device_kind}")
    with jax.default_device(device):
        by_hand(platform)
        composed(platform)
        by_ops()
        a_llama_layer()
    print("Every result is right.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
