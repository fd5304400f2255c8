"""Attention forward on an NVIDIA GPU: heed beside torch's FA2 and cuDNN, and beside JAX's cuDNN.

All contenders of a row alternate in one process, hot (launches back to back) and paused (after idling for 0.12 s);
ratios are medians of the paired ratios. Prints tables and every target with met or missed, and writes
`gpu_attention_fwd.json` and `.png`. Run it with `make bench-gpu`; `--quick` measures fewer rows in a minute. What is
not there (a peer, a package) is reported as absent. Results are written after every row, so that a run that is cut
short leaves what it has.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gpu_contenders as contenders
import gpu_report
import gpu_timing
import heed
from harness import RESULTS, machine
from packed import PackedRow

NAME = "gpu_attention_fwd"
PARTS = (*contenders.CONTENDERS, "varlen", "jit", "jax")
_CHILD_SECONDS = 55.0  # kept for each part that is a process of its own; more where the rows leave time


def gpu_machine() -> dict[str, Any]:
    """The machine, with its GPU and the versions of CUDA's parts."""
    import torch

    about = machine()
    about["gpu"] = torch.cuda.get_device_name(0)
    about["cuda"], about["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    about["driver"] = driver
    return about


def ceilings(clock: gpu_timing.Clock, size: int = 8192) -> dict[str, float]:
    """What the card makes of a large matrix product and a large copy, in this run."""
    import torch

    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(2 * size, 4 * size, device="cuda", dtype=torch.float32)
    target = torch.empty_like(source)
    runs = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    seconds = gpu_timing.measure(runs, clock, "hot", rounds=5)
    return {
        "matmul_tflops": 2 * size**3 / gpu_timing.median_seconds(seconds, "matmul") / 1e12,
        "copy_tb_per_s": 2 * source.nbytes / gpu_timing.median_seconds(seconds, "copy") / 1e12,
    }


Callers = Mapping[str, Callable[[], Any]]


def reason_of(error: BaseException) -> str:
    """An error's type and first line."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:200]}"


def working(makers: Mapping[str, Callable[[], Callable[[], Any]]]) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """The contenders that run, with why the others do not, and heed's result."""
    callers, absent, result = {}, {}, None
    for name, make in makers.items():
        try:
            caller = make()
            out = caller()
            _synchronize(out)
        except Exception as error:
            absent[name] = reason_of(error)
            continue
        callers[name] = caller
        result = out if name == "heed" else result
    return callers, absent, result


def _synchronize(out: Any) -> None:
    if out.device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def measure_all_modes(callers: Callers, clock: gpu_timing.Clock, rounds: int) -> dict[str, gpu_timing.Samples]:
    return {mode: gpu_timing.measure(callers, clock, mode, rounds) for mode in gpu_timing.MODES}


def measure_dense(row: contenders.Row, clock: gpu_timing.Clock, rounds: int, device: str = "cuda") -> dict[str, Any]:
    """One dense row: everyone's times, who is absent, and whether heed's result is right."""
    inputs = contenders.make_inputs(row, device)
    makers = {name: _maker(make, row, inputs) for name, make in contenders.CONTENDERS[row.group].items()}
    callers, absent, out = working(makers)
    wrong = contenders.wrong_result(row, inputs, out) if out is not None else None
    del out
    return {
        "group": row.group,
        "label": row.label,
        "tokens": row.tokens,
        "is_causal": row.is_causal,
        "tflop": row.flops / 1e12,
        "seconds": measure_all_modes(callers, clock, rounds) if "heed" in callers else {},
        "absent": absent,
        "wrong": wrong,
    }


def _maker(make: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: make(*arguments)


def measure_packed(
    pair: tuple[PackedRow, PackedRow],
    clock: gpu_timing.Clock,
    rounds: int,
    device: str = "cuda",
) -> dict[str, Any]:
    """Uneven packed sequences beside equal ones with the same work."""
    row, equal = pair
    inputs, equal_inputs = (contenders.make_packed_inputs(one, device) for one in pair)
    makers = {
        "heed": _maker(contenders.heed_packed_call, row, inputs),
        "heed equal": _maker(contenders.heed_packed_call, equal, equal_inputs),
        "fa2": _maker(contenders.fa2_packed_call, row, inputs),
    }
    callers, absent, out = working(makers)
    wrong = contenders.wrong_packed_result(row, inputs, out) if out is not None else None
    return {
        "label": row.label,
        "lengths": list(row.lengths),
        "equal_length": equal.lengths[0],
        "is_causal": row.is_causal,
        "tflop": row.flops / 1e12,
        "equal_tflop": equal.flops / 1e12,
        "seconds": measure_all_modes(callers, clock, rounds) if "heed" in callers else {},
        "absent": absent,
        "wrong": wrong,
    }


def run_child(part: str, is_quick: bool, rounds: int, timeout_s: float) -> tuple[dict[str, Any], str | None]:
    """A part in a process of its own: what it does to caches, CPU affinity and JAX's memory stays there.

    Returns what it measured, and what went wrong, if anything: a child that is cut short leaves what it has.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        script = Path(__file__).with_name(f"gpu_{part}.py")
        command = [sys.executable, str(script), str(path), "--rounds", str(rounds)]
        if is_quick:
            command.append("--quick")
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
            end = "\n".join((done.stdout + done.stderr).strip().splitlines()[-30:])
            failure = None if done.returncode == 0 else f"{script.name} ended with status {done.returncode}\n{end}"
        except subprocess.TimeoutExpired:
            failure = f"{script.name} was cut off after {timeout_s:.0f} s"
        result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return result, failure


class Run:
    """The result so far: written after every row, and the time that is left."""

    def __init__(self, output: Path, budget_s: float, num_children: int = 0) -> None:
        self.path = output / f"{NAME}.json"
        self.content: dict[str, Any] = {"rows": [], "packed": [], "failed": {}, "skipped": []}
        self._deadline = time.monotonic() + budget_s
        self._num_children = num_children  # still to run
        output.mkdir(parents=True, exist_ok=True)

    def write(self) -> None:
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")

    def seconds_left(self) -> float:
        """For what comes next, after what is kept for the parts with processes of their own."""
        return self._deadline - time.monotonic() - self._num_children * _CHILD_SECONDS

    def add(self, kind: str, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measures one row; an error is a result too."""
        if self.seconds_left() <= 0:
            self.content["skipped"].append(name)
            return
        start = time.monotonic()
        try:
            result = measure()
        except Exception as error:
            self.content["failed"][name] = reason_of(error)
            print(f"  {name}: FAILED: {reason_of(error)}", flush=True)
            return
        self.content[kind].append(result)
        self.write()
        speeds = [
            f"{other} " + " / ".join(f"{gpu_report.speed(result, mode, other):.0f}" for mode in gpu_timing.MODES)
            for other in result["seconds"].get("hot", {})
            if other not in ("heed equal", "heed full causal")  # another amount of work
        ]
        wrong = "  WRONG RESULT" if result["wrong"] else ""
        taken = time.monotonic() - start
        print(f"  {name}: {', '.join(speeds) or result['absent']}{wrong}  ({taken:.1f} s)", flush=True)

    def add_child(self, part: str, is_quick: bool, rounds: int) -> None:
        self._num_children -= 1
        result, failure = run_child(part, is_quick, rounds, max(_CHILD_SECONDS, self.seconds_left()))
        if result:
            self.content[part] = result
        if failure:
            self.content["failed"][part] = failure
            print(f"  {part}: FAILED: {failure}", flush=True)
        self.write()


def run_parts(run: Run, parts: list[str], is_quick: bool, rounds: int) -> None:
    clock = gpu_timing.EventClock()
    run.content["machine"] = gpu_machine()
    run.content["rounds"] = rounds
    run.content["ceilings"] = ceilings(clock)
    print("TFLOP/s, hot / paused:", flush=True)
    for row in contenders.dense_rows(is_quick):
        if row.group in parts:
            run.add("rows", row.label, _maker(measure_dense, row, clock, rounds))
    if "varlen" in parts:
        for pair in contenders.packed_rows():
            run.add("packed", pair[0].label, _maker(measure_packed, pair, clock, rounds))
    import torch

    torch.cuda.empty_cache()
    for part in ("jit", "jax"):
        if part in parts:
            print(f"  {part} ...", flush=True)
            run.add_child(part, is_quick, rounds)


def finish(content: Mapping[str, Any], output: Path) -> int:
    """Prints the report and draws the plot. 1 if a result was wrong or heed could not be measured."""
    if "machine" in content:
        print(f"\n{gpu_report.about_line(content)}\n")
    print(gpu_report.report(content))
    try:
        is_drawn = gpu_report.plot(content, output / f"{NAME}.png")
    except ImportError as error:
        print(f"\nno plot: {error}")
        is_drawn = False
    print(f"\nwrote {output / NAME}.json{' and .png' if is_drawn else ''}")
    everything = [*content["rows"], *content["packed"], *content.get("jax", {}).get("rows", [])]
    is_absent = any("heed" in row["absent"] for row in everything)
    return 1 if gpu_report.wrong_results(content) or is_absent or content["failed"] else 0


def write_readme() -> int:
    """Puts the committed results into the README."""
    path = RESULTS.parent.parent / "README.md"
    content = json.loads((RESULTS / f"{NAME}.json").read_text())
    block = gpu_report.readme_block(content, f"bench/results/{NAME}.png")
    path.write_text(gpu_report.rewritten_readme(path.read_text(), block))
    print(f"wrote the GPU table of {path}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds: about a minute")
    parser.add_argument("--rounds", type=int, help="paired samples per row and mode (default: 5; quick: 3)")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts to run, of {','.join(PARTS)}")
    parser.add_argument(
        "--budget", type=float, default=400.0, help="seconds for all, about; what does not fit is skipped"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results (default: bench/results)")
    parser.add_argument("--report", type=Path, help="print the report of this JSON file instead of measuring")
    parser.add_argument("--readme", action="store_true", help="write the README's table from bench/results instead")
    arguments = parser.parse_args()
    if arguments.readme:
        return write_readme()
    if arguments.report:
        return finish(json.loads(arguments.report.read_text()), arguments.report.parent)
    parts = arguments.only.split(",")
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        parser.error(f"--only: got {', '.join(unknown)}, expected parts of {', '.join(PARTS)}")
    try:
        import torch
    except ImportError as error:
        parser.error(f"the GPU benchmark needs PyTorch: {error}")
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no NVIDIA GPU")
    print(f"heed {heed.__version__} on {torch.cuda.get_device_name(0)}", flush=True)
    run = Run(arguments.output, arguments.budget, num_children=len({"jit", "jax"} & set(parts)))
    run_parts(run, parts, arguments.quick, arguments.rounds or (3 if arguments.quick else 5))
    run.write()
    return finish(run.content, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
