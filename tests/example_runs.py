"""Examples as a user runs them, for the tests of them: as a process, to its end or to a Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
ENDS_WITHIN_SECONDS = 5.0


def run(tmp_path: Path, name: str, *arguments: str) -> str:
    """Runs an example to its end; what it printed."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    return ended.stdout


def interrupt(
    tmp_path: Path, moment: str, name: str, *arguments: str, within_seconds: float = ENDS_WITHIN_SECONDS
) -> list[str]:
    """Sends a Ctrl-C to an example that has printed something; the lines it printed after that, once it ended."""
    mark = f"AIOVEC_TEST_MARK={tmp_path}"
    with subprocess.Popen(
        [sys.executable, "-u", str(EXAMPLES / name), *arguments],
        cwd=tmp_path,
        env=os.environ | dict([mark.split("=")]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as example:
        too_late = threading.Timer(60, example.kill)
        too_late.start()
        try:
            assert example.stdout is not None
            assert any(moment in line for line in example.stdout)
            while not workers_of(mark):
                assert example.poll() is None
                time.sleep(0.005)
            begin = time.monotonic()
            example.send_signal(signal.SIGINT)
            printed, errors = example.communicate()
            seconds = time.monotonic() - begin
        finally:
            too_late.cancel()
            example.kill()
    assert workers_of(mark) == set()
    assert example.returncode == 130, errors
    assert errors == ""
    assert seconds < within_seconds
    return printed.splitlines()


def needs(*modules: str, extras: str = "examples") -> None:
    for module in modules:
        pytest.importorskip(module, reason=f"the example imports {module}: pip install 'aiovec[{extras}]'")


def workers_of(mark: str) -> set[int]:
    """Every worker process, whoever its parent is by now, that inherited a mark in its environment."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is not ours to look at
            marked = mark.encode() in (folder / "environ").read_bytes()
            if marked and b"aiovec.worker" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
    return found
