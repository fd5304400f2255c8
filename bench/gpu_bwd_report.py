"""What the GPU backward benchmark says. Pure functions of the result's JSON, on top of gpu_report.py."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from gpu_report import (
    FA2_TARGETS,
    GOAL_MATMUL_TFLOPS,
    MAX_UNEVEN_TIME,
    TITLES,
    Benchmark,
    Goals,
    Result,
    Verdict,
    about_line,
    closing,
    goal,
    jax_table,
    number,
    of_group,
    share_of,
    speed,
    summary,
    target_cell,
    time_ratio,
    uneven_ratio,
    where_of,
)
from gpu_timing import MODES
from harness import table

# Beside FA2_TARGETS, which hold for a forward and a backward pass as they do for the forward pass.
MAX_DETERMINISTIC_TIME = 1.2  # of the default's

BACKWARD_GOALS = Goals(
    cudnn={
        False: {512: (1.23, 1.23), 1024: (1.11, 1.11), 2048: (1.12, 1.12), 4096: (1.12, 1.12), 8192: (1.17, 1.17),
                16384: (1.17, 1.17)},
        True: {512: (1.29, 1.29), 1024: (1.24, 1.24), 2048: (1.23, 1.23), 4096: (1.13, 1.13), 8192: (1.21, 1.21),
               16384: (1.20, 1.20)},
    },
    tflops={
        ("d64", False): {1024: 445, 4096: 510, 16384: 550},
        ("d64", True): {1024: 340, 4096: 495, 16384: 550},
        ("d256", False): {1024: 460, 4096: 505, 16384: 540},
        ("d256", True): {1024: 360, 4096: 475, 16384: 540},
        ("gqa", False): {1024: 530, 4096: 610, 16384: 650},
        ("gqa", True): {1024: 400, 4096: 550, 16384: 615},
        ("window", True): {4096: 500, 16384: 480},
    },
    packed={False: 580, True: 500},
)  # fmt: skip


def verdicts(content: Result) -> list[Verdict]:
    """Every target of this version, whether it was measured or not."""
    return [*_speed_verdicts(content), *_deterministic_verdicts(content), *_uneven_verdicts(content)]


def _speed_verdicts(content: Result) -> Iterator[Verdict]:
    for group, bound in FA2_TARGETS.items():
        rows = of_group(content, group)
        target = f"{TITLES[group]}: forward + backward speed / FA2's"
        if not rows:
            yield Verdict(target, bound, True, None)
        for row in rows:
            for mode in MODES:
                yield Verdict(target, bound, True, time_ratio(row, mode, "fa2", "heed"), where=where_of(row, mode))


def _deterministic_verdicts(content: Result) -> Iterator[Verdict]:
    """What determinism costs, of a step and of the backward pass by itself."""
    what = "deterministic=True: forward + backward time / the default's"
    rows = [*content.get("rows", []), *content.get("packed", [])]
    if not rows:
        yield Verdict(what, MAX_DETERMINISTIC_TIME, False, None)
    for row in rows:
        for mode in MODES:
            ratio = time_ratio(row, mode, "heed deterministic", "heed")
            yield Verdict(what, MAX_DETERMINISTIC_TIME, False, ratio, where=f"{row['label']}, {mode}")
    what = "deterministic=True: backward time / the default's"
    rows = [row for group in FA2_TARGETS for row in of_group(content, group)]
    if not rows:
        yield Verdict(what, MAX_DETERMINISTIC_TIME, False, None)
    for row in rows:
        ratio = time_ratio(row, "hot", "heed bwd deterministic", "heed bwd")
        yield Verdict(what, MAX_DETERMINISTIC_TIME, False, ratio, where=f"{row['label']}, hot")


def _uneven_verdicts(content: Result) -> Iterator[Verdict]:
    what = "varlen: uneven time / equal, same flops"
    packed = content.get("packed", [])
    if not packed:
        yield Verdict(what, MAX_UNEVEN_TIME, False, None)
    for row in packed:
        for mode in MODES:
            yield Verdict(what, MAX_UNEVEN_TIME, False, uneven_ratio(row, mode), where=where_of(row, mode))


# Tables.


def _kind(row: Result) -> str:
    return f"S {row['tokens']} {'causal' if row['is_causal'] else 'full'}"


def step_table(content: Result, group: str) -> str:
    """One group, forward + backward: speeds and ratios hot and paused, the target, what determinism costs."""
    bound = FA2_TARGETS.get(group)
    matmul = content.get("ceilings", {}).get("matmul_tflops")
    header = [f"forward + backward, {TITLES[group]}"]
    for mode in MODES:
        header += [f"{mode}: heed", "FA2", "cuDNN", "x FA2", "x cuDNN", "deterministic / default time", "of goal"]
        if group == "window":
            header.append("/ full time")
    header += ["x FA2 target"] if bound is not None else []
    lines = []
    for row in of_group(content, group):
        cells, ratios = [_kind(row)], []
        for mode in MODES:
            cells += [number(speed(row, mode, name), 0) for name in ("heed", "fa2", "cudnn")]
            ratios.append(time_ratio(row, mode, "fa2", "heed"))
            cells += [number(ratios[-1], 2), number(time_ratio(row, mode, "cudnn", "heed"), 2)]
            cells.append(number(time_ratio(row, mode, "heed deterministic", "heed"), 3))
            cells.append(share_of(speed(row, mode, "heed"), goal(row, mode, matmul, BACKWARD_GOALS)))
            if group == "window":
                cells.append(number(time_ratio(row, mode, "heed", "heed full causal"), 3))
        if bound is not None:
            cells.append(target_cell(ratios, bound))
        lines.append(cells)
    return table(header, lines)


def backward_table(content: Result) -> str:
    """The backward pass by itself, hot."""
    header = [
        "backward alone, hot, TFLOP/s",
        "heed",
        "FA2",
        "cuDNN",
        "x FA2",
        "x cuDNN",
        "deterministic / default time",
    ]
    lines = []
    for group in FA2_TARGETS:
        for row in of_group(content, group):
            cells = [f"{TITLES[group]}, {_kind(row)}"]
            cells += [number(speed(row, "hot", name), 0) for name in ("heed bwd", "fa2 bwd", "cudnn bwd")]
            cells += [number(time_ratio(row, "hot", name, "heed bwd"), 2) for name in ("fa2 bwd", "cudnn bwd")]
            cells.append(number(time_ratio(row, "hot", "heed bwd deterministic", "heed bwd"), 3))
            lines.append(cells)
    return table(header, lines)


def packed_table(content: Result) -> str:
    matmul = content.get("ceilings", {}).get("matmul_tflops")
    header = ["forward + backward, varlen, D 128, 16 heads, TFLOP/s"]
    for mode in MODES:
        header += [f"{mode}: heed", "heed, equal lengths", "FA2", "x FA2", "uneven / equal time"]
        header += ["deterministic / default time", "of goal"]
    lines = []
    for row in content["packed"]:
        cells = [row["label"]]
        for mode in MODES:
            got, samples = speed(row, mode, "heed"), row["seconds"].get(mode, {}).get("heed equal")
            equal = row["equal_tflop"] / statistics.median(samples) if samples else None
            wanted = BACKWARD_GOALS.packed[row["is_causal"]] * matmul / GOAL_MATMUL_TFLOPS if matmul else None
            cells += [number(got, 0), number(equal, 0), number(speed(row, mode, "fa2"), 0)]
            cells += [number(time_ratio(row, mode, "fa2", "heed"), 2), number(uneven_ratio(row, mode), 3)]
            cells += [number(time_ratio(row, mode, "heed deterministic", "heed"), 3), share_of(got, wanted)]
        lines.append(cells)
    return table(header, lines)


def report(content: Result) -> str:
    """Everything as Markdown, the verdicts last."""
    parts = [step_table(content, group) for group in TITLES if of_group(content, group)]
    if any(of_group(content, group) for group in FA2_TARGETS):
        parts.append(backward_table(content))
    if content.get("packed"):
        parts.append(packed_table(content))
    if content.get("jax", {}).get("rows"):
        parts.append(jax_table(content, "forward + backward TFLOP/s"))
    return "\n\n".join([*parts, *closing(content, verdicts(content))])


def readme_block(content: Result, plot_path: str) -> str:
    """The README's short form: forward + backward after a pause, what determinism costs, and the targets met."""
    header = ["TFLOP/s, batch x S = 16384", "heed", "torch FA2", "torch cuDNN", "x FA2", "x cuDNN", "deterministic"]
    lines = []
    for group in FA2_TARGETS:
        for row in of_group(content, group):
            cells = [f"{TITLES[group]}, {_kind(row)}"]
            cells += [number(speed(row, "paused", name), 0) for name in ("heed", "fa2", "cudnn")]
            cells += [number(time_ratio(row, "paused", name, "heed"), 2) for name in ("fa2", "cudnn")]
            cells.append(number(time_ratio(row, "paused", "heed deterministic", "heed"), 2))
            lines.append(cells)
    return "\n\n".join(
        [
            f"{about_line(content)}. Forward and backward pass together (3.5 times the forward pass' work), each block "
            'after 0.12 s of idling; causal counts as half the work. "deterministic" is the time with '
            "`deterministic=True` over the default's.",
            table(header, lines),
            f"![Attention forward and backward on the GPU: heed, torch's FA2 and cuDNN]({plot_path})",
            summary(verdicts(content)),
        ]
    )


BACKWARD = Benchmark("Attention forward + backward", report, readme_block)
