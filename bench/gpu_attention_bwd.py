"""Attention forward and backward on an NVIDIA GPU: heed beside torch's FA2 and cuDNN, and beside JAX's cuDNN.

A step is a forward and a backward pass; the backward pass is timed by itself, too, and each of heed's with
`deterministic=True`. Otherwise as in gpu_attention_fwd.py: paired and shuffled, hot and paused, each result checked.
Prints tables and every target with met or missed, and writes `gpu_attention_bwd.json` and `.png`. Run it with `make
bench-gpu`; `--quick` measures fewer rows in a minute.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import gpu_bwd_contenders as contenders
import gpu_bwd_report
import gpu_timing
import heed
from gpu_contenders import Row
from gpu_run import Run, ceilings, child_arguments, command, gpu_machine, maker, measure_all_modes, working
from packed import PackedRow

NAME = "gpu_attention_bwd"
PARTS = (*contenders.CONTENDERS, "varlen", "jax")


def measure_dense(row: Row, clock: gpu_timing.Clock, rounds: int, device: str = "cuda") -> dict[str, Any]:
    """One dense row: everyone's times, who is absent, and whether heed's gradients are right."""
    inputs = contenders.make_inputs(row, device)
    makers = {name: maker(make, row, inputs) for name, make in contenders.CONTENDERS[row.group].items()}
    callers, absent, found = working(makers)
    wrong = contenders.wrong_gradients(row, inputs, found) if found is not None else None
    del found
    return {
        "group": row.group,
        "label": row.label,
        "tokens": row.tokens,
        "is_causal": row.is_causal,
        "tflop": row.flops * contenders.FWD_BWD_WORK / 1e12,
        "tflop_of": dict.fromkeys(contenders.BWD_ALONE, row.flops * contenders.BWD_WORK / 1e12),
        "seconds": measure_all_modes(callers, clock, rounds, contenders.HOT_ONLY) if "heed" in callers else {},
        "absent": absent,
        "wrong": wrong,
    }


def measure_packed(
    pair: tuple[PackedRow, PackedRow], clock: gpu_timing.Clock, rounds: int, device: str = "cuda"
) -> dict[str, Any]:
    """Uneven packed sequences beside equal ones with the same work."""
    row, equal = pair
    inputs, equal_inputs = (contenders.make_packed_inputs(one, device) for one in pair)
    makers = {
        "heed": maker(contenders.heed_packed_step, row, inputs),
        "heed deterministic": maker(contenders.heed_deterministic_packed_step, row, inputs),
        "heed equal": maker(contenders.heed_packed_step, equal, equal_inputs),
        "fa2": maker(contenders.fa2_packed_step, row, inputs),
    }
    callers, absent, found = working(makers)
    wrong = contenders.wrong_packed_gradients(row, inputs, found) if found is not None else None
    return {
        "label": row.label,
        "lengths": list(row.lengths),
        "equal_length": equal.lengths[0],
        "is_causal": row.is_causal,
        "tflop": row.flops * contenders.FWD_BWD_WORK / 1e12,
        "equal_tflop": equal.flops * contenders.FWD_BWD_WORK / 1e12,
        "seconds": measure_all_modes(callers, clock, rounds) if "heed" in callers else {},
        "absent": absent,
        "wrong": wrong,
    }


def run_parts(run: Run, parts: list[str], is_quick: bool, rounds: int) -> None:
    clock = gpu_timing.EventClock()
    run.content["machine"] = gpu_machine()
    run.content["rounds"] = rounds
    run.content["ceilings"] = ceilings(clock)
    print("forward + backward TFLOP/s, hot / paused:", flush=True)
    for row in contenders.dense_rows(is_quick):
        if row.group in parts:
            run.add("rows", row.label, maker(measure_dense, row, clock, rounds))
    if "varlen" in parts:
        for pair in contenders.packed_rows(is_quick):
            run.add("packed", pair[0].label, maker(measure_packed, pair, clock, rounds))
    import torch

    torch.cuda.empty_cache()
    if "jax" in parts:
        run.add_child("jax", [*child_arguments(is_quick, rounds), "--backward"])


def measure(arguments: argparse.Namespace, parts: list[str]) -> Mapping[str, Any]:
    print(f"heed {heed.__version__}", flush=True)
    budget = min(arguments.budget, 60.0) if arguments.quick else arguments.budget
    child_s = 20.0 if arguments.quick else 45.0
    run = Run(NAME, arguments.output, budget, num_children=int("jax" in parts), child_s=child_s)
    run_parts(run, parts, arguments.quick, arguments.rounds or (2 if arguments.quick else 3))
    run.write()
    return run.content


def main() -> int:
    return command(__doc__ or "", NAME, PARTS, gpu_bwd_report.BACKWARD, measure, budget_s=250.0)


if __name__ == "__main__":
    sys.exit(main())
