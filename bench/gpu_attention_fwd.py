"""Attention forward on an NVIDIA GPU: heed beside torch's FA2 and cuDNN, and beside JAX's cuDNN.

All contenders of a row alternate in one process, hot (launches back to back) and paused (after idling for 0.12 s);
ratios are medians of the paired ratios. Prints tables and every target with met or missed, and writes
`gpu_attention_fwd.json` and `.png`. Run it with `make bench-gpu`; `--quick` measures fewer rows in a minute.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import gpu_contenders as contenders
import gpu_report
import gpu_timing
import heed
from gpu_run import Run, ceilings, child_arguments, command, gpu_machine, maker, measure_all_modes, working
from packed import PackedRow

NAME = "gpu_attention_fwd"
PARTS = (*contenders.CONTENDERS, "varlen", "jit", "jax")


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
        "tflop": row.flops / 1e12,
        "seconds": measure_all_modes(callers, clock, rounds) if "heed" in callers else {},
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
        "seconds": measure_all_modes(callers, clock, rounds) if "heed" in callers else {},
        "absent": absent,
        "wrong": wrong,
    }


def run_parts(run: Run, parts: list[str], is_quick: bool, rounds: int) -> None:
    clock = gpu_timing.EventClock()
    run.content["machine"] = gpu_machine()
    run.content["rounds"] = rounds
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
    for part in ("jit", "jax"):
        if part in parts:
            run.add_child(part, child_arguments(is_quick, rounds))


def measure(arguments: argparse.Namespace, parts: list[str]) -> Mapping[str, Any]:
    print(f"heed {heed.__version__}", flush=True)
    run = Run(NAME, arguments.output, arguments.budget, num_children=len({"jit", "jax"} & set(parts)))
    run_parts(run, parts, arguments.quick, arguments.rounds or (3 if arguments.quick else 5))
    run.write()
    return run.content


def main() -> int:
    return command(__doc__ or "", NAME, PARTS, gpu_report.FORWARD, measure, budget_s=400.0)


if __name__ == "__main__":
    sys.exit(main())
