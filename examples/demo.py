"""Two vectors, one event loop: CartPole and Breakout under `await` at the same time, watched live.

Shows the steps per second of both, their episode returns as they come, and how long a heartbeat of 5 ms really
takes beside them: the loop stays free. Then writes two pictures. Ctrl-C ends it cleanly, at any moment once it
has begun. Where stdout is no terminal it prints a plain line a second. The policies are random, the envs are real.
Needs `pip install '.[examples]'` in the repository:

    python examples/demo.py --seconds 15
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import ale_py
import gymnasium as gym
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

import aiovec

BEAT_SECONDS = 0.005
SEED = 1


@dataclass(frozen=True)
class Arguments:
    """What can be chosen on the command line."""

    seconds: Annotated[float, "How long both play."] = 15.0
    num_cartpoles: Annotated[int, "How many CartPoles are stepped at once."] = 64
    num_breakouts: Annotated[int, "How many Breakouts are stepped at once."] = 5
    output: Annotated[Path, "The folder for the two pictures."] = Path("out")


def parse_arguments() -> Arguments:
    """Each field of `Arguments` is an option."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    hints = get_type_hints(Arguments, include_extras=True)
    for argument in dataclasses.fields(Arguments):
        option, sentence = f"--{argument.name.replace('_', '-')}", hints[argument.name].__metadata__[0]
        parser.add_argument(option, type=type(argument.default), default=argument.default, help=sentence)
    return Arguments(**vars(parser.parse_args()))


def breakout() -> gym.Env[Any, Any]:
    """Builds one env, in its worker: a function of this very file, which travels there by itself."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # else every env greets
    return gym.make("BreakoutNoFrameskip-v4")


@dataclass
class Score:
    """What is known of one vector; its player writes it, the display reads it."""

    name: str
    num_envs: int
    num_workers: int
    env_steps: int = 0
    episodes: int = 0
    latest_returns: deque[float] = field(default_factory=lambda: deque(maxlen=100))
    rate: float = 0.0
    env_steps_shown: int = 0
    pictures: dict[int, tuple[float, Any]] = field(default_factory=dict)

    def measure(self, seconds: float) -> None:
        """Takes the env steps a second, over the `seconds` since it was called before."""
        self.rate = (self.env_steps - self.env_steps_shown) / seconds
        self.env_steps_shown = self.env_steps

    @property
    def mean_return(self) -> str:
        """Of the last 100 episodes."""
        return f"{statistics.fmean(self.latest_returns):.1f}" if self.latest_returns else "-"


@dataclass
class Heartbeat:
    """How long sleeps of 5 ms took."""

    beats: int = 0
    longest: float = 0.0
    longest_since_shown: float = 0.0

    def take_latest(self) -> float:
        """The longest one since this was called before."""
        latest, self.longest_since_shown = self.longest_since_shown, 0.0
        return latest

    async def beat(self, deadline: float) -> None:
        """Sleeps, and looks at the clock."""
        last = time.perf_counter()
        while last < deadline:
            await asyncio.sleep(BEAT_SECONDS)
            now = time.perf_counter()
            self.beats += 1
            self.longest_since_shown = max(self.longest_since_shown, now - last)
            self.longest = max(self.longest, now - last)
            last = now


async def play(envs: aiovec.AsyncVectorEnv, score: Score, deadline: float, *, keep_pictures: bool = False) -> None:
    """Random actions until the deadline; episodes are counted by hand."""
    envs.action_space.seed(SEED)
    returns, ended = np.zeros(envs.num_envs), np.zeros(envs.num_envs, bool)
    scored = np.ones(envs.num_envs, bool)
    while time.perf_counter() < deadline:
        playing = ~ended  # an env whose episode ended is reset by the next step (NEXT_STEP), not counted
        observations, rewards, terminations, truncations, _infos = await envs.step(envs.action_space.sample())
        returns += rewards
        ended = terminations | truncations
        score.env_steps += int(np.count_nonzero(playing))
        if keep_pictures:  # of the moment with the most points, for each env; the screen counts a frame late
            for i in np.flatnonzero(scored).tolist():
                if i not in score.pictures or returns[i] > score.pictures[i][0]:
                    score.pictures[i] = returns[i], observations[i].copy()
            scored = rewards > 0
        if ended.any():
            score.episodes += int(np.count_nonzero(ended))
            score.latest_returns.extend(returns[ended].tolist())
            returns[ended] = 0


def live_view(scores: list[Score], heartbeat: Heartbeat, elapsed: float, seconds: float) -> Panel:
    """What a terminal shows."""
    table = Table(expand=True, box=None, padding=(0, 1))
    for heading in ("vector", "envs", "workers", "env steps/s", "env steps", "episodes", "mean return"):
        table.add_column(heading, justify="left" if heading == "vector" else "right", header_style="dim")
    for score in scores:
        table.add_row(
            f"[bold]{score.name}[/]",
            str(score.num_envs),
            str(score.num_workers),
            f"[green]{score.rate:,.0f}[/]",
            f"{score.env_steps:,}",
            f"{score.episodes:,}",
            score.mean_return,
        )
    lines = [Text.assemble((f" {score.name:9} returns  ", "dim"), returns_line(score, 14)) for score in scores]
    lines.append(
        Text.assemble(
            (" a heartbeat of 5 ms took at most  ", "dim"),
            (f"{heartbeat.take_latest() * 1e3:5.1f} ms", "bold cyan"),
            (" just now,  ", "dim"),
            (f"{heartbeat.longest * 1e3:5.1f} ms", "cyan"),
            (" in all", "dim"),
        )
    )
    bar = ProgressBar(total=seconds, completed=min(elapsed, seconds))
    title = f"aiovec: two vectors, one event loop, {min(elapsed, seconds):.0f} of {seconds:.0f} s"
    return Panel(Group(table, Text(), *lines, Text(), bar), title=title, subtitle="Ctrl-C ends it", width=84)


def returns_line(score: Score, count: int) -> str:
    """The newest episode returns, the last one first."""
    return " ".join(f"{value:.0f}" for value in list(score.latest_returns)[: -count - 1 : -1])


def plain_line(scores: list[Score], heartbeat: Heartbeat, elapsed: float) -> str:
    """What a log shows."""
    parts = [
        f"{score.name} {score.rate:,.0f} env steps/s, {score.episodes:,} episodes, mean return {score.mean_return}"
        for score in scores
    ]
    return " | ".join([f"{elapsed:5.1f} s", *parts, f"longest heartbeat {heartbeat.take_latest() * 1e3:.1f} ms"])


async def show(console: Console, scores: list[Score], heartbeat: Heartbeat, begin: float, deadline: float) -> None:
    """Four pictures a second in a terminal, else a line a second."""
    in_terminal = console.is_interactive and sys.stdout.isatty()
    live = Live(live_view(scores, heartbeat, 0, deadline - begin), console=console, auto_refresh=False)
    last = begin
    if in_terminal:
        live.start(refresh=True)
    try:
        while last < deadline:
            await asyncio.sleep(min(0.25 if in_terminal else 1.0, max(deadline - last, 0.01)))
            now = time.perf_counter()
            for score in scores:
                score.measure(now - last)
            if in_terminal:
                live.update(live_view(scores, heartbeat, now - begin, deadline - begin), refresh=True)
            else:
                print(plain_line(scores, heartbeat, now - begin), flush=True)
            last = now
        for score in scores:  # what stays in the terminal is the speed of the whole run
            score.rate = score.env_steps / (last - begin)
        if in_terminal:
            live.update(live_view(scores, heartbeat, last - begin, deadline - begin), refresh=True)
    finally:
        live.stop()


async def run(args: Arguments, console: Console) -> tuple[Score, Score, Heartbeat]:
    """Both vectors, the heartbeat and the display, as four tasks of one loop."""
    console.print("starting the workers")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # the workers draw CartPole without a screen
    async with (
        aiovec.make_vec("CartPole-v1", args.num_cartpoles, render_mode="rgb_array") as cartpoles,
        aiovec.AsyncVectorEnv([breakout] * args.num_breakouts) as breakouts,
    ):
        poles = Score("CartPole", cartpoles.num_envs, cartpoles.num_workers)
        bricks = Score("Breakout", breakouts.num_envs, breakouts.num_workers)
        await asyncio.gather(cartpoles.reset(seed=SEED), breakouts.reset(seed=SEED))
        heartbeat, begin = Heartbeat(), time.perf_counter()
        deadline = begin + args.seconds
        async with asyncio.TaskGroup() as group:
            group.create_task(play(cartpoles, poles, deadline))
            group.create_task(play(breakouts, bricks, deadline, keep_pictures=True))
            group.create_task(heartbeat.beat(deadline))
            group.create_task(show(console, [poles, bricks], heartbeat, begin, deadline))
        frames = await cartpoles.render(env_ids=range(min(6, cartpoles.num_envs)))
        poles.pictures = {i: (0.0, frame) for i, frame in enumerate(frames)}
    return poles, bricks, heartbeat


def draw(pictures: Iterable[tuple[str, Any]], title: str, path: Path, *, columns: int, width: float) -> None:
    """Frames side by side, `width` inches each, with a line above each."""
    titled = list(pictures)
    columns = min(columns, len(titled))
    rows = -(-len(titled) // columns)
    height = width * titled[0][1].shape[0] / titled[0][1].shape[1] + 0.2
    figure = Figure(figsize=(max(width * columns, 5), height * rows + 0.4), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(titled) :]:
        axis.set_axis_off()
    for axis, (name, frame) in zip(axes, titled, strict=False):
        axis.imshow(frame, interpolation="nearest")
        axis.set_title(name, fontsize=9)
        axis.set(xticks=[], yticks=[])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Plays, then draws; Ctrl-C is an end like any other, with the exit code that shells expect."""
    args, console = parse_arguments(), Console(highlight=False)
    try:
        poles, bricks, heartbeat = asyncio.run(run(args, console))
        console.print(
            f"{poles.env_steps:,} env steps of CartPole and {bricks.env_steps:,} of Breakout; of {heartbeat.beats:,} heartbeats "
            f"the longest took {heartbeat.longest * 1e3:.1f} ms",
            soft_wrap=True,
        )
        names = [f"env {i}: best score {score:.0f}" for i, (score, _) in sorted(bricks.pictures.items())]
        frames = [frame for _, (_, frame) in sorted(bricks.pictures.items())]
        path = args.output / "demo-breakout.png"
        draw(
            zip(names, frames, strict=True),
            "Breakout, random actions: each env at its best",
            path,
            columns=5,
            width=2.2,
        )
        console.print(f"Picture: {path}", soft_wrap=True)
        titled = [(f"env {i}", frame) for i, (_, frame) in poles.pictures.items()]
        path = args.output / "demo-cartpole.png"
        draw(titled, "CartPole, random actions: the last frames", path, columns=3, width=3.4)
        console.print(f"Picture: {path}", soft_wrap=True)
    except KeyboardInterrupt:
        console.print("stopped by Ctrl-C; every worker has ended")
        sys.exit(130)


if __name__ == "__main__":
    main()
