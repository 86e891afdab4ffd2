"""`AsyncEnv`, its limit of steps, and its lane on this loop, without a vector."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from async_envs import WAIT, AsyncCounter, WaitsForEver
from fault_envs import BOUND_SECONDS, turns

from aiovec import AsyncEnv, EnvTimeoutError
from aiovec.async_env import AsyncTimeLimit
from aiovec.exchange.black_box import IDLE, Phase, doing_code
from aiovec.exchange.failures import TurnCancelled
from aiovec.worker.async_lane import AsyncLane, start_loop
from aiovec.worker.clock import StepClock
from aiovec.worker.turns import EnvCall, Pause, Turn

CLOCK = StepClock([0.0] * 100)

# ---- the class


async def test_it_is_an_env_whose_base_seeds_and_does_nothing_else() -> None:
    env: Any = AsyncEnv()
    assert isinstance(env, gym.Env)
    assert env.unwrapped is env
    assert await env.reset(seed=3) == (None, {})
    assert env.np_random.integers(1000) == np.random.default_rng(3).integers(1000)
    assert await env.close() is None
    with pytest.raises(NotImplementedError):
        await env.step(0)
    with pytest.raises(NotImplementedError):
        await env.render()


async def test_a_limit_of_steps_truncates_and_hides_nothing() -> None:
    env = AsyncCounter(offset=4)
    limited: Any = AsyncTimeLimit(env, 2)
    assert limited.unwrapped is env
    assert (limited.observation_space, limited.action_space) == (env.observation_space, env.action_space)
    for _ in range(2):
        await limited.reset(seed=1)
        assert [(await limited.step(0))[2:4] for _ in range(3)] == [(False, False), (False, True), (False, True)]
    assert limited.get_wrapper_attr("offset") == limited.offset == 4
    limited.set_wrapper_attr("offset", 5)
    assert env.offset == 5
    assert limited.has_wrapper_attr("count")
    assert not limited.has_wrapper_attr("nothing of that name")
    assert await limited.work("x") == ("x", 3)
    assert await limited.render() == 3
    assert (limited.np_random, limited.np_random_seed) == (env.np_random, 1)
    limited.np_random = np.random.default_rng(5)
    assert env.np_random is limited.np_random
    assert "AsyncTimeLimit of 2 steps" in repr(limited)
    await limited.close()


async def test_a_limit_of_steps_keeps_an_end_that_is_the_envs_own() -> None:
    limited = AsyncTimeLimit(AsyncCounter(length=1), 5)
    await limited.reset()
    assert (await limited.step(0))[2:4] == (True, False)


def test_a_limit_of_steps_that_is_being_made_or_copied_has_no_env() -> None:
    with pytest.raises(AttributeError):
        AsyncTimeLimit.__new__(AsyncTimeLimit).anything


# ---- its lane


class Lane:
    """A lane on this loop, and what its turns gave."""

    def __init__(self, timeout: float | None = None, grace: float = 0.01) -> None:
        self.doing, self.overstaying = [IDLE, 0], [IDLE, 0]
        loop = asyncio.get_running_loop()
        self.lane = AsyncLane(loop, range(10, 20), timeout, grace, self.doing, self.overstaying, CLOCK)
        self.told: list[Any] = []

    def put(
        self, row: int, function: Callable[[], Any], phase: Phase = Phase.STEP, *, may_be_cancelled: bool = True
    ) -> asyncio.Event:
        """One call; gives an event that is set when its turn has ended."""
        ended = asyncio.Event()
        self.lane.put(row, self._turn(row, function, phase), ended.set, may_be_cancelled)
        return ended

    def _turn(self, row: int, function: Callable[[], Any], phase: Phase) -> Turn[None]:
        try:
            self.told.append((row, (yield EnvCall(phase, function))))
        except BaseException as error:
            self.told.append((row, error))


@pytest.fixture
async def lane() -> AsyncIterator[Lane]:
    """A lane without a time-out; its tasks are ended."""
    made = Lane()
    yield made
    made.lane.abandon()
    await turns()


async def wait_for(event: asyncio.Event) -> None:
    async with asyncio.timeout(BOUND_SECONDS):
        await event.wait()


async def test_each_row_has_its_order_and_rows_overlap(lane: Lane) -> None:
    gate = asyncio.Event()

    async def behind_the_gate() -> str:
        await gate.wait()
        return "let through"

    first = lane.put(0, behind_the_gate)
    second = lane.put(0, lambda: "at once")
    await wait_for(lane.put(1, lambda: "of another row"))
    assert lane.told == [(1, "of another row")]
    assert not first.is_set()
    gate.set()
    await wait_for(second)
    assert lane.told[1:] == [(0, "let through"), (0, "at once")]


async def test_a_row_is_one_task_and_so_has_one_context(lane: Lane) -> None:
    async def task() -> Any:
        return asyncio.current_task()

    for row in (0, 0, 1):
        await wait_for(lane.put(row, task))
    tasks = [told for _, told in lane.told]
    assert tasks[0] is tasks[1]
    assert tasks[1] is not tasks[2]
    assert tasks[2].get_name() == "aiovec env 11"


async def test_any_awaitable_is_awaited(lane: Lane) -> None:
    future = asyncio.get_running_loop().create_future()
    future.set_result(5)
    await wait_for(lane.put(0, lambda: future))
    assert lane.told == [(0, 5)]


async def test_it_says_who_runs_and_only_while_it_runs(lane: Lane) -> None:
    seen: list[list[int]] = []
    gate = asyncio.Event()

    async def looks() -> None:
        seen.append(list(lane.doing))
        await gate.wait()
        seen.append(list(lane.doing))

    ended = lane.put(2, looks, Phase.RESET)
    await turns()
    assert lane.doing[0] == IDLE
    gate.set()
    await wait_for(ended)
    assert lane.doing[0] == IDLE
    assert [code for code, _ in seen] == [doing_code(2, Phase.RESET)] * 2
    assert seen[0][1] != seen[1][1]


async def test_construction_has_no_loop_and_is_shown(lane: Lane) -> None:
    seen: list[Any] = []
    go_on = threading.Event()

    def build() -> None:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        seen.append(threading.get_ident())
        assert go_on.wait(BOUND_SECONDS)

    ended = lane.put(4, build, Phase.BUILD)
    async with asyncio.timeout(BOUND_SECONDS):
        while not seen:
            await asyncio.sleep(0.001)
    assert lane.overstaying[0] == doing_code(4, Phase.BUILD)
    go_on.set()
    await wait_for(ended)
    assert lane.overstaying[0] == IDLE
    assert lane.told == [(4, None)]
    assert seen != [threading.get_ident()]


async def test_a_pause_is_awaited(lane: Lane) -> None:
    """And keeps nobody else waiting."""
    lane.put(0, Pause(2 * BOUND_SECONDS), Phase.BUILD)
    await wait_for(lane.put(1, lambda: "at once"))


ERRORS = [ValueError("x"), asyncio.CancelledError("own"), KeyboardInterrupt(), SystemExit(2), TimeoutError("own")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("timeout", [None, 2 * BOUND_SECONDS])
async def test_what_an_env_raises_is_thrown_into_its_turn(error: BaseException, timeout: float | None) -> None:
    """As itself, awaited or not; and the row goes on."""
    one = Lane(timeout)

    async def fails() -> None:
        await asyncio.sleep(0)
        raise error

    def fails_at_once() -> None:
        raise error

    one.put(0, fails)
    one.put(0, fails_at_once)
    await wait_for(one.put(0, lambda: "goes on"))
    assert one.told == [(0, error), (0, error), (0, "goes on")]
    one.lane.abandon()
    await turns()


async def test_cancelled_steps_end_with_their_finally_and_the_row_goes_on(lane: Lane) -> None:
    """What runs, and what waits; a call is no step."""
    told: list[str] = []

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            told.append("finally")

    lane.put(0, waits)
    never = lane.put(0, lambda: told.append("never"))
    call = lane.put(0, lambda: told.append("call"), Phase.CALL, may_be_cancelled=False)
    await turns()
    lane.lane.cancel([0, 7])
    await wait_for(call)
    assert never.is_set()
    assert told == ["finally", "call"]
    assert [type(result) for _, result in lane.told] == [TurnCancelled, TurnCancelled, type(None)]
    await wait_for(lane.put(0, lambda: "goes on"))
    assert sorted(lane.lane._rows) == [0]  # who has done nothing has no task


async def test_a_close_ends_calls_too_but_is_done_itself(lane: Lane) -> None:
    waiting = lane.put(0, lambda: asyncio.Event().wait(), Phase.CALL, may_be_cancelled=False)
    await turns()
    lane.lane.cancel([0])
    await turns()
    assert not waiting.is_set()
    close = lane.put(0, lambda: "closed", Phase.CLOSE, may_be_cancelled=False)
    lane.lane.cancel([0], everything=True)
    await wait_for(close)
    assert isinstance(lane.told[0][1], TurnCancelled)
    assert lane.told[1] == (0, "closed")


async def test_an_env_that_goes_on_all_the_same_is_not_cancelled_again(lane: Lane) -> None:
    async def swallows() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return "all the same"

    async def waits() -> str:
        await asyncio.sleep(0)
        return "not cancelled"

    lane.put(0, swallows)
    await turns()
    lane.lane.cancel([0])
    lane.lane.cancel([0])
    await wait_for(lane.put(0, waits))
    assert lane.told == [(0, "all the same"), (0, "not cancelled")]


@pytest.mark.parametrize("busy", [False, True])
async def test_who_cancels_every_task_ends_this_one_and_it_comes_again(lane: Lane, busy: bool) -> None:
    """As `asyncio.run` does at its end: a task that goes on would keep it for ever."""
    await wait_for(lane.put(0, lambda: asyncio.Event().wait() if busy else None) if not busy else asyncio_event_set())
    if busy:
        lane.put(0, lambda: asyncio.Event().wait())
        lane.put(0, lambda: "never")
        await turns()
    task = lane.lane._rows[0].task
    task.cancel()
    async with asyncio.timeout(BOUND_SECONDS):
        await asyncio.wait([task])
    assert all(isinstance(result, TurnCancelled) for _, result in lane.told[not busy :])
    await wait_for(lane.put(0, lambda: "comes again"))
    assert lane.told[-1] == (0, "comes again")
    task = lane.lane._rows[0].task
    task.cancel()
    await wait_for(lane.put(0, lambda: "in the same turn of the loop"))
    assert lane.told[-1] == (0, "in the same turn of the loop")


def asyncio_event_set() -> asyncio.Event:
    """An event that has happened."""
    event = asyncio.Event()
    event.set()
    return event


async def test_abandoned_it_ends_what_it_does_and_leaves_no_task(lane: Lane, tmp_path: Any) -> None:
    log = tmp_path / "log"
    env = WaitsForEver(log=str(log))
    lane.put(0, functools.partial(env.step, WAIT))
    lane.put(0, lambda: pytest.fail("it was abandoned"))
    lane.put(1, lambda: None)
    await turns()
    tasks = [row.task for row in lane.lane._rows.values()]
    lane.lane.abandon()
    async with asyncio.timeout(BOUND_SECONDS):
        await asyncio.wait(tasks)
    assert log.read_text() == "begin 0\nend 0\n"


# ---- too long


async def test_too_long_is_a_time_out_of_that_env_alone() -> None:
    one = Lane(timeout=0.05)
    ended = one.put(3, lambda: asyncio.Event().wait())
    await wait_for(one.put(4, lambda: "in time"))
    await wait_for(ended)
    (_, (row, error)) = one.told
    assert row == 3
    assert isinstance(error, EnvTimeoutError)
    assert (error.env_ids, error.command, error.seconds, error.lost_env_ids) == ((13,), "step", 0.05, ())
    await wait_for(one.put(3, lambda: "goes on"))
    assert one.overstaying[0] == IDLE
    one.lane.abandon()
    await turns()


async def test_a_close_has_no_limit_here() -> None:
    """That is `close_grace`, which the parent keeps."""
    one = Lane(timeout=0.01)
    ended = one.put(0, lambda: asyncio.sleep(0.1, "closed"), Phase.CLOSE)
    await wait_for(ended)
    assert one.told == [(0, "closed")]
    one.lane.abandon()
    await turns()


async def test_all_who_overstay_are_shown_one_after_the_other() -> None:
    """One that ends in the end does not hide another that does not."""
    one = Lane(timeout=0.01, grace=0.01)
    gates = [asyncio.Event(), asyncio.Event(), asyncio.Event()]

    async def swallows(gate: asyncio.Event) -> None:
        while not gate.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await gate.wait()

    ended = [one.put(row, functools.partial(swallows, gate)) for row, gate in enumerate(gates)]
    for row in (0, 2, 1):
        async with asyncio.timeout(BOUND_SECONDS):
            while len(one.lane._overstaying._codes) < len([gate for gate in gates if not gate.is_set()]):
                await asyncio.sleep(0.001)
        first = min(row for row, gate in enumerate(gates) if not gate.is_set())
        assert one.overstaying[0] == doing_code(first, Phase.STEP)
        gates[row].set()
        await wait_for(ended[row])
    assert one.overstaying[0] == IDLE
    one.lane.abandon()
    await turns()


# ---- a loop in a thread


class InThread:
    """A lane on a loop of its own."""

    def __init__(self) -> None:
        before = set(threading.enumerate())
        self.loop = start_loop()
        (self.thread,) = set(threading.enumerate()) - before
        self.doing = [IDLE, 0]
        self.lane = AsyncLane(self.loop, range(4), None, 1, self.doing, [IDLE, 0], CLOCK)
        self.told: list[Any] = []
        self.one_more = threading.Semaphore(0)

    def do(self, row: int, function: Callable[[], Any]) -> Any:
        """One call, to its end."""

        def turn() -> Turn[None]:
            try:
                self.told.append((yield EnvCall(Phase.STEP, function)))
            except BaseException as error:
                self.told.append(error)

        self.lane.put(row, turn(), self.one_more.release, True)
        assert self.one_more.acquire(timeout=BOUND_SECONDS)
        return self.told[-1]

    def end(self) -> None:
        async def stop() -> None:
            self.lane.abandon()
            await turns()
            await self.loop.shutdown_default_executor()
            self.loop.call_soon(self.loop.stop)

        asyncio.run_coroutine_threadsafe(stop(), self.loop)
        self.thread.join(BOUND_SECONDS)
        assert not self.thread.is_alive()
        self.loop.close()


@pytest.fixture
def in_thread() -> Any:
    """A lane on a loop of its own, which ends."""
    made = InThread()
    yield made
    made.end()


def test_from_another_thread_the_order_is_kept(in_thread: InThread) -> None:
    order: list[int] = []
    ended = threading.Semaphore(0)

    def turn(number: int) -> Turn[None]:
        yield EnvCall(Phase.STEP, lambda: order.append(number))

    for number in range(300):
        in_thread.lane.put(0, turn(number), ended.release, True)
    for _ in range(300):
        assert ended.acquire(timeout=BOUND_SECONDS)
    assert order == list(range(300))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_task_of_an_env_that_would_end_the_loop_does_not(error: type[BaseException], in_thread: InThread) -> None:
    """asyncio lets these two out of `run_forever`."""

    async def fails() -> None:
        raise error

    async def step() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(fails())

    assert isinstance(in_thread.do(0, step), error)
    assert in_thread.do(1, lambda: "goes on") == "goes on"


def test_tasks_that_an_env_starts_are_shown_as_its_own(in_thread: InThread) -> None:
    """And are tasks like any others, cancelled before they begin, too."""
    seen: list[int] = []

    async def child() -> str:
        seen.append(in_thread.doing[0])
        await asyncio.sleep(0)
        seen.append(in_thread.doing[0])
        return "result"

    async def step() -> Any:
        task = asyncio.create_task(child(), name="a child")
        never = asyncio.create_task(child())
        never.cancel()
        results = await asyncio.gather(task, never, return_exceptions=True)
        assert (task.get_name(), task.get_coro().__name__) == ("a child", "child")
        return results

    result, cancelled = in_thread.do(2, step)
    assert result == "result"
    assert isinstance(cancelled, asyncio.CancelledError)
    assert seen == [doing_code(2, Phase.STEP)] * 2
    assert in_thread.doing[0] == IDLE
