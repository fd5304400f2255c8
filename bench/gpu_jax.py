"""JAX's part of the GPU benchmark, in a process of its own: heed and jax.nn's cuDNN under jit, and a call's overhead.

JAX has no events: blocks of calls are timed by the host, from the first to the result of the last. Started by
gpu_attention_fwd.py, as `python bench/gpu_jax.py RESULT.json`.
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
from gpu_contenders import Row, dense_rows


def calls(row: Row) -> dict[str, Callable[[], Any]]:
    """The jitted contenders on one set of inputs."""
    shape = (row.batch, row.tokens, row.q_heads, row.head_dim)
    q, k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3))
    attends = {
        "heed": functools.partial(heed.flash_mha, is_causal=row.is_causal),
        "cudnn": functools.partial(jax.nn.dot_product_attention, is_causal=row.is_causal, implementation="cudnn"),
    }
    return {name: functools.partial(jax.jit(attend), q, k, v) for name, attend in attends.items()}


def measure_row(row: Row, clock: gpu_timing.Clock, rounds: int) -> dict[str, Any]:
    callers, absent = {}, {}
    for name, call in calls(row).items():
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
        "tflop": row.flops / 1e12,
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


def main() -> int:
    parser = argparse.ArgumentParser(description="JAX's part of the GPU benchmark.")
    parser.add_argument("result", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if jax.default_backend() not in ("gpu", "cuda"):
        print(f"JAX {jax.__version__} has no GPU: its backend is {jax.default_backend()}", file=sys.stderr)
        return 1
    clock = gpu_timing.WallClock(jax.block_until_ready)
    rows = [row for row in dense_rows(arguments.quick) if row.group == "d128"]
    result: dict[str, Any] = {"rows": []}
    result["overhead_us"] = measure_overhead()
    for row in rows:
        result["rows"].append(measure_row(row, clock, arguments.rounds))
        arguments.result.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
