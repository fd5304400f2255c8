"""What the GPU benchmarks' reports share: verdicts, ratios, tables, the plot. Pure functions of the result's JSON.

`gpu_fwd_report.py` and `gpu_bwd_report.py` are the reports.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_timing import MODES
from harness import median_ratio, table

Result = Mapping[str, Any]

TITLES = {
    "d128": "D 128, 16 heads",
    "d64": "D 64, 32 heads",
    "d256": "D 256, 8 heads",
    "gqa": "D 128, 32/8 heads (GQA)",
    "window": "D 128, 32/8 heads, causal windows",
    "short": "D 128, 16 heads, short sequences",
    "few": "D 128, few queries (GQA; under a causal mask cuDNN reads one from memory)",
}
PEERS = {"fa2": "FA2 (torch)", "cudnn": "cuDNN (torch)"}

# What the portable family promises: its speed over that of torch's FA2 backend, at least.
FA2_TARGETS = {"d128": 1.0, "d64": 1.0, "d256": 0.9}
MAX_UNEVEN_TIME = 1.15  # of the same flops in equal sequences


@dataclass(frozen=True)
class Benchmark:
    """What one benchmark shows of its results."""

    title: str  # of the plot
    report: Callable[[Result], str]
    readme_block: Callable[[Result, str], str]  # (result, the plot's path)


# A card whose 8192^3 bfloat16 product makes so much is the one that goals in TFLOP/s were set for.
GOAL_MATMUL_TFLOPS = 795.0


@dataclass(frozen=True)
class Goals:
    """What the kernels written for Hopper are to reach."""

    cudnn: Mapping[bool, Mapping[int, tuple[float, float]]]  # D 128: causal, tokens: ratio to cuDNN (hot, paused)
    tflops: Mapping[tuple[str, bool], Mapping[int, float]]  # elsewhere: (group, causal), tokens
    packed: Mapping[bool, float]  # TFLOP/s by causal


@dataclass(frozen=True)
class Verdict:
    """One target beside what was measured; `measured` is None where nothing was."""

    target: str
    bound: float
    is_at_least: bool
    measured: float | None
    unit: str = ""
    where: str = ""  # the row and mode, for a target that has several

    @property
    def is_met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.bound if self.is_at_least else self.measured <= self.bound

    @property
    def share(self) -> float:
        """How far a target was reached: 1 and more where it was met."""
        measured = self.measured or 0.0
        return measured / self.bound if self.is_at_least else self.bound / max(measured, 1e-30)

    @property
    def word(self) -> str:
        return {True: "met", False: "MISSED", None: "not measured"}[self.is_met]

    @property
    def title(self) -> str:
        return f"{self.target}, {self.where}" if self.where else self.target

    @property
    def number(self) -> str:
        return "-" if self.measured is None else f"{self.measured:.4g}{self.unit}"

    @property
    def bound_text(self) -> str:
        return f"{'>=' if self.is_at_least else '<='} {self.bound:.4g}{self.unit}"


def verdict_table(found: list[Verdict]) -> str:
    """One line for each target: the worst of its rows, and how many met it."""
    lines = []
    for target in dict.fromkeys(verdict.target for verdict in found):
        same = [verdict for verdict in found if verdict.target == target]
        measured = [verdict for verdict in same if verdict.measured is not None]
        if not measured:
            lines.append([target, same[0].bound_text, "-", "", "not measured"])
            continue
        worst = min(measured, key=lambda verdict: verdict.share)
        met = sum(verdict.is_met is True for verdict in same)
        word = worst.word if len(same) == 1 else f"{met} of {len(same)} met"
        lines.append([target, worst.bound_text, worst.number, worst.where, word])
    missed = [v for v in found if v.is_met is False]
    parts = [table(["target", "bound", "worst", "where", ""], lines)]
    parts += [f"MISSED: {v.title}: {v.number}, {v.bound_text} was asked" for v in missed]
    return "\n".join(parts)


def speed(row: Result, mode: str, name: str) -> float | None:
    """TFLOP/s, or None where it was not measured."""
    samples = row["seconds"].get(mode, {}).get(name)
    work = row.get("tflop_of", {}).get(name, row["tflop"])
    return work / statistics.median(samples) if samples else None


def time_ratio(row: Result, mode: str, numerator: str, denominator: str) -> float | None:
    """Median over the rounds of the paired ratio of times, or None."""
    seconds = row["seconds"].get(mode, {})
    if not seconds.get(numerator) or not seconds.get(denominator):
        return None
    return median_ratio(seconds[numerator], seconds[denominator])


def of_group(content: Result, group: str) -> list[Result]:
    return [row for row in content.get("rows", []) if row["group"] == group]


def where_of(row: Result, mode: str) -> str:
    kind = "causal" if row["is_causal"] else "full"
    return f"S {row['tokens']} {kind}, {mode}" if "tokens" in row else f"{kind}, {mode}"


def uneven_ratio(row: Result, mode: str) -> float | None:
    """Time of the uneven sequences over that of equal ones, at equal work."""
    ratio = time_ratio(row, mode, "heed", "heed equal")
    return None if ratio is None else ratio * row["equal_tflop"] / row["tflop"]


# Tables.


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def goal(row: Result, mode: str, matmul_tflops: float | None, goals: Goals) -> float | None:
    """The goal of the Hopper kernels in TFLOP/s in this run, or None where there is none to compare with."""
    if row["group"] == "d128":
        cudnn = speed(row, mode, "cudnn")
        factors = goals.cudnn[row["is_causal"]].get(row["tokens"])
        return None if cudnn is None or factors is None else cudnn * factors[MODES.index(mode)]
    absolute = goals.tflops.get((row["group"], row["is_causal"]), {}).get(row["tokens"])
    if absolute is None or matmul_tflops is None:
        return None
    return absolute * matmul_tflops / GOAL_MATMUL_TFLOPS


def share_of(got: float | None, wanted: float | None) -> str:
    return "-" if wanted is None or got is None else f"{got / wanted:.2f}"


def target_cell(ratios: list[float | None], bound: float) -> str:
    """A bound and whether the lowest of the ratios reaches it."""
    measured = [ratio for ratio in ratios if ratio is not None]
    return f"{bound:.1f} {'not measured' if not measured else 'met' if min(measured) >= bound else 'MISSED'}"


def jax_table(content: Result, what: str = "TFLOP/s") -> str:
    header = [f"JAX, D 128, 16 heads, {what}"]
    for mode in MODES:
        header += [f"{mode}: heed", "jax.nn cuDNN", "x jax.nn"]
    lines = []
    for row in content["jax"]["rows"]:
        cells = [f"S {row['tokens']} {'causal' if row['is_causal'] else 'full'}"]
        for mode in MODES:
            cells += [number(speed(row, mode, name), 0) for name in ("heed", "cudnn")]
            cells.append(number(time_ratio(row, mode, "cudnn", "heed"), 2))
        lines.append(cells)
    return table(header, lines)


def absences(content: Result) -> list[str]:
    """Who took no part, and why: each reason once, with where it was given."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in [*content.get("rows", []), *content.get("packed", [])]:
        for name, reason in row["absent"].items():
            found.setdefault((PEERS.get(name, name), reason), []).append(row["label"])
    for row in content.get("jax", {}).get("rows", []):
        for name, reason in row["absent"].items():
            found.setdefault(("JAX's cuDNN" if name == "cudnn" else name, reason), []).append(row["label"])
    lines = []
    for (name, reason), labels in found.items():
        where = labels[0] if len(labels) == 1 else f"{len(labels)} rows, the first: {labels[0]}"
        lines.append(f"{name} absent ({where}): {reason}")
    return lines + [f"{part} absent: {reason}" for part, reason in content.get("failed", {}).items()]


def wrong_results(content: Result) -> list[str]:
    rows = [*content.get("rows", []), *content.get("packed", [])]
    return [f"WRONG RESULT: {row['wrong']}" for row in rows if row.get("wrong")]


def closing(content: Result, found: list[Verdict]) -> list[str]:
    """How every report ends: ceilings, who is absent, what is wrong, and the verdicts last."""
    parts = []
    ceilings = content.get("ceilings", {})
    if ceilings:
        parts.append(
            f"Ceilings in this run: bfloat16 8192^3 matmul {ceilings['matmul_tflops']:.0f} TFLOP/s, "
            f"device copy {ceilings['copy_tb_per_s']:.2f} TB/s read and written."
        )
    parts += absences(content) + [f"skipped, out of time: {name}" for name in content.get("skipped", [])]
    parts += wrong_results(content)
    parts.append(verdict_table(found))
    counts = {word: sum(v.word == word for v in found) for word in ("met", "MISSED", "not measured")}
    parts.append(f"targets: {counts['met']} met, {counts['MISSED']} missed, {counts['not measured']} not measured")
    return parts


def about_line(content: Result) -> str:
    """The machine and versions in one line."""
    about = content["machine"]
    versions = {"driver": about["driver"], "CUDA": about["cuda"], "cuDNN": about["cudnn"], **about["versions"]}
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return f"{about['gpu']}, bfloat16, TFLOP/s; {shown}; {about['date']}"


def summary(all_verdicts: list[Verdict]) -> str:
    """How many targets were met, and of those that were missed how often and by how much at worst."""
    found = [verdict for verdict in all_verdicts if verdict.measured is not None]
    num_met = sum(verdict.is_met is True for verdict in found)
    missed = []
    for target in dict.fromkeys(verdict.target for verdict in found):
        same = [verdict for verdict in found if verdict.target == target]
        if all(verdict.is_met for verdict in same):
            continue
        worst = min(same, key=lambda verdict: verdict.share)
        often = "" if len(same) == 1 else f" on {sum(not verdict.is_met for verdict in same)} of {len(same)} rows"
        missed.append(f"{target} ({worst.bound_text}){often}, at worst {worst.number}")
    text = f"{num_met} of {len(found)} targets were met."
    return f"{text} Missed: {'; '.join(missed)}." if missed else text


def rewritten_readme(text: str, block: str, name: str) -> str:
    """The README with the block between one benchmark's markers replaced."""
    marker = {"gpu_attention_fwd": "bench-gpu", "gpu_attention_bwd": "bench-gpu-bwd"}[name]
    begin_marker = f"<!-- {marker}:begin (written by bench/{name}.py --readme) -->"
    end_marker = f"<!-- {marker}:end -->"
    before, begin, rest = text.partition(begin_marker)
    _, end, after = rest.partition(end_marker)
    if not begin or not end:
        raise ValueError(f"the markers {begin_marker!r} and {end_marker!r} are missing")
    return f"{before}{begin_marker}\n\n{block}\n\n{end_marker}{after}"


# The plot.


def plot(content: Result, path: Path, title: str) -> bool:
    """Speed over the length, paused, one panel for each head dim and mask. False where there is nothing to draw."""
    groups = [group for group in ("d64", "d128", "d256") if of_group(content, group)]
    if not groups:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {"heed": "heed", "fa2": "torch FA2", "cudnn": "torch cuDNN"}
    colors = {"heed": "#1f6f8b", "fa2": "#e07b39", "cudnn": "#9aa5b1"}
    figure, panels = plt.subplots(2, len(groups), figsize=(4.4 * len(groups), 7), squeeze=False, sharey="col")
    for column, group in enumerate(groups):
        highest = 0.0
        for line, is_causal in enumerate((False, True)):
            axes = panels[line][column]
            rows = [row for row in of_group(content, group) if row["is_causal"] == is_causal]
            for name, label in names.items():
                points = [(row["tokens"], speed(row, "paused", name)) for row in rows]
                points = [(tokens, value) for tokens, value in points if value is not None]
                if points:
                    highest = max(highest, *(value for _, value in points if value is not None))
                    axes.plot(*zip(*points, strict=True), marker="o", label=label, color=colors[name])
            tokens = [row["tokens"] for row in rows]
            axes.set_xscale("log", base=2)
            axes.set_xticks(tokens, [str(n) for n in tokens], fontsize=8)
            axes.set_title(f"{TITLES[group]}, {'causal' if is_causal else 'full'}", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", alpha=0.3)
        panels[0][column].set_ylim(0, 1.08 * highest or 1)  # of both: they share the axis
    with_most = max(panels.flat, key=lambda axes: len(axes.get_legend_handles_labels()[0]))
    if with_most.get_legend_handles_labels()[0]:
        with_most.legend(frameon=False)
    for axes_row in panels:
        axes_row[0].set_ylabel("TFLOP/s (causal counted as half)")
    for axes in panels[-1]:
        axes.set_xlabel("tokens (batch x tokens = 16384)")
    about = content.get("machine", {})
    figure.suptitle(f"{title}, bfloat16, {about.get('gpu', 'GPU')}, paused", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return True
