"""Rollouts: many steps in a row, whose policy is called here, and whose rows the workers write where they stay.

A rollout is one call of the whole vector: all envs are awaited from its beginning to its end. Within it each group of
envs is stepped by calls of its own, and as soon as one group has been asked for its next step, the policy turns to
the next group: with two groups a worker that ends one finds the actions of the other waiting.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode

from aiovec.batches import Batches, InfoParts
from aiovec.errors import InvalidActionsError
from aiovec.exchange import infos as infos_
from aiovec.exchange.actions import ActionColumns
from aiovec.exchange.groups import EVERY_ENV, group_code, split_evenly
from aiovec.exchange.layout import Layout
from aiovec.exchange.messages import BatchReply
from aiovec.exchange.slab import StripArrays
from aiovec.extras import Extras
from aiovec.pool.pending_call import PendingCall
from aiovec.pool.pinning import pin
from aiovec.pool.threads import in_thread

__all__ = ["Collector", "Policy", "Rollout", "Rollouts"]

Policy = Callable[[Any], Any | Awaitable[Any]]


@dataclass(frozen=True, eq=False)
class Rollout:
    """Steps `0 … T-1` of all `N` envs, and what they began with; yours to keep, and to write into.

    Step `t` was taken at `observations[t]`, by `actions[t]`, and led to `observations[t + 1]`. The arrays over `T` and
    `N` are the memory that the workers wrote, which is used again once the last of them is gone.

    Attributes:
        observations: `[T + 1, N, *single_observation_space.shape]`, dtype of the space; nested for `Dict` and `Tuple`.
            Leaves without a fixed size: a tuple of `T + 1` batches.
        actions: `[T, N, *single_action_space.shape]`, dtype of the space, and nested likewise.
        rewards: `[T, N]`, float64.
        terminations: `[T, N]`, bool.
        truncations: `[T, N]`, bool.
        infos: `T` dicts, each as `step` gives it.
        extras: What the policy gave beside the actions, in its structure, each leaf an array `[T, N, …]`; or `None`.
        autoresets: `[T, N]`, bool: rows that are no step of an episode, but the reset behind it (only under
            `NEXT_STEP`): the action was ignored, and nothing is to be learned from them.
        episode_returns: `[episodes]`, float64: sums of rewards of the episodes that ended, by step, then by env; also
            of those that began in rollouts before this one.
        episode_lengths: `[episodes]`, int64: their numbers of steps.
    """

    observations: Any
    actions: Any
    rewards: npt.NDArray[np.float64]
    terminations: npt.NDArray[np.bool_]
    truncations: npt.NDArray[np.bool_]
    infos: tuple[dict[str, Any], ...]
    extras: Any
    autoresets: npt.NDArray[np.bool_]
    episode_returns: npt.NDArray[np.float64]
    episode_lengths: npt.NDArray[np.int64]

    def __repr__(self) -> str:
        steps, envs = self.rewards.shape
        return f"<Rollout num_steps={steps} num_envs={envs} episodes={len(self.episode_returns)}>"


class _Group:
    """Envs that are stepped together: of each worker some, in contiguous rows."""

    def __init__(self, code: int, env_ids: list[int] | None, num_envs: int, is_last: bool) -> None:
        self.code = code
        self.is_last = is_last  # of each step
        self.env_ids = env_ids
        self.array = None if env_ids is None else np.array(env_ids)
        self.every_env = range(num_envs) if env_ids is None else env_ids
        self.call: PendingCall | None = None  # its step, as long as nobody has taken the answer
        self.dynamic: list[list[Any]] = []  # of its last observations, what has no fixed size


class Rollouts(AsyncIterator[Rollout]):
    """What `AsyncVectorEnv.rollouts` gives: each is collected while the one before it is used.

    Whoever leaves the loop over it, by whatever way, cancels what is being collected.

    Args:
        collect: Begins the next one.
        left: Called with one that was cancelled, and has not ended yet.
    """

    def __init__(
        self, collect: Callable[[], asyncio.Task[Rollout]], left: Callable[[asyncio.Task[Rollout]], object]
    ) -> None:
        self._collect = collect
        self._left = left
        self._collecting: asyncio.Task[Rollout] | None = None
        self._has_ended = False

    def __repr__(self) -> str:
        return f"<Rollouts {'ended' if self._has_ended else 'going on'}>"

    async def __anext__(self) -> Rollout:
        if self._has_ended:
            raise StopAsyncIteration
        if self._collecting is None:
            self._collecting = self._collect()
        try:
            await asyncio.wait([self._collecting])
            ready = [self._collecting.result()]  # a list: who is given a rollout is to be the only one who holds it
        except BaseException:
            await self.aclose()
            raise
        self._collecting = self._collect()
        return ready.pop()

    async def aclose(self) -> None:
        """Cancels what is being collected, and waits for its end."""
        collecting = self._leave()
        if collecting is not None:
            await asyncio.wait([collecting])

    def _leave(self) -> asyncio.Task[Rollout] | None:
        self._has_ended = True
        collecting, self._collecting = self._collecting, None
        if collecting is None or collecting.done():
            if collecting is not None and not collecting.cancelled():
                collecting.exception()  # nobody asks for it any more
            return None
        collecting.add_done_callback(lambda task: task.cancelled() or task.exception())
        collecting.cancel()
        self._left(collecting)
        return collecting

    def __del__(self) -> None:
        if self._collecting is None:
            return
        loop = self._collecting.get_loop()
        if asyncio._get_running_loop() is loop:  # noqa: SLF001  get_running_loop raises
            self._leave()
        elif not loop.is_closed():  # the collector runs in another thread
            loop.call_soon_threadsafe(self._collecting.cancel)


class Collector:
    """Collects one rollout of a started vector.

    Args:
        batches: The vector.
        copy: See `AsyncVectorEnv`.
        mode: The autoreset mode.
        num_steps: How many.
        num_groups: How many groups of envs are stepped in turn.
    """

    def __init__(
        self, batches: Batches, copy: bool | None, mode: AutoresetMode, num_steps: int, num_groups: int
    ) -> None:
        self._batches = batches
        self._layout = batches.layout
        self._actions = batches.actions
        self._num_envs = batches.num_envs
        self._may_lend_home = copy is False
        self._resets_next = mode is AutoresetMode.NEXT_STEP
        self._num_steps = num_steps
        self._groups = self._split(num_groups)
        self._is_plain = self._layout.is_array and not batches.keeps_observations  # nothing but what is in the slab
        # Then a batch of actions is a tuple itself, and nobody could tell it from a pair.
        self._is_tuple = isinstance(self._actions.layout.batch_space(1), gym.spaces.Tuple)
        self._extras = Extras(num_steps, self._num_envs)
        self._infos: list[dict[str, Any]] = []
        # What has no fixed size: for each leaf a batch a step.
        self._dynamic: list[list[Any]] = [[] for _ in self._layout.dynamic]
        self._dynamic_actions: list[list[Any]] = [[] for _ in self._actions.layout.dynamic]
        # Of the step that is being taken, or asked, group by group.
        self._parts: InfoParts = []
        self._columns: list[list[Any]] = [[None] * self._num_envs for _ in self._layout.dynamic]
        self._action_columns: list[list[Any]] = [[None] * self._num_envs for _ in self._actions.layout.dynamic]

    def __repr__(self) -> str:
        return f"<Collector num_steps={self._num_steps} num_groups={len(self._groups)}>"

    def _split(self, num_groups: int) -> list[_Group]:
        if num_groups == 1:
            return [_Group(EVERY_ENV, None, self._num_envs, is_last=True)]
        by_group: list[list[int]] = [[] for _ in range(num_groups)]
        for worker in self._batches.pool.workers:
            for index, rows in enumerate(split_evenly(len(worker.env_ids), num_groups)):
                by_group[index] += worker.env_ids[rows.start : rows.stop]
        return [
            _Group(group_code(index, num_groups), env_ids, self._num_envs, is_last=index == num_groups - 1)
            for index, env_ids in enumerate(by_group)
        ]

    async def collect(self, policy: Policy, pin_memory: bool) -> Rollout:
        """See `AsyncVectorEnv.rollout`."""
        batches, groups = self._batches, self._groups
        answered = batches.calls.answered
        batches.check_rollout()
        lease = await batches.pool.lease(self._num_steps)
        if pin_memory:
            await in_thread(pin, batches.pool.memory_of(lease))
        arrays, copies = lease.arrays, lease.is_home and not self._may_lend_home
        seq = batches.begin_rollout()
        try:
            self._begin(await batches.observe(lease))
            for step in range(self._num_steps):
                for group in groups:
                    if group.call is not None:
                        self._take(group, await answered(group.call))
                    given = policy(self._seen(arrays, group, step, copies))
                    if type(given) is not np.ndarray and inspect.isawaitable(given):
                        given = await given
                    rows = self._act(arrays, group, step, given)
                    group.call = batches.calls.post_group(group.code, group.env_ids, step, rows, lease)
            for group in groups:
                assert group.call is not None  # noqa: S101
                self._take(group, await answered(group.call))
        except BaseException:
            batches.give_up_rollout(seq, [group.call for group in groups if group.call is not None])
            raise
        batches.end_rollout(seq)
        if copies:
            arrays = await in_thread(_copied, arrays, self._num_steps)
        return self._rollout(arrays)

    # ---- within it

    def _begin(self, dynamic: list[list[Any]]) -> None:
        """Takes what of the first observations is not in the slab."""
        _put(self._columns, dynamic, range(self._num_envs))
        self._add_batches(self._layout, self._dynamic, self._columns)
        for group in self._groups:
            group.dynamic = [[column[env_index] for env_index in group.every_env] for column in dynamic]

    def _take(self, group: _Group, replies: list[BatchReply | None]) -> None:
        """Takes the answer to a group's step; raises what failed in it."""
        call, group.call = group.call, None
        assert call is not None  # noqa: S101
        if self._is_plain and not replies:  # the step path: nobody has anything to say
            self._batches.group_done(call, len(group.every_env))
        else:
            group.dynamic, parts = self._batches.calls.completed(call, self._batches.group_result, replies)
            self._parts += parts
            _put(self._columns, group.dynamic, group.every_env)
        if group.is_last:
            self._infos.append(infos_.merge(sorted(self._parts, key=_first_env), self._num_envs) if self._parts else {})
            self._parts.clear()
            self._add_batches(self._layout, self._dynamic, self._columns)

    def _add_batches(self, layout: Layout, batches: list[list[Any]], columns: list[list[Any]]) -> None:
        """Adds what has no fixed size of one step, now that all groups have it."""
        for leaf, of_leaf, column in zip(layout.dynamic, batches, columns, strict=True):
            of_leaf.append(leaf.batch_dynamic(column.copy()))

    def _seen(self, arrays: StripArrays, group: _Group, step: int, copies: bool) -> Any:
        """What the policy is shown."""
        if self._is_plain:
            whole = arrays.observations[0][step]
            if group.array is not None:
                return whole.take(group.array, axis=0)
            return whole.copy() if copies else whole
        rows = [array[step] for array in arrays.observations]
        if group.array is not None:
            rows = [array.take(group.array, axis=0) for array in rows]
        elif copies:
            rows = [array.copy() for array in rows]
        return self._layout.assemble(rows, group.dynamic)

    def _act(self, arrays: StripArrays, group: _Group, step: int, given: Any) -> dict[int, Any] | None:
        """Takes what the policy gave; where actions do not travel in the slab, returns the requests that bear them."""
        batches, layout = self._batches, self._actions.layout
        actions: Any = given
        extras: Any = None
        targets = [array[step] for array in arrays.actions]
        try:
            if isinstance(given, tuple) or self._is_tuple:
                actions, extras = _pair(given, self._is_tuple)
            if extras is not None or self._extras.are_expected:
                self._extras.store(step, group.array, extras)
            dynamic = self._actions.store(actions, targets, group.array)
        except InvalidActionsError as error:
            if step or group is not self._groups[0]:
                raise error.behind_others() from error.__cause__
            raise
        if not dynamic:
            return None if batches.pool.shared else self._columns_apart(targets, group)
        _put(self._action_columns, dynamic, group.every_env)
        if group.is_last:
            self._add_batches(layout, self._dynamic_actions, self._action_columns)
        rows = dict(zip(group.every_env, self._actions.rows(targets, dynamic, group.every_env), strict=True))
        own = {worker.index: set(worker.env_ids).intersection(rows) for worker in batches.pool.workers}
        return batches.calls.prepare({index: [rows[i] for i in sorted(env_ids)] for index, env_ids in own.items()})

    def _columns_apart(self, targets: Sequence[npt.NDArray[Any]], group: _Group) -> dict[int, Any]:
        """Requests with the actions, for workers that have not the slab."""
        chosen = set(group.every_env)
        messages: dict[int, Any] = {}
        for worker in self._batches.pool.workers:
            own = [env_index for env_index in worker.env_ids if env_index in chosen]
            messages[worker.index] = ActionColumns([array.take(own, axis=0) for array in targets])
        return self._batches.calls.prepare(messages)

    # ---- at its end

    def _rollout(self, arrays: StripArrays) -> Rollout:
        stop = self._num_steps + 1
        ended = arrays.terminations[:stop] | arrays.truncations[:stop]
        # The flag of what it began with tells whether the first step is an autoreset.
        autoresets = ended[:-1] if self._resets_next else np.zeros_like(ended[:-1])
        returns, lengths = self._batches.episodes.add(arrays.rewards[1:stop], ended[1:], autoresets)
        return Rollout(
            _nested(self._layout, [array[:stop] for array in arrays.observations], self._dynamic),
            _nested(self._actions.layout, [array[: stop - 1] for array in arrays.actions], self._dynamic_actions),
            arrays.rewards[1:stop],
            arrays.terminations[1:stop],
            arrays.truncations[1:stop],
            tuple(self._infos),
            self._extras.result(),
            autoresets,
            returns,
            lengths,
        )


def _pair(given: Any, is_always: bool) -> tuple[Any, Any]:
    if not isinstance(given, tuple) or len(given) != 2:
        expected = "a pair of actions and extras" if is_always else "a batch of actions, or a pair of it and extras"
        got = f"a tuple of length {len(given)}" if isinstance(given, tuple) else f"a {type(given).__name__}"
        raise InvalidActionsError("what the policy gave", expected, got)
    actions, extras = given
    return actions, extras


def _first_env(part: tuple[Sequence[int], Any]) -> int:
    return part[0][0]


def _put(columns: Sequence[list[Any]], values: Sequence[Sequence[Any]], env_ids: Sequence[int]) -> None:
    for column, of_leaf in zip(columns, values, strict=True):
        for env_index, value in zip(env_ids, of_leaf, strict=True):
            column[env_index] = value


def _nested(layout: Layout, fixed: Sequence[npt.NDArray[Any]], dynamic: Sequence[Sequence[Any]]) -> Any:
    """The space's structure over all steps."""
    arrays, batches = iter(fixed), iter(dynamic)
    return layout.structure([next(arrays) if leaf.fixed else tuple(next(batches)) for leaf in layout.leaves])


def _copied(arrays: StripArrays, num_steps: int) -> StripArrays:
    """Those of a strip that is not lent, as far as the rollout has used it."""
    stop = num_steps + 1
    return StripArrays(
        [array[:stop].copy() for array in arrays.observations],
        arrays.rewards[:stop].copy(),
        arrays.terminations[:stop].copy(),
        arrays.truncations[:stop].copy(),
        [array[:num_steps].copy() for array in arrays.actions],
    )
