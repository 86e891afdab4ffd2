"""The request to step some envs, each of which answers by itself, as bytes: on the path of a single env's step."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from aiovec.exchange import pickles
from aiovec.exchange.actions import ActionColumns

__all__ = ["StepEachRequest", "dumps", "loads"]

_HEAD = struct.Struct("<?I")  # whether to autoreset, how many rows; then the rows, then the pickled actions


class StepEachRequest(NamedTuple):
    """Step some envs; the reply of each is numbered from that of the request, in the order of the rows.

    Attributes:
        rows: Which of the worker's envs.
        autoreset: Whether an episode that ends is followed by another one, as the autoreset mode says.
        actions: One a row, or as columns; `None` where they are in the slab.
    """

    rows: Sequence[int]
    autoreset: bool
    actions: Sequence[Any] | ActionColumns | None


def dumps(request: StepEachRequest) -> bytes:
    """The bytes of a request; raises what pickling the actions raises."""
    count = len(request.rows)
    head = _HEAD.pack(request.autoreset, count) + struct.pack(f"<{count}I", *request.rows)
    return head if request.actions is None else head + pickles.dumps_to_worker(request.actions)


def loads(payload: bytes | memoryview) -> tuple[StepEachRequest, memoryview]:
    """A request without its actions, and these as bytes: whose they are is known, whatever they do when they load."""
    autoreset, count = _HEAD.unpack_from(payload)
    rows = struct.unpack_from(f"<{count}I", payload, _HEAD.size)
    return StepEachRequest(rows, autoreset, None), memoryview(payload)[_HEAD.size + 4 * count :]
