"""A Jupyter kernel, and what each cell that it runs shows."""

from __future__ import annotations

import json
import queue
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import KernelManager

NAME = "of-the-tests"
BOUND_SECONDS = 30.0
"""Generous: nothing here takes a tenth of it."""

_COLOURS = re.compile(r"\x1b\[[\d;]*m")


def make_kernelspec(jupyter_path: Path) -> None:
    """Describes a kernel of the running interpreter, as `ipykernel install` would."""
    folder = jupyter_path / "kernels" / NAME
    folder.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (folder / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": NAME, "language": "python"}))


@dataclass
class Cell:
    """What a cell has shown so far."""

    stdout: str = ""
    stderr: str = ""
    data: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""  # its traceback, as it is shown, but for the colours
    ename: str = ""
    is_idle: bool = False

    @property
    def text(self) -> str:
        """The text of the last thing that it displayed."""
        text: str = self.data[-1]["text/plain"]
        return text

    def take(self, kind: str, content: dict[str, Any]) -> None:
        if kind == "stream":
            setattr(self, content["name"], getattr(self, content["name"]) + content["text"])
        elif kind in ("execute_result", "display_data"):
            self.data.append(content["data"])
        elif kind == "error":
            self.ename = content["ename"]
            self.error = _COLOURS.sub("", "\n".join(content["traceback"]))
        elif kind == "status":
            self.is_idle = content["execution_state"] == "idle"


class Kernel:
    """A kernel that is started and ended by `with`."""

    def __init__(self) -> None:
        self.manager = KernelManager(kernel_name=NAME)

    def __enter__(self) -> Self:
        self.manager.start_kernel()
        self._connect()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def send(self, code: str) -> Cell:
        """Has the kernel run a cell, and does not wait for it."""
        cell = Cell()
        self._cells[self._client.execute(code)] = cell
        return cell

    def run(self, code: str) -> Cell:
        """Runs a cell to its end; what it has shown by then, and whatever comes later."""
        cell = self.send(code)
        self.wait_until(lambda: cell.is_idle)
        return cell

    def result_of(self, code: str) -> str:
        """Runs a cell that must not fail; the text of its last expression."""
        cell = self.run(code)
        assert not cell.error, cell.error
        return cell.text

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Takes what cells show until that is true."""
        deadline = time.monotonic() + BOUND_SECONDS
        while not condition():
            try:
                message = self._client.get_iopub_msg(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"not in {BOUND_SECONDS} s; what cells showed: {self._cells}") from None
            cell = self._cells.get(message["parent_header"].get("msg_id"))
            if cell is not None:
                cell.take(message["msg_type"], message["content"])

    @property
    def pid(self) -> int:
        """Of the kernel's process."""
        pid: int = self.manager.provisioner.pid
        return pid

    def interrupt(self) -> None:
        """Sends a SIGINT to the kernel and what is in its process group, as the stop button does."""
        self.manager.interrupt_kernel()

    def restart(self, *, now: bool) -> None:
        self._client.stop_channels()
        self.manager.restart_kernel(now=now)
        self._connect()

    def _connect(self) -> None:
        self._cells: dict[str, Cell] = {}
        self._client: BlockingKernelClient = self.manager.client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=BOUND_SECONDS)
