"""What a worker prints, and whose it is."""

from __future__ import annotations

import asyncio
import contextvars
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from aiovec.pool.output import WorkerOutput


@pytest.fixture
def pipes() -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """The parent's ends of a worker's stdout and stderr, and the worker's."""
    (out, worker_out), (err, worker_err) = os.pipe2(os.O_NONBLOCK), os.pipe2(os.O_NONBLOCK)
    yield (out, err), (worker_out, worker_err)
    for fd in (out, worker_out, err, worker_err):
        os.close(fd)


async def test_lines_belong_to_no_task(monkeypatch: pytest.MonkeyPatch, pipes: Any) -> None:
    """Least of all to the one that started the worker: a stream that knows tasks, Jupyter's, shows them where it is."""
    asking: contextvars.ContextVar[str] = contextvars.ContextVar("asking", default="nobody")
    shown: list[tuple[str, str]] = []
    came = asyncio.Event()

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            shown.append((text, asking.get()))
            came.set()
            return len(text)

    monkeypatch.setattr(sys, "stdout", Stream())
    fds, (worker_out, _) = pipes
    output = WorkerOutput(fds, "worker")
    asking.set("who started it")
    output.watch(asyncio.get_running_loop())
    os.write(worker_out, b"a line\n")
    await came.wait()
    output.finish()
    assert shown == [("[worker] a line\n", "nobody")]


def closed_stream() -> io.TextIOBase:
    """As a capture is after its end."""
    stream = io.StringIO()
    stream.close()
    return stream


class WithoutReader(io.StringIO):
    """As stdout is in ``python script.py | head``."""

    def write(self, _text: str) -> int:
        raise BrokenPipeError


STREAMS: dict[str, Callable[[], io.TextIOBase]] = {
    "ASCII": lambda: io.TextIOWrapper(io.BytesIO(), "ascii"),
    "closed": closed_stream,
    "without a reader": WithoutReader,
}


@pytest.mark.parametrize("stream", STREAMS)
def test_what_cannot_be_shown_is_no_failure(stream: str, monkeypatch: pytest.MonkeyPatch, pipes: Any) -> None:
    """Whole lines and the rest of one: all is read, and what is kept for the obituary is kept."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, STREAMS[stream]())
    fds, worker_fds = pipes
    output = WorkerOutput(fds, "worker")
    for fd in worker_fds:
        os.write(fd, "naïve\nthe end é".encode())
    output.finish()
    assert output.stderr_tail == "naïve\nthe end é"
    assert repr(output) == "<WorkerOutput 'worker' open=[]>"


def test_who_writes_for_ever_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch, pipes: Any) -> None:
    """A process that left the worker's session may: of what it writes while we read, a bounded part is shown."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    fds, (worker_out, _) = pipes
    num_reads = 0

    def read(fd: int, nbytes: int, original: Callable[[int, int], bytes] = os.read) -> bytes:
        nonlocal num_reads
        num_reads += fd == fds[0]
        if fd == fds[0] and num_reads < 1000:
            os.write(worker_out, b"y\n" * 1000)
        return original(fd, nbytes)

    monkeypatch.setattr(os, "read", read)
    WorkerOutput(fds, "worker").finish()
    assert num_reads < 100
