"""A rollout is what as many steps would have given: in observations, rewards, flags, infos, and in what goes on after it."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, product
from typing import Any

import numpy as np
import pytest
from async_envs import AsyncCounter
from conformance.comparing import CELLS, AwaitedSync, EnvFn, assert_same, cell_arguments, loops_in_turn
from conformance.test_ownership import checksums
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from sample_envs import Counter
from space_envs import (
    ACTION_SPACES,
    OBSERVATION_SPACES,
    RARE_SPACES,
    ImageEnv,
    InfoEnv,
    InfoSizesEnv,
    Recorder,
    ReusingEnv,
    SpaceEnv,
)

import aiovec

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

MODES = (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP)
SPACES = OBSERVATION_SPACES | RARE_SPACES


def at(space: spaces.Space[Any], values: Any, step: int) -> Any:
    """One step of what a rollout has over all steps."""
    if isinstance(space, spaces.Dict):
        return {key: at(subspace, values[key], step) for key, subspace in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(at(subspace, value, step) for subspace, value in zip(space.spaces, values, strict=True))
    return values[step]


def groups_of(envs: aiovec.AsyncVectorEnv, groups: int) -> list[list[int]]:
    """The envs of each group, as the documentation says."""
    env_ids: list[list[int]] = [[] for _ in range(groups)]
    workers = np.array_split(np.arange(envs.num_envs), max(envs.num_workers, 1))
    for own in workers:
        for group, part in enumerate(np.array_split(own, groups)):
            env_ids[group] += part.tolist()
    return env_ids


def random_policy(envs: aiovec.AsyncVectorEnv, groups: int, seed: int = 3) -> Callable[[Any], Any]:
    """Actions that do not depend on what is observed; called for each group in turn."""
    generator = np.random.default_rng(seed)
    space: Any = envs.single_action_space
    sizes = cycle([len(env_ids) for env_ids in groups_of(envs, groups)])
    return lambda _observations: generator.integers(int(space.start), int(space.start + space.n), next(sizes))


async def assert_same_as_steps(sync: AwaitedSync, before: Any, rollout: aiovec.Rollout, where: str) -> Any:
    """Takes the steps of a rollout with `SyncVectorEnv`, compares, and gives the last observations."""
    space, action_space = sync.single_observation_space, sync.single_action_space
    assert_same(at(space, rollout.observations, 0), before, f"{where}: the first observations")
    for step in range(len(rollout.rewards)):
        *theirs, infos = await sync.step(at(action_space, rollout.actions, step))
        ours = (
            at(space, rollout.observations, step + 1),
            rollout.rewards[step],
            rollout.terminations[step],
            rollout.truncations[step],
        )
        assert_same(ours, tuple(theirs), f"{where}: step {step}")
        assert_same(rollout.infos[step], infos, f"{where}: infos of step {step}")
        before = copy.deepcopy(theirs[0])
    assert len(rollout.infos) == len(rollout.rewards)
    return before


async def compare(
    env_fns: Sequence[EnvFn], mode: AutoresetMode, cell: tuple[int, bool], groups: int, **kwargs: Any
) -> None:
    """Three rollouts behind one another, with a step and a masked reset between them."""
    where = f"{cell} groups={groups}"
    mask = np.arange(len(env_fns)) % 2 == 0
    async with contextlib.AsyncExitStack() as stack:
        sync = await stack.enter_async_context(AwaitedSync(env_fns, autoreset_mode=mode))
        envs = await stack.enter_async_context(
            aiovec.AsyncVectorEnv(env_fns, autoreset_mode=mode, **cell_arguments(*cell), **kwargs)
        )
        policy = random_policy(envs, groups)
        before, _ = await asyncio.to_thread(sync.envs.reset, seed=7)  # to draw its samples takes half a second
        await envs.reset(seed=7)
        for number, num_steps in enumerate((17, 1, 23)):
            rollout = await envs.rollout(policy, num_steps, groups=groups)
            before = await assert_same_as_steps(sync, before, rollout, f"{where}: rollout {number}")
            if number == 0:
                actions = np.full(len(env_fns), int(getattr(envs.single_action_space, "start", 0)))
                theirs = await sync.step(actions)
                assert_same(await envs.step(actions), theirs, f"{where}: step")
                before = copy.deepcopy(theirs[0])
            if number == 1:
                options = {"reset_mask": mask}
                before, infos = await sync.reset(options=dict(options), seed=3)
                assert_same(await envs.reset(options=options, seed=3), (before, infos), f"{where}: reset")
        assert repr(rollout).startswith(f"<Rollout num_steps=23 num_envs={len(env_fns)} ")


TABLE = [*product(OBSERVATION_SPACES, MODES), *zip(RARE_SPACES, cycle(MODES), strict=False)]


@loops_in_turn("number,name,mode", [(number, *case) for number, case in enumerate(TABLE)])
async def test_observation_space(number: int, name: str, mode: AutoresetMode) -> None:
    """Every space whole and in groups; numbers of workers, with and without shared memory, in turn."""
    env_fns = [partial(SpaceEnv, SPACES[name])] * 6
    await compare(env_fns, mode, CELLS[number % len(CELLS)], 1 + number // 2 % 2)
    await compare(env_fns, mode, CELLS[(number + 3) % len(CELLS)], 2)


@loops_in_turn("cell", product(CELLS))
async def test_cells(cell: tuple[int, bool]) -> None:
    """Every number of workers, with and without shared memory, in up to as many groups as a worker has envs."""
    for mode, groups in product(MODES, [1, 2, 3]):
        await compare([partial(SpaceEnv, SPACES["dict"])] * 9, mode, cell, groups)


@loops_in_turn("mode,groups,cell", zip(cycle(MODES), [1, 2, 2, 1, 2, 1, 1, 2], CELLS, strict=False))
@pytest.mark.parametrize("kind", [InfoEnv, InfoSizesEnv])
async def test_infos(kind: type, mode: AutoresetMode, groups: int, cell: tuple[int, bool]) -> None:
    """Of every kind, from both groups: one dict for each step."""
    await compare([partial(kind, env_index) for env_index in range(6)], mode, cell, groups)


@loops_in_turn("mode,copies", product(MODES, [None, True, False]))
async def test_large_observations(mode: AutoresetMode, copies: bool | None) -> None:
    """Nested too, from envs that reuse their arrays."""
    for nested, groups in product([False, True], [1, 2]):
        await compare([partial(ImageEnv, nested)] * 4, mode, (2, True), groups, copy=copies)


@loops_in_turn("mode,groups", product(MODES, [1, 2]))
async def test_restart_changes_nothing_where_nothing_fails(mode: AutoresetMode, groups: int) -> None:
    for cell in (CELLS[2], CELLS[5]):
        await compare([partial(SpaceEnv, SPACES["nested"])] * 4, mode, cell, groups, on_failure="restart")


@loops_in_turn("name", product(name for name in ACTION_SPACES if not name.endswith("no_items")))
async def test_action_space(name: str) -> None:
    """Each env receives its own action, of the space's types; `Rollout.actions` has all of them."""
    space = ACTION_SPACES[name]
    for number, cell in enumerate((CELLS[0], CELLS[4], CELLS[5], CELLS[2])):
        groups = 1 + number % 2
        async with (
            aiovec.AsyncVectorEnv([partial(Recorder, space, length=100)] * 4, **cell_arguments(*cell)) as envs,
            AwaitedSync([partial(Recorder, space, length=100)] * 4) as sync,
        ):
            sizes = [len(env_ids) for env_ids in groups_of(envs, groups)]
            batched = [batch_space(space, size) for size in sizes]
            for seed, of_group in enumerate(batched):
                of_group.seed(seed)
            turns = cycle(batched)

            def policy(_observations: Any, turns: Any = turns) -> Any:
                actions = next(turns).sample()
                return (actions, None) if isinstance(actions, tuple) else actions

            await envs.reset()
            rollout = await envs.rollout(policy, 5, groups=groups)
            await sync.reset()
            received = await envs.call("actions")
            for step in range(5):
                await sync.step(at(space, rollout.actions, step))
            assert_same(received, sync.call("actions"), f"{cell} groups={groups}")
            assert rollout.extras is None


@loops_in_turn("cell,groups", product(CELLS, [1, 2]))
async def test_the_policy_sees_what_the_rollout_has(cell: tuple[int, bool], groups: int) -> None:
    """Row by row, each group in turn; its extras lie where they belong. Also where it is awaited."""
    env_fns = [partial(Counter, 4 + env_index, env_index) for env_index in range(7)]
    async with aiovec.AsyncVectorEnv(env_fns, **cell_arguments(*cell)) as envs:
        await envs.reset()
        env_ids = groups_of(envs, groups)
        for is_async in (False, True):
            seen: list[Any] = []
            reused = [np.zeros(len(ids)) for ids in env_ids]

            def policy(observations: Any, seen: Any = seen, reused: Any = reused) -> Any:
                seen.append(observations)
                extras = reused[(len(seen) - 1) % groups]  # written anew in each step
                extras[...] = observations[:, 2] * 10
                actions = [int(observation[2]) % 3 for observation in observations]
                return actions, {"value": extras, "pair": (observations[:, :2], len(seen) * np.ones(len(extras)))}

            async def awaited(observations: Any, policy: Any = policy) -> Any:
                await asyncio.sleep(0)
                return policy(observations)

            rollout = await envs.rollout(awaited if is_async else policy, 20, groups=groups)
            for call, observations in enumerate(seen):
                step, group = divmod(call, groups)
                assert_same(observations, rollout.observations[step][env_ids[group]], f"call {call}")
                assert np.all(rollout.extras["pair"][1][step][env_ids[group]] == call + 1)
            assert_same(rollout.extras["value"], rollout.observations[:-1, :, 2].astype(float) * 10, "extras")
            assert_same(rollout.extras["pair"][0], rollout.observations[:-1, :, :2].copy(), "extras")
            assert rollout.actions.dtype == np.int64
            assert np.array_equal(rollout.actions, rollout.observations[:-1, :, 2] % 3)


@loops_in_turn("mode,cell", product(MODES, CELLS[2:5]))
async def test_which_rows_are_no_steps_and_what_episodes_gave(mode: AutoresetMode, cell: tuple[int, bool]) -> None:
    """Across the borders of rollouts; steps and resets in between begin the count anew."""
    lengths = (3, 4, 7, 30)
    env_fns = [partial(Counter, length) for length in lengths]
    async with aiovec.AsyncVectorEnv(env_fns, autoreset_mode=mode, **cell_arguments(*cell)) as envs:
        await envs.reset()
        actions = np.zeros(4, np.int64)
        behind_an_end = np.zeros(4, np.bool_)
        returns, steps = np.zeros(4), np.zeros(4, np.int64)
        for number, num_steps in enumerate((5, 3, 1, 1, 1, 12, 8, 2, 40)):
            if number == 6:
                *_, terminations, _, _ = await envs.step(actions)
                behind_an_end = terminations
                returns[:], steps[:] = 0, 0
            if number == 7:
                await envs.reset(env_ids=[1, 3])
                behind_an_end[[1, 3]], returns[[1, 3]], steps[[1, 3]] = False, 0, 0
            rollout = await envs.rollout(lambda _: actions, num_steps)
            found: list[tuple[float, int]] = []
            for step in range(num_steps):
                is_reset = behind_an_end if mode is AutoresetMode.NEXT_STEP else np.zeros(4, np.bool_)
                assert_same(rollout.autoresets[step], is_reset, f"rollout {number} step {step}")
                returns += rollout.rewards[step]
                steps += ~is_reset
                behind_an_end = rollout.terminations[step] | rollout.truncations[step]
                for env_index in np.flatnonzero(behind_an_end):
                    found.append((returns[env_index], steps[env_index]))
                    returns[env_index], steps[env_index] = 0, 0
            assert list(zip(rollout.episode_returns, rollout.episode_lengths, strict=True)) == found
            assert (rollout.episode_returns.dtype, rollout.episode_lengths.dtype) == (np.float64, np.int64)


@loops_in_turn("num_workers,groups", product([0, 1, 2], [1, 2]))
async def test_async_envs_and_threads(num_workers: int, groups: int) -> None:
    """Envs that do not wait for each other, beside ordinary ones."""
    env_fns: list[Any] = [AsyncCounter, Counter] * 4
    threads = {"threads_per_worker": 2} if num_workers else {}
    async with aiovec.AsyncVectorEnv(env_fns, num_workers=num_workers, **threads) as envs:
        await envs.reset()
        actions = np.zeros(8 // groups, np.int64)
        rollout = await envs.rollout(lambda _: actions, 30, groups=groups)
    async with aiovec.AsyncVectorEnv(env_fns, num_workers=1) as envs:
        before, _ = await envs.reset()
        for step in range(30):
            assert_same(rollout.observations[step], before, f"step {step}")
            before, rewards, terminations, _, infos = await envs.step(np.zeros(8, np.int64))
            assert_same(rollout.rewards[step], rewards, f"step {step}")
            assert_same(rollout.terminations[step], terminations, f"step {step}")
            assert_same(rollout.infos[step], infos, f"step {step}")


@loops_in_turn("max_buffers,copies", [(4, None), (1, None), (2, True)])
@pytest.mark.parametrize("groups", [1, 2])
async def test_rollouts_that_are_kept_never_change(groups: int, max_buffers: int, copies: bool | None) -> None:
    """Whatever is kept of them, and of what the policy was shown; and whoever writes into them."""
    kept: list[tuple[Any, Any]] = []
    generator = np.random.default_rng(1)
    env_fns = [partial(ReusingEnv, 5 + index, False) for index in range(4)]
    async with aiovec.AsyncVectorEnv(env_fns, num_workers=2, max_buffers=max_buffers, copy=copies) as envs:
        await envs.reset()

        def policy(observations: Any) -> Any:
            if generator.random() < 0.02:
                kept.append((observations, checksums_of(observations)))
            return generator.integers(0, 2, len(observations["array"]))

        for _ in range(40):
            rollout = await envs.rollout(policy, int(generator.integers(1, 30)), groups=groups)
            if (choice := generator.random()) < 0.3:
                kept.append((rollout, checksums_of(rollout)))
            elif choice < 0.6:
                part = (rollout.observations["array"][3:5], memoryview(rollout.rewards))
                kept.append((part, checksums_of(part)))
            elif choice < 0.7:
                rollout.rewards[...] = rollout.observations["array"][...] = 77
            del rollout
            if generator.random() < 0.3:
                del kept[: len(kept) // 2]
            for value, before in kept:
                assert checksums_of(value) == before
    gc.collect()
    assert all(checksums_of(value) == before for value, before in kept)  # the vector is gone, too


def checksums_of(value: Any) -> Any:
    if isinstance(value, aiovec.Rollout):
        return checksums(vars(value))
    if isinstance(value, tuple):
        return checksums([np.asarray(item) for item in value])
    return checksums(value)


@loops_in_turn("groups", product([1, 2]))
async def test_the_next_rollout_is_collected_meanwhile(groups: int) -> None:
    """While the loop's body awaits; each continues the one before, and its memory comes back."""
    env_fns = [partial(Counter, 1000, env_index) for env_index in range(4)]
    async with aiovec.AsyncVectorEnv(env_fns, num_workers=2, max_buffers=2) as envs:
        await envs.reset()
        shown = 0

        def policy(observations: Any) -> Any:
            nonlocal shown
            shown += 1
            return np.zeros(len(observations), np.int64)

        async with contextlib.aclosing(envs.rollouts(policy, 10, groups=groups)) as rollouts:
            number = 0
            async for rollout in rollouts:
                assert rollout.observations[0, 0, 2] == 10 * number
                number += 1
                while shown < 10 * groups * (number + 1):
                    await asyncio.sleep(0.001)
                if number == 6:
                    break
        assert envs._started is not None
        await envs.reset()  # discards what is owed to the one that was cancelled
        strips = repr(envs._started.pool.rollout_strips)
        assert strips in ("<RolloutStrips free=1 of 2>", "<RolloutStrips free=2 of 3>")  # `rollout` has one
        assert len((await envs.rollout(policy, 3)).rewards) == 3


async def test_extras_that_come_late_are_refused() -> None:
    """The rows of the steps before would hold nothing."""
    async with aiovec.AsyncVectorEnv([Counter] * 2, num_workers=1) as envs:
        await envs.reset()
        answers = iter([np.zeros(2, np.int64), (np.zeros(2, np.int64), np.zeros(2))])
        with pytest.raises(aiovec.InvalidExtrasError, match="expected nothing, as at first, got float64"):
            await envs.rollout(lambda _: next(answers), 2)


async def test_a_body_that_does_not_await_is_on_policy() -> None:
    """The next rollout begins only when the loop has its turn: it acts by what was learned."""
    async with aiovec.AsyncVectorEnv([Counter] * 2, num_workers=1) as envs:
        await envs.reset()
        action = 0
        async with contextlib.aclosing(envs.rollouts(lambda _: np.full(2, action), 4)) as rollouts:
            async for rollout in rollouts:
                assert np.all(rollout.actions == action)
                action += 1
                if action == 4:
                    break
        await envs.reset()


@pytest.mark.parametrize("leave", ["break", "an exception"])
@pytest.mark.parametrize("groups", [1, 2])
async def test_a_loop_that_is_left_can_be_reset_at_once(leave: str, groups: int) -> None:
    """Whatever the next rollout was doing: a reset, right behind the loop, takes care of it."""
    async with aiovec.AsyncVectorEnv([Counter] * 4, num_workers=2) as envs:
        for ticks in (0, 1, 2, 3, 5, 8):
            await envs.reset()
            try:
                async for _ in envs.rollouts(
                    lambda observations: np.zeros(len(observations), np.int64), 200, groups=groups
                ):
                    for _ in range(ticks):
                        await asyncio.sleep(0)
                    if leave == "break":
                        break
                    raise KeyError("the user's own")
            except KeyError:
                pass
            observations, _ = await envs.reset()
            assert (observations[:, 2] == 0).all()
            await envs.step([0] * 4)


async def test_an_iterator_of_rollouts_that_was_left() -> None:
    """It has ended."""
    async with aiovec.AsyncVectorEnv([Counter] * 2, num_workers=1) as envs:
        await envs.reset()
        rollouts = envs.rollouts(lambda _: np.zeros(2, np.int64), 3)
        assert len((await anext(rollouts)).rewards) == 3
        await rollouts.aclose()
        await rollouts.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(rollouts)
        await envs.reset()
        await envs.step([0, 0])
