"""What `reset` and `step` returned never changes, whatever is kept, and whatever the envs reuse."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import zlib
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
from conformance.comparing import (
    AUTORESET_MODES,
    CELLS,
    FEW_STEPS,
    AwaitedSync,
    assert_same,
    assert_same_cells,
    assert_same_trajectory,
    cell_arguments,
    expected_trajectory,
    loops_in_turn,
    trajectory,
)
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from space_envs import ImageEnv, LoggingEnv, ReusingEnv

import aiovec

try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

LENGTHS = (3, 4, 6)


def without_final_obs(what: str, ours: Any, theirs: Any) -> tuple[Any, Any]:
    """Both results without `final_obs`, which is compared with what is known of each instead."""
    if "final_obs" not in theirs[-1]:
        return ours, theirs
    for env_index in np.flatnonzero(theirs[-1]["_final_obs"]):
        assert_same(theirs[-1]["final_obs"][env_index], observation_of(0), f"{what}: Gymnasium's final_obs")
        assert_same(ours[-1]["final_obs"][env_index], observation_of(LENGTHS[env_index]), f"{what}: final_obs")
    return tuple(
        (*rest, {key: value for key, value in infos.items() if key != "final_obs"}) for *rest, infos in (ours, theirs)
    )


def observation_of(steps: int) -> dict[str, Any]:
    """What a `ReusingEnv` shows after so many steps."""
    graph = spaces.GraphInstance(np.full(3, steps, np.int64), None, None)
    return {"array": np.full(2, steps, np.float32), "graph": graph}


@loops_in_turn("mode", product(AUTORESET_MODES))
async def test_env_that_reuses_its_arrays(mode: AutoresetMode) -> None:
    """Equal to `SyncVectorEnv` in all but one thing.

    The single place where equality would be wrong: under SAME_STEP the env's reset writes into the very array
    that Gymnasium has put into `final_obs`, so Gymnasium's is the reset observation. Ours is the terminal one.
    """
    env_fns = [partial(ReusingEnv, length, reuses_info=False) for length in LENGTHS]
    expected = await expected_trajectory(env_fns, mode, FEW_STEPS)
    await assert_same_cells(env_fns, mode, expected, 0, without_final_obs)


@loops_in_turn("mode", product(AUTORESET_MODES))
async def test_env_that_reuses_its_info(mode: AutoresetMode) -> None:
    """One dict, one dict within it and one array for all infos: `final_info` is as Gymnasium's, the terminal one."""
    env_fns = [partial(ReusingEnv, length, reuses_info=True) for length in LENGTHS]
    expected = await expected_trajectory(env_fns, mode, FEW_STEPS)
    await assert_same_cells(env_fns, mode, expected, 0, without_final_obs)


def checksums(value: Any) -> Any:
    """Of all arrays within, and the other values as text."""
    if isinstance(value, dict):
        return {key: checksums(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [checksums(item) for item in value]
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            return checksums(value.tolist())
        return value.dtype, value.shape, zlib.crc32(np.ascontiguousarray(value))
    return repr(value)


async def keep_and_check(envs: aiovec.AsyncVectorEnv, keep: Callable[[Any], Any], mode: AutoresetMode) -> list[Any]:
    """Keeps of 20 batches what `keep` takes, and sees that it stays; the checksums of all batches."""
    kept: list[tuple[str, Any, Any]] = []
    of_all = []
    async for what, result in trajectory(envs, mode, 50):
        of_all.append(checksums(result))
        if len(kept) < 20:
            part = keep(result)
            kept.append((what, part, checksums(part)))
        del result
        if len(of_all) % 20 == 0:
            for asked, part, before in kept:
                assert checksums(part) == before, f"{asked} changed until {what}"
    assert len(kept) == 20
    assert len(of_all) > 50
    return of_all


KEEP: dict[str, Callable[[Any], Any]] = {
    "all": lambda result: result,
    "rows": lambda result: [array[1:2] for array in arrays_of(result[0])],
    "buffers": lambda result: [np.asarray(memoryview(array)) for array in arrays_of(result[0])],
}


def arrays_of(observations: Any) -> list[Any]:
    """The arrays of a batch of observations."""
    values = observations.values() if isinstance(observations, dict) else [observations]
    return [value for value in values if isinstance(value, np.ndarray)]


@loops_in_turn("nested,cell", product([False, True], CELLS))
async def test_what_was_returned_never_changes(nested: bool, cell: tuple[int, bool]) -> None:
    """Large observations (81 KiB a batch) are lent: all kept, some rows kept, or only the memory behind them."""
    mode = AutoresetMode.SAME_STEP
    env_fns = [partial(ImageEnv, nested)] * 3
    async with AwaitedSync(env_fns, autoreset_mode=mode) as sync:
        expected = [checksums(result) async for _, result in trajectory(sync, mode, 50)]
    for copies, max_buffers, keep in (
        (None, 4, "all"),
        (None, 4, "rows"),
        (None, 4, "buffers"),
        (None, 2, "all"),
        (None, 1, "all"),
        (None, 40, "all"),
        (True, 4, "all"),
    ):
        async with aiovec.AsyncVectorEnv(
            env_fns, autoreset_mode=mode, copy=copies, max_buffers=max_buffers, **cell_arguments(*cell)
        ) as envs:
            found = await keep_and_check(envs, KEEP[keep], mode)
        assert found == expected, f"copy={copies} max_buffers={max_buffers} keep={keep}"


@loops_in_turn("cell", product(CELLS))
async def test_objects_in_infos_never_change(cell: tuple[int, bool]) -> None:
    """Also not where the env goes on changing the object: what `step` returned is the caller's."""
    mode = AutoresetMode.SAME_STEP
    env_fns = [partial(LoggingEnv, env_index) for env_index in range(3)]
    async with aiovec.AsyncVectorEnv(env_fns, autoreset_mode=mode, **cell_arguments(*cell)) as envs:
        await keep_and_check(envs, KEEP["all"], mode)


@loops_in_turn("nested,mode", product([False, True], AUTORESET_MODES))
async def test_views_are_equal_when_they_are_returned(nested: bool, mode: AutoresetMode) -> None:
    """With `copy=False` observations hold until the next call."""
    env_fns = [partial(ImageEnv, nested)] * 3
    expected = await expected_trajectory(env_fns, mode, 40)
    await assert_same_cells(env_fns, mode, expected, 0, copy=False)


@loops_in_turn("mode", product(AUTORESET_MODES))
async def test_callers_may_write_into_what_they_got(mode: AutoresetMode) -> None:
    """Nothing that the caller does to its arrays comes back, also not in the rows that a masked reset repeats."""
    env_fns = [partial(ImageEnv, nested=True)] * 3
    expected = await expected_trajectory(env_fns, mode, 80)

    def overwritten(_what: str, ours: Any, theirs: Any) -> tuple[Any, Any]:
        compared = copy.deepcopy(ours)
        for array in (*arrays_of(ours[0]), *ours[1:-1], ours[-1]["count"]):
            array[...] = 1
        return compared, theirs

    for cell in CELLS:
        async with aiovec.AsyncVectorEnv(env_fns, autoreset_mode=mode, **cell_arguments(*cell)) as envs:
            await assert_same_trajectory(envs, mode, expected, f"{cell}", overwritten)


def as_tensor(array: Any) -> Any:
    """A tensor over the same memory; where PyTorch is missing, another view."""
    return array[...] if torch is None else torch.from_numpy(array)


FORMS: list[Callable[[Any], Any]] = [
    lambda array: array,
    lambda array: array[1:],
    lambda array: array[..., ::2].T,
    lambda array: array.reshape(-1)[5:].view(np.int8),
    memoryview,
    as_tensor,
    lambda array: pickle.loads(pickle.dumps(array)),
    copy.deepcopy,
]


@loops_in_turn("nested,max_buffers,copies", [(False, 3, None), (True, 6, None), (True, 1, None), (False, 2, True)])
async def test_a_thousand_steps_of_keeping_and_dropping(nested: bool, max_buffers: int, copies: bool | None) -> None:
    """Whatever is kept of what steps, resets, part batches and rollouts gave stays, also when the vector is gone."""
    generator = random.Random(f"{nested} {max_buffers} {copies}")
    kept: list[tuple[Any, Any]] = []

    def keep_some(observations: Any, infos: Any = None) -> None:
        arrays = arrays_of(observations)
        if infos and "final_obs" in infos:
            arrays += [array for final in infos["final_obs"] for array in arrays_of(final)]
        for array in arrays:
            if generator.random() < 0.4:
                part = generator.choice(FORMS)(array)
                kept.append((part, checksums(np.asarray(part))))
        while len(kept) > 6 and generator.random() < 0.5:
            kept.pop(generator.randrange(len(kept)))
        for part, before in generator.sample(kept, min(3, len(kept))):
            assert checksums(np.asarray(part)) == before

    def policy(observations: Any) -> Any:
        keep_some(observations)
        return np.array([generator.randrange(2) for _ in range(len(arrays_of(observations)[0]))])

    async with aiovec.AsyncVectorEnv(
        [partial(ImageEnv, nested)] * 4,
        num_workers=2,
        context="fork",
        max_buffers=max_buffers,
        copy=copies,
        autoreset_mode=AutoresetMode.SAME_STEP,
    ) as envs:
        keep_some((await envs.reset(seed=1))[0])
        steps = 0
        while steps < 1000:
            match generator.randrange(40):
                case 0:
                    keep_some((await envs.reset(env_ids=[generator.randrange(4)]))[0])
                case 1:
                    mask = np.arange(4) == generator.randrange(4)
                    keep_some((await envs.reset(options={"reset_mask": mask}))[0])
                case 2:
                    await envs.send(np.zeros(2, np.int64), [3, 1])
                    batch = await envs.recv(min_envs=2)
                    keep_some(batch.observations, batch.infos)
                case 3:
                    rollout = await envs.rollout(policy, generator.randint(1, 6), groups=generator.randint(1, 2))
                    for infos in rollout.infos:
                        keep_some(rollout.observations, infos)
                    steps += len(rollout.rewards)
                    del rollout
                case _:
                    observations, *_, infos = await envs.step(np.zeros(4, np.int64))
                    keep_some(observations, infos)
                    del observations, infos
            steps += 1
    assert all(checksums(np.asarray(part)) == before for part, before in kept)
    del envs
    gc.collect()
    assert len(kept) > 0
    assert all(checksums(np.asarray(part)) == before for part, before in kept)
