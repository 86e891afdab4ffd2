"""The future behind every call: who awaits it goes on in the very turn of the loop that brought the last reply.

An `asyncio.Future` lets its task go on in the loop's next turn. That turn, with its own look at every
descriptor, costs 10 to 20 µs, a twentieth of a step of 64 CartPole.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Callable
from typing import Any

__all__ = ["Answer"]


class Answer(asyncio.Future[None]):
    """Done when there is something to say to the one task that awaits it."""

    _waiting: tuple[Callable[[Answer], object], contextvars.Context] | None = None

    def add_done_callback(self, fn: Callable[[Any], object], /, *, context: contextvars.Context | None = None) -> None:
        if self._waiting is None and context is not None and not self.done():
            self._waiting = (fn, context)
        else:
            super().add_done_callback(fn, context=context)

    def remove_done_callback(self, fn: Callable[[Any], object], /) -> int:
        self._rejoin()
        return super().remove_done_callback(fn)

    def cancel(self, msg: Any | None = None) -> bool:
        self._rejoin()
        return super().cancel(msg)

    def set_result(self, result: None, /) -> None:
        self._rejoin()
        super().set_result(result)

    def set_exception(self, exception: type[BaseException] | BaseException, /) -> None:
        self._rejoin()
        super().set_exception(exception)

    def resume(self) -> None:
        """Sets the result, and runs the task that waits, until it awaits again.

        Only as the last act of a callback of the loop: no task is running then, and whatever this one does,
        close the vector for instance, nothing of ours goes on behind it.
        """
        # The result first: asyncio's own Ctrl-C cancels the main task between any two instructions, and who waits
        # must be known to the future until it is done.
        try:
            super().set_result(None)
        except asyncio.InvalidStateError:
            return  # cancelled, or told before: its task is woken by that
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            resume, context = waiting
            context.run(resume, self)

    def resume_later(self) -> None:
        """Sets the result, and lets the task go on in the loop's next turn; nothing where it is done already."""
        with contextlib.suppress(asyncio.InvalidStateError):
            self.set_result(None)

    def _rejoin(self) -> None:
        """Hands the one who waits to the future itself, whose callbacks run by the loop's next turn."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            fn, context = waiting
            super().add_done_callback(fn, context=context)
