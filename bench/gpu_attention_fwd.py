"""Attention forward on an NVIDIA GPU: heed, and its portable kernel, beside torch's cuDNN and FA2, and JAX's cuDNN.

All contenders of a row alternate in one process, hot (launches back to back) and paused (after idling for 0.12 s);
ratios are medians of the paired ratios. Prints tables and every target with met or missed, and writes
`gpu_attention_fwd.json` and `.png`. Run it with `make bench-gpu`; `--quick` measures fewer rows in less than a minute.
The compiler's part and JAX's are processes of their own, which take another minute each: `--only jit,jax`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import gpu_contenders as contenders
import gpu_fwd_report
import gpu_timing
import heed
from gpu_run import (
    CHILD_SECONDS,
    Run,
    ceilings,
    child_arguments,
    command,
    gpu_machine,
    maker,
    measure_all_modes,
    working,
)
from packed import PackedRow

NAME = "gpu_attention_fwd"
ROWS = (*contenders.CONTENDERS, "varlen")
CHILDREN = ("jit", "jax")
BUDGET_SECONDS, QUICK_SECONDS = 138.0, 42.0  # for the rows; Python's start and the first two figures come on top


def measure_dense(row: contenders.Row, clock: gpu_timing.Clock, rounds: int, device: str = "cuda") -> dict[str, Any]:
    """One dense row: everyone's times, who is absent, and whether heed's result is right."""
    inputs = contenders.make_inputs(row, device)
    makers = {name: maker(make, row, inputs) for name, make in contenders.CONTENDERS[row.group].items()}
    callers, absent, out = working(makers)
    wrong = contenders.wrong_result(row, inputs, out) if out is not None else None
    del out
    return {
        "group": row.group,
        "label": row.label,
        "tokens": row.tokens,
        "is_causal": row.is_causal,
        "window": row.window,
        "kernel": contenders.kernel_of(row, inputs),
        "tflop": row.flops / 1e12,
        "work_share": row.work_share,
        "seconds": measure_all_modes(callers, clock, rounds, contenders.hot_only(row.group))
        if "heed" in callers
        else {},
        "absent": absent,
        "wrong": wrong,
    }


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
        "heed": maker(contenders.heed_packed_call, row, inputs),
        "heed sm80": maker(contenders.heed_sm80_packed_call, row, inputs),
        "heed equal": maker(contenders.heed_packed_call, equal, equal_inputs),
        "fa2": maker(contenders.fa2_packed_call, row, inputs),
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
        "seconds": measure_all_modes(callers, clock, rounds, contenders.hot_only("varlen"))
        if "heed" in callers
        else {},
        "absent": absent,
        "wrong": wrong,
    }


def run_parts(run: Run, parts: list[str], is_quick: bool, rounds: int) -> None:
    clock = gpu_timing.EventClock()
    run.content["machine"] = gpu_machine()
    run.content["rounds"] = rounds
    run.content["target"] = heed_target()
    run.content["ceilings"] = ceilings(clock)
    print("TFLOP/s, hot / paused:", flush=True)
    for row in contenders.dense_rows(is_quick):
        if row.group in parts:
            run.add("rows", row.label, maker(measure_dense, row, clock, rounds))
    if "varlen" in parts:
        for pair in contenders.packed_rows():
            run.add("packed", pair[0].label, maker(measure_packed, pair, clock, rounds))
    import torch

    torch.cuda.empty_cache()
    for part in CHILDREN:
        if part in parts:
            run.add_child(part, child_arguments(is_quick, rounds))


def heed_target() -> str:
    """The architecture of the GPU that is measured, such as "sm_90a"."""
    import torch

    x = torch.empty(1, 1, 1, 8, device="cuda", dtype=torch.bfloat16)
    return heed.explain(heed.flash_mha, x, x, x).target


def measure(arguments: argparse.Namespace, parts: list[str]) -> Mapping[str, Any]:
    print(f"heed {heed.__version__}", flush=True)
    budget = min(arguments.budget, QUICK_SECONDS) if arguments.quick else arguments.budget
    num_children = len(set(CHILDREN) & set(parts))
    run = Run(NAME, arguments.output, budget + num_children * CHILD_SECONDS, num_children)
    run_parts(run, parts, arguments.quick, arguments.rounds or (3 if arguments.quick else 4))
    run.write()
    return run.content


def main() -> int:
    parts, default = (*ROWS, *CHILDREN), ROWS
    return command(__doc__ or "", NAME, parts, gpu_fwd_report.FORWARD, measure, BUDGET_SECONDS, default)


if __name__ == "__main__":
    sys.exit(main())
