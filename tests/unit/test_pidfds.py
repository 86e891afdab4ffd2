"""Pidfds, and their absence."""

from __future__ import annotations

import errno
import os
import select
import subprocess
import sys

import pytest

from aiovec.exchange.pidfds import open_pidfd


def test_it_tells_of_the_end() -> None:
    """Readable from then on, although the process is not reaped."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        pidfd = open_pidfd(process.pid)
        assert pidfd is not None
        assert not select.select([pidfd], [], [], 0)[0]
        process.kill()
        assert select.select([pidfd], [], [], 20)[0]
        os.close(pidfd)
    with pytest.raises(ProcessLookupError):
        open_pidfd(process.pid)


@pytest.mark.parametrize("why", [errno.ENOSYS, errno.EPERM, errno.EMFILE, None], ids=str)
def test_there_is_none_to_have(why: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, or a system that has not the call."""

    def refused(_pid: int) -> int:
        assert why is not None
        raise OSError(why, os.strerror(why))

    monkeypatch.setattr(os, "pidfd_open", refused)
    if why is None:
        monkeypatch.delattr(os, "pidfd_open")
    assert open_pidfd(os.getpid()) is None
