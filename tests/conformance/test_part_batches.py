"""`send` and `recv` against Gymnasium: each env's rows, put together again, are those of `SyncVectorEnv`."""

from __future__ import annotations

import copy
import random
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
from conformance.comparing import (
    AUTORESET_MODES,
    CELLS,
    AwaitedSync,
    assert_same,
    cell_arguments,
    difference,
    loops_in_turn,
)
from conformance.test_actions import ACTION_CELLS, batches_of
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import iterate
from space_envs import ACTION_SPACES, OBSERVATION_SPACES, ImageEnv, InfoEnv, LoggingEnv, Recorder, ReusingEnv, SpaceEnv

import aiovec

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

NUM_ENVS = 3
NUM_STEPS = 30

ENVS: dict[str, list[Any]] = {
    **{name: [partial(SpaceEnv, OBSERVATION_SPACES[name])] * NUM_ENVS for name in ("box_float32", "discrete_start")},
    **{name: [partial(SpaceEnv, OBSERVATION_SPACES[name])] * NUM_ENVS for name in ("dict", "text", "nested")},
    "infos": [partial(InfoEnv, env_index) for env_index in range(NUM_ENVS)],
    "reusing": [partial(ReusingEnv, 4, reuses_info=True)] * NUM_ENVS,
    "image": [partial(ImageEnv, nested=True)] * NUM_ENVS,
}


def action_of(space: Any, env_index: int, step: int) -> Any:
    """A pure function, so that both sides take the same."""
    return space.start + (7 * env_index + 3 * step + step // 5) % space.n


def as_dicts(infos: dict[str, Any], num_rows: int) -> list[dict[str, Any]]:
    """By row what Gymnasium's infos say of it."""
    rows: list[dict[str, Any]] = [{} for _ in range(num_rows)]
    names = {str(key) for key in infos}
    for key, values in infos.items():
        if isinstance(key, str) and key.startswith("_") and key[1:] in names:
            continue
        if isinstance(values, dict):
            of_rows: Any = as_dicts(values, num_rows)
        else:
            assert len(values) == num_rows, key
            of_rows = values
        mask = infos[f"_{key}"]
        assert mask.dtype == np.bool_
        for row in np.flatnonzero(mask):
            rows[row][key] = of_rows[row]
    return rows


def split(observations: Any, space: Any, rest: tuple[Any, ...], infos: dict[str, Any], num_rows: int) -> list[Any]:
    """A batch as one tuple a row; `space` is the batched one for as many rows."""
    of_infos = as_dicts(infos, num_rows)
    rows = list(iterate(space, observations))
    assert len(rows) == num_rows
    return [(rows[row], *(array[row] for array in rest), of_infos[row]) for row in range(num_rows)]


async def expected_rows(env_fns: list[Any], mode: AutoresetMode) -> tuple[list[list[Any]], Any]:
    """Of each env what `SyncVectorEnv` says of it, step by step; and its infos of whole batches."""
    async with AwaitedSync(env_fns, autoreset_mode=mode) as sync:
        space, action_space = sync.observation_space, sync.single_action_space
        observations, infos = await sync.reset(seed=7)
        rows = [[row] for row in copy.deepcopy(split(observations, space, (), infos, NUM_ENVS))]
        for step in range(NUM_STEPS):
            actions = np.array([action_of(action_space, env_index, step) for env_index in range(NUM_ENVS)])
            observations, *rest, infos = await sync.step(actions)
            for of_env, row in zip(rows, copy.deepcopy(split(observations, space, rest, infos, NUM_ENVS)), strict=True):
                of_env.append(row)
            ended = rest[1] | rest[2]
            if mode is AutoresetMode.DISABLED and ended.any():
                observations, infos = await sync.reset(options={"reset_mask": ended})
                for env_index in np.flatnonzero(ended):
                    row = copy.deepcopy(split(observations, space, (), infos, NUM_ENVS))[env_index]
                    rows[env_index].append(row)
        return rows, space


def batched_like(envs: Any, num_rows: int) -> Any:
    from gymnasium.vector.utils import batch_space

    return batch_space(envs.single_observation_space, num_rows)


# An env that reuses its arrays overwrites Gymnasium's own final_obs.
CASES = [case for case in product(ENVS, AUTORESET_MODES) if case != ("reusing", AutoresetMode.SAME_STEP)]
CASES = [case for case in CASES if case[0] != "infos"]  # whose values depend on which envs are in a batch


@loops_in_turn("name,mode", CASES)
async def test_rows_of_each_env_are_those_of_gymnasium(name: str, mode: AutoresetMode) -> None:
    """However they are sent and collected: a few at a time, at random; only dtypes of infos may differ by batch."""
    env_fns = ENVS[name]
    expected, _ = await expected_rows(env_fns, mode)
    for number, cell in enumerate(CELLS):
        if number % 4 != len(name) % 4 and cell != (2, True):
            continue
        async with aiovec.AsyncVectorEnv(env_fns, autoreset_mode=mode, **cell_arguments(*cell)) as envs:
            await _compare_rows(envs, mode, expected, f"{cell}", random.Random(number))


async def _compare_rows(
    envs: aiovec.AsyncVectorEnv, mode: AutoresetMode, expected: list[list[Any]], where: str, choose: random.Random
) -> None:
    next_rows = [iter(rows) for rows in expected]
    steps = [0] * NUM_ENVS

    def check(rows: list[Any], env_ids: Any) -> None:
        for row, env_index in zip(rows, env_ids, strict=True):
            found = _loosely(row, next(next_rows[env_index]))
            assert not found, f"{where}: step {steps[env_index]} of env {env_index}{found}"

    observations, infos = await envs.reset(seed=7)
    check(split(observations, envs.observation_space, (), infos, NUM_ENVS), range(NUM_ENVS))
    idle = set(range(NUM_ENVS))
    kept: list[Any] = []
    while any(step < NUM_STEPS for step in steps):
        some = [env_index for env_index in idle if steps[env_index] < NUM_STEPS]
        if some:
            some = choose.sample(some, choose.randint(1, len(some)))
            actions = [action_of(envs.single_action_space, env_index, steps[env_index]) for env_index in some]
            await envs.send(np.array(actions), np.array(some))
            idle -= set(some)
        busy = NUM_ENVS - len(idle)
        batch = await envs.recv(choose.choice([None, choose.randint(1, busy)]), choose.choice([None, busy]))
        if len(kept) < 10:
            kept.append((batch, copy.deepcopy(batch)))
        ids = batch.infos.pop("env_id")
        assert ids.tolist() == batch.env_ids.tolist()
        check(split(batch[1], batched_like(envs, len(ids)), batch[2:5], batch.infos, len(ids)), ids)
        batch.infos["env_id"] = ids
        for env_index in ids.tolist():
            steps[env_index] += 1
            idle.add(env_index)
        ended = ids[batch.terminations | batch.truncations].tolist()
        if mode is AutoresetMode.DISABLED and ended:
            with pytest.raises(aiovec.ResetNeeded):
                await envs.send([action_of(envs.single_action_space, 0, 0)], ended[:1])
            # As a masked reset of SyncVectorEnv: no seed, other options than None.
            observations, infos = await envs.reset(env_ids=ended, options={})
            check(split(observations, batched_like(envs, len(ended)), (), infos, len(ended)), ended)
    for batch, before in kept:
        assert_same(tuple(batch), tuple(before), f"{where}: what recv returned has changed")


def _loosely(ours: Any, theirs: Any) -> str:
    """`difference`, but values of infos may have another number type: a batch of other envs has another dtype."""
    *our_parts, our_info = ours
    *their_parts, their_info = theirs
    return str(difference(our_parts, their_parts) or _loose_difference(our_info, their_info))


def _loose_difference(ours: Any, theirs: Any) -> str:
    if isinstance(theirs, dict):
        if not isinstance(ours, dict) or ours.keys() != theirs.keys():
            return f": {ours!r} instead of {theirs!r}"
        return "".join(f"[{key!r}]{found}" for key in theirs if (found := _loose_difference(ours[key], theirs[key])))
    if isinstance(theirs, (int, float, complex, np.number, np.bool_, np.ndarray)):
        same = np.array_equal(np.asarray(ours, dtype=object), np.asarray(theirs, dtype=object))
        same = same or np.allclose(np.asarray(ours, complex), np.asarray(theirs, complex), atol=1)  # cast to an int
        return "" if same else f": {ours!r} instead of {theirs!r}"
    return str(difference(ours, theirs) or "")


@loops_in_turn("name,mode", product(["infos", "nested", "text"], AUTORESET_MODES[:2]))
async def test_a_recv_of_all_is_a_step(name: str, mode: AutoresetMode) -> None:
    """Put into ascending order its rows and infos are equal to those of `SyncVectorEnv` in every bit."""
    env_fns = ENVS[name]
    async with AwaitedSync(env_fns, autoreset_mode=mode) as sync:
        space = sync.single_action_space
        batches = [np.array([action_of(space, env_index, step) for env_index in range(NUM_ENVS)]) for step in range(20)]
        expected = [copy.deepcopy(await sync.reset(seed=7))]
        expected += [copy.deepcopy(await sync.step(actions)) for actions in batches]
    for cell in CELLS[::3]:
        choose = random.Random(4)
        async with aiovec.AsyncVectorEnv(env_fns, autoreset_mode=mode, **cell_arguments(*cell)) as envs:
            assert_same(await envs.reset(seed=7), expected[0], f"{cell}")
            for step, actions in enumerate(batches):
                order = choose.sample(range(NUM_ENVS), NUM_ENVS)
                await envs.send(actions[order], order)
                batch = await envs.recv(min_envs=NUM_ENVS)
                back = np.argsort(batch.env_ids)
                batch.infos.pop("env_id")
                found = (rows_of(batch.observations, back), *(array[back] for array in batch[2:5]))
                assert_same(found, expected[step + 1][:4], f"{cell}: step {step}")
                assert_same(rows_of(batch.infos, back), expected[step + 1][4], f"{cell}: infos of step {step}")


def rows_of(value: Any, order: Any) -> Any:
    """The rows in another order."""
    if isinstance(value, np.ndarray):
        return value[order]
    if isinstance(value, dict):
        return {key: rows_of(item, order) for key, item in value.items()}
    if any(isinstance(item, np.ndarray) for item in value):  # a `Tuple` of leaves, which has no axis for envs itself
        return tuple(rows_of(item, order) for item in value)
    return tuple(value[row] for row in order)


@loops_in_turn("name", product(list(ACTION_SPACES)[::2]))
async def test_actions_reach_the_env_as_in_gymnasium(name: str) -> None:
    """Samples, lists, arrays of another dtype or layout; all envs at once, which take them in an order of their own."""
    env_fns = [partial(Recorder, ACTION_SPACES[name], length=1000)] * NUM_ENVS
    batches = batches_of(ACTION_SPACES[name])
    expected = []
    async with AwaitedSync(env_fns) as sync:
        await sync.reset()
        for _, actions in batches:
            await sync.step(actions)
            expected.append(sync.call("last_action"))
    found = []
    for cell in ACTION_CELLS:
        async with aiovec.AsyncVectorEnv(env_fns, **cell_arguments(*cell)) as envs:
            await envs.reset()
            for (form, actions), taken in zip(batches, expected, strict=True):
                before = copy.deepcopy(actions)
                order = [2, 0, 1]
                await envs.send(actions, order)
                await envs.recv(min_envs=NUM_ENVS)
                assert_same(actions, before, f"{cell}: {form}: the caller's actions")
                told = await envs.call("last_action", env_ids=order)
                if differs := difference(told, taken):
                    found.append(f"{cell}: {form}{differs}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("cell", ACTION_CELLS)
async def test_actions_are_taken_when_send_is_called(cell: tuple[int, bool]) -> None:
    """One array that the caller fills anew, also while the envs have not begun."""
    actions = np.zeros(1, np.int64)
    async with aiovec.AsyncVectorEnv([Recorder] * NUM_ENVS, **cell_arguments(*cell)) as envs:
        await envs.reset()
        for _ in range(3):
            for env_index in range(NUM_ENVS):
                actions[:] = env_index
                await envs.send(actions, [env_index])
            actions[:] = 9
            await envs.recv(min_envs=NUM_ENVS)
        kept = await envs.get_attr("kept")
    assert [list(map(int, of_env)) for of_env in kept] == [[env_index] * 3 for env_index in range(NUM_ENVS)]


@pytest.mark.parametrize("cell", ACTION_CELLS)
async def test_wrong_actions_are_refused_whole(cell: tuple[int, bool]) -> None:
    """No env is stepped, none is owed."""
    async with aiovec.AsyncVectorEnv([Recorder] * NUM_ENVS, **cell_arguments(*cell)) as envs:
        await envs.reset()
        for actions, env_ids in (([0, 0], [1]), ([0], [1, 2]), ([0.5], [1]), (None, [1]), ([0] * 2, None)):
            with pytest.raises(aiovec.InvalidActionsError):
                await envs.send(actions, env_ids)
        for env_ids in ([3], [-1], [1, 1], [], 1, ["a"]):
            with pytest.raises((ValueError, TypeError), match="env_ids"):
                await envs.send([0], env_ids)  # type: ignore[arg-type]
        with pytest.raises(aiovec.NoAsyncCallError):
            await envs.recv()
        assert await envs.get_attr("kept") == ([],) * NUM_ENVS
        await envs.step([0] * NUM_ENVS)


@loops_in_turn("copies,cell", product([None, True, False], [(0, True), (2, True), (2, False)]))
async def test_what_recv_returned_never_changes(copies: bool | None, cell: tuple[int, bool]) -> None:
    """Neither by what the envs do, nor by what the caller does to other batches; also objects in infos."""
    env_fns: list[Any] = [partial(ImageEnv, nested=True)] * NUM_ENVS
    logging: list[Any] = [partial(LoggingEnv, env_index) for env_index in range(NUM_ENVS)]
    for fns in (env_fns, logging):
        async with aiovec.AsyncVectorEnv(fns, copy=copies, **cell_arguments(*cell)) as envs:
            await envs.reset(seed=1)
            kept = []
            for _ in range(12):
                await envs.send([0] * NUM_ENVS)
                batch = await envs.recv(min_envs=2)
                kept.append((batch, copy.deepcopy(batch)))
                while [1 async for _ in envs.batches()]:
                    pass
                await envs.step([0] * NUM_ENVS)
            for batch, before in kept:
                assert_same(tuple(batch), tuple(before), f"{cell}")
            batch.rewards[:] = 9  # yours to keep: it is writable, and changes no other
            for other, before in kept[:-1]:
                assert_same(tuple(other), tuple(before), f"{cell}")


@loops_in_turn("mode", product(AUTORESET_MODES))
async def test_part_batches_and_whole_ones_in_turn(mode: AutoresetMode) -> None:
    """Autoreset goes on env by env, whichever way an env is stepped."""
    env_fns = ENVS["dict"]
    expected, _ = await expected_rows(env_fns, mode)
    for cell in CELLS[::3]:
        async with aiovec.AsyncVectorEnv(env_fns, autoreset_mode=mode, **cell_arguments(*cell)) as envs:
            rows = [iter(of_env) for of_env in expected]
            observations, infos = await envs.reset(seed=7)
            for env_index, row in enumerate(split(observations, envs.observation_space, (), infos, NUM_ENVS)):
                assert not _loosely(row, next(rows[env_index]))
            for step in range(NUM_STEPS):
                space = envs.single_action_space
                actions = np.array([action_of(space, env_index, step) for env_index in range(NUM_ENVS)])
                if step % 3 == 0:
                    observations, *rest, infos = await envs.step(actions)
                    ids = np.arange(NUM_ENVS)
                else:
                    await envs.send(actions)
                    ids, observations, *rest, infos = await envs.recv(min_envs=NUM_ENVS)
                    infos.pop("env_id")
                for env_index, row in zip(
                    ids, split(observations, envs.observation_space, tuple(rest), infos, NUM_ENVS), strict=True
                ):
                    found = _loosely(row, next(rows[env_index]))
                    assert not found, f"{cell}: step {step} of env {env_index}{found}"
                ended = sorted(ids[rest[1] | rest[2]].tolist())
                if mode is AutoresetMode.DISABLED and ended:
                    observations, infos = await envs.reset(env_ids=ended, options={})
                    parts = split(observations, batched_like(envs, len(ended)), (), infos, len(ended))
                    for env_index, row in zip(ended, parts, strict=True):
                        assert not _loosely(row, next(rows[env_index]))
