"""The small ops on the CPU: beside a copy of the same bytes, beside XLA's fused programs, and beside a plain read.

What moves memory is measured twice. Into arrays that are there already, beside a copy of as many bytes on all threads:
heed's time over the copy's. And compiled by JAX, beside the same function in plain JAX: XLA's time over heed's. Results
above 32 MiB are mapped anew at every compiled call, of either: page faults are then most of the time.
Attention of one query is measured beside a plain read of K and V and torch SDPA (where torch is installed). All
contenders alternate in one process; ratios are medians of the paired ratios. Writes a table, JSON and a plot to
`bench/results/cpu_small_ops.*`. Run it with `make bench`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import heed
import heed.ops
from cpu_attention_fwd import torch_decode
from harness import RESULTS, machine, median_ratio, paired, table, write_json
from heed import _small_ops
from heed._arrays import DLPackOps

NAME = "cpu_small_ops"

# What each row is to reach.
MAX_OVER_COPY = 1.3
MIN_OVER_XLA = 2.0
MIN_OF_READ = 0.7

THREADS = len(os.sched_getaffinity(0))
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Row:
    """One call.

    Attributes:
        op, statics, operands: the native call.
        function: the same with JAX arrays, from the operands that are not None.
        plain: the same in plain JAX.
        num_bytes: read and written.
    """

    label: str
    op: Any
    statics: Any
    operands: tuple[Any, ...]
    function: Callable[..., Any] = field(repr=False)
    plain: Callable[..., Any] = field(repr=False)
    num_bytes: int


def random(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray[Any, Any]:
    import ml_dtypes

    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype))


# The functions in plain JAX, with float32 arithmetic like heed's.


def plain_act_and_mul(activation: Callable[..., Any]) -> Callable[..., Any]:
    import jax.numpy as jnp

    def function(x: Any) -> Any:
        gate, up = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return (activation(gate) * up).astype(x.dtype)

    return function


def plain_rope(q: Any, k: Any, indptr: Any, offsets: Any) -> Any:
    """One sequence, halves: (i, i + D / 2)."""
    import jax.numpy as jnp

    half = q.shape[-1] // 2
    positions = offsets[0] + jnp.arange(q.shape[0]) - indptr[0]
    angles = positions[:, None, None] * 1e4 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    cos, sin = jnp.cos(angles), jnp.sin(angles)

    def rotate(x: Any) -> Any:
        a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)

    return rotate(q), rotate(k)


def plain_rms_norm(x: Any, weight: Any) -> Any:
    import jax.numpy as jnp

    s = x.astype(jnp.float32)
    scale = 1 / jnp.sqrt(jnp.mean(s * s, axis=-1, keepdims=True) + 1e-6)
    return (s * scale * weight.astype(jnp.float32)).astype(x.dtype)


def plain_add_rms_norm(x: Any, weight: Any, residual: Any) -> Any:
    total = x + residual
    return plain_rms_norm(total, weight), total


def gradient_of(function: Callable[..., Any], num_inputs: int) -> Callable[..., Any]:
    """The gradients of the first inputs, for a cotangent that comes last."""
    import jax

    return lambda *operands: jax.vjp(function, *operands[:num_inputs])[1](operands[num_inputs])


def rows() -> list[Row]:
    """Activations, rotations and norms, with their gradients where those are kernels of their own."""
    import jax

    activations = {"silu_and_mul": jax.nn.silu, "gelu_and_mul": lambda x: jax.nn.gelu(x, approximate=False)}
    result = []
    for dtype in DTYPES:
        for name, activation in activations.items():
            sizes = (16, 512, 2048) if name == "silu_and_mul" else (512,)
            result += [act_row(name, activation, tokens, dtype, False) for tokens in sizes]
        result.append(act_row("silu_and_mul", jax.nn.silu, 256, dtype, True))
        result += [rope_row(tokens, dtype) for tokens in (64, 1024, 4096)]
        result += [norm_row(tokens, 4096, dtype, False) for tokens in (64, 1024, 8192)]
        result.append(norm_row(1024, 4096, dtype, True))
        result.append(norm_gradient_row(1024, 4096, dtype))
    return result


def act_row(name: str, activation: Callable[..., Any], tokens: int, dtype: str, is_gradient: bool) -> Row:
    hidden = 14336
    x = random((tokens, 2 * hidden), dtype)
    statics = _small_ops.ActStatics(name.partition("_and")[0])
    function, plain = getattr(heed.ops, name), plain_act_and_mul(activation)
    label = f"{name}, {tokens} x {hidden}, {dtype}"
    if not is_gradient:
        return Row(label, _small_ops.ACT_AND_MUL, statics, (x,), function, plain, x.nbytes * 3 // 2)
    operands = (x, random((tokens, hidden), dtype, 1))
    functions = gradient_of(function, 1), gradient_of(plain, 1)
    return Row("gradient of " + label, _small_ops.ACT_AND_MUL_BWD, statics, operands, *functions, x.nbytes * 5 // 2)


def rope_row(tokens: int, dtype: str) -> Row:
    q, k = random((tokens, 32, 128), dtype), random((tokens, 8, 128), dtype, 1)
    lists = np.array([0, tokens], np.int32), np.array([7], np.int32)
    return Row(
        f"apply_rope, {tokens} tokens, 32/8, D 128, {dtype}",
        _small_ops.ROPE,
        _small_ops.RopeStatics(),
        (q, k, *lists, None, None),
        heed.ops.apply_rope,
        plain_rope,
        2 * (q.nbytes + k.nbytes),
    )


def norm_row(tokens: int, hidden: int, dtype: str, has_residual: bool) -> Row:
    x, weight = random((tokens, hidden), dtype), random((hidden,), dtype, 1)
    residual = random((tokens, hidden), dtype, 2) if has_residual else None

    def add_norm(x: Any, weight: Any, residual: Any) -> Any:
        return heed.ops.fused_add_rms_norm(x, residual, weight)

    return Row(
        f"{'fused_add_rms_norm' if has_residual else 'rms_norm'}, {tokens} x {hidden}, {dtype}",
        _small_ops.RMS_NORM,
        _small_ops.NormStatics(),
        (x, weight, residual),
        add_norm if has_residual else heed.ops.rms_norm,
        plain_add_rms_norm if has_residual else plain_rms_norm,
        x.nbytes * (4 if has_residual else 2),
    )


def norm_gradient_row(tokens: int, hidden: int, dtype: str) -> Row:
    x, weight, dout = random((tokens, hidden), dtype), random((hidden,), dtype, 1), random((tokens, hidden), dtype, 2)
    return Row(
        f"gradient of rms_norm, {tokens} x {hidden}, {dtype}",
        _small_ops.RMS_NORM_BWD,
        _small_ops.NormStatics(),
        (x, weight, dout, None),
        gradient_of(heed.ops.rms_norm, 2),
        gradient_of(plain_rms_norm, 2),
        3 * x.nbytes,
    )


def native_call(op: Any, statics: Any, operands: tuple[Any, ...]) -> Callable[[], Any]:
    """Calls the native library, always with the same result arrays."""
    ops = DLPackOps("numpy", operands[0], op.names[0])
    given = {name: value for name, value in zip(op.names, operands, strict=True) if value is not None}
    specs = [ops.spec(name, given[name]) if name in given else None for name in op.names]
    text = op.write(statics, specs)
    results = [ops.empty(shape, dtype) for dtype, shape in _small_ops.resolve(op.stem, text, ops.target()).results]
    views = [*(ops.view(value, name) for name, value in given.items()), *map(ops.view_out, results)]

    def call(memory: Any = (operands, results)) -> None:  # which views do not keep alive
        ops.run(op.stem, text, *views)

    return call


def copy_calls(num_bytes: int, pool: concurrent.futures.Executor) -> dict[str, Callable[[], Any]]:
    """Copies of half as many bytes, which are then read and written: on this thread, and on all of them."""
    source, target = np.ones(num_bytes // 2, np.uint8), np.empty(num_bytes // 2, np.uint8)
    pieces = list(zip(np.array_split(target, THREADS), np.array_split(source, THREADS), strict=True))
    return {
        "copy, one thread": lambda: np.copyto(target, source),
        "copy, all threads": lambda: list(pool.map(lambda piece: np.copyto(*piece), pieces)),
    }


def compiled_call(function: Callable[..., Any], operands: tuple[Any, ...]) -> Callable[[], Any]:
    import jax

    compiled = jax.jit(function)
    inputs = [jax.numpy.asarray(value) for value in operands if value is not None]
    return lambda: jax.block_until_ready(compiled(*inputs))


def repeated(call: Callable[[], Any], count: int) -> Callable[[], Any]:
    return lambda: [call() for _ in range(count)]


def measure_rows(rounds: int) -> list[dict[str, Any]]:
    results = []
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for row in rows():
            contenders = {
                "heed": native_call(row.op, row.statics, row.operands),
                **copy_calls(row.num_bytes, pool),
                "heed, compiled": compiled_call(row.function, row.operands),
                "xla, compiled": compiled_call(row.plain, row.operands),
            }
            # Calls of few bytes again and again, so that a sample is not the time that threads take to wake up.
            count = max(1, 40_000_000 // row.num_bytes)
            seconds = paired({name: repeated(call, count) for name, call in contenders.items()}, rounds)
            copies = [median_ratio(seconds["heed"], seconds[name]) for name in contenders if name.startswith("copy")]
            results.append(
                {
                    "row": row.label,
                    "num_bytes": row.num_bytes,
                    "microseconds": {name: 1e6 * statistics.median(times) / count for name, times in seconds.items()},
                    "gb_per_s": count * row.num_bytes / 1e9 / statistics.median(seconds["heed"]),
                    "over_copy": max(copies),  # the faster of both copies
                    "over_xla": median_ratio(seconds["xla, compiled"], seconds["heed, compiled"]),
                }
            )
            over_copy, over_xla = results[-1]["over_copy"], results[-1]["over_xla"]
            print(f"  {row.label}: {over_copy:.2f} x copy, {over_xla:.2f} x XLA", flush=True)
    return results


def measure_decode(rounds: int) -> list[dict[str, Any]]:
    """One query over many keys, 32/8 heads, D 128. Inputs rotate, so that they come from memory."""
    results = []
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for dtype, kv_len, layout in itertools.product(DTYPES, (2048, 32768), ("NHD", "HND")):
            shape = (kv_len, 8, 128) if layout == "NHD" else (8, kv_len, 128)
            copies = 12 if kv_len == 2048 else 3
            q = random((32, 128), dtype)
            caches = [[random(shape, dtype, 2 * copy + part) for part in (1, 2)] for copy in range(copies)]
            statics = _small_ops.DecodeStatics(kv_layout=layout)
            calls = [native_call(_small_ops.ATTENTION_DECODE, statics, (q, k, v, None, None)) for k, v in caches]
            turn = itertools.count()

            def read(caches: Any = caches, turn: Any = turn) -> None:
                cache = caches[next(turn) % len(caches)]
                pieces = [piece for x in cache for piece in np.array_split(x.view(np.uint8).reshape(-1), THREADS)]
                list(pool.map(lambda piece: np.max(piece.view(np.float32)), pieces))

            contenders: dict[str, Callable[[], Any]] = {
                "heed": rotating(calls, turn),
                "plain read": read,
            }
            is_torch_row = (dtype, layout) == ("float32", "NHD")
            torch_run = torch_decode(q[None, None], stacked(caches), turn) if is_torch_row else None
            if torch_run is not None:
                contenders["torch"] = torch_run
            seconds = paired(contenders, rounds)
            gigabytes = sum(x.nbytes for x in caches[0]) / 1e9
            results.append(
                {
                    "row": f"single_decode, {kv_len} keys, {layout}, {dtype}",
                    "gb_per_s": {name: gigabytes / statistics.median(times) for name, times in seconds.items()},
                    "of_read": median_ratio(seconds["plain read"], seconds["heed"]),
                }
            )
            print(f"  {results[-1]['row']}: {results[-1]['of_read']:.2f} of a plain read", flush=True)
    return results


def rotating(calls: list[Callable[[], Any]], turn: Iterator[int]) -> Callable[[], Any]:
    return lambda: calls[next(turn) % len(calls)]()


def stacked(caches: list[list[Any]]) -> list[list[Any]]:
    """With a batch axis, as `torch_decode` takes them."""
    return [[x[None] for x in cache] for cache in caches]


def measure_overhead() -> dict[str, float]:
    """Microseconds per call on 2 x 128 elements: compiled, eager on NumPy arrays, and a compiled x + 1 as the floor."""
    import jax

    x, weight = np.ones((2, 128), np.float32), np.ones(128, np.float32)
    device_x, device_weight = jax.numpy.asarray(x), jax.numpy.asarray(weight)
    add, silu, norm = jax.jit(lambda a: a + 1), jax.jit(heed.ops.silu_and_mul), jax.jit(heed.ops.rms_norm)
    calls: dict[str, Callable[[], Any]] = {
        "compiled x + 1": lambda: add(device_x).block_until_ready(),
        "compiled silu_and_mul": lambda: silu(device_x).block_until_ready(),
        "compiled rms_norm": lambda: norm(device_x, device_weight).block_until_ready(),
        "eager silu_and_mul, NumPy": lambda: heed.ops.silu_and_mul(x),
        "eager rms_norm, NumPy": lambda: heed.ops.rms_norm(x, weight),
        "native silu_and_mul": native_call(_small_ops.ACT_AND_MUL, _small_ops.ActStatics(), (x,)),
    }
    seconds = paired({name: repeated(call, 200) for name, call in calls.items()}, 9)
    return {name: 1e6 * statistics.median(samples) / 200 for name, samples in seconds.items()}


def verdict(is_met: bool) -> str:
    return "met" if is_met else "MISSED"


def report(content: dict[str, Any]) -> str:
    """The tables as Markdown."""
    moved = [
        [row["row"]]
        + [f"{row['microseconds'][name]:.0f}" for name in ("heed", "heed, compiled", "xla, compiled")]
        + [f"{row['gb_per_s']:.1f}", f"{row['over_copy']:.2f}", verdict(row["over_copy"] <= MAX_OVER_COPY)]
        + [f"{row['over_xla']:.2f}", verdict(row["over_xla"] >= MIN_OVER_XLA)]
        for row in content["rows"]
    ]
    header = ["", "heed us", "compiled us", "XLA us", "GB/s", "x copy", f"<= {MAX_OVER_COPY}", "x XLA"]
    decode = [
        [row["row"]]
        + [
            f"{row['gb_per_s'][name]:.1f}" if name in row["gb_per_s"] else "-"
            for name in ("heed", "plain read", "torch")
        ]
        + [f"{row['of_read']:.2f}", verdict(row["of_read"] >= MIN_OF_READ)]
        for row in content["decode"]
    ]
    overhead = [[name, f"{value:.1f}"] for name, value in content["overhead_us"].items()]
    return "\n\n".join(
        [
            table([*header, f">= {MIN_OVER_XLA}"], moved),
            table(["GB/s of K and V", "heed", "plain read", "torch", "of the read", f">= {MIN_OF_READ}"], decode),
            table(["one tiny call, microseconds", "measured"], overhead),
        ]
    )


def plot(content: dict[str, Any]) -> None:
    """Bars of both ratios per row, with their targets, into `bench/results/cpu_small_ops.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [row["row"] for row in content["rows"]]
    places = np.arange(len(labels))
    figure, panels = plt.subplots(1, 2, figsize=(12, 0.3 * len(labels) + 1.5), sharey=True)
    for axes, key, target, title in (
        (panels[0], "over_copy", MAX_OVER_COPY, "time over a copy of the same bytes"),
        (panels[1], "over_xla", MIN_OVER_XLA, "XLA's time over heed's, compiled"),
    ):
        bars = axes.barh(places, [row[key] for row in content["rows"]], color="#1f6f8b")
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        axes.axvline(target, color="#444444", linestyle="dashed", linewidth=1)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(places, labels, fontsize=7)
    panels[0].invert_yaxis()
    about = content["machine"]
    figure.suptitle(f"Small ops, {about['cpu']}, {about['cores']} cores (dashed: targets)", fontsize=11)
    figure.tight_layout()
    figure.savefig(RESULTS / f"{NAME}.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="paired samples per row")
    arguments = parser.parse_args()
    content: dict[str, Any] = {"machine": machine(), "rounds": arguments.rounds}
    content["rows"] = measure_rows(arguments.rounds)
    content["decode"] = measure_decode(arguments.rounds)
    content["overhead_us"] = measure_overhead()
    path = write_json(NAME, content)
    about = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    print(f"\n{about['cpu']}, {about['cores']} cores; {versions}; {about['date']}\n")
    print(report(content))
    plot(content)
    print(f"\nwrote {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
