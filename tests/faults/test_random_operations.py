"""Hundreds of operations in random order, with time-outs and cancellations at any moment: no answer is ever mixed up.

Each env counts the actions that it received in its life, and bears that number in observation, reward and info.
"""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import numpy as np
import pytest
from fault_envs import BOUND_SECONDS, Received, turns

from aiovec import AlreadyPendingCallError, AsyncVectorEnv

NUM_ENVS = 5
NUM_OPERATIONS = 500


class Model:
    """What must be true, from what was asked; each operation checks its own result."""

    def __init__(self, envs: AsyncVectorEnv, choose: random.Random) -> None:
        self.envs = envs
        self.choose = choose
        self.received = 0  # every accepted step reaches every env, whatever becomes of the task that awaits it
        self.owed: set[int] = set()
        self.completed: dict[str, int] = {}

    async def one(self) -> None:
        """One operation, interrupted or not."""
        name, operation, env_ids = self.choose.choice([self.step, self.step, self.reset, self.reset_some, self.call])()
        interrupt = self.choose.choice([self.not_at_all, self.not_at_all, self.time_out, self.cancel, self.move_on])
        try:
            ended = await interrupt(operation)
        except AlreadyPendingCallError:
            assert name == "step"
            assert self.owed
            return
        if ended:
            self.completed[name] = self.completed.get(name, 0) + 1
            self.owed -= env_ids if name != "call" else set()
        elif name != "call":
            self.owed |= env_ids

    # ---- operations: a name, what to await, and the envs whose rows are owed if nobody waits for them

    def step(self) -> tuple[str, Callable[[], Awaitable[None]], set[int]]:
        actions = [self.choose.choice([0, 0, 0, 1, 3]) for _ in range(NUM_ENVS)]

        async def run() -> None:
            if not self.owed:
                self.received += 1
            expected = self.received
            observations, rewards, terminations, truncations, infos = await self.envs.step(actions)
            self.check(observations, infos, expected, range(NUM_ENVS))
            np.testing.assert_array_equal(rewards, [expected] * NUM_ENVS)
            assert not (terminations | truncations).any()

        return "step", run, set(range(NUM_ENVS))

    def reset(self) -> tuple[str, Callable[[], Awaitable[None]], set[int]]:
        async def run() -> None:
            expected = self.received
            observations, infos = await self.envs.reset(options={"milliseconds": self.choose.choice([0, 0, 2])})
            self.check(observations, infos, expected, range(NUM_ENVS))

        return "reset", run, set(range(NUM_ENVS))

    def reset_some(self) -> tuple[str, Callable[[], Awaitable[None]], set[int]]:
        env_ids = self.choose.sample(range(NUM_ENVS), self.choose.randint(1, NUM_ENVS))

        async def run() -> None:
            expected = self.received
            observations, infos = await self.envs.reset(env_ids=env_ids)
            self.check(observations, infos, expected, env_ids)

        return "reset some", run, set(env_ids)

    def call(self) -> tuple[str, Callable[[], Awaitable[None]], set[int]]:
        env_ids = self.choose.sample(range(NUM_ENVS), self.choose.randint(1, NUM_ENVS))

        async def run() -> None:
            expected = self.received
            assert await self.envs.get_attr("received", env_ids=env_ids) == (expected,) * len(env_ids)

        return "call", run, set()

    def check(self, observations: Any, infos: dict[str, Any], expected: int, env_ids: Any) -> None:
        assert np.unique(observations).tolist() == [expected]
        np.testing.assert_array_equal(infos["received"], [expected] * len(env_ids))
        np.testing.assert_array_equal(infos["index"], list(env_ids))

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
        assert min(model.completed[name] for name in ("step", "reset", "reset some", "call")) > 10
        assert model.received > model.completed["step"]  # some were cancelled, and went on
        assert await envs.get_attr("received") == (model.received,) * NUM_ENVS
    assert not complaints
