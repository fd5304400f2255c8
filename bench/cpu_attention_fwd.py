"""Attention forward on the CPU: heed beside XLA's attention, torch SDPA (where torch is installed) and sgemm.

All contenders alternate in one process; ratios are medians of the paired ratios. Writes a table, JSON and a plot to
`bench/results/cpu_attention_fwd.*`. Run it with `make bench`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import itertools
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import heed
from harness import RESULTS, machine, median_ratio, paired, table, write_json
from packed import PackedRow, equal_lengths, uneven_lengths

NAME = "cpu_attention_fwd"


@dataclass(frozen=True)
class Row:
    """One shape: B batch, S tokens, query and KV heads, head dim."""

    batch: int
    tokens: int
    q_heads: int
    kv_heads: int
    head_dim: int
    is_causal: bool
    window: int = -1
    dtype: str = "float32"

    @property
    def label(self) -> str:
        kind = "causal" if self.is_causal else "full"
        kind += f" window {self.window}" if self.window >= 0 else ""
        dtype = "" if self.dtype == "float32" else f" {self.dtype}"
        return f"{self.batch} x {self.tokens}, {self.q_heads}/{self.kv_heads}, D {self.head_dim}, {kind}{dtype}"

    @property
    def gflop(self) -> float:
        """4 B S^2 H D, halved when causal (windows are compared by time, not by this)."""
        full = 4.0 * self.batch * self.tokens**2 * self.q_heads * self.head_dim / 1e9
        return full / 2 if self.is_causal else full


SHAPES = ((1, 2048, 8, 8, 64), (1, 4096, 8, 8, 128), (4, 512, 16, 4, 128))
ROWS = tuple(Row(*shape, is_causal=causal) for shape in SHAPES for causal in (False, True))
FULL = Row(1, 4096, 8, 8, 128, is_causal=False)


def arrays(row: Row) -> tuple[np.ndarray[Any, Any], ...]:
    """q, k, v as NumPy arrays, standard normal."""
    import ml_dtypes

    rng = np.random.default_rng(0)
    heads = (row.q_heads, row.kv_heads, row.kv_heads)
    dtype = ml_dtypes.bfloat16 if row.dtype == "bfloat16" else np.dtype(row.dtype)
    return tuple(
        rng.standard_normal((row.batch, row.tokens, count, row.head_dim), np.float32).astype(dtype) for count in heads
    )


def heed_call(row: Row) -> Callable[[], Any]:
    import jax

    call = jax.jit(functools.partial(heed.flash_mha, is_causal=row.is_causal, window_size=(row.window, -1)))
    inputs = [jax.numpy.asarray(array) for array in arrays(row)]
    return lambda: call(*inputs).block_until_ready()


def xla_call(row: Row) -> Callable[[], Any]:
    import jax

    call = jax.jit(functools.partial(jax.nn.dot_product_attention, is_causal=row.is_causal))
    inputs = [jax.numpy.asarray(array) for array in arrays(row)]
    return lambda: call(*inputs).block_until_ready()


def torch_call(row: Row) -> Callable[[], Any] | None:
    """torch SDPA in its own layout [B, H, S, D], or None without torch."""
    try:
        import torch
    except (ImportError, OSError):
        return None
    q, k, v = (torch.from_numpy(array).transpose(1, 2).contiguous() for array in arrays(row))
    return lambda: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=row.is_causal, enable_gqa=row.q_heads != row.kv_heads
    )


def sgemm_call(size: int = 2048) -> Callable[[], Any]:
    matrix = np.random.default_rng(0).standard_normal((size, size), np.float32)
    return lambda: matrix @ matrix


SGEMM_GFLOP = 2 * 2048**3 / 1e9


def measure_rows(rounds: int) -> list[dict[str, Any]]:
    results = []
    for row in ROWS:
        contenders = {"heed": heed_call(row), "xla": xla_call(row), "sgemm": sgemm_call()}
        torch_run = torch_call(row)
        if torch_run is not None:
            contenders["torch"] = torch_run
        seconds = paired(contenders, rounds)
        work = {name: SGEMM_GFLOP if name == "sgemm" else row.gflop for name in contenders}
        heed_time = seconds["heed"]
        result: dict[str, Any] = {
            "row": row.label,
            "is_causal": row.is_causal,
            "gflops": {name: work[name] / statistics.median(seconds[name]) for name in contenders},
            "speedup": {
                name: median_ratio(seconds[name], heed_time) for name in contenders if name in ("xla", "torch")
            },
            "of_sgemm": median_ratio(seconds["sgemm"], heed_time) * row.gflop / SGEMM_GFLOP,
        }
        results.append(result)
        print(f"  {row.label}: " + ", ".join(f"{k} {v:.0f}" for k, v in result["gflops"].items()), flush=True)
    return results


def measure_decode(rounds: int) -> list[dict[str, Any]]:
    """One query row over many keys, 32/8 heads, D 128: GB/s of K and V, beside a plain read of the same bytes.

    Inputs rotate, so that they come from memory. The plain read is np.max on all cores.
    """
    import jax

    call = jax.jit(heed.flash_mha)
    results = []
    threads = len(os.sched_getaffinity(0))
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for kv_len, copies in ((2048, 12), (32768, 3)):
            rng = np.random.default_rng(0)
            q = rng.standard_normal((1, 1, 32, 128), np.float32)
            caches = [rng.standard_normal((2, 1, kv_len, 8, 128), np.float32) for _ in range(copies)]
            inputs = [tuple(map(jax.numpy.asarray, (q, *cache))) for cache in caches]
            turn = itertools.count()

            def read(caches: Any = caches, turn: Any = turn) -> None:
                halves = np.array_split(caches[next(turn) % len(caches)].reshape(-1), threads)
                list(pool.map(np.max, halves))

            def attend(inputs: Any = inputs, turn: Any = turn) -> None:
                call(*inputs[next(turn) % len(inputs)]).block_until_ready()

            contenders: dict[str, Callable[[], Any]] = {"heed": attend, "plain read": read}
            torch_run = torch_decode(q, caches, turn)
            if torch_run is not None:
                contenders["torch"] = torch_run
            seconds = paired(contenders, rounds)
            gigabytes = caches[0].nbytes / 1e9
            speeds = {name: gigabytes / statistics.median(samples) for name, samples in seconds.items()}
            results.append({"keys": kv_len, "gb_per_s": speeds})
    return results


def torch_decode(q: Any, caches: Any, turn: Any) -> Callable[[], Any] | None:
    try:
        import torch
    except (ImportError, OSError):
        return None
    query = torch.from_numpy(q).transpose(1, 2).contiguous()
    inputs = [[torch.from_numpy(x).transpose(1, 2).contiguous() for x in cache] for cache in caches]
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(query, *inputs[next(turn) % len(inputs)], enable_gqa=True)


MAX_UNEVEN_TIME = 1.1  # time of uneven packed sequences over that of equal ones with the same work


def measure_packed(rounds: int) -> list[dict[str, Any]]:
    """flash_mha_varlen on 16 sequences of 64 to 8192 tokens, beside 16 equal ones with as many query-key pairs."""
    uneven = uneven_lengths()
    equal = equal_lengths(uneven)
    results = []
    for is_causal in (False, True):
        rows = {
            "uneven": PackedRow("64 to 8192 tokens", uneven, 4, 64, is_causal),
            "equal": PackedRow(f"{equal[0]} tokens each", equal, 4, 64, is_causal),
        }
        seconds = paired({name: packed_call(row) for name, row in rows.items()}, rounds)
        results.append(
            {
                "row": rows["uneven"].label,
                "gflops": {name: row.flops / 1e9 / statistics.median(seconds[name]) for name, row in rows.items()},
                "uneven_over_equal": median_ratio(seconds["uneven"], seconds["equal"])
                * rows["equal"].flops
                / rows["uneven"].flops,
            }
        )
    return results


def packed_call(row: PackedRow) -> Callable[[], Any]:
    import jax

    rng = np.random.default_rng(0)
    shape = (sum(row.lengths), row.heads, row.head_dim)
    q, k, v = (jax.numpy.asarray(rng.standard_normal(shape, np.float32)) for _ in range(3))
    offsets = jax.numpy.asarray(row.offsets, jax.numpy.int32)
    call = jax.jit(functools.partial(heed.flash_mha_varlen, is_causal=row.is_causal))
    return lambda: call(q, k, v, offsets).block_until_ready()


def measure_relations(rounds: int) -> dict[str, float]:
    """How heed's own time follows the dtype and the kept work, on one shape."""
    causal = Row(1, 4096, 8, 8, 128, is_causal=True)
    window = Row(1, 4096, 8, 8, 128, is_causal=True, window=256)
    seconds = paired(
        {
            "full": heed_call(FULL),
            "causal": heed_call(causal),
            "window": heed_call(window),
            "bfloat16": heed_call(Row(1, 4096, 8, 8, 128, is_causal=False, dtype="bfloat16")),
            "float16": heed_call(Row(1, 4096, 8, 8, 128, is_causal=False, dtype="float16")),
        },
        rounds,
    )
    names = {
        "causal / full": "causal",
        "causal window 256 / full": "window",
        "bfloat16 / float32": "bfloat16",
        "float16 / float32": "float16",
    }
    return {title: median_ratio(seconds[name], seconds["full"]) for title, name in names.items()}


def measure_scaling(rounds: int) -> float:
    """Time on one thread over time on two, in child processes that alternate."""
    seconds: dict[str, list[float]] = {"1": [], "2": []}
    for _ in range(rounds):
        for threads, samples in seconds.items():
            command = [sys.executable, __file__, "--child"]
            out = subprocess.run(command, env=child_environment(threads), capture_output=True, text=True, check=True)
            samples.append(float(out.stdout))
    return median_ratio(seconds["1"], seconds["2"])


def child_environment(threads: str) -> dict[str, str]:
    return {**os.environ, "HEED_NUM_THREADS": threads}


def run_child() -> None:
    """Prints heed's best of a few seconds per call, eagerly on NumPy arrays."""
    q, k, v = arrays(FULL)
    heed.flash_mha(q, k, v)
    samples = []
    for _ in range(4):
        start = time.perf_counter()
        heed.flash_mha(q, k, v)
        samples.append(time.perf_counter() - start)
    print(statistics.median(samples))


def measure_overhead() -> dict[str, float]:
    """Microseconds per call on a tiny problem: jitted heed, eager heed, and a jitted x + 1 as the floor."""
    import jax

    x = jax.numpy.ones((1, 8, 1, 16), jax.numpy.float32)
    n = np.ones((1, 8, 1, 16), np.float32)
    jitted, add = jax.jit(lambda a: heed.flash_mha(a, a, a)), jax.jit(lambda a: a + 1)
    calls: dict[str, Callable[[], Any]] = {
        "jitted x + 1": lambda: add(x).block_until_ready(),
        "jitted heed": lambda: jitted(x).block_until_ready(),
        "eager heed, JAX": lambda: heed.flash_mha(x, x, x).block_until_ready(),
        "eager heed, NumPy": lambda: heed.flash_mha(n, n, n),
    }
    result = {}
    for name, call in calls.items():
        for _ in range(200):
            call()
        samples = []
        for _ in range(15):
            start = time.perf_counter()
            for _ in range(200):
                call()
            samples.append((time.perf_counter() - start) / 200 * 1e6)
        result[name] = statistics.median(samples)
    return result


def plot(results: list[dict[str, Any]], title: str, name: str) -> None:
    """Bars per row and contender, into `bench/results/NAME.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    contenders = [contender for contender in ("heed", "torch", "xla") if contender in results[0]["gflops"]]
    labels = {"heed": "heed", "torch": "torch SDPA", "xla": "XLA (jax.nn)"}
    colors = {"heed": "#1f6f8b", "torch": "#e07b39", "xla": "#9aa5b1"}
    figure, axes = plt.subplots(figsize=(11, 5))
    width = 0.8 / len(contenders)
    for index, contender in enumerate(contenders):
        at = [position + (index - (len(contenders) - 1) / 2) * width for position in range(len(results))]
        values = [result["gflops"][contender] for result in results]
        bars = axes.bar(at, values, width * 0.92, label=labels[contender], color=colors[contender])
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    for position, result in enumerate(results):
        level = result["gflops"]["sgemm"]
        label = "sgemm, same run" if position == 0 else None
        axes.hlines(level, position - 0.45, position + 0.45, colors="#444444", linestyles="dashed", label=label)
    axes.set_xticks(range(len(results)), [result["row"].replace(", D", ",\nD") for result in results], fontsize=8)
    axes.set_ylabel("GFLOP/s (causal counted as half)")
    axes.set_ylim(0, 1.15 * max(max(result["gflops"].values()) for result in results))
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=4, frameon=False, loc="upper left")
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=120)


def report(content: dict[str, Any]) -> str:
    """The tables as Markdown."""

    def ratio(result: dict[str, Any], name: str) -> str:
        return f"{result['speedup'][name]:.2f}" if name in result["speedup"] else "-"

    def speed(result: dict[str, Any], name: str) -> str:
        return f"{result['gflops'][name]:.0f}" if name in result["gflops"] else "-"

    header = ["B x S, Hq/Hk, D", "heed", "torch", "XLA", "sgemm", "x torch", "x XLA", "of sgemm"]
    rows = [
        [result["row"]]
        + [speed(result, name) for name in ("heed", "torch", "xla", "sgemm")]
        + [ratio(result, "torch"), ratio(result, "xla"), f"{result['of_sgemm']:.2f}"]
        for result in content["rows"]
    ]
    relations = [[name, f"{value:.3f}"] for name, value in content["relations"].items()]
    decode = [
        [f"1 x {row['keys']}, 32/8, D 128, one query"]
        + [
            f"{row['gb_per_s'][name]:.1f}" if name in row["gb_per_s"] else "-"
            for name in ("heed", "torch", "plain read")
        ]
        for row in content["decode"]
    ]
    packed = [
        [row["row"], f"{row['gflops']['uneven']:.0f}", f"{row['gflops']['equal']:.0f}"]
        + [f"{row['uneven_over_equal']:.3f}", f"<= {MAX_UNEVEN_TIME}"]
        + ["met" if row["uneven_over_equal"] <= MAX_UNEVEN_TIME else "MISSED"]
        for row in content["packed"]
    ]
    packed_header = ["flash_mha_varlen, GFLOP/s", "uneven", "equal", "uneven / equal time, same work", "target", ""]
    overhead = [[name, f"{value:.1f}"] for name, value in content["overhead_us"].items()]
    return "\n\n".join(
        [
            table(header, rows),
            table(["GB/s of K and V", "heed", "torch", "plain read"], decode),
            table(packed_header, packed),
            table(["1 x 4096, 8/8, D 128: time ratio", "measured"], relations),
            table(["one tiny call, microseconds", "measured"], overhead),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="paired samples per row")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child()
        return
    content: dict[str, Any] = {"machine": machine(), "rounds": arguments.rounds}
    content["rows"] = measure_rows(arguments.rounds)
    content["decode"] = measure_decode(arguments.rounds)
    content["packed"] = measure_packed(arguments.rounds)
    content["relations"] = measure_relations(arguments.rounds)
    content["relations"]["1 thread / 2 threads"] = measure_scaling(math.ceil(arguments.rounds / 2))
    content["overhead_us"] = measure_overhead()
    path = write_json(NAME, content)
    about = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    print(f"\n{about['cpu']}, {about['cores']} cores, float32, GFLOP/s; {versions}; {about['date']}\n")
    print(report(content))
    plot(content["rows"], f"Attention forward, float32, {about['cpu']}, {about['cores']} cores", NAME)
    print(f"\nwrote {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
