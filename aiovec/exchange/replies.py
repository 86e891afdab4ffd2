"""Replies as bytes: nothing where there is nothing to say, packed infos, or a pickle.

Where envs have failed, which ones stands before the pickle: a parent may have to act at once, on its loop, where
nothing of any size is unpickled. Where no memory is shared the rows of a batch travel as arrays beside these bytes, or,
through a socket, before them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy.typing as npt

from aiovec.exchange import pickles
from aiovec.exchange.messages import BatchReply, BuildReply, CallReply
from aiovec.exchange.packed_infos import MARK, PackedInfos

__all__ = ["Apart", "dumps", "failed_envs", "failed_in", "is_to_be_read_in_a_thread", "loads", "with_arrays"]

_FAILED_MARK = b"\1"  # neither a pickle nor packed infos begin with it
_FAILED_HEAD = struct.Struct("<cI")  # mark, how many; then each of them, then the pickle
_FAILED = struct.Struct("<IB")  # env index, how
_ARRAYS_MARK = b"\2"
_ARRAYS_HEAD = struct.Struct("<cQ")  # mark, how many bytes the arrays take; then these, then the rest

# What is larger than this is unpickled in a thread, so that the loop goes on meanwhile. Exceptions always are: the
# frames of one cost some 30 µs each, and its module may have to be imported.
_LARGE_NBYTES = 1 << 20


class Apart(NamedTuple):
    """A reply whose rows travelled beside it.

    Attributes:
        data: The reply, as bytes.
        arrays: The rows.
    """

    data: bytes
    arrays: Sequence[npt.NDArray[Any]]


Payload = bytes | memoryview | Apart


def dumps(reply: BatchReply | BuildReply | CallReply) -> bytes:
    """The bytes of a reply; raises what pickling it raises."""
    if isinstance(reply, BatchReply) and isinstance(reply.infos, PackedInfos) and not (reply.failures or reply.dynamic):
        return reply.infos.data
    data = pickles.dumps_to_parent(reply)
    if not reply.failures:
        return data
    failed = [_FAILED.pack(*item) for item in failed_in(reply)]
    return b"".join((_FAILED_HEAD.pack(_FAILED_MARK, len(failed)), *failed, data))


def with_arrays(data: bytes, arrays: Sequence[npt.NDArray[Any]]) -> bytes:
    """A reply, as bytes, behind its rows."""
    pickled = pickles.dumps_to_parent(arrays)
    return b"".join((_ARRAYS_HEAD.pack(_ARRAYS_MARK, len(pickled)), pickled, data))


def _without_arrays(payload: Payload) -> bytes | memoryview:
    if isinstance(payload, Apart):
        return payload.data
    if payload[:1] == _ARRAYS_MARK:
        _, nbytes = _ARRAYS_HEAD.unpack_from(payload)
        return memoryview(payload)[_ARRAYS_HEAD.size + nbytes :]
    return payload


def loads(payload: Payload) -> Any:
    """The reply behind a payload, of whichever kind; `None` behind an empty one."""
    if not payload:
        return None
    if isinstance(payload, Apart):
        return (loads(payload.data) or BatchReply({}))._replace(arrays=payload.arrays)
    mark = payload[:1]
    if mark == _ARRAYS_MARK:
        rest = _without_arrays(payload)
        arrays = pickles.loads(memoryview(payload)[_ARRAYS_HEAD.size : len(payload) - len(rest)])
        return (loads(rest) or BatchReply({}))._replace(arrays=arrays)
    if mark == MARK:
        return BatchReply(PackedInfos(bytes(payload)))
    if mark == _FAILED_MARK:
        _, count = _FAILED_HEAD.unpack_from(payload)
        payload = memoryview(payload)[_FAILED_HEAD.size + count * _FAILED.size :]
    return pickles.loads(payload)


def failed_in(reply: BatchReply | BuildReply | CallReply) -> Sequence[tuple[int, int]]:
    """The envs that failed, each with a `Failed`."""
    return [(record.env_index, record.kind) for record in reply.failures]


def failed_envs(payload: Payload) -> Sequence[tuple[int, int]]:
    """The same, without unpickling anything."""
    payload = _without_arrays(payload)
    if payload[:1] != _FAILED_MARK:
        return ()
    _, count = _FAILED_HEAD.unpack_from(payload)
    start = _FAILED_HEAD.size
    return list(_FAILED.iter_unpack(payload[start : start + count * _FAILED.size]))


def is_to_be_read_in_a_thread(payload: Payload) -> bool:
    """Whether to unpickle it away from the loop."""
    if isinstance(payload, Apart):
        payload = payload.data
    return len(payload) > _LARGE_NBYTES or _without_arrays(payload)[:1] == _FAILED_MARK
