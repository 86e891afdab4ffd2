"""Pickles replies so that the parent can always read them.

What an env put into an info, an observation without a fixed size or the result of a call may not pickle, or
may pickle and not load. That is that env's failure, and no other's: it is tried here, where the env is known.
Plain numbers, texts and arrays need no trial, so the step path has none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from gymnasium.spaces import GraphInstance

from aiovec.errors import InvalidEnvResultError
from aiovec.exchange import infos, pickles, replies
from aiovec.exchange.messages import BatchReply, CallReply
from aiovec.exchange.packed_infos import PackedInfos
from aiovec.worker.host import Capture

__all__ = ["copied_reply", "dumps_batch_reply", "dumps_call_reply"]

_PLAIN = {int, float, bool, complex, str, bytes, type(None)}
_CONTAINERS = {tuple, list, GraphInstance}


def dumps_batch_reply(reply: BatchReply, answered: Sequence[int], command: str, capture: Capture) -> bytes:
    """The bytes of a reply; envs whose part cannot travel have failed in it.

    Args:
        reply: What the envs gave.
        answered: The envs of its rows, in order.
        command: What they were asked for.
        capture: Turns an exception into what a reply bears.
    """
    columns = reply.infos
    if isinstance(columns, PackedInfos):
        return replies.dumps(reply)
    if _needs_no_trial(reply, columns):
        return replies.dumps(reply)
    try:
        data = replies.dumps(reply)
        replies.loads(data)
    except Exception:  # noqa: BLE001  whose is it?
        return replies.dumps(_without_the_faulty(reply, columns, answered, command, capture, _pickling_fault))
    return data


def copied_reply(
    reply: BatchReply | None, answered: Sequence[int], command: str, capture: Capture
) -> BatchReply | None:
    """A reply that need not travel: what it holds is the env's own until it is copied, and may be changed later."""
    if reply is None or not (reply.dynamic or reply.infos):
        return reply
    columns = reply.infos
    try:
        return reply._replace(dynamic=copy.deepcopy(reply.dynamic), infos=copy.deepcopy(columns))
    except Exception:  # noqa: BLE001  whose is it?
        assert not isinstance(columns, PackedInfos)  # noqa: S101  bytes
        reply = _without_the_faulty(reply, columns, answered, command, capture, _copying_fault)
        return reply._replace(dynamic=copy.deepcopy(reply.dynamic), infos=copy.deepcopy(reply.infos))


def dumps_call_reply(reply: CallReply, asked: Sequence[int], command: str, capture: Capture) -> bytes:
    """The same for a call; `asked` are its envs, in order."""
    try:
        data = replies.dumps(reply)
        pickles.loads(data)
    except Exception:  # noqa: BLE001  whose is it?
        results, failures = list(reply.results), list(reply.failures)
        for position, env_index in enumerate(asked):
            if (fault := _pickling_fault(results[position])) is not None:
                results[position] = None
                failures.append(capture(_explained(env_index, "result", fault), env_index, command))
        return replies.dumps(CallReply(results, failures))
    return data


_Fault = tuple[str, Exception]  # what was expected, what went wrong


def _without_the_faulty(
    reply: BatchReply,
    columns: infos.Columns,
    answered: Sequence[int],
    command: str,
    capture: Capture,
    fault_of: Callable[[Any], _Fault | None],
) -> BatchReply:
    faults: dict[int, Exception] = {}
    for env_index, key, value in infos.values_of(columns, sorted(answered)):
        if (fault := fault_of(value)) is not None:
            faults[env_index] = _explained(env_index, f"info {key!r}", fault)
    dynamic = [list(column) for column in reply.dynamic]
    for column in dynamic:
        for position, env_index in enumerate(answered):
            if (fault := fault_of(column[position])) is not None:
                faults[env_index] = _explained(env_index, "observation", fault)
                column[position] = None
    failures = [capture(faults[env_index], env_index, command) for env_index in sorted(faults)]
    rest = infos.without(columns, sorted(answered), set(faults))
    return BatchReply(rest, dynamic, [*reply.failures, *failures])


def _pickling_fault(value: Any) -> _Fault | None:
    try:
        pickles.loads(pickles.dumps_to_parent(value))
    except Exception as error:  # noqa: BLE001  this is the trial
        return "what can be pickled and loaded again", error
    return None


def _copying_fault(value: Any) -> _Fault | None:
    try:
        copy.deepcopy(value)
    except Exception as error:  # noqa: BLE001  this is the trial
        return "what can be copied", error
    return None


def _explained(env_index: int, what: str, fault: _Fault) -> InvalidEnvResultError:
    expected, error = fault
    explained = InvalidEnvResultError(env_index, what, expected, f"{type(error).__name__}: {error}")
    explained.__cause__ = error
    return explained


def _needs_no_trial(reply: BatchReply, columns: infos.Columns) -> bool:
    try:
        return _columns_are_plain(columns) and all(_is_plain(column) for column in reply.dynamic)
    except RecursionError:  # a list that holds itself: pickle knows what to do with it
        return False


def _columns_are_plain(columns: infos.Columns) -> bool:
    return all(
        _columns_are_plain(values) if isinstance(values, dict) else _is_plain(values) for _, values in columns.values()
    )


def _is_plain(values: Any) -> bool:
    if isinstance(values, np.ndarray):
        return bool(values.dtype.kind != "O")
    return set(map(type, values)) <= _PLAIN or all(map(_is_plain_value, values))


def _is_plain_value(value: Any) -> bool:
    if isinstance(value, (np.ndarray, np.generic)):
        return bool(value.dtype.kind != "O")
    return type(value) in _PLAIN or (type(value) in _CONTAINERS and all(map(_is_plain_value, value)))
