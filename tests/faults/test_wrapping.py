"""Wrapped envs that fail, are cancelled, or are asked for what wrappers cannot know."""

from __future__ import annotations

import asyncio
import builtins
import contextvars
import os
import sys
import traceback
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from fault_envs import PASS_GATE, Gate, Gated, Mortal, context_of_loop, end_with_sigkill
from gymnasium.vector import VectorWrapper
from gymnasium.wrappers import vector as wrappers
from sample_envs import Counter, Raises

import aiovec

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

STATE: contextvars.ContextVar[str] = contextvars.ContextVar("STATE", default="unset")


class Notes(VectorWrapper[Any, Any, Any, Any, Any]):
    """A user's own wrapper: notes each step that begins, ends, or does not end."""

    def __init__(self, env: Any, fails_at: str = "") -> None:
        super().__init__(env)
        self.notes: list[Any] = []
        self.fails_at = fails_at
        if fails_at == "init":
            raise LookupError("in the constructor")
        self.offsets = env.get_attr("offset")  # waits for the workers, in the constructor

    def step(self, actions: Any) -> Any:
        self.notes.append("begun")
        try:
            result = super().step(actions)
            if self.fails_at == "step":
                raise LookupError("in the wrapper")
        except BaseException as error:
            self.notes.append(type(error))
            raise
        STATE.set("stepped")
        self.notes.append("ended")
        self.env.set_attr("offset", list(range(10, 10 + self.num_envs)))
        return result

    def again(self) -> Any:
        return self.env.render()

    def close(self, **kwargs: Any) -> None:
        self.notes.append("closed")
        if self.fails_at == "close":
            raise LookupError("in close")
        super().close(**kwargs)


def vector(env_fns: Any, **kwargs: Any) -> aiovec.AsyncVectorEnv:
    return aiovec.AsyncVectorEnv(env_fns, num_workers=2, context=context_of_loop(), **kwargs)


async def test_a_wrapper_of_ones_own() -> None:
    """It waits for workers in its constructor, its methods, several times in one; context variables are the task's."""
    env_fns = [partial(Counter, offset=offset) for offset in (3, 4)]
    async with aiovec.wrap(vector(env_fns), Notes) as envs:
        assert envs.offsets == (3, 4)
        await envs.reset(seed=1)
        await envs.step([0, 0])
        assert STATE.get() == "stepped"
        assert await envs.get_attr("offset") == (10, 11)
        assert envs.notes == ["begun", "ended"]
        notes = envs.notes
    assert notes[-1] == "closed"


async def test_an_env_fails_through_its_wrappers() -> None:
    """The exception is the env's own, with the frames of the call, the wrapper and the worker, in that order."""
    async with aiovec.wrap(vector([Raises] * 4), Notes, wrappers.RecordEpisodeStatistics) as envs:
        await envs.reset(seed=1)
        with pytest.raises(ValueError, match="An error occurred.") as caught:
            await envs.step([0, 0, 1, 0])
        names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        files = [os.path.basename(frame.filename) for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert files[0] == "test_wrapping.py"
        assert files[-1] == "sample_envs.py"
        assert names.index("test_an_env_fails_through_its_wrappers") < files.index("common.py") < len(files) - 1
        (failure,) = aiovec.failures(caught.value)
        assert failure.env_index == 2
        assert envs.notes == ["begun", ValueError]
        with pytest.raises(aiovec.ResetNeeded):
            await envs.step([0, 0, 0, 0])
        await envs.reset(options={"reset_mask": np.array([False, False, True, False])})
        await envs.step([0, 0, 0, 0])


@pytest.mark.parametrize("moment", ["init", "step", "close"])
async def test_a_wrapper_fails(moment: str) -> None:
    """Its exception is raised; the vector is closed with it where it was at the start or at the end."""
    envs = vector([Counter] * 2)
    wrapped = aiovec.wrap(envs, partial(Notes, fails_at=moment))
    with pytest.raises(LookupError):
        await wrapped.reset(seed=1)
        await wrapped.step([0, 0])
        await wrapped.close()
    if moment == "step":
        assert not envs.closed
        await wrapped.reset(seed=1)
        await wrapped.close()
    assert envs.closed
    assert wrapped.closed


async def test_a_cancelled_step(gate: Gate) -> None:
    """The wrapper sees the cancellation; until a reset, nothing goes on; the reset waits out what is owed."""
    async with aiovec.wrap(vector([partial(Gated, gate.key), Counter]), Notes) as envs:
        await envs.reset(seed=1)
        task = asyncio.create_task(envs.step([PASS_GATE, 0]))
        await gate.arrived()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert envs.notes == ["begun", asyncio.CancelledError]
        with pytest.raises(aiovec.ResetNeeded, match="whose result their wrappers have not seen"):
            await envs.step([0, 0])
        with pytest.raises(aiovec.ResetNeeded):
            await envs.render()
        gate.open()
        observations, _ = await envs.reset(seed=1)
        assert observations[:, 2].tolist() == [0, 0]
        observations, rewards, *_ = await envs.step([0, 0])
        assert rewards.tolist() == [1, 1]
        assert envs.notes == ["begun", asyncio.CancelledError, "begun", "ended"]


async def test_a_step_that_is_cancelled_behind_its_result() -> None:
    """The envs are idle, but an outer wrapper has not seen the step: a reset of some does not make up for that."""

    class Cancels(VectorWrapper[Any, Any, Any, Any, Any]):
        cancels = False

        def step(self, actions: Any) -> Any:
            result = super().step(actions)
            if self.cancels:
                raise asyncio.CancelledError  # as from a call of the workers, in which the task is cancelled
            return result

    async with aiovec.wrap(vector([Counter] * 2), Cancels, wrappers.RecordEpisodeStatistics) as envs:
        await envs.reset(seed=1)
        envs.cancels = True
        with pytest.raises(asyncio.CancelledError):
            await envs.step([0, 0])
        envs.cancels = False
        await envs.reset(options={"reset_mask": np.array([True, False])})
        with pytest.raises(aiovec.ResetNeeded, match="whose result their wrappers have not seen"):
            await envs.step([0, 0])
        await envs.reset()
        await envs.step([0, 0])


async def test_two_tasks_start_it() -> None:
    """The wrappers are built once."""
    built: list[Any] = []

    def counted(envs: Any) -> Any:
        built.append(wrappers.RecordEpisodeStatistics(envs))
        return built[-1]

    wrapped = aiovec.wrap(vector([Counter] * 2), counted)

    async def start() -> Any:
        return (await wrapped).wrappers

    chains = await asyncio.gather(start(), start())
    assert [*chains] == [(built[0],)] * 2
    assert len(built) == 1
    await wrapped.close()


class AwaitsInItsFinally(VectorWrapper[Any, Any, Any, Any, Any]):
    def step(self, actions: Any) -> Any:
        try:
            return super().step(actions)
        finally:
            self.env.get_attr("offset")


async def test_a_step_whose_coroutine_is_closed(gate: Gate) -> None:
    """Python's own complaint; what its wrapper was in the middle of is nobody else's answer."""
    async with aiovec.wrap(vector([partial(Gated, gate.key), Counter]), AwaitsInItsFinally) as envs:
        await envs.reset(seed=1)
        step = envs.step([PASS_GATE, 0])
        step.send(None)
        with pytest.raises(RuntimeError, match="coroutine ignored GeneratorExit"):
            step.close()
        del step
        gate.open()
        observations, _ = await envs.reset(seed=1)
        assert observations[:, 2].tolist() == [0, 0]
        assert (await envs.step([0, 0]))[1].tolist() == [1, 1]


async def test_a_time_out_of_a_step(gate: Gate) -> None:
    """The same by `asyncio.timeout`."""
    async with aiovec.wrap(vector([partial(Gated, gate.key)]), wrappers.RecordEpisodeStatistics) as envs:
        await envs.reset(seed=1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await envs.step([PASS_GATE])
        gate.open()
        await envs.reset(seed=1)
        await envs.step([0])


async def test_one_call_at_a_time(gate: Gate) -> None:
    """Another task is refused at once, and the wrappers see nothing of it; calls of methods go by the wrappers."""
    async with aiovec.wrap(vector([partial(Gated, gate.key), Counter]), Notes) as envs:
        await envs.reset(seed=1)
        task = asyncio.create_task(envs.step([PASS_GATE, 0]))
        await gate.arrived()
        for call in (envs.step([0, 0]), envs.reset(), envs.render()):
            with pytest.raises(aiovec.AlreadyPendingCallError, match="another task awaits"):
                await call
        assert envs.notes == ["begun"]
        gate.open()
        await task
        assert envs.notes == ["begun", "ended"]


async def test_close_while_a_step_is_awaited(gate: Gate) -> None:
    """The step's task is told, through its wrapper; nothing is left."""
    wrapped = aiovec.wrap(vector([partial(Gated, gate.key)], close_grace=0.2), Notes)
    await wrapped.reset(seed=1)
    notes = wrapped.notes
    task = asyncio.create_task(wrapped.step([PASS_GATE]))
    await gate.arrived()
    await wrapped.close()
    with pytest.raises(aiovec.ClosedEnvironmentError):
        await task
    assert notes == ["begun", aiovec.ClosedEnvironmentError, "closed"]
    await wrapped.close()
    for call in (wrapped.step([0]), wrapped.reset(), wrapped.render()):
        with pytest.raises(aiovec.ClosedEnvironmentError):
            await call


async def test_a_worker_dies_under_its_wrappers(on_ray: bool) -> None:
    """It is told through them, and a reset builds it anew."""
    async with aiovec.wrap(vector([partial(Mortal, end_with_sigkill, "step")] * 2), Notes) as envs:
        await envs.reset(seed=1)
        with pytest.raises(aiovec.WorkerDied, match="died" if on_ray else "SIGKILL"):
            await envs.step([0, 1])
        assert envs.notes == ["begun", aiovec.WorkerDied]
        await envs.reset(seed=1)
        await envs.step([0, 0])


async def test_what_goes_past_wrappers_is_refused() -> None:
    """Before the start and after it; with what to use instead."""
    wrapped = aiovec.wrap(vector([Counter] * 2), Notes)
    for name in ("send", "recv", "batches", "rollout", "rollouts"):
        with pytest.raises(aiovec.WrappedCallError, match=f"`{name}` would go past the wrappers"):
            getattr(wrapped, name)
    with pytest.raises(aiovec.NotStartedError):
        wrapped.action_space
    with pytest.raises(aiovec.NotStartedError):
        await wrapped.step([0, 0])
    async with wrapped as envs:
        with pytest.raises(aiovec.WrappedCallError, match=r"`send` would go past Notes. .*`envs.unwrapped`"):
            await envs.send([0, 0])
        with pytest.raises(aiovec.WrappedCallError):
            envs[0]
        with pytest.raises(aiovec.WrappedCallError):
            list(envs)
        await envs.reset(seed=1)
        with pytest.raises(aiovec.WrappedCallError, match="works only inside of `await envs.reset"):
            envs.again()
        assert len([*envs.unwrapped]) == 2


def test_only_our_vectors_are_wrapped() -> None:
    """Gymnasium's need no help."""
    sync = gym.vector.SyncVectorEnv([Counter])
    with pytest.raises(TypeError, match="wrap: expected an AsyncVectorEnv, got .*take their wrappers directly"):
        aiovec.wrap(sync)  # type: ignore[arg-type]
    sync.close()


async def test_wrapped_without_workers() -> None:
    """Envs that live here run outside of the wrapper's greenlet, in the task itself."""
    async with aiovec.wrap(aiovec.AsyncVectorEnv([Raises] * 2, num_workers=0), Notes) as envs:
        await envs.reset(seed=1)
        await envs.step([0, 0])
        with pytest.raises(ValueError, match="An error occurred."):
            await envs.step([1, 0])


async def test_restarts_and_wrappers() -> None:
    """It is said that NaN rewards meet wrappers; they do."""
    with pytest.warns(UserWarning, match="NaN"):
        wrapped = aiovec.wrap(vector([Raises] * 2, on_failure="restart"), wrappers.RecordEpisodeStatistics)
    async with wrapped as envs:
        await envs.reset(seed=1)
        _, rewards, _, truncations, infos = await envs.step([1, 0])
        assert np.isnan(rewards[0])
        assert truncations[0]
        assert isinstance(infos["failure"][0], ValueError)


async def test_a_start_that_fails() -> None:
    """Nothing is left, and it may be tried again."""

    def fails() -> Any:
        raise LookupError("no env")

    wrapped = aiovec.wrap(vector([fails]), wrappers.RecordEpisodeStatistics)
    for _ in range(2):
        with pytest.raises(LookupError):
            await wrapped
    await wrapped.close()


def test_without_greenlet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named."""
    imported = builtins.__import__

    def import_(name: str, *args: Any) -> Any:
        if name == "greenlet":
            raise ModuleNotFoundError("No module named 'greenlet'")
        return imported(name, *args)

    monkeypatch.setattr(builtins, "__import__", import_)
    monkeypatch.delitem(sys.modules, "aiovec.greenlets", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'aiovec\[wrappers\]'"):
        aiovec.wrap(aiovec.AsyncVectorEnv([Counter]))
