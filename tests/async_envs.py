"""Async envs, and envs that share a worker in threads: what the tests of both hold workers with."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import anyio
import gymnasium as gym
import numpy as np
from fault_envs import BOUND_SECONDS, GateKey, append_line, hang_in_c
from flaky_envs import Flaky, raise_an_error
from sample_envs import Counter

from aiovec import AsyncEnv

WAIT = 2
"""The action with which an env waits: at its gate, for others, or for ever."""

FAIL = 1
"""The action with which an env does what it was built for."""


class Awaited(AsyncEnv[Any, Any]):
    """Any env, under `await`; it gives way before each call, more often the higher its number is."""

    def __init__(self, env_fn: Callable[[], gym.Env[Any, Any]], number: int = 0) -> None:
        self.env = env_fn()
        self.number = number
        self.observation_space, self.action_space = self.env.observation_space, self.env.action_space
        self.metadata, self.render_mode = self.env.metadata, self.env.render_mode

    def __getattr__(self, name: str) -> Any:
        if name == "env":
            raise AttributeError(name)
        return getattr(self.env, name)

    async def _give_way(self) -> None:
        for _ in range(self.number % 3):
            await asyncio.sleep(0)

    async def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        await self._give_way()
        return self.env.reset(seed=seed, options=options)

    async def step(self, action: Any) -> Any:
        await self._give_way()
        return self.env.step(action)

    async def render(self) -> Any:
        await self._give_way()
        return self.env.render()

    async def close(self) -> None:
        await self._give_way()
        self.env.close()


class AsyncCounter(AsyncEnv[Any, Any]):
    """`Counter`, under `await`."""

    def __init__(self, length: int = 1000, offset: int = 0, log: str | None = None) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = gym.spaces.Discrete(4)
        self.length = length
        self.offset = offset
        self.log = log
        self.steps = 0
        self.episodes = 0

    def _observation(self) -> Any:
        return np.array([self.offset, self.episodes, self.steps], np.float32)

    def _say(self, what: str) -> None:
        if self.log is not None:
            append_line(self.log, f"{what} {self.offset}")

    async def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        await super().reset(seed=seed)
        self.steps = 0
        self.episodes += 1
        return self._observation(), {}

    async def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        await asyncio.sleep(0)
        self.steps += 1
        return self._observation(), float(self.steps), self.steps >= self.length, False, {"steps": self.steps}

    async def work(self, value: Any = None) -> Any:
        """An async method for `call`."""
        await asyncio.sleep(0)
        return value, self.steps

    def count(self) -> int:
        """One that is not."""
        return self.steps

    async def render(self) -> Any:
        return self.steps

    async def close(self) -> None:
        self._say("close")

    @property
    def pid(self) -> int:
        return os.getpid()

    def has_loop(self) -> bool:
        """Whether its methods are called on a loop."""
        return is_on_a_loop()


def is_on_a_loop() -> bool:
    """Whether this thread runs one."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class AsyncGated(AsyncCounter):
    """Waits at its gate in the moment `at`, and says in its log how it got away: let through, or cancelled.

    That is in `step` for the action `WAIT`, in `reset` with the option `gate`, in `work` or `close`. What it does in
    its `finally` awaits, too.
    """

    def __init__(self, key: GateKey, log: str, at: str = "step", offset: int = 0) -> None:
        super().__init__(offset=offset, log=log)
        self.key = key
        self.at = at

    async def _wait(self, moment: str) -> None:
        if self.at != moment:
            return
        how = "cancelled"
        try:
            await pass_through(self.key)
            how = "passed"
        finally:
            await asyncio.sleep(0)
            self._say(how)

    async def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if options is not None and options.get("gate"):
            await self._wait("reset")
        return await super().reset(seed=seed)

    async def step(self, action: Any) -> Any:
        if action == WAIT:
            await self._wait("step")
        if action == FAIL:
            raise ValueError("An error occurred.")
        return await super().step(action)

    async def work(self, value: Any = None) -> Any:
        await self._wait("work")
        return await super().work(value)

    async def close(self) -> None:
        await self._wait("close")
        await super().close()


class BlocksAtGate(AsyncCounter):
    """Holds up its loop at its gate, in `step` for the action `WAIT`."""

    def __init__(self, key: GateKey, offset: int = 0) -> None:
        super().__init__(offset=offset)
        self.key = key

    async def step(self, action: Any) -> Any:
        if action == WAIT:
            self.key.pass_through()
        return await super().step(action)


async def pass_through(key: GateKey) -> None:
    """As `GateKey.pass_through`, without a thread."""
    passes = os.open(key.passes, os.O_RDONLY | os.O_NONBLOCK)
    try:
        arrivals = os.open(key.arrivals, os.O_WRONLY)
        os.write(arrivals, b".")
        os.close(arrivals)
        while True:
            await anyio.wait_readable(passes)
            try:
                os.read(passes, 1)
            except BlockingIOError:  # another one was let through
                continue
            return
    finally:
        os.close(passes)


# ---- overlap


_BARRIERS: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[int, asyncio.Barrier]] = WeakKeyDictionary()


class MeetsOnLoop(AsyncCounter):
    """In `reset`, and in `step` for the action `WAIT`, it goes on once so many envs of its loop are there."""

    def __init__(self, parties: int, offset: int = 0) -> None:
        super().__init__(offset=offset)
        self.parties = parties

    async def _meet(self) -> None:
        barriers = _BARRIERS.setdefault(asyncio.get_running_loop(), {})
        await barriers.setdefault(self.parties, asyncio.Barrier(self.parties)).wait()

    async def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        await self._meet()
        return await super().reset(seed=seed)

    async def step(self, action: Any) -> Any:
        if action == WAIT:
            await self._meet()
        return await super().step(action)

    async def work(self, value: Any = None) -> Any:
        await self._meet()
        return await super().work(value)


_THREAD_BARRIERS: dict[int, threading.Barrier] = {}
_LOCK = threading.Lock()


def meet(parties: int) -> None:
    """Goes on once so many threads of this process are here."""
    with _LOCK:
        barrier = _THREAD_BARRIERS.setdefault(parties, threading.Barrier(parties))
    barrier.wait(BOUND_SECONDS / 2)


class MeetsInThreads(Counter):
    """In its construction, in `reset`, and in `step` for the action `WAIT`, it waits for other threads."""

    def __init__(self, parties: int, offset: int = 0) -> None:
        super().__init__(length=1000, offset=offset)
        self.parties = parties
        meet(parties)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        meet(self.parties)
        return super().reset(seed=seed)

    def step(self, action: Any) -> Any:
        if action == WAIT:
            meet(self.parties)
        return super().step(action)

    def work(self) -> int:
        meet(self.parties)
        return self.steps


class InOneThread(Counter):
    """Says in which thread each of its methods is called."""

    def __init__(self, log: str, offset: int = 0) -> None:
        super().__init__(length=3, offset=offset)
        self.log = log
        self.say("init")

    def say(self, what: str) -> tuple[int, bool]:
        append_line(self.log, f"{self.offset} {what} {threading.get_ident()}")
        return threading.get_ident(), is_on_a_loop()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.say("reset")
        return super().reset(seed=seed)

    def step(self, action: Any) -> Any:
        self.say("step")
        return super().step(action)

    def close(self) -> None:
        self.say("close")


class RunsALoop(Counter):
    """A sync env that runs a loop of its own, which it cannot where one is running."""

    def step(self, action: Any) -> Any:
        asyncio.run(asyncio.sleep(0))
        return super().step(action)


class FailsAndWaits(Flaky):
    """Env 0 fails for the action 1; the others wait at the gate then."""

    def __init__(self, key: Any, index: int, log: str) -> None:
        super().__init__(raise_an_error, index, log)
        self.key = key

    def step(self, action: Any) -> Any:
        if action == 1 and self.index:
            self.key.pass_through()
            action = 0
        return super().step(action)


# ---- context and tasks of their own


_EPISODE: contextvars.ContextVar[int] = contextvars.ContextVar("_EPISODE", default=-1)


class HasContext(AsyncCounter):
    """`reset` sets a context variable, the others tell it."""

    async def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        _EPISODE.set(self.offset)
        return await super().reset(seed=seed)

    async def step(self, action: Any) -> Any:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self.work())
        observation, reward, terminated, truncated, _ = await super().step(action)
        return observation, reward, terminated, truncated, {"seen": _EPISODE.get(), "in_task": task.result()}

    async def work(self, value: Any = None) -> Any:
        await asyncio.sleep(0)
        return _EPISODE.get()

    def count(self) -> int:
        return _EPISODE.get()


class InOrder(AsyncCounter):
    """Keeps the order of its calls, and finds out whether two overlap."""

    def __init__(self, offset: int = 0) -> None:
        super().__init__(offset=offset)
        self.told: list[Any] = []
        self.is_busy = False

    async def _tell(self, what: Any) -> None:
        assert not self.is_busy
        self.is_busy = True
        for _ in range(3 - self.offset):
            await asyncio.sleep(0)
        self.told.append(what)
        self.is_busy = False

    async def step(self, action: Any) -> Any:
        await self._tell(int(action))
        return await super().step(action)

    async def work(self, value: Any = None) -> Any:
        await self._tell(value)
        return list(self.told)


# ---- envs that fail


class AsyncFaulty(AsyncCounter):
    """Raises what `make_error` makes, in the moment `at`, behind an `await`.

    That is in `init`, in `step` for the action `FAIL`, in `reset` with the option `fail`, in `render`, `work`, `close`.
    """

    def __init__(
        self, at: str, make_error: Callable[[], BaseException], offset: int = 0, log: str | None = None
    ) -> None:
        super().__init__(offset=offset, log=log)
        self.at = at
        self.make_error = make_error
        if at == "init":
            raise make_error()

    async def _raise_at(self, moment: str) -> None:
        if self.at == moment:
            await asyncio.sleep(0)
            raise self.make_error()

    async def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if options is not None and options.get("fail"):
            await self._raise_at("reset")
        return await super().reset(seed=seed)

    async def step(self, action: Any) -> Any:
        if action == FAIL:
            await self._raise_at("step")
        return await super().step(action)

    async def render(self) -> Any:
        await self._raise_at("render")
        return await super().render()

    async def work(self, value: Any = None) -> Any:
        await self._raise_at("work")
        return await super().work(value)

    async def close(self) -> None:
        await super().close()
        await self._raise_at("close")


class ClosesBadly(AsyncCounter):
    """Raises in `close`, at once."""

    async def close(self) -> None:
        raise ValueError("does not close")


class FailsInTasks(AsyncCounter):
    """Raises out of a task group for the action `FAIL`: what `make_error` makes, in one of two tasks."""

    def __init__(self, make_error: Callable[[], BaseException], offset: int = 0) -> None:
        super().__init__(offset=offset)
        self.make_error = make_error

    async def step(self, action: Any) -> Any:
        if action == FAIL:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.child())
                group.create_task(asyncio.Event().wait())
        return await super().step(action)

    async def child(self) -> None:
        await asyncio.sleep(0)
        raise self.make_error()


class EndsIts(AsyncCounter):
    """Does what `ending` does for the action `FAIL`, within its coroutine."""

    def __init__(self, ending: Callable[[], Any], offset: int = 0) -> None:
        super().__init__(offset=offset)
        self.ending = ending

    async def step(self, action: Any) -> Any:
        if action == FAIL:
            await asyncio.sleep(0)
            self.ending()
        return await super().step(action)


class BlocksInATask(AsyncCounter):
    """Blocks its loop for the action `FAIL`, in a task of its own."""

    async def step(self, action: Any) -> Any:
        if action == FAIL:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.block())
        return await super().step(action)

    async def block(self) -> None:
        await asyncio.sleep(0)
        time.sleep(2 * BOUND_SECONDS)


class Swallows(AsyncCounter):
    """For the action `FAIL` it never ends, whatever is thrown at it; for `WAIT` it takes its time to end."""

    async def step(self, action: Any) -> Any:
        while action == FAIL:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        return await super().step(action)


class WaitsForEver(AsyncCounter):
    """For the action `WAIT`, and says when it ends."""

    async def step(self, action: Any) -> Any:
        if action == WAIT:
            self._say("begin")
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                self._say("end")
        return await super().step(action)

    async def work(self, value: Any = None) -> Any:
        await self.step(value)
        return self.steps


class OwnTimeout(AsyncCounter):
    """A time-out of its own, for the action `FAIL`."""

    async def step(self, action: Any) -> Any:
        if action == FAIL:
            async with asyncio.timeout(0.001):
                await asyncio.Event().wait()
        return await super().step(action)


class ClosesNever(AsyncCounter):
    """Hangs in `close`, but can be cancelled."""

    async def close(self) -> None:
        self._say("closing")
        try:
            await asyncio.Event().wait()
        finally:
            self._say("end")


class AsyncFlaky(AsyncCounter):
    """Fails for the action `FAIL` in the way `how`; its observation bears index, how often it was built, and steps."""

    def __init__(self, how: str, index: int, log: str) -> None:
        super().__init__(offset=index)
        self.how = how
        append_line(log, f"{index}")
        self.built = Path(log).read_text().split().count(str(index))
        if os.path.exists(f"{log}.{index}.stuck"):
            time.sleep(2 * BOUND_SECONDS)

    def _observation(self) -> Any:
        return np.array([self.offset, self.built, self.steps], np.float32)

    async def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if options is not None and self.offset == options.get("fail") and self.built <= options["until"]:
            await self.fail()
        return await super().reset(seed=seed)

    async def step(self, action: Any) -> Any:
        if action == FAIL:
            await self.fail()
        if action == WAIT:
            await asyncio.Event().wait()
        return await super().step(action)

    async def fail(self) -> None:
        await asyncio.sleep(0)
        if self.how == "raise":
            raise ValueError("An error occurred.")
        if self.how == "late":
            await asyncio.Event().wait()
        elif self.how == "blocks":
            hang_in_c()
        elif self.how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)


# ---- envs that are not async, but return what would have to be awaited


class Forgetful(Counter):
    """A plain env of which one method is `async def`, `at`."""

    def __init__(self, at: str, offset: int = 0) -> None:
        super().__init__(length=1000, offset=offset)
        self.at = at

    async def _coroutine(self) -> Any:
        return None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return self._coroutine() if self.at == "reset" else super().reset(seed=seed)

    def step(self, action: Any) -> Any:
        return self._coroutine() if self.at == "step" and action == FAIL else super().step(action)

    def work(self) -> Any:
        return self._coroutine() if self.at == "work" else self.steps

    def close(self) -> Any:
        return self._coroutine() if self.at == "close" else None


async def build_later() -> gym.Env[Any, Any]:
    """An env_fn that would have to be awaited."""
    return Counter()


def raise_lookup_error(text: str) -> None:
    """What a sync env does beside them."""
    raise LookupError(text)
