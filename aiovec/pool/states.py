"""The states of envs, and every rule by which they change.

    idle ──step, reset──▶ awaited ──answered──▶ idle
      │                      │  │
      │                      │  └──failed──▶ broken ──reset──▶ awaited
      │                      └──cancelled──▶ owed ───reset──▶ awaited
      └──send──▶ owed ──recv──▶ idle, or broken

An illegal transition raises, and nothing happens. No I/O, no `await`, no other place that changes a state.
Whole batches are the step path: they cost the same for 2 envs and for 4096.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from aiovec.errors import AlreadyPendingCallError, ResetNeeded

__all__ = ["EnvState", "EnvStates"]

_NEW = "not been reset yet"
_ENDED = "ended its episode, and autoreset is disabled"
_ENDED_ALONE = "ended its episode"


class EnvState(enum.IntEnum):
    """What is true of one env."""

    IDLE = 0
    AWAITED = 1  # a live task waits for its answer
    OWED = 2  # the task that waited was cancelled; the answer is there or not yet
    BROKEN = 3  # it must be reset before it can step


# As plain integers: the names of an enumeration cost 0.5 µs each to look up, on the path of single envs.
_IDLE, _AWAITED, _OWED, _BROKEN = map(int, EnvState)


class EnvStates:
    """The states of all envs of a vector; none of them has been reset yet.

    Args:
        num_envs: How many.
    """

    def __init__(self, num_envs: int) -> None:
        self.num_envs: int = num_envs
        self._states = np.full(num_envs, _BROKEN, dtype=np.uint8)
        self._reasons = dict.fromkeys(range(num_envs), _NEW)
        self._callers = np.zeros(num_envs, dtype=np.int64)  # the number of the call that has or had each env
        self._observed = np.zeros(num_envs, dtype=np.bool_)  # whether it ever gave an observation
        self._is_all_observed = False
        self._repeated: dict[int, frozenset[int]] = {}  # by call: envs whose row its answer repeats
        self._ended_alone: set[int] = set()  # idle, and to be reset by the next batch
        # The step path: while all envs are idle, or all awaited by one call, only this says so. The arrays hold
        # what they held before until `_spread` writes it out, and everything that reads them calls that first.
        self._all_idle = False
        self._caller_of_all = 0  # the number of a call that has all envs, else 0

    def __repr__(self) -> str:
        self._spread()
        counts = ", ".join(f"{np.count_nonzero(self._states == state)} {state.name.lower()}" for state in EnvState)
        return f"<EnvStates {counts}>"

    def of(self, env_index: int) -> EnvState:
        """The state of one env."""
        self._spread()
        return EnvState(self._states[env_index])

    def begin_step(self, seq: int, command: str) -> None:
        """All envs: idle → awaited.

        Raises:
            AlreadyPendingCallError: Some are awaited or owed.
            ResetNeeded: Some are broken.
        """
        if not self._all_idle:
            self._spread()
            self._refuse_busy(command, (_AWAITED, _OWED), None)
            self._refuse_broken(command, range(self.num_envs))
            self._ended_alone.clear()
        self._begin_all(seq)

    def begin_reset(self, seq: int, command: str, env_ids: Sequence[int] | None, repeated: Sequence[int] = ()) -> None:
        """All envs, or some: idle, owed or broken → awaited. What is owed to them is thereby discarded.

        Others may be part of the answer, which repeats their last row: until it is taken, no call may write that.

        Raises:
            AlreadyPendingCallError: Some are awaited.
        """
        self.check_reset(command, env_ids)
        if env_ids is None:
            self._reasons.clear()
            self._ended_alone.clear()
            self._begin_all(seq)
            return
        self._ended_alone.difference_update(env_ids)
        if repeated:
            self._repeated[seq] = frozenset(repeated)
        self._all_idle = False
        self._caller_of_all = 0
        self._states[env_ids] = _AWAITED
        self._callers[env_ids] = seq
        for env_index in env_ids:
            self._reasons.pop(env_index, None)

    def check_idle(self, command: str, env_ids: Sequence[int]) -> None:
        """Whether these envs may be stepped.

        Raises:
            AlreadyPendingCallError: Some are awaited or owed.
            ResetNeeded: Some are broken.
        """
        self._spread()
        states = self._states
        if (states[env_ids[0]] if len(env_ids) == 1 else states[env_ids].any()) or self._repeated:
            self._refuse_busy(command, (_AWAITED, _OWED), env_ids)
            self._refuse_broken(command, env_ids)

    def begin_send(self, first_seq: int, command: str, env_ids: Sequence[int]) -> None:
        """Some envs: idle → owed, each to a call of its own, in order; raises what `check_idle` raises."""
        self.check_idle(command, env_ids)
        self._all_idle, self._caller_of_all = False, 0
        ids = np.array(env_ids)
        self._states[ids] = _OWED
        self._callers[ids] = np.arange(first_seq, first_seq + len(ids))
        if self._ended_alone:
            self._ended_alone.difference_update(env_ids)

    def begin_one(self, seq: int, command: str, env_index: int) -> None:
        """One env that is stepped by itself: idle → awaited.

        Raises:
            AlreadyPendingCallError: It is awaited or owed.
            ResetNeeded: It is broken, or ended its episode the last time it was stepped by itself.
        """
        self.check_idle(command, [env_index])
        if env_index in self._ended_alone:
            raise ResetNeeded(command, [env_index], _ENDED_ALONE)
        self._all_idle, self._caller_of_all = False, 0
        self._states[env_index] = _AWAITED
        self._callers[env_index] = seq

    def begin_part(self, seq: int, env_ids: Sequence[int]) -> None:
        """These envs, as far as they are idle, → awaited."""
        self._spread()
        self._all_idle, self._caller_of_all = False, 0
        ids = np.array(env_ids)
        ids = ids[self._states[ids] == _IDLE]
        self._states[ids] = _AWAITED
        self._callers[ids] = seq

    def hand_over(self, seq: int, env_ids: Sequence[int]) -> int:
        """These envs are awaited by another call from now on; returns the number of the one that they were awaited by."""
        self._spread()
        self._all_idle = False
        caller, self._caller_of_all = self._caller_of_all or int(self._callers[env_ids[0]]), 0
        ids = np.array(env_ids)
        self._callers[ids[self._states[ids] == _AWAITED]] = seq
        return caller

    def settle_one(self, seq: int, env_index: int, has_ended: bool, waits_for_reset: bool) -> None:
        """The answer of an env that was stepped by itself was taken: awaited or owed → idle, or broken where nobody resets it.

        Args:
            seq: The call.
            env_index: The env.
            has_ended: Whether its episode has. Only a batch goes on after that, and resets it.
            waits_for_reset: Whether batches do not reset it either.
        """
        if self._states[env_index] not in (_AWAITED, _OWED) or self._callers[env_index] != seq:
            return  # its worker died behind the answer
        self._states[env_index] = _IDLE
        self._observed[env_index] = True
        if has_ended and waits_for_reset:
            self._states[env_index] = _BROKEN
            self._reasons[env_index] = _ENDED
        elif has_ended:
            self._ended_alone.add(env_index)

    def take(self, env_ids: Sequence[int], ended: Sequence[int] = ()) -> None:
        """Their rows were collected: owed → idle, or broken where an episode ended that nobody resets but the user."""
        self._spread()
        self._all_idle, self._caller_of_all = False, 0
        taken = np.asarray(env_ids)
        owed = taken[self._states[taken] == _OWED]
        self._states[owed] = _IDLE
        self._observed[owed] = True
        for env_index in ended:
            self._states[env_index] = _BROKEN
            self._reasons[env_index] = _ENDED

    def check_reset(self, command: str, env_ids: Sequence[int] | None) -> None:
        """Whether `begin_reset` may be called; raises what it raises."""
        self._spread()
        self._refuse_busy(command, (_AWAITED,), env_ids)

    def check_repeatable(self, command: str, env_ids: Sequence[int]) -> None:
        """Refuses envs that are busy or have no observation yet, where a call repeats their last one."""
        self._spread()
        self._refuse_busy(command, (_AWAITED, _OWED), env_ids)
        unknown = [index for index in env_ids if not self._observed[index]]
        if unknown:
            reason = "not in the reset_mask, but without an observation to repeat"
            raise ResetNeeded(command, unknown, f"{'is' if len(unknown) == 1 else 'are'} {reason}")

    def settle(self, seq: int, failed: Mapping[int, str], ended: Sequence[int] = ()) -> None:
        """The answer was taken: awaited → idle, except those that need a reset → broken.

        Args:
            seq: The call.
            failed: Envs with why a reset is needed; they have no observation to repeat.
            ended: Envs whose episode ended, where nobody resets them but the user.
        """
        if self._caller_of_all == seq and not failed and not ended:
            if not self._is_all_observed:
                self._observed.fill(True)
                self._is_all_observed = True
            self._all_idle, self._caller_of_all = True, 0
            return
        self._spread()
        self._repeated.pop(seq, None)
        self._caller_of_all = 0
        mine = self._mine(seq, _AWAITED)
        self._states[mine] = _IDLE
        self._observed |= mine
        for env_index in ended:
            if mine[env_index]:
                self._states[env_index] = _BROKEN
                self._reasons[env_index] = _ENDED
        for env_index, reason in failed.items():
            if self._callers[env_index] == seq:
                self.break_(env_index, reason)
        self._all_idle = not self._states.any()

    def abandon(self, seq: int, answered: Sequence[int] = ()) -> None:
        """The waiting task is gone: awaited → owed, and those that count as answered → idle."""
        self._spread()
        self._repeated.pop(seq, None)
        self._caller_of_all = 0
        mine = self._mine(seq, _AWAITED)
        self._states[mine] = _OWED
        for env_index in answered:
            if mine[env_index]:
                self._states[env_index] = _IDLE

    def undo(self, seq: int) -> None:
        """The call asks for nothing, or for nothing more: awaited → idle; whoever had no observation has none."""
        if self._caller_of_all == seq:
            self._all_idle, self._caller_of_all = True, 0
            return
        self._spread()
        self._states[self._mine(seq, _AWAITED)] = _IDLE
        self._all_idle = not self._states.any()

    def interrupt(self, seq: int) -> None:
        """Nobody will take the answer of this call, or any of it: awaited → broken."""
        self._spread()
        self._repeated.pop(seq, None)
        for env_index in np.flatnonzero(self._mine(seq, _AWAITED)).tolist():
            self.break_(env_index, "did not end: the call was interrupted")

    def break_(self, env_index: int, reason: str) -> None:
        """One env → broken, whatever it was."""
        self._spread()
        self._states[env_index] = _BROKEN
        self._reasons[env_index] = reason
        self._observed[env_index] = False
        self._is_all_observed = False
        self._all_idle = False
        self._caller_of_all = 0

    def forget(self, env_ids: Sequence[int]) -> None:
        """These have no observation to repeat until their next answer."""
        self._observed[env_ids] = False
        self._is_all_observed = False

    def owed_to(self, seq: int) -> list[int]:
        """The envs that this call still owes."""
        self._spread()
        owed: list[int] = np.flatnonzero(self._mine(seq, _OWED)).tolist()
        return owed

    def asked_by(self, seq: int) -> list[int]:
        """The envs whose last call this is, or was."""
        self._spread()
        asked: list[int] = np.flatnonzero(self._callers == seq).tolist()
        return asked

    def is_owed(self, env_index: int, seq: int | None = None) -> bool:
        """Whether an env is owed, by any call or by this one."""
        self._spread()
        return bool(self._states[env_index] == _OWED and (seq is None or self._callers[env_index] == seq))

    def is_busy(self, env_index: int) -> bool:
        """Whether an env is awaited or owed."""
        self._spread()
        return self._states[env_index] in (_AWAITED, _OWED)

    def num_owed(self, others: Sequence[int] = ()) -> int:
        """How many envs are owed, or are one of these others."""
        self._spread()
        owed = self._states == _OWED
        if others:
            owed[others] = True
        return int(np.count_nonzero(owed))

    def _mine(self, seq: int, state: int) -> npt.NDArray[np.bool_]:
        mine: npt.NDArray[np.bool_] = (self._callers == seq) & (self._states == state)
        return mine

    def _begin_all(self, seq: int) -> None:
        self._all_idle, self._caller_of_all = False, seq

    def _spread(self) -> None:
        """Writes out what holds for all envs into the state of each."""
        if self._all_idle:
            self._states.fill(_IDLE)
        elif self._caller_of_all:
            self._states.fill(_AWAITED)
            self._callers.fill(self._caller_of_all)

    def _refuse_busy(self, command: str, states: tuple[int, ...], env_ids: Sequence[int] | None) -> None:
        if self._all_idle:
            return
        repeated = [env_index for of_call in self._repeated.values() for env_index in of_call]
        busy = np.isin(self._states, states)
        busy[repeated] = True
        if env_ids is not None:
            chosen = np.zeros_like(busy)
            chosen[env_ids] = True
            busy &= chosen
        if busy.any():
            ids = np.flatnonzero(busy)
            awaited = ids[(self._states[ids] == _AWAITED) | np.isin(ids, repeated)]
            owed = not len(awaited)
            raise AlreadyPendingCallError(command, (ids if owed else awaited).tolist(), owed)

    def _refuse_broken(self, command: str, env_ids: Iterable[int]) -> None:
        all_broken = np.flatnonzero(self._states == _BROKEN).tolist()
        broken = sorted(set(all_broken).intersection(env_ids)) if all_broken else ()
        if broken:
            reason = self._reasons[broken[0]]
            same = [index for index in broken if self._reasons[index] == reason]
            raise ResetNeeded(
                command, same, f"{'has' if len(same) == 1 else 'have'} {reason}" if reason == _NEW else reason
            )
