"""A plain Llama in JAX, for reading: RoPE, RMSNorm, SwiGLU, grouped-query attention, tied embeddings.

The attention function is a parameter. Anything with the signature `attention(q, k, v) -> out` on arrays of shape
[batch, tokens, heads, head_dim] will do, so the same model runs on heed and on JAX's own attention:

    heed_attention = functools.partial(heed.flash_mha, is_causal=True)
    jax_attention = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    logits = forward(params, tokens, config, heed_attention)

Names follow the paper (https://arxiv.org/abs/2302.13971): weights are [in_features, out_features] and multiply from the
right. `smollm2.py` fills the parameters from a GGUF file, `demo.py` talks to the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Tokens = jax.Array | NDArray[np.int32]


class LlamaConfig(NamedTuple):
    """Sizes of one model; hashable, so that it can be a static argument of `jax.jit`."""

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_dim: int
    ffn_dim: int
    vocab_size: int
    context_len: int = 2048  # longest sequence that the model was trained for
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


class Layer(NamedTuple):
    """Weights of one decoder layer."""

    attention_norm: jax.Array  # [hidden]
    w_q: jax.Array  # [hidden, num_q_heads * head_dim]
    w_k: jax.Array  # [hidden, num_kv_heads * head_dim]
    w_v: jax.Array  # [hidden, num_kv_heads * head_dim]
    w_o: jax.Array  # [num_q_heads * head_dim, hidden]
    ffn_norm: jax.Array  # [hidden]
    w_gate: jax.Array  # [hidden, ffn]
    w_up: jax.Array  # [hidden, ffn]
    w_down: jax.Array  # [ffn, hidden]


class Params(NamedTuple):
    """All weights. The embedding is also the output projection (tied)."""

    embedding: jax.Array  # [vocab, hidden]
    layers: tuple[Layer, ...]
    final_norm: jax.Array  # [hidden]


class QKV(NamedTuple):
    """What one layer hands to its attention function, each [batch, tokens, heads, head_dim]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rope_tables(num_tokens: int, head_dim: int, theta: float, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position * theta^(-2j/head_dim), each [tokens, 1, head_dim / 2]; constants of the program."""
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    angle = (np.arange(num_tokens)[:, None] * frequency)[:, None, :]
    return jnp.asarray(np.cos(angle), dtype), jnp.asarray(np.sin(angle), dtype)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (j, j + head_dim / 2) of x, [batch, tokens, heads, head_dim]."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention_inputs(x: jax.Array, layer: Layer, rope: tuple[jax.Array, jax.Array], config: LlamaConfig) -> QKV:
    """Normalises x [batch, tokens, hidden], projects it and rotates queries and keys."""
    batch, num_tokens, _ = x.shape
    x = rms_norm(x, layer.attention_norm, config.norm_eps)
    q = (x @ layer.w_q).reshape(batch, num_tokens, config.num_q_heads, config.head_dim)
    k = (x @ layer.w_k).reshape(batch, num_tokens, config.num_kv_heads, config.head_dim)
    v = (x @ layer.w_v).reshape(batch, num_tokens, config.num_kv_heads, config.head_dim)
    return QKV(apply_rope(q, *rope), apply_rope(k, *rope), v)


def feed_forward(x: jax.Array, layer: Layer, config: LlamaConfig) -> jax.Array:
    x = rms_norm(x, layer.ffn_norm, config.norm_eps)
    return (jax.nn.silu(x @ layer.w_gate) * (x @ layer.w_up)) @ layer.w_down


def hidden_states(
    params: Params, tokens: Tokens, config: LlamaConfig, attention: Attention
) -> tuple[jax.Array, tuple[QKV, ...]]:
    """tokens [batch, tokens] -> (last hidden states [batch, tokens, hidden], what each layer's attention was given).

    The layers are a Python loop, not a `lax.scan` over stacked weights: the scan compiled in half the time (0.7 s
    instead of 1.3 s) but ran 10 % slower at 64 tokens and 80 % slower at 1024 (2 CPU cores).
    """
    rope = rope_tables(tokens.shape[1], config.head_dim, config.rope_theta, params.embedding.dtype)
    x = params.embedding[jnp.asarray(tokens)]
    seen = []
    for layer in params.layers:
        qkv = attention_inputs(x, layer, rope, config)
        seen.append(qkv)
        x = x + attention(*qkv).reshape(*x.shape[:2], -1) @ layer.w_o
        x = x + feed_forward(x, layer, config)
    return rms_norm(x, params.final_norm, config.norm_eps), tuple(seen)


def forward(params: Params, tokens: Tokens, config: LlamaConfig, attention: Attention) -> jax.Array:
    """tokens int32 [batch, tokens] -> logits float32 [batch, tokens, vocab]."""
    return hidden_states(params, tokens, config, attention)[0] @ params.embedding.T


@functools.partial(jax.jit, static_argnames=("config", "attention"))
def next_token(
    params: Params, tokens: Tokens, length: jax.Array | np.int32, *, config: LlamaConfig, attention: Attention
) -> jax.Array:
    """The most likely token after the first `length` of tokens [1, capacity].

    Causal attention makes what follows `length` harmless, so one compiled program serves every length up to the
    capacity. Only the last row goes through the output projection.
    """
    x, _ = hidden_states(params, tokens, config, attention)
    last = jax.lax.dynamic_index_in_dim(x[0], length - 1, keepdims=False)
    return jnp.argmax(params.embedding @ last)


@functools.partial(jax.jit, static_argnames=("config", "attention"))
def attention_operands(params: Params, tokens: Tokens, *, config: LlamaConfig, attention: Attention) -> tuple[QKV, ...]:
    """What every layer's attention function is given for these tokens."""
    return hidden_states(params, tokens, config, attention)[1]


def init_params(config: LlamaConfig, seed: int = 0) -> Params:
    """Small random weights, for tests."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(scale=shape[0] ** -0.5, size=shape), jnp.float32)

    def norm_weight() -> jax.Array:
        return jnp.asarray(rng.uniform(0.5, 1.5, size=config.hidden_dim), jnp.float32)

    hidden = config.hidden_dim
    q_dim, kv_dim = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layers = tuple(
        Layer(
            attention_norm=norm_weight(),
            w_q=normal(hidden, q_dim),
            w_k=normal(hidden, kv_dim),
            w_v=normal(hidden, kv_dim),
            w_o=normal(q_dim, hidden),
            ffn_norm=norm_weight(),
            w_gate=normal(hidden, config.ffn_dim),
            w_up=normal(hidden, config.ffn_dim),
            w_down=normal(config.ffn_dim, hidden),
        )
        for _ in range(config.num_layers)
    )
    return Params(normal(config.vocab_size, hidden), layers, norm_weight())


def pad_to(tokens: list[int], capacity: int) -> NDArray[np.int32]:
    """tokens as int32 [1, capacity], zeros at the end."""
    padded = np.zeros((1, capacity), np.int32)
    padded[0, : len(tokens)] = tokens
    return padded
