"""Synchronous code under `await`: the one place that switches greenlets.

Such code runs in a greenlet of the loop's own thread. Where it must wait, it hands a coroutine to the task that runs it, which
awaits it and comes back with the result, or throws in what was raised: to both it is an ordinary call.

Messages go by an attribute, and not as arguments of `switch`: whoever is switched away from holds its arguments for as long
as it sleeps, and so would hold a batch of lent memory until the next call.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from enum import Enum
from typing import Any, NoReturn, TypeVar

import greenlet

__all__ = ["UnderAwait", "await_here"]

_Result = TypeVar("_Result")


class _Is(Enum):
    """What a message is."""

    WORK = 1
    HANDED = 2  # a coroutine to await
    RETURNED = 3
    RAISED = 4


class _Serving(greenlet.greenlet):
    """One greenlet for all calls: to make another one for each would cost 7 µs."""

    message: tuple[_Is, Any] | None = None

    def take(self) -> tuple[_Is, Any]:
        """The message, which nobody else holds any more."""
        message, self.message = self.message, None
        assert message is not None  # noqa: S101
        return message

    def run(self) -> NoReturn:  # pyright: ignore[reportIncompatibleMethodOverride]  as greenlet documents it
        """Works, one call after the other, until it is collected."""
        while True:
            self.message = self._done(self.take()[1])
            self._parent().switch()

    def _done(self, work: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]) -> tuple[_Is, Any]:
        function, args, kwargs = work
        try:
            return _Is.RETURNED, function(*args, **kwargs)
        except greenlet.GreenletExit:  # the collector ends us
            raise
        except BaseException as error:  # noqa: BLE001  raised in the task
            return _Is.RAISED, error

    def wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Hands a coroutine over; called in the middle of the work."""
        self.message = _Is.HANDED, coroutine
        self._parent().switch()
        return self.take()[1]

    def _parent(self) -> greenlet.greenlet:
        assert self.parent is not None  # noqa: S101
        return self.parent


class UnderAwait:
    """Runs functions in which `await_here` may be called, one at a time."""

    def __init__(self) -> None:
        self._serving: _Serving | None = None

    async def run(self, function: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
        """Runs a function to its end.

        A cancellation of the task is raised where the function waits, as is what the awaited coroutine raises; what leaves
        the function is raised here.
        """
        task = greenlet.getcurrent()
        serving, self._serving = self._serving or _Serving(), None  # only one that has nothing to do is kept
        serving.parent = task
        serving.gr_context = task.gr_context  # context variables are those of the task
        serving.message = _Is.WORK, (function, args, kwargs)
        serving.switch()
        while True:
            kind, value = serving.take()
            if kind is not _Is.HANDED:
                self._serving = serving
            if kind is _Is.RETURNED:
                return value  # type: ignore[no-any-return]
            if kind is _Is.RAISED:
                try:
                    raise value
                finally:
                    del value  # whose traceback has this frame
            try:
                serving.message = _Is.RETURNED, await value
            except BaseException as error:  # noqa: BLE001  raised where the function waits
                serving.throw(type(error), error, error.__traceback__)
            else:
                serving.switch()


def await_here(coroutine: Coroutine[Any, Any, _Result], refused: Callable[[], Exception]) -> _Result:
    """Waits for a coroutine, in the middle of a function that an `UnderAwait` runs.

    Args:
        coroutine: What to wait for.
        refused: Makes the exception to raise where nobody could await it.
    """
    serving = greenlet.getcurrent()
    if not isinstance(serving, _Serving):
        coroutine.close()
        raise refused()
    result: _Result = serving.wait(coroutine)
    return result
