"""The advice of `aiovec bench`, from measurements that were made up; and one env that is measured."""

from __future__ import annotations

import asyncio
import functools
import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_envs import Counter

import aiovec
from aiovec.benchmark import EnvTimes, Result, advice, as_text, measure_env, usual_workers, warning

CHEAP = EnvTimes(build=0.001, reset=1e-5, step=1.2e-6, cpu=1.0)
DEAR = EnvTimes(build=0.001, reset=1e-5, step=1e-3, cpu=1.0)
WAITS = EnvTimes(build=0.001, reset=1e-2, step=1e-2, cpu=0.03)
WAITS_ASYNC = EnvTimes(build=0.001, reset=1e-2, step=1e-2, cpu=0.03, is_async=True)


def result(num_workers: int | None, microseconds: float, name: str = "") -> Result:
    """A contestant of 64 envs, in three rounds of which the median counts."""
    steps = [microseconds / 1e6, microseconds / 2e6, microseconds / 1e5]
    return Result(name or f"aiovec, {num_workers} workers", 64, num_workers, step_seconds=sorted(steps))


@pytest.mark.parametrize(
    ("env", "results", "says", "says_not"),
    [
        (
            CHEAP,
            [result(0, 160), result(2, 300)],
            ["Use num_workers=0: 64 envs at 400,000 steps/s.", "takes 1.2 µs, too little to be worth a message"],
            ["x as fast"],
        ),
        (DEAR, [result(0, 64_000), result(2, 90_000)], ["num_workers=0", "do not make it faster"], ["message"]),
        (CHEAP, [result(0, 300), result(1, 310)], ["Use num_workers=0"], ["num_workers=1"]),
        (CHEAP, [result(0, 310), result(1, 300)], ["Use num_workers=0", "num_workers=1 is no faster, as far"], []),
        (
            CHEAP,
            [result(0, 800), result(1, 500), result(2, 300), result(4, 290)],
            ["Use num_workers=2 (2 workers of 32)", "2.7 x as fast as without workers", "num_workers=4 is no faster"],
            ["num_workers=0:"],
        ),
        (CHEAP, [result(0, 800), result(1, 300)], ["Use num_workers=1 (1 worker of 64)"], ["as far as can be told"]),
        (CHEAP, [result(0, 800)], ["num_workers=0 has 64 envs at 80,000 steps/s"], ["worth", "Use"]),
        (CHEAP, [result(2, 800)], ["num_workers=2 has 64 envs at 80,000 steps/s"], ["worth", "Use"]),
        (
            CHEAP,
            [
                result(0, 400),
                result(2, 300),
                result(None, 150, "Gymnasium Sync"),
                result(None, 6000, "Gymnasium Async"),
            ],
            ["Gymnasium Sync is 2.0 x as fast: there is no event loop to keep free"],
            ["Gymnasium Async"],
        ),
        (
            DEAR,
            [result(0, 64_000), result(2, 32_000), result(None, 16_000, "Gymnasium Async")],
            ["Gymnasium Async is 2.0 x as fast: it has a process for each env, so try num_workers=64, too."],
            ["loop"],
        ),
        (
            DEAR,
            [result(0, 64_000), result(64, 32_000), result(None, 16_000, "Gymnasium Async")],
            ["Gymnasium Async is 2.0 x as fast: it has a process for each env."],
            ["try"],
        ),
        (
            CHEAP,
            [result(2, 300), result(None, 900, "Gymnasium Sync")],
            ["and 3.0 x as fast as Gymnasium Sync"],
            [" is "],
        ),
        (CHEAP, [result(2, 300), result(None, 310, "Gymnasium Sync")], ["num_workers=2"], ["Gymnasium"]),
        (WAITS, [result(0, 640_000), result(2, 320_000)], ["waits for 97% of its time", "threads_per_worker"], []),
        (
            WAITS_ASYNC,
            [result(0, 11_000), result(2, 12_500)],
            ["Use num_workers=0: 64 envs at 5,800 steps/s."],
            ["waits", "AsyncEnv", "message"],
        ),
        (CHEAP, [Result("aiovec", 64, 2)], ["Nothing was measured yet."], ["num_workers"]),
    ],
)
def test_advice(env: EnvTimes, results: list[Result], says: list[str], says_not: list[str]) -> None:
    """One sentence, with what it rests on."""
    sentence = advice(env, results)
    for text in says:
        assert text in sentence
    for text in says_not:
        assert text not in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


@given(
    st.lists(st.tuples(st.integers(0, 64), st.floats(1e-6, 10)), min_size=1, unique_by=lambda pair: pair[0]),
    st.floats(1e-7, 10),
    st.floats(0, 1),
)
def test_advice_names_one_that_is_fast(pairs: list[tuple[int, float]], step: float, cpu: float) -> None:
    """Never one that is slower than the fastest by more than noise."""
    results = [Result(f"aiovec, {number}", 64, number, step_seconds=[seconds]) for number, seconds in pairs]
    sentence = advice(EnvTimes(0.1, 0.1, step, cpu), results)
    named = sentence.partition("num_workers=")[2]
    number = int("".join(named[: next(i for i, c in enumerate(named + " ") if not c.isdigit())]))
    assert dict(pairs)[number] <= 1.1 * min(seconds for _, seconds in pairs)


def test_rounds_that_do_not_agree_are_noise() -> None:
    """A median alone says little where another round says the opposite."""
    without = Result("", 64, 0, step_seconds=[1.0, 1.0, 3.0, 3.0, 3.0])
    assert "Use num_workers=2 " in advice(CHEAP, [without, Result("", 64, 2, step_seconds=[1.2, 0.9, 0.9, 0.9, 0.9])])
    assert "Use num_workers=0:" in advice(CHEAP, [without, Result("", 64, 2, step_seconds=[1.2, 1.2, 0.9, 0.9, 0.9])])


def test_an_interrupt_between_two_contestants() -> None:
    """The last round is counted for those that had it."""
    assert "Use num_workers=2 " in advice(
        CHEAP, [Result("", 64, 0, step_seconds=[2.0, 2.0]), Result("", 64, 2, step_seconds=[1.0])]
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.2e-6, "1.2 µs"), (1.97e-4, "197 µs"), (9.997e-4, "1000 µs"), (0.0123, "12.3 ms"), (1.5, "1.5 s"), (0, "0 µs")],
)
def test_as_text(seconds: float, text: str) -> None:
    """Three digits, and no exponent."""
    assert as_text(seconds) == text


@pytest.mark.parametrize(
    ("load", "num_cpus", "says"), [(0.4, 2, ""), (3.94, 2, "a load of 3.9 on 2 CPUs"), (3.9, 16, "")]
)
def test_warning(load: float, num_cpus: int, says: str) -> None:
    """Where others take the CPUs that workers would have."""
    assert says in warning(load, num_cpus)
    assert bool(warning(load, num_cpus)) is bool(says)


def test_usual_workers() -> None:
    """None, powers of two, the CPUs, and twice as many; never more than there are envs."""
    assert usual_workers(64, 1) == (0, 1, 2)
    assert usual_workers(64, 2) == (0, 1, 2, 4)
    assert usual_workers(64, 6) == (0, 1, 2, 4, 6, 12)
    assert usual_workers(3, 8) == (0, 1, 2, 3)


class Sleeps(Counter):
    def step(self, action: Any) -> Any:
        time.sleep(0.005)
        return super().step(action)


class SleepsAsync(aiovec.AsyncEnv[Any, Any]):
    def __init__(self) -> None:
        self.observation_space = Counter().observation_space
        self.action_space = Counter().action_space

    async def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return np.zeros(3, np.float32), {}

    async def step(self, action: Any) -> Any:
        await asyncio.sleep(0.005)
        return np.zeros(3, np.float32), 1.0, True, False, {}


@pytest.mark.parametrize("env_fn", [functools.partial(Sleeps, 3), SleepsAsync])
def test_an_env_that_waits(env_fn: Any) -> None:
    """Its time, and that it does not compute; episodes end."""
    times = measure_env(env_fn, 0.1)
    assert times.step >= 0.005
    assert times.cpu < 0.5
    assert 0 < times.reset < times.step
    assert times.is_async is (env_fn is SleepsAsync)


def test_an_env_that_computes() -> None:
    """The whole of its time, but for what others have the CPU."""
    times = measure_env(Counter, 0.05)
    assert 0 < times.step < math.inf
    assert times.cpu > 0.5
    assert not times.is_async


class StartsLoops(Counter):
    """As environments do that drive a browser by a blocking call."""

    open_envs = 0

    def __init__(self) -> None:
        super().__init__(3)
        type(self).open_envs += 1

    def step(self, action: Any) -> Any:
        asyncio.run(asyncio.sleep(0))
        return super().step(action)

    def close(self) -> None:
        type(self).open_envs -= 1


def test_an_env_that_starts_a_loop_of_its_own() -> None:
    """None runs around it, and it is closed in the end."""
    assert measure_env(StartsLoops, 0.02).step > 0
    assert StartsLoops.open_envs == 0


class Fails(Counter):
    def __init__(self, command: str) -> None:
        self.command = command
        self.tell("construction")
        super().__init__()

    def tell(self, command: str) -> None:
        if command == self.command:
            raise KeyError("x")

    def reset(self, **kwargs: Any) -> Any:
        self.tell("reset")
        return super().reset(**kwargs)

    def step(self, action: Any) -> Any:
        self.tell("step")
        return super().step(action)

    def close(self) -> None:
        self.tell("close")


@pytest.mark.parametrize("command", ["construction", "reset", "step", "close"])
def test_an_env_that_fails(command: str) -> None:
    """The note says where."""
    with pytest.raises(KeyError) as caught:
        measure_env(functools.partial(Fails, command), 0.01)
    assert caught.value.__notes__ == [f"during {command}"]
