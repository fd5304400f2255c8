"""What the GPU forward benchmark says. Pure functions of the result's JSON, on top of gpu_report.py.

Targets are ratios of times in one run. Where cuDNN serves a shape it is the yardstick: heed's speed is to be so many
times its. Elsewhere a speed measured on another day is scaled by what a matrix product makes of either day's card.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

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
    time_ratio,
    uneven_ratio,
    where_of,
)
from gpu_timing import MODES
from harness import table

FORWARD_GOALS = Goals(
    cudnn={
        False: {512: (1.17, 1.17), 1024: (1.17, 1.17), 2048: (1.18, 1.17), 4096: (1.18, 1.17), 8192: (1.21, 1.17),
                16384: (1.21, 1.17)},
        True: {512: (1.32, 1.30), 1024: (1.35, 1.33), 2048: (1.32, 1.30), 4096: (1.28, 1.26), 8192: (1.28, 1.26),
               16384: (1.34, 1.26)},
    },
    tflops={
        ("d64", False): {1024: 465, 4096: 520, 16384: 548},
        ("d64", True): {1024: 380, 4096: 500, 16384: 560},
        ("d256", False): {1024: 690, 4096: 760, 16384: 800},
        ("d256", True): {1024: 470, 4096: 720, 16384: 785},
        ("gqa", False): {1024: 680, 4096: 685, 16384: 695},
        ("gqa", True): {1024: 600, 4096: 680, 16384: 740},
        ("window", True): {4096: 620, 16384: 640},
    },
    packed={False: 600, True: 560},
)  # fmt: skip

# The best peer's TFLOP/s of the day on which those goals were set: cuDNN's at D 64, full, and FA3's elsewhere. A goal
# over the peer's figure is the ratio that is asked for, to cuDNN as it is measured now.
PEER_TFLOPS = {
    ("d64", False): {1024: 442, 4096: 483, 16384: 467},
    ("d64", True): {1024: 305, 4096: 472, 16384: 537},
    ("d256", False): {1024: 684, 4096: 757, 16384: 796},
    ("d256", True): {1024: 418, 4096: 713, 16384: 781},
    ("gqa", False): {1024: 662, 4096: 667, 16384: 677},
    ("gqa", True): {1024: 536, 4096: 660, 16384: 727},
}
GOAL_WINDOW = 1024  # of the goals above
MIN_SHORT_SPEED = 1.0  # of cuDNN's, where sequences are shorter than two tiles
MIN_AUTOMATIC_SPEED = 0.97  # of the portable kernel's, whichever was chosen: that much is noise
MAX_GQA_TIME = 1.0  # of the same call with as many KV heads as query heads
MAX_WINDOW_TIME = 1.15  # of the full causal call's, for the same work

JIT_TARGETS = {  # name in the result: (what, most seconds)
    "cold_s": ("cold compile of one kernel, 2 cores", 2.0),
    "disk_s": ("load of one kernel from disk", 5e-3),
    "lookup_s": ("lookup of a loaded kernel", 1e-6),
    "launch_s": ("host cost of one launch", 2e-6),
}

CUDNN_GROUPS = ("d128", "d64", "d256", "gqa", "short")  # what cuDNN serves


def cudnn_bound(row: Result, mode: str) -> float | None:
    """How many times cuDNN's speed is asked for on a Hopper GPU, or None where nothing is."""
    group, kind, tokens = row["group"], row["is_causal"], row["tokens"]
    if group == "short":
        return MIN_SHORT_SPEED
    if group == "d128":
        factors = FORWARD_GOALS.cudnn[kind].get(tokens)
        return factors[MODES.index(mode)] if factors else None
    peer = PEER_TFLOPS.get((group, kind), {}).get(tokens)
    return FORWARD_GOALS.tflops[group, kind][tokens] / peer if peer else None


def scaled_goal(row: Result, matmul_tflops: float | None) -> float | None:
    """TFLOP/s asked for where there is no cuDNN: windows."""
    if row["group"] != "window" or row.get("window", GOAL_WINDOW) != GOAL_WINDOW:
        return None
    return goal(row, "hot", matmul_tflops, FORWARD_GOALS)


def packed_goal(row: Result, matmul_tflops: float | None) -> float | None:
    wanted = FORWARD_GOALS.packed[row["is_causal"]]
    return wanted * matmul_tflops / GOAL_MATMUL_TFLOPS if matmul_tflops else None


def per_work(row: Result, mode: str) -> float | None:
    """Time of a windowed call over the full causal call's, for the same work."""
    ratio = time_ratio(row, mode, "heed", "heed full causal")
    return ratio / row["work_share"] if ratio is not None and row.get("work_share") else None


def portable(row: Result) -> str:
    """Under which name the portable kernel was timed: heed's own choice where nobody asked for it by name."""
    return "heed sm80" if row["seconds"].get("hot", {}).get("heed sm80") else "heed"


# Targets.


def verdicts(content: Result) -> list[Verdict]:
    """Every target of this version, whether it was measured or not."""
    hopper = [*_cudnn_verdicts(content), *_scaled_verdicts(content)] if is_hopper(content) else []
    return [*hopper, *_portable_verdicts(content), *_relation_verdicts(content), *_jit_verdicts(content)]


def is_hopper(content: Result) -> bool:
    """Whether the run's GPU is one that the goals were set for; results of old do not say."""
    return str(content.get("target", "sm_90a")).startswith("sm_90")


def _judged(
    what: str, bound: float, is_at_least: bool, rows: list[Result], measured: Callable[[Result, str], float | None]
) -> Iterator[Verdict]:
    """One verdict for each row and each mode that it was measured in; one that says so if nothing was."""
    found = [
        Verdict(what, bound, is_at_least, value, where=where_of(row, mode))
        for row in rows
        for mode in MODES
        if (value := measured(row, mode)) is not None
    ]
    yield from found or [Verdict(what, bound, is_at_least, None)]


def _cudnn_verdicts(content: Result) -> Iterator[Verdict]:
    for group in CUDNN_GROUPS:
        what = f"{TITLES[group]}: speed / cuDNN's"
        found = []
        for row in of_group(content, group):
            for mode in MODES:
                bound = cudnn_bound(row, mode)
                if bound is not None:
                    ratio = time_ratio(row, mode, "cudnn", "heed")
                    found.append(Verdict(what, bound, True, ratio, where=where_of(row, mode)))
        yield from found or [Verdict(what, 1.0, True, None)]


def _scaled_verdicts(content: Result) -> Iterator[Verdict]:
    """Speeds over goals that were scaled by the matrix product."""
    matmul = content.get("ceilings", {}).get("matmul_tflops")

    def share(wanted: Callable[[Result, float | None], float | None]) -> Callable[[Result, str], float | None]:
        def measured(row: Result, mode: str) -> float | None:
            got, goal_now = speed(row, mode, "heed"), wanted(row, matmul)
            return None if got is None or goal_now is None else got / goal_now

        return measured

    what = f"causal window {GOAL_WINDOW}: speed / goal (as the matmul scales it)"
    yield from _judged(what, 1.0, True, of_group(content, "window"), share(scaled_goal))
    what = "varlen, very uneven lengths: speed / goal (as the matmul scales it)"
    yield from _judged(what, 1.0, True, content.get("packed", []), share(packed_goal))


def _portable_verdicts(content: Result) -> Iterator[Verdict]:
    for group, bound in FA2_TARGETS.items():
        what = f"{TITLES[group]}: the portable kernel's speed / FA2's"
        rows = of_group(content, group)
        yield from _judged(what, bound, True, rows, lambda row, mode: time_ratio(row, mode, "fa2", portable(row)))
    rows = [*content.get("rows", []), *content.get("packed", [])]
    what = "the automatic choice: speed / the portable kernel's"
    yield from _judged(
        what, MIN_AUTOMATIC_SPEED, True, rows, lambda row, mode: time_ratio(row, mode, "heed sm80", "heed")
    )


def _relation_verdicts(content: Result) -> Iterator[Verdict]:
    """heed's own times against each other."""
    gqa, windows = of_group(content, "gqa"), of_group(content, "window")
    what = "GQA 32/8: time / MHA's"
    yield from _judged(what, MAX_GQA_TIME, False, gqa, lambda row, mode: time_ratio(row, mode, "heed", "heed MHA"))
    yield from _judged("causal windows: time / full causal, same work", MAX_WINDOW_TIME, False, windows, per_work)
    what = "varlen: uneven time / equal, same flops"
    yield from _judged(what, MAX_UNEVEN_TIME, False, content.get("packed", []), uneven_ratio)


def _jit_verdicts(content: Result) -> Iterator[Verdict]:
    for name, (what, bound) in JIT_TARGETS.items():
        scale, unit = (1.0, " s") if bound >= 1 else (1e3, " ms") if bound >= 1e-3 else (1e6, " us")
        measured = content.get("jit", {}).get(name)
        yield Verdict(what, bound * scale, False, None if measured is None else measured * scale, unit)


# Tables.

Column = tuple[str, Callable[[Result, str], str]]


def _speed(name: str) -> Callable[[Result, str], str]:
    return lambda row, mode: number(speed(row, mode, name), 0)


def _times(name: str) -> Callable[[Result, str], str]:
    """heed's speed over someone's."""
    return lambda row, mode: number(time_ratio(row, mode, name, "heed"), 2)


def _bound_cell(row: Result, mode: str) -> str:
    bound, ratio = cudnn_bound(row, mode), time_ratio(row, mode, "cudnn", "heed")
    if bound is None:
        return "-"
    return f"{bound:.2f} {Verdict('', bound, True, ratio).word}"


def _table(title: str, rows: list[Result], label: Callable[[Result], str], columns: list[Column]) -> str:
    """A line for each row, the columns hot and paused; a column that says nothing is left out."""
    header, cells = [title], [[label(row)] for row in rows]
    for mode in MODES:
        is_first = True
        for name, cell in columns:
            column = [cell(row, mode) for row in rows]
            if all(text == "-" for text in column):
                continue
            header.append(f"{mode}: {name}" if is_first else name)
            is_first = False
            for line, text in zip(cells, column, strict=True):
                line.append(text)
    return table(header, cells)


def dense_label(row: Result) -> str:
    """The row, and which kernel heed chose."""
    window = f" window {row['window']}" if row.get("window", -1) >= 0 else ""
    kernel = f" ({row['kernel'].partition('_')[0]})" if row.get("kernel") else ""
    if row["group"] == "few":
        return row["label"].partition(", ")[2] + kernel
    return f"S {row['tokens']} {'causal' if row['is_causal'] else 'full'}{window}{kernel}"


def dense_table(content: Result, group: str) -> str:
    """One group: speeds and ratios, and the target beside cuDNN or, without one, the share of the goal."""
    matmul = content.get("ceilings", {}).get("matmul_tflops")
    columns: list[Column] = [("heed", _speed("heed")), ("cuDNN", _speed("cudnn")), ("x cuDNN", _times("cudnn"))]
    if is_hopper(content):
        columns += [
            ("target", _bound_cell),
            ("of goal", lambda row, mode: share_of(speed(row, mode, "heed"), scaled_goal(row, matmul))),
        ]
    columns += [
        ("FA2", _speed("fa2")),
        ("x FA2", _times("fa2")),
        ("sm80", _speed("heed sm80")),
        ("x sm80", _times("heed sm80")),
        ("/ MHA time", lambda row, mode: number(time_ratio(row, mode, "heed", "heed MHA"), 3)),
        ("/ full time", lambda row, mode: number(time_ratio(row, mode, "heed", "heed full causal"), 3)),
        ("/ full time, same work", lambda row, mode: number(per_work(row, mode), 3)),
    ]
    return _table(TITLES[group], of_group(content, group), dense_label, columns)


def packed_table(content: Result) -> str:
    matmul = content.get("ceilings", {}).get("matmul_tflops")

    def equal_speed(row: Result, mode: str) -> str:
        samples = row["seconds"].get(mode, {}).get("heed equal")
        return number(row["equal_tflop"] / statistics.median(samples) if samples else None, 0)

    columns: list[Column] = [
        ("heed", _speed("heed")),
        ("heed, equal lengths", equal_speed),
        ("uneven / equal time", lambda row, mode: number(uneven_ratio(row, mode), 3)),
        ("of goal", lambda row, mode: share_of(speed(row, mode, "heed"), packed_goal(row, matmul))),
        ("FA2", _speed("fa2")),
        ("x FA2", _times("fa2")),
        ("sm80", _speed("heed sm80")),
        ("x sm80", _times("heed sm80")),
    ]
    return _table("varlen, D 128, 16 heads, TFLOP/s", content["packed"], lambda row: str(row["label"]), columns)


def report(content: Result) -> str:
    """Everything as Markdown, the verdicts last."""
    parts = [dense_table(content, group) for group in TITLES if of_group(content, group)]
    if content.get("packed"):
        parts.append(packed_table(content))
    if content.get("jax", {}).get("rows"):
        parts.append(jax_table(content))
    overhead = content.get("jax", {}).get("overhead_us", {})
    if overhead:
        parts.append(table(["one tiny call, microseconds", "measured"], [[k, f"{v:.1f}"] for k, v in overhead.items()]))
    details = content.get("jit", {}).get("details", {})
    if details:
        parts.append(table(["JIT", "measured"], [[k, str(v)] for k, v in details.items()]))
    return "\n\n".join([*parts, *closing(content, verdicts(content))])


def readme_block(content: Result, plot_path: str) -> str:
    """The README's short form: speeds and ratios after a pause, ratios hot, and the targets met."""
    header = ["TFLOP/s, batch x S = 16384", "heed", "torch cuDNN", "x cuDNN", "hot: x cuDNN", "x FA2", "x heed's sm80"]
    lines = []
    for group in CUDNN_GROUPS:
        for row in of_group(content, group):
            cells = [f"{TITLES[group]}, S {row['tokens']} {'causal' if row['is_causal'] else 'full'}"]
            cells += [number(speed(row, "paused", name), 0) for name in ("heed", "cudnn")]
            cells += [number(time_ratio(row, mode, "cudnn", "heed"), 2) for mode in ("paused", "hot")]
            cells += [number(time_ratio(row, "hot", name, "heed"), 2) for name in ("fa2", "heed sm80")]
            lines.append(cells)
    return "\n\n".join(
        [
            f"{about_line(content)}. heed, cuDNN and the first ratio: each block of launches follows 0.12 s of idling; "
            "the other ratios: launches back to back. Causal counts as half the work. "
            "The ratios are medians of paired time ratios; all contenders alternate in one process. "
            "[docs/gpu.md](docs/gpu.md) says how it is measured.",
            table(header, lines),
            f"![Attention forward on the GPU: heed, torch's FA2 and cuDNN]({plot_path})",
            summary(verdicts(content)),
        ]
    )


FORWARD = Benchmark("Attention forward", report, readme_block)
