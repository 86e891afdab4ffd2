"""A descriptor that tells of the end of a process, where the system gives one."""

from __future__ import annotations

import os

__all__ = ["open_pidfd"]


def open_pidfd(pid: int) -> int | None:
    """A descriptor that becomes readable with the end of a process, the caller's to close; `None`: there is none to have.

    Some systems have no such call, and where Python knows it, an old kernel, gVisor or a seccomp profile refuses it.

    Raises:
        ProcessLookupError: There is no such process any more.
    """
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except OSError:
        return None
