"""`evaluate_while_training.py`: what it prints, that it learns, that a seed repeats it, and that Ctrl-C ends it."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from example_runs import interrupt, run

ROW = re.compile(r"^ +(\d+) +([\d,]+) +([\d.]+) +([\d.]+) +([\d.]+) +(\d+) +([\d.]+)$", re.MULTILINE)
SPLIT = re.compile(r"of ([\d.]+) s: training ([\d.]+) s, evaluation ([\d.]+) s, both at once ([\d.]+) s: .* in (\d+)%")
NAME = "evaluate_while_training.py"


def rows_of(printed: str) -> list[list[float]]:
    """Version, env steps, return in training, mean and worst of the evaluation, versions behind, seconds."""
    return [[float(column.replace(",", "")) for column in row] for row in ROW.findall(printed)]


def assert_split_sums(line: str) -> None:
    match = SPLIT.match(line)
    assert match is not None
    whole, training, evaluation, both = map(float, match.groups()[:4])
    assert 0 <= both <= min(training, evaluation)
    # A cancelled training goes on for no time after the evaluation, which has no time of its own but the last row's.
    assert training + evaluation - both <= whole + 0.03
    # A short run takes so little time that most of a figure may be what two digits leave out.
    share, left_out = int(match[5]) / 100, 0.005
    assert share > 0
    assert both - left_out <= (share + left_out) * (evaluation + left_out)
    assert both + left_out >= (share - left_out) * (evaluation - left_out)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_each_version_has_its_row(tmp_path: Path, loop: str) -> None:
    """More envs in the evaluation than in the training: it is the slower one, and falls behind."""
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    arguments = ["--population=4", "--elite=2", "--episodes=8", "--max-versions=3", "--solved-return=501"]
    printed = run(tmp_path, NAME, *arguments, "--output=here", f"--loop={loop}")
    rows = rows_of(printed)
    assert [row[0] for row in rows] == [1, 2, 3]
    assert all(earlier[1] < later[1] for earlier, later in itertools.pairwise(rows))
    assert all(0 < worst <= mean <= 500 for _, _, _, mean, worst, _, _ in rows)
    assert all(0 <= behind <= 3 - version for version, *_, behind, _ in rows)
    *_, ended, split, weights = printed.splitlines()
    best = max(rows, key=lambda row: row[3])
    assert ended.startswith(
        f"not solved: version {best[0]:.0f} has a mean return of {best[3]:.1f}, after {best[1]:,.0f} "
    )
    assert_split_sums(split)
    assert weights == "Weights: here/weights.npy"
    assert np.load(tmp_path / "here/weights.npy").shape == (4, 2)


def test_it_learns_cartpole_and_repeats_it(tmp_path: Path) -> None:
    """Each of ten seeds took at most 50 000 steps; weights that have learned nothing have a mean return of some 20."""
    arguments = ["--seed=1", "--max-versions=30"]
    first = run(tmp_path, NAME, *arguments)
    ended, split, _weights = first.splitlines()[-3:]
    assert ended.startswith("solved: ")
    assert_split_sums(split)
    rows = rows_of(first)
    assert rows[-1][3] >= 475
    assert rows[-1][1] <= 100_000
    assert all(row[3] < 475 for row in rows[:-1])

    again = rows_of(run(tmp_path, NAME, *arguments, "--training-workers=2", "--queue-versions=1"))
    assert [row[:5] for row in again] == [row[:5] for row in rows]  # all but what depends on time


def test_ctrl_c_tells_what_is_known(tmp_path: Path) -> None:
    arguments = ["--solved-return=501", "--max-versions=100000", "--episodes=4"]
    *_, ended, split, weights = interrupt(tmp_path, " 2 ", NAME, *arguments)
    assert re.match(r"stopped by Ctrl-C, every worker has ended: version \d+ has a mean return of", ended)
    assert_split_sums(split)
    assert weights == "Weights: out/weights.npy"
    assert np.load(tmp_path / "out/weights.npy").shape == (4, 2)
