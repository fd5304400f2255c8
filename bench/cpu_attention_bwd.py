"""Attention forward and backward on the CPU: heed beside XLA's attention and torch SDPA (where torch is installed).

One sample is the output and the gradients of q, k and v for one cotangent, as a training step computes them. All
contenders alternate in one process; ratios are medians of the paired ratios. Writes a table, JSON and a plot to
`bench/results/cpu_attention_bwd.*`. Run it with `make bench`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import heed
from cpu_attention_fwd import MAX_UNEVEN_TIME, ROWS, SGEMM_GFLOP, Row, arrays, child_environment, plot, sgemm_call
from harness import machine, median_ratio, paired, table, write_json
from packed import PackedRow, equal_lengths, uneven_lengths

NAME = "cpu_attention_bwd"
WORK = 3.5  # of forward and backward together, in units of the forward pass: 7 products instead of 2
FULL = Row(1, 4096, 8, 8, 128, is_causal=False)

# What each row is to reach.
MIN_OVER_TORCH = 1.0
MIN_OVER_XLA = {"causal": 3.0, "full": 1.5}
MAX_CAUSAL_TIME = 0.6  # over that of the full mask


def cotangent(row: Row) -> np.ndarray[Any, Any]:
    q = arrays(row)[0]
    return np.random.default_rng(1).standard_normal(q.shape, np.float32).astype(q.dtype)


def step_of(attention: Callable[..., Any], row: Row) -> Callable[[], Any]:
    """A compiled program that returns the output and the gradients, and waits for them."""
    import jax

    def step(q: Any, k: Any, v: Any, dout: Any) -> Any:
        out, backward = jax.vjp(attention, q, k, v)
        return out, backward(dout)

    compiled = jax.jit(step)
    inputs = [jax.numpy.asarray(array) for array in (*arrays(row), cotangent(row))]
    return lambda: jax.block_until_ready(compiled(*inputs))


def heed_call(row: Row) -> Callable[[], Any]:
    return step_of(functools.partial(heed.flash_mha, is_causal=row.is_causal, window_size=(row.window, -1)), row)


def xla_call(row: Row) -> Callable[[], Any]:
    import jax

    return step_of(functools.partial(jax.nn.dot_product_attention, is_causal=row.is_causal), row)


def torch_call(row: Row) -> Callable[[], Any] | None:
    """torch SDPA in its own layout [B, H, S, D], or None without torch."""
    try:
        import torch
    except (ImportError, OSError):
        return None
    tensors = [torch.from_numpy(array).transpose(1, 2).contiguous() for array in (*arrays(row), cotangent(row))]
    operands, dout = [tensor.requires_grad_() for tensor in tensors[:3]], tensors[3]

    def step() -> Any:
        out = torch.nn.functional.scaled_dot_product_attention(
            *operands, is_causal=row.is_causal, enable_gqa=row.q_heads != row.kv_heads
        )
        return torch.autograd.grad(out, operands, dout)

    return step


def measure_rows(rounds: int) -> list[dict[str, Any]]:
    results = []
    for row in ROWS:
        contenders = {"heed": heed_call(row), "xla": xla_call(row), "sgemm": sgemm_call()}
        torch_run = torch_call(row)
        if torch_run is not None:
            contenders["torch"] = torch_run
        seconds = paired(contenders, rounds)
        work = {name: SGEMM_GFLOP if name == "sgemm" else WORK * row.gflop for name in contenders}
        gflops = {name: work[name] / statistics.median(seconds[name]) for name in contenders}
        results.append(
            {
                "row": row.label,
                "is_causal": row.is_causal,
                "gflops": gflops,
                "speedup": {
                    name: median_ratio(seconds[name], seconds["heed"])
                    for name in contenders
                    if name in ("xla", "torch")
                },
                "of_sgemm": median_ratio(seconds["sgemm"], seconds["heed"]) * work["heed"] / SGEMM_GFLOP,
            }
        )
        print(f"  {row.label}: " + ", ".join(f"{name} {speed:.0f}" for name, speed in gflops.items()), flush=True)
    return results


def measure_relations(rounds: int) -> dict[str, float]:
    """How heed's own time follows the dtype and the kept work, on one shape."""
    rows = {
        "full": FULL,
        "causal": dataclasses.replace(FULL, is_causal=True),
        "window": dataclasses.replace(FULL, is_causal=True, window=256),
        "bfloat16": dataclasses.replace(FULL, dtype="bfloat16"),
        "float16": dataclasses.replace(FULL, dtype="float16"),
    }
    seconds = paired({name: heed_call(row) for name, row in rows.items()}, rounds)
    names = {
        "causal / full": "causal",
        "causal window 256 / full": "window",
        "bfloat16 / float32": "bfloat16",
        "float16 / float32": "float16",
    }
    return {title: median_ratio(seconds[name], seconds["full"]) for title, name in names.items()}


# One head, so that two threads can only share its keys.
ONE_HEAD = Row(1, 4096, 1, 1, 128, is_causal=True)


def measure_scaling(rounds: int) -> float:
    """Time of one head on one thread over its time on two, in child processes that alternate."""
    seconds: dict[str, list[float]] = {"1": [], "2": []}
    for _ in range(rounds):
        for threads, samples in seconds.items():
            command = [sys.executable, __file__, "--child"]
            out = subprocess.run(command, env=child_environment(threads), capture_output=True, text=True, check=True)
            samples.append(float(out.stdout))
    return median_ratio(seconds["1"], seconds["2"])


def run_child() -> None:
    """Prints the time of the backward pass alone, eagerly on NumPy arrays."""
    q, k, v = arrays(ONE_HEAD)
    dout = cotangent(ONE_HEAD)
    out, lse = heed.flash_mha(q, k, v, is_causal=True, return_lse=True)
    samples = []
    for _ in range(5):
        start = time.perf_counter()
        heed.flash_mha_bwd(dout, q, k, v, out, lse, is_causal=True)
        samples.append(time.perf_counter() - start)
    print(statistics.median(samples[1:]))


def packed_call(row: PackedRow) -> Callable[[], Any]:
    import jax

    rng = np.random.default_rng(0)
    shape = (sum(row.lengths), row.heads, row.head_dim)
    q, k, v, dout = (jax.numpy.asarray(rng.standard_normal(shape, np.float32)) for _ in range(4))
    offsets = jax.numpy.asarray(row.offsets, jax.numpy.int32)

    def step(q: Any, k: Any, v: Any, dout: Any) -> Any:
        attend = functools.partial(heed.flash_mha_varlen, cu_seqlens_q=offsets, is_causal=row.is_causal)
        out, backward = jax.vjp(attend, q, k, v)
        return out, backward(dout)

    compiled = jax.jit(step)
    return lambda: jax.block_until_ready(compiled(q, k, v, dout))


def measure_packed(rounds: int) -> list[dict[str, Any]]:
    """flash_mha_varlen on 16 sequences of 64 to 8192 tokens, beside 16 equal ones with as many query-key pairs."""
    uneven = uneven_lengths()
    equal = equal_lengths(uneven)
    results = []
    for is_causal in (False, True):
        rows = {
            "uneven": PackedRow("64 to 8192 tokens", uneven, 2, 64, is_causal),
            "equal": PackedRow(f"{equal[0]} tokens each", equal, 2, 64, is_causal),
        }
        seconds = paired({name: packed_call(row) for name, row in rows.items()}, rounds)
        results.append(
            {
                "row": rows["uneven"].label,
                "gflops": {
                    name: WORK * row.flops / 1e9 / statistics.median(seconds[name]) for name, row in rows.items()
                },
                "uneven_over_equal": median_ratio(seconds["uneven"], seconds["equal"])
                * rows["equal"].flops
                / rows["uneven"].flops,
            }
        )
    return results


def report(content: dict[str, Any]) -> str:
    """The tables as Markdown."""

    def judged(value: float, target: float, is_met: bool) -> list[str]:
        return [f"{value:.2f}", f"{target:g}", "met" if is_met else "MISSED"]

    def row_cells(result: dict[str, Any]) -> list[str]:
        speeds, ratios = result["gflops"], result["speedup"]
        xla_target = MIN_OVER_XLA["causal" if result["is_causal"] else "full"]
        torch_cells = ["-", "-", "-"]
        if "torch" in ratios:
            torch_cells = judged(ratios["torch"], MIN_OVER_TORCH, ratios["torch"] >= MIN_OVER_TORCH)
        return (
            [result["row"]]
            + [f"{speeds[name]:.0f}" if name in speeds else "-" for name in ("heed", "torch", "xla", "sgemm")]
            + torch_cells
            + judged(ratios["xla"], xla_target, ratios["xla"] >= xla_target)
            + [f"{result['of_sgemm']:.2f}"]
        )

    header = ["B x S, Hq/Hk, D", "heed", "torch", "XLA", "sgemm", "x torch", "at least", "", "x XLA", "at least", ""]
    header.append("of sgemm")
    relations = content["relations"]
    is_met = relations["causal / full"] <= MAX_CAUSAL_TIME
    relation_rows = [[name, f"{value:.3f}", "", ""] for name, value in relations.items()]
    relation_rows[0][2:] = [f"<= {MAX_CAUSAL_TIME}", "met" if is_met else "MISSED"]
    packed = [
        [row["row"], f"{row['gflops']['uneven']:.0f}", f"{row['gflops']['equal']:.0f}"]
        + [f"{row['uneven_over_equal']:.3f}", f"<= {MAX_UNEVEN_TIME}"]
        + ["met" if row["uneven_over_equal"] <= MAX_UNEVEN_TIME else "MISSED"]
        for row in content["packed"]
    ]
    packed_header = ["flash_mha_varlen, GFLOP/s", "uneven", "equal", "uneven / equal time, same work", "target", ""]
    return "\n\n".join(
        [
            table(header, [row_cells(result) for result in content["rows"]]),
            table(packed_header, packed),
            table(["1 x 4096, 8/8, D 128: time ratio", "measured", "target", ""], relation_rows),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="paired samples per row")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child()
        return
    content: dict[str, Any] = {"machine": machine(), "rounds": arguments.rounds}
    content["rows"] = measure_rows(arguments.rounds)
    content["packed"] = measure_packed(math.ceil(arguments.rounds / 2))
    content["relations"] = measure_relations(math.ceil(arguments.rounds / 2))
    scaling = measure_scaling(math.ceil(arguments.rounds / 2))
    content["relations"]["one head, causal, backward alone: 1 thread / 2 threads"] = scaling
    path = write_json(NAME, content)
    about = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    print(f"\nforward + backward, {about['cpu']}, {about['cores']} cores, float32, GFLOP/s; {versions}\n")
    print(report(content))
    title = f"Attention forward + backward, float32, {about['cpu']}, {about['cores']} cores"
    plot(content["rows"], title, NAME)
    print(f"\nwrote {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
