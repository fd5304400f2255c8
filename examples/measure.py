"""What the demo measures: whole steps of the model, its attention calls alone, and their error.

Several attention functions take turns on the same tensors, so that a change in the machine's load meets all of them.
The reported times are medians.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

import heed.reference
from llama import QKV, Attention, LlamaConfig, Params, attention_operands, next_token, pad_to


class Cost(NamedTuple):
    """One attention function inside the model."""

    step_s: float  # one forward pass: all layers and the next token
    attention_s: float  # the attention calls of that pass alone, on the same tensors
    error: float  # largest |x - oracle| / max |oracle| of a layer's attention output

    @property
    def attention_share(self) -> float:
        return self.attention_s / self.step_s


def seconds(function: Callable[[str], object], name: str) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(name))
    return time.perf_counter() - start


def oracle(operands: QKV, num_tokens: int) -> NDArray[np.float64]:
    """Causal attention of the first `num_tokens` tokens by the NumPy reference in float64."""
    q, k, v = (np.asarray(x)[:, :num_tokens] for x in operands)
    out, _ = heed.reference.attention_forward(q, k, v, is_causal=True)
    return np.asarray(out, np.float64)


@functools.partial(jax.jit, static_argnames="attention")
def all_attention(layers: tuple[QKV, ...], *, attention: Attention) -> tuple[jax.Array, ...]:
    """The attention calls of one step and nothing else, as one program.

    As in the model each call waits for the one before (0 * out is no constant, so it is not optimised away) and all of
    them share their scratch memory. Timed one by one, JAX's own calls would pay for fresh pages each time.
    """
    outputs: list[jax.Array] = []
    for q, k, v in layers:
        outputs.append(attention(q + 0.0 * outputs[-1] if outputs else q, k, v))
    return tuple(outputs)


def compare(
    params: Params,
    config: LlamaConfig,
    tokens: list[int],
    capacity: int,
    attentions: Mapping[str, Attention],
    *,
    num_rounds: int = 5,
    budget_s: float = 15.0,
    num_checked_layers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Cost]:
    """The costs of each of `attentions` in one forward pass over `tokens`, padded to `capacity`.

    The attention calls are timed on the tensors that the model's layers produce from these tokens. Errors are taken
    over the rows of real tokens, in `num_checked_layers` layers spread over the depth (None: in all). On a slow machine
    the rounds end early, after `budget_s` seconds.
    """
    padded, length = pad_to(tokens, capacity), np.int32(len(tokens))
    layers = attention_operands(params, padded, config=config, attention=next(iter(attentions.values())))
    num_units, num_done = 2 + num_rounds, 0

    def unit_done() -> None:
        nonlocal num_done
        num_done += 1
        if on_progress is not None:
            on_progress(num_done, num_units)

    def run_step(name: str) -> jax.Array:
        return next_token(params, padded, length, config=config, attention=attentions[name])

    def run_attention(name: str) -> tuple[jax.Array, ...]:
        return all_attention(layers, attention=attentions[name])

    errors = dict.fromkeys(attentions, 0.0)
    outputs = {name: run_attention(name) for name in attentions}
    for index in checked_layers(len(layers), num_checked_layers):
        expected = oracle(layers[index], len(tokens))
        for name in attentions:
            difference = np.asarray(outputs[name][index])[:, : len(tokens)] - expected
            errors[name] = max(errors[name], float(np.abs(difference).max() / np.abs(expected).max()))
    unit_done()
    for name in attentions:
        jax.block_until_ready(run_step(name))
    unit_done()

    step_times: dict[str, list[float]] = {name: [] for name in attentions}
    attention_times: dict[str, list[float]] = {name: [] for name in attentions}
    start = time.perf_counter()
    for _ in range(num_rounds):
        for name in attentions:
            step_times[name].append(seconds(run_step, name))
            attention_times[name].append(seconds(run_attention, name))
        unit_done()
        if time.perf_counter() - start > budget_s:
            break
    return {
        name: Cost(statistics.median(step_times[name]), statistics.median(attention_times[name]), errors[name])
        for name in attentions
    }


def checked_layers(num_layers: int, num_checked: int | None) -> list[int]:
    """`num_checked` layers from the first to the last; all of them for None."""
    if num_checked is None or num_checked >= num_layers:
        return list(range(num_layers))
    return [int(index) for index in np.linspace(0, num_layers - 1, num_checked)]
