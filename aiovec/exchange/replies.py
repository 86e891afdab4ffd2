"""Replies as bytes: nothing where there is nothing to say, packed infos, or a pickle.

Where envs have failed, which ones stands before the pickle: a parent may have to act at once, on its loop, where
nothing of any size is unpickled.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from aiovec.exchange import pickles
from aiovec.exchange.messages import BatchReply, BuildReply, CallReply
from aiovec.exchange.packed_infos import MARK, PackedInfos

__all__ = ["dumps", "failed_envs", "failed_in", "is_to_be_read_in_a_thread", "loads"]

_FAILED_MARK = b"\1"  # neither a pickle nor packed infos begin with it
_FAILED_HEAD = struct.Struct("<cI")  # mark, how many; then each of them, then the pickle
_FAILED = struct.Struct("<IB")  # env index, how

# What is larger than this is unpickled in a thread, so that the loop goes on meanwhile. Exceptions always are: the
# frames of one cost some 30 µs each, and its module may have to be imported.
_LARGE_NBYTES = 1 << 20

Payload = bytes | memoryview


def dumps(reply: BatchReply | BuildReply | CallReply) -> bytes:
    """The bytes of a reply; raises what pickling it raises."""
    if (
        isinstance(reply, BatchReply)
        and isinstance(reply.infos, PackedInfos)
        and not (reply.arrays or reply.failures or reply.dynamic)
    ):
        return reply.infos.data
    data = pickles.dumps_to_parent(reply)
    if not reply.failures:
        return data
    failed = [_FAILED.pack(*item) for item in failed_in(reply)]
    return b"".join((_FAILED_HEAD.pack(_FAILED_MARK, len(failed)), *failed, data))


def loads(payload: Payload) -> Any:
    """The reply behind a payload, of whichever kind; `None` behind an empty one."""
    if not payload:
        return None
    mark = payload[:1]
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
    if payload[:1] != _FAILED_MARK:
        return ()
    _, count = _FAILED_HEAD.unpack_from(payload)
    start = _FAILED_HEAD.size
    return list(_FAILED.iter_unpack(payload[start : start + count * _FAILED.size]))


def is_to_be_read_in_a_thread(payload: Payload) -> bool:
    """Whether to unpickle it away from the loop."""
    return len(payload) > _LARGE_NBYTES or payload[:1] == _FAILED_MARK
