"""What workers on Ray cost: ``python tests/bench/ray_table.py``. It prints, and writes docs/ray.json; it never asserts.

All contestants of a row take turns in rounds, and medians of rounds are shown. They share one Ray, on this machine, so
there is no network between; the load at the end is mostly their own. tianshou's `RayVectorEnv` is shown where it can be
imported; it has an actor for each env, and is therefore compared with as many of our workers.
"""

from __future__ import annotations

import argparse
import datetime as dt
import functools
import importlib.util
import json
import os
import pickle
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bench_envs
import contestants
import gymnasium as gym
import numpy as np
import ray
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from aiovec.exchange.ray_messages import opened

ON_RAY = {"context": "ray", "worker_options": {"num_cpus": 0}}
JSON = Path(__file__).parents[2] / "docs" / "ray.json"

Contestants = dict[str, Any]  # by their columns
Turn = Callable[[], None]


@dataclass(frozen=True)
class Work:
    """One row of the first table: what 8 envs do, and how many vector steps a round has."""

    name: str
    env_fn: Callable[[], gym.Env[Any, Any]]
    steps: int


WORKS = [
    Work("0 ms", bench_envs.Trivial, 200),
    Work("1 ms", functools.partial(bench_envs.Sleeps, 0.001), 40),
    Work("10 ms", functools.partial(bench_envs.Sleeps, 0.01), 10),
    Work("0 ms, a frame of 101 kB", bench_envs.Frames, 100),
]


@dataclass(frozen=True)
class Cost:
    """Seconds a vector step.

    Attributes:
        wall: Until it is there.
        loop: Of the CPU, in the thread of the event loop.
        process: Of the CPU, in all of the parent's threads, of which Ray has some.
    """

    wall: float
    loop: float
    process: float


def cost_of(contestant: Any, steps: int) -> Cost:
    """Of one round; the event loop runs in this very thread."""
    loop, process = time.thread_time(), time.process_time()
    wall = contestant.run(steps)
    return Cost(wall / steps, (time.thread_time() - loop) / steps, (time.process_time() - process) / steps)


def medians(costs: list[Cost]) -> Cost:
    """Of each of them for itself."""
    return Cost(*(statistics.median(column) for column in zip(*(asdict(cost).values() for cost in costs), strict=True)))


@contextmanager
def closing(these: Contestants) -> Iterator[Contestants]:
    """Closes all of them."""
    try:
        yield these
    finally:
        for contestant in these.values():
            contestant.close()


@contextmanager
def local_ray() -> Iterator[None]:
    """A Ray of our own, also where another one runs on this machine."""
    ray.init(address="local", num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def in_turn(these: Contestants, steps: int, rounds: int, turn: Turn) -> dict[str, Cost]:
    """The medians of each, after a round to warm up."""
    costs: dict[str, list[Cost]] = {name: [] for name in these}
    for contestant in these.values():
        contestant.run(steps)
    for _ in range(rounds):
        for name, contestant in these.items():
            costs[name].append(cost_of(contestant, steps))
        turn()
    return {name: medians(of_rounds) for name, of_rounds in costs.items()}


def step_costs(work: Work, rounds: int, turn: Turn) -> dict[str, Cost]:
    """8 envs, in 2 workers of 4 and in 8 of 1."""
    rows = contestants.action_rows(work.env_fn, 8)
    make = functools.partial(contestants.Aiovec, work.env_fn, 8)
    these: Contestants = {
        "2 × 4, local": make(2, rows),
        "2 × 4, Ray": make(2, rows, **ON_RAY),
        "8 × 1, local": make(8, rows),
        "8 × 1, Ray": make(8, rows, **ON_RAY),
    }
    if importlib.util.find_spec("tianshou"):
        these["8 × 1, tianshou"] = contestants.Tianshou(work.env_fn, 8, rows)
    with closing(these):
        return in_turn(these, work.steps, rounds, turn)


def parent_costs(num_workers: int, rounds: int, turn: Turn) -> dict[str, Cost]:
    """So many workers of 1 trivial env."""
    rows = contestants.action_rows(bench_envs.Trivial, num_workers)
    make = functools.partial(contestants.Aiovec, bench_envs.Trivial, num_workers, num_workers, rows)
    with closing({"local": make(), "Ray": make(**ON_RAY)}) as these:
        return in_turn(these, 800 // num_workers, rounds, turn)


@dataclass(frozen=True)
class Sizes:
    """Bytes of one call to a worker, as pickled by protocol 5: what it brings and takes back, and the arrays in these."""

    request: int
    request_arrays: int
    reply: int
    reply_arrays: int


def sizes(env_fn: Callable[[], gym.Env[Any, Any]], num_envs: int) -> Sizes:
    """Of the second step of one worker with so many envs."""
    ours = contestants.Aiovec(env_fn, num_envs, 1, contestants.action_rows(env_fn, num_envs), **ON_RAY)
    (worker,) = ours._envs._started.pool.workers
    exchange, returned = worker._exchange, worker._returned
    seen: dict[str, Any] = {}

    def bring(request: Any) -> Any:
        seen["request"] = request
        return exchange(request)

    def take_back(future: Any) -> None:
        seen["reply"] = future.result()
        returned(future)

    worker._exchange, worker._returned = bring, take_back
    with closing({"Ray": ours}):
        ours.run(2)
        request, reply = seen["request"], seen["reply"]
    return Sizes(pickled(request), in_arrays(opened(request)), pickled(reply), in_arrays(opened(reply)))


def pickled(value: Any) -> int:
    """Bytes of all of it."""
    return len(pickle.dumps(value, protocol=5))


def in_arrays(value: Any) -> int:
    """Bytes of the arrays in some nested tuples and lists."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    return sum(map(in_arrays, value)) if isinstance(value, (tuple, list)) else 0


@dataclass(frozen=True)
class Measured:
    """All that was."""

    heading: str
    steps: dict[str, dict[str, Cost]]
    parent: dict[int, dict[str, Cost]]
    sizes: dict[str, Sizes]


def measure(works: list[Work], nums_workers: list[int], rounds: int, progress: Progress) -> Measured:
    """Runs the rounds."""

    def turn(name: str) -> Turn:
        task = progress.add_task(name, total=rounds)
        return lambda: progress.advance(task)

    before = os.getloadavg()[0]
    steps = {work.name: step_costs(work, rounds, turn(f"8 envs, {work.name}")) for work in works}
    parent = {number: parent_costs(number, rounds, turn(f"{number} workers")) for number in nums_workers}
    nbytes = {"8 CartPole": sizes(bench_envs.cartpole, 8), "4 frames, 210×160×3": sizes(bench_envs.Frames, 4)}
    heading = (
        f"{dt.date.today()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, "
        f"Ray {ray.__version__}; load {before:.1f} before, {os.getloadavg()[0]:.1f} at the end; medians of {rounds} rounds"
    )
    return Measured(heading, steps, parent, nbytes)


def show(console: Console, measured: Measured) -> None:
    """Prints the tables, which are Markdown."""
    console.print(measured.heading)
    columns = ["a step takes", *next(iter(measured.steps.values()))]
    lines = [[name, *(_ms(cost.wall) for cost in of.values())] for name, of in measured.steps.items()]
    _print(console, "ms a vector step of 8 envs, workers × envs", columns, lines)
    columns = ["1 env each", "wall, ms a step", "loop, µs", "process, µs", "loop: 10 ms at", "process: 10 ms at"]
    lines = [
        [f"{number} {name}", _ms(cost.wall), *_shares(cost, number)]
        for number, of in measured.parent.items()
        for name, cost in of.items()
    ]
    _print(
        console, "the parent's CPU, µs a worker and step; with how many workers a step takes it 10 ms", columns, lines
    )
    columns = ["of one worker", "request", "of which arrays", "reply", "of which arrays"]
    lines = [[name, *(f"{size:,}" for size in asdict(of).values())] for name, of in measured.sizes.items()]
    _print(console, "bytes a worker and step on Ray", columns, lines)


def _print(console: Console, title: str, columns: list[str], lines: list[list[str]]) -> None:
    table = Table(box=MARKDOWN)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for line in lines:
        table.add_row(*line)
    console.print(f"\n{title}\n")
    console.print(table)


def _shares(cost: Cost, num_workers: int) -> list[str]:
    """µs a worker and step; and with how many workers a step takes the parent 10 ms, were it to go on so."""
    both = [seconds / num_workers for seconds in (cost.loop, cost.process)]
    return [*(f"{seconds * 1e6:.0f}" for seconds in both), *(f"{0.01 / seconds:.0f}" for seconds in both)]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds, and docs/ray.json stays as it is")
    quick = parser.parse_args().quick
    console = Console(width=120)
    if not importlib.util.find_spec("tianshou"):
        console.print("tianshou is not installed: its RayVectorEnv is not shown.")
    # What Ray prints meanwhile, such as a warning of so many actors on few cores, stays out of the tables.
    with redirect_stdout(sys.stderr), local_ray(), Progress(console=Console(stderr=True), transient=True) as progress:
        measured = measure(WORKS, [2, 8, 32], 3 if quick else 15, progress)
    show(console, measured)
    if not quick:
        JSON.write_text(json.dumps(asdict(measured), indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
