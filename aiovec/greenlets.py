"""Synchronous code under `await`: the one place that switches greenlets.

Such code runs in a greenlet of the loop's own thread. Where it must wait, it hands a coroutine to the task that runs it, which
awaits it and comes back with the result, or throws in what was raised: to both it is an ordinary call. 10 µs a call.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import greenlet

__all__ = ["await_here", "under_await"]

_Result = TypeVar("_Result")


class _UnderAwait(greenlet.greenlet):
    """A greenlet whose parent awaits what it is handed."""


async def under_await(function: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
    """Runs a function in which `await_here` may be called, to its end.

    A cancellation of the task is raised where the function waits, as is what the awaited coroutine raises; what leaves the
    function is raised here.
    """
    running = _UnderAwait(function)
    running.gr_context = greenlet.getcurrent().gr_context  # context variables are those of the task
    handed = running.switch(*args, **kwargs)
    while not running.dead:  # else it is the result
        try:
            result = await handed
        except BaseException as error:  # noqa: BLE001  raised where the function waits
            handed = running.throw(type(error), error, error.__traceback__)
        else:
            handed = running.switch(result)
    return handed  # type: ignore[no-any-return]


def await_here(coroutine: Coroutine[Any, Any, _Result], refused: Callable[[], Exception]) -> _Result:
    """Waits for a coroutine, in the middle of a function that `under_await` runs.

    Args:
        coroutine: What to wait for.
        refused: Makes the exception to raise where nobody could await it.
    """
    current = greenlet.getcurrent()
    if not isinstance(current, _UnderAwait) or current.parent is None:
        coroutine.close()
        raise refused()
    result: _Result = current.parent.switch(coroutine)
    return result
