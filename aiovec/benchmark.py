"""What `aiovec bench` measures, and its advice.

All contestants step the same envs with the same actions. They are alive at the same time and take turns, round by round, so that a
noisy machine is noisy for all; who is not asked sleeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode

from aiovec.async_env import AsyncEnv
from aiovec.pool.start import EnvFn
from aiovec.vector_env import AsyncVectorEnv

__all__ = ["Contestant", "EnvTimes", "Result", "advice", "contestants", "measure_env", "usual_workers"]

_BEAT_SECONDS = 0.005
_NUM_ACTION_ROWS = 64
# Two medians that differ by less are called equal: rounds of a shared machine differ by as much.
_NOISE = 1.1
# An env that computes for less than this share of its step waits, for I/O or a lock.
_WAITS_BELOW = 0.5


@dataclass(frozen=True)
class EnvTimes:
    """One env by itself, in this process; seconds.

    Attributes:
        build: Its construction.
        reset: The median of its resets.
        step: The mean of its steps.
        cpu: The share of a step in which this thread computed; the rest it waited. 1 where it never gave up its CPU by
            itself: what others took of it on a busy machine is no wait.
    """

    build: float
    reset: float
    step: float
    cpu: float


@dataclass
class Result:
    """What a contestant has shown so far.

    Attributes:
        name: As it is shown.
        num_envs: How many envs it steps at once.
        num_workers: Of aiovec; `None` for others.
        start_seconds: From its construction to the end of the first reset.
        step_seconds: A vector step, in each round.
        overhead: The share of the workers' time in which no env ran; `None` where nobody counts it.
        longest_gap_seconds: By which a heartbeat of 5 ms beside its steps was late at most; `None` without an event loop.
    """

    name: str
    num_envs: int
    num_workers: int | None
    start_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list[float])
    overhead: float | None = None
    longest_gap_seconds: float | None = None

    @property
    def median_step_seconds(self) -> float:
        """A vector step; infinite before the first round."""
        return statistics.median(self.step_seconds) if self.step_seconds else float("inf")

    @property
    def steps_per_second(self) -> float:
        """Of single envs."""
        return self.num_envs / self.median_step_seconds

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "num_envs": self.num_envs,
            "num_workers": self.num_workers,
            "start_seconds": self.start_seconds,
            "step_seconds_of_rounds": self.step_seconds,
            "median_step_seconds": self.median_step_seconds if self.step_seconds else None,
            "env_steps_per_second": self.steps_per_second if self.step_seconds else None,
            "overhead": self.overhead,
            "longest_heartbeat_gap_seconds": self.longest_gap_seconds,
        }


def usual_workers(num_envs: int, num_cpus: int) -> tuple[int, ...]:
    """The numbers of workers that are worth a try: none, 1, 2, 4, … up to the CPUs, these, and twice as many."""
    powers = [2**exponent for exponent in range(num_cpus.bit_length()) if 2**exponent < num_cpus]
    return tuple(dict.fromkeys(min(number, num_envs) for number in (0, *powers, num_cpus, 2 * num_cpus)))


def measure_env(env_fn: EnvFn, seconds: float) -> EnvTimes:
    """Steps one env in this process, for about so long; its actions are drawn before."""
    with asyncio.Runner() as runner:
        return _measure_env(env_fn, seconds, runner)


def _measure_env(env_fn: EnvFn, seconds: float, runner: asyncio.Runner) -> EnvTimes:
    began = time.perf_counter()
    env: Any = env_fn()
    build = time.perf_counter() - began

    def reset(**kwargs: Any) -> object:
        return runner.run(env.reset(**kwargs)) if isinstance(env, AsyncEnv) else env.reset(**kwargs)

    def awaited_step(action: Any) -> Any:
        return runner.run(env.step(action))

    step = awaited_step if isinstance(env, AsyncEnv) else env.step
    resets = [_seconds_of(lambda: reset(seed=1))]
    env.action_space.seed(1)
    actions = [env.action_space.sample() for _ in range(_NUM_ACTION_ROWS)]
    num_steps, stepping, computing, ended = 0, 0.0, 0.0, False
    waits_before = _num_waits()
    while stepping + sum(resets) < seconds or not num_steps:
        if ended:
            resets.append(_seconds_of(reset))
            ended = False
        wall, cpu = time.perf_counter(), time.thread_time()
        for action in actions:
            _, _, terminated, truncated, _ = step(action)
            num_steps += 1
            ended = bool(terminated or truncated)
            if ended or time.perf_counter() - wall > seconds:
                break
        stepping += time.perf_counter() - wall
        computing += time.thread_time() - cpu
    has_waited = _num_waits() - waits_before > num_steps / 2
    if isinstance(env, AsyncEnv):
        runner.run(env.close())
    else:
        env.close()
    share = min(computing / stepping, 1.0) if has_waited else 1.0
    return EnvTimes(build, statistics.median(resets), stepping / num_steps, share)


def _num_waits() -> int:
    """How often this thread has given up its CPU by itself."""
    return resource.getrusage(resource.RUSAGE_THREAD if sys.platform == "linux" else resource.RUSAGE_SELF).ru_nvcsw


def _seconds_of(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


class Contestant:
    """Something that steps many envs.

    Args:
        result: What it has shown so far; filled as it runs.
    """

    def __init__(self, result: Result) -> None:
        self.result: Result = result
        self._rows: list[Any] = []
        self._steps_a_round = 0

    def start(self) -> None:
        """Builds the envs, resets them, and draws the actions of all rounds."""
        began = time.perf_counter()
        space = self._begin()
        self.result.start_seconds = time.perf_counter() - began
        space.seed(1)
        self._rows = [space.sample() for _ in range(_NUM_ACTION_ROWS)]
        self._run(2)  # the first steps of anything are slow

    def run_round(self, seconds: float) -> None:
        """Steps for about so long."""
        if not self._steps_a_round:
            self._steps_a_round = max(1, round(seconds / max(self._run(3) / 3, 1e-6)))
        self.result.step_seconds.append(self._run(self._steps_a_round) / self._steps_a_round)

    def run_beside_heartbeat(self, seconds: float) -> None:
        """The same beside a heartbeat, if there is an event loop; not in the rounds, since a timer costs each wait 10 µs."""

    def close(self) -> None:
        """Ends all that it started."""
        raise NotImplementedError

    def _begin(self) -> gym.Space[Any]:
        raise NotImplementedError

    def _run(self, num_steps: int) -> float:
        raise NotImplementedError


class _Aiovec(Contestant):
    def __init__(self, env_fn: EnvFn, num_envs: int, num_workers: int, mode: AutoresetMode) -> None:
        name = f"aiovec, {num_workers or 'no'} worker{'s' * (num_workers != 1)}"
        super().__init__(Result(name, num_envs, num_workers))
        self._envs = AsyncVectorEnv([env_fn] * num_envs, num_workers=num_workers, autoreset_mode=mode)
        self._runner = asyncio.Runner()

    def _begin(self) -> gym.Space[Any]:
        async def begin() -> gym.Space[Any]:
            await self._envs.reset(seed=1)
            return self._envs.action_space

        return self._runner.run(begin())

    def _run(self, num_steps: int) -> float:
        return self._runner.run(self._steps(num_steps))

    async def _steps(self, num_steps: int) -> float:
        step, rows = self._envs.step, self._rows
        began = time.perf_counter()
        for index in range(num_steps):
            await step(rows[index % _NUM_ACTION_ROWS])
        return time.perf_counter() - began

    def run_beside_heartbeat(self, seconds: float) -> None:
        num_steps = max(1, round(seconds / self.result.median_step_seconds))
        before = self._envs.statistics()
        self.result.longest_gap_seconds = self._runner.run(self._beside_heartbeat(num_steps))
        after = self._envs.statistics()
        in_envs = after.env_seconds - before.env_seconds
        waited = after.waiting_seconds - before.waiting_seconds
        self.result.overhead = max(0.0, 1 - in_envs / (waited * max(self._envs.num_workers, 1)))

    async def _beside_heartbeat(self, num_steps: int) -> float:
        gaps = [0.0]

        async def beat() -> None:
            last = time.perf_counter()
            while True:
                await asyncio.sleep(_BEAT_SECONDS)
                now = time.perf_counter()
                gaps.append(now - last - _BEAT_SECONDS)
                last = now

        heartbeat = asyncio.create_task(beat())
        await self._steps(num_steps)
        await asyncio.sleep(0)  # what was due meanwhile
        heartbeat.cancel()
        await asyncio.wait([heartbeat])
        return max(gaps)

    def close(self) -> None:
        self._runner.run(self._envs.close(terminate=True))
        self._runner.close()


class _Gymnasium(Contestant):
    def __init__(self, name: str, make: Callable[[], gym.vector.VectorEnv[Any, Any, Any]], num_envs: int) -> None:
        super().__init__(Result(name, num_envs, None))
        self._make = make
        self._envs: gym.vector.VectorEnv[Any, Any, Any] | None = None

    def _begin(self) -> gym.Space[Any]:
        # A Ctrl-C reaches its processes, too, which would print a traceback each.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._envs = self._make()
        finally:
            signal.signal(signal.SIGINT, handler)
        self._envs.reset(seed=1)
        return self._envs.action_space

    def _run(self, num_steps: int) -> float:
        assert self._envs is not None  # noqa: S101
        step, rows = self._envs.step, self._rows
        began = time.perf_counter()
        for index in range(num_steps):
            step(rows[index % _NUM_ACTION_ROWS])
        return time.perf_counter() - began

    def close(self) -> None:
        if self._envs is not None:
            kwargs = {"terminate": True} if isinstance(self._envs, gym.vector.AsyncVectorEnv) else {}
            self._envs.close(**kwargs)


@contextlib.contextmanager
def contestants(
    env_fn: EnvFn, num_envs: int, workers: Sequence[int], mode: AutoresetMode, beside_gymnasium: bool
) -> Generator[list[Contestant]]:
    """Everyone, not started yet; all are closed in the end.

    Args:
        env_fn: The env.
        num_envs: How many of them each steps.
        workers: A contestant for each number.
        mode: The autoreset mode of all.
        beside_gymnasium: Whether Gymnasium's vectors take part.
    """
    env_fns: list[Any] = [env_fn] * num_envs
    everyone: list[Contestant] = [_Aiovec(env_fn, num_envs, number, mode) for number in workers]
    if beside_gymnasium:
        everyone += [
            _Gymnasium("Gymnasium Sync", lambda: gym.vector.SyncVectorEnv(env_fns, autoreset_mode=mode), num_envs),
            _Gymnasium("Gymnasium Async", lambda: gym.vector.AsyncVectorEnv(env_fns, autoreset_mode=mode), num_envs),
        ]
    with contextlib.ExitStack() as stack:
        for contestant in everyone:
            stack.callback(contestant.close)
        yield everyone


def advice(env: EnvTimes, results: Sequence[Result]) -> str:
    """One sentence: what to use for this env. Pure.

    Args:
        env: The env by itself.
        results: Of all contestants that have run.
    """
    ours = [result for result in results if result.num_workers is not None and result.step_seconds]
    if not ours:
        return "Nothing was measured yet."
    fastest = min(ours, key=lambda result: result.median_step_seconds)
    # The fewest workers that are as fast, as far as can be told.
    best = min(
        (result for result in ours if result.median_step_seconds <= _NOISE * fastest.median_step_seconds),
        key=lambda result: result.num_workers or 0,
    )
    speed = f"{best.num_envs} envs at {_rounded(best.steps_per_second)} steps/s"
    if best.num_workers == 0:
        is_measured = any(result.num_workers for result in ours)
        why = f"takes {_duration(env.step)} a step, less than a message to a worker is worth" if is_measured else ""
        sentence = f"Use num_workers=0: this env {why}, {speed}" if why else f"num_workers=0 has {speed}"
    else:
        share = -(-best.num_envs // (best.num_workers or 1))
        workers = "1 worker" if best.num_workers == 1 else f"{best.num_workers} workers"
        sentence = f"Use num_workers={best.num_workers} ({workers} of {share}): {speed}"
        alone = next((result for result in ours if result.num_workers == 0), None)
        if alone is not None:
            sentence += f", {alone.median_step_seconds / best.median_step_seconds:.1f} x as fast as without workers"
    if best is not fastest:
        sentence += f"; num_workers={fastest.num_workers} is as fast, as far as can be told"
    others = [result for result in results if result.num_workers is None and result.step_seconds]
    rival = min(others, key=lambda result: result.median_step_seconds, default=None)
    if rival is not None:
        ratio = rival.median_step_seconds / best.median_step_seconds
        if ratio < 1 / _NOISE:
            sentence += f". {rival.name} is {1 / ratio:.1f} x as fast: it has no event loop to keep free"
        elif ratio > _NOISE:
            sentence += f", and {ratio:.1f} x {rival.name}"
    if env.cpu < _WAITS_BELOW:
        sentence += (
            f". A step of this env waits for {1 - env.cpu:.0%} of its time: `AsyncEnv`, threads_per_worker or more workers "
            "let envs wait at the same time"
        )
    return f"{sentence}."


def _rounded(number: float) -> str:
    return f"{float(f'{number:.2g}'):,.0f}" if number >= 10 else f"{number:.2g}"


def _duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.2g} µs"
