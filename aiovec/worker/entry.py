"""How a worker process begins: as a fresh interpreter, or as what `multiprocessing` started.

Before anything heavy is imported it sees to it that this process, and what it will start, ends with the
parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import os
import signal
import socket
import sys

from aiovec.worker.lifeline import hold_lifeline

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

__all__ = ["THREAD_LIMITS", "keep_freed_memory", "run_forked", "run_interpreter"]

# Read by OpenMP, OpenBLAS, MKL, Accelerate and numexpr when they are loaded. With one worker a core, more
# than one thread each only takes turns.
THREAD_LIMITS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


def run_interpreter() -> None:
    """The whole life of a worker that is a fresh interpreter; its arguments are numbers in ``sys.argv``."""
    connection_fd, lifeline_fd, *shared_fds, parent_pid, look_again = map(int, sys.argv[1:10])
    with socket.socket(fileno=os.dup(connection_fd)) as connection:
        connection.setblocking(True)
        path, sys.argv[:] = _receive_texts(connection), _receive_texts(connection)  # as `multiprocessing` does
    # What the parent has imported by now came by its path of that time: a signal.py that lies where the user
    # put something on sys.path since must not shadow the standard library here. So that path comes last at
    # first, and as the parent has it once all that a worker itself needs is imported.
    sys.path += [entry for entry in path if entry not in sys.path]
    importlib.import_module("aiovec.worker.serve")
    sys.path[:] = path
    _work(connection_fd, lifeline_fd, shared_fds, parent_pid, bool(look_again))
    # Threads that an env left running, and the interpreter's own tear-down, must not keep the parent waiting.
    os._exit(0)


def run_forked(fds: tuple[int, ...], parent_pid: int, look_again: bool, foreign_fds: tuple[int, ...]) -> None:
    """The whole life of a worker that `multiprocessing` started.

    Args:
        fds: Connection, lifeline, what is shared (see `worker.serve.SharedFiles`), stdout, stderr.
        parent_pid: The process to end with.
        look_again: See `aiovec.worker.serve`.
        foreign_fds: What a fork copied of the parent's ends, this worker's and others': kept open here, they
            would hide the parent's end from all of them.
    """
    signal.set_wakeup_fd(-1)  # a forked event loop would be woken by our signals
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for fd in foreign_fds:
        os.close(fd)
    connection_fd, lifeline_fd, *shared_fds, stdout_fd, stderr_fd = fds
    sys.stdout.flush()
    sys.stderr.flush()
    for fd, standard in ((stdout_fd, 1), (stderr_fd, 2)):
        os.dup2(fd, standard)
        os.close(fd)
    # In a notebook, or under pytest, the parent's stdout is no file: a fork has a copy of that.
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    _work(connection_fd, lifeline_fd, shared_fds, parent_pid, look_again)
    os._exit(0)


def _work(connection_fd: int, lifeline_fd: int, shared_fds: list[int], parent_pid: int, look_again: bool) -> None:
    hold_lifeline(lifeline_fd, parent_pid)
    for variable in THREAD_LIMITS:
        os.environ.setdefault(variable, "1")
    sys.breakpointhook = _no_debugger
    for stream in (sys.stdout, sys.stderr):  # what an env prints is shown when it is printed
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    keep_freed_memory()
    from aiovec.worker.serve import SharedFiles, serve  # noqa: PLC0415  heavy: numpy, gymnasium

    # The parent may be gone, or have closed its end: then there is nobody left to tell.
    with socket.socket(fileno=connection_fd) as connection, contextlib.suppress(ConnectionError):
        connection.setblocking(True)
        serve(connection, SharedFiles(*shared_fds), look_again)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()


def keep_freed_memory() -> None:
    """Has glibc keep what is freed, up to 64 MB, instead of giving it back and faulting it in again each step.

    An image observation is above its thresholds: 5 Breakout frames a step are 125 page faults otherwise.
    """
    with contextlib.suppress(OSError, AttributeError):  # another libc
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)


def _no_debugger(*_args: object, **_kwargs: object) -> None:
    raise RuntimeError("breakpoint() in a worker has no terminal: use `num_workers=0` to debug an env")


def _receive_texts(connection: socket.socket) -> list[str]:
    nbytes = int.from_bytes(_receive(connection, 4), "little")
    return _receive(connection, nbytes).decode(errors="surrogateescape").split("\0")


def _receive(connection: socket.socket, nbytes: int) -> bytes:
    received = bytearray()
    while len(received) < nbytes:
        if not (chunk := connection.recv(nbytes - len(received))):
            raise SystemExit(0)  # the parent gave up
        received += chunk
    return bytes(received)
