"""The selector of the async envs' loop: what epoll tells, with whichever timeout."""

from __future__ import annotations

import os
import selectors
from collections.abc import Iterator

import pytest

from aiovec.worker import async_lane
from aiovec.worker.async_lane import _FineSelector


@pytest.fixture(params=[1024, 0], ids=["fine", "beyond what select() takes"])
def selector(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[_FineSelector]:
    monkeypatch.setattr(async_lane, "_FD_SETSIZE", request.param)
    with _FineSelector() as selector:
        yield selector


@pytest.mark.parametrize("timeout", [None, -1, 0, 0.0002, 0.05, 1])
def test_what_is_ready_is_told_at_once(selector: _FineSelector, timeout: float | None) -> None:
    reader, writer = os.pipe()
    try:
        key = selector.register(reader, selectors.EVENT_READ)
        os.write(writer, b".")
        assert selector.select(timeout) == [(key, selectors.EVENT_READ)]
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("timeout", [-1, 0, 0.0002, 0.05, 0.11])
def test_nothing_is_told_when_the_time_is_over(selector: _FineSelector, timeout: float) -> None:
    reader, writer = os.pipe()
    try:
        selector.register(reader, selectors.EVENT_READ)
        assert selector.select(timeout) == []
    finally:
        os.close(reader)
        os.close(writer)
