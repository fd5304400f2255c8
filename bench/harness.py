"""Paired timing of several contenders in one process, and what is written about the machine beside every figure."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import heed

RESULTS = Path(__file__).resolve().parent / "results"

# Thread pools of the peers spin for a while after their work. A pause before each sample lets them go to sleep, so that
# a contender does not pay for the one measured before it.
_PAUSE_SECONDS = 0.03


def paired(contenders: Mapping[str, Callable[[], Any]], rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """Seconds of each contender in each round. Every round runs all once, in shuffled order, after a warm-up."""
    for run in contenders.values():
        run()
    shuffle = random.Random(seed)
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        shuffle.shuffle(names)
        for name in names:
            time.sleep(_PAUSE_SECONDS)
            start = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over the rounds of the paired ratio."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """What a reader needs to judge the figures: CPU, threads, versions, date."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    packages = ("jax", "jaxlib", "torch", "numpy")
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {"heed": heed.__version__, **{name: _version(name) for name in packages}},
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    """A GitHub table with aligned columns."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def write_json(name: str, content: dict[str, Any]) -> Path:
    """Writes `bench/results/NAME.json`."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
