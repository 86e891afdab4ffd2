"""The channel to one worker on the loop: frames out, frames in, nothing else. The owner of the socket.

Neither side ever waits for the other to read: what the socket does not take is kept and written when it does,
and reading goes on meanwhile, so requests and replies of any size cannot block each other.

`add_reader` on a socket, which asyncio and uvloop both have, and not a transport with a protocol: the latter
costs some 2 µs a reply, closes only in a later turn of the loop, and cannot close at all, nor end without a
warning of its own, once the loop is closed.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable

from aiovec.exchange.frames import Frame, FrameReader

__all__ = ["Channel"]


class Channel:
    """One worker's frames.

    Args:
        connection: A non-blocking stream socket; the channel owns it.
        received: Called on the loop with each frame.
        resume: Called on the loop, last, when what one read gave has been received.
        lost: Called on the loop, once, when the worker closed its end or the connection broke.
    """

    def __init__(
        self,
        connection: socket.socket,
        received: Callable[[Frame], None],
        resume: Callable[[], None],
        lost: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._received = received
        self._resume = resume
        self._lost = lost
        self._reader = FrameReader()
        self._unsent: deque[memoryview] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        return f"<Channel open={self._loop is not None} unsent={len(self._unsent)} {self._reader!r}>"

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Puts the socket on the loop."""
        self._loop = loop
        loop.add_reader(self._connection.fileno(), self._readable)

    def write(self, data: bytes) -> None:
        """Sends a frame, now or as soon as the socket takes it; nothing once the channel is closed."""
        if self._loop is None:
            return
        if self._unsent:
            self._unsent.append(memoryview(data))
            return
        try:
            sent = self._connection.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:  # the worker is gone: reading, or its process, will tell
            return
        if sent < len(data):
            self._unsent.append(memoryview(data)[sent:])
            self._loop.add_writer(self._connection.fileno(), self._writable)

    def drain(self) -> None:
        """Takes all that the worker has written by now."""
        while self._loop is not None and self._read():
            pass

    def close(self) -> None:
        """Closes the socket; what was not yet written is dropped, nothing is called any more."""
        self._stop()
        self._connection.close()

    def _readable(self) -> None:
        self._read()
        self._resume()

    def _read(self) -> bool:
        """Takes what one read gives; false where there is nothing now, or nothing more to come."""
        try:
            nbytes = self._connection.recv_into(self._reader.space())
        except BlockingIOError:
            return False
        except OSError:
            nbytes = 0
        if not nbytes:
            self._stop()
            self._lost()
            return False
        self._reader.received(nbytes)
        for frame in self._reader.frames():
            self._received(frame)
        return True

    def _writable(self) -> None:
        while self._unsent:
            try:
                sent = self._connection.send(self._unsent[0])
            except BlockingIOError:
                return
            except OSError:
                self._unsent.clear()
                break
            rest = self._unsent.popleft()[sent:]
            if rest:
                self._unsent.appendleft(rest)
                return
        if self._loop is not None:
            self._loop.remove_writer(self._connection.fileno())

    def _stop(self) -> None:
        loop, self._loop = self._loop, None
        self._unsent.clear()
        if loop is not None and not loop.is_closed():
            loop.remove_reader(self._connection.fileno())
            loop.remove_writer(self._connection.fileno())
