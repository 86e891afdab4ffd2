"""Frames: how requests and replies are cut out of a byte stream.

A frame is a header of 24 bytes and a payload of any length. The header bears the sequence number that a
reply repeats, so that no reply is ever matched to another request. Pure: no sockets here. `FrameReader`
hands out the memory to read into, so that a payload of 50 MB is received in place and never joined.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

__all__ = ["HEADER_NBYTES", "Frame", "FrameKind", "FrameReader", "pack_frame", "pack_header"]


class FrameKind(enum.IntEnum):
    """What a frame asks, or answers."""

    BUILD = 1  # payload: BuildRequest; all its envs are built, or the start has failed
    MAP = 2  # payload: MapRequest
    STEP = 3  # payload: nothing, or the rows of actions where they are not in the slab
    RESET = 4  # payload: ResetRequest
    CALL = 5  # payload: CallRequest
    SET_ATTR = 6  # payload: SetAttrRequest
    CLOSE = 7
    REPLY = 8  # payload: nothing, or a reply
    STEP_TOGETHER = 9  # like STEP, of all workers: replies wait in the slab, where they fit
    ALL_DONE = 10  # the answer of the last worker to end a STEP_TOGETHER, for all of them
    ECHO = 11  # answered by the same, behind whatever the worker had to answer before
    REBUILD = 12  # like BUILD, of a worker in place of one that died: an env that failed tells it when it is reset
    STEP_EACH = 13  # payload: see `exchange.step_each`; each of its envs answers by itself
    AWAKE = 14  # the answers that the parent waits for are in their slots: see `exchange.wanted`
    GROW = 15  # payload: the `exchange.slab.Strip` to map
    OBSERVE = 16  # write all last observations again; the answer to it is that to a batch


class Frame(NamedTuple):
    """One request or reply.

    Attributes:
        kind: A `FrameKind`, as a plain integer.
        seq: The number of the request; its reply bears the same.
        buffer: Which buffer of the slab the request is about.
        payload: Pickled bytes, often empty; the very object where no bytes travel.
        group: Of a step: which group of envs; see `exchange.groups`.
    """

    kind: int
    seq: int
    buffer: int
    payload: Any
    group: int = 0


_HEADER = struct.Struct("<QQHHI")  # payload's nbytes, seq, kind, group, buffer
HEADER_NBYTES = _HEADER.size
_CHUNK_NBYTES = 1 << 16


def pack_header(kind: int, seq: int, buffer: int = 0, payload_nbytes: int = 0, group: int = 0) -> bytes:
    """The header of a frame; a frame without a payload is its header."""
    return _HEADER.pack(payload_nbytes, seq, kind, group, buffer)


def pack_frame(kind: int, seq: int, buffer: int = 0, payload: bytes = b"", group: int = 0) -> bytes:
    """A whole frame as bytes."""
    return _HEADER.pack(len(payload), seq, kind, group, buffer) + payload


class FrameReader:
    """Cuts frames out of a stream, whichever way the stream was cut.

    Receive into `space()`, tell `received(n)`, then take what is complete from `frames()`. The payloads are
    the reader's to give: a small one is a copy, a large one the buffer that it was received into.
    """

    def __init__(self) -> None:
        self._chunk = bytearray(_CHUNK_NBYTES)
        self._view = memoryview(self._chunk)
        self._filled = 0  # bytes of the chunk that hold something not yet taken
        self._large: bytearray | None = None  # the payload that did not fit into the chunk
        self._large_filled = 0
        self._large_header = (0, 0, 0, 0)

    def __repr__(self) -> str:
        return f"<FrameReader partial={self.partial}>"

    @property
    def partial(self) -> bool:
        """Whether the stream so far ends inside a frame."""
        return self._filled > 0 or self._large is not None

    def space(self) -> memoryview:
        """Where the next bytes of the stream go; never empty."""
        if self._large is not None:
            return memoryview(self._large)[self._large_filled :]
        return self._view[self._filled :]

    def received(self, nbytes: int) -> None:
        """Tells that `nbytes` were written into `space()`."""
        if self._large is not None:
            self._large_filled += nbytes
        else:
            self._filled += nbytes

    def frames(self) -> Iterable[Frame]:
        """The frames that are complete, each once. Run it to its end before the next `space()`."""
        if self._filled == HEADER_NBYTES and self._large is None:  # the step path: a reply with nothing to say
            nbytes, seq, kind, group, buffer = _HEADER.unpack_from(self._chunk)
            if not nbytes:
                self._filled = 0
                return (Frame(kind, seq, buffer, b"", group),)
        return self._cut()

    def _cut(self) -> Iterator[Frame]:
        if self._large is not None:
            if self._large_filled == len(self._large):
                kind, seq, group, buffer = self._large_header
                payload = memoryview(self._large)
                self._large = None
                yield Frame(kind, seq, buffer, payload, group)
            return
        start = 0
        while self._filled - start >= HEADER_NBYTES:
            nbytes, seq, kind, group, buffer = _HEADER.unpack_from(self._chunk, start)
            body = start + HEADER_NBYTES
            end = body + nbytes
            if end <= self._filled:
                start = end
                yield Frame(kind, seq, buffer, bytes(self._view[body:end]) if nbytes else b"", group)
                continue
            if HEADER_NBYTES + nbytes > _CHUNK_NBYTES:
                self._large = bytearray(nbytes)
                self._large_header = (kind, seq, group, buffer)
                self._large_filled = self._filled - body
                self._large[: self._large_filled] = self._view[body : self._filled]
                start = self._filled
            break
        if start:
            rest = self._filled - start
            self._view[:rest] = bytes(self._view[start : self._filled])
            self._filled = rest
