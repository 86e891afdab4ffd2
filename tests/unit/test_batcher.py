"""`Batcher`: who is served together, who gets what, and what is left when something goes wrong."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anyio.to_thread
import numpy as np
import pytest

import aiovec
from aiovec import batcher as batcher_module
from aiovec.batcher import Batcher
from aiovec.errors import (
    BatcherClosedError,
    BatcherFullError,
    InvalidBatchResultError,
    InvalidObservationError,
    RemoteError,
    WrongLoopError,
)

NEVER = 3600.0  # seconds: a batch that begins before was full


@pytest.fixture(autouse=True)
def nothing_told_by_asyncio(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No exception that nobody retrieved, no task that was destroyed."""
    yield
    gc.collect()
    assert [record.getMessage() for record in caplog.get_records("call") if record.name == "asyncio"] == []


class Gated:
    """A function of either kind that records its batches, and stays in each until it is let go."""

    def __init__(self, in_thread: bool, answer: Callable[[Any], Any] = lambda batch: batch) -> None:
        self.batches: list[list[Any]] = []
        self.function: Callable[[Any], Any] = self._sync if in_thread else self._async
        self.cancelled = 0
        self._answer = answer
        self._loop = asyncio.get_running_loop()
        self._begun = asyncio.Semaphore(0)
        self._gate = threading.Semaphore(0)
        self._async_gate = asyncio.Semaphore(0)
        self._running = 0

    def _begin(self, batch: Any) -> None:
        assert self._running == 0, "two batches at a time"
        self._running += 1
        self.batches.append(np.asarray(batch).tolist())

    def _sync(self, batch: Any) -> Any:
        self._begin(batch)
        self._loop.call_soon_threadsafe(self._begun.release)
        assert self._gate.acquire(timeout=60)
        self._running -= 1
        return self._answer(batch)

    async def _async(self, batch: Any) -> Any:
        self._begin(batch)
        self._begun.release()
        try:
            await self._async_gate.acquire()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self._running -= 1
        return self._answer(batch)

    async def begins(self) -> None:
        """Waits for one more batch."""
        await self._begun.acquire()

    def let_go(self, count: int = 1) -> None:
        """Lets one batch end, or some."""
        for _ in range(count):
            self._gate.release()
            self._async_gate.release()


@pytest.fixture(params=[True, False], ids=["thread", "async"])
def in_thread(request: pytest.FixtureRequest) -> bool:
    """Both kinds of function."""
    kind: bool = request.param
    return kind


@pytest.fixture
async def gated(in_thread: bool) -> Gated:
    return Gated(in_thread)


def of_kind(in_thread: bool, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same function, plain or `async def`."""

    async def asynchronous(batch: Any) -> Any:
        return function(batch)

    return function if in_thread else asynchronous


async def ask(batcher: Batcher, *observations: Any) -> list[asyncio.Task[Any]]:
    """Tasks that have asked by now, in this order."""

    async def asks(observation: Any) -> Any:
        return await batcher(observation)

    tasks = [asyncio.create_task(asks(observation)) for observation in observations]
    await asyncio.sleep(0)
    return tasks


async def turns(count: int = 5) -> None:
    """Some turns of the loop, in which whatever is due happens."""
    for _ in range(count):
        await asyncio.sleep(0)


async def failure(task: Awaitable[Any]) -> BaseException:
    """What a task raised."""
    (outcome,) = await asyncio.gather(task, return_exceptions=True)
    assert isinstance(outcome, BaseException)
    return outcome


# ---- arguments


def good(batch: Any) -> Any:
    """Never called."""


@pytest.mark.parametrize(
    ("name", "value", "error", "fact"),
    [
        ("function", None, TypeError, "function=None: expected a function"),
        ("max_batch_size", 0, ValueError, "max_batch_size=0: expected a number of observations from 1"),
        ("max_batch_size", 1.5, ValueError, "max_batch_size=1.5"),
        ("max_batch_size", True, ValueError, "max_batch_size=True"),
        ("max_wait", -0.1, ValueError, "max_wait=-0.1: expected a number of seconds from 0"),
        ("max_wait", None, ValueError, "max_wait=None"),
        ("max_wait", float("inf"), ValueError, "max_wait=inf"),
        ("max_wait", float("nan"), ValueError, "max_wait=nan"),
        ("max_wait", True, ValueError, "max_wait=True"),
        ("max_pending", 3, ValueError, "max_pending=3: expected a number of callers from max_batch_size=4, or None"),
        ("max_pending", 4.5, ValueError, "max_pending=4.5"),
    ],
)
def test_a_bad_argument_is_named(name: str, value: Any, error: type[Exception], fact: str) -> None:
    arguments: dict[str, Any] = {"function": good, "max_batch_size": 4, "max_wait": 0.1, name: value}
    with pytest.raises(error) as caught:
        Batcher(arguments.pop("function"), **arguments)
    assert fact in str(caught.value)


# ---- when a batch begins


async def test_a_full_batch_begins_at_once(gated: Gated) -> None:
    """And not before it is full; rows come back in the order of the callers."""
    async with Batcher(gated.function, max_batch_size=3, max_wait=NEVER) as batcher:
        first = await ask(batcher, 1, 2)
        await turns()
        assert gated.batches == []
        last = await ask(batcher, 3)
        await gated.begins()
        assert gated.batches == [[1, 2, 3]]
        gated.let_go()
        assert await asyncio.gather(*first, *last) == [1, 2, 3]


async def test_without_a_wait_a_batch_is_one_turn_of_the_loop(gated: Gated) -> None:
    gated.let_go(2)
    async with Batcher(gated.function, max_batch_size=100, max_wait=0) as batcher:
        assert await asyncio.gather(*await ask(batcher, 1, 2, 3)) == [1, 2, 3]
        assert await batcher(4) == 4
        assert gated.batches == [[1, 2, 3], [4]]


async def test_a_batch_that_does_not_fill_begins_after_the_wait(gated: Gated) -> None:
    gated.let_go(2)
    async with Batcher(gated.function, max_batch_size=100, max_wait=0.05) as batcher:
        assert await asyncio.gather(*await ask(batcher, 1, 2)) == [1, 2]
        assert batcher.statistics().longest_wait_seconds > 0.03


async def test_the_wait_is_that_of_the_first(gated: Gated) -> None:
    """Who comes later does not prolong it."""
    gated.let_go()
    async with Batcher(gated.function, max_batch_size=100, max_wait=NEVER) as batcher:
        tasks = await ask(batcher, 1)
        timer, (first,) = batcher._timer, batcher._waiting
        tasks += await ask(batcher, 2)
        assert batcher._timer is timer
        batcher._waited(asyncio.get_running_loop(), first)
        assert await asyncio.gather(*tasks) == [1, 2]


async def test_the_wait_of_one_who_dropped_out_is_not_the_others(gated: Gated) -> None:
    """Once the first caller is gone, its timer begins no batch, but makes way for the next one's."""
    gated.let_go()
    async with Batcher(gated.function, max_batch_size=100, max_wait=NEVER) as batcher:
        gone, task = await ask(batcher, 1, 2)
        timer, (first, second) = batcher._timer, batcher._waiting
        gone.cancel()
        await asyncio.wait([gone])
        batcher._waited(asyncio.get_running_loop(), first)
        assert batcher._timer not in (None, timer)
        assert batcher.statistics().batches == 0
        batcher._waited(asyncio.get_running_loop(), second)
        assert await task == 2


async def test_one_batch_at_a_time_and_the_next_fills_meanwhile(gated: Gated) -> None:
    """It begins as soon as the function is free, and is never too large."""
    async with Batcher(gated.function, max_batch_size=3, max_wait=0) as batcher:
        tasks = await ask(batcher, 0)
        await gated.begins()
        for observation in range(1, 6):
            tasks += await ask(batcher, observation)
        await turns()
        assert gated.batches == [[0]]
        assert batcher.statistics().pending == 5
        gated.let_go(3)
        assert await asyncio.gather(*tasks) == list(range(6))
        assert gated.batches == [[0], [1, 2, 3], [4, 5]]


async def test_whoever_was_just_answered_joins_the_next_batch() -> None:
    """Else one who came in between would split the callers into two halves for ever."""
    sizes: list[int] = []

    async def function(batch: Any) -> Any:
        sizes.append(len(batch))
        await asyncio.sleep(0)
        return batch

    async def loops(batcher: Batcher, count: int) -> None:
        for number in range(count):
            await batcher(number)

    async with Batcher(function, max_batch_size=8, max_wait=0) as batcher, asyncio.TaskGroup() as tasks:
        for _ in range(3):
            tasks.create_task(loops(batcher, 4))
        await turns(3)
        assert sizes == [3]
        tasks.create_task(loops(batcher, 3))
    assert sizes == [3, 4, 4, 4]


async def test_many_tasks_each_get_their_own_row(in_thread: bool) -> None:
    """Over dicts, with more than one array in the answer."""

    def policy(batch: dict[str, Any]) -> tuple[Any, Any, list[str]]:
        return batch["number"] * 2, batch["image"].sum(axis=(1, 2)), [name.upper() for name in batch["name"]]

    async def caller(batcher: Batcher, number: int) -> None:
        for step in range(5):
            value = 100 * number + step
            observation = {"number": value, "image": np.full((2, 2), value, np.float32), "name": f"n{value}"}
            assert await batcher(observation) == (2 * value, 4 * value, f"N{value}")

    async with Batcher(of_kind(in_thread, policy), max_batch_size=16, max_wait=0.001) as batcher:
        await asyncio.gather(*(caller(batcher, number) for number in range(50)))
        assert batcher.statistics().calls == 250


async def test_rows_are_the_callers_and_batches_the_functions() -> None:
    """A function may return the same buffer each time, or keep what it received."""
    buffer, kept = np.zeros((1, 2)), []

    def function(batch: Any) -> Any:
        kept.append(batch)
        buffer[:] = batch
        return buffer

    async with Batcher(function, max_batch_size=1, max_wait=0) as batcher:
        rows = [await batcher(np.full(2, value)) for value in (1.0, 2.0)]
    assert np.array_equal(rows, [[1, 1], [2, 2]])
    assert np.array_equal(kept, [[[1, 1]], [[2, 2]]])


async def test_a_large_batch_for_an_async_function_is_stacked_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batcher_module, "_LARGE", 1)

    async def function(batch: Any) -> Any:
        return batch

    async with Batcher(function, max_batch_size=2, max_wait=NEVER) as batcher:
        rows = await asyncio.gather(*await ask(batcher, np.zeros(3), np.ones(3)))
    assert np.array_equal(rows, [np.zeros(3), np.ones(3)])


class Policy:
    async def __call__(self, batch: Any) -> Any:
        return batch

    async def with_scale(self, scale: int, batch: Any) -> Any:
        return batch * scale


@pytest.mark.parametrize(
    ("function", "answer"),
    [
        (Policy(), 3),
        (functools.partial(Policy()), 3),
        (functools.partial(Policy().with_scale, 2), 6),
        (np.negative, -3),
        (functools.partial(np.multiply, 2), 6),
        (list, 3),
    ],
)
async def test_functions_of_every_form(function: Any, answer: int) -> None:
    async with Batcher(function, max_batch_size=1, max_wait=0) as batcher:
        assert await batcher(3) == answer


async def test_a_thread_is_always_there() -> None:
    """Others may use up all the threads that anyio has for everyone."""
    leave = threading.Event()
    anyio.to_thread.current_default_thread_limiter().total_tokens = 1
    occupied = asyncio.create_task(anyio.to_thread.run_sync(leave.wait))
    await turns()
    async with Batcher(np.negative, max_batch_size=1, max_wait=0) as batcher:
        assert await batcher(3) == -3
    assert not occupied.done()
    leave.set()
    await occupied


async def test_the_function_does_not_see_its_callers_context(in_thread: bool) -> None:
    """It has the one in which the batcher was built, anew for each batch."""
    variable = contextvars.ContextVar[str]("variable", default="nobody's")
    seen = []

    def function(batch: Any) -> Any:
        seen.append(variable.get())
        variable.set("an earlier batch's")
        return batch

    variable.set("the builder's")
    batcher = Batcher(of_kind(in_thread, function), max_batch_size=1, max_wait=0)
    variable.set("the caller's")
    await batcher(1)
    await batcher(2)
    assert seen == ["the builder's", "the builder's"]


# ---- observations that do not fit


async def test_an_observation_that_does_not_fit_is_refused_alone(gated: Gated) -> None:
    """At once, and nobody else notices."""
    async with Batcher(gated.function, max_batch_size=2, max_wait=NEVER) as batcher:
        tasks = await ask(batcher, np.zeros(2))
        with pytest.raises(
            InvalidObservationError, match=r"float64 of shape \(2,\), as .* got float64 of shape \(3,\)"
        ):
            await batcher(np.zeros(3))
        assert batcher.statistics().pending == 1
        tasks += await ask(batcher, np.ones(2))
        await gated.begins()
        with pytest.raises(InvalidObservationError):
            await batcher(np.zeros(3))
        gated.let_go()
        await asyncio.gather(*tasks)
        with pytest.raises(InvalidObservationError):
            await batcher(np.zeros(3))
    assert gated.batches == [[[0, 0], [1, 1]]]


async def test_a_first_observation_that_the_function_cannot_take_binds_nobody(in_thread: bool) -> None:
    """What holds for good is the structure of the first batch that was answered."""

    def function(batch: Any) -> Any:
        return batch.reshape(-1, 2)

    async with Batcher(of_kind(in_thread, function), max_batch_size=2, max_wait=0) as batcher:
        with pytest.raises(ValueError, match="reshape"):
            await batcher(np.zeros(3))
        (gone,) = await ask(batcher, np.zeros(5))
        gone.cancel()
        await asyncio.wait([gone])
        await batcher(np.zeros(2))
        with pytest.raises(InvalidObservationError):
            await batcher(np.zeros(3))


# ---- failures


class Unlike(Exception):
    """Its text is made of what it takes: a copy by `args` would differ."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")


class TwoFacts(Exception):
    """Cannot be made from its `args`."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


@pytest.mark.parametrize(
    ("make", "is_copied"),
    [(lambda: ValueError("no"), True), (lambda: Unlike(5), False), (lambda: TwoFacts(1, 2), False)],
)
async def test_an_exception_reaches_its_batch_and_no_other(
    in_thread: bool, make: Callable[[], Exception], is_copied: bool
) -> None:
    """As itself, to each of its callers."""
    error = make()
    error.add_note("a note")

    def policy(batch: Any) -> Any:
        if -1 in batch:
            raise error from KeyError("cause")
        return batch

    async with Batcher(of_kind(in_thread, policy), max_batch_size=2, max_wait=NEVER) as batcher:
        good, bad, after = await ask(batcher, 0, 1), await ask(batcher, 2, -1), await ask(batcher, 3, 4)
        assert await asyncio.gather(*good, *after) == [0, 1, 3, 4]
        first, second = [await failure(task) for task in bad]
    assert first is error
    assert (second is not error) is is_copied
    assert type(second) is type(error)
    assert str(second) == str(error)
    assert second.__notes__ == ["a note"]
    assert isinstance(second.__cause__, KeyError)
    assert second.__suppress_context__
    if is_copied:
        second.add_note("another")
        assert first.__notes__ == ["a note"]
        for raised in (first, second):
            names = [frame.name for frame in traceback.extract_tb(raised.__traceback__)]
            assert names.count("policy") == 1
            assert names.count("asks") == 1
            assert "_call" not in names


class Stop(BaseException):
    """None of Python's own."""


@pytest.mark.parametrize("error_class", [SystemExit, KeyboardInterrupt, asyncio.CancelledError, GeneratorExit, Stop])
async def test_what_would_end_the_caller_is_wrapped(in_thread: bool, error_class: type[BaseException]) -> None:
    """And the batcher goes on."""
    error = error_class("x")

    def function(batch: Any) -> Any:
        if -1 in batch:
            raise error
        return batch

    async with Batcher(of_kind(in_thread, function), max_batch_size=2, max_wait=NEVER) as batcher:
        for raised in [await failure(task) for task in await ask(batcher, 1, -1)]:
            assert isinstance(raised, RemoteError)
            assert raised.__cause__ is error
        assert await asyncio.gather(*await ask(batcher, 1, 2)) == [1, 2]


async def test_the_end_of_an_iterator_is_wrapped(in_thread: bool) -> None:
    """A coroutine makes a `RuntimeError` of it, as Python does everywhere."""

    def function(batch: Any) -> Any:
        return next(iter(()))

    async with Batcher(of_kind(in_thread, function), max_batch_size=1, max_wait=0) as batcher:
        error = await failure(asyncio.create_task(batcher(1)))
    assert type(error) is (RemoteError if in_thread else RuntimeError)
    assert isinstance(error.__cause__, StopIteration)


async def test_a_wrong_number_of_rows_is_told_to_the_callers_of_the_batch(in_thread: bool) -> None:
    def function(batch: Any) -> Any:
        return batch, batch[: 1 if -1 in batch else None]

    async with Batcher(of_kind(in_thread, function), max_batch_size=2, max_wait=NEVER) as batcher:
        for task in await ask(batcher, 1, -1):
            with pytest.raises(InvalidBatchResultError, match=r"result\[1\]: expected 2 rows.* got 1 rows"):
                await task
        assert await asyncio.gather(*await ask(batcher, 1, 2)) == [(1, 1), (2, 2)]


async def test_a_function_that_returns_a_coroutine_is_told_what_to_do() -> None:
    async with Batcher(lambda batch: Policy()(batch), max_batch_size=1, max_wait=0) as batcher:
        with pytest.raises(InvalidBatchResultError, match="make the function itself an `async def`"):
            await batcher(1)


async def test_no_thread_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """The callers are told, and the next batch tries again."""

    async def fails(*_args: Any, **_options: Any) -> Any:
        raise RuntimeError("can't start new thread")

    batcher = Batcher(np.negative, max_batch_size=2, max_wait=NEVER)
    with monkeypatch.context() as patched:
        patched.setattr(anyio.to_thread, "run_sync", fails)
        for task in await ask(batcher, 1, 2):
            with pytest.raises(RuntimeError, match="can't start new thread"):
                await task
    assert await asyncio.gather(*await ask(batcher, 1, 2)) == [-1, -2]


# ---- callers that are cancelled


async def test_who_is_cancelled_before_the_batch_is_not_in_it(gated: Gated) -> None:
    """Also in the very turn in which it begins."""
    gated.let_go()
    async with Batcher(gated.function, max_batch_size=3, max_wait=NEVER) as batcher:
        tasks = await ask(batcher, 1, 2)
        tasks[0].cancel()
        await asyncio.wait([tasks[0]])
        assert batcher.statistics().pending == 1
        tasks += await ask(batcher, 3, 4)
        assert await asyncio.gather(*tasks[1:]) == [2, 3, 4]
        assert gated.batches == [[2, 3, 4]]
        assert batcher.statistics().calls == 3


async def test_who_is_cancelled_in_the_turn_in_which_a_batch_begins_is_not_in_it(gated: Gated) -> None:
    gated.let_go(2)
    async with Batcher(gated.function, max_batch_size=2, max_wait=NEVER) as batcher:
        (gone,) = await ask(batcher, 1)
        call = asyncio.create_task(batcher(2))  # takes its turn before the cancelled task does
        gone.cancel()
        assert await call == 2
        assert gone.cancelled()
        assert gated.batches == [[2]]
        for task in (tasks := await ask(batcher, 3)):
            task.cancel()
        await asyncio.wait(tasks)
        assert await asyncio.gather(*await ask(batcher, 4, 5)) == [4, 5]


async def test_a_wait_whose_callers_are_all_gone_begins_nothing(gated: Gated) -> None:
    async with Batcher(gated.function, max_batch_size=2, max_wait=0.01) as batcher:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await batcher(1)
        await asyncio.sleep(0.03)
        assert batcher.statistics().batches == 0
        assert "pending=0, idle" in repr(batcher)


async def test_who_is_cancelled_later_does_not_stop_the_batch(gated: Gated) -> None:
    """Its row is discarded, the others get theirs."""
    async with Batcher(gated.function, max_batch_size=3, max_wait=NEVER) as batcher:
        tasks = await ask(batcher, 1, 2, 3)
        await gated.begins()
        tasks[1].cancel()
        await asyncio.wait([tasks[1]])
        gated.let_go()
        assert await asyncio.gather(tasks[0], tasks[2]) == [1, 3]
        assert gated.cancelled == 0


async def test_a_batch_goes_on_when_all_of_its_callers_are_gone(gated: Gated) -> None:
    """The next one waits for its end."""
    async with Batcher(gated.function, max_batch_size=2, max_wait=NEVER) as batcher:
        tasks = await ask(batcher, 1, 2)
        await gated.begins()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        after = await ask(batcher, 3, 4)
        assert "pending=2, serving 2" in repr(batcher)
        gated.let_go(2)
        assert await asyncio.gather(*after) == [3, 4]
        assert gated.cancelled == 0
        assert gated.batches == [[1, 2], [3, 4]]


async def test_a_failure_that_nobody_waits_for_is_not_reported(in_thread: bool) -> None:
    """A caller that is cancelled before it went on with the exception, and one that was cancelled before."""

    def fail(_batch: Any) -> Any:
        raise ValueError("no")

    gated = Gated(in_thread, fail)
    async with Batcher(gated.function, max_batch_size=2, max_wait=NEVER) as batcher:
        tasks = await ask(batcher, 1, 2)
        await gated.begins()
        tasks[0].cancel()
        gated.let_go()
        while batcher._num_served:
            await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.wait(tasks)


# ---- back-pressure


async def test_a_bound_on_those_who_wait(gated: Gated) -> None:
    """One more is refused, and asks again."""
    async with Batcher(gated.function, max_batch_size=2, max_wait=NEVER, max_pending=3) as batcher:
        tasks = await ask(batcher, 1, 2)
        await gated.begins()
        tasks += await ask(batcher, 3, 4, 5)
        with pytest.raises(BatcherFullError, match="3 callers wait") as caught:
            await batcher(6)
        assert caught.value.max_pending == 3
        tasks[-1].cancel()
        await asyncio.wait([tasks.pop()])
        gated.let_go()
        await gated.begins()
        tasks += await ask(batcher, 6, 7)
        gated.let_go(2)
        assert await asyncio.gather(*tasks) == [1, 2, 3, 4, 6, 7]


# ---- its end


async def test_close_waits_for_the_batch_that_runs(gated: Gated) -> None:
    """It is answered; who waits for a batch is told; nobody else comes in. Twice is once."""
    async with Batcher(gated.function, max_batch_size=2, max_wait=NEVER) as batcher:
        served, waiting = await ask(batcher, 1, 2), await ask(batcher, 3)
        await gated.begins()
        closing = [asyncio.create_task(batcher.aclose()) for _ in range(2)]
        with pytest.raises(BatcherClosedError, match="was closed before it answered this call"):
            await waiting[0]
        assert batcher.closed
        with pytest.raises(BatcherClosedError, match="is closed, and takes no call"):
            await batcher(4)
        assert not any(task.done() for task in closing)
        gated.let_go()
        assert await asyncio.gather(*served) == [1, 2]
        await asyncio.gather(*closing)
        await batcher.aclose()
    assert "closed" in repr(batcher)
    with pytest.raises(BatcherClosedError):
        async with batcher:
            pass


async def test_a_batcher_that_was_never_used_closes_too() -> None:
    batcher = Batcher(np.negative, max_batch_size=2, max_wait=0)
    await batcher.close()
    assert batcher.closed


async def test_a_forgotten_close_leaves_nothing() -> None:
    """There is nothing that would have to be freed."""
    assert await Batcher(np.negative, max_batch_size=2, max_wait=0)(1) == -1


async def test_a_cancelled_close_cancels_an_async_function() -> None:
    """Once, and waits for its end."""
    gated = Gated(in_thread=False)
    batcher = Batcher(gated.function, max_batch_size=2, max_wait=NEVER)
    tasks = await ask(batcher, 1, 2)
    await gated.begins()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await batcher.aclose()
    assert scope.cancelled_caught
    assert gated.cancelled == 1
    for task in tasks:
        with pytest.raises(BatcherClosedError, match="was closed before it answered"):
            await task


async def test_a_cancelled_close_waits_for_a_thread() -> None:
    """Which cannot be cancelled: its callers are answered."""
    gated = Gated(in_thread=True)
    batcher = Batcher(gated.function, max_batch_size=2, max_wait=NEVER)
    tasks = await ask(batcher, 1, 2)
    await gated.begins()
    closing = asyncio.create_task(batcher.aclose())
    for _ in range(2):
        await turns()
        closing.cancel()
    await turns()
    assert not closing.done()
    gated.let_go()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert await asyncio.gather(*tasks) == [1, 2]


async def test_a_function_that_closes_its_own_batcher() -> None:
    """It does not wait for itself."""

    async def function(batch: Any) -> Any:
        await batcher.aclose()
        return batch

    batcher = Batcher(function, max_batch_size=1, max_wait=0)
    assert await batcher(1) == 1
    assert batcher.closed


@pytest.mark.parametrize("turns_before", [0, 3])
async def test_whoever_cancels_the_batchers_own_task_closes_it(turns_before: int) -> None:
    """As the end of the loop does; before its first step, or within the function."""
    gated = Gated(in_thread=False)
    batcher = Batcher(gated.function, max_batch_size=1, max_wait=NEVER)
    served = asyncio.create_task(batcher(1))
    while batcher._task is None:
        await asyncio.sleep(0)
    (waiting,) = await ask(batcher, 2) if turns_before else [None]
    await turns(turns_before)
    batcher._task.cancel()
    with pytest.raises(BatcherClosedError):
        await served
    if waiting is not None:
        with pytest.raises(BatcherClosedError):
            await waiting
    assert batcher.closed


def test_the_end_of_the_loop_ends_everything() -> None:
    """Without a close; a function that waits is cancelled with all other tasks."""
    gated: list[Gated] = []

    async def main() -> None:
        gated.append(Gated(in_thread=False))
        batcher = Batcher(gated[0].function, max_batch_size=2, max_wait=NEVER)
        main.tasks = await ask(batcher, 1, 2, 3)  # type: ignore[attr-defined]
        await gated[0].begins()

    asyncio.run(main())
    assert gated[0].cancelled == 1


def test_another_loop_is_refused() -> None:
    """In every call, and nothing is changed."""
    batcher = Batcher(np.negative, max_batch_size=1, max_wait=0)

    async def call() -> None:
        assert await batcher(1) == -1

    asyncio.run(call())
    for use in (call, batcher.aclose, batcher.__aenter__):
        with pytest.raises(WrongLoopError, match="from another event loop than the one that started this batcher"):
            asyncio.run(use())
    assert not batcher.closed


# ---- what it says of itself


async def test_statistics(gated: Gated) -> None:
    async with Batcher(gated.function, max_batch_size=4, max_wait=0) as batcher:
        zero = batcher.statistics()
        assert zero == aiovec.BatcherStatistics(0, 0, 0.0, 0.0, 0.0, 0.0, 0)
        tasks = await ask(batcher, 1)
        await gated.begins()
        tasks += await ask(batcher, 2, 3)
        await asyncio.sleep(0.01)
        assert batcher.statistics().pending == 2
        gated.let_go(2)
        await asyncio.gather(*tasks)
        statistics = batcher.statistics()
    assert (statistics.calls, statistics.batches, statistics.pending) == (3, 2, 0)
    assert statistics.mean_fill == 3 / 8
    # uvloop's clock has milliseconds: a sleep may be a little shorter than asked for.
    assert statistics.longest_wait_seconds > 0.008
    assert 2 * 0.008 / 3 < statistics.mean_wait_seconds < statistics.longest_wait_seconds
    assert statistics.function_seconds > 0.008
    with pytest.raises(AttributeError):
        statistics.calls = 0  # type: ignore[misc]


async def test_its_repr_is_one_line(gated: Gated) -> None:
    batcher = Batcher(gated.function, max_batch_size=2, max_wait=0.5)
    kind = gated.function.__name__
    assert repr(batcher) == f"Batcher(Gated.{kind}, max_batch_size=2, max_wait=0.5, pending=0, idle)"
    tasks = await ask(batcher, 1, 2, 3)
    await gated.begins()
    assert "pending=1, serving 2" in repr(batcher)
    gated.let_go(2)
    await asyncio.gather(*tasks)
    assert repr(Batcher(Policy(), max_batch_size=2, max_wait=0)).startswith("Batcher(Policy, ")
