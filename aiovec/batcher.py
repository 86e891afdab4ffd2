"""`Batcher`: many tasks ask, and one call of a function answers all of them.

Everything is decided in synchronous functions: a call, a timer and the end of a batch each come to `_consider`, the
one place that says whether a batch may begin. Who calls awaits a future of its own, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.to_thread

from aiovec.arguments import check_batcher
from aiovec.errors import BatcherClosedError, BatcherFullError, WrongLoopError
from aiovec.exchange.failures import wrap
from aiovec.stacking import Structure, rows_of

__all__ = ["Batcher", "BatcherStatistics"]

_LARGE = 1 << 20  # bytes: a longer copy would hold up the loop, and is worth a thread


@dataclass(frozen=True)
class BatcherStatistics:
    """What a batcher did so far.

    Attributes:
        calls: How many observations went into batches; callers that dropped out before are not counted.
        batches: How many batches began.
        mean_fill: Observations per batch, as a share of `max_batch_size`.
        mean_wait_seconds: From a call to the begin of its batch, in the mean over `calls`.
        longest_wait_seconds: The longest of these.
        function_seconds: Spent in the function, batches that failed included.
        pending: How many callers wait now for a batch to begin.
    """

    calls: int
    batches: int
    mean_fill: float
    mean_wait_seconds: float
    longest_wait_seconds: float
    function_seconds: float
    pending: int


class Batcher:
    """One call of a function for many tasks that ask at about the same time, such as a policy for many envs.

        async with aiovec.Batcher(policy, max_batch_size=64, max_wait=0.002) as batcher:
            action = await batcher(observation)  # in each of many tasks

    A batch begins when it is full, or when its first caller has waited for `max_wait`; callers are served in their
    order. The function runs for one batch at a time. Meanwhile the next ones gather, and the first of them begins as
    soon as the function is free, if it is full or has waited long enough by then.

    The function receives the observations stacked along a new first axis: arrays and numbers become arrays of the
    same dtype, a dict becomes a dict and a tuple a tuple of such; strings, graphs, lists and other objects become a
    tuple. It returns a batch with one row for each observation: an array, a tensor or a list, or a dict or tuple of
    such, `(actions, values)` for instance. Each caller receives its row in that structure. The arrays of the batch
    are the function's to keep, and the rows of a numpy array the caller's: neither is used again. (Rows of a torch
    tensor are views of it.)

    Observations have to agree in structure, shape and dtype with those of the first batch that was answered, until
    then with those that wait or are being served. One that does not is refused at once, and nobody else notices.

    An exception of the function reaches the callers of that batch and no others, each as an object of its own,
    where it can be copied without a change of its text. `SystemExit`, `KeyboardInterrupt`, `asyncio.CancelledError`,
    `StopIteration` and the like arrive as `RemoteError`, whose `__cause__` is the original.

    A caller that is cancelled drops out: its observation is not in the batch, or if that has begun, its row is
    discarded. The function is not cancelled by that, not even when all of its callers are gone.

    Back-pressure is the `await`: a task has one observation here at most, and goes on when it is answered. For
    tasks without number, such as those of a server, `max_pending` is a bound.

    A batcher needs no start, and belongs to the event loop that used it first.

    Args:
        function: Takes a batch, returns a batch. A plain function runs in a thread, not always the same one; an
            `async def` function in a task of the batcher. Both in the context (`contextvars`) in which the batcher
            was built.
        max_batch_size: The most observations for one call of the function.
        max_wait: Seconds that a caller waits at most for its batch to fill. 0: a batch is whatever comes within
            one turn of the loop.
        max_pending: How many callers may wait for a batch to begin, `max_batch_size` at least; one more is refused
            with `BatcherFullError`. `None`: any number.

    Raises:
        ValueError: An argument is out of its range; the message names it.
        TypeError: `function` cannot be called.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        *,
        max_batch_size: int,
        max_wait: float,
        max_pending: int | None = None,
    ) -> None:
        check_batcher(function, max_batch_size, max_wait, max_pending)
        self._function = function
        self._is_async = _is_async(function)
        self._max_batch_size = int(max_batch_size)
        self._max_wait = float(max_wait)
        self._max_pending = max_pending
        self._context = contextvars.copy_context()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._structure: Structure | None = None
        self._is_proven = False  # whether a batch of that structure was answered
        self._waiting: dict[asyncio.Future[Any], tuple[Any, float]] = {}  # observation, time of the call; in order
        self._timer: asyncio.Handle | None = None
        self._num_served = 0  # in the batch that runs
        self._task: asyncio.Task[list[Any] | Exception] | None = None
        self._calls = self._batches = 0
        self._wait_seconds = self._longest_wait_seconds = self._function_seconds = 0.0

    def __repr__(self) -> str:
        name = getattr(self._function, "__qualname__", type(self._function).__qualname__)
        state = f"serving {self._num_served}" if self._num_served else "closed" if self._closed else "idle"
        limits = f"max_batch_size={self._max_batch_size}, max_wait={self._max_wait:g}"
        return f"{type(self).__name__}({name}, {limits}, pending={len(self._waiting)}, {state})"

    @property
    def closed(self) -> bool:
        """Whether `aclose` was called."""
        return self._closed

    def statistics(self) -> BatcherStatistics:
        """What it did so far."""
        return BatcherStatistics(
            calls=self._calls,
            batches=self._batches,
            mean_fill=self._calls / (self._batches * self._max_batch_size) if self._batches else 0.0,
            mean_wait_seconds=self._wait_seconds / self._calls if self._calls else 0.0,
            longest_wait_seconds=self._longest_wait_seconds,
            function_seconds=self._function_seconds,
            pending=len(self._waiting),
        )

    # ---- callers

    async def __call__(self, observation: Any) -> Any:
        """Asks the function for one observation.

        Args:
            observation: It must not be changed until it is answered.

        Returns:
            The row of this observation in what the function returned.

        Raises:
            InvalidObservationError: It differs from the others in structure, shape or dtype; it was not queued.
            InvalidBatchResultError: The function did not return one row for each observation.
            BatcherFullError: `max_pending` callers wait; this one was not queued.
            BatcherClosedError: The batcher is closed, or was before this call was served.
            WrongLoopError: The batcher belongs to another event loop.
            Exception: What the function raised for this batch.
        """
        future = self._queue(observation)
        try:
            return await future
        except BaseException:
            self._waiting.pop(future, None)
            del future  # it holds the exception, whose traceback holds this frame
            raise

    def _queue(self, observation: Any) -> asyncio.Future[Any]:
        loop = self._own_loop("a call")
        if self._closed:
            raise BatcherClosedError(waited=False)
        if self._max_pending is not None and len(self._waiting) >= self._max_pending:
            raise BatcherFullError(self._max_pending)
        if self._structure is None or not (self._is_proven or self._waiting or self._num_served):
            self._structure = Structure(observation)
        else:
            self._structure.check(observation)
        future: asyncio.Future[Any] = loop.create_future()
        self._waiting[future] = observation, time.perf_counter()
        self._consider(loop)
        return future

    def _own_loop(self, command: str) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            self._limiter = anyio.CapacityLimiter(1)  # of its own: others' threads never make it wait
        elif loop is not self._loop:
            raise WrongLoopError(command, "batcher")
        return loop

    # ---- when a batch begins, and how it ends

    def _consider(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begins a batch, if it may begin; else sees to it that this is asked again."""
        if self._num_served or not self._waiting:
            return
        if len(self._waiting) >= self._max_batch_size:
            self._begin(loop)
        elif self._timer is None:
            first = next(iter(self._waiting))
            seconds = self._waiting[first][1] + self._max_wait - time.perf_counter()
            # Never at once: whom the last batch woke in this turn of the loop may call again within it.
            later = functools.partial(loop.call_later, seconds) if seconds > 0 else loop.call_soon
            self._timer = later(self._waited, loop, first)

    def _waited(self, loop: asyncio.AbstractEventLoop, first: asyncio.Future[Any]) -> None:
        self._timer = None
        if first.done():  # cancelled: whoever is first now came later
            self._consider(loop)
        else:
            self._begin(loop)

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Takes the first callers out of those who wait, one at least, and starts the function for them."""
        callers: list[asyncio.Future[Any]] = []
        for future in self._waiting:
            if not future.done():  # cancelled just now: its task has yet to take it away
                callers.append(future)
                if len(callers) == self._max_batch_size:
                    break
        self._stop_timer()
        now = time.perf_counter()
        taken = [self._waiting.pop(future) for future in callers]
        self._num_served = len(callers)
        self._batches += 1
        self._calls += len(callers)
        self._wait_seconds += len(callers) * now - sum(since for _, since in taken)
        self._longest_wait_seconds = max(self._longest_wait_seconds, now - taken[0][1])
        assert self._structure is not None  # noqa: S101
        call = self._call_async if self._is_async else self._call_in_thread
        batch = call(self._structure, [observation for observation, _ in taken])
        self._task = loop.create_task(batch, name="aiovec batch", context=self._context.copy())
        # A callback, not the end of the task: a task that is cancelled before its first step has no end of its own.
        self._task.add_done_callback(functools.partial(self._end, loop, callers))

    def _end(
        self,
        loop: asyncio.AbstractEventLoop,
        callers: list[asyncio.Future[Any]],
        task: asyncio.Task[list[Any] | Exception],
    ) -> None:
        """Answers the callers of a batch that are still there, and goes on with the next."""
        self._task, self._num_served = None, 0
        outcome: list[Any] | Exception
        if task.cancelled():  # by a cancelled `aclose`, or by the end of the loop
            self._shut()
            outcome = BatcherClosedError(waited=True)
        else:
            error = task.exception()
            outcome = task.result() if error is None else wrap(error)  # no thread was to be had
        if isinstance(outcome, Exception):
            for future in callers:
                _fail(future, outcome if future is callers[0] else _copied(outcome))
        else:
            self._is_proven = True
            for future, row in zip(callers, outcome, strict=True):
                if not future.done():
                    future.set_result(row)
        self._consider(loop)

    # ---- the function

    async def _call_in_thread(self, structure: Structure, observations: list[Any]) -> list[Any] | Exception:
        return await anyio.to_thread.run_sync(self._call, structure, observations, limiter=self._limiter)

    def _call(self, structure: Structure, observations: list[Any]) -> list[Any] | Exception:
        try:
            batch = structure.stack(observations)
            began = time.perf_counter()
            try:
                result = self._function(batch)
            finally:
                self._function_seconds += time.perf_counter() - began
            return rows_of(result, len(observations))
        except BaseException as error:  # noqa: BLE001  it is the callers', whatever it is
            return _raisable(error)

    async def _call_async(self, structure: Structure, observations: list[Any]) -> list[Any] | Exception:
        try:
            if structure.nbytes * len(observations) < _LARGE:
                batch = structure.stack(observations)
            else:
                batch = await anyio.to_thread.run_sync(structure.stack, observations, limiter=self._limiter)
            began = time.perf_counter()
            try:
                result = await self._function(batch)
            finally:
                self._function_seconds += time.perf_counter() - began
            return rows_of(result, len(observations))
        except BaseException as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # we were cancelled; else it is the function's own
            return _raisable(error)

    # ---- its end

    async def __aenter__(self) -> Self:
        self._own_loop("async with")
        if self._closed:
            raise BatcherClosedError(waited=False)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends it: the batch that runs is waited for and answered; who waits for a batch gets `BatcherClosedError`.

        Idempotent. Cancelled, it cancels an `async def` function that runs, whose callers get `BatcherClosedError`
        too; a thread cannot be cancelled. Either way it waits for the end, and then raises its own cancellation.

        Raises:
            WrongLoopError: The batcher belongs to another event loop; it is as it was.
        """
        if self._loop is not None:
            self._own_loop("aclose()")
        self._shut()
        cancelled: asyncio.CancelledError | None = None
        # The function itself may close its batcher: it does not wait for its own end.
        while self._task is not None and self._task is not asyncio.current_task():
            task = self._task
            try:
                with anyio.CancelScope(shield=cancelled is not None):
                    await asyncio.wait([task])
            except asyncio.CancelledError as error:
                if cancelled is None and self._is_async:
                    task.cancel()
                cancelled = error
        if cancelled is not None:
            raise cancelled

    close = aclose

    def _shut(self) -> None:
        self._closed = True
        self._stop_timer()
        waiting, self._waiting = self._waiting, {}
        for future in waiting:
            _fail(future, BatcherClosedError(waited=True))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _is_async(function: Callable[[Any], Any]) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _raisable(error: BaseException) -> Exception:
    """The function's exception without our frame, as a task may raise it."""
    return wrap(error.with_traceback(error.__traceback__ and error.__traceback__.tb_next))


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # seen: asyncio reports nothing where the caller is cancelled before it goes on


def _copied(error: Exception) -> Exception:
    """The same exception for one more task: in one object, their tracebacks and notes would mix."""
    try:
        copied = copy.copy(error)
        if type(copied) is not type(error) or str(copied) != str(error):  # its class makes the text anew from `args`
            return error
    except Exception:  # noqa: BLE001  the user's own class
        return error
    if "__notes__" in error.__dict__:
        copied.__dict__["__notes__"] = list(error.__dict__["__notes__"])
    copied.__cause__, copied.__context__ = error.__cause__, error.__context__
    copied.__suppress_context__ = error.__suppress_context__
    return copied.with_traceback(error.__traceback__)
