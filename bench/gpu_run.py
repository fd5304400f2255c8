"""What the GPU benchmarks share: machine, who can run, parts in processes of their own, result file, command line.

Results are written after every row, so that a run that is cut short leaves what it has. What is not there (a peer, a
package) is reported as absent.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_report
import gpu_timing
from harness import RESULTS, machine

Callers = Mapping[str, Callable[[], Any]]

CHILD_SECONDS = 55.0  # kept for each part that is a process of its own; more where the rows leave time


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
    first = out[0] if isinstance(out, tuple) else out
    if first.device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def maker(make: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: make(*arguments)


def measure_all_modes(
    callers: Callers, clock: gpu_timing.Clock, rounds: int, hot_only: Sequence[str] = ()
) -> dict[str, gpu_timing.Samples]:
    """Every caller hot and paused; those of `hot_only` hot alone."""
    paused = {name: caller for name, caller in callers.items() if name not in hot_only}
    chosen = {"hot": callers, "paused": paused}
    return {mode: gpu_timing.measure(chosen[mode], clock, mode, rounds) for mode in gpu_timing.MODES}


def run_child(
    part: str, arguments: Sequence[str], timeout_s: float, folder: Path = Path(__file__).parent
) -> tuple[dict[str, Any], str | None]:
    """A part in a process of its own: what it does to caches, CPU affinity and JAX's memory stays there.

    Returns what it measured, and what went wrong, if anything: a child that is cut short leaves what it has.
    """
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "result.json"
        script = folder / f"gpu_{part}.py"
        command = [sys.executable, str(script), str(path), *arguments]
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

    def __init__(
        self, name: str, output: Path, budget_s: float, num_children: int = 0, child_s: float = CHILD_SECONDS
    ) -> None:
        self.path = output / f"{name}.json"
        self.content: dict[str, Any] = {"rows": [], "packed": [], "failed": {}, "skipped": []}
        self._deadline = time.monotonic() + budget_s
        self._num_children = num_children  # still to run
        self._child_s = child_s
        output.mkdir(parents=True, exist_ok=True)

    def write(self) -> None:
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")

    def seconds_left(self) -> float:
        """For what comes next, after what is kept for the parts with processes of their own."""
        return self._deadline - time.monotonic() - self._num_children * self._child_s

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
            f"{other} " + " / ".join(_shown(gpu_report.speed(result, mode, other)) for mode in gpu_timing.MODES)
            for other in result["seconds"].get("hot", {})
            if other not in ("heed equal", "heed full causal")  # another amount of work
        ]
        wrong = "  WRONG RESULT" if result["wrong"] else ""
        taken = time.monotonic() - start
        print(f"  {name}: {', '.join(speeds) or result['absent']}{wrong}  ({taken:.1f} s)", flush=True)

    def add_child(self, part: str, arguments: Sequence[str]) -> None:
        self._num_children -= 1
        print(f"  {part} ...", flush=True)
        result, failure = run_child(part, arguments, max(self._child_s, self.seconds_left()))
        if result:
            self.content[part] = result
        if failure:
            self.content["failed"][part] = failure
            print(f"  {part}: FAILED: {failure}", flush=True)
        self.write()


def _shown(speed: float | None) -> str:
    return "-" if speed is None else f"{speed:.0f}"


def finish(content: Mapping[str, Any], output: Path, name: str, bench: gpu_report.Benchmark) -> int:
    """Prints the report and draws the plot. 1 if a result was wrong or heed could not be measured."""
    if "machine" in content:
        print(f"\n{gpu_report.about_line(content)}\n")
    print(bench.report(content))
    try:
        is_drawn = gpu_report.plot(content, output / f"{name}.png", bench.title)
    except ImportError as error:
        print(f"\nno plot: {error}")
        is_drawn = False
    print(f"\nwrote {output / name}.json{' and .png' if is_drawn else ''}")
    everything = [*content["rows"], *content["packed"], *content.get("jax", {}).get("rows", [])]
    is_absent = any("heed" in row["absent"] for row in everything)
    return 1 if gpu_report.wrong_results(content) or is_absent or content["failed"] else 0


def write_readme(name: str, bench: gpu_report.Benchmark) -> int:
    """Puts the committed results into the README."""
    path = RESULTS.parent.parent / "README.md"
    content = json.loads((RESULTS / f"{name}.json").read_text())
    block = bench.readme_block(content, f"bench/results/{name}.png")
    path.write_text(gpu_report.rewritten_readme(path.read_text(), block, name))
    print(f"wrote the table of {name} in {path}")
    return 0


def child_arguments(is_quick: bool, rounds: int) -> list[str]:
    return ["--rounds", str(rounds), *(["--quick"] if is_quick else [])]


def command(
    about: str,
    name: str,
    parts: Sequence[str],
    bench: gpu_report.Benchmark,
    measure: Callable[[argparse.Namespace, list[str]], Mapping[str, Any]],
    budget_s: float,
    default_parts: Sequence[str] | None = None,
) -> int:
    """The command line of a GPU benchmark. `measure` runs the chosen parts and returns what it wrote."""
    chosen_by_default = ",".join(parts if default_parts is None else default_parts)
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds: about a minute")
    parser.add_argument("--rounds", type=int, help="paired samples per row and mode")
    parser.add_argument(
        "--only", default=chosen_by_default, help=f"parts to run, of {','.join(parts)} (default: {chosen_by_default})"
    )
    parser.add_argument(
        "--budget", type=float, default=budget_s, help="seconds for all, about; what does not fit is skipped"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results (default: bench/results)")
    parser.add_argument("--report", type=Path, help="print the report of this JSON file instead of measuring")
    parser.add_argument("--readme", action="store_true", help="write the README's table from bench/results instead")
    arguments = parser.parse_args()
    if arguments.readme:
        return write_readme(name, bench)
    if arguments.report:
        return finish(json.loads(arguments.report.read_text()), arguments.report.parent, name, bench)
    chosen = arguments.only.split(",")
    unknown = sorted(set(chosen) - set(parts))
    if unknown:
        parser.error(f"--only: got {', '.join(unknown)}, expected parts of {', '.join(parts)}")
    try:
        import torch
    except ImportError as error:
        parser.error(f"the GPU benchmark needs PyTorch: {error}")
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no NVIDIA GPU")
    return finish(measure(arguments, chosen), arguments.output, name, bench)
