"""The lane of async envs: a task for each, on one event loop. The only file of a worker that imports asyncio.

An env is cancelled by a reset that comes while its step, or an earlier reset, is owed; by a close; and when it takes
longer than `step_timeout`. It has the chance to clean up, and its next turn waits for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import select
import selectors
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable
from typing import Any, Self

from aiovec.errors import EnvTimeoutError
from aiovec.exchange.black_box import IDLE, Phase, doing_code
from aiovec.exchange.failures import TurnCancelled
from aiovec.worker.clock import StepClock
from aiovec.worker.turns import Doing, Pause, Turn, to_throw

__all__ = ["AsyncLane", "start_loop"]

_FINE_BELOW_SECONDS = 0.1  # for longer waits a millisecond is nothing
_FD_SETSIZE = 1024  # what select() takes

# In which call of an env this is: what to say where.
_ENV: contextvars.ContextVar[tuple[int, Doing]] = contextvars.ContextVar("_ENV")


class _FineSelector(selectors.DefaultSelector):
    """Waits to the microsecond, where epoll, and so asyncio, rounds up to the next millisecond.

    256 envs that sleep 10 ms reach 0.88 of their 25 600 steps a second in two bare asyncio loops, and 0.97 with this.
    """

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and 0 < timeout < _FINE_BELOW_SECONDS and self.fileno() < _FD_SETSIZE:
            select.select([self], [], [], timeout)
            timeout = 0
        return super().select(timeout)


def start_loop() -> asyncio.AbstractEventLoop:
    """An event loop in a thread of its own: a worker's main thread never has one."""
    loop = asyncio.SelectorEventLoop(_FineSelector())
    loop.set_task_factory(_create_task)  # type: ignore[arg-type]  # that of generators, which no loop uses any more
    threading.Thread(target=_run, args=(loop,), name="aiovec-async-envs", daemon=True).start()
    return loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    while True:
        try:
            loop.run_forever()
        except (KeyboardInterrupt, SystemExit):  # asyncio lets these out of a task that an env has started
            continue
        return


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
        overstaying: Tells which env does not end although it was cancelled, or is built.
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
        self._overstaying = _Shown(overstaying)
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
                if row in self._rows:
                    self._rows[row].cancel(everything)

        self._soon(cancel)

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
                    code = doing_code(row, phase)
                    if phase is Phase.BUILD:
                        returned = await self._build(code, function)
                    else:
                        _ENV.set((code, doing))
                        doing[1] += 1
                        doing[0] = code
                        try:
                            returned = function()
                        finally:
                            doing[0] = IDLE
                        if inspect.isawaitable(returned):
                            coroutine = returned if inspect.iscoroutine(returned) else _awaiting(returned)
                            watched = _Watched(coroutine, code, doing)
                            is_limited = self._step_timeout is not None and phase is not Phase.CLOSE
                            returned = await (self._in_time(row, phase, watched, code) if is_limited else watched)
                except asyncio.CancelledError as error:
                    task = asyncio.current_task()
                    assert task is not None  # noqa: S101
                    is_ours = job.is_cancelled or task.cancelling()  # else it is the env's own
                    phase, function = turn.throw(TurnCancelled() if is_ours else error)
                except BaseException as error:  # noqa: BLE001  the turn decides
                    phase, function = turn.throw(to_throw(error))
                else:
                    spent += clock() - began
                    is_step = is_step or phase is Phase.STEP
                    phase, function = turn.send(returned)
        except StopIteration:
            if is_step:
                self._clock.turn(row, spent)
            job.ended()

    async def _build(self, code: int, function: Callable[[], Any]) -> Any:
        """As at the start `__init__` runs on no loop."""
        if isinstance(function, Pause):
            return await asyncio.sleep(function.seconds)
        self._overstaying.add(code)
        try:
            return await self._loop.run_in_executor(None, function)
        finally:
            self._overstaying.remove(code)

    async def _in_time(self, row: int, phase: Phase, watched: _Watched, code: int) -> Any:
        limit = self._step_timeout
        assert limit is not None  # noqa: S101

        late = self._loop.call_later(limit + self._grace, self._overstaying.add, code)
        scope = asyncio.timeout(limit)
        try:
            async with scope:
                return await watched
        except TimeoutError as error:
            if not scope.expired():  # the env's own
                raise
            raise EnvTimeoutError([self._env_ids[row]], phase.name.lower(), limit) from error
        finally:
            late.cancel()
            self._overstaying.remove(code)


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
        self._name = name
        self.task = self._start()

    def _start(self) -> asyncio.Task[None]:
        task = self._loop.create_task(self._serve(), name=self._name)
        # It may wait for a turn when the loop is closed, without a close of the vector: that was told by the vector.
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001
        return task

    def put(self, job: _Job) -> None:
        self._jobs.append(job)
        if self.task.done():  # whoever cancels every task of the loop ends this one, too
            self._is_abandoned, self._current = False, None
            self.task = self._start()
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
        self._jobs.clear()
        self.cancel(everything=True)
        self._is_abandoned = True
        if self._current is None:
            self.task.cancel()

    async def _serve(self) -> None:
        while not (self._is_abandoned and not self._jobs):
            while not self._jobs:
                self._woken = self._loop.create_future()
                try:
                    await self._woken
                except asyncio.CancelledError:
                    if not self._jobs:
                        raise
                    self._is_abandoned = True
                    self.task.uncancel()
            current = self._current = self._jobs.popleft()
            await self._drive(current)
            self._current = None
            if self.task.cancelling() > current.is_cancelled:  # by others than us: the loop is about to end
                self.cancel(everything=True)
                self._is_abandoned = True
            while self.task.cancelling():  # an env that went on all the same
                self.task.uncancel()


class _Shown:
    """Shows one of several calls that are under way, the oldest one, until it ends.

    Args:
        doing: Where.
    """

    def __init__(self, doing: Doing) -> None:
        self._doing = doing
        self._codes: dict[int, None] = {}

    def add(self, code: int) -> None:
        self._codes[code] = None
        self._show()

    def remove(self, code: int) -> None:
        self._codes.pop(code, None)
        self._show()

    def _show(self) -> None:
        code = next(iter(self._codes), IDLE)
        if code != self._doing[0]:
            self._doing[1] += 1
            self._doing[0] = code


class _Watched(Coroutine[Any, Any, Any]):
    """A coroutine that says so while the env itself runs: one that blocks the loop is found and named.

    Args:
        coroutine: Of an env.
        code: What to say.
        doing: Where.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Any], code: int, doing: Doing) -> None:
        self._coroutine = coroutine
        self._send = coroutine.send
        self._code = code
        self._doing = doing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._coroutine, name)  # `cr_frame` and others, that say what state it is in

    def __await__(self) -> Generator[Any, Any, Any]:
        return self  # it has all that is asked of one

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        return self._run(self._send, None)

    def send(self, value: Any) -> Any:
        return self._run(self._send, value)

    def throw(self, *error: Any) -> Any:
        return self._run(self._coroutine.throw, *error)

    def close(self) -> None:
        self._coroutine.close()

    def _run(self, go_on: Callable[..., Any], *arguments: Any) -> Any:
        doing = self._doing
        before = doing[0]  # a task that begins at once begins within another one
        doing[1] += 1
        doing[0] = self._code
        try:
            return go_on(*arguments)
        finally:
            doing[0] = before


def _create_task(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any
) -> asyncio.Task[Any]:
    """The tasks that an env starts are its own: they are watched, too."""
    env = _ENV.get(None)
    if env is not None and isinstance(coroutine, Coroutine):
        coroutine = _Watched(coroutine, *env)
    return asyncio.Task(coroutine, loop=loop, **options)


async def _awaiting(awaitable: Awaitable[Any]) -> Any:
    return await awaitable
