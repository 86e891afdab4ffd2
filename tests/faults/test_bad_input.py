"""One table of what users pass by mistake: a clear error, the way out in its text, nothing changed, nothing lost."""

from __future__ import annotations

import asyncio
import functools
import math
import re
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from fault_envs import (
    BOUND_SECONDS,
    PASS_GATE,
    FailsInWorker,
    Gate,
    Gated,
    Recorded,
    Spaces,
    Structured,
    is_running,
    turns,
)
from sample_envs import Counter

from aiovec import (
    AlreadyPendingCallError,
    AsyncVectorEnv,
    ClosedEnvironmentError,
    CrashLoopError,
    InvalidActionsError,
    NotStartedError,
    RemoteError,
    ResetNeeded,
    SpaceMismatchError,
    WrongLoopError,
    failures,
    make_vec,
)

NUM_ENVS = 3


def counters() -> list[Callable[[], gym.Env[Any, Any]]]:
    return [functools.partial(Counter, length=1000, offset=index) for index in range(NUM_ENVS)]


def rows(*observations: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(observations, np.float32)


@dataclass(frozen=True)
class Mistake:
    """One wrong use.

    Attributes:
        use: The call.
        error: What it raises, that very type.
        texts: What the message must say: the fact, and the way out.
    """

    use: Callable[[AsyncVectorEnv], Awaitable[Any]]
    error: type[Exception]
    texts: tuple[str, ...]


def step(actions: Any, *texts: str) -> Mistake:
    return Mistake(lambda envs: envs.step(actions), InvalidActionsError, ("actions", *texts, "No env was stepped"))


def reset(error: type[Exception], *texts: str, **arguments: Any) -> Mistake:
    return Mistake(lambda envs: envs.reset(**arguments), error, texts)


def call(error: type[Exception], *texts: str, **arguments: Any) -> Mistake:
    return Mistake(lambda envs: envs.call("_observation", **arguments), error, texts)


MISTAKES: dict[str, Mistake] = {
    # ---- actions
    "too few actions": step([0, 0], "(3,)", "(2,)"),
    "too many actions": step(np.zeros(4, np.int64), "(3,)", "(4,)"),
    "no actions": step([], "(3,)", "(0,)"),
    "one action": step(0, "(3,)", "()"),
    "None as actions": step(None, "(3,)"),
    "actions of another dtype": step(np.zeros(3, np.float32), "int64", "float32"),
    "actions that are text": step(["left", "left", "right"], "int64"),
    "actions with a dimension more": step([[0, 0, 0]], "(3,)", "(1, 3)"),
    "ragged actions": step([[0], [0, 1], [0]], "(3,)", "ragged"),
    "a dict of actions": step({"move": [0, 0, 0]}, "(3,)"),
    # ---- seeds
    "too few seeds": reset(ValueError, "seed", "2", "3 envs", "one seed each", seed=[1, 2]),
    "too many seeds": reset(ValueError, "seed", "4", "3 envs", seed=(1, 2, 3, 4)),
    "seeds for all, but some envs": reset(ValueError, "seed", "3", "2 envs", seed=[1, 2, 3], env_ids=[0, 2]),
    "a float as seed": reset(TypeError, "seed=1.5", "int", seed=1.5),
    "text as seed": reset(TypeError, "seed[0]='a'", "int", seed="abc"),
    "a float among the seeds": reset(TypeError, "seed[1]=2.0", "int", seed=[1, 2.0, 3]),
    "a bool as seed": reset(TypeError, "seed=True", "int", seed=True),
    # ---- env_ids
    "unknown env": reset(ValueError, "env_ids has 3", "0 to 2", env_ids=[0, 3]),
    "negative env": reset(ValueError, "env_ids has -1", "0 to 2", env_ids=[-1]),
    "an env twice": reset(ValueError, "env_ids has 1 twice", env_ids=[1, 0, 1]),
    "no envs": reset(ValueError, "env_ids is empty", "leave it out", env_ids=[]),
    "a number as env_ids": reset(TypeError, "env_ids", env_ids=1),
    "a name among env_ids": reset(ValueError, "env_ids has 'a'", env_ids=["a"]),
    "a mask as env_ids": reset(ValueError, "env_ids has", env_ids=np.array([True, False, True])),
    "a call of an unknown env": call(ValueError, "env_ids has 7", "0 to 2", env_ids=[7]),
    "a call of an env twice": call(ValueError, "env_ids has 0 twice", env_ids=[0, 0]),
    "a call of no env": call(ValueError, "env_ids is empty", env_ids=()),
    "rendering an unknown env": Mistake(lambda envs: envs.render(env_ids=[3]), ValueError, ("env_ids has 3",)),
    "an attribute of an unknown env": Mistake(
        lambda envs: envs.get_attr("steps", env_ids=[3]), ValueError, ("env_ids has 3",)
    ),
    # ---- reset_mask and options
    "a mask that is a list": reset(TypeError, "reset_mask", "(3,)", "list", options={"reset_mask": [True] * 3}),
    "a mask of numbers": reset(TypeError, "reset_mask", "bool", "int64", options={"reset_mask": np.array([1, 0, 1])}),
    "a mask of a wrong length": reset(ValueError, "reset_mask", "(3,)", "(2,)", options={"reset_mask": np.ones(2, bool)}),
    "a mask of nobody": reset(ValueError, "reset_mask", "no True", options={"reset_mask": np.zeros(3, bool)}),
    "a mask and env_ids": reset(
        ValueError, "env_ids", "reset_mask", "one of them", env_ids=[0], options={"reset_mask": np.ones(3, bool)}
    ),
    "options that are a number": reset(TypeError, "options", options=3),
    "options that are a list": reset(TypeError, "options", options=["easy"]),
    # ---- set_attr
    "too few values": Mistake(
        lambda envs: envs.set_attr("length", [1, 2]), ValueError, ("values", "length 2", "3 envs", "a single one")
    ),
    "values for all, but some envs": Mistake(
        lambda envs: envs.set_attr("length", [1, 2, 3], env_ids=[0]), ValueError, ("values", "length 3", "1 envs")
    ),
    "setting for an unknown env": Mistake(
        lambda envs: envs.set_attr("length", 5, env_ids=[3]), ValueError, ("env_ids has 3",)
    ),
    # ---- two starts
    "arguments by position": Mistake(lambda envs: envs.reset(42), TypeError, ("positional",)),  # type: ignore[misc]
}  # fmt: skip


async def assert_refused(envs: AsyncVectorEnv, mistake: Mistake) -> None:
    with pytest.raises(mistake.error) as caught:
        await mistake.use(envs)
    assert type(caught.value) is mistake.error
    for text in mistake.texts:
        assert text in str(caught.value)


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
async def test_a_mistake_changes_nothing(mistake: Mistake) -> None:
    """The next correct step gives exactly what it would have given."""
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(counters(), num_workers=0) as envs:
        await envs.reset(seed=1)
        await envs.step([0, 1, 2])
        await assert_refused(envs, mistake)
        observations, rewards, *_, infos = await envs.step([0, 1, 2])
        np.testing.assert_array_equal(observations, rows([0, 1, 2], [1, 1, 2], [2, 1, 2]))
        assert rewards.tolist() == [2, 2, 2]
        assert infos["steps"].tolist() == [2, 2, 2]
        assert [list(map(int, actions)) for actions in await envs.get_attr("actions")] == [[0, 0], [1, 1], [2, 2]]
        assert await envs.get_attr("length") == (1000, 1000, 1000)


@pytest.mark.parametrize("num_workers", [1, 2])
async def test_all_mistakes_in_one_vector_with_workers(num_workers: int) -> None:
    """Before the first reset, and between steps: no request and no number is lost on the way."""
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(counters(), num_workers=num_workers) as envs:
        for mistake in MISTAKES.values():
            if mistake.error is not InvalidActionsError:  # without a reset, that is what step says
                await assert_refused(envs, mistake)
        await envs.reset()
        for number, mistake in enumerate(MISTAKES.values(), start=1):
            await assert_refused(envs, mistake)
            observations, rewards, *_ = await envs.step([0, 1, 2])
            np.testing.assert_array_equal(observations, rows([0, 1, number], [1, 1, number], [2, 1, number]))
            assert rewards.tolist() == [number] * 3


def holding_a_lock() -> Any:
    return {"lock": threading.Lock()}


UNPICKLABLE: dict[str, Callable[[AsyncVectorEnv], Awaitable[Any]]] = {
    "options": lambda envs: envs.reset(options=holding_a_lock()),
    "arguments of call": lambda envs: envs.call("_observation", holding_a_lock()),
    "values of set_attr": lambda envs: envs.set_attr("length", holding_a_lock()),
}


@pytest.mark.parametrize("use", UNPICKLABLE.values(), ids=UNPICKLABLE.keys())
async def test_what_cannot_travel_to_workers_touches_none(use: Callable[[AsyncVectorEnv], Awaitable[Any]]) -> None:
    """Every request is pickled before any is sent."""
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(counters(), num_workers=2) as envs:
        await envs.reset()
        with pytest.raises(TypeError, match="pickle"):
            await use(envs)
        observations, *_ = await envs.step([0, 0, 0])
        np.testing.assert_array_equal(observations, rows([0, 1, 1], [1, 1, 1], [2, 1, 1]))


UNLOADABLE: dict[str, tuple[Callable[[AsyncVectorEnv, Any], Awaitable[Any]], str]] = {
    "options": (lambda envs, bad: envs.reset(options={"bad": bad}, env_ids=[0]), "reset"),
    "options of one": (lambda envs, bad: envs[0].reset(options={"bad": bad}), "reset"),
    "options with a mask": (
        lambda envs, bad: envs.reset(options={"bad": bad, "reset_mask": np.array([True, False, False])}), "reset"
    ),
    "arguments of call": (lambda envs, bad: envs.call("_observation", bad, env_ids=[0]), "call"),
    "values of set_attr": (lambda envs, bad: envs.set_attr("length", bad, env_ids=[0]), "set_attr"),
}  # fmt: skip


@pytest.mark.parametrize(("use", "command"), UNLOADABLE.values(), ids=UNLOADABLE.keys())
@pytest.mark.parametrize("on_failure", ["raise", "restart"])
async def test_what_does_not_load_in_a_worker_fails_the_envs_that_were_asked(
    use: Callable[[AsyncVectorEnv, Any], Awaitable[Any]], command: str, on_failure: str
) -> None:
    """The worker cannot know which these are, and has others too."""
    options: dict[str, Any] = {"on_failure": on_failure, "max_restarts": 1}
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(counters(), num_workers=1, **options) as envs:
        await envs.reset()
        with pytest.raises((LookupError, CrashLoopError)) as caught:
            await use(envs, FailsInWorker())
        assert [failure.env_index for failure in failures(caught.value)] == [0]
        if command == "reset":
            assert [batch.env_ids.tolist() async for batch in envs.batches()] == []
            with pytest.raises(ResetNeeded) as refused:
                await envs.step([0, 0, 0])
            assert refused.value.env_ids == (0,)
            await envs.reset(env_ids=[0])
        observations, *_ = await envs.step([0, 0, 0])
        assert observations[:, 2].tolist() == [1, 1, 1]


@pytest.mark.parametrize("num_workers", [1, 2])
async def test_what_raises_a_sealed_exception_where_it_is_loaded(num_workers: int) -> None:
    """The worker's note to it is no attribute that its class could refuse."""
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(counters(), num_workers=num_workers) as envs:
        await envs.reset()
        with pytest.raises(RemoteError, match="Sealed: what is sealed"):
            await envs.call("_observation", FailsInWorker("what is sealed"), env_ids=[0])
        observations, *_ = await envs.step([0, 0, 0])
        assert observations[:, 2].tolist() == [1, 1, 1]


async def test_an_env_fn_that_cannot_travel() -> None:
    """Nothing was started, and nothing is left."""
    envs = AsyncVectorEnv([functools.partial(Counter, holding_a_lock())], num_workers=1)
    async with asyncio.timeout(BOUND_SECONDS):
        with pytest.raises(TypeError, match="pickle"):
            await envs
        with pytest.raises(NotStartedError):
            await envs.step([0])


# ---- actions that have a structure

PUSH = np.zeros((NUM_ENVS, 2), np.float32)
STRUCTURED_MISTAKES: dict[str, Mistake] = {
    "no mapping": step([0, 0, 0], "actions['move']", "list"),
    "an array": step(np.zeros((3, 3), np.float32), "actions['move']", "ndarray"),
    "a missing key": step({"move": [0, 0, 0]}, "actions['push']", "without 'push'"),
    "a leaf of a wrong shape": step({"move": [0, 0, 0], "push": PUSH[:2]}, "actions['push']", "(3, 2)", "(2, 2)"),
    "a leaf of a wrong dtype": step({"move": PUSH[:, 0], "push": PUSH}, "actions['move']", "int64", "float32"),
    "one dict an env": step([{"move": 0, "push": PUSH[0]}] * 3, "actions['move']", "list"),
}


@pytest.mark.parametrize("num_workers", [0, 2])
async def test_actions_outside_of_the_structure_of_the_space(num_workers: int) -> None:
    """The leaf is named; what other leaves held was not written over."""
    env_fns = [functools.partial(Structured, offset=index) for index in range(NUM_ENVS)]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=num_workers) as envs:
        await envs.reset()
        for number, mistake in enumerate(STRUCTURED_MISTAKES.values(), start=1):
            await assert_refused(envs, mistake)
            observations, *_ = await envs.step({"move": [1, 2, 3], "push": PUSH})
            assert observations[:, 2].tolist() == [number] * 3
        for env_index, actions in enumerate(await envs.get_attr("actions")):
            assert [int(action["move"]) for action in actions] == [env_index + 1] * len(STRUCTURED_MISTAKES)


@pytest.mark.parametrize("actions", [([0, 0, 0],), [0, 0, 0], 0])
async def test_actions_outside_of_a_tuple_space(actions: Any) -> None:
    """One subspace has no actions, or there is no tuple at all."""
    space = gym.spaces.Tuple([gym.spaces.Discrete(4), gym.spaces.Box(-1, 1, (2,), np.float32)])
    env_fns = [functools.partial(Spaces, action=space)] * NUM_ENVS
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=0) as envs:
        await envs.reset()
        with pytest.raises(InvalidActionsError, match=r"actions.*No env was stepped"):
            await envs.step(actions)
        observations, *_ = await envs.step(([0, 0, 0], PUSH))
        assert observations[:, 2].tolist() == [1, 1, 1]


# ---- arguments of the vector

ARGUMENTS: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "zero envs": (lambda: AsyncVectorEnv([]), ValueError, ("env_fns is empty", "at least one")),
    "an env_fn alone": (lambda: AsyncVectorEnv(Counter), TypeError, ("env_fns",)),  # type: ignore[arg-type]
    "an env for an env_fn": (
        lambda: AsyncVectorEnv([Counter, Counter()]), TypeError, ("env_fns[1]", "cannot be called", "lambda")
    ),
    "an id for an env_fn": (lambda: AsyncVectorEnv(["CartPole-v1"]), TypeError, ("env_fns[0]", "'CartPole-v1'")),
    "num_workers=-1": (lambda: AsyncVectorEnv(counters(), num_workers=-1), ValueError, ("num_workers=-1", "from 0")),
    "num_workers=1.5": (lambda: AsyncVectorEnv(counters(), num_workers=1.5), ValueError, ("num_workers=1.5",)),
    "num_workers=True": (lambda: AsyncVectorEnv(counters(), num_workers=True), ValueError, ("num_workers=True",)),
    "observation_mode": (
        lambda: AsyncVectorEnv(counters(), observation_mode="equal"),
        ValueError, ("observation_mode='equal'", "'same'", "'different'"),
    ),
    "half an observation_mode": (
        lambda: AsyncVectorEnv(counters(), observation_mode=(gym.spaces.Discrete(2),)),
        TypeError, ("observation_mode", "single_observation_space"),
    ),
    "autoreset_mode": (
        lambda: AsyncVectorEnv(counters(), autoreset_mode="never"),
        ValueError, ("autoreset_mode='never'", "'NextStep'", "'SameStep'", "'Disabled'"),
    ),
    "context": (
        lambda: AsyncVectorEnv(counters(), context="thread"), ValueError, ("context='thread'", "'fork'", "'spawn'")
    ),
    **{
        f"{name}={value!r}": (
            lambda name=name, value=value: AsyncVectorEnv(counters(), **{name: value}),
            (ValueError, TypeError), (f"{name}={value!r}", "seconds"),
        )
        for name in ("start_timeout", "close_grace")
        for value in (0, -1, math.nan, "10", None)
    },
    **{
        f"{name}={value!r}": (
            lambda name=name, value=value: AsyncVectorEnv(counters(), **{name: value}),
            TypeError, (f"{name}={value!r}", "expected True or False"),
        )
        for name, values in (
            ("shared_memory", ("yes", 1, None)), ("copy", ("no", 0, [])), ("traceback_locals", (3, None))
        )
        for value in values
    },
    "max_buffers": (lambda: AsyncVectorEnv(counters(), max_buffers=0), ValueError, ("max_buffers=0", "from 1")),
    "unknown option": (lambda: AsyncVectorEnv(counters(), workers=2), TypeError, ("workers",)),
    # ---- make_vec
    "vector options among the env's": (
        lambda: make_vec("CartPole-v1", 2, num_workers=1, copy=True),
        TypeError, ("copy, num_workers", "vector_kwargs={'copy': True, 'num_workers': 1}"),
    ),
    "unregistered id": (lambda: make_vec("NoSuchEnv-v0"), gym.error.UnregisteredEnv, ("NoSuchEnv",)),
    "unregistered version": (lambda: make_vec("CartPole-v99"), gym.error.UnregisteredEnv, ("CartPole", "v1")),
    "unknown module": (lambda: make_vec("no_such_module:Env-v0"), ModuleNotFoundError, ("no_such_module",)),
    "num_envs=0": (lambda: make_vec("CartPole-v1", 0), ValueError, ("num_envs=0", "from 1")),
    "num_envs=-1": (lambda: make_vec("CartPole-v1", num_envs=-1), ValueError, ("num_envs=-1",)),
    "num_envs=1.5": (lambda: make_vec("CartPole-v1", num_envs=1.5), TypeError, ("num_envs=1.5", "int")),
    "unknown vector option": (lambda: make_vec("CartPole-v1", vector_kwargs={"workers": 1}), TypeError, ("workers",)),
    "wrong vector option": (
        lambda: make_vec("CartPole-v1", vector_kwargs={"num_workers": -1}), ValueError, ("num_workers=-1",)
    ),
}  # fmt: skip


@pytest.mark.parametrize(("build", "error", "texts"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_wrong_arguments(build: Callable[[], Any], error: type[Exception], texts: tuple[str, ...]) -> None:
    """Told where the vector is built, before any worker; the message names the argument."""
    with pytest.raises(error) as caught:
        build()
    for text in texts:
        assert text in str(caught.value)


async def test_an_unknown_argument_of_the_env_is_told_at_the_start() -> None:
    """It is the env's own, so only the env can tell; each of them does."""
    async with asyncio.timeout(BOUND_SECONDS):
        with pytest.raises(TypeError, match="no_such_argument"):
            await make_vec("CartPole-v1", num_envs=1, no_such_argument=1)


# ---- spaces that differ

BOX = gym.spaces.Box(-1, 1, (3,), np.float32)
DIFFERING: dict[str, tuple[gym.spaces.Space[Any] | None, gym.spaces.Space[Any] | None, str, str, str]] = {
    "shape": (gym.spaces.Box(-1, 1, (4,), np.float32), None, "same", "observation", "Shapes and dtypes must agree"),
    "dtype": (gym.spaces.Box(-1, 1, (3,), np.float64), None, "different", "observation", "dtypes must agree"),
    "shape, in mode different": (
        gym.spaces.Box(-1, 1, (4,), np.float32), None, "different", "observation", "Shapes",
    ),
    "bounds": (gym.spaces.Box(-2, 2, (3,), np.float32), None, "same", "observation", "observation_mode='different'"),
    "kind": (gym.spaces.Discrete(3), None, "same", "observation", "Discrete"),
    "actions": (None, gym.spaces.Discrete(5), "same", "action", "must be equal"),
    "actions, in mode different": (None, gym.spaces.Discrete(5), "different", "action", "must be equal"),
}  # fmt: skip


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("differing", DIFFERING)
async def test_spaces_that_differ(differing: str, num_workers: int) -> None:
    """The first env that differs is named, with both spaces; nothing is left."""
    observation, action, mode, kind, advice = DIFFERING[differing]
    env_fns: list[Any] = [functools.partial(Spaces, BOX)] * 3
    env_fns.insert(2, functools.partial(Spaces, observation or BOX, action))
    envs = AsyncVectorEnv(env_fns, num_workers=num_workers, observation_mode=mode)
    async with asyncio.timeout(BOUND_SECONDS):
        with pytest.raises(SpaceMismatchError, match=f"{kind} space of env 2 ") as caught:
            await envs
        assert caught.value.env_index == 2
        assert str(observation or action) in str(caught.value)
        assert str(BOX if observation else gym.spaces.Discrete(4)) in str(caught.value)
        assert advice in str(caught.value)
        with pytest.raises(NotStartedError):
            envs.observation_space
        await envs.close()


# ---- two tasks at once


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize(
    ("command", "use"),
    [
        ("step", lambda envs: envs.step([0, 0, 0])),
        ("reset", lambda envs: envs.reset()),
        ("reset", lambda envs: envs.reset(env_ids=[1])),
        ("reset", lambda envs: envs.reset(options={"reset_mask": np.array([False, True, False])})),
    ],
    ids=["step", "reset", "reset of some", "reset by mask"],
)
async def test_a_second_call_while_a_step_runs(
    command: str, use: Callable[[AsyncVectorEnv], Awaitable[Any]], num_workers: int, gate: Gate
) -> None:
    """Refused at once, and the step that runs gives what it would have given."""
    env_fns = [functools.partial(Gated, gate.key, offset=index) for index in range(3)]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=num_workers) as envs:
        await envs.reset()
        step = asyncio.create_task(envs.step([0, PASS_GATE, 0]))
        await gate.arrived()
        refused = use(envs)
        with pytest.raises(
            AlreadyPendingCallError, match=rf"{command}\(\) refused: another task awaits.*env"
        ) as caught:
            refused.send(None)  # type: ignore[attr-defined]  # refused before any await
        assert set(caught.value.env_ids) <= {0, 1, 2}
        assert caught.value.command == command
        with pytest.raises(gym.error.AlreadyPendingCallError):
            await use(envs)
        assert not step.done()
        gate.open()
        observations, rewards, *_, infos = await step
        np.testing.assert_array_equal(observations, rows([0, 1, 1], [1, 1, 1], [2, 1, 1]))
        assert rewards.tolist() == [1, 1, 1]
        assert infos["steps"].tolist() == [1, 1, 1]
        observations, *_ = await envs.step([0, 0, 0])
        assert observations[:, 2].tolist() == [2, 2, 2]


async def test_a_step_while_a_reset_runs(gate: Gate) -> None:
    """The reset goes on; an env that no task awaits is not named."""
    env_fns = [functools.partial(Gated, gate.key, at="reset", offset=index) for index in range(3)]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=2) as envs:
        await envs.reset()
        reset = asyncio.create_task(envs.reset(options={"gate": True}, env_ids=[2]))
        await gate.arrived()
        with pytest.raises(AlreadyPendingCallError, match="another task awaits env 2") as caught:
            await envs.step([0, 0, 0])
        assert caught.value.env_ids == (2,)
        observations, infos = await envs.reset(env_ids=[0, 1])  # other envs, in another worker
        np.testing.assert_array_equal(observations, rows([0, 2, 0], [1, 2, 0]))
        assert infos["episodes"].tolist() == [2, 2]
        gate.open()
        observations, _ = await reset
        np.testing.assert_array_equal(observations, rows([2, 2, 0]))
        observations, *_ = await envs.step([0, 0, 0])
        np.testing.assert_array_equal(observations, rows([0, 2, 1], [1, 2, 1], [2, 2, 1]))


# ---- not now, not here

USES: dict[str, Callable[[AsyncVectorEnv], Awaitable[Any]]] = {
    "reset": lambda envs: envs.reset(),
    "step": lambda envs: envs.step([0, 0, 0]),
    "call": lambda envs: envs.call("_observation"),
    "get_attr": lambda envs: envs.get_attr("steps"),
    "set_attr": lambda envs: envs.set_attr("length", 3),
    "render": lambda envs: envs.render(),
}
STARTS: dict[str, Callable[[AsyncVectorEnv], Awaitable[Any]]] = {
    "await": lambda envs: asyncio.ensure_future(_awaited(envs)),
    "async with": lambda envs: envs.__aenter__(),
}
PROPERTIES = (
    "metadata",
    "render_mode",
    "single_observation_space",
    "observation_space",
    "single_action_space",
    "action_space",
)


async def _awaited(envs: AsyncVectorEnv) -> AsyncVectorEnv:
    return await envs


def names_command(name: str) -> str:
    """A message begins with the command, as the user wrote it."""
    return {"get_attr": r"(get_attr|steps)", "call": r"(call|_observation)"}.get(name, re.escape(name))


@pytest.mark.parametrize("num_workers", [0, 2])
async def test_before_the_start(num_workers: int) -> None:
    """Every method and property says how to start; what is known without workers is there."""
    envs = AsyncVectorEnv(counters(), num_workers=num_workers)
    assert (envs.num_envs, len(envs), envs.num_workers, envs.closed) == (3, 3, num_workers, False)
    assert envs.spec is None
    assert "not started" in repr(envs)
    async with asyncio.timeout(BOUND_SECONDS):
        for name, use in USES.items():
            if name != "reset":  # which starts
                with pytest.raises(
                    NotStartedError, match=f"{names_command(name)}.*async with.*await envs.reset"
                ) as error:
                    await use(envs)
                assert isinstance(error.value, RuntimeError)
        for name in PROPERTIES:
            with pytest.raises(NotStartedError, match=f"`{name}`.*async with"):
                getattr(envs, name)
        observations, _ = await envs.reset()
        np.testing.assert_array_equal(observations, rows([0, 1, 0], [1, 1, 0], [2, 1, 0]))
        for name in PROPERTIES:
            getattr(envs, name)
        await envs.close()


async def test_a_wrong_reset_before_the_start_starts_nothing_or_harms_nothing() -> None:
    """Whether its arguments are looked at before or after the start, the next reset is the first."""
    async with asyncio.timeout(BOUND_SECONDS):
        envs = AsyncVectorEnv(counters(), num_workers=2)
        with pytest.raises(ValueError, match="seed has length 2"):
            await envs.reset(seed=[1, 2])
        observations, _ = await envs.reset(seed=[1, 2, 3])
        np.testing.assert_array_equal(observations, rows([0, 1, 0], [1, 1, 0], [2, 1, 0]))
        await envs.close()


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("end", ["close", "aclose", "terminate"])
async def test_after_close(end: str, num_workers: int, started: bool) -> None:
    """Every method says that the vector is closed; closing again is nothing."""
    envs = AsyncVectorEnv(counters(), num_workers=num_workers)
    async with asyncio.timeout(BOUND_SECONDS):
        if started:
            await envs.reset()
        ended = getattr(envs, end)()
        if ended is not None:
            await ended
        assert envs.closed
        assert "closed" in repr(envs)
        for name, use in {**USES, **STARTS}.items():
            with pytest.raises(
                ClosedEnvironmentError, match=f"{names_command(name)}.* closed. Build a new one"
            ) as error:
                await use(envs)
            assert isinstance(error.value, gym.error.ClosedEnvironmentError)
        await envs.close()
        envs.terminate()
        assert (envs.num_envs, len(envs), envs.num_workers) == (3, 3, num_workers)


async def test_terminate_in_the_loop_does_not_harm_the_next_vector() -> None:
    """The same descriptor numbers come again."""
    async with asyncio.timeout(BOUND_SECONDS):
        for _ in range(3):
            envs = AsyncVectorEnv(counters(), num_workers=2)
            await envs.reset()
            envs.terminate()
            assert envs.closed


@pytest.mark.parametrize("num_workers", [0, 2])
async def test_from_another_loop(num_workers: int) -> None:
    """Each call says so, and the loop that it belongs to does not notice."""
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(counters(), num_workers=num_workers) as envs:
        await envs.reset()

        async def use_all() -> list[str]:
            refused = []
            for name, use in {**USES, **STARTS, "close": lambda envs: envs.close()}.items():
                with pytest.raises(
                    WrongLoopError, match=rf"{names_command(name)}.*another event loop.*one vector"
                ) as error:
                    await use(envs)
                assert isinstance(error.value, RuntimeError)
                refused.append(name)
            return refused

        refused = await asyncio.to_thread(lambda: asyncio.run(use_all()))
        assert len(refused) == len(USES) + len(STARTS) + 1
        assert not envs.closed
        observations, *_ = await envs.step([0, 0, 0])
        np.testing.assert_array_equal(observations, rows([0, 1, 1], [1, 1, 1], [2, 1, 1]))


async def test_start_from_another_loop_while_it_starts(tmp_path: Any, gate: Gate) -> None:
    """The other loop is refused; the start that runs ends well."""
    env_fns = [functools.partial(Gated, gate.key, at="init", offset=index) for index in range(2)]
    async with asyncio.timeout(BOUND_SECONDS):
        envs = AsyncVectorEnv(env_fns, num_workers=2)
        start = asyncio.create_task(envs.reset())
        await gate.arrived(2)
        with pytest.raises(WrongLoopError):
            await asyncio.to_thread(lambda: asyncio.run(envs.reset()))  # type: ignore[arg-type]
        gate.open(2)
        observations, _ = await start
        np.testing.assert_array_equal(observations, rows([0, 1, 0], [1, 1, 0]))
        await envs.close()


@pytest.mark.not_on_ray("an actor that is killed ends soon, not at once")
async def test_a_second_start_is_the_same_vector(tmp_path: Any) -> None:
    """`await` inside `async with`, and twice: no env is built again, no worker is lost."""
    log = str(tmp_path / "log")
    env_fns = [functools.partial(Recorded, log, index) for index in range(3)]
    async with asyncio.timeout(BOUND_SECONDS), AsyncVectorEnv(env_fns, num_workers=2) as envs:
        pids = await envs.get_attr("pid")
        assert await envs is envs
        await envs.reset()
        assert await envs is envs
        assert await envs.get_attr("pid") == pids
        assert len((tmp_path / "log").read_text().splitlines()) == 3
    await turns()
    assert not any(is_running(pid) for pid in pids)


def test_what_make_vec_does_not_take() -> None:
    """It says where that belongs."""
    with pytest.raises(TypeError, match=r"expected an id, or a spec; a class or a function goes into"):
        make_vec(Counter, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("index", "error", "text"),
    [
        (3, IndexError, r"envs\[3\]: the envs are numbered from 0 to 2"),
        (-4, IndexError, r"envs\[-4\]: the envs are numbered"),
        (slice(0, 2), TypeError, r"envs\[slice\(0, 2, None\)\]: expected the index of one env"),
    ],
)
def test_an_index_of_no_env(index: Any, error: type[Exception], text: str) -> None:
    envs = AsyncVectorEnv([Counter] * 3)
    with pytest.raises(error, match=text):
        envs[index]
    assert envs[-1].env_index == 2
    assert [env.env_index for env in envs] == [0, 1, 2]
