"""What would hold up the loop, in a thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import anyio.to_thread

__all__ = ["in_thread"]

_Result = TypeVar("_Result")


async def in_thread(function: Callable[..., _Result], *args: Any) -> _Result:
    """Runs a function in a thread; on the loop where the system gives none, which is slow, but loses nothing."""
    try:
        return await anyio.to_thread.run_sync(function, *args)
    except RuntimeError as error:
        if str(error) != "can't start new thread":  # CPython's own words; it has no class for it
            raise
    return function(*args)
