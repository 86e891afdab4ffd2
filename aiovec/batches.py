"""Batches out and in: who is asked, and how the answers become rows, with states settled and failures raised."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode

from aiovec.arguments import ResetTargets, reset_targets
from aiovec.episodes import Episodes
from aiovec.errors import CrashLoopError, EnvTimeoutError, ResetNeeded, WorkerDied
from aiovec.exchange import infos as infos_
from aiovec.exchange import packed_infos
from aiovec.exchange.actions import ActionColumns, ActionWriter
from aiovec.exchange.black_box import TIMES_PER_ROW
from aiovec.exchange.failures import Failed, FailureRecord, as_one_exception
from aiovec.exchange.infos import Columns
from aiovec.exchange.layout import Layout
from aiovec.exchange.messages import BatchReply
from aiovec.exchange.packed_infos import MARK, PackedInfos
from aiovec.exchange.slab import Buffer
from aiovec.exchange.step_each import StepEachRequest
from aiovec.failed_rows import Answered, FailedRows
from aiovec.pool.calls import Calls
from aiovec.pool.mended import Mended
from aiovec.pool.pending_call import PendingCall
from aiovec.pool.pool import Pool
from aiovec.pool.restarts import GIVEN_UP
from aiovec.pool.ring import HOME, Lease
from aiovec.pool.start import Started
from aiovec.pool.states import EnvStates
from aiovec.statistics import VectorStatistics

__all__ = ["Batches", "InfoParts", "ResetResult", "StepBatch", "StepResult", "Transition"]

# What `step` and `reset` of a vector return, and `step` of one env.
StepResult = tuple[Any, npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.bool_], dict[str, Any]]
ResetResult = tuple[Any, dict[str, Any]]
Transition = tuple[Any, float, bool, bool, dict[str, Any]]
InfoParts = list[tuple[Sequence[int], Columns | PackedInfos]]


class StepBatch(NamedTuple):
    """The rows of some envs, in the order in which they ended; yours to keep.

    Attributes:
        env_ids: `[rows]`, int64: whose each row is.
        observations: `[rows, …]`, batched as `observation_space` says for as many envs.
        rewards: `[rows]`, float64.
        terminations: `[rows]`, bool.
        truncations: `[rows]`, bool.
        infos: Gymnasium's dict of arrays `[rows]` with ``_key`` masks; and ``env_id``, the same as `env_ids`.
    """

    env_ids: npt.NDArray[np.int64]
    observations: Any
    rewards: npt.NDArray[np.float64]
    terminations: npt.NDArray[np.bool_]
    truncations: npt.NDArray[np.bool_]
    infos: dict[str, Any]


class Batches:
    """The batches of a started vector.

    Args:
        started: The vector.
        num_envs: How many envs.
        copy: See `AsyncVectorEnv`.
        mode: The autoreset mode.
        threads_per_worker: See `AsyncVectorEnv`.
    """

    def __init__(
        self, started: Started, num_envs: int, copy: bool | None, mode: AutoresetMode, threads_per_worker: int
    ) -> None:
        pool = started.pool
        assert pool.slab is not None  # noqa: S101
        assert pool.ring is not None  # noqa: S101
        geometry = pool.slab.geometry
        self.pool: Pool = pool
        self.calls: Calls = pool.calls
        self.states: EnvStates = pool.calls.states
        self.actions: ActionWriter = ActionWriter(started.spaces.single_action_space, num_envs)
        arrays, index = pool.slab.actions_for(HOME)
        self.actions.map([array[index] for array in arrays])
        self._ring = pool.ring
        self._buffer: Callable[[int], Buffer] = pool.slab.buffer
        self.num_envs: int = num_envs
        self._every_env = range(num_envs)
        self._threads = threads_per_worker
        self._num_steps = 0
        self.layout: Layout = geometry.observations
        self.episodes: Episodes = Episodes(num_envs)
        self._rollouts_until = 0  # how many env-steps there were when the last rollout had ended
        self._is_lent_home = copy is False
        self._waits_for_reset = mode is AutoresetMode.DISABLED
        self._failed_rows: FailedRows | None = None
        if self.calls.mending is not None:
            self._failed_rows = FailedRows(self.layout, num_envs, mode, self.calls.mending.restarts)

    def __repr__(self) -> str:
        return f"<Batches of {len(self._every_env)} envs>"

    def release(self) -> None:
        """The vector is closed: lets go of the memory, also while a kept exception holds this by our frames."""
        del self._ring, self._buffer
        self.actions.unmap()

    # ---- of all envs, or of a reset

    def begin_step(self, actions: Any) -> PendingCall:
        """Asks every env for a step."""
        calls = self.calls
        calls.deaths.raise_untold()
        seq = calls.next_seq()
        self.states.begin_step(seq, "step")
        try:
            prepared = calls.step_requests(self._given(self.actions.write(actions)))
        except BaseException:
            self.states.undo(seq)
            raise
        return calls.post_step(prepared, seq)

    def _given(self, rows: Sequence[Any] | npt.NDArray[Any] | None) -> dict[int, Any] | None:
        """What the request to each worker bears of a batch of actions; `None`: they are in the slab, which is shared."""
        if rows is not None:
            return {worker.index: rows[worker.env_ids.start : worker.env_ids.stop] for worker in self.pool.workers}
        if self.pool.shared:
            return None
        return {worker.index: self.actions.columns(worker.env_ids) for worker in self.pool.workers}

    def begin_reset(self, target: ResetTargets) -> PendingCall:
        """Asks for a reset; what is owed to these envs is waited out and discarded."""
        calls, states, workers = self.calls, self.states, self.pool.workers
        by_worker = {worker.index: target.request(worker.env_ids) for worker in workers}
        requests = {index: request for index, request in by_worker.items() if request is not None}
        prepared = calls.prepare(requests)
        if target.unmasked:
            states.check_repeatable("reset", target.unmasked)
        states.check_reset("reset", target.reset_ids)
        self.pool.replace_dead(requests)
        self.episodes.restart(target.reset_ids)
        seq = calls.next_seq()
        # With a mask all rows are answered, but only the masked envs change their state.
        states.begin_reset(seq, "reset", target.reset_ids, target.unmasked)
        return calls.post_reset(seq, prepared, requests, target.part, target.reset_ids)

    def step_result(self, call: PendingCall, replies: list[BatchReply | None]) -> StepResult:
        """What `step` returns, or raises."""
        buffer = self._rows_of(call)
        if not (replies or self._waits_for_reset or call.mended is not None):
            self.calls.done(call)  # the step path: nobody has anything to say
            self.states.settle(call.seq, {})
            dynamic: list[list[Any]] = []
            infos: dict[str, Any] = {}
        elif call.mended is not None and call.mended.is_needed:
            dynamic, infos = self._completed(call, call.mended, buffer)
            self.calls.stepped(frozenset(call.mended.failures))
            self._settle_mended(call, call.mended, self._ended(buffer))
        else:
            answers = self._answers(call, replies)
            self._settle(call, answers, self._ended(buffer))
            dynamic, infos = self._whole(answers)
            self.calls.stepped(frozenset())
        rewards, terminations, truncations = (
            buffer.rewards.copy(),
            buffer.terminations.copy(),
            buffer.truncations.copy(),
        )
        self._num_steps += len(self._every_env)
        if self._failed_rows is not None:
            self._failed_rows.keep(None, buffer, dynamic)
        return self._observations(call, buffer, dynamic), rewards, terminations, truncations, infos

    def reset_result(self, call: PendingCall, replies: list[BatchReply | None]) -> ResetResult:
        """What `reset` returns, or raises."""
        buffer = self._rows_of(call)
        if call.mended is not None and call.mended.is_needed:
            dynamic, infos = self._completed(call, call.mended, buffer)
            self._settle_mended(call, call.mended, ())
        else:
            answers = self._answers(call, replies)
            self._settle(call, answers, ())
            dynamic, infos = self._whole(answers) if call.env_ids is None else self._part(call, call.env_ids, buffer)
        if self._failed_rows is not None:
            self.calls.forget_lost()
            self._failed_rows.keep(call.env_ids, buffer, dynamic)
        if call.env_ids is None:
            return self._observations(call, buffer, dynamic), infos
        return self.layout.assemble([array.take(call.env_ids, axis=0) for array in buffer.observations], dynamic), infos

    def _ended(self, buffer: Buffer) -> Sequence[int]:
        """The envs whose episode ended, where nobody resets them but the user."""
        if not self._waits_for_reset:
            return ()
        ended: list[int] = np.flatnonzero(buffer.terminations | buffer.truncations).tolist()
        return ended

    def _settle(self, call: PendingCall, answers: Sequence[Answered], ended: Sequence[int]) -> None:
        """Takes an answer: states, and the failures of envs raised."""
        self.calls.done(call)
        if not answers and not ended:  # the step path: nobody has anything to say
            self.states.settle(call.seq, {})
            return
        records = [record for _, reply in answers for record in reply.failures]
        failed = {record.env_index: f"failed in {record.command}" for record in records}
        self.states.settle(call.seq, failed, ended)
        if records:
            self._keep_rest(call, failed)
            asked = set(self.states.asked_by(call.seq))  # a request that does not load names all envs of its worker
            of_asked = [record for record in records if record.env_index in asked]
            raise as_one_exception(call.command, of_asked or records)

    def _settle_mended(self, call: PendingCall, mended: Mended, ended: Sequence[int]) -> None:
        """Takes an answer in which envs failed; raises for those that failed too often."""
        self.calls.done(call)
        given_up = self._crash_loops(mended.failures)
        failed = {env_index: GIVEN_UP for error in given_up for env_index in error.env_ids}
        self.states.settle(call.seq, failed, ended)
        self.calls.forget_lost()
        if not call.resets:
            self.states.forget(list(mended.failures))
        if given_up:
            self._keep_rest(call, failed)
            raise _one_or_group(call.command, given_up)

    def _crash_loops(self, env_ids: Iterable[int]) -> list[CrashLoopError]:
        assert self._failed_rows is not None  # noqa: S101
        return self._failed_rows.restarts.crash_loops(env_ids)

    def _keep_rest(self, call: PendingCall, failed: Container[int]) -> None:
        """The call raises: what the other envs did is there for `recv`."""
        asked = self.states.asked_by(call.seq)  # with a mask not all whose rows were answered
        self.calls.keep_rest(call, [env_index for env_index in asked if env_index not in failed])

    def _observations(self, call: PendingCall, buffer: Buffer, dynamic: list[list[Any]]) -> Any:
        """The observations of a whole batch, theirs to keep who asked."""
        arrays: list[npt.NDArray[Any]]
        if call.buffer != HOME:
            arrays = self._ring.lend(call.buffer)
        elif self._is_lent_home:
            arrays = buffer.observations
        else:
            arrays = [array.copy() for array in buffer.observations]
        return self.layout.assemble(arrays, dynamic)

    def _whole(self, answers: Sequence[Answered]) -> tuple[list[list[Any]], dict[str, Any]]:
        """Of all envs: the values of the leaves without a fixed size, and the infos."""
        if not answers:
            return [], {}
        dynamic = self._dynamic_of(answers)
        with_infos = [(env_ids, reply.infos) for env_ids, reply in answers if reply.infos]
        return dynamic, infos_.merge(with_infos, len(self._every_env)) if with_infos else {}

    def _dynamic_of(self, answers: Sequence[Answered]) -> list[list[Any]]:
        """For each leaf without a fixed size the values of the answered rows."""
        if not self.layout.dynamic:
            return []
        return [list(chain.from_iterable(parts)) for parts in zip(*(r.dynamic for _, r in answers), strict=True)]

    def _part(
        self, call: PendingCall, env_ids: Sequence[int], buffer: Buffer
    ) -> tuple[list[list[Any]], dict[str, Any]]:
        """The same of some envs."""
        dynamic, entries = self._rows(call, env_ids, buffer)
        return dynamic, infos_.of_rows(entries, env_ids)

    def _completed(self, call: PendingCall, mended: Mended, buffer: Buffer) -> tuple[list[list[Any]], dict[str, Any]]:
        """The same of a call in which some failed."""
        dynamic, entries = self._complete(call, mended, None, buffer)
        env_ids = self._every_env if call.env_ids is None else call.env_ids
        return [[column[env_index] for env_index in env_ids] for column in dynamic], infos_.of_rows(entries, env_ids)

    # ---- of rollouts

    def check_rollout(self) -> None:
        """Whether a rollout may begin.

        Raises:
            AlreadyPendingCallError: An env is awaited or owed.
            ResetNeeded: An env must be reset first, or has no observation to begin with.
            WorkerDied: A worker ended since the last call.
            ClosedEnvironmentError: The vector was closed meanwhile.
        """
        self.calls.refuse_if_ending()
        self.calls.deaths.raise_untold()
        self.states.check_idle("rollout", self._every_env)
        if self._failed_rows is None:
            self.states.check_repeatable("rollout", self._every_env)

    def begin_rollout(self) -> int:
        """All envs are awaited by a rollout from now on, whose number is returned; raises what `check_rollout` does."""
        self.check_rollout()
        seq = self.calls.next_seq()
        self.states.begin_step(seq, "rollout")
        if self._num_steps != self._rollouts_until:
            self.episodes.restart()
        return seq

    def end_rollout(self, seq: int) -> None:
        """All its steps were taken: the envs are idle."""
        self.states.settle(seq, {})
        self._rollouts_until = self._num_steps

    def give_up_rollout(self, seq: int, calls: Sequence[PendingCall]) -> None:
        """A rollout ends before its time: what of its `calls` was not taken is owed, the other envs are idle."""
        self.states.undo(seq)
        self.episodes.restart()
        self.calls.give_up(calls)

    async def observe(self, lease: Lease) -> list[list[Any]]:
        """Has the last observations written into the first buffer of a rollout.

        Returns:
            For each leaf without a fixed size the values of all envs.
        """
        calls, buffer = self.calls, self._buffer(lease.strip.first)
        buffer.terminations[:] = False
        call = calls.post_observe(lease)
        try:
            replies: list[BatchReply | None] = await calls.answered(call)
        except (WorkerDied, EnvTimeoutError):
            calls.give_up([call])
            if self._failed_rows is None:
                raise
            replies = []  # another worker has its place, and the next rows of its envs tell it
        except BaseException:
            calls.give_up([call])
            raise
        calls.done(call)
        answers = self._answers(call, replies)
        if self._failed_rows is not None:  # envs that were built anew have none
            return self._failed_rows.repeat(buffer)
        return self._dynamic_of(answers)

    @property
    def keeps_observations(self) -> bool:
        """Whether the last valid ones are kept, for rows of envs that failed."""
        return self._failed_rows is not None

    def group_done(self, call: PendingCall, num_envs: int) -> None:
        """A step of so many envs was answered, and nobody had anything to say."""
        self.calls.done(call)
        self._num_steps += num_envs

    def group_result(self, call: PendingCall, replies: list[BatchReply | None]) -> tuple[list[list[Any]], InfoParts]:
        """What a step of a group of envs gave, or raises.

        Returns:
            For each leaf without a fixed size the values, and the infos of those who have something to say.
        """
        env_ids = self._every_env if call.env_ids is None else call.env_ids
        parts: InfoParts = []
        if call.mended is not None and call.mended.is_needed:
            by_env, entries = self._complete(call, call.mended, call.env_ids, self._buffer(call.buffer))
            dynamic = [[column[env_index] for env_index in env_ids] for column in by_env]
            if entries:
                parts = [(sorted(entries), infos_.collect(sorted(entries.items()), -1))]
            self.calls.stepped(frozenset(call.mended.failures), call.env_ids)
            rollout = self.states.hand_over(call.seq, env_ids)  # as if this call had asked them by itself
            self._settle_mended(call, call.mended, ())
            self.states.begin_part(rollout, env_ids)
        else:
            answers = self._answers(call, replies)
            if any(reply.failures for _, reply in answers):
                self.states.hand_over(call.seq, env_ids)
                self._settle(call, answers, ())  # raises
            self.calls.done(call)
            dynamic = self._dynamic_of(answers)
            parts = [(of_worker, reply.infos) for of_worker, reply in answers if reply.infos]
            self.calls.stepped(frozenset(), call.env_ids)
        self._num_steps += len(env_ids)
        if self._failed_rows is not None:
            self._failed_rows.keep(call.env_ids, self._buffer(call.buffer), dynamic)
        return dynamic, parts

    # ---- of one env

    async def reset_one(self, env_index: int, seed: int | None, options: dict[str, Any] | None) -> ResetResult:
        """See `SubEnv.reset`."""
        call = self.begin_reset(reset_targets(len(self._every_env), [seed], options, [env_index]))
        replies: list[BatchReply | None] = await self.calls.answered(call)
        return self.calls.completed(call, self.one_reset_result, replies)

    def one_reset_result(self, call: PendingCall, replies: list[BatchReply | None]) -> ResetResult:
        """What the `reset` of a single env returns, or raises."""
        env_index = call.env_index
        assert env_index is not None  # noqa: S101
        if call.mended is not None and call.mended.is_needed:
            self._settle_mended(call, call.mended, ())
        else:
            self._settle(call, self._answers(call, replies), ())
        observation, info = self._row(call, env_index)
        self.calls.forget_lost()
        return observation, info

    def _row(self, call: PendingCall, env_index: int) -> tuple[Any, dict[str, Any]]:
        """The observation of one env, and its info."""
        buffer = self._rows_of(call)
        dynamic, entries = self._rows(call, [env_index], buffer)
        if self._failed_rows is not None:
            self._failed_rows.keep([env_index], buffer, dynamic)
        row = [array[env_index : env_index + 1] for array in buffer.observations]
        return self.layout.row(row, dynamic, 0), entries.get(env_index, {})

    async def step_one(self, env_index: int, action: Any) -> Transition:
        """See `SubEnv.step`."""
        calls = self.calls
        worker = self.pool.worker_of(env_index)
        calls.deaths.raise_unheard(env_index)
        self.states.check_idle("step", [env_index])
        actions: Sequence[Any] | ActionColumns | None = self.actions.write_one(action, env_index)
        if actions is None and not self.pool.shared:
            actions = self.actions.columns([env_index])
        request = worker.prepare(StepEachRequest([env_index - worker.env_ids.start], False, actions))
        call = calls.post_one(worker.index, request, env_index)
        replies: list[BatchReply | None] = await calls.answered(call)
        return calls.completed(call, self.one_result, replies)

    def one_result(self, call: PendingCall, _replies: list[BatchReply | None]) -> Transition:
        """What the `step` of a single env returns, or raises."""
        env_index = call.env_index
        assert env_index is not None  # noqa: S101
        self.calls.done(call)
        if (failures := self._failures(call.command, [(call, [env_index])])) is not None:
            raise failures
        is_mended = call.mended is not None and call.mended.is_needed
        self.calls.stepped(frozenset([env_index] if is_mended else ()), [env_index])
        buffer = self._rows_of(call)
        observation, info = self._row(call, env_index)
        reward = float(buffer.rewards[env_index])
        terminated, truncated = bool(buffer.terminations[env_index]), bool(buffer.truncations[env_index])
        self.states.settle_one(call.seq, env_index, terminated or truncated, self._waits_for_reset)
        self._num_steps += 1
        return observation, reward, terminated, truncated, info

    # ---- of those that are ready

    def send(self, actions: Any, env_ids: Sequence[int]) -> None:
        """See `AsyncVectorEnv.send`."""
        self.calls.deaths.raise_untold()
        self.states.check_idle("send", env_ids)
        rows = self.actions.write(actions, env_ids)
        asked: dict[int, list[int]] = {}
        requests: dict[int, StepEachRequest] = {}
        for worker in self.pool.workers:
            own = worker.env_ids
            chosen = [env_index for env_index in env_ids if env_index in own]
            if chosen:
                asked[worker.index] = chosen
                theirs: Sequence[Any] | ActionColumns | None = None
                if rows is None and not self.pool.shared:
                    theirs = self.actions.columns(chosen)
                elif rows is not None:
                    theirs = [row for env_index, row in zip(env_ids, rows, strict=True) if env_index in own]
                requests[worker.index] = StepEachRequest([i - own.start for i in chosen], True, theirs)
        self.calls.post_each("send", self.calls.prepare(requests), asked)

    async def recv(self, min_envs: int | None, max_envs: int | None) -> StepBatch:
        """What `recv` returns, or raises."""
        chosen = await self.calls.ready(min_envs, max_envs)
        env_ids = [env_index for env_index, _ in chosen]
        if self.calls.inbox.has_failures:
            failures = self._failures("recv", _by_call(chosen))
            self.calls.taken(env_ids)
            assert failures is not None  # noqa: S101
            raise failures
        infos = self._usual_infos([call for _, call in chosen])
        batch = self._gather(chosen, env_ids) if infos is None else self._gather_usual(infos, env_ids)
        self.states.take(env_ids, self._ended_of(batch))
        self._num_steps += sum(call.command == "step" for _, call in chosen)
        self.calls.taken(env_ids)
        return batch

    def _usual_infos(self, calls: Sequence[PendingCall]) -> dict[str, Any] | None:
        """The infos of envs that were sent an action, and have nothing to say but those of the usual kind, if at all.

        `None` where that is not so: the general way has the same result.
        """
        if self.layout.dynamic or self._failed_rows is not None or not self.pool.shared:
            return None
        payloads: list[Any] = []
        for call in calls:
            if not call.is_sent:
                return None
            payloads += call.payloads.values()
        if not any(payloads):
            return {}
        if not all(type(payload) is bytes and payload[:1] == MARK for payload in payloads):
            return None
        return packed_infos.merge([PackedInfos(payload) for payload in payloads], len(calls))

    def _gather_usual(self, infos: dict[str, Any], env_ids: list[int]) -> StepBatch:
        *observations, rewards, terminations, truncations = self._gather_arrays({HOME: env_ids}, env_ids)
        ids = infos["env_id"] = np.array(env_ids, dtype=np.int64)
        return StepBatch(ids, self.layout.assemble(observations), rewards, terminations, truncations, infos)

    def _gather(self, chosen: Sequence[tuple[int, PendingCall]], env_ids: list[int]) -> StepBatch:
        entries: dict[int, dict[str, Any]] = {}
        values: dict[int, list[Any]] = {}
        by_buffer: dict[int, list[int]] = {}
        for call, of_call in _by_call(chosen):
            dynamic, of_rows = self._rows(call, of_call, self._buffer(call.buffer))
            entries.update(of_rows)
            by_buffer.setdefault(call.buffer, []).extend(of_call)
            for position, env_index in enumerate(of_call) if dynamic else ():
                values[env_index] = [column[position] for column in dynamic]
            if self._failed_rows is not None:
                self._failed_rows.keep(of_call, self._buffer(call.buffer), dynamic)
                failed = call.mended.failures.keys() if call.mended is not None else ()
                if call.command == "step":
                    self.calls.stepped(frozenset(failed), of_call)
        arrays = self._gather_arrays(by_buffer, env_ids)
        dynamic = [[values[env_index][index] for env_index in env_ids] for index in range(len(self.layout.dynamic))]
        observations = self.layout.assemble(arrays[:-3], dynamic)
        ids = np.array(env_ids, dtype=np.int64)
        infos = infos_.of_rows(entries, env_ids)
        infos["env_id"] = ids
        return StepBatch(ids, observations, arrays[-3], arrays[-2], arrays[-1], infos)

    def _gather_arrays(self, by_buffer: dict[int, list[int]], env_ids: list[int]) -> list[npt.NDArray[Any]]:
        """Copies of the rows of all arrays of a buffer."""
        if len(by_buffer) == 1:
            (buffer,) = by_buffer
            return [array.take(env_ids, axis=0) for array in self._buffer(buffer).arrays()]
        position = {env_index: row for row, env_index in enumerate(env_ids)}
        gathered = [np.empty((len(env_ids), *a.shape[1:]), a.dtype) for a in self._buffer(HOME).arrays()]
        for buffer, of_buffer in by_buffer.items():
            rows = [position[env_index] for env_index in of_buffer]
            for array, source in zip(gathered, self._buffer(buffer).arrays(), strict=True):
                array[rows] = source[of_buffer]
        return gathered

    def _ended_of(self, batch: StepBatch) -> Sequence[int]:
        if not self._waits_for_reset:
            return ()
        ended: list[int] = batch.env_ids[batch.terminations | batch.truncations].tolist()
        return ended

    def _failures(self, command: str, by_call: Iterable[tuple[PendingCall, Sequence[int]]]) -> Exception | None:
        """What to raise for these envs of some calls, which need a reset then; `None` if they did not fail."""
        records: list[FailureRecord] = []
        exceptions: list[Exception] = []
        rebuilt: list[int] = []
        for call, env_ids in by_call:
            if call.mended is not None and call.mended.is_needed:
                rebuilt += env_ids
                continue
            of_call = [record for _, reply in self._said(call) for record in reply.failures]
            of_envs = [record for record in of_call if record.env_index in env_ids]
            if of_envs and of_envs[0].kind is Failed.REFUSED:
                self.states.settle_one(call.seq, env_ids[0], True, self._waits_for_reset)
                exceptions.append(ResetNeeded(call.command, env_ids, "ended its episode"))
            else:
                records += of_envs
        for record in records:
            self.states.break_(record.env_index, f"failed in {record.command}")
        given_up = self._crash_loops(rebuilt) if rebuilt else []
        for env_index in [env_index for error in given_up for env_index in error.env_ids]:
            self.states.break_(env_index, GIVEN_UP)
        exceptions += given_up
        if records:
            exceptions.append(as_one_exception(command, records))
        return _one_or_group(command, exceptions) if exceptions else None

    # ---- what is told of it

    def statistics(self) -> VectorStatistics:
        """See `AsyncVectorEnv.statistics`."""
        last: list[float] = []
        mean: list[float] = []
        for worker in self.pool.workers:
            times = worker.times
            for row in range(len(worker.env_ids)):
                seconds, total, count = times[TIMES_PER_ROW * row + 1 : TIMES_PER_ROW * row + 4]
                last.append(seconds)
                mean.append(total / count if count else 0.0)
        env_seconds, busy = self.pool.env_seconds(), self.calls.busy_seconds
        mending = self.calls.mending
        return VectorStatistics(
            steps=self._num_steps,
            env_seconds=env_seconds,
            waiting_seconds=busy,
            overhead=max(0.0, 1 - env_seconds / (busy * len(self.pool.workers) * self._threads)) if busy else 0.0,
            env_last_seconds=tuple(last),
            env_mean_seconds=tuple(mean),
            pending=tuple(pending for _, pending in self.pool.pending()),
            restarts=0 if mending is None else mending.restarts.total,
        )

    # ---- rows

    def _rows_of(self, call: PendingCall) -> Buffer:
        """Where the rows of a call are."""
        if call.saved:
            call.kept = self._ring.home() if call.kept is None else call.kept
            for index, saved in call.saved.items():
                own = self.pool.workers[index].env_ids
                for array, rows in zip(call.kept.arrays(), saved.arrays(), strict=True):
                    array[own.start : own.stop] = rows
            call.saved = {}
        return self._buffer(call.buffer) if call.kept is None else call.kept

    def _said(self, call: PendingCall) -> list[Answered]:
        """The replies that say something, with the envs of their rows."""
        return self._with_envs(call, self.calls.read(call))

    def _with_envs(self, call: PendingCall, replies: list[BatchReply | None]) -> list[Answered]:
        if not replies:
            return []
        workers = self.pool.workers
        return [
            (call.answered_by(workers[index].env_ids), reply)
            for index, reply in zip(sorted(call.payloads), replies, strict=True)
            if reply is not None
        ]

    def _answers(self, call: PendingCall, replies: list[BatchReply | None]) -> list[Answered]:
        """The same of replies that were read; rows that came in them go into the buffer."""
        answers = self._with_envs(call, replies)
        for env_ids, reply in answers:
            if reply.arrays:  # no memory is shared
                rows = slice(env_ids.start, env_ids.stop) if isinstance(env_ids, range) else env_ids
                for array, sent in zip(self._rows_of(call).arrays(), reply.arrays, strict=True):
                    array[rows] = sent
        return answers

    def _rows(
        self, call: PendingCall, env_ids: Sequence[int], buffer: Buffer
    ) -> tuple[list[list[Any]], dict[int, dict[str, Any]]]:
        """Of some envs of a call: the values of the leaves without a fixed size, and the infos of those that have one.

        The rest is in the buffer then.
        """
        if call.mended is not None and call.mended.is_needed:
            dynamic, entries = self._complete(call, call.mended, env_ids, buffer)
            return [[column[env_index] for env_index in env_ids] for column in dynamic], entries
        wanted = set(env_ids)
        values: dict[int, list[Any]] = {}
        entries = {}
        for answered, reply in self._said(call):
            if reply.infos:
                in_order = sorted(answered)
                of_envs = zip(in_order, infos_.as_dicts(in_order, reply.infos), strict=True)
                entries.update({env_index: info for env_index, info in of_envs if info and env_index in wanted})
            if reply.arrays or reply.dynamic:
                for position, env_index in enumerate(answered):
                    if env_index in wanted:
                        values[env_index] = [column[position] for column in reply.dynamic]
                        for array, sent in zip(buffer.arrays(), reply.arrays, strict=False):
                            array[env_index] = sent[position]
        dynamic = [[values[env_index][index] for env_index in env_ids] for index in range(len(self.layout.dynamic))]
        return dynamic, entries

    def _complete(
        self, call: PendingCall, mended: Mended, env_ids: Sequence[int] | None, buffer: Buffer
    ) -> tuple[list[list[Any]], dict[int, dict[str, Any]]]:
        """Completes the rows of these envs, or of all, in a call in which some failed; see `FailedRows.complete`."""
        assert self._failed_rows is not None  # noqa: S101
        own = [worker.env_ids for worker in self.pool.workers]
        return self._failed_rows.complete(mended, call.resets, self._said(call), own, buffer, env_ids)


def _by_call(chosen: Iterable[tuple[int, PendingCall]]) -> list[tuple[PendingCall, list[int]]]:
    """The envs of each call."""
    by_call: dict[int, tuple[PendingCall, list[int]]] = {}
    for env_index, call in chosen:
        by_call.setdefault(call.seq, (call, []))[1].append(env_index)
    return list(by_call.values())


def _one_or_group(command: str, exceptions: Sequence[Exception]) -> Exception:
    if len(exceptions) == 1:
        return exceptions[0]
    return ExceptionGroup(f"{len(exceptions)} failures in {command}", exceptions)
