"""Ends this worker, and what it started, when the parent is gone, whichever way the parent ended.

Two ways, since each has a gap. The *lifeline* is a pipe whose writing end only the parent holds: when that
closes, the kernel itself sends SIGKILL to the worker's process group, so it works while an env is stuck in C
and holds the GIL; but a copy of the writing end in another child of the parent hides the end. A thread that
waits for the parent's pidfd sees that case; but it needs the GIL. (`PR_SET_PDEATHSIG` is not used: it
follows the thread that started the child, not the process.)
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import threading

from aiovec.exchange.pidfds import open_pidfd

__all__ = ["hold_lifeline"]


def hold_lifeline(lifeline_fd: int, parent_pid: int) -> None:
    """Puts the process into a session of its own and ties its process group to the parent's life."""
    if os.getpgrp() != os.getpid():
        os.setsid()
    if hasattr(fcntl, "F_SETSIG"):  # Linux
        fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline_fd, fcntl.F_SETSIG, signal.SIGKILL)
        flags = fcntl.fcntl(lifeline_fd, fcntl.F_GETFL)
        fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, flags | os.O_ASYNC | os.O_NONBLOCK)
        if _readable([lifeline_fd], 0):  # it ended before this was in place
            _end_group()
    watched = [lifeline_fd]
    try:
        if (pidfd := open_pidfd(parent_pid)) is not None:
            watched.append(pidfd)
    except ProcessLookupError:
        _end_group()
    threading.Thread(target=_watch, args=(watched,), name="aiovec-lifeline", daemon=True).start()


def _watch(fds: list[int]) -> None:
    _readable(fds, None)
    _end_group()


def _readable(fds: list[int], timeout: float | None) -> bool:
    poll = select.poll()  # not select(): a parent with many files hands down numbers above 1023
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout))


def _end_group() -> None:
    os.killpg(os.getpgrp(), signal.SIGKILL)
