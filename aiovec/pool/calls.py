"""The calls in flight: requests out, replies in, and who is resumed.

A call whose task was cancelled stays pending, and its replies are still taken; what becomes of them is told by
`states`, and until then they lie in the inbox. Each method here that changes something is synchronous.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, TypeVar

from aiovec.errors import (
    AlreadyPendingCallError,
    ClosedEnvironmentError,
    NoAsyncCallError,
    WorkerStartError,
    failures,
    name_command,
)
from aiovec.exchange.failures import without_our_frames
from aiovec.exchange.frames import Frame, FrameKind
from aiovec.exchange.groups import index_in
from aiovec.exchange.messages import ResetRequest
from aiovec.pool.answer import Answer
from aiovec.pool.deaths import Deaths
from aiovec.pool.inbox import Inbox
from aiovec.pool.lock_step import LockStep
from aiovec.pool.mending import Mending
from aiovec.pool.pending_call import PendingCall
from aiovec.pool.restarts import GIVEN_UP
from aiovec.pool.ring import HOME, Lease, Ring
from aiovec.pool.sent import Sent
from aiovec.pool.states import EnvStates
from aiovec.pool.threads import in_thread
from aiovec.pool.worker import Death, Worker

__all__ = ["Calls"]

_Result = TypeVar("_Result")

# On the step path: a name of an enumeration costs 0.1 µs to look up, its hash as much again.
_STEP, _STEP_TOGETHER, _ALL_DONE, _AWAKE = FrameKind.STEP, FrameKind.STEP_TOGETHER, FrameKind.ALL_DONE, FrameKind.AWAKE
# What is ready is given without waiting: from time to time the loop has its turn all the same.
_LONGEST_TURN_SECONDS = 0.005
_BATCH_KINDS = (_STEP_TOGETHER, _STEP, FrameKind.RESET)


class Calls:
    """The calls of one vector.

    Args:
        loop: The running loop; everything here happens on it.
        workers: The pool's own list: a worker that takes a dead one's place is found there.
        num_envs: How many envs.
        mending: With `on_failure="restart"`.
        replace: Starts a worker in the place of one that died.
        replied_to_start: Called with a worker's index and a reply that belongs to no call.
        began: Called when a call has begun, if anybody wants to know.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        workers: Sequence[Worker],
        num_envs: int,
        mending: Mending | None,
        replace: Callable[[int], None],
        replied_to_start: Callable[[int, Frame], None],
        began: Callable[[], None] | None,
    ) -> None:
        self.states: EnvStates = EnvStates(num_envs)
        self.inbox: Inbox = Inbox()
        self.deaths: Deaths = Deaths()
        self.pending: dict[int, PendingCall] = {}
        self.mending: Mending | None = mending
        self.are_ending: bool = False  # `close` has begun: a rollout asks for nothing more
        self._loop = loop
        self._workers = workers
        self._replace = replace
        self._replied_to_start = replied_to_start
        self._began = began
        self._answered: list[Answer] = []  # complete, and to be resumed when the callback at hand ends
        self._of_one_env: dict[int, PendingCall] = {}  # by env, its call by itself that is owed
        self._receiver: Answer | None = None  # the task that waits in `recv`
        self._wanted = 0  # how many rows it waits for
        self._is_receiving = False
        self._has_come = False  # anything, since workers were told when to wake us
        self._turn_began = 0.0  # when `recv` last let the loop go on
        self._seq = 0
        self._busy_since = self._busy_seconds = 0.0
        self._bare_requests: Mapping[int, Any] = {}
        self._ring: Ring | None = None
        self._sent: Sent | None = None
        self._lock_step = LockStep()

    def __repr__(self) -> str:
        return f"<Calls pending={list(self.pending.values())} {self.inbox!r} {self.states!r}>"

    def open(self, ring: Ring, lock_step: LockStep, sent: Sent | None) -> None:
        """Takes the memory, once it is mapped.

        Args:
            ring: Who writes which buffer.
            lock_step: How steps of all envs are answered.
            sent: Where the answers of sent envs wait in shared memory.
        """
        self._ring, self._lock_step, self._sent = ring, lock_step, sent
        self._busy_seconds = 0.0  # those of the start are not the vector's work
        self._bare_requests = self.prepare(dict.fromkeys(range(len(self._workers))))

    def close(self) -> None:
        """Tells every task that waits that there is nothing more to come."""
        self._ring, self._lock_step, self._sent = None, LockStep(), None
        pending, self.pending = self.pending, {}
        self.inbox = Inbox()
        self._of_one_env.clear()
        awaited = [call for call in pending.values() if not (call.is_dropped or call.is_abandoned)]
        waiting = [(call.future, name_command(call.command)) for call in awaited]
        if self._receiver is not None:
            waiting.append((self._receiver, "recv()"))
        for future, command in waiting:
            if future is not None and not (future.done() or self._loop.is_closed()):
                future.set_exception(ClosedEnvironmentError(command))
                future.exception()  # whoever waits is told; where nobody does, nothing is amiss

    # ---- requests

    def next_seq(self, count: int = 1) -> int:
        """The number of the next call, or the first one of as many."""
        self._seq += count
        return self._seq - count + 1

    def prepare(self, messages: Mapping[int, Any]) -> dict[int, Any]:
        """Makes a message for each of these workers ready; raises what pickling raises, before any is touched."""
        return {index: self._workers[index].prepare(message) for index, message in messages.items()}

    def step_requests(self, given: Mapping[int, Any] | None) -> Mapping[int, Any]:
        """One step request for each worker, with what it bears of the actions; `None`: they are in the slab."""
        return self._bare_requests if given is None else self.prepare(given)

    def post(
        self,
        kind: FrameKind,
        command: str,
        prepared: Mapping[int, Any],
        *,
        seq: int | None = None,
        buffer: int = HOME,
        env_ids: Sequence[int] | None = None,
        resets: Mapping[int, ResetRequest] | None = None,
    ) -> PendingCall:
        """Sends a request to some workers, or to all; from here on the call is pending.

        Args:
            kind: Of the requests.
            command: As messages name the call.
            prepared: From `prepare`, by worker.
            seq: A number that was already given to the call.
            buffer: Which buffer the workers write.
            env_ids: Of a batch: the rows of its answer, if not all envs.
            resets: What the requests of a reset ask, by worker.
        """
        is_batch = kind in _BATCH_KINDS
        future = Answer(loop=self._loop)
        call = PendingCall(seq or self.next_seq(), command, is_batch, buffer, prepared, future, env_ids)
        if resets is not None:
            call.resets = resets
        return self._post(call, kind, prepared)

    def _post(self, call: PendingCall, kind: FrameKind, prepared: Mapping[int, Any]) -> PendingCall:
        self._begin(call)
        try:
            for index, request in prepared.items():
                worker = self._workers[index]
                if worker.alive:
                    worker.post(kind, call.seq, call.buffer, request, call.group)
                else:
                    self._fail_dead(call, index)
        except BaseException:  # a Ctrl-C in the middle of an env that lives in this process
            self._interrupted(call)
            raise
        return call

    def post_step(self, prepared: Mapping[int, Any], seq: int) -> PendingCall:
        """Sends a step request to every worker."""
        if self.inbox:
            self._discard_rest([*self.inbox])  # all envs were idle
        call = PendingCall(seq, "step", True, self._take_buffer(), prepared, Answer(loop=self._loop))
        call.is_together = self._lock_step.begin_step()
        return self._post(call, _STEP_TOGETHER if call.is_together else _STEP, prepared)

    def post_observe(self, lease: Lease) -> PendingCall:
        """Asks every worker for its envs' last observations, in the first buffer of a rollout; raises as `post_group`."""
        self.refuse_if_ending()
        self._discard_rest([*self.inbox])  # all envs were idle
        prepared = self._bare_requests
        call = PendingCall(self.next_seq(), "rollout", False, lease.strip.first, prepared, Answer(loop=self._loop))
        call.lease = lease
        return self._post(call, FrameKind.OBSERVE, prepared)

    def post_group(
        self, group: int, env_ids: Sequence[int] | None, step: int, rows: Mapping[int, Any] | None, lease: Lease
    ) -> PendingCall:
        """Asks a group of envs for a step of a rollout.

        Args:
            group: Its code.
            env_ids: Its envs, if not all.
            step: Which step of the rollout, from 0.
            rows: Requests with the actions, by worker, where they are not in the slab.
            lease: The rollout's memory.

        Raises:
            ClosedEnvironmentError: The vector is closed, or being closed, meanwhile.
        """
        self.refuse_if_ending()
        prepared = self._bare_requests if rows is None else rows
        call = PendingCall(
            self.next_seq(), "step", True, lease.strip.first + 1 + step, prepared, Answer(loop=self._loop), env_ids
        )
        call.group, call.lease = group, lease
        call.is_together = self._lock_step.begin_step(index_in(group))
        return self._post(call, _STEP_TOGETHER if call.is_together else _STEP, prepared)

    def refuse_if_ending(self) -> None:
        """Raises `ClosedEnvironmentError` to a rollout of a vector that is closed, or being closed."""
        if self.are_ending or self._ring is None:
            raise ClosedEnvironmentError("rollout()")

    def post_reset(
        self,
        seq: int,
        prepared: Mapping[int, Any],
        requests: Mapping[int, ResetRequest],
        env_ids: Sequence[int] | None,
        reset_ids: Sequence[int] | None,
    ) -> PendingCall:
        """Sends reset requests.

        Args:
            seq: The number that was given to the call.
            prepared: The requests, ready.
            requests: By worker.
            env_ids: The rows of the answer, if not all envs.
            reset_ids: The envs that are reset, if not all: what was owed to them is discarded.
        """
        self._discard(range(self.states.num_envs) if reset_ids is None else reset_ids)
        if env_ids is None:  # with a mask the other rows are written too
            self._discard_rest([*self.inbox])
        buffer = self._take_buffer() if env_ids is None else HOME
        return self.post(FrameKind.RESET, "reset", prepared, seq=seq, buffer=buffer, env_ids=env_ids, resets=requests)

    def post_each(self, command: str, prepared: Mapping[int, Any], asked: Mapping[int, Sequence[int]]) -> None:
        """Sends step requests to idle envs that answer each by itself, which is owed from now on.

        Args:
            command: As messages name the call.
            prepared: The requests, by worker.
            asked: The envs of each.
        """
        env_ids = [env_index for own in asked.values() for env_index in own]
        seq = self.next_seq(len(env_ids))
        self.states.begin_send(seq, command, env_ids)
        self._discard_rest(env_ids)
        if self._sent is not None:
            self._sent.ask(env_ids, seq)
        for index, own in asked.items():
            calls: list[PendingCall] = []
            for env_index in own:
                call = PendingCall(seq, "step", True, HOME, (index,), None, (env_index,))
                self._of_one_env[env_index] = call
                self._begin(call)
                calls.append(call)
                seq += 1
            self._post_each(index, prepared[index], calls)
        self._look_again()

    def post_one(self, index: int, request: Any, env_index: int) -> PendingCall:
        """Sends a step request to one idle env, given its worker; a task awaits the answer."""
        seq = self.next_seq()
        self.states.begin_one(seq, "step", env_index)
        self._discard_rest([env_index])
        call = PendingCall(seq, "step", True, HOME, (index,), Answer(loop=self._loop), (env_index,))
        self._begin(call)
        self._post_each(index, request, [call])
        return call

    def _post_each(self, index: int, request: Any, calls: Sequence[PendingCall]) -> None:
        if not self._workers[index].alive:
            for call in calls:
                self._fail_dead(call, index)
            return
        try:
            self._workers[index].post(FrameKind.STEP_EACH, calls[0].seq, HOME, request)
        except BaseException:  # a Ctrl-C in the middle of an env that lives in this process
            for call in calls:
                self._interrupted(call)
            raise

    def _begin(self, call: PendingCall) -> None:
        call.began = time.perf_counter()
        if not self.pending:
            self._busy_since = call.began
        self.pending[call.seq] = call
        if self.mending is not None and call.is_batch:
            self.mending.begin(call)
        if self._began is not None:
            self._began()

    def _interrupted(self, call: PendingCall) -> None:
        self._forget(call)
        for worker in self._workers:
            for env_index in worker.env_ids:
                self.states.break_(env_index, "did not end: the call was interrupted")

    def _take_buffer(self) -> int:
        return self._ring.take() if self._ring is not None else HOME

    # ---- answers

    async def answered(self, call: PendingCall) -> list[Any]:
        """Waits for a call and reads its replies, in the order of its workers; none if nobody has anything to say.

        Whatever it raises, the call goes on in the workers: the rows of a batch are then owed, other answers are
        dropped.

        Raises:
            WorkerDied: At once, if one of the workers died.
            ClosedEnvironmentError: The vector was terminated meanwhile.
            asyncio.CancelledError: Nobody waits any more.
        """
        assert call.future is not None  # noqa: S101
        try:
            await call.future
            if call.deaths:
                if self.mending is None:
                    self.deaths.tell_later_if_dead(call.deaths[1:])
                raise call.deaths[0]
            has_something_to_say = call.mended is not None or any(call.payloads.values())
            if has_something_to_say and call.is_to_be_read_in_a_thread():
                if call.is_batch and call.buffer == HOME and self._ring is not None:
                    call.kept = self._ring.home()  # meanwhile others may use it: a worker dies, and its envs are reset
                replies = await in_thread(self.read, call)
            else:
                replies = self.read(call) if has_something_to_say else []
        except BaseException:
            if call.lease is None:  # else it is seen to by the rollout, with its other calls
                self.leave(call)
            raise
        if call.is_batch and self._ring is None:  # terminated between the answer and our turn
            raise ClosedEnvironmentError(name_command(call.command))
        return replies

    def leave(self, call: PendingCall) -> None:
        """Nobody waits for a call any more: the rows of a batch are owed from now on, another answer is dropped."""
        if call.is_batch:
            self._abandon(call)
        else:
            self._drop(call)

    def has_nothing_to_say(self, call: PendingCall) -> bool:
        """Whether a call that has ended brought rows in the slab and no more: `answered` would give no replies."""
        return not (call.deaths or call.mended is not None or any(call.payloads.values())) and self._ring is not None

    def completed(
        self, call: PendingCall, result: Callable[[PendingCall, list[Any]], _Result], replies: list[Any]
    ) -> _Result:
        """The result of a batch that was answered; whatever goes wrong in it, no env stays awaited."""
        try:
            return result(call, replies)
        except BaseException as error:
            self.states.interrupt(call.seq)
            if call.seq in self.pending and not call.is_abandoned:
                self._forget(call)
            if failures(error):  # the worker's frames are to follow those of the user's call
                BaseException.with_traceback(error, without_our_frames(error.__traceback__))  # it may forbid attributes
            raise

    def read(self, call: PendingCall) -> list[Any]:
        """Unpickles what has come so far; in the order of the workers."""
        if call.mended is not None:
            for part in call.mended.parts:
                _ = part.reply
        if not any(call.payloads.values()):
            return []
        unpack = self._workers[0].unpack
        replies = call.replies = {} if call.replies is None else call.replies
        indices = sorted(call.payloads)
        for index in indices:
            if index not in replies:
                replies[index] = unpack(call.payloads[index])
        return [replies[index] for index in indices]

    def _pop(self, seq: int) -> PendingCall | None:
        call = self.pending.pop(seq, None)
        if call is not None and not self.pending:
            self._busy_seconds += time.perf_counter() - self._busy_since
        return call

    @property
    def busy_seconds(self) -> float:
        """In which any call was pending."""
        return self._busy_seconds + (time.perf_counter() - self._busy_since if self.pending else 0.0)

    def done(self, call: PendingCall) -> None:
        """The answer was taken, and its buffer is the caller's."""
        self._pop(call.seq)
        if not self._lock_step.is_on:
            self._lock_step.answered(call, len(self._workers))

    def give_up(self, calls: Sequence[PendingCall]) -> None:
        """A rollout ends before its time: of these calls of it the rows are owed, other answers are dropped."""
        for call in calls:
            if not call.is_batch:
                self._drop(call)
                continue
            self.states.begin_part(call.seq, range(self.states.num_envs) if call.env_ids is None else call.env_ids)
            self._abandon(call)

    def keep_rest(self, call: PendingCall, env_ids: Sequence[int]) -> None:
        """A failure of the call is raised; the rows of these envs are there for `recv`, if it is asked."""
        self.pending[call.seq] = call
        call.is_abandoned = True
        if env_ids:
            self.inbox.arrive(call, env_ids)
            self._look_again()
        else:
            self._drop(call)

    def stepped(self, failed: AbstractSet[int], env_ids: Iterable[int] | None = None) -> None:
        """With `on_failure="restart"`: a step of all, or of these, was taken in which some failed."""
        if self.mending is not None:
            self.mending.stepped(failed, env_ids)
            self.forget_lost()

    def forget_lost(self) -> None:
        """Envs that were lost while others still answered have no observation to repeat, although they gave one."""
        if self.mending is not None and self.mending.lost_env_ids:
            self.states.forget(self.mending.lost_env_ids)

    # ---- what is owed

    async def ready(self, min_envs: int | None, max_envs: int | None) -> list[tuple[int, PendingCall]]:
        """Waits until so many envs have their row, or one has failed. Nothing is taken yet.

        Returns:
            The first rows, each env with the call that bears it, read; or the failures.

        Raises:
            ValueError: `min_envs` is above the number of envs that are pending.
            NoAsyncCallError: None is.
            AlreadyPendingCallError: Another task waits here.
            WorkerDied: A worker ended meanwhile.
            ClosedEnvironmentError: The vector was closed or terminated meanwhile.
        """
        if self._is_receiving:
            raise AlreadyPendingCallError("recv", (), owed=False)
        self._is_receiving = True
        try:
            if time.perf_counter() - self._turn_began > _LONGEST_TURN_SECONDS:
                await asyncio.sleep(0)
                self._turn_began = time.perf_counter()
                if self._ring is None:
                    raise ClosedEnvironmentError("recv()")
            self.deaths.raise_untold()
            pending = self.num_owed()
            if min_envs is not None and min_envs > pending > 0:
                raise ValueError(f"min_envs={min_envs}, but only {pending} envs have been sent an action")
            while True:
                self._wanted = min(min_envs or 1, pending)
                if not pending:
                    raise NoAsyncCallError
                if self._must_wait():
                    self._receiver = Answer(loop=self._loop)
                    await self._receiver
                    self._turn_began = time.perf_counter()
                else:
                    chosen = self.inbox.first(max_envs)
                    slow = {call.seq: call for _, call in chosen if call.is_to_be_read_in_a_thread()}
                    if not slow:
                        return chosen
                    for call in slow.values():
                        await in_thread(self.read, call)
                if self._ring is None:  # terminated between what woke us and our turn
                    raise ClosedEnvironmentError("recv()")
                self.deaths.raise_untold()
                pending = self.num_owed()  # others may have reset some of them
        finally:
            self._is_receiving = False
            self._receiver = None
            if self._sent is not None:
                self._sent.give_up()

    def _must_wait(self) -> bool:
        """Whether what `recv` waits for is not there; then the workers are told when to wake us."""
        self._has_come = False
        self.look()
        while not self.inbox.has(self._wanted):
            if self._sent is None:
                return True
            self._sent.want(self._wanted - self.inbox.num_ready)
            if not self.look():
                return True
        return False

    def look(self) -> bool:
        """Takes what sent envs have left in shared memory; tells whether there was anything."""
        left = self._sent.take() if self._sent else ()
        for seq, payload in left:
            call = self.pending.get(seq)
            if call is None:
                continue
            for index in tuple(call.missing):  # one: that of the env
                if not self._workers[index].is_condemned:
                    self._take(call, index, payload)
                    if not call.missing:
                        self._complete(call)
        return bool(left)

    def is_answered(self, call: PendingCall) -> bool:
        """Whether nobody works on it any more, although we may not have looked; from any thread."""
        sent, env_index = self._sent, call.env_index
        return call.is_complete or (sent is not None and env_index is not None and sent.has_left(env_index, call.seq))

    def has_ended(self, call: PendingCall, index: int) -> bool:
        """Whether a worker has ended a call, although nobody was woken, since others have not; from any thread."""
        return self._lock_step.has_ended(call, index)

    def taken(self, env_ids: Sequence[int]) -> None:
        """Rows, or failures, were given to the user."""
        is_of_many = False
        for env_index in env_ids:
            call = self._of_one_env.get(env_index)
            if call is None:
                is_of_many = True
            elif call.is_complete:
                del self._of_one_env[env_index]
                self._pop(call.seq)
        self.inbox.remove(env_ids)
        if is_of_many:
            self._drop_finished()

    def num_owed(self) -> int:
        """How many envs have a row that is there for `recv`, or will be."""
        return self.states.num_owed([*self.inbox])

    def _abandon(self, call: PendingCall) -> None:
        """The task that waited for a batch is gone: what is not answered yet is owed.

        After a death what was answered is not: it is left for `recv`, if it is asked.
        """
        call.is_abandoned = True
        if call.env_index is not None:
            self._of_one_env[call.env_index] = call
        answered = call.payloads if call.deaths else {}
        asked = self.states.asked_by(call.seq) if answered else ()
        by_worker = {index: [i for i in asked if i in self._workers[index].env_ids] for index in answered}
        self.states.abandon(call.seq, [env_index for env_ids in by_worker.values() for env_index in env_ids])
        for index, env_ids in by_worker.items():
            failed = [i for i, _ in self._workers[index].failed_envs(answered[index]) if i in env_ids]
            self.inbox.arrive(call, env_ids, failed)
            for env_index in failed:
                self.states.break_(env_index, f"failed in {call.command}")
        if not call.missing:
            self._arrive(call)
        else:
            for index in call.payloads if call.mended is None and not call.deaths else ():
                self._arrive_of(call, index)
            self._ask_apart(call)
        self._look_again()

    def _arrive(self, call: PendingCall) -> None:
        """An owed call is complete."""
        self._has_come = True
        if call.mended is not None and call.mended.is_needed:
            owed = self.states.owed_to(call.seq)
            given_up = [env_index for env_index in call.mended.failures if self._is_given_up(env_index)]
            self.inbox.arrive(call, owed, given_up)
        elif call.env_index is None:
            for index in call.payloads:
                self._arrive_of(call, index)
        elif call.payloads:
            ((index, payload),) = call.payloads.items()
            self.inbox.arrive_one(call, call.env_index, bool(self._workers[index].failed_envs(payload)))
        if call.env_index is None:
            self._drop_finished()
        elif call.env_index not in self.inbox:  # its worker died
            self._forget(call)

    def _is_given_up(self, env_index: int) -> bool:
        return self.mending is not None and self.mending.restarts.is_exhausted(env_index)

    def _arrive_of(self, call: PendingCall, index: int) -> None:
        """One worker's rows of an owed call are there."""
        self._has_come = True
        worker = self._workers[index]
        failed = [env_index for env_index, _ in worker.failed_envs(call.payloads[index])]
        env_ids = call.answered_by(worker.env_ids)
        self.inbox.arrive(
            call, [i for i in env_ids if self.states.is_owed(i, call.seq) and i not in self.inbox], failed
        )

    def _discard(self, env_ids: Iterable[int]) -> None:
        """A reset of these has begun: what was owed to them is dropped."""
        self.look()
        if self.mending is not None:
            self.mending.discard([call for call in self.pending.values() if call.is_abandoned], env_ids)
        for env_index in env_ids:
            if (call := self._of_one_env.pop(env_index, None)) is not None:
                self._drop(call)
        self.inbox.remove(env_ids)
        self._drop_finished()
        self._wake_receiver()

    def _discard_rest(self, env_ids: Iterable[int]) -> None:
        """Idle envs are asked for something else: what is left of their last call will not be asked for."""
        left = [env_index for env_index in env_ids if env_index in self.inbox] if self.inbox else []
        if left:
            self.inbox.remove(left)
            self._drop_finished()
            self._wake_receiver()

    def _drop_finished(self) -> None:
        """Drops calls that were abandoned, and whose envs have all been asked for something else since."""
        kept = self.inbox.calls
        for call in list(self.pending.values()):
            of_many = call.is_abandoned and call.env_index is None and not call.is_dropped
            if of_many and call.seq not in kept and not self.states.owed_to(call.seq):
                self._drop(call)

    def _drop(self, call: PendingCall) -> None:
        """Nobody will ask for the answer: its buffer goes back once no worker writes there any more."""
        call.is_dropped = True
        if call.is_complete:
            self._forget(call)

    def _forget(self, call: PendingCall) -> None:
        if self._pop(call.seq) is not None and self._ring is not None:
            self._ring.give_back(call.buffer)

    # ---- replies

    def replied(self, index: int, frame: Frame) -> None:
        """A worker has sent a reply."""
        is_of_all = frame.kind == _ALL_DONE
        if not is_of_all:
            if frame.kind == _AWAKE:
                self._has_come = True  # `resume` looks
                return
            if self._sent:
                self.look()  # in order: an env that was sent an action may have been reset behind it
        call = self.pending.get(frame.seq)
        if call is None:
            self._replied_to_start(index, frame)  # or the pool was closed meanwhile
            return
        if is_of_all:
            self._take_left(call, call.missing)
        elif frame.kind == FrameKind.ECHO:
            self._take_left(call, call.missing & {index})
        elif index in call.missing:  # else the worker counts as dead
            if call.is_sent:
                self._forget_sent(call)
            self._take(call, index, frame.payload)
        if not call.missing:
            self._complete(call)

    def resume(self) -> None:
        """The last act of a callback that may have brought replies: resumes who waits for them."""
        answered = self._answered
        if self._receiver is not None and (self.deaths.has_untold or (self._has_come and not self._must_wait())):
            answered.append(self._receiver)
            self._receiver = None
        if len(answered) == 1:
            answered.pop().resume()
        elif answered:
            self._answered = []
            for future in answered:
                future.resume_later()

    def _look_again(self) -> None:
        """Rows have come otherwise than by a reply, or other envs are to answer."""
        if self._receiver is not None and not self._must_wait():
            self._wake_receiver()

    def _wake_receiver(self) -> None:
        """What it waits for may have been discarded: it looks again."""
        if self._receiver is not None:
            self._receiver.resume_later()
            self._receiver = None

    def _complete(self, call: PendingCall) -> None:
        """Every worker has answered, or is gone."""
        if call.is_dropped:
            self._forget(call)
        elif call.is_abandoned:
            self._arrive(call)
        elif call.future is not None:
            self._answered.append(call.future)

    def _take_left(self, call: PendingCall, workers: Iterable[int]) -> None:
        """Takes what workers have left of a step."""
        for index, reply in self._lock_step.left(call, workers):
            # Else what it had left was taken, and it was asked again.
            is_first = call.mended is None or index not in call.mended.in_parts
            if is_first and not self._workers[index].is_condemned:
                self._take(call, index, reply)

    def _take(self, call: PendingCall, index: int, payload: Any) -> None:
        """One worker's answer, or a part of it."""
        if call.mended is None or self.mending is None:
            call.payloads[index] = payload
            call.missing.discard(index)
            if call.is_abandoned and call.missing and not call.is_dropped:
                self._arrive_of(call, index)
        else:
            self.mending.take(call, call.mended, index, payload)

    def _forget_sent(self, call: PendingCall) -> None:
        if self._sent is not None and call.env_index is not None:
            self._sent.forget(call.env_index, call.seq)

    # ---- deaths

    def died(self, index: int, death: Death, is_started: bool) -> None:
        """Tells every call that waits for this worker; its envs are built anew, or need a reset."""
        self._lock_step.part(self._seq)
        self.look()
        self._has_come = True  # it may have been the one to wake us
        concerned = [call for call in self.pending.values() if index in call.missing]
        for call in concerned:  # who had ended the step, the dead one perhaps, has answered
            self._take_left(call, call.missing)
        waiting = [call for call in concerned if index in call.missing]
        for call in waiting:
            if call.is_sent:
                self._forget_sent(call)
        if self.mending is not None and is_started:
            self._mend_death(self.mending, index, death, waiting)
        else:
            self._tell_death(index, death, waiting)
        for call in concerned:
            if not call.missing:
                self._complete(call)
        for call in list(self.pending.values()):  # also where it had answered: its token may still lie there
            self._ask_apart(call, index)

    def _save_rows(self, index: int) -> None:
        """Of calls that this worker has answered, while others have not: its envs may be reset before the answer is taken."""
        own = self._workers[index].env_ids
        for call in self.pending.values():
            if call.is_batch and call.buffer == HOME and index in call.payloads and self._ring is not None:
                call.saved = {**call.saved, index: self._ring.home(slice(own.start, own.stop))}

    def _ask_apart(self, call: PendingCall, dead: int | None = None) -> None:
        """Workers that would answer a step by the tally, with the last of them, are to answer each for itself."""
        if call.is_together:
            for index in call.missing - {dead}:
                self._workers[index].post(FrameKind.ECHO, call.seq, HOME, b"")

    def replaced(self, index: int) -> int:
        """Another worker has taken the place of one that died.

        Returns:
            The number that its last request of the start is to bear.
        """
        env_ids = self._workers[index].env_ids
        self.deaths.replaced(index, env_ids)
        if self.mending is None:
            for env_index in env_ids:
                if not self.states.is_busy(env_index):  # with a reset that the other one is to do
                    self.states.break_(env_index, "must be reset, after the death of its worker")
        else:
            self.states.forget(env_ids)
        seq = self.next_seq()
        self._lock_step.part(seq)
        return seq

    def _tell_death(self, index: int, death: Death, waiting: Sequence[PendingCall]) -> None:
        self._save_rows(index)  # with `mending` nobody can reset them
        own = self._workers[index].env_ids
        not_begun = [call for call in waiting[1:] if not call.is_dropped and call.is_repeatable(index)]
        kept = {env_index for call in not_begun for env_index in call.answered_by(own)}
        for env_index in own:
            if env_index not in kept:
                self.states.break_(env_index, "must be built anew, since the worker died")
        live = [call for call in waiting if not (call.is_dropped or call in not_begun)]
        told_to = [call for call in live if not call.is_abandoned]
        if live:
            death = death.during((told_to or live)[0].command)
        self.deaths.add(index, death)
        heard = {env_index for call in told_to for env_index in call.answered_by(own)}
        self.deaths.tell_tasks_of([env_index for env_index in own if env_index not in heard], death)
        if not told_to or (self._is_receiving and len(told_to) < len(live)):
            self.deaths.tell_later([death])
        for call in waiting:
            if call not in not_begun:
                self._fail(call, index, death.during(call.command))
        self._repeat(index, not_begun)
        for env_index in own:
            if (owed := self._of_one_env.get(env_index)) is not None and owed.deaths:
                del self._of_one_env[env_index]

    def _repeat(self, index: int, resets: Sequence[PendingCall]) -> None:
        """A worker died of an earlier call: another one does the resets that it had not begun."""
        if not resets:
            return
        try:
            self._replace(index)
        except WorkerStartError:  # the next reset tries again, and raises it
            for call in resets:
                for env_index in call.answered_by(self._workers[index].env_ids):
                    self.states.break_(env_index, "must be built anew, since the worker died")
                self._fail_dead(call, index)
            return
        worker = self._workers[index]
        for call in resets:
            worker.post(FrameKind.RESET, call.seq, call.buffer, worker.prepare(call.resets[index]))

    def _mend_death(self, mending: Mending, index: int, death: Death, waiting: Sequence[PendingCall]) -> None:
        """With `on_failure="restart"`: the next rows of its envs tell it, and another worker starts."""
        batches = [(call, call.mended) for call in waiting if call.mended is not None]
        self.deaths.add(index, death)
        death, given_up = mending.died(index, death, waiting[0].command if waiting else None, batches)
        if given_up:
            self.deaths.add(index, death)
        for call in waiting:
            if call.mended is None:
                self._fail(call, index, death.during(call.command, is_rebuilt=not given_up))
        told = {env_index for call, mended in batches if not call.is_dropped for env_index in mended.asked[index]}
        for env_index in given_up:
            if not (env_index in told and self.states.is_busy(env_index)):  # else the call raises it, or `recv`
                self.states.break_(env_index, GIVEN_UP)
        if all(call.is_dropped for call, _ in batches):
            self.deaths.tell_later(mending.restarts.crash_loops(given_up))

    def _fail_dead(self, call: PendingCall, index: int) -> None:
        """A call meets a worker that is dead already: it tells the death, if nobody has."""
        death = self.deaths.of(index)
        if death is None:  # killed by a `terminate` in this very moment, of which every call is told
            return
        self.deaths.told(death)
        self._fail(call, index, death.during(call.command))

    def _fail(self, call: PendingCall, index: int, death: Death) -> None:
        call.missing.discard(index)
        call.deaths = (*call.deaths, death)
        if call.future is not None:
            call.future.resume_later()
