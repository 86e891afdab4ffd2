"""One worker process's life: started, watched, signalled, reaped. The owner of the child.

A worker is a fresh interpreter by default, or what `multiprocessing` starts. Either way it leads a session
of its own, so a terminal's Ctrl-C does not reach it, and its session holds whatever its envs start.
That is killed before its leader is reaped: afterwards the number may belong to someone else.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import importlib
import multiprocessing
import os
import signal
import site
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import aiovec
from aiovec.exchange.black_box import BlackBox
from aiovec.exchange.pidfds import open_pidfd
from aiovec.worker.entry import THREAD_LIMITS, run_forked

__all__ = ["WorkerFiles", "WorkerProcess"]

# A worker that imports mpi4py must not think that it is a rank of the parent's job; the prefixes are those of
# gymnasium.vector.utils.clear_mpi_env_vars.
_MPI_PREFIXES = ("OMPI_", "PMI_")
_LARGEST_ARGV = 1 << 15  # what goes into a socket before anybody reads


@dataclass
class WorkerFiles:
    """The descriptors between parent and worker. Each side closes the other's.

    Attributes:
        connection: The parent's end of the socket; the channel owns it.
        worker_connection: The worker's end.
        lifeline: The parent's end of a pipe that nobody reads or writes: its end ends the worker.
        worker_lifeline: The worker's end.
        black_box: What the worker leaves when it dies; both have it.
        output: The parent's ends of the pipes behind the worker's stdout and stderr.
        worker_output: The worker's ends.
    """

    connection: socket.socket
    worker_connection: socket.socket
    lifeline: int
    worker_lifeline: int
    black_box: BlackBox
    output: tuple[int, int]
    worker_output: tuple[int, int]

    @classmethod
    def open(cls, num_envs: int) -> WorkerFiles:
        """Opens all of them, or none."""
        with contextlib.ExitStack() as opened:
            connection, worker_connection = socket.socketpair()
            opened.callback(connection.close)
            opened.callback(worker_connection.close)
            fds: list[int] = []
            for _ in range(3):
                for fd in os.pipe():
                    opened.callback(os.close, fd)
                    fds.append(fd)
            black_box = BlackBox(num_envs)
            opened.pop_all()
        connection.setblocking(False)
        os.set_blocking(fds[2], False)
        os.set_blocking(fds[4], False)
        return cls(connection, worker_connection, fds[1], fds[0], black_box, (fds[2], fds[4]), (fds[3], fds[5]))

    def parent_fds(self) -> tuple[int, ...]:
        """Those that no worker may hold."""
        return (self.connection.fileno(), self.lifeline, *self.output)

    def close_worker_ends(self) -> None:
        """After the start: only the worker holds them then."""
        self.worker_connection.close()
        for fd in (self.worker_lifeline, *self.worker_output):
            os.close(fd)


# The workers of all vectors of this process: to be ended at its exit, and a forked worker must not keep copies
# of our ends, or it would hide our end from the others.
_alive: set[WorkerProcess] = set()


class WorkerProcess:
    """A worker process.

    Args:
        context: `None` for a fresh interpreter, else the name of a multiprocessing start method.
        num_envs: How many envs it will hold.
        shared_fds: Slab, and the workers' ends of tally and `Wanted`; the process inherits them, the caller goes on
            owning them.
        look_again: See `aiovec.worker.serve`.
        name: Shown by `multiprocessing`.
    """

    def __init__(
        self, context: str | None, num_envs: int, shared_fds: tuple[int, ...], look_again: bool, name: str
    ) -> None:
        self.files: WorkerFiles = WorkerFiles.open(num_envs)
        self._reaped = False
        self._owner_pid = os.getpid()
        self._exitcode: int | None = None
        self._unwatch: Callable[[], None] = lambda: None
        try:
            if context is None:
                self._child: _Child = _start_interpreter(self.files, shared_fds, look_again)
            else:
                self._child = _start_multiprocessing(self.files, shared_fds, look_again, context, name)
        except BaseException:
            self.files.close_worker_ends()
            self.files.connection.close()
            self._close_files()
            raise
        self.files.close_worker_ends()
        self.pid: int = self._child.pid
        _alive.add(self)

    def __repr__(self) -> str:
        return f"<WorkerProcess pid={self.pid} reaped={self._reaped}>"

    def watch(self, loop: asyncio.AbstractEventLoop, ended: Callable[[], None]) -> None:
        """Calls `ended` on the loop, once, when the process itself has ended, whoever holds its socket open."""
        pidfd = open_pidfd(self.pid)
        if pidfd is None:
            self._watch_in_thread(loop, ended)
            return

        def unwatch() -> None:
            if not loop.is_closed():
                loop.remove_reader(pidfd)
            os.close(pidfd)
            self._unwatch = lambda: None

        def noticed() -> None:
            unwatch()
            ended()

        self._unwatch = unwatch
        loop.add_reader(pidfd, noticed)

    def _watch_in_thread(self, loop: asyncio.AbstractEventLoop, ended: Callable[[], None]) -> None:
        def noticed() -> None:
            if not self._reaped:
                ended()

        def wait() -> None:
            try:
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)  # it is `reap` that frees its number
            except (AttributeError, ChildProcessError):  # macOS before Python 3.13; a child of the fork server
                self._child.wait()
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
                loop.call_soon_threadsafe(noticed)

        threading.Thread(target=wait, name=f"aiovec-wait-{self.pid}", daemon=True).start()

    def signal(self, number: int) -> None:
        """Sends a signal to the worker and all that it started; nothing once it is reaped."""
        if self._is_ours():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def ask_stack(self) -> None:
        """Has the worker write its Python stack into its black box, also if it was stopped."""
        if self._is_ours():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGUSR1)
                os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL to the whole group, and to what left it within the session, at once."""
        self.signal(signal.SIGKILL)
        self._kill_session()
        # A worker that has not come to its setsid() yet leads no group.
        if self._is_ours():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def _kill_session(self) -> None:
        """What an env started in a process group of its own, as a shell does with its jobs; 1 µs a process to look."""
        if not (self._is_ours() and Path("/proc/self").exists()):
            return
        # Without a descriptor left /proc cannot be read: what left the group may live on then, but the worker itself must
        # be ended and its death told all the same.
        with contextlib.suppress(OSError):
            for pid in [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    if os.getsid(pid) != self.pid or pid == self.pid:
                        continue
                    pidfd = open_pidfd(pid)
                    if pidfd is None:  # by its number alone it could be another that is hit
                        return
                    try:
                        if os.getsid(pid) == self.pid:  # still: the number may have been given to another meanwhile
                            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    finally:
                        os.close(pidfd)

    def reap(self) -> int | None:
        """Takes the exit code of a process that ended or was killed, and closes all but the connection.

        Returns:
            As in `multiprocessing.Process.exitcode`: negative for a signal.
        """
        if self._is_ours():
            self.signal(signal.SIGKILL)  # the group first: what the worker started must not outlive it
            self._kill_session()
            self._exitcode = self._child.wait()
            self._reaped = True
            self._unwatch()
            self._close_files()
            _alive.discard(self)
        return self._exitcode

    @property
    def is_reaped(self) -> bool:
        """Whether it has ended and everything is closed."""
        return self._reaped

    def _is_ours(self) -> bool:
        """Not reaped, and this is no fork of the process that started it."""
        return not self._reaped and os.getpid() == self._owner_pid

    def _close_files(self) -> None:
        for fd in (self.files.lifeline, *self.files.output):
            os.close(fd)
        self.files.black_box.close()


@dataclass
class _Child:
    pid: int
    wait: Callable[[], int | None]  # blocks until it has ended: an instant for one that was killed


def _start_interpreter(files: WorkerFiles, shared_fds: tuple[int, ...], look_again: bool) -> _Child:
    fds = (files.worker_connection.fileno(), files.worker_lifeline, *shared_fds, files.black_box.fd)
    root = str(Path(aiovec.__file__).parent.parent)
    if root in (*site.getsitepackages(), site.getusersitepackages()):
        entry = ["-m", "aiovec.worker"]
    else:  # a source tree: the worker must have this very aiovec, and nothing else from beside it
        run = "import aiovec; del sys.path[0]; runpy.run_module('aiovec.worker', None, '__main__')"
        entry = ["-c", f"import importlib, os, runpy, sys, typing; sys.path.insert(0, {root!r}); {run}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(_MPI_PREFIXES)}
    for variable in THREAD_LIMITS:
        environment.setdefault(variable, "1")
    environment["AIOVEC_WORKER"] = "1"  # see aiovec/__init__.py
    process = subprocess.Popen(  # noqa: S603  our own interpreter
        [
            sys.executable,
            *_interpreter_flags(),
            "-P",
            *entry,
            *map(str, (*fds, os.getpid(), int(look_again))),
        ],
        stdin=subprocess.DEVNULL,
        stdout=files.worker_output[0],
        stderr=files.worker_output[1],
        pass_fds=fds,
        env=environment,
        start_new_session=True,
    )
    for texts in (sys.path, sys.argv if sum(map(len, sys.argv)) < _LARGEST_ARGV else sys.argv[:1]):
        data = "\0".join(texts).encode(errors="surrogateescape")
        files.connection.sendall(len(data).to_bytes(4, "little") + data)  # a few KB into an empty socket
    return _Child(process.pid, process.wait)


def _interpreter_flags() -> list[str]:
    """The flags of this interpreter that are not in its environment, for another one."""
    # Private, but what multiprocessing itself uses for the same purpose, in every version that we support.
    return list(subprocess._args_from_interpreter_flags())  # type: ignore[attr-defined]  # noqa: SLF001


def _start_multiprocessing(
    files: WorkerFiles, shared_fds: tuple[int, ...], look_again: bool, context: str, name: str
) -> _Child:
    start: Any = multiprocessing.get_context(context)
    ours = (files.worker_connection.fileno(), files.worker_lifeline, *shared_fds, files.black_box.fd)
    fds = _Handover((*ours, *files.worker_output))
    foreign: tuple[int, ...] = ()
    if context == "fork":
        foreign = tuple(fd for held in (*(process.files for process in _alive), files) for fd in held.parent_fds())
    # No daemon: an env may have children of its own. Then multiprocessing would join it at exit; `_end_all`
    # is registered later, and so runs before.
    process = start.Process(target=_run_forked, args=(fds, os.getpid(), look_again, foreign), name=name, daemon=False)
    process.start()

    waiting = threading.Lock()  # without pidfds a thread waits, too
    exitcode: int | None = None

    def wait() -> int | None:
        nonlocal exitcode
        with waiting, contextlib.suppress(ValueError):  # it is closed: somebody has waited for it before
            process.join()
            exitcode = process.exitcode
            process.close()
        return exitcode

    return _Child(process.pid, wait)


def _run_forked(fds: _Handover, parent_pid: int, look_again: bool, foreign: tuple[int, ...]) -> None:
    run_forked(fds.fds, parent_pid, look_again, foreign)


class _Handover:
    """Descriptors on their way to a process that multiprocessing starts, by whichever means that has."""

    def __init__(self, fds: tuple[int, ...]) -> None:
        self.fds = fds

    def __getstate__(self) -> list[Any]:
        return [reduction.DupFd(fd) for fd in self.fds]

    def __setstate__(self, duplicates: list[Any]) -> None:
        self.fds = tuple(duplicate.detach() for duplicate in duplicates)


def _end_all() -> None:
    """At the interpreter's exit: whatever nobody closed."""
    for process in list(_alive):
        process.kill()
        process.reap()


# Functions run at exit in reverse order: multiprocessing's, which joins its children, must be registered first.
importlib.import_module("multiprocessing.util")
atexit.register(_end_all)
