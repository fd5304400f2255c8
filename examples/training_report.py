"""What is shown of a training run: both loss curves side by side, the time of a step, and the README's short form."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLORS = {"heed": "#1f6f8b", "naive": "#e07b39"}


def largest_difference(losses: Mapping[str, Sequence[float]]) -> float:
    """Between the two paths' losses of one step."""
    ours, theirs = losses.values()
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def median_after_first(seconds: Sequence[float]) -> float:
    """Of all steps but the first, which touches its memory for the first time."""
    return statistics.median(seconds[1:] or seconds)


def plot(losses: Mapping[str, Sequence[float]], seconds: Mapping[str, float], title: str, path: Path) -> None:
    """Draws one panel for each path, with the other's curve under its own, and bars of seconds per step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(losses)
    ratios = [*([3] * len(names)), 1.6]
    figure, panels = plt.subplots(1, len(names) + 1, figsize=(12, 4), width_ratios=ratios)
    for name, axes in zip(names, panels, strict=False):
        if axes is not panels[0]:
            axes.sharey(panels[0])
        for other in names:
            if other != name:
                axes.plot(range(1, len(losses[other]) + 1), losses[other], color="#c9d1d8", linewidth=7, label=other)
        axes.plot(
            range(1, len(losses[name]) + 1), losses[name], color=COLORS[name], marker="o", markersize=3, label=name
        )
        axes.set_title(f"loss with {name} attention", fontsize=10)
        axes.set_xlabel("step")
        axes.legend(frameon=False)
    largest = largest_difference(losses)
    panels[0].set_ylabel("cross entropy per token")
    panels[1].annotate(f"largest difference {largest:.1e}", (0.03, 0.04), xycoords="axes fraction", fontsize=9)
    bars = panels[-1].bar(names, [seconds[name] for name in names], color=[COLORS[name] for name in names])
    panels[-1].bar_label(bars, fmt="%.2f s", fontsize=9, padding=2)
    panels[-1].set_title("time per step (median)", fontsize=10)
    panels[-1].set_ylim(0, 1.15 * max(seconds.values()))
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


README_BEGIN = "<!-- train-demo:begin (written by examples/train.py --readme) -->"
README_END = "<!-- train-demo:end -->"


def readme_block(content: Mapping[str, Any], picture: str) -> str:
    """The run in a few lines: what was trained, how close the curves are, and what each step cost."""
    paths, held_out = content["paths"], content["held_out_loss"]
    losses = {name: path["losses"] for name, path in paths.items()}
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    about = f"{content['title']}; {len(losses['heed'])} steps; {versions}; {content['date']}"
    rows = {
        "seconds per step (forward, backward, AdamW)": lambda name: f"{median_after_first(paths[name]['seconds']):.2f}",
        "scratch memory of a step": lambda name: f"{paths[name]['scratch_bytes'] / 1e9:.2f} GB",
        "loss of the first and the last step": lambda name: f"{losses[name][0]:.4f}, {losses[name][-1]:.4f}",
        f"loss on held-out text, {held_out['before']:.4f} before": lambda name: f"{held_out[name]:.4f}",
    }
    table = ["|  | heed | naive |", "|---|---|---|"]
    table += [f"| {label} | {show('heed')} | {show('naive')} |" for label, show in rows.items()]
    return "\n\n".join(
        [
            f"{about}. The two loss curves differ by at most {largest_difference(losses):.1e}.",
            "\n".join(table),
            f"![Loss curves of heed and of plain attention, and their time per step]({picture})",
        ]
    )


def write_readme(readme: Path, results: Path) -> None:
    """Puts the run of `results` (a folder beside the README) between the README's markers."""
    content = json.loads((results / "train_demo.json").read_text())
    block = readme_block(content, str((results / "train_demo.png").relative_to(readme.parent)))
    before, begin, rest = readme.read_text().partition(README_BEGIN)
    _, end, after = rest.partition(README_END)
    if not begin or not end:
        raise ValueError(f"the markers {README_BEGIN!r} and {README_END!r} are missing")
    readme.write_text(f"{before}{begin}\n\n{block}\n\n{end}{after}")
