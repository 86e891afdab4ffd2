"""`call` and `set_attr`: which worker is asked for which envs, and their results in the order that was asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from aiovec.arguments import env_ids_of
from aiovec.batches import Batches
from aiovec.exchange.failures import as_one_exception
from aiovec.exchange.frames import FrameKind
from aiovec.exchange.messages import CallReply, CallRequest, SetAttrRequest
from aiovec.pool.pending_call import PendingCall

__all__ = ["MethodCall", "begin_call", "begin_set_attr"]


class MethodCall(NamedTuple):
    """A call that was sent.

    Attributes:
        batches: Of the vector.
        call: What to wait for.
        env_ids: The envs, in the order of the results.
        by_worker: The same, by worker.
    """

    batches: Batches
    call: PendingCall
    env_ids: Sequence[int]
    by_worker: Mapping[int, Sequence[int]]

    def result(self, call: PendingCall, replies: Sequence[CallReply]) -> tuple[Any, ...]:
        """One result an env; raises what envs raised."""
        self.batches.calls.done(call)
        records = [
            record
            for env_ids, reply in zip(self.by_worker.values(), replies, strict=True)
            for record in reply.failures
            if record.env_index in env_ids  # a request that does not load names all envs of its worker
        ]
        if records:
            raise as_one_exception(records[0].command, records)  # "call('nope')", of each of them
        results: dict[int, Any] = {}
        for env_ids, reply in zip(self.by_worker.values(), replies, strict=True):
            results.update(zip(env_ids, reply.results, strict=True))
        return tuple(results[env_index] for env_index in self.env_ids)


def begin_call(
    batches: Batches, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], env_ids: Sequence[int] | None
) -> MethodCall:
    """See `AsyncVectorEnv.call`."""
    chosen = _chosen(batches, env_ids)
    return _begin(batches, FrameKind.CALL, name, chosen, lambda rows, _own: CallRequest(rows, name, args, kwargs))


def begin_set_attr(batches: Batches, name: str, values: Any, env_ids: Sequence[int] | None) -> MethodCall:
    """See `AsyncVectorEnv.set_attr`."""
    chosen = _chosen(batches, env_ids)
    if not isinstance(values, (list, tuple)):
        values = [values] * len(chosen)
    if len(values) != len(chosen):
        raise ValueError(f"values has length {len(values)}, but {len(chosen)} envs: one value each, or a single one")
    by_env = dict(zip(chosen, values, strict=True))
    return _begin(
        batches,
        FrameKind.SET_ATTR,
        f"set_attr({name!r})",
        chosen,
        lambda rows, own: SetAttrRequest(rows, name, [by_env[env_index] for env_index in own]),
    )


def _chosen(batches: Batches, env_ids: Sequence[int] | None) -> Sequence[int]:
    return range(batches.num_envs) if env_ids is None else env_ids_of(batches.num_envs, env_ids)


def _begin(
    batches: Batches,
    kind: FrameKind,
    command: str,
    chosen: Sequence[int],
    request: Callable[[list[int], Sequence[int]], CallRequest | SetAttrRequest],
) -> MethodCall:
    calls = batches.calls
    by_worker: dict[int, Sequence[int]] = {}
    messages: dict[int, CallRequest | SetAttrRequest] = {}
    for worker in batches.pool.workers:
        own = [env_index for env_index in chosen if env_index in worker.env_ids]
        if own:
            by_worker[worker.index] = own
            messages[worker.index] = request([env_index - worker.env_ids.start for env_index in own], own)
    return MethodCall(batches, calls.post(kind, command, calls.prepare(messages)), chosen, by_worker)
