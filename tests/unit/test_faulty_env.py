"""`FaultyEnv` without a vector: when it does what, and what it refuses."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import os
import pickle
import signal
import sys
import time
from typing import Any, get_args

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import aiovec
from aiovec.testing import FaultyEnv, faulty_env
from aiovec.testing.faulty_env import Fault, Moment, UnpicklableError

CALLS: dict[str, Any] = {
    "reset": lambda env: env.reset(),
    "step": lambda env: env.step(0),
    "render": lambda env: env.render(),
    "close": lambda env: env.close(),
}


def numbers(env: FaultyEnv, seed: int | None) -> list[float]:
    return [float(env.reset(seed=seed)[0][2]), *(float(env.reset()[0][2]) for _ in range(3))]


@pytest.mark.filterwarnings("ignore:.*A Box observation space (minimum|maximum) value is .*infinity:UserWarning")
def test_without_a_fault_it_is_an_env_as_gymnasium_wants_it() -> None:
    check_env(FaultyEnv(), skip_render_check=True)


def test_its_observation_tells_how_it_fares() -> None:
    env = FaultyEnv(episode_length=2)
    observation, info = env.reset(seed=3, options={"level": 1})
    number = float(observation[2])
    assert observation.tolist() == [0, 1, number]
    assert info == {"options": "{'level': 1}"}
    observation, *others = env.step(np.int64(3))
    assert (observation.tolist(), others) == ([1, 1, number], [1.0, False, False, {"action": 3}])
    observation, *others = env.step(np.int64(0))
    assert (observation.tolist(), others) == ([2, 1, number], [2.0, True, False, {"action": 0}])
    observation, _ = env.reset()
    assert observation.tolist()[:2] == [0, 2]
    assert env.render().shape == (2, 2, 3)


def test_its_number_comes_from_the_seed() -> None:
    assert numbers(FaultyEnv(), 3) == numbers(FaultyEnv(), 3)
    assert numbers(FaultyEnv(), 3) != numbers(FaultyEnv(), 4)


@pytest.mark.parametrize("by_constructor", [True, False])
@pytest.mark.parametrize("moment", list(CALLS))
def test_a_fault_comes_once_in_its_moment(moment: Any, by_constructor: bool) -> None:
    """Before and after it, and in other methods, all is well."""
    if by_constructor:
        env = FaultyEnv("raise", moment, after=2)
    else:
        env = FaultyEnv()
        env.fail("raise", moment, after=2)
    env.reset(seed=1)
    if moment == "reset":
        CALLS[moment](env)
    else:
        for other in CALLS.keys() - {moment}:
            CALLS[other](env)
        CALLS[moment](env)
        CALLS[moment](env)
    with pytest.raises(ValueError, match="FaultyEnv failed in") as caught:
        CALLS[moment](env)
    what, steps = caught.value.args
    assert what == f"FaultyEnv failed in {moment}"
    assert type(steps) is int
    assert caught.value.__notes__ == ["a note of the env"]
    CALLS[moment](env)


def test_another_demand_takes_the_place_of_one_in_the_same_moment() -> None:
    env = FaultyEnv()
    env.reset(seed=1)
    env.fail("raise")
    env.fail("nan-reward")
    env.fail("exit", "render")
    assert np.isnan(env.step(np.int64(0))[1])
    assert env.step(np.int64(0))[1] == 2
    with pytest.raises(SystemExit) as caught:
        env.render()
    assert caught.value.code == 3


def test_the_constructor_fails() -> None:
    with pytest.raises(ValueError, match="FaultyEnv failed in init"):
        FaultyEnv("raise", "init")
    with pytest.raises(UnpicklableError):
        FaultyEnv("raise-unpicklable", "init")


def test_what_does_not_pickle_does_not() -> None:
    env = FaultyEnv("raise-unpicklable", "reset")
    with pytest.raises(UnpicklableError) as caught:
        env.reset()
    with pytest.raises(TypeError):
        pickle.dumps(caught.value)


@pytest.mark.parametrize("moment", ["reset", "step"])
def test_results_are_wrong(moment: Any) -> None:
    env = FaultyEnv()
    env.reset(seed=1)
    env.fail("wrong-shape", moment)
    assert CALLS[moment](env)[0].shape == (4,)
    env.fail("wrong-dtype", moment)
    assert CALLS[moment](env)[0].dtype == np.complex64
    assert env.observation_space.contains(CALLS[moment](env)[0])


def test_what_ends_the_process_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a system that only takes notes."""
    done: list[Any] = []
    slept: list[float] = []
    monkeypatch.setattr(os, "kill", lambda *arguments: done.append(arguments))
    monkeypatch.setattr(ctypes, "string_at", lambda address: done.append(address))
    monkeypatch.setattr(time, "sleep", slept.append)
    env = FaultyEnv("slow", seconds=0.25)
    env.reset(seed=1)
    env.step(np.int64(0))
    assert slept == [0.25]
    env.fail("kill")
    env.step(np.int64(0))
    env.fail("segfault")
    env.step(np.int64(0))
    assert done == [(os.getpid(), signal.SIGKILL), 0]


def test_nothing_that_is_raised_ends_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    class ItIsOverError(BaseException):
        pass

    def sleep(_seconds: float) -> None:
        calls.append("sleep")
        if len(calls) == 3:
            monkeypatch.setattr(faulty_env, "contextlib", Over())
        raise KeyboardInterrupt

    class Over:
        """What the test ends the loop by."""

        def suppress(self, _type: Any) -> Any:
            raise ItIsOverError

    calls: list[str] = []
    monkeypatch.setattr(time, "sleep", sleep)
    env = FaultyEnv("hang")
    env.reset(seed=1)
    with pytest.raises(ItIsOverError):
        env.step(np.int64(0))
    assert calls == ["sleep"] * 3


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        (("explode",), {}, "fault='explode': expected one of 'raise', "),
        (("raise", "call"), {}, "moment='call': expected one of 'init', 'reset', 'step', 'render', 'close'"),
        (("nan-reward", "reset"), {}, "moment='reset': expected one of 'step' for 'nan-reward'"),
        (("wrong-shape", "init"), {}, "moment='init': expected one of 'reset', 'step'"),
        (("raise",), {"after": -1}, "after=-1: expected a number"),
        (("raise", "init"), {"after": 1}, "after=1: expected a number"),
    ],
)
def test_what_does_not_exist_is_refused(arguments: Any, keywords: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FaultyEnv(*arguments, **keywords)


def test_what_is_past_is_refused() -> None:
    with pytest.raises(ValueError, match="asked for by the constructor"):
        FaultyEnv().fail("raise", "init")


@pytest.mark.parametrize("fault", ["kill", "segfault", "hang", "hang-in-c"])
async def test_what_would_end_the_process_of_a_loop_is_refused(fault: Any) -> None:
    """Also by the constructor, where it would happen at once."""
    with pytest.raises(RuntimeError, match=f"'{fault}' refused.*{os.getpid()}.*num_workers=1 or more"):
        FaultyEnv(fault, "init")
    async with aiovec.AsyncVectorEnv([FaultyEnv], num_workers=0) as envs:
        await envs.reset(seed=1)
        with pytest.raises(RuntimeError, match="refused"):
            await envs.call("fail", fault)
        observations, *_ = await envs.step([0])
        assert observations[0, 0] == 1
    await asyncio.to_thread(FaultyEnv, fault)  # no loop runs there


# ---- what is said of it


def test_its_table_has_every_fault() -> None:
    rows = [line.split("|") for line in (FaultyEnv.__doc__ or "").splitlines() if line.lstrip().startswith('| ``"')]
    assert [row[1].strip().strip('`"') for row in rows] == list(get_args(Fault))
    assert get_args(Moment) == ("init", *CALLS)


def test_an_env_fn_of_it_travels() -> None:
    env_fn = pickle.loads(cloudpickle.dumps(functools.partial(FaultyEnv, "raise", "step", after=1)))
    assert isinstance(env_fn(), gym.Env)


def test_importing_aiovec_does_not_import_it() -> None:
    import subprocess

    code = "import aiovec, sys; sys.exit(any(name.startswith('aiovec.testing') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)
