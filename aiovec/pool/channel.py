"""The channel to one worker on the loop: frames out, frames in, nothing else.

A `BufferedProtocol` over one end of a socketpair, which every event loop has. Neither side ever waits for
the other to read: writing is the transport's, which buffers, and reading goes on meanwhile, so two requests
and replies of any size cannot block each other.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import cast

from aiovec.exchange.frames import Frame, FrameReader

__all__ = ["Channel"]


class Channel(asyncio.BufferedProtocol):
    """One worker's frames.

    Args:
        connection: A non-blocking stream socket; the channel owns it.
        received: Called on the loop with each frame.
        lost: Called on the loop, once, when the worker closed its end or the connection broke.
    """

    def __init__(self, connection: socket.socket, received: Callable[[Frame], None], lost: Callable[[], None]) -> None:
        self._connection = connection
        self._received = received
        self._lost = lost
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self.write: Callable[[bytes], None] = _not_connected

    def __repr__(self) -> str:
        return f"<Channel open={self._transport is not None} {self._reader!r}>"

    async def connect(self) -> None:
        """Puts the socket on the running loop; from now on the transport owns it."""
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: self, sock=self._connection)

    def drain(self) -> None:
        """Takes what a worker that has ended had still written, so that no finished reply is lost."""
        if self._transport is None:
            return
        self._transport.pause_reading()
        try:
            while received := self._connection.recv_into(self._reader.space()):
                self.buffer_updated(received)
        except OSError:  # nothing more, or reset by its end
            return

    def close(self) -> None:
        """Ends the connection now; what was not yet written is dropped, `lost` is not called."""
        self._lost = self._received = _ignored
        if self._transport is not None and not self._transport.is_closing():
            self._transport.abort()
        elif self._transport is None:
            self._connection.close()

    def close_without_loop(self) -> None:
        """The same once the loop is closed, when a transport can do nothing any more."""
        self._lost = self._received = _ignored
        self._connection.close()

    # ---- asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass of it
        self.write = self._transport.write

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        return self._reader.space()

    def buffer_updated(self, nbytes: int) -> None:
        self._reader.received(nbytes)
        for frame in self._reader.frames():
            self._received(frame)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._transport = None
        self.write = _not_connected
        self._lost()


def _not_connected(_data: bytes) -> None:
    """A request to a worker that is gone; its end is told by the process itself."""


def _ignored(*_args: object) -> None:
    """After `close` nobody asks any more."""
