"""An event loop that runs in the calling thread, and only while a call waits there.

What was asked of workers goes on when it does not run: their answers lie in sockets and in shared memory until it does.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` makes enumerations of what it gives: 25 µs in each wait
import asyncio
import contextvars
import os
import selectors
import signal
import threading
from collections.abc import Callable, Coroutine
from types import FrameType, TracebackType
from typing import Any, TypeVar

__all__ = ["PrivateLoop"]

_Result = TypeVar("_Result")

_SIGINT = int(signal.SIGINT)


class _OwnSelector(selectors.DefaultSelector):
    """Of one process. A fork shares its epoll: where the collector closes the loop there, it is to take nothing off ours.

    (`poll`, which shares nothing, takes a step of 64 CartPole 10 µs more.)
    """

    def __init__(self) -> None:
        super().__init__()
        self._owner_pid = os.getpid()

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return super().unregister(fileobj) if os.getpid() == self._owner_pid else self.get_key(fileobj)


class PrivateLoop:
    """One loop, run by turns from code that has none.

    A Ctrl-C ends a wait between two callbacks of the loop, never within one, and comes through only at the end of what is
    done in `held_back`, so that nothing is left half done; another one before that is Python's own.
    """

    def __init__(self) -> None:
        # asyncio's own: in the turn that ends a wait for time it has looked at every descriptor, also after 0 seconds.
        self._runner = asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(_OwnSelector()))
        self._loop = self._runner.get_loop()
        self._context = contextvars.copy_context()
        self._is_late = False
        self._is_interrupted = False

    def __repr__(self) -> str:
        return f"<PrivateLoop running={self._loop.is_running()}>"

    def wait(self, future: asyncio.Future[Any], timeout: float | None = None) -> bool:
        """Runs the loop until a future of it is done.

        Args:
            future: Anything that is of this loop.
            timeout: Seconds; `None`: no limit. What has come by then is seen, also with 0.

        Returns:
            Whether it is done.

        Raises:
            KeyboardInterrupt: A Ctrl-C; what the future stands for goes on.
        """
        self._is_late = False
        with self.held_back():
            timer = None if timeout is None else self._loop.call_later(max(timeout, 0.0), self._too_late)
            future.add_done_callback(self._done, context=self._context)
            try:
                while not (future.done() or self._is_late or self._is_interrupted):
                    self._loop.run_forever()
            finally:
                if not future.done():
                    future.remove_done_callback(self._done)
                if timer is not None:
                    timer.cancel()
            self._raise_interrupt()
        return future.done()

    def held_back(self) -> _HeldBack:
        """A block, `with` which a Ctrl-C waits for the next `wait`, or for the end of the block."""
        return _HeldBack(self._interrupt, self._begin_block, self._raise_interrupt)

    def run(self, coroutine: Coroutine[Any, Any, _Result]) -> _Result:
        """Runs a coroutine to its end; a Ctrl-C cancels it, and is raised when it has ended."""
        task = self._loop.create_task(coroutine)
        try:
            self.wait(task)
        except KeyboardInterrupt:
            task.cancel()
            self.wait(task)
            if not task.cancelled():
                task.exception()  # the Ctrl-C goes first
            raise
        return task.result()

    def call_later(self, seconds: float, function: Callable[[], object]) -> None:
        """Calls a function after so many seconds, if the loop runs then."""
        self._loop.call_later(seconds, function)

    def close(self) -> None:
        """Closes the loop, for good, when what is still on it has ended."""
        if asyncio._get_running_loop() is None:  # noqa: SLF001  get_running_loop, without its exception
            self._runner.close()
        else:  # the collector found its owner in the middle of another loop
            self.close_at_once()

    def close_at_once(self) -> None:
        """Closes the loop without another turn of it."""
        self._loop.close()

    def _done(self, _future: asyncio.Future[Any]) -> None:
        self._loop.stop()

    def _too_late(self) -> None:
        self._is_late = True
        self._loop.stop()

    def _begin_block(self) -> None:
        self._is_interrupted = False

    def _raise_interrupt(self) -> None:
        if self._is_interrupted:
            self._is_interrupted = False
            raise KeyboardInterrupt

    def _interrupt(self, _signal_number: int, _frame: FrameType | None) -> None:
        if self._is_interrupted:
            self._is_interrupted = False
            _signal.signal(_SIGINT, signal.default_int_handler)  # it may leave the block by way of this very exception
            raise KeyboardInterrupt
        self._is_interrupted = True
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop_interrupted)

    def _stop_interrupted(self) -> None:
        if self._is_interrupted:
            self._loop.stop()


class _HeldBack:
    """See `PrivateLoop.held_back`; within another one, in other threads and where the handler is the user's, without effect."""

    __slots__ = ("_begin", "_handles_signal", "_interrupt", "_raise_interrupt")

    def __init__(
        self,
        interrupt: Callable[[int, FrameType | None], None],
        begin: Callable[[], None],
        raise_interrupt: Callable[[], None],
    ) -> None:
        self._interrupt = interrupt
        self._begin = begin
        self._raise_interrupt = raise_interrupt
        self._handles_signal = False

    def __enter__(self) -> None:
        if (
            threading.current_thread() is threading.main_thread()
            and _signal.getsignal(_SIGINT) is signal.default_int_handler
        ):
            self._handles_signal = True
            self._begin()
            _signal.signal(_SIGINT, self._interrupt)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._handles_signal:
            _signal.signal(_SIGINT, signal.default_int_handler)
            self._raise_interrupt()
