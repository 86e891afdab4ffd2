"""Logs calls that wait for long, with the envs that they wait for, and wakes the loop meanwhile.

A thread looks once a second, for all vectors of this process: a timer on the loop would cost each of its waits some
10 µs. The loop is woken for Jupyter: its kernel takes a SIGINT, but cancels the cell only once the loop has something
to do (issue 881 of ipykernel), and a loop that waits for an env that is stuck has nothing.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiovec.pool.pool import Pool

__all__ = ["log_slow_calls", "stop_logging"]

_INTERVAL_SECONDS = 1.0

_logger = logging.getLogger("aiovec")
# With the calls that were told. Weak: what a forgotten vector holds must not be kept alive by this module. No lock: the
# end of a vector may come from the garbage collector, in the middle of anything here.
_pools: weakref.WeakKeyDictionary[Pool, set[int]] = weakref.WeakKeyDictionary()
_changed = threading.Event()
_thread: threading.Thread | None = None


def log_slow_calls(pool: Pool) -> None:
    """Begins to look at the calls of a vector."""
    global _thread  # noqa: PLW0603  one for the process
    _pools[pool] = set()
    if _thread is None or not _thread.is_alive():
        _thread = threading.Thread(target=_look, name="aiovec-slow-calls", daemon=True)
        try:
            _thread.start()
        except RuntimeError:  # no more threads: then nothing is logged
            _thread = None


def stop_logging(pool: Pool) -> None:
    """The vector is closed."""
    _pools.pop(pool, None)
    if not _pools:
        _changed.set()


def _look() -> None:
    global _thread  # noqa: PLW0603
    while True:
        _changed.wait(_INTERVAL_SECONDS)
        _changed.clear()
        if not _pools:
            _thread = None
            if not _pools:  # who comes from here on starts another one
                return
            _thread = threading.current_thread()
        with contextlib.suppress(RuntimeError, ValueError):  # a vector came, or ended, while we looked: again, then
            _look_at_all()


def _look_at_all() -> None:
    for pool, told in list(_pools.items()):
        if not pool.loop.is_running():
            continue  # a blocking vector whose user is at other work: nobody waits
        calls = pool.pending()
        for seq, pending in calls:
            if pending.seconds > pool.slow_call_seconds and seq not in told:
                told.add(seq)
                _logger.warning("%s", pending)
        if calls:
            pool.loop.call_soon_threadsafe(pool.look)
