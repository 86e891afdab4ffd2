"""Checks of an env by itself: what must be true of it before any vector can be compared with another one."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np

from aiovec.exchange import pickles
from aiovec.testing.differences import difference
from aiovec.testing.subject import FIELDS, Subject, shown
from aiovec.testing.tapes import Asked, EnvFn, record_env, without_await

__all__ = ["env_fits_spaces", "env_fn_pickles", "env_is_determined", "env_keeps_results"]

_NOT_DETERMINED = (
    "Your env's `reset(seed=…)` does not determine what follows, so neither can it be compared, nor a run be repeated. Call "
    "`super().reset(seed=seed)` first, and draw from `self.np_random` alone: not from `random`, `np.random`, the clock, "
    "`id`, `hash` of a text, or what other envs share."
)
_NOT_IN_SPACE = (
    "Correct the env, or the space that it declares: a vector has memory for what the space says, and refuses or casts "
    "what does not fit."
)
_NOT_KEPT = (
    "Your env gives the same array again, and writes into it: return a copy, `array.copy()`. A vector that keeps the last "
    "observation of an episode (`final_obs`), and a user who keeps any, would see it change."
)
_NOT_PICKLED = (
    "A worker process receives it by cloudpickle: build locks, sockets, files and simulators inside of the function, or in "
    "the env's `__init__`."
)


async def env_fn_pickles(subject: Subject) -> None:
    """The env_fn goes to a worker by cloudpickle."""
    await asyncio.to_thread(_pickle, subject, _users_env(subject))


def _pickle(subject: Subject, env_fn: EnvFn) -> None:
    try:
        again = pickles.loads(pickles.dumps_to_worker(env_fn))
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise subject.violation(f"env_fn {shown(env_fn)}", "a function that pickles", got, _NOT_PICKLED) from error
    subject.expect(callable(again), f"env_fn {shown(env_fn)}", "a function", again, _NOT_PICKLED)


async def env_is_determined(subject: Subject) -> None:
    """Two envs with the same seed and actions do the same."""
    env_fn = _users_env(subject)
    subject.where = "two envs with the same seed and actions"
    first = await asyncio.to_thread(record_env, env_fn, subject.seed, subject.num_steps)
    second = await asyncio.to_thread(record_env, env_fn, subject.seed, subject.num_steps)
    for one, other in zip(first, second, strict=False):  # where an episode ends earlier, what is before it differs
        where = f"{one.what} of two envs with the same seed"
        for field, expected, got in zip(FIELDS[one.method], one.result, other.result, strict=True):
            subject.expect_same(got, expected, f"{where}, {field}", _NOT_DETERMINED)


async def env_fits_spaces(subject: Subject) -> None:
    """Every observation is in the space."""
    env_fn = _users_env(subject)
    space = await asyncio.to_thread(_observation_space_of, env_fn)

    def look(asked: Asked) -> None:
        for at, part, value in _leaves(space, asked.result[0]):
            if not part.contains(value):
                where = f"{asked.what}, observation{at}"
                raise subject.violation(where, f"what is in {part}", _described(value), _NOT_IN_SPACE)

    subject.where = "the env by itself"
    await asyncio.to_thread(record_env, env_fn, subject.seed, subject.num_steps, look)


async def env_keeps_results(subject: Subject) -> None:
    """What the env returned does not change when it goes on."""
    kept: list[tuple[Asked, Any]] = []

    def look(asked: Asked) -> None:
        kept.append((asked, copy.deepcopy(asked.result)))

    subject.where = "the env by itself"
    await asyncio.to_thread(record_env, _users_env(subject), subject.seed, subject.num_steps, look)
    for asked, before in kept:
        for field, got, expected in zip(FIELDS[asked.method], asked.result, before, strict=True):
            if (found := difference(got, expected)) is not None:
                where = f"{asked.what}, {field}{found.at}, looked at again after {kept[-1][0].what}"
                raise subject.violation(where, shown(found.expected), shown(found.got), _NOT_KEPT)


def _users_env(subject: Subject) -> EnvFn:
    assert subject.users_env is not None  # noqa: S101  the table of checks says so
    return subject.users_env


def _observation_space_of(env_fn: EnvFn) -> gym.Space[Any]:
    env = without_await(env_fn)
    try:
        return env.observation_space
    finally:
        env.close()


def _leaves(space: gym.Space[Any], value: Any, at: str = "") -> Iterator[tuple[str, gym.Space[Any], Any]]:
    """The parts of an observation with their spaces; one whose structure is wrong is a part itself."""
    if isinstance(space, gym.spaces.Dict) and isinstance(value, dict) and value.keys() == space.spaces.keys():
        for key, part in space.spaces.items():
            yield from _leaves(part, value[key], f"{at}[{key!r}]")
    elif isinstance(space, gym.spaces.Tuple) and isinstance(value, tuple) and len(value) == len(space.spaces):
        for index, part in enumerate(space.spaces):
            yield from _leaves(part, value[index], f"{at}[{index}]")
    else:
        yield at, space, value


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return shown(f"{value.dtype}{value.shape} {value}")
    return shown(f"{type(value).__name__} {value!r}")
