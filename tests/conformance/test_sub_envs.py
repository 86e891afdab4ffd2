"""`envs[i]` against the same env without a vector: Gymnasium's single-env tuples, one task for each env."""

from __future__ import annotations

import asyncio
import copy
from functools import partial
from itertools import product
from typing import Any

import gymnasium as gym
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
from gymnasium.vector import AutoresetMode
from sample_envs import Counter
from space_envs import (
    ACTION_SPACES,
    OBSERVATION_SPACES,
    DefaultsEnv,
    ImageEnv,
    InfoEnv,
    LoggingEnv,
    Recorder,
    ReusingEnv,
    SpaceEnv,
    described,
)

import aiovec

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

NUM_ENVS = 3
NUM_STEPS = 30

ENVS: dict[str, list[Any]] = {
    **{name: [partial(SpaceEnv, space)] * NUM_ENVS for name, space in OBSERVATION_SPACES.items()},
    "infos": [partial(InfoEnv, env_index) for env_index in range(NUM_ENVS)],
    "reusing": [partial(ReusingEnv, 4, reuses_info=True)] * NUM_ENVS,
    "image": [partial(ImageEnv, nested=True)] * NUM_ENVS,
}


def script(env: Any, env_index: int) -> list[tuple[str, Any]]:
    """What is asked of one env without a vector, and what it gives."""
    seed = 10 * env_index + 1
    results: list[tuple[str, Any]] = [(f"reset {seed}", copy.deepcopy(env.reset(seed=seed)))]
    for step in range(NUM_STEPS):
        action = env.action_space.start + (7 * env_index + 3 * step) % env.action_space.n
        result = copy.deepcopy(env.step(action))
        results.append((f"step {action}", result))
        if result[2] or result[3]:
            # With a seed, since an explicit None draws one by chance where there is none yet.
            results.append((f"reset {step}", copy.deepcopy(env.reset(seed=step, options={"level": step}))))
    return results


async def drive(sub: aiovec.SubEnv, expected: list[tuple[str, Any]], where: str) -> list[tuple[Any, Any]]:
    """Asks the same; gives what came, with copies."""
    kept: list[tuple[Any, Any]] = []
    ended = False
    for number, (what, theirs) in enumerate(expected):
        name, argument = what.split()
        if name == "reset":
            options = {"level": int(argument)} if number else None
            ours: Any = await sub.reset(seed=int(argument), options=options)
            _compare(ours[0], theirs[0], f"{where}: {number}")
        else:
            ours = await sub.step(np.int64(argument))
            _compare(ours[0], theirs[0], f"{where}: {number}")
            assert type(ours[1]) is float
            assert (type(ours[2]), type(ours[3])) == (bool, bool)
            assert ours[1:4] == (float(theirs[1]), bool(theirs[2]), bool(theirs[3])), f"{where}: {number}"
            ended = ours[2] or ours[3]
        assert_same(ours[-1], theirs[-1], f"{where}: info of {number}, {what}")
        if number % 8 == 0:
            kept.append((ours, copy.deepcopy(ours)))
        if ended:
            with pytest.raises(aiovec.ResetNeeded, match=f"env {sub.env_index} ended its episode"):
                await sub.step(np.int64(0))
            ended = False
    return kept


def _compare(ours: Any, theirs: Any, where: str) -> None:
    """Equal values; what has a place in shared memory is of its space's own type, whatever the env gave."""
    if isinstance(theirs, dict):
        assert isinstance(ours, dict)
        assert list(ours) == list(theirs), where
        for key, value in theirs.items():
            _compare(ours[key], value, f"{where}[{key!r}]")
    elif type(theirs) is tuple:
        assert type(ours) is tuple
        for mine, value in zip(ours, theirs, strict=True):
            _compare(mine, value, where)
    elif isinstance(theirs, (int, float, np.number, np.ndarray)):
        np.testing.assert_array_equal(ours, theirs, err_msg=where)
        assert np.asarray(ours).dtype == np.asarray(theirs).dtype or not isinstance(theirs, np.ndarray), where
    else:
        assert not (found := difference(ours, theirs)), f"{where}{found}"


@loops_in_turn("name,mode", [(name, AUTORESET_MODES[number % 3]) for number, name in enumerate(ENVS)])
async def test_transitions_are_those_of_a_single_env(name: str, mode: AutoresetMode) -> None:
    """One task for each env, each at its own pace; the autoreset mode of the vector does not matter."""
    env_fns = ENVS[name]
    expected = []
    for env_index, env_fn in enumerate(env_fns):
        env = env_fn()
        expected.append(script(env, env_index))
    for number, cell in enumerate(CELLS):
        if number % 8 != len(name) % 8 and cell != (2, True):
            continue
        async with aiovec.AsyncVectorEnv(env_fns, autoreset_mode=mode, **cell_arguments(*cell)) as envs:
            kept = await asyncio.gather(
                *[drive(sub, of_env, f"{cell} env {sub.env_index}") for sub, of_env in zip(envs, expected, strict=True)]
            )
            for ours, before in [item for of_env in kept for item in of_env]:
                assert_same(ours, before, f"{cell}: what was returned has changed")
            for sub in envs:
                assert envs.single_observation_space == sub.observation_space
                observation, _ = await sub.reset()
                assert name in ("reusing", "nested_tuple") or sub.observation_space.contains(observation)


@pytest.mark.parametrize("cell", [(0, True), (2, True), (2, False)])
async def test_objects_in_infos_never_change(cell: tuple[int, bool]) -> None:
    """Also where the env goes on changing them; and what the caller does to them does not reach the env."""
    env_fns = [partial(LoggingEnv, env_index) for env_index in range(NUM_ENVS)]
    async with aiovec.AsyncVectorEnv(env_fns, **cell_arguments(*cell)) as envs:
        sub = envs[1]
        _, info = await sub.reset()
        for number in range(1, 4):
            _, _, _, _, later = await sub.step(0)
            assert info["log"] == list(range(number))
            assert later["log"] == list(range(number + 1))
            assert later["ragged"].tolist() == [number + 1.0] * 2
            info["log"].append("mine")
            info["ragged"][:] = -1
            info = later


@pytest.mark.parametrize("cell", CELLS[::2] + CELLS[5:6])
async def test_seeds_and_options_reach_the_env_as_they_are(cell: tuple[int, bool]) -> None:
    """The index is not added; without arguments it is told `None`, as by `reset` of the vector."""
    options = {"level": 3, "taken": 1}
    env_fns = [partial(Recorder, length=9)] * NUM_ENVS
    async with aiovec.AsyncVectorEnv(env_fns, **cell_arguments(*cell)) as envs:
        for env_index in (2, 0):
            sub, single = envs[env_index], Recorder()
            for seed in (0, 41, 2**40):
                _, info = await sub.reset(seed=seed, options=options)
                assert_same(info, single.reset(seed=seed, options=dict(options))[1], f"{seed}")
            await sub.reset()
            assert options == {"level": 3, "taken": 1}
            told = await sub.get_attr("told")
            assert told == [*single.told, (None, "None")]
        assert await envs.get_attr("told", env_ids=[1]) == ([],)
    async with aiovec.AsyncVectorEnv([DefaultsEnv] * 2, **cell_arguments(min(cell[0], 2), cell[1])) as envs:
        assert (await envs[1].reset())[1] == {"options": None, "seed": None}


# Samples without axes are scalars to an env of a vector, as everywhere in Gymnasium.
ACTION_NAMES = [name for name in ACTION_SPACES if name not in ("box_scalar", "tuple")]


@loops_in_turn("name", product(ACTION_NAMES[1::2]))
async def test_actions_reach_the_env(name: str) -> None:
    """What fits the space's own dtype as an array of it; anything else, lists and texts for instance, as it is."""
    space = ACTION_SPACES[name]
    env_fns = [partial(Recorder, space, length=1000)] * NUM_ENVS
    sampled = copy.deepcopy(space)
    sampled.seed(3)
    actions = [sampled.sample() for _ in range(4)]
    for cell in [(0, True), (2, True), (2, False)]:
        async with aiovec.AsyncVectorEnv(env_fns, **cell_arguments(*cell)) as envs:
            await envs.reset()
            sub = envs[2]
            for action in actions:
                before = copy.deepcopy(action)
                await sub.step(action)
                assert_same(action, before, f"{cell}: the caller's action")
                assert await sub.call("last_action") == described(action), f"{cell}"
            assert await envs.get_attr("kept", env_ids=[0, 1]) == ([], [])


@pytest.mark.parametrize("cell", [(0, True), (2, True), (2, False)])
async def test_actions_of_other_types(cell: tuple[int, bool]) -> None:
    """Equal values; a dtype of one's own is kept, and wrong ones are refused with nothing changed."""
    box = gym.spaces.Box(-9, 9, (2,), np.float32)
    asked: list[tuple[Any, Any]] = [
        (gym.spaces.Discrete(5), 3),
        (gym.spaces.Discrete(5), np.int32(3)),
        (gym.spaces.Discrete(5), np.array(3)),
        (gym.spaces.Discrete(5), True),
        (box, [1, 2.5]),
        (box, (1.0, 2.0)),
        (box, np.array([1, 2], np.float64)),
        (gym.spaces.Dict(a=gym.spaces.Discrete(3), b=box), {"a": 2, "b": [1.0, 2.0]}),
        (gym.spaces.Tuple([gym.spaces.Text(3), box]), ("abc", np.zeros(2, np.float32))),
    ]
    for space, action in asked:
        async with aiovec.AsyncVectorEnv([partial(Recorder, space)] * 2, **cell_arguments(*cell)) as envs:
            await envs.reset()
            await envs[1].step(action)
            (taken,) = await envs[1].get_attr("kept")
            if isinstance(action, np.generic | np.ndarray):
                assert taken.dtype == action.dtype
            if isinstance(action, dict):
                assert taken["a"] == action["a"]
                np.testing.assert_array_equal(taken["b"], action["b"])
            elif isinstance(action, tuple) and isinstance(action[0], str):
                assert_same(taken, action, "a tuple")
            else:
                np.testing.assert_array_equal(taken, action)
            for wrong in (None, "x", {"c": 1}, np.zeros((2, 2, 2)), 1j):
                with pytest.raises(aiovec.InvalidActionsError):
                    await envs[1].step(wrong)
            assert await envs.get_attr("kept", env_ids=[0]) == ([],)
            await envs[1].step(action)


@pytest.mark.parametrize("cell", [(0, True), (2, True), (2, False)])
async def test_an_action_is_taken_when_step_is_called(cell: tuple[int, bool]) -> None:
    """The caller may fill its array anew at once; what the env kept stays as it was."""
    space = gym.spaces.Box(-99, 99, (2,), np.float32)
    action = np.zeros(2, np.float32)
    async with aiovec.AsyncVectorEnv([partial(Recorder, space)] * 2, **cell_arguments(*cell)) as envs:
        await envs.reset()
        for number in range(3):
            action[:] = number
            task = asyncio.ensure_future(envs[1].step(action))
            await asyncio.sleep(0)
            action[:] = -1
            await task
        kept = await envs[1].get_attr("kept")
    assert_same(kept, [np.full(2, number, np.float32) for number in range(3)], "kept")


@pytest.mark.parametrize("cell", [(0, True), (2, True), (2, False)])
async def test_calls_of_one_env(cell: tuple[int, bool]) -> None:
    """Methods, attributes, frames: of this env alone, and through its wrappers."""
    env_fns = [partial(Recorder, name=f"env {env_index}") for env_index in range(NUM_ENVS)]
    async with aiovec.AsyncVectorEnv(env_fns, **cell_arguments(*cell)) as envs:
        sub = envs[1]
        await sub.reset()
        assert await sub.call("add", 1, second=2, third=3) == ("env 1", 7)
        assert await sub.get_attr("name") == "env 1"
        assert await sub.render() == "env 1: 0 steps"
        await sub.set_attr("level", [5])
        assert await envs.get_attr("level") == (1, [5], 1)


# ---- beside batches of the vector


@pytest.mark.parametrize("mode", AUTORESET_MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("cell", [(0, True), (2, True), (2, False)])
@pytest.mark.parametrize("by_send", [False, True])
async def test_a_batch_goes_on_with_an_env_that_ended(
    by_send: bool, cell: tuple[int, bool], mode: AutoresetMode
) -> None:
    """As the mode says: its next row is the reset, or it must be reset first."""
    env_fns = [partial(Counter, 3, env_index) for env_index in range(2)]
    async with aiovec.AsyncVectorEnv(env_fns, autoreset_mode=mode, **cell_arguments(*cell)) as envs:
        await envs.reset()
        for step in (1, 2, 3):
            observation, reward, terminated, truncated, info = await envs[1].step(0)
            assert_same(observation, np.array([1, 1, step], np.float32), "observation")
            assert (reward, terminated, truncated, info) == (step, step == 3, False, {"steps": step})
        if mode is AutoresetMode.DISABLED:
            for refused in (envs.step([0, 0]), envs.send([0], [1])):
                with pytest.raises(aiovec.ResetNeeded, match="env 1 ended its episode, and autoreset is disabled"):
                    await refused
            return
        if by_send:
            await envs.send([0, 0])
            batch = await envs.recv(min_envs=2)
            back = np.argsort(batch.env_ids)
            observations, rewards, ended = batch.observations[back], batch.rewards[back], batch.terminations
        else:
            observations, rewards, ended, _, _ = await envs.step([0, 0])
        assert observations.tolist() == [[0, 1, 1], [1, 2, 0]]
        assert rewards.tolist() == [1, 0]
        assert not ended.any()
        assert (await envs[1].step(0))[1] == 1


@pytest.mark.parametrize("cell", [(0, True), (2, True), (2, False)])
@pytest.mark.parametrize("mode", AUTORESET_MODES, ids=lambda mode: mode.name)
async def test_a_single_env_goes_on_after_a_batch(cell: tuple[int, bool], mode: AutoresetMode) -> None:
    """An episode that ended in a batch is over for it as well, unless the batch has reset it."""
    env_fns = [partial(Counter, 3, env_index) for env_index in range(2)]
    async with aiovec.AsyncVectorEnv(env_fns, autoreset_mode=mode, **cell_arguments(*cell)) as envs:
        for by_send in (False, True):
            await envs.reset()
            for _ in range(3):
                if by_send:
                    await envs.send([0, 0])
                    await envs.recv(min_envs=2)
                else:
                    await envs.step([0, 0])
            if mode is AutoresetMode.SAME_STEP:
                assert (await envs[1].step(0))[1] == 1
                continue
            for _ in range(2):
                with pytest.raises(aiovec.ResetNeeded, match="env 1 ended its episode"):
                    await envs[1].step(0)
            await envs[1].reset()
            assert (await envs[1].step(0))[1] == 1


async def test_a_vector_driven_by_single_steps_is_that_of_gymnasium() -> None:
    """Single steps within an episode leave no trace: the whole batches behind them equal `SyncVectorEnv`'s."""
    env_fns = ENVS["dict"]
    for mode in AUTORESET_MODES[:2]:
        async with AwaitedSync(env_fns, autoreset_mode=mode) as sync:
            expected = [copy.deepcopy(await sync.reset(seed=7))]
            expected += [copy.deepcopy(await sync.step(np.full(NUM_ENVS, step % 3))) for step in range(40)]
        for cell in CELLS[::3]:
            async with aiovec.AsyncVectorEnv(env_fns, autoreset_mode=mode, **cell_arguments(*cell)) as envs:
                assert_same(await envs.reset(seed=7), expected[0], f"{cell}")
                ended = np.zeros(NUM_ENVS, np.bool_)
                for step in range(40):
                    if step % 2 and not ended.any():
                        rows = await asyncio.gather(*[sub.step(np.int64(step % 3)) for sub in envs])
                        rewards = np.array([row[1] for row in rows])
                        flags = [np.array([row[index] for row in rows]) for index in (2, 3)]
                        assert_same((rewards, *flags), expected[step + 1][1:4], f"{cell}: step {step}")
                        ended = flags[0] | flags[1]
                        if ended.any() and mode is AutoresetMode.SAME_STEP:
                            break  # only a batch resets in the same step
                    else:
                        result = await envs.step(np.full(NUM_ENVS, step % 3))
                        assert_same(result, expected[step + 1], f"{cell}: step {step}")
                        ended = result[2] | result[3]
