"""JAX's part of the GPU benchmarks, in a process of its own: heed and jax.nn's cuDNN under jit, and a call's overhead.

JAX has no events: blocks of calls are timed by the host, from the first to the result of the last. Started by
gpu_attention_fwd.py as `python bench/gpu_jax.py RESULT.json`, and by gpu_attention_bwd.py with `--backward`: then a
call is a forward and a backward pass.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp

import gpu_timing
import heed
from gpu_bwd_contenders import FWD_BWD_WORK
from gpu_contenders import Row, dense_rows

BACKWARD_TOKENS = (1024, 4096, 16384)


def calls(row: Row, is_backward: bool) -> dict[str, Callable[[], Any]]:
    """The jitted contenders on one set of inputs."""
    shape = (row.batch, row.tokens, row.q_heads, row.head_dim)
    q, k, v, dout = (jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4))
    attends = {
        "heed": functools.partial(heed.flash_mha, is_causal=row.is_causal),
        "cudnn": functools.partial(jax.nn.dot_product_attention, is_causal=row.is_causal, implementation="cudnn"),
    }
    if is_backward:
        return {name: functools.partial(jax.jit(gradients(attend)), q, k, v, dout) for name, attend in attends.items()}
    return {name: functools.partial(jax.jit(attend), q, k, v) for name, attend in attends.items()}


def gradients(attend: Callable[..., Any]) -> Callable[..., Any]:
    """(q, k, v, gradient of the output) -> the gradients of q, k and v: one forward and one backward pass."""
    return lambda q, k, v, dout: jax.vjp(attend, q, k, v)[1](dout)


def measure_row(row: Row, clock: gpu_timing.Clock, rounds: int, is_backward: bool = False) -> dict[str, Any]:
    callers, absent = {}, {}
    for name, call in calls(row, is_backward).items():
        try:
            jax.block_until_ready(call())
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            continue
        callers[name] = call
    return {
        "label": f"JAX, {row.label}",
        "tokens": row.tokens,
        "is_causal": row.is_causal,
        "tflop": row.flops * (FWD_BWD_WORK if is_backward else 1) / 1e12,
        "seconds": {mode: gpu_timing.measure(callers, clock, mode, rounds) for mode in gpu_timing.MODES},
        "absent": absent,
    }


def microseconds(call: Callable[[], Any], repeats: int = 15, calls_each: int = 200) -> float:
    """Median time of one call that waits for its result."""
    samples = []
    for index in range(repeats + 2):
        start = time.perf_counter()
        for _ in range(calls_each):
            call()
        if index >= 2:  # the first ones warm up
            samples.append((time.perf_counter() - start) / calls_each * 1e6)
    return statistics.median(samples)


def measure_overhead() -> dict[str, float]:
    """One tiny call, from Python to its finished result: a jitted x + 1 is the floor."""
    x = jnp.ones((1, 8, 1, 64), jnp.bfloat16)
    add, attend = jax.jit(lambda a: a + 1), jax.jit(lambda a: heed.flash_mha(a, a, a))
    return {
        "jitted x + 1": microseconds(lambda: add(x).block_until_ready()),
        "jitted heed.flash_mha": microseconds(lambda: attend(x).block_until_ready()),
        "eager heed.flash_mha, JAX": microseconds(lambda: heed.flash_mha(x, x, x).block_until_ready()),
        "jitted x + 1, not waiting": microseconds(lambda: add(x)),
        "jitted heed.flash_mha, not waiting": microseconds(lambda: attend(x)),
    }


def chosen_rows(is_quick: bool, is_backward: bool) -> list[Row]:
    if is_backward and is_quick:
        return [Row("d128", 4096, 16, 16, 128, True)]
    rows = [row for row in dense_rows(is_quick) if row.group == "d128"]
    return [row for row in rows if row.tokens in BACKWARD_TOKENS] if is_backward else rows


def main() -> int:
    parser = argparse.ArgumentParser(description="JAX's part of the GPU benchmarks.")
    parser.add_argument("result", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--backward", action="store_true", help="forward and backward passes, without overheads")
    arguments = parser.parse_args()
    if jax.default_backend() not in ("gpu", "cuda"):
        print(f"JAX {jax.__version__} has no GPU: its backend is {jax.default_backend()}", file=sys.stderr)
        return 1
    clock = gpu_timing.WallClock(jax.block_until_ready)
    result: dict[str, Any] = {"rows": []}
    if not arguments.backward:
        result["overhead_us"] = measure_overhead()
    for row in chosen_rows(arguments.quick, arguments.backward):
        result["rows"].append(measure_row(row, clock, arguments.rounds, arguments.backward))
        arguments.result.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
