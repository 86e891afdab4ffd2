"""The lane of async envs: a task for each, on one event loop. The only file of a worker that imports asyncio.

An env is cancelled by a reset that comes while its step, or an earlier reset, is owed; by a close; and when it takes
longer than `step_timeout`. It has the chance to clean up, and its next turn waits for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable
from typing import Any

from aiovec.errors import EnvTimeoutError
from aiovec.exchange.black_box import IDLE, Phase, doing_code
from aiovec.exchange.failures import TurnCancelled
from aiovec.worker.clock import StepClock
from aiovec.worker.turns import Doing, Pause, Turn

__all__ = ["AsyncLane", "start_loop"]


def start_loop() -> asyncio.AbstractEventLoop:
    """An event loop in a thread of its own: a worker's main thread never has one."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=_run, args=(loop,), name="aiovec-async-envs", daemon=True).start()
    return loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()


def _is_running(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether this is code that runs on a loop."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


class _Job:
    """A turn in the queue of its env."""

    def __init__(self, turn: Turn[Any], ended: Callable[[], None], may_be_cancelled: bool) -> None:
        self.turn = turn
        self.ended = ended
        self.may_be_cancelled = may_be_cancelled
        self.is_cancelled = False


class AsyncLane:
    """Drives the turns of async envs, concurrently.

    Args:
        loop: Where; `put` and `cancel` may be called from any thread.
        env_ids: The envs of the worker.
        step_timeout: Seconds for each call of an env.
        grace: Seconds that an env may take to clean up, before it counts as stuck.
        doing: Tells which env runs, while one does.
        overstaying: Tells which env does not end although it was cancelled.
        clock: Takes how long envs took.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        env_ids: range,
        step_timeout: float | None,
        grace: float,
        doing: Doing,
        overstaying: Doing,
        clock: StepClock,
    ) -> None:
        self._loop = loop
        self._env_ids = env_ids
        self._step_timeout = step_timeout
        self._grace = grace
        self._doing = doing
        self._overstaying = overstaying
        self._clock = clock
        self._rows: dict[int, _Row] = {}
        self._given: deque[Callable[[], None]] = deque()  # from other threads, in order

    def __repr__(self) -> str:
        return f"<AsyncLane rows={sorted(self._rows)}>"

    def put(self, row: int, turn: Turn[Any], ended: Callable[[], None], may_be_cancelled: bool) -> None:
        job = _Job(turn, ended, may_be_cancelled)
        self._soon(lambda: self._row(row).put(job))

    def cancel(self, rows: Iterable[int], *, everything: bool = False) -> None:
        """Ends what these envs are doing, and what they were to do: steps and resets, or everything."""
        chosen = list(rows)

        def cancel() -> None:
            for row in chosen:
                self._row(row).cancel(everything)

        self._soon(cancel)

    def stop(self) -> None:
        """Ends the tasks, which have nothing to do any more; on the loop's own thread."""
        for row in self._rows.values():
            row.task.cancel()

    def abandon(self) -> None:
        """Cancels what the envs are doing, and ends their tasks behind it; nobody waits for them."""
        if not self._loop.is_closed():
            for row in self._rows.values():
                row.abandon()

    def _soon(self, action: Callable[[], Any]) -> None:
        if _is_running(self._loop):
            action()
            return
        self._given.append(action)
        if len(self._given) == 1:  # a request for many envs wakes the loop once
            self._loop.call_soon_threadsafe(self._take_given)

    def _take_given(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                action = self._given[0]
                action()
                self._given.popleft()

    def _row(self, row: int) -> _Row:
        if row not in self._rows:
            self._rows[row] = _Row(self._loop, lambda job: self._drive(row, job), f"aiovec env {self._env_ids[row]}")
        return self._rows[row]

    async def _drive(self, row: int, job: _Job) -> None:
        """The same as `turns.drive`, with what is awaited."""
        turn, doing, clock = job.turn, self._doing, time.perf_counter
        spent = 0.0
        is_step = False
        try:
            phase, function = next(turn)
            while True:
                began = clock()
                try:
                    if job.is_cancelled and phase is not Phase.CLOSE:
                        raise asyncio.CancelledError
                    if phase is Phase.BUILD:
                        returned = await self._build(function)
                    else:
                        code = doing_code(row, phase)
                        doing[1] += 1
                        doing[0] = code
                        try:
                            returned = function()
                        finally:
                            doing[0] = IDLE
                        if inspect.isawaitable(returned):
                            watched = _Watched(returned, code, doing)
                            is_limited = self._step_timeout is not None and phase is not Phase.CLOSE
                            returned = await (self._in_time(row, phase, watched, code) if is_limited else watched)
                except asyncio.CancelledError as error:
                    task = asyncio.current_task()
                    assert task is not None  # noqa: S101
                    is_ours = job.is_cancelled or task.cancelling()  # else it is the env's own
                    phase, function = turn.throw(TurnCancelled() if is_ours else error)
                except BaseException as error:  # noqa: BLE001  the turn decides
                    phase, function = turn.throw(error)
                else:
                    spent += clock() - began
                    is_step = is_step or phase is Phase.STEP
                    phase, function = turn.send(returned)
        except StopIteration:
            if is_step:
                self._clock.turn(row, spent)
            job.ended()

    async def _build(self, function: Callable[[], Any]) -> Any:
        """As at the start `__init__` runs on no loop."""
        if isinstance(function, Pause):
            return await asyncio.sleep(function.seconds)
        return await self._loop.run_in_executor(None, function)

    async def _in_time(self, row: int, phase: Phase, watched: _Watched, code: int) -> Any:
        limit = self._step_timeout
        assert limit is not None  # noqa: S101

        def overstays() -> None:
            self._overstaying[1] += 1
            self._overstaying[0] = code

        late = self._loop.call_later(limit + self._grace, overstays)
        try:
            async with asyncio.timeout(limit) as scope:
                return await watched
        except TimeoutError as error:
            if not scope.expired():  # the env's own
                raise
            raise EnvTimeoutError([self._env_ids[row]], phase.name.lower(), limit) from error
        finally:
            late.cancel()
            if self._overstaying[0] == code:
                self._overstaying[0] = IDLE


class _Row:
    """One env: its queue and its task."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, drive: Callable[[_Job], Coroutine[Any, Any, None]], name: str
    ) -> None:
        self._loop = loop
        self._drive = drive
        self._jobs: deque[_Job] = deque()
        self._current: _Job | None = None
        self._is_abandoned = False
        self._woken: asyncio.Future[None] | None = None
        self.task = loop.create_task(self._serve(), name=name)

    def put(self, job: _Job) -> None:
        self._jobs.append(job)
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    def cancel(self, everything: bool) -> None:
        current = self._current
        for job in self._jobs:
            job.is_cancelled = job.is_cancelled or everything or job.may_be_cancelled
        if current is not None and not current.is_cancelled and (everything or current.may_be_cancelled):
            current.is_cancelled = True
            self.task.cancel()

    def abandon(self) -> None:
        self.cancel(everything=True)
        self._is_abandoned = True
        if self._current is None:
            self.task.cancel()

    async def _serve(self) -> None:
        while not (self._is_abandoned and not self._jobs):
            while not self._jobs:
                self._woken = self._loop.create_future()
                await self._woken
            self._current = self._jobs.popleft()
            await self._drive(self._current)
            self._current = None
            while self.task.cancelling():  # an env that went on all the same
                self.task.uncancel()


class _Watched:
    """Awaits, and says so only while the env itself runs: one that blocks the loop is found and named."""

    def __init__(self, awaitable: Awaitable[Any], code: int, doing: Doing) -> None:
        self._coroutine: Coroutine[Any, Any, Any] = (
            awaitable if inspect.iscoroutine(awaitable) else _awaiting(awaitable)
        )
        self._code = code
        self._doing = doing

    def __await__(self) -> Generator[Any, Any, Any]:
        coroutine, code, doing = self._coroutine, self._code, self._doing
        value: Any = None
        error: BaseException | None = None
        while True:
            doing[1] += 1
            doing[0] = code
            try:
                waited = coroutine.send(value) if error is None else coroutine.throw(error)
            except StopIteration as stop:
                return stop.value
            finally:
                doing[0] = IDLE
            value = error = None
            try:
                value = yield waited
            except BaseException as exception:  # noqa: BLE001  into the env with it
                error = exception


async def _awaiting(awaitable: Awaitable[Any]) -> Any:
    return await awaitable
