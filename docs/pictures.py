"""Draws the pictures of the README: ``python docs/pictures.py``.

`architecture.svg` is drawn here; `bench.svg` from `bench.json`, which ``nox -s bench -- --json docs/bench.json`` writes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")  # no window, and the same picture everywhere

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).resolve().parent
INK, PAPER = "#1c2733", "#ffffff"
LOOP, MEMORY, WORKER, ENV = "#dbe9f6", "#fdf0d5", "#e3f1e1", "#c4e0c0"
OURS, THEIRS, LIMIT = "#2a6fb0", "#c2553f", "#b9c2cb"


def main() -> None:
    """Writes both pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bench", type=Path, default=HERE / "bench.json", help="what the benchmark has measured")
    parser.add_argument("--to", type=Path, default=HERE, help="the folder for the pictures")
    arguments = parser.parse_args()
    mpl.rcParams.update(
        {"svg.hashsalt": "aiovec", "svg.fonttype": "none", "font.family": "sans-serif", "text.color": INK}
    )
    draw_architecture(arguments.to / "architecture.svg")
    draw_bench(json.loads(arguments.bench.read_text()), arguments.to / "bench.svg")


def draw_architecture(path: Path) -> None:
    """Your process, the shared memory, and two workers."""
    figure, axes = plt.subplots(figsize=(9, 4.6))
    axes.set(xlim=(0, 90), ylim=(0, 46))
    axes.axis("off")
    _box(axes, 1, 1, 30, 43, LOOP, "your process: one event loop")
    _box(axes, 4, 29, 24, 9, PAPER, "your tasks", "await envs.step(actions)")
    _box(axes, 4, 16.5, 24, 9, PAPER, "AsyncVectorEnv", "states, sequence numbers,\nwho is asked")
    _box(axes, 4, 4, 24, 9, PAPER, "the pool", "a socket a worker, on the loop;\na pidfd tells of its end")
    _arrow(axes, (16, 29), (16, 25.5))
    _arrow(axes, (16, 16.5), (16, 13))
    _box(axes, 36.5, 9, 17, 29, MEMORY, "shared memory", "a nameless file\n(memfd)")
    for row, name in enumerate(("observations", "actions", "rewards, flags", "small infos")):
        _box(axes, 38, 24.5 - 4.6 * row, 14, 3.8, PAPER, name, bold=False)
    for worker, bottom in enumerate((24, 1)):
        _box(axes, 59, bottom, 30, 20, WORKER, f"worker {worker}: a fresh interpreter")
        for env in range(4):
            _box(axes, 61.5 + 6.5 * env, bottom + 9, 5.5, 5.5, ENV, f"env {4 * worker + env}", bold=False)
        note = "steps its envs, writes rows in place;\nends with your process"
        axes.text(74, bottom + 4.5, note, ha="center", va="center", fontsize=8)
    _arrow(axes, (28, 10), (36.5, 16), both=True)
    _arrow(axes, (59, 34), (53.5, 30), both=True)
    _arrow(axes, (59, 12), (53.5, 16), both=True)
    _arrow(axes, (28, 6), (59, 4), both=True, dashed=True)
    axes.text(45, 1.2, "a socket to each worker: requests,\nexceptions, large infos", ha="center", fontsize=8)
    _save(figure, path)


def draw_bench(measured: dict[str, Any], path: Path) -> None:
    """Speeds as shares of bare processes, which step their envs and talk to nobody; with env-steps a second."""
    rows = [row for row in measured["rows"] if row["bare_seconds"] > 1e-6]  # trivial envs take no time at all
    figure, axes = plt.subplots(figsize=(9, 0.75 * len(rows) + 1.5), layout="constrained")
    shown = (("lock-step limit", "limit_seconds", LIMIT), ("aiovec", "aiovec_seconds", OURS))
    shown += (("Gymnasium AsyncVectorEnv", "gymnasium_seconds", THEIRS),)
    for index, (name, key, colour) in enumerate(shown):
        of_rows = [(number, row) for number, row in enumerate(rows) if row[key]]
        positions = [number + 0.27 * (index - 1) for number, _ in of_rows]
        shares = [row["bare_seconds"] / row[key] for _, row in of_rows]
        axes.barh(positions, shares, height=0.25, color=colour, label=name)
        for position, share, (_, row) in zip(positions, shares, of_rows, strict=True):
            axes.text(share + 0.008, position, f"{row['num_envs'] / row[key]:,.0f}", va="center", fontsize=7.5)
    axes.set_yticks(range(len(rows)), [row["name"].removeprefix("step, ") for row in rows])
    axes.set(xlim=(0, 1.08), xlabel="speed, as a share of bare processes; the numbers are env-steps a second")
    axes.invert_yaxis()
    axes.set_title(f"step, 2 workers ({measured['heading']})", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8.5, loc="outside lower center", ncols=3)
    _save(figure, path)


def _box(
    axes: Axes,
    left: float,
    bottom: float,
    width: float,
    height: float,
    colour: str,
    title: str,
    text: str = "",
    *,
    bold: bool = True,
) -> None:
    outline = FancyBboxPatch(
        (left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.8", facecolor=colour, edgecolor=INK, lw=0.8
    )
    axes.add_patch(outline)
    is_small = not bold
    middle = bottom + height / 2 if is_small else bottom + height - 2.2
    axes.text(
        left + width / 2,
        middle,
        title,
        ha="center",
        va="center",
        fontsize=8 if is_small else 9.5,
        weight="bold" if bold else "normal",
    )
    if text:
        axes.text(left + width / 2, bottom + height - 4.1, text, ha="center", va="top", fontsize=8)


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], *, both: bool = False, dashed: bool = False
) -> None:
    style = {"arrowstyle": "<->" if both else "->", "color": INK, "lw": 1.1, "linestyle": "--" if dashed else "-"}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight", facecolor=PAPER, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
