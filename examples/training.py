"""How the training example trains: the loss, one step, and two attention functions that take turns on the same data.

Both paths start from the same weights and see the same rows in the same order, so all that can tell their losses apart
is how attention and its gradient round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import heed
from corpus import Packed
from llama import LlamaConfig, Params, hidden_states
from training_report import median_after_first

SegmentAttention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""(q, k, v [batch, tokens, heads, head_dim], segment ids [batch, tokens]) -> out, causal inside each segment."""


def heed_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    return heed.flash_mha(q, k, v, is_causal=True, segment_ids=segment_ids)


def naive_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Attention as it is written down: all scores, a mask, a softmax, a product. JAX differentiates it."""
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    causal = jnp.tri(q.shape[1], dtype=bool)[None, None]
    same_document = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    weights = jax.nn.softmax(jnp.where(causal & same_document, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


ATTENTIONS: Mapping[str, SegmentAttention] = {"heed": heed_attention, "naive": naive_attention}


def loss_of(params: Params, rows: Packed, config: LlamaConfig, attention: SegmentAttention) -> jax.Array:
    """Mean cross entropy of each next token of the same document; rows [batch, row_len]."""
    tokens, ids = (jnp.asarray(x) for x in rows)
    x, _ = hidden_states(params, tokens[:, :-1], config, lambda q, k, v: attention(q, k, v, ids[:, :-1]))
    losses = optax.softmax_cross_entropy_with_integer_labels(x @ params.embedding.T, tokens[:, 1:])
    is_same = ids[:, 1:] == ids[:, :-1]
    return jnp.sum(losses * is_same) / jnp.sum(is_same)


def make_optimizer(peak_rate: float, num_steps: int) -> optax.GradientTransformation:
    """AdamW with a warm-up and a cosine decay, gradients clipped by their norm."""
    warmup = max(1, num_steps // 8)
    schedule = optax.warmup_cosine_decay_schedule(peak_rate / 10, peak_rate, warmup, max(num_steps, warmup + 1))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.01))


class State(NamedTuple):
    params: Params
    optimizer: Any


@dataclass
class Path:
    """One attention function's training run: its weights, its compiled step, and what was measured."""

    state: State
    step: Callable[[State, Packed], tuple[State, jax.Array]]
    scratch_bytes: int  # what XLA needs beside weights and optimizer during a step
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        return median_after_first(self.seconds)

    def advance(self, rows: Packed) -> float:
        """One step; returns its loss."""
        start = time.perf_counter()
        self.state, loss = jax.block_until_ready(self.step(self.state, rows))
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(float(loss))
        return self.losses[-1]


def compile_path(
    params: Params,
    example: Packed,
    config: LlamaConfig,
    attention: SegmentAttention,
    optimizer: optax.GradientTransformation,
) -> Path:
    """A run that starts from a copy of `params`; its step overwrites weights and optimizer in place."""

    def step(state: State, rows: Packed) -> tuple[State, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(state.params, rows, config, attention)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, updates), optimizer_state), loss

    params = jax.tree.map(jnp.copy, params)
    state = State(params, optimizer.init(params))
    compiled = jax.jit(step, donate_argnums=0).lower(state, example).compile()
    analysis = compiled.memory_analysis()
    return Path(state, compiled, analysis.temp_size_in_bytes if analysis is not None else 0)


def train(
    paths: Mapping[str, Path],
    data: Packed,
    batch_rows: int,
    num_steps: int,
    budget_s: float,
    on_step: Callable[[int, int, float], None],
) -> int:
    """Each path takes every step, in turns; steps go over the data again and again.

    Stops early once `budget_s` is spent. Returns the number of steps.
    """
    num_batches = len(data.tokens) // batch_rows
    start, longest = time.perf_counter(), 0.0
    names = list(paths)
    for index in range(num_steps):
        begin = time.perf_counter()
        first = index % num_batches * batch_rows
        rows = Packed(*(x[first : first + batch_rows] for x in data))
        for name in names if index % 2 == 0 else names[::-1]:
            loss = paths[name].advance(rows)
        on_step(index + 1, num_steps, loss)
        now = time.perf_counter()
        longest = max(longest, now - begin)
        if now - start + longest > budget_s:
            return index + 1
    return num_steps


def mean_loss(loss: Callable[[Params, Packed], jax.Array], params: Params, rows: Packed) -> float:
    """The loss over rows that no step has seen, one row at a time."""
    values = [float(loss(params, Packed(tokens[None], ids[None]))) for tokens, ids in zip(*rows, strict=True)]
    return statistics.fmean(values)
