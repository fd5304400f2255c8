"""How busy attention forward keeps an NVIDIA GPU's tensor cores, by the hardware's counters: `ncu` runs this file.

    python bench/gpu_counters.py

Needs Nsight Compute (`ncu`, or its path in NCU), PyTorch, and the right to read counters. Prints for each shape the
share of a multiprocessor's active cycles in which its tensor cores work, the share in which it issues instructions, the
time of the launch under the profiler, which leaves the clocks as they are, and the bytes that DRAM moves.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from typing import Any

# (batch, tokens, causal), 16 heads of 128 dims in bfloat16
SHAPES = ((4, 4096, False), (4, 4096, True), (32, 512, False))
LAUNCHES = 3  # of each shape; the last one counts
METRICS = {
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": ("tensor cores, %", 1.0),
    "sm__inst_issued.avg.pct_of_peak_sustained_active": ("issue, %", 1.0),
    "gpu__time_duration.sum": ("us", 1e-3),
    "dram__bytes.sum": ("DRAM, MB", 1e-6),
}


def child() -> None:
    """What is profiled."""
    import torch

    import heed

    for batch, tokens, is_causal in SHAPES:
        q, k, v = (torch.randn(batch, tokens, 16, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        for _ in range(LAUNCHES):
            heed.flash_mha(q, k, v, is_causal=is_causal)
        torch.cuda.synchronize()


def counters(ncu: str) -> list[dict[str, float]]:
    """The metrics of every launch of heed's kernels, in order."""
    run = subprocess.run(
        [ncu, "--csv", "--clock-control", "none", "--kernel-name", "heed_kernel", "--metrics", ",".join(METRICS),
         sys.executable, __file__, "--child"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = run.stdout.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        raise SystemExit(f"ncu gave no counters:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    launches: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(lines[first:]):
        launches.setdefault(row["ID"], {})[row["Metric Name"]] = _number(row)
    return list(launches.values())


def _number(row: dict[str, Any]) -> float:
    """In ncu's base units: nanoseconds, bytes, percent."""
    scales = {"us": 1e3, "usecond": 1e3, "msecond": 1e6, "ms": 1e6, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
    return float(row["Metric Value"].replace(",", "")) * scales.get(row["Metric Unit"], 1.0)


def main() -> None:
    ncu = os.environ.get("NCU") or shutil.which("ncu")
    if ncu is None:
        raise SystemExit("there is no ncu on PATH: set NCU")
    launches = counters(ncu)
    assert len(launches) == len(SHAPES) * LAUNCHES, f"{len(launches)} launches, expected {len(SHAPES) * LAUNCHES}"
    print("| D 128, 16 heads, bfloat16 | " + " | ".join(name for name, _ in METRICS.values()) + " |")
    print("| --- |" + " --- |" * len(METRICS))
    for shape, launch in zip(SHAPES, launches[LAUNCHES - 1 :: LAUNCHES], strict=True):
        batch, tokens, is_causal = shape
        cells = [f"{launch[metric] * scale:.1f}" for metric, (_, scale) in METRICS.items()]
        print(f"| batch {batch}, S {tokens} {'causal' if is_causal else 'full'} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    child() if "--child" in sys.argv else main()
