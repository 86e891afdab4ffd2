"""Atari Breakout with raw frames: milliseconds a step, beside Gymnasium's AsyncVectorEnv in the same run.

Steps `BreakoutNoFrameskip-v4` (210 x 160 x 3 bytes a frame) with aiovec and with Gymnasium, shared memory on and
off, in rounds that take turns. All four get the same seed and the same random actions, so they must see the same
frames, which is checked after every round. Shows a table of medians, and writes a picture of what the envs see.
Needs `pip install '.[examples]'` in the repository:

    python examples/breakout.py --num-envs 5
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import ale_py
import gymnasium as gym
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import aiovec

gym.register_envs(ale_py)

NUM_ACTIONS = 4  # nothing, fire, right, left
SEED = 1


@dataclass(frozen=True)
class Arguments:
    """What can be chosen on the command line."""

    num_envs: Annotated[int, "How many Breakouts are stepped at once."] = 5
    steps: Annotated[int, "How many steps each vector takes in a round."] = 300
    rounds: Annotated[int, "How many rounds each vector has, in turns; a first one, to warm up, is not counted."] = 7
    num_workers: Annotated[int | None, "aiovec's processes; by default one for each CPU."] = None
    output: Annotated[Path, "Where the picture goes."] = Path("out/breakout.png")


def parse_arguments() -> Arguments:
    """Each field of `Arguments` is an option."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    hints = get_type_hints(Arguments, include_extras=True)
    for field in dataclasses.fields(Arguments):
        option, sentence = f"--{field.name.replace('_', '-')}", hints[field.name].__metadata__[0]
        kind = int if field.default is None else type(field.default)
        parser.add_argument(option, type=kind, default=field.default, help=sentence)
    return Arguments(**vars(parser.parse_args()))


def breakout() -> gym.Env[Any, Any]:
    """Builds one env, in its worker: a function of this very file, which travels there by itself."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # else every env greets
    return gym.make("BreakoutNoFrameskip-v4")


@dataclass(frozen=True)
class Moment:
    """What an env saw when it had the most points so far."""

    frame: Any
    score: float
    lives: int


@dataclass
class Record:
    """What is known of one vector: how long its rounds took, and what it saw."""

    num_envs: int
    processes: int
    seconds: list[float] = dataclasses.field(default_factory=list)
    observations: Any = None
    moments: dict[int, Moment] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scores = np.zeros(self.num_envs)
        self.scored = np.ones(self.num_envs, bool)

    def see(self, observations: Any, rewards: Any, infos: dict[str, Any]) -> None:
        """What a training loop would do at the least: look at everything once."""
        self.observations = observations
        self.scores = np.where(infos["episode_frame_number"] == 0, 0, self.scores + rewards)
        for i in np.flatnonzero(self.scored).tolist():  # the screen counts a frame late
            if i not in self.moments or self.scores[i] > self.moments[i].score:
                self.moments[i] = Moment(observations[i].copy(), self.scores[i], infos["lives"][i])
        self.scored = rewards > 0


async def play(envs: aiovec.AsyncVectorEnv, record: Record, actions: Any) -> None:
    """A round of ours, on the loop."""
    begin = time.perf_counter()
    for row in actions:
        observations, rewards, _terminations, _truncations, infos = await envs.step(row)
        record.see(observations, rewards, infos)
    record.seconds.append(time.perf_counter() - begin)


def play_blocking(envs: gym.vector.AsyncVectorEnv, record: Record, actions: Any) -> None:
    """A round of Gymnasium's: the same lines without `await`."""
    begin = time.perf_counter()
    for row in actions:
        observations, rewards, _terminations, _truncations, infos = envs.step(row)
        record.see(observations, rewards, infos)
    record.seconds.append(time.perf_counter() - begin)


def compare(args: Arguments, console: Console) -> dict[tuple[str, str], Record]:
    """All rounds of all vectors; the keys are the library and whether its shared memory is on.

    Gymnasium's `step` blocks whoever calls it. So it is called outside of the event loop, which stands still
    between two rounds of ours; nobody else's round runs meanwhile.
    """
    makers = [breakout] * args.num_envs
    rng = np.random.default_rng(SEED)
    records: dict[tuple[str, str], Record] = {}

    def close(envs: aiovec.AsyncVectorEnv) -> None:
        runner.run(envs.close())

    columns = TextColumn("{task.description:9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with (
        asyncio.Runner() as runner,
        contextlib.ExitStack() as ends,
        Progress(*columns, console=console, auto_refresh=False) as progress,
    ):
        bar = progress.add_task("starting", total=4 * (args.rounds + 1))
        theirs, ours = {}, {}
        for shared in ("on", "off"):
            theirs[shared] = gym.vector.AsyncVectorEnv(makers, shared_memory=shared == "on")
            ends.callback(theirs[shared].close, terminate=True)  # it cannot ask them after a Ctrl-C
            theirs[shared].reset(seed=SEED)
            records["gymnasium", shared] = Record(args.num_envs, processes=args.num_envs)
        for shared in ("on", "off"):
            ours[shared] = aiovec.AsyncVectorEnv(makers, num_workers=args.num_workers, shared_memory=shared == "on")
            ends.callback(close, ours[shared])
            runner.run(ours[shared].reset(seed=SEED))
            records["aiovec", shared] = Record(args.num_envs, ours[shared].num_workers)
        for _ in range(args.rounds + 1):
            actions = rng.integers(NUM_ACTIONS, size=(args.steps, args.num_envs))
            for (library, shared), record in records.items():
                progress.update(bar, description=library, refresh=True)
                if library == "aiovec":
                    runner.run(play(ours[shared], record, actions))
                else:
                    play_blocking(theirs[shared], record, actions)
                progress.advance(bar)
            for record in records.values():
                np.testing.assert_array_equal(record.observations, records["gymnasium", "on"].observations)
    return records


def table_of(args: Arguments, records: dict[tuple[str, str], Record]) -> Table:
    """Medians over the rounds; the last column says how many times as fast as Gymnasium's at that setting."""
    title = f"Breakout, {args.num_envs} envs, raw frames; median of {args.rounds} rounds of {args.steps} steps"
    table = Table(title=title)
    table.add_column("vector")
    for heading in ("shared memory", "processes", "ms a step", "frames/s", "Gymnasium = 1"):
        table.add_column(heading, justify="right")
    milliseconds = {key: statistics.median(record.seconds[1:]) / args.steps * 1e3 for key, record in records.items()}
    for library, shared in sorted(records, key=lambda key: key[0]):
        own = milliseconds[library, shared]
        table.add_row(
            library,
            shared,
            str(records[library, shared].processes),
            f"{own:.2f}",
            f"{args.num_envs / own * 1e3:,.0f}",
            f"{milliseconds['gymnasium', shared] / own:.2f} x",
            style="bold" if library == "aiovec" else "",
        )
    return table


def draw(record: Record, path: Path) -> None:
    """The best moment of each env, side by side."""
    count = len(record.moments)
    columns = min(count, 5)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(2.2 * columns, 7.5), 3.1 * rows + 0.4), dpi=150, layout="constrained")
    figure.suptitle("BreakoutNoFrameskip-v4: what the envs saw at their best moment, with random actions", fontsize=12)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for index, moment in sorted(record.moments.items()):
        axes[index].imshow(moment.frame, interpolation="nearest")
        axes[index].set_title(f"env {index}: score {moment.score:.0f}, lives {moment.lives}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Rounds, then the table and the picture."""
    args, console = parse_arguments(), Console()
    try:
        records = compare(args, console)
    except KeyboardInterrupt:
        console.print("stopped by Ctrl-C")
        sys.exit(130)
    console.print(table_of(args, records))
    console.print("The frames of all four were the same after every round.")
    draw(records["aiovec", "on"], args.output)
    console.print(f"Picture: {args.output}", soft_wrap=True)


if __name__ == "__main__":
    main()
