"""What `aiovec bench` measures, and its advice.

All contestants step the same envs with the same actions. They are alive at the same time and take turns, round by round, so that a
noisy machine is noisy for all; who is not asked sleeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import statistics
import time
from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode

from aiovec.async_env import AsyncEnv
from aiovec.pool.start import EnvFn
from aiovec.vector_env import AsyncVectorEnv

__all__ = [
    "Contestant",
    "EnvTimes",
    "Result",
    "advice",
    "as_text",
    "contestants",
    "measure_env",
    "usual_workers",
    "warning",
]

_BEAT_SECONDS = 0.005
_NUM_ACTION_ROWS = 64
# Two medians that differ by less are called equal: rounds of a shared machine differ by as much. So are two of which the slower one
# was faster in more than one of five rounds.
_NOISE = 1.1
_ROUNDS_THAT_AGREE = 0.8
# An env that computes for less than this share of a step waits, for I/O or a lock.
_WAITS_BELOW = 0.5
# A vector step that takes less in its envs is not worth being shared out: a message there and back is some tenths of this.
_CHEAP_SECONDS = 1e-3
_SYNC, _ASYNC = "Gymnasium Sync", "Gymnasium Async"


@dataclass(frozen=True)
class EnvTimes:
    """One env by itself, in this process; seconds.

    Attributes:
        build: Its construction.
        reset: The median of its resets.
        step: The mean of its steps.
        cpu: The share of a step in which this process computed; the rest it waited. What it waited for a CPU that others
            had is in neither.
        is_async: Whether it is an `AsyncEnv`.
    """

    build: float
    reset: float
    step: float
    cpu: float
    is_async: bool = False


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
            "overhead_share": self.overhead,
            "longest_heartbeat_gap_seconds": self.longest_gap_seconds,
        }


def usual_workers(num_envs: int, num_cpus: int) -> tuple[int, ...]:
    """The numbers of workers that are worth a try: none, 1, 2, 4, … up to the CPUs, these, and twice as many."""
    powers = [2**exponent for exponent in range(num_cpus.bit_length()) if 2**exponent < num_cpus]
    return tuple(dict.fromkeys(min(number, num_envs) for number in (0, *powers, num_cpus, 2 * num_cpus)))


def measure_env(env_fn: EnvFn, seconds: float) -> EnvTimes:
    """Steps one env in this process, for about so long; its actions are drawn before.

    Raises:
        Exception: What the env raised, with a note that says in which command.
    """
    began = time.perf_counter()
    with _during("construction"):
        env: Any = env_fn()
    measuring = _measure_env(env, time.perf_counter() - began, seconds)
    if isinstance(env, AsyncEnv):
        with asyncio.Runner() as runner:
            return runner.run(measuring)
    return _run_without_loop(measuring)


def _run_without_loop(coroutine: Coroutine[Any, Any, EnvTimes]) -> EnvTimes:
    """Runs what awaits nothing: an ordinary env may start a loop of its own, which it could not inside of ours."""
    try:
        coroutine.send(None)
    except StopIteration as ended:
        times: EnvTimes = ended.value
        return times
    raise RuntimeError("an ordinary env awaits nothing")


async def _measure_env(env: Any, build: float, seconds: float) -> EnvTimes:
    is_async = isinstance(env, AsyncEnv)

    async def seconds_of_reset(**kwargs: Any) -> float:
        began = time.perf_counter()
        with _during("reset"):
            answer = env.reset(**kwargs)
            if is_async:
                await answer
        return time.perf_counter() - began

    resets = [await seconds_of_reset(seed=1)]
    with _during("the sampling of actions"):
        env.action_space.seed(1)
        actions = [env.action_space.sample() for _ in range(_NUM_ACTION_ROWS)]
    num_steps, stepping, computing, ended = 0, 0.0, 0.0, False
    queuing = 0.0
    while stepping + sum(resets) < seconds or not num_steps:
        if ended:
            resets.append(await seconds_of_reset())
        queued, wall, cpu = _seconds_without_cpu(), time.perf_counter(), time.process_time()
        with _during("step"):
            for action in actions:
                answer = env.step(action)
                if is_async:
                    answer = await answer
                num_steps += 1
                ended = bool(answer[2] or answer[3])
                if ended or time.perf_counter() - wall > seconds:
                    break
        stepping += time.perf_counter() - wall
        computing += time.process_time() - cpu
        queuing += _seconds_without_cpu() - queued
    with _during("close"):
        closing = env.close()
        if is_async:
            await closing
    waiting = max(0.0, stepping - computing - queuing)
    share = computing / (computing + waiting) if waiting else 1.0
    return EnvTimes(build, statistics.median(resets), stepping / num_steps, share, is_async)


@contextlib.contextmanager
def _during(command: str) -> Generator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"during {command}")
        raise


def _seconds_without_cpu() -> float:
    """How long this thread has waited for a CPU so far; 0 where the system does not tell."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except FileNotFoundError:
        return 0.0


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
        self._envs = self._make()
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


def _gymnasium_async(env_fns: list[Any], mode: AutoresetMode) -> gym.vector.AsyncVectorEnv:
    """Its processes never see a Ctrl-C, at which each would print a traceback; ours comes when they have started."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return gym.vector.AsyncVectorEnv(env_fns, autoreset_mode=mode)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


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
            _Gymnasium(_SYNC, lambda: gym.vector.SyncVectorEnv(env_fns, autoreset_mode=mode), num_envs),
            _Gymnasium(_ASYNC, lambda: _gymnasium_async(env_fns, mode), num_envs),
        ]
    with contextlib.ExitStack() as stack:
        for contestant in everyone:
            stack.callback(contestant.close)
        yield everyone


def advice(env: EnvTimes, results: Sequence[Result]) -> str:
    """What to use for this env, in a sentence or two. Pure.

    Args:
        env: The env by itself.
        results: Of all contestants; those without a round do not count.
    """
    ours = [result for result in results if result.num_workers is not None and result.step_seconds]
    if not ours:
        return "Nothing was measured yet."
    fastest = min(ours, key=lambda result: result.median_step_seconds)
    # The fewest workers that are as fast, as far as can be told.
    best = min(
        (result for result in ours if not _is_slower(result, fastest)), key=lambda result: result.num_workers or 0
    )
    speed = f"{best.num_envs} envs at {_rounded(best.steps_per_second)} steps/s"
    alone = next((result for result in ours if result.num_workers == 0), None)
    if len(ours) == 1:
        sentence = f"num_workers={best.num_workers} has {speed}"
    elif best.num_workers:
        share = -(-best.num_envs // best.num_workers)
        workers = "1 worker" if best.num_workers == 1 else f"{best.num_workers} workers"
        sentence = f"Use num_workers={best.num_workers} ({workers} of {share}): {speed}"
        if alone is not None:
            sentence += f", {_times(best, alone)} as without workers"
    else:
        sentence = f"Use num_workers=0: {speed}"
    if best is not fastest:
        sentence += f"; num_workers={fastest.num_workers} is no faster, as far as can be told"
    others = [result for result in results if result.num_workers is None and result.step_seconds]
    rival = min(others, key=lambda result: result.median_step_seconds, default=None)
    if rival is not None and _is_slower(rival, best):
        sentence += f", and {_times(best, rival)} as {rival.name}"
    sentences = [sentence]
    waits = env.cpu < _WAITS_BELOW
    if best.num_workers == 0 and len(ours) > 1 and not waits:
        if best.num_envs * env.step < _CHEAP_SECONDS:
            sentences.append(
                f"A step of this env takes {as_text(env.step)}, too little to be worth a message to a worker"
            )
        else:
            sentences.append("Workers do not make it faster on this machine")
    if rival is not None and _is_slower(best, rival):
        why = "there is no event loop to keep free" if rival.name == _SYNC else "it has a process for each env"
        sentences.append(f"{rival.name} is {best.median_step_seconds / rival.median_step_seconds:.1f} x as fast: {why}")
        if rival.name == _ASYNC and all(result.num_workers != best.num_envs for result in ours):
            sentences[-1] += f", so try num_workers={best.num_envs}, too"
    if waits and not env.is_async:  # those of one process wait at the same time already
        sentences.append(
            f"A step of this env waits for {1 - env.cpu:.0%} of its time: threads_per_worker, an `AsyncEnv` or more workers "
            "let envs wait at the same time"
        )
    return " ".join(f"{sentence}." for sentence in sentences)


def warning(load: float, num_cpus: int) -> str:
    """What others do to the measurement; empty where they leave a CPU to each of ours. Pure.

    Args:
        load: How many processes ran or waited for a CPU in the mean, before it began.
        num_cpus: How many CPUs this process may use.
    """
    if load < num_cpus / 2:
        return ""
    return (
        f"This machine was busy before (a load of {load:.1f} on {num_cpus} CPUs): workers are faster where it is not."
    )


def _is_slower(one: Result, other: Result) -> bool:
    """By more than noise: in the median, and in nearly all rounds, which were run side by side."""
    rounds = list(zip(one.step_seconds, other.step_seconds, strict=False))  # an interrupt may have come between the two
    agree = sum(seconds > others_seconds for seconds, others_seconds in rounds) >= _ROUNDS_THAT_AGREE * len(rounds)
    return one.median_step_seconds > _NOISE * other.median_step_seconds and agree


def _times(one: Result, other: Result) -> str:
    return f"{other.median_step_seconds / one.median_step_seconds:.1f} x as fast"


def _rounded(number: float) -> str:
    return f"{float(f'{number:.2g}'):,.0f}" if number >= 10 else f"{number:.2g}"


def as_text(seconds: float) -> str:
    """Of three digits."""
    unit, size = next(((unit, size) for unit, size in (("s", 1.0), ("ms", 1e-3)) if seconds >= size), ("µs", 1e-6))
    return f"{float(f'{seconds / size:.3g}'):g} {unit}"
