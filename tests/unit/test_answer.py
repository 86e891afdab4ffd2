"""Whoever awaits an `Answer` goes on within `resume`; in every other respect it is a future."""

from __future__ import annotations

import asyncio
import contextvars

import pytest

from aiovec.pool.answer import Answer


async def waiting(answer: Answer, log: list[str]) -> None:
    await answer
    log.append("resumed")


async def started(answer: Answer, log: list[str]) -> asyncio.Task[None]:
    """A task that awaits the answer by now."""
    task = asyncio.create_task(waiting(answer, log))
    await asyncio.sleep(0)
    return task


async def call_back(log: list[str], answer: Answer) -> None:
    """Resumes in a callback of the loop, and waits for that callback alone."""
    done = asyncio.Event()

    def callback() -> None:
        answer.resume()
        log.append("callback ends")
        done.set()

    asyncio.get_running_loop().call_soon(callback)
    await done.wait()


async def test_resume_runs_the_task_at_once() -> None:
    answer, log = Answer(), list[str]()
    task = await started(answer, log)
    await call_back(log, answer)
    assert log == ["resumed", "callback ends"]
    await task


async def test_the_task_keeps_its_identity_and_context() -> None:
    answer, seen = Answer(), []
    variable = contextvars.ContextVar[str]("variable", default="another task's")

    async def look() -> None:
        variable.set("its own")
        await answer
        seen.append((asyncio.current_task(), variable.get()))

    task = asyncio.create_task(look())
    await asyncio.sleep(0)
    await call_back([], answer)
    assert seen == [(task, "its own")]
    await task


async def test_resume_before_anyone_waits() -> None:
    answer, log = Answer(), list[str]()
    answer.resume()
    await waiting(answer, log)
    assert log == ["resumed"]


async def test_set_result_is_for_the_next_turn() -> None:
    answer, log = Answer(), list[str]()
    task = await started(answer, log)
    answer.set_result(None)
    assert log == []
    await task
    assert log == ["resumed"]


async def test_an_exception_is_raised() -> None:
    answer = Answer()
    task = await started(answer, [])
    answer.set_exception(ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        await task


async def test_cancelling_the_task_cancels_the_answer() -> None:
    answer, log = Answer(), list[str]()
    task = await started(answer, log)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert answer.cancelled()
    assert log == []


class CancelledMeanwhile(asyncio.Future[None]):
    """What a Ctrl-C in the middle of `resume` does: asyncio cancels the main task between any two instructions."""

    task: asyncio.Task[None] | None = None

    def set_result(self, result: None, /) -> None:
        if self.task is not None:
            self.task.cancel()
        super().set_result(result)


async def test_a_cancellation_in_the_middle_of_resume_wakes_the_task() -> None:
    class Interrupted(Answer, CancelledMeanwhile):
        pass

    answer, log = Interrupted(), list[str]()
    answer.task = await started(answer, log)
    await call_back(log, answer)
    with pytest.raises(asyncio.CancelledError):
        await answer.task
    assert log == ["callback ends"]


async def test_two_who_wait() -> None:
    answer, log = Answer(), list[str]()
    tasks = [await started(answer, log), await started(answer, log)]
    await call_back(log, answer)
    await asyncio.gather(*tasks)
    assert sorted(log) == ["callback ends", "resumed", "resumed"]


async def test_a_callback_that_is_removed_is_not_called() -> None:
    answer, log = Answer(), list[Answer]()
    answer.add_done_callback(log.append, context=contextvars.copy_context())
    assert answer.remove_done_callback(log.append) == 1
    answer.resume()
    await asyncio.sleep(0)
    assert log == []
