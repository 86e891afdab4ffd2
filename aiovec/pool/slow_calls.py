"""Logs calls that wait for long, with the envs that they wait for.

A thread looks once a second, for all vectors of this process: a timer on the loop would cost each of its waits some
10 µs.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiovec.pool.pool import Pool

__all__ = ["log_slow_calls", "stop_logging"]

_INTERVAL_SECONDS = 1.0

_logger = logging.getLogger("aiovec")
_lock = threading.Lock()
_pools: dict[Pool, set[int]] = {}  # with the calls that were told
_changed = threading.Event()
_thread: threading.Thread | None = None


def log_slow_calls(pool: Pool) -> None:
    """Begins to look at the calls of a vector."""
    global _thread  # noqa: PLW0603  one for the process
    with _lock:
        _pools[pool] = set()
        if _thread is None or not _thread.is_alive():
            _changed.clear()
            _thread = threading.Thread(target=_look, name="aiovec-slow-calls", daemon=True)
            try:
                _thread.start()
            except RuntimeError:  # no more threads: then nothing is logged
                _thread = None


def stop_logging(pool: Pool) -> None:
    """The vector is closed."""
    with _lock:
        _pools.pop(pool, None)
        if not _pools:
            _changed.set()


def _look() -> None:
    global _thread  # noqa: PLW0603
    while True:
        ended = _changed.wait(_INTERVAL_SECONDS)
        with _lock:
            if ended and not _pools:
                _thread = None
                return
            _changed.clear()
            pools = list(_pools.items())
        for pool, told in pools:
            for seq, pending in pool.pending():
                if pending.seconds > pool.slow_call_seconds and seq not in told:
                    told.add(seq)
                    _logger.warning("%s", pending)
