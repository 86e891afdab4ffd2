"""Hundreds of operations in random order, with time-outs and cancellations at any moment: no answer is ever mixed up.

Each env counts the actions that it received in its life, and bears that number in observation, reward and info.
"""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import anyio
import numpy as np
import pytest
from fault_envs import BOUND_SECONDS, Received, turns

from aiovec import AlreadyPendingCallError, AsyncVectorEnv, NoAsyncCallError

NUM_ENVS = 5
NUM_OPERATIONS = 500


class Model:
    """What must be true, from what was asked; each operation checks its own result."""

    def __init__(self, envs: AsyncVectorEnv, choose: random.Random) -> None:
        self.envs = envs
        self.choose = choose
        self.received = [0] * NUM_ENVS  # every accepted action reaches its env, whatever becomes of who awaits it
        self.rewards = [0] * NUM_ENVS  # of the last row: of a reset 0
        self.owed: set[int] = set()
        self.completed: dict[str, int] = {}
        self.collected = 0

    async def one(self) -> None:
        """One operation, interrupted or not."""
        whole = [self.step, self.step, self.reset, self.reset_some, self.call]
        parts = [self.send, self.send, self.recv, self.recv, self.recv, self.single_step, self.single_reset]
        name, operation, env_ids = self.choose.choice([*whole, *parts])()
        interrupt = self.choose.choice([self.not_at_all, self.not_at_all, self.time_out, self.cancel, self.move_on])
        try:
            ended = await interrupt(operation)
        except AlreadyPendingCallError:
            assert name in ("step", "send", "single step")
            assert self.owed & env_ids
            return
        except NoAsyncCallError:
            assert name == "recv"
            assert not self.owed
            return
        if ended:
            self.completed[name] = self.completed.get(name, 0) + 1
        if name in ("call", "recv"):  # an interrupted one has changed nothing, another one what it found itself
            return
        if ended and name != "send":
            self.owed -= env_ids
        else:
            self.owed |= env_ids

    # ---- operations: a name, what to await, and the envs whose rows are owed if nobody waits for them

    def some(self) -> list[int]:
        return self.choose.sample(range(NUM_ENVS), self.choose.randint(1, NUM_ENVS))

    def actions(self, count: int) -> list[int]:
        return [self.choose.choice([0, 0, 0, 1, 3]) for _ in range(count)]

    def begin_step(self, env_ids: Iterable[int]) -> None:
        env_ids = list(env_ids)
        if not self.owed.intersection(env_ids):
            for env_index in env_ids:
                self.received[env_index] += 1
                self.rewards[env_index] = self.received[env_index]

    def begin_reset(self, env_ids: Iterable[int]) -> None:
        for env_index in env_ids:
            self.rewards[env_index] = 0

    def step(self) -> tuple[str, Callable[[], Awaitable[None]], set[int]]:
        actions = self.actions(NUM_ENVS)

        async def run() -> None:
            self.begin_step(range(NUM_ENVS))
            observations, rewards, terminations, truncations, infos = await self.envs.step(actions)
            self.check(observations, infos, range(NUM_ENVS))
            np.testing.assert_array_equal(rewards, self.rewards)
            assert not (terminations | truncations).any()

        return "step", run, set(range(NUM_ENVS))

    def send(self) -> tuple[str, Callable[[], Awaitable[None]], set[int]]:
        env_ids = self.some()

        async def run() -> None:
            self.begin_step(env_ids)
            await self.envs.send(self.actions(len(env_ids)), env_ids)

        return "send", run, set(env_ids)

    def recv(self) -> tuple[str, Callable[[], Awaitable[None]], set[int]]:
        most = max(len(self.owed), 1)
        min_envs = self.choose.choice([None, self.choose.randint(1, most)])
        max_envs = self.choose.choice([None, self.choose.randint(min_envs or 1, NUM_ENVS)])

        async def run() -> None:
            env_ids, observations, rewards, terminations, truncations, infos = await self.envs.recv(min_envs, max_envs)
            taken = env_ids.tolist()
            assert len(set(taken)) == len(taken) >= (min_envs or 1)
            assert len(taken) <= (max_envs or NUM_ENVS)
            assert self.owed.issuperset(taken)
            self.owed.difference_update(taken)
            self.collected += len(taken)
            self.check(observations, infos, taken)
            np.testing.assert_array_equal(infos["env_id"], taken)
            np.testing.assert_array_equal(rewards, [self.rewards[env_index] for env_index in taken])
            assert not (terminations | truncations).any()

        return "recv", run, set()

    def single_step(self) -> tuple[str, Callable[[], Awaitable[None]], set[int]]:
        env_index = self.choose.randrange(NUM_ENVS)
        (action,) = self.actions(1)

        async def run() -> None:
            self.begin_step([env_index])
            observation, reward, terminated, truncated, info = await self.envs[env_index].step(action)
            assert np.unique(observation).tolist() == [self.received[env_index]]
            assert info == {"received": self.received[env_index], "index": env_index}
            assert (reward, terminated, truncated) == (self.rewards[env_index], False, False)

        return "single step", run, {env_index}

    def single_reset(self) -> tuple[str, Callable[[], Awaitable[None]], set[int]]:
        env_index = self.choose.randrange(NUM_ENVS)

        async def run() -> None:
            self.begin_reset([env_index])
            observation, info = await self.envs[env_index].reset(options={"milliseconds": self.choose.choice([0, 2])})
            assert np.unique(observation).tolist() == [self.received[env_index]]
            assert info == {"received": self.received[env_index], "index": env_index}

        return "single reset", run, {env_index}

    def reset(self) -> tuple[str, Callable[[], Awaitable[None]], set[int]]:
        async def run() -> None:
            self.begin_reset(range(NUM_ENVS))
            observations, infos = await self.envs.reset(options={"milliseconds": self.choose.choice([0, 0, 2])})
            self.check(observations, infos, range(NUM_ENVS))

        return "reset", run, set(range(NUM_ENVS))

    def reset_some(self) -> tuple[str, Callable[[], Awaitable[None]], set[int]]:
        env_ids = self.some()

        async def run() -> None:
            self.begin_reset(env_ids)
            observations, infos = await self.envs.reset(env_ids=env_ids)
            self.check(observations, infos, env_ids)

        return "reset some", run, set(env_ids)

    def call(self) -> tuple[str, Callable[[], Awaitable[None]], set[int]]:
        env_ids = self.some()

        async def run() -> None:
            expected = tuple(self.received[env_index] for env_index in env_ids)
            assert await self.envs.get_attr("received", env_ids=env_ids) == expected

        return "call", run, set()

    def check(self, observations: Any, infos: dict[str, Any], env_ids: Iterable[int]) -> None:
        ids = list(env_ids)
        expected = [self.received[env_index] for env_index in ids]
        np.testing.assert_array_equal(observations, np.broadcast_to(np.array(expected)[:, None], observations.shape))
        np.testing.assert_array_equal(infos["received"], expected)
        np.testing.assert_array_equal(infos["index"], ids)

    # ---- interruptions: tell whether the operation was completed, or never begun

    async def not_at_all(self, operation: Callable[[], Awaitable[None]]) -> bool:
        await operation()
        return True

    async def time_out(self, operation: Callable[[], Awaitable[None]]) -> bool:
        try:
            async with asyncio.timeout(0.001 * self.choose.randint(1, 5)):
                await operation()
        except TimeoutError:
            return False
        return True

    async def move_on(self, operation: Callable[[], Awaitable[None]]) -> bool:
        with anyio.move_on_after(0.001 * self.choose.randint(1, 5)) as scope:
            await operation()
        return not scope.cancelled_caught

    async def cancel(self, operation: Callable[[], Awaitable[None]]) -> bool:
        task = asyncio.ensure_future(operation())
        await turns(self.choose.randint(1, 20))
        task.cancel()
        await asyncio.wait([task])
        if task.cancelled():
            return False
        task.result()
        return True


@pytest.mark.parametrize(
    ("num_workers", "shared_memory", "size"), [(1, True, 3), (2, True, 3), (2, False, 3), (3, True, 8000)]
)
async def test_no_answer_is_ever_mixed_up(num_workers: int, shared_memory: bool, size: int) -> None:
    """After every completed call observation, reward and info agree, and are the number of received actions."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
    env_fns = [functools.partial(Received, index, size) for index in range(NUM_ENVS)]
    vector = AsyncVectorEnv(env_fns, num_workers=num_workers, shared_memory=shared_memory)
    async with asyncio.timeout(3 * BOUND_SECONDS), vector as envs:
        await envs.reset()
        model = Model(envs, random.Random(num_workers * size))
        for _ in range(NUM_OPERATIONS):
            await model.one()
        names = ("reset", "reset some", "call", "send", "recv", "single step", "single reset")
        assert min(model.completed[name] for name in names) > 5
        assert model.completed["step"] > 0
        assert model.collected > 50
        assert await envs.get_attr("received") == tuple(model.received)
        while model.owed:  # whatever was interrupted, nothing is lost
            await model.recv()[1]()
        with pytest.raises(NoAsyncCallError):
            await envs.recv()
        assert not envs._batches.calls.pending  # type: ignore[union-attr]
    assert not complaints
