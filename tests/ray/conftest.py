"""What the tests of workers on Ray share: each has a Ray, or a cluster, of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from aiovec.testing.observing import held_by_process

GONE_WITHIN_SECONDS = 15.0
KINDS = ("children", "shared memory")  # descriptors of Ray's own connections come and go


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """One event loop: Ray's start takes seconds, and ``--ray`` runs the other tests on both."""
    return "asyncio", {}


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fails a test after which there is a new child, a process of Ray for one, or a file in /dev/shm."""
    before = held_by_process()
    yield
    deadline = time.monotonic() + GONE_WITHIN_SECONDS
    while True:
        now = held_by_process()
        left = {kind: sorted(now[kind] - before[kind]) for kind in KINDS if kind in now and now[kind] - before[kind]}
        if not left:
            return
        if time.monotonic() > deadline:
            pytest.fail(f"left behind: {left}")
        time.sleep(0.05)
