"""The table of the README: ``nox -s bench``. It prints, it never asserts.

Rounds are interleaved, and medians of rounds are shown. *Bare*: processes that step their share of the envs
and talk to nobody. *Lock-step limit*: the same processes with one byte each way on a blocking socket after
each vector step.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_envs
import contestants
import gymnasium as gym
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

NUM_WORKERS = 2


@dataclass(frozen=True)
class Work:
    """One row: envs to step, and what it must reach."""

    name: str
    env_fn: Callable[[], gym.Env[Any, Any]]
    num_envs: int
    steps: int  # of one round
    of_limit: float  # target: share of the lock-step limit
    of_gymnasium: float | None  # target: times Gymnasium's AsyncVectorEnv; None: not compared
    uvloop: bool = False


WORKS = [
    Work("step, 64 CartPole", bench_envs.cartpole, 64, 1500, 0.92, 15),
    Work("step, 64 CartPole, uvloop", bench_envs.cartpole, 64, 1500, 0.92, None, uvloop=True),
    Work("step, 1024 CartPole", bench_envs.cartpole, 1024, 120, 0.95, None),
    Work("step, 4096 CartPole", bench_envs.cartpole, 4096, 30, 0.95, None),
    Work("step, 2 trivial envs", bench_envs.Trivial, 2, 8000, 0.77, None),
    Work("step, 8 Breakout, raw frames", bench_envs.breakout, 8, 400, 0.95, 1.75),
    Work("step, 5 Breakout, raw frames", bench_envs.breakout, 5, 500, 0.95, 1.75),
]


@dataclass(frozen=True)
class Measured:
    """Medians of one row, seconds a vector step."""

    work: Work
    bare: float
    limit: float
    ours: float
    gymnasium: float | None
    of_limit: float  # median of the rounds' ratios
    of_gymnasium: float | None
    parent_cpu: float
    longest_gap: float


def measure(work: Work, rounds: int, turn: Callable[[], None]) -> Measured:
    """Runs the rounds of one row."""
    rows = contestants.action_rows(work.env_fn, work.num_envs)
    processes = contestants.Processes(work.env_fn, work.num_envs, NUM_WORKERS, rows)
    new_loop = None
    if work.uvloop:
        import uvloop

        new_loop = uvloop.new_event_loop
    ours = contestants.Aiovec(work.env_fn, work.num_envs, NUM_WORKERS, rows, new_loop)
    theirs = contestants.Gymnasium(work.env_fn, work.num_envs, rows) if work.of_gymnasium is not None else None
    few = max(work.steps // 8, 2)
    times: list[tuple[float, float, float, float]] = []
    for round_number in range(rounds + 1):
        bare = processes.run(work.steps, contestants.BARE) / work.steps
        before = processes.run(work.steps, contestants.LOCK_STEP) / work.steps
        own = ours.run(work.steps) / work.steps
        after = processes.run(work.steps, contestants.LOCK_STEP) / work.steps
        ours.run_beside_heartbeat(few)
        gymnasium = theirs.run(few) / few if theirs is not None else float("nan")
        if round_number:  # the first one warms up
            times.append((bare, (before + after) / 2, own, gymnasium))
        turn()
    longest_gap_before_close = ours.longest_gap
    ours.close()
    processes.close()
    if theirs is not None:
        theirs.close()
    bare, limit, own, gymnasium = (statistics.median(column) for column in zip(*times, strict=True))
    return Measured(
        work,
        bare,
        limit,
        own,
        gymnasium if theirs is not None else None,
        statistics.median(limit / own for _, limit, own, _ in times),
        statistics.median(gymnasium / own for _, _, own, gymnasium in times) if theirs is not None else None,
        ours.cpu_seconds / ours.steps,
        max(longest_gap_before_close, ours.longest_gap),
    )


def infos_cost(rounds: int, turn: Callable[[], None]) -> float:
    """Seconds an env and step that four scalars in each info cost, above no infos."""
    rows = contestants.action_rows(bench_envs.Trivial, 64)
    without = contestants.Aiovec(bench_envs.Trivial, 64, NUM_WORKERS, rows)
    with_infos = contestants.Aiovec(bench_envs.with_infos, 64, NUM_WORKERS, rows)
    differences = []
    for _ in range(rounds):
        plain = without.run(1000)
        differences.append((with_infos.run(1000) - plain) / 1000 / 64)
        turn()
    without.close()
    with_infos.close()
    return statistics.median(differences)


def start_cost(rounds: int, turn: Callable[[], None]) -> tuple[float, float]:
    """Seconds of a start of 2 workers with a trivial env, and of `python -c "import gymnasium"`."""
    starts, imports = [], []
    rows = contestants.action_rows(bench_envs.Trivial, 2)
    for _ in range(2 * rounds):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import gymnasium"], check=True)
        imports.append(time.perf_counter() - began)
        began = time.perf_counter()
        started = contestants.Aiovec(bench_envs.Trivial, 2, NUM_WORKERS, rows)
        starts.append(time.perf_counter() - began)
        started.close()
        turn()
    return statistics.median(starts), statistics.median(imports)


def parts_of_limit(rounds: int, turn: Callable[[], None]) -> dict[str, float]:
    """8 Breakout, `recv(min_envs=4)`: how many times the lock-step limit, ours and that of others which are there."""
    rows = contestants.action_rows(bench_envs.breakout, 8)
    processes = contestants.Processes(bench_envs.breakout, 8, NUM_WORKERS, rows)
    ours = contestants.Aiovec(bench_envs.breakout, 8, NUM_WORKERS, rows)
    runs: dict[str, Callable[[], float]] = {"aiovec": lambda: ours.run_parts(400, 4)}
    if importlib.util.find_spec("envpool"):
        envpool = contestants.EnvPool.of_breakout(8, 4, NUM_WORKERS)
        runs["EnvPool, threads in C++"] = lambda: envpool.run_parts(400)
    torchrl = (
        contestants.TorchRL(bench_envs.breakout, 8, NUM_WORKERS, 4) if importlib.util.find_spec("torchrl") else None
    )
    if torchrl is not None:
        runs["TorchRL's AsyncEnvPool"] = lambda: 20 * torchrl.run_parts(20, 4)
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            before = processes.run(400, contestants.LOCK_STEP)
            seconds = run()
            limit = (before + processes.run(400, contestants.LOCK_STEP)) / 2
            ratios[name].append(limit / seconds)
        turn()
    ours.close()
    processes.close()
    if torchrl is not None:
        torchrl.close()
    return {name: statistics.median(of_rounds) for name, of_rounds in ratios.items()}


def share_of_ideal(
    rounds: int,
    turn: Callable[[], None],
    env_fn: Any,
    num_envs: int,
    runs: dict[str, Callable[[contestants.Aiovec, int], float]],
    **options: Any,
) -> dict[str, float]:
    """Envs that wait 10 ms a step, in the mean: how many steps of those that they could make they do make."""
    rows = contestants.action_rows(bench_envs.Trivial, num_envs)
    ours = contestants.Aiovec(env_fn, num_envs, options.pop("num_workers"), rows, **options)
    shares: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            shares[name].append(100 * 0.01 / run(ours, 100))
        turn()
    ours.close()
    return {name: statistics.median(of_rounds) for name, of_rounds in shares.items()}


def cost_of_single_steps(rounds: int, turn: Callable[[], None]) -> tuple[float, float]:
    """64 CartPole: seconds of an env-step in 64 tasks, and in whole batches."""
    rows = contestants.action_rows(bench_envs.cartpole, 64)
    ours = contestants.Aiovec(bench_envs.cartpole, 64, NUM_WORKERS, rows)
    tasks, batches = [], []
    for _ in range(rounds):
        tasks.append(ours.run_tasks(150) / 150 / 64)
        batches.append(ours.run(600) / 600 / 64)
        turn()
    ours.close()
    return statistics.median(tasks), statistics.median(batches)


def other_faces(rounds: int, turn: Callable[[], None]) -> list[tuple[str, str, str]]:
    """64 CartPole: what `BlockingVectorEnv`, and `wrap` with a wrapper that does nothing, cost above an awaited step."""
    rows = contestants.action_rows(bench_envs.cartpole, 64)
    awaited = contestants.Aiovec(bench_envs.cartpole, 64, NUM_WORKERS, rows)
    faces: dict[str, contestants.Aiovec | contestants.Blocking] = {
        "`BlockingVectorEnv`": contestants.Blocking(bench_envs.cartpole, 64, NUM_WORKERS, rows),
        "`wrap`": contestants.Aiovec(bench_envs.cartpole, 64, NUM_WORKERS, rows, wrappers=(gym.vector.VectorWrapper,)),
    }
    above: dict[str, list[float]] = {name: [] for name in faces}
    for _ in range(4 * rounds):  # short ones in turn: a difference of microseconds
        for name, face in faces.items():
            before = awaited.run(300)
            seconds = face.run(300)
            above[name].append((seconds - (before + awaited.run(300)) / 2) / 300)
        turn()
    for contestant in (awaited, *faces.values()):
        contestant.close()
    return [
        (f"{name}, 64 CartPole, above an awaited step", f"{statistics.median(differences) * 1e6:.0f} µs", target)
        for (name, differences), target in zip(above.items(), ("≤ 30 µs", ""), strict=True)
    ]


@dataclass(frozen=True)
class RolloutRow:
    """Medians of rollouts of so many envs, seconds a vector step; ratios are medians of the rounds' ratios."""

    num_envs: int
    bare: float
    limit: float
    whole: float
    in_groups: float
    gymnasium: float
    whole_of_limit: float
    of_limit: float
    of_bare: float


def measure_rollouts(num_envs: int, rounds: int, turn: Callable[[], None]) -> RolloutRow:
    """Rollouts of 128 steps, whole and in two groups; Gymnasium's steps, kept and stacked."""
    num_steps, num_rollouts = 128, max(1, 1024 // num_envs)
    steps = num_steps * num_rollouts
    rows = contestants.action_rows(bench_envs.cartpole, num_envs)
    processes = contestants.Processes(bench_envs.cartpole, num_envs, NUM_WORKERS, rows)
    ours = contestants.Aiovec(bench_envs.cartpole, num_envs, NUM_WORKERS, rows)
    theirs = contestants.Gymnasium(bench_envs.cartpole, num_envs, rows)
    times: list[tuple[float, float, float, float, float]] = []
    for round_number in range(rounds + 1):
        bare = processes.run(steps, contestants.BARE) / steps
        limit = processes.run(steps, contestants.LOCK_STEP) / steps
        whole = ours.run_rollouts(num_rollouts, num_steps, 1) / steps
        in_groups = ours.run_rollouts(num_rollouts, num_steps, 2) / steps
        limit = (limit + processes.run(steps, contestants.LOCK_STEP) / steps) / 2
        if round_number:  # the first one warms up
            times.append((bare, limit, whole, in_groups, theirs.run_rollout(num_steps) / num_steps))
        turn()
    ours.close()
    processes.close()
    theirs.close()
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    return RolloutRow(
        num_envs,
        *medians,
        statistics.median(limit / whole for _, limit, whole, _, _ in times),
        statistics.median(limit / in_groups for _, limit, _, in_groups, _ in times),
        statistics.median(bare / in_groups for bare, _, _, in_groups, _ in times),
    )


def rollouts(rounds: int, progress: Progress) -> list[tuple[str, str, str]]:
    """Rows of rollouts."""
    rows: list[tuple[str, str, str]] = []
    for num_envs, target in ((64, "> 1 of the limit"), (256, "≥ 0.85 of bare")):
        task = progress.add_task(f"rollouts, {num_envs} CartPole", total=rounds + 1)
        m = measure_rollouts(num_envs, rounds, lambda task=task: progress.advance(task))
        progress.remove_task(task)
        rows.append(
            (
                f"`rollout(groups=2)`, 128 × {num_envs} CartPole",
                (
                    f"{_microseconds(m.in_groups)} a step: {m.of_limit:.2f} of the limit, {m.of_bare:.2f} of bare "
                    f"(whole: {_microseconds(m.whole)}, {m.whole_of_limit:.2f} of the limit; bare "
                    f"{_microseconds(m.bare)}, limit {_microseconds(m.limit)}; Gymnasium Async and `np.stack`: "
                    f"{_microseconds(m.gymnasium)})"
                ),
                target,
            )
        )
    return rows


def large_frames(rounds: int, turn: Callable[[], None]) -> list[tuple[str, str, str]]:
    """64 raw Breakout frames, 6.4 MB a step: lent, and copied."""
    rows = contestants.action_rows(bench_envs.breakout, 64)
    both = {
        name: contestants.Aiovec(bench_envs.breakout, 64, NUM_WORKERS, rows, copy=copies)
        for name, copies in (("lent", None), ("`copy=True`", True))
    }
    for ours in both.values():
        ours.run(10)  # the start is measured elsewhere
        ours.longest_gap = ours.cpu_seconds = 0.0
        ours.steps = 0
    for _ in range(rounds):
        for ours in both.values():
            ours.run(40)
            ours.run_beside_heartbeat(40)
        turn()
    shown = ", ".join(
        f"{name} {ours.cpu_seconds / ours.steps * 1e3:.2f} ms of the parent's CPU a step, heartbeat gap "
        f"{ours.longest_gap * 1e3:.1f} ms"
        for name, ours in both.items()
    )
    for ours in both.values():
        ours.close()
    return [("step, 64 Breakout, raw frames", shown, "lent ≤ 0.3 ms, ≤ 5 ms")]


def peak_memory() -> list[tuple[str, str, str]]:
    """What a program needs at most for a rollout of 32 steps of 32 raw Breakout, in processes of their own."""
    shown = []
    for name in ("aiovec", "gymnasium"):
        command = [sys.executable, str(Path(__file__).with_name("peak_memory.py")), name]
        shown.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    return [("peak memory of a rollout, 32 × 32 raw frames", "; ".join(shown), "slab + 10 %")]


def first_come_first_served(rounds: int, progress: Progress) -> list[tuple[str, str, str]]:
    """Rows of what does not go in lock-step."""

    def task(name: str) -> Callable[[], None]:
        number = progress.add_task(name, total=rounds)
        return lambda: progress.advance(number)

    step = contestants.Aiovec.run
    of_limit = parts_of_limit(rounds, task("8 Breakout, recv"))
    others = ", ".join(f"{name}: {ratio:.2g}" for name, ratio in of_limit.items() if name != "aiovec")
    runs = {"step": step, "recv": lambda ours, steps: ours.run_parts(steps, 4)}
    by_process = share_of_ideal(rounds, task("16 waiting"), bench_envs.exponential, 16, runs, num_workers=16)
    threads = {"num_workers": NUM_WORKERS, "threads_per_worker": 8}
    by_thread = share_of_ideal(rounds, task("16 in threads"), bench_envs.exponential, 16, runs, **threads)
    runs = {
        "step": step,
        "recv": lambda ours, steps: ours.run_parts(steps, 8),
        "tasks": lambda ours, steps: ours.run_tasks(steps),
    }
    asynchronous = share_of_ideal(
        rounds, task("256 AsyncEnvs"), bench_envs.async_sleeps, 256, runs, num_workers=NUM_WORKERS
    )
    single, batch = cost_of_single_steps(rounds, task("64 tasks"))
    recv = f"{of_limit['aiovec']:.2f} × the lock-step limit" + (f" ({others})" if others else "")
    return [
        ("`recv(min_envs=4)`, 8 Breakout", recv, "> 1"),
        ("`recv(min_envs=4)`, 16 envs, exponential 10 ms, 16 workers", _shares(by_process), "≥ 0.70"),
        ("the same, 2 workers of 8 threads", _shares(by_thread), "≥ 0.70"),
        ("256 `AsyncEnv`s, 10 ms, 2 workers", _shares(asynchronous), "≥ 0.90"),
        ("64 CartPole in 64 tasks", f"{single * 1e6:.1f} µs an env-step; `step`: {batch * 1e6:.1f} µs", ""),
    ]


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"`{name}` {share:.2f}" for name, share in shares.items()) + " of ideal"


def main() -> None:
    """Measures, and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds a row")
    parser.add_argument("--only", default="", help="rows whose name has this text")
    parser.add_argument("--markdown", action="store_true", help="print the table for the README")
    parser.add_argument("--json", type=Path, help="write what the picture of the README shows")
    arguments = parser.parse_args()
    works = [work for work in WORKS if arguments.only in work.name]
    console = Console()
    measured: list[Measured] = []
    with Progress(console=console, transient=True) as progress:
        for work in works:
            task = progress.add_task(work.name, total=arguments.rounds + 1)
            measured.append(measure(work, arguments.rounds, lambda task=task: progress.advance(task)))
            progress.remove_task(task)
        extra: list[tuple[str, str, str]] = []
        if not arguments.only:
            task = progress.add_task("infos", total=arguments.rounds)
            infos = infos_cost(arguments.rounds, lambda: progress.advance(task))
            extra.append(("four scalar infos, 64 envs", f"{infos * 1e6:.2f} µs an env", "≤ 4 µs"))
            task = progress.add_task("start", total=2 * arguments.rounds)
            start, imported = start_cost(arguments.rounds, lambda: progress.advance(task))
            ratio = f"{start * 1e3:.0f} ms = {start / imported:.2f} × `import gymnasium`"
            extra.append(("start of 2 workers", ratio, "≤ 1.5 ×"))
        if not arguments.only or arguments.only in "other faces":
            task = progress.add_task("other faces", total=4 * arguments.rounds)
            extra += other_faces(arguments.rounds, lambda: progress.advance(task))
        if not arguments.only or arguments.only in "rollouts":
            extra += rollouts(arguments.rounds, progress)
            task = progress.add_task("64 Breakout", total=arguments.rounds)
            extra += large_frames(arguments.rounds, lambda: progress.advance(task))
            extra += peak_memory()
        if not arguments.only or arguments.only in "first come, first served":
            extra += first_come_first_served(max(arguments.rounds // 2, 2), progress)
    if measured:
        longest_gap = max(m.longest_gap for m in measured)
        extra.append(("longest gap of a 5 ms heartbeat", f"{longest_gap * 1e3:.0f} ms", "≤ 50 ms"))
    by_size = {m.work.num_envs: m.ours / m.work.num_envs for m in measured}
    if {1024, 4096} <= set(by_size):
        extra.append(("cost of an env-step, 4096 against 1024", f"{by_size[4096] / by_size[1024]:.2f} ×", "≤ 1.1 ×"))
    heading = f"{dt.date.today()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    show(console, heading, measured, extra, markdown=arguments.markdown)
    if arguments.json is not None:
        rows = [
            {
                "name": m.work.name,
                "num_envs": m.work.num_envs,
                "bare_seconds": m.bare,
                "limit_seconds": m.limit,
                "aiovec_seconds": m.ours,
                "gymnasium_seconds": m.gymnasium,
            }
            for m in measured
        ]
        arguments.json.write_text(json.dumps({"heading": heading, "rows": rows}, indent=2) + "\n")


def show(
    console: Console, heading: str, measured: list[Measured], extra: list[tuple[str, str, str]], *, markdown: bool
) -> None:
    """Prints both tables."""
    columns = [
        "work, 2 workers",
        "bare",
        "lock-step limit",
        "aiovec",
        "Gymnasium Async",
        "of the limit",
        "× Gymnasium",
        "parent's CPU",
    ]
    lines = [
        [
            m.work.name,
            _microseconds(m.bare),
            _microseconds(m.limit),
            _microseconds(m.ours),
            _microseconds(m.gymnasium) if m.gymnasium else "",
            f"{m.of_limit:.2f} (≥ {m.work.of_limit})",
            f"{m.of_gymnasium:.1f} (≥ {m.work.of_gymnasium})" if m.of_gymnasium else "",
            _microseconds(m.parent_cpu),
        ]
        for m in measured
    ]
    if markdown:
        print(f"\n{heading}; microseconds a vector step, medians; targets in brackets.\n")
        _markdown(columns, lines)
        print()
        _markdown(["what else", "measured", "target"], [list(line) for line in extra])
        return
    for title, names, rows in ((heading, columns, lines), ("", ["what else", "measured", "target"], extra)):
        table = Table(*names, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def _markdown(columns: list[str], lines: list[list[str]]) -> None:
    for line in (columns, ["---"] * len(columns), *lines):
        print("| " + " | ".join(line) + " |")


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} µs"


if __name__ == "__main__":
    main()
