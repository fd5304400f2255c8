"""heed.ops on an NVIDIA GPU: microseconds and TB/s beside PyTorch, eager and compiled, and a copy of the same bytes.

Every contender of a row is captured in a CUDA graph of its own, which calls it once on each of several sets of inputs:
together they are larger than the GPU's L2, so that every call reads memory. Contenders alternate in shuffled order;
a figure is the median over rounds of the time of one call inside the graph. heed's results are checked against float64
by the tests' rule. Prints a table and every target with met or missed, and writes `gpu_small_ops.json` and `.png`.
Run it with `make bench-gpu`; `--quick` leaves out torch.compile and takes about half a minute.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import heed
from gpu_run import gpu_machine, reason_of
from gpu_timing import Clock, EventClock, measure
from harness import RESULTS, table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from small_op_specs import BENCHMARKS, ActSpec, NormSpec, OpSpec, RopeSpec
from tolerance import assert_close

NAME = "gpu_small_ops"
CONTENDERS = {"heed": "heed", "eager": "torch", "compiled": "torch.compile", "copy": "copy"}

# Inputs of one graph take so much memory in all: more than twice the L2 of an H200.
ROTATED_BYTES = 160e6
MAX_SETS = 128

# Of one call on an H200: microseconds at most, or TB/s at least.
TARGETS = {
    "bench_silu_t16": ("us", 3.0),
    "bench_silu_t1024": ("TB/s", 3.9),
    "bench_silu_t16384": ("TB/s", 4.2),
    "bench_rope_t64": ("us", 3.0),
    "bench_rope_t4096": ("TB/s", 3.5),
    "bench_rope_t32768": ("TB/s", 4.0),
    "bench_norm_16384": ("TB/s", 4.0),
    **{
        f"bench_decode_{dtype}_s{kv_len}": ("us", target)
        for dtype in ("float16", "bfloat16")
        for kv_len, target in ((2048, 6.5), (8192, 12.5), (65536, 66.0))
    },
}
QUICK_LEFT_OUT = ("bench_norm_add_16384", "bench_decode_bfloat16_s8192")

Tensors = dict[str, Any]
Function = Callable[..., Any]


# Inputs and contenders, by the kind of a row.


def make_inputs(spec: OpSpec, device: str) -> Tensors:
    """One set of inputs: what heed's function takes, by parameter name."""
    import torch

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, device=device, dtype=torch.float32).to(getattr(torch, spec.dtype))

    if isinstance(spec, ActSpec):
        return {"x": normal(*spec.lead, 2 * spec.hidden)}
    if isinstance(spec, RopeSpec):
        bounds = np.concatenate([[0], np.cumsum(spec.lengths)])
        heads = {"q": spec.num_q_heads, "k": spec.num_kv_heads}
        return {name: normal(spec.num_tokens, count, spec.head_dim) for name, count in heads.items()} | {
            "indptr": torch.tensor(bounds, device=device, dtype=torch.int32),
            "offsets": torch.zeros(len(spec.lengths), device=device, dtype=torch.int32),
        }
    if isinstance(spec, NormSpec):
        inputs = {"x": normal(*spec.lead, spec.hidden)}
        if spec.residual:
            inputs["residual"] = normal(*spec.lead, spec.hidden)
        return inputs | {"weight": normal(spec.hidden)}
    kv = (spec.kv_len, spec.num_kv_heads, spec.head_dim)
    return {"q": normal(spec.num_q_heads, spec.head_dim), "k": normal(*kv), "v": normal(*kv)}


def heed_function(spec: OpSpec) -> Function:
    if isinstance(spec, ActSpec):
        return getattr(heed.ops, f"{spec.activation}_and_mul")
    if isinstance(spec, RopeSpec):
        return heed.ops.apply_rope
    if isinstance(spec, NormSpec):
        return heed.ops.fused_add_rms_norm if spec.residual else heed.ops.rms_norm
    return heed.ops.single_decode


def torch_function(spec: OpSpec) -> Function:
    """The same by PyTorch's own functions, on the same inputs."""
    import torch
    from torch.nn import functional

    if isinstance(spec, ActSpec):

        def silu_and_mul(x: Any) -> Any:
            gate, factor = x.chunk(2, dim=-1)
            return functional.silu(gate) * factor

        return silu_and_mul
    if isinstance(spec, RopeSpec):

        def rope(q: Any, k: Any, indptr: Any, offsets: Any) -> Any:
            # One sequence that begins at position 0, as the rows have it.
            dim = q.shape[-1]
            frequency = 1e4 ** (-torch.arange(0, dim, 2, device=q.device, dtype=torch.float32) / dim)
            angle = torch.arange(q.shape[0], device=q.device, dtype=torch.float32)[:, None, None] * frequency
            cosine, sine = (torch.cat([f(angle)] * 2, dim=-1).to(q.dtype) for f in (torch.cos, torch.sin))

            def turned(x: Any) -> Any:
                left, right = x.chunk(2, dim=-1)
                return x * cosine + torch.cat([-right, left], dim=-1) * sine

            return turned(q), turned(k)

        return rope
    if isinstance(spec, NormSpec):

        def norm(x: Any, weight: Any, residual: Any = None) -> Any:
            total = x if residual is None else x + residual
            out = functional.rms_norm(total, weight.shape, weight, 1e-6)
            return out if residual is None else (out, total)

        return norm

    def decode(q: Any, k: Any, v: Any) -> Any:
        out = functional.scaled_dot_product_attention(
            q[None, :, None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], enable_gqa=True
        )
        return out[0, :, 0]

    return decode


def copy(source: Any) -> Any:
    """Reads and writes the bytes of `source`."""
    import torch

    return torch.empty_like(source).copy_(source)


# Correctness: heed's result on some rows, against float64.


def to_numpy(x: Any) -> np.ndarray:
    import ml_dtypes
    import torch

    names = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16}
    host = x.detach().float().cpu().numpy()
    return host.astype(names.get(x.dtype, np.float32))


def wrong_result(spec: OpSpec, inputs: Tensors, out: Any, num_rows: int = 32) -> str | None:
    """What is wrong with heed's result on some rows, or None."""
    from heed import reference_ops as reference

    def judge(found: Any, naive: Any, oracle: Any) -> None:
        assert_close(found, naive, oracle, found.dtype, spec.name)

    first = out[0] if isinstance(out, tuple) else out
    rows = np.unique(np.random.default_rng(1).integers(0, max(1, first.shape[0]), num_rows))
    try:
        if isinstance(spec, ActSpec):
            x = to_numpy(inputs["x"][rows])
            naive, oracle = (f(x, spec.activation) for f in (reference.naive_act_and_mul, reference.act_and_mul))
            judge(to_numpy(first[rows]), naive, oracle)
        elif isinstance(spec, RopeSpec):
            q, k = (to_numpy(inputs[name][rows]) for name in ("q", "k"))
            naive = reference.naive_apply_rope(q, k, pos_ids=rows)
            oracle = reference.apply_rope(q, k, pos_ids=rows)
            for one, rough, right in zip(out, naive, oracle, strict=True):
                judge(to_numpy(one[rows]), rough, right)
        elif isinstance(spec, NormSpec):
            x, weight = to_numpy(inputs["x"][rows]), to_numpy(inputs["weight"])
            residual = to_numpy(inputs["residual"][rows]) if spec.residual else None
            naive, oracle = (f(x, weight, residual=residual) for f in (reference.naive_rms_norm, reference.rms_norm))
            for one, rough, right in zip(out if spec.residual else (out,), naive, oracle, strict=False):
                judge(to_numpy(one[rows]), rough, right)
        else:
            group = spec.num_q_heads // spec.num_kv_heads
            q, k, v = (to_numpy(inputs[name]) for name in "qkv")
            q, k, v = q[:group], k[:, :1], v[:, :1]
            naive, _ = reference.naive_single_decode(q, k, v)
            oracle, _ = reference.single_decode(q, k, v)
            judge(to_numpy(first[:group]), naive, oracle)
    except AssertionError as error:
        return str(error)
    return None


# Measuring.


def capture(function: Function, sets: list[Tensors]) -> tuple[Any, list[Any]]:
    """A graph that calls the function on each set, and the results, which it keeps writing."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles and loads; no capture would like that
        function(**sets[0])
        function(**sets[-1])
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = [function(**one) for one in sets]
    graph.replay()
    torch.cuda.synchronize()
    return graph, results


def makers_of(spec: OpSpec, sets: list[Tensors], is_quick: bool, device: str) -> dict[str, Callable[[], Any]]:
    """How each contender's graph is made."""
    import torch

    makers: dict[str, Callable[[], Any]] = {
        "heed": lambda: capture(heed_function(spec), sets),
        "eager": lambda: capture(torch_function(spec), sets),
    }
    if not is_quick:

        def compiled() -> Any:
            torch._dynamo.reset()  # it counts how often a function was compiled, and gives up
            return capture(torch.compile(torch_function(spec), dynamic=False), sets)

        makers["compiled"] = compiled

    def copies() -> Any:
        sources = [torch.zeros(spec.num_bytes() // 2, device=device, dtype=torch.uint8) for _ in sets]
        return capture(copy, [{"source": source} for source in sources])

    makers["copy"] = copies
    return makers


def measure_row(spec: OpSpec, clock: Clock, rounds: int, is_quick: bool, device: str = "cuda") -> dict[str, Any]:
    """Everyone's seconds for one call, who is absent, and whether heed's result is right."""
    import torch

    num_sets = min(MAX_SETS, max(2, math.ceil(ROTATED_BYTES / spec.num_bytes())))
    sets = [make_inputs(spec, device) for _ in range(num_sets)]
    graphs: dict[str, Any] = {}
    absent: dict[str, str] = {}
    wrong = None
    for name, make in makers_of(spec, sets, is_quick, device).items():
        try:
            graph, results = make()
        except Exception as error:  # a peer that is not there is no reason to stop
            absent[name] = reason_of(error)
            torch.cuda.synchronize()
            continue
        if name == "heed":
            wrong = wrong_result(spec, sets[-1], results[-1])
        graphs[name] = (graph, results)
    runs = {name: (lambda graph=graph: graph.replay()) for name, (graph, _) in graphs.items()}
    samples = measure(runs, clock, "hot", rounds)
    return {
        "name": spec.name,
        "bytes": spec.num_bytes(),
        "sets": num_sets,
        "seconds": {name: [value / num_sets for value in values] for name, values in samples.items()},
        "absent": absent,
        "wrong": wrong,
    }


# The report.


def seconds_of(row: Mapping[str, Any], name: str) -> float | None:
    values = row["seconds"].get(name)
    return statistics.median(values) if values else None


def tb_per_s(row: Mapping[str, Any], name: str) -> float | None:
    seconds = seconds_of(row, name)
    return None if seconds is None else row["bytes"] / seconds / 1e12


def of_copy(row: Mapping[str, Any]) -> float | None:
    """heed's time in times of the copy's: the median of the paired ratios."""
    heed_s, copy_s = row["seconds"].get("heed"), row["seconds"].get("copy")
    if not heed_s or not copy_s:
        return None
    return statistics.median(a / b for a, b in zip(heed_s, copy_s, strict=True))


def verdict(row: Mapping[str, Any]) -> tuple[str, str]:
    """A row's target, and "met", "MISSED" or "not measured"; both empty if it has none."""
    if row["name"] not in TARGETS:
        return "", ""
    unit, bound = TARGETS[row["name"]]
    found = tb_per_s(row, "heed") if unit == "TB/s" else seconds_of(row, "heed")
    text = f">= {bound} TB/s" if unit == "TB/s" else f"<= {bound} us"
    if found is None:
        return text, "not measured"
    is_met = found >= bound if unit == "TB/s" else found * 1e6 <= bound
    return text, "met" if is_met else "MISSED"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def report(content: Mapping[str, Any]) -> str:
    """The table, who is absent, what is wrong, and how many targets were met."""
    header = ["call", *(f"{label}, us (TB/s)" for label in CONTENDERS.values()), "heed / copy", "target", ""]
    lines = []
    for row in content["rows"]:
        cells = [row["name"].removeprefix("bench_")]
        for name in CONTENDERS:
            seconds = seconds_of(row, name)
            cells.append("-" if seconds is None else f"{seconds * 1e6:.2f} ({_number(tb_per_s(row, name), 2)})")
        lines.append([*cells, _number(of_copy(row), 2), *verdict(row)])
    parts = [table(header, lines)]
    absences = sorted({f"{name}: {why}" for row in content["rows"] for name, why in row["absent"].items()})
    parts += [f"absent: {absence}" for absence in absences]
    parts += [f"WRONG RESULT: {row['wrong']}" for row in content["rows"] if row["wrong"]]
    parts += [f"FAILED: {name}: {why}" for name, why in content["failed"].items()]
    parts += [f"skipped, out of time: {name}" for name in content["skipped"]]
    words = [verdict(row)[1] for row in content["rows"]]
    parts.append(f"targets: {words.count('met')} met, {words.count('MISSED')} missed")
    return "\n\n".join(parts)


def plot(content: Mapping[str, Any], path: Path) -> bool:
    """Speed as a share of the copy's, one group of bars for each row."""
    rows = [row for row in content["rows"] if seconds_of(row, "copy") and seconds_of(row, "heed")]
    if not rows:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {"heed": "#1f6f8b", "eager": "#e07b39", "compiled": "#9aa5b1"}
    figure, axes = plt.subplots(figsize=(1.1 * len(rows) + 2, 4.2))
    for place, (name, color) in enumerate(colors.items()):
        shares = [(seconds_of(row, "copy") or 0.0) / (seconds_of(row, name) or math.inf) for row in rows]
        axes.bar([i + 0.27 * (place - 1) for i in range(len(rows))], shares, 0.25, label=CONTENDERS[name], color=color)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [row["name"].removeprefix("bench_") for row in rows], rotation=35, ha="right")
    axes.set_ylabel("speed, as a share of a copy's")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(colors), loc="upper right")
    axes.set_title(f"heed.ops, {content.get('machine', {}).get('gpu', 'GPU')}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return True


def finish(content: Mapping[str, Any], output: Path) -> int:
    """Prints the report and draws the plot. 1 if a result was wrong or heed could not be measured."""
    if "machine" in content:
        about = content["machine"]
        versions = {"driver": about["driver"], "CUDA": about["cuda"], **about["versions"]}
        shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        print(f"\n{about['gpu']}; {shown}; {about['date']}\n")
    print(report(content))
    try:
        is_drawn = plot(content, output / f"{NAME}.png")
    except ImportError as error:
        print(f"\nno plot: {error}")
        is_drawn = False
    print(f"\nwrote {output / NAME}.json{' and .png' if is_drawn else ''}")
    is_bad = any(row["wrong"] or "heed" in row["absent"] for row in content["rows"])
    return 1 if is_bad or content["failed"] or not content["rows"] else 0


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures row by row; the file is written after each, so that a run that is cut short leaves what it has."""
    import torch

    rounds = arguments.rounds or (5 if arguments.quick else 9)
    content: dict[str, Any] = {"machine": gpu_machine(), "rounds": rounds, "rows": [], "failed": {}, "skipped": []}
    arguments.output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + arguments.budget
    clock = EventClock()
    for spec in BENCHMARKS:
        if arguments.only not in spec.name or (arguments.quick and spec.name in QUICK_LEFT_OUT):
            continue
        if time.monotonic() > deadline:
            content["skipped"].append(spec.name)
            continue
        start = time.monotonic()
        try:
            row = measure_row(spec, clock, rounds, arguments.quick)
        except Exception as error:
            content["failed"][spec.name] = reason_of(error)
            print(f"  {spec.name}: FAILED: {reason_of(error)}", flush=True)
            continue
        finally:
            torch.cuda.empty_cache()
        content["rows"].append(row)
        (arguments.output / f"{NAME}.json").write_text(json.dumps(content, indent=1) + "\n")
        shown = ", ".join(f"{name} {(seconds_of(row, name) or 0) * 1e6:.2f}" for name in row["seconds"])
        print(f"  {spec.name}, us: {shown} {row['absent'] or ''}  ({time.monotonic() - start:.1f} s)", flush=True)
    return content


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds, without torch.compile")
    parser.add_argument("--rounds", type=int, help="samples per row")
    parser.add_argument("--only", default="", help="run the rows whose name contains this text")
    parser.add_argument(
        "--budget", type=float, default=150.0, help="seconds for all, about; what does not fit is skipped"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results (default: bench/results)")
    parser.add_argument("--report", type=Path, help="print the report of this JSON file instead of measuring")
    arguments = parser.parse_args()
    if arguments.report:
        return finish(json.loads(arguments.report.read_text()), arguments.report.parent)
    try:
        import torch
    except ImportError as error:
        parser.error(f"the GPU benchmark needs PyTorch: {error}")
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no NVIDIA GPU")
    return finish(run(arguments), arguments.output)


if __name__ == "__main__":
    sys.exit(main())
