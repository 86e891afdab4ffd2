"""What a worker prints, and whose it is."""

from __future__ import annotations

import asyncio
import contextvars
import io
import os
import sys

import pytest

from aiovec.pool.output import WorkerOutput


async def test_lines_belong_to_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
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
    (out, worker_out), (err, worker_err) = os.pipe2(os.O_NONBLOCK), os.pipe2(os.O_NONBLOCK)
    output = WorkerOutput((out, err), "worker")
    asking.set("who started it")
    output.watch(asyncio.get_running_loop())
    os.write(worker_out, b"a line\n")
    await came.wait()
    output.finish()
    for fd in (out, worker_out, err, worker_err):
        os.close(fd)
    assert shown == [("[worker] a line\n", "nobody")]
