"""Strict equality of results, and `SyncVectorEnv` under `await`, so that one script drives both sides."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import aiovec
from aiovec.testing.differences import difference

NUM_STEPS = 200
FEW_STEPS = 70  # what is beside the large table; a reset of all and a masked one are among them
NUM_ENVS = 3
AUTORESET_MODES = (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED)
# (num_workers, shared_memory); the last number is one worker an env.
CELLS = [(num_workers, shared_memory) for num_workers in (0, 1, 2, NUM_ENVS) for shared_memory in (True, False)]

LOOPS = {"asyncio": ("asyncio", {}), "uvloop": ("asyncio", {"use_uvloop": True})}

EnvFn = Callable[[], gym.Env[Any, Any]]


def loops_in_turn(names: str, cases: Iterable[tuple[Any, ...]]) -> pytest.MarkDecorator:
    """`pytest.mark.parametrize` over cases that share out the two event loops.

    A large table on both of them would take twice as long and tell nothing more. The order is Thue and Morse's,
    which keeps no step with the rows and columns of a table.
    """
    params = []
    for number, case in enumerate(cases):
        name = list(LOOPS)[number.bit_count() % 2]
        params.append(pytest.param(*case, LOOPS[name], id="-".join([name, *map(_id_of, case)])))
    return pytest.mark.parametrize(f"{names},anyio_backend", params, indirect=["anyio_backend"])


def _id_of(value: Any) -> str:
    return value.value if isinstance(value, AutoresetMode) else str(value)


def cell_arguments(num_workers: int, shared_memory: bool) -> dict[str, Any]:
    """The arguments of a vector. Workers are forked, as that costs a tenth of a fresh interpreter."""
    return {"num_workers": num_workers, "shared_memory": shared_memory, "context": "fork" if num_workers else None}


def assert_same(ours: Any, theirs: Any, where: str) -> None:
    """Fails unless types, dtypes, shapes, keys and values are equal, bit by bit, at every depth."""
    found = difference(ours, theirs)
    assert found is None, f"{where}{found}"


class AwaitedSync:
    """`SyncVectorEnv` with the methods that are awaited in `AsyncVectorEnv`."""

    def __init__(self, env_fns: Sequence[EnvFn], **kwargs: Any) -> None:
        self.envs = SyncVectorEnv(env_fns, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.envs, name)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        self.envs.close()

    async def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        await asyncio.sleep(0)
        # Gymnasium takes the reset_mask out of the caller's own dict.
        return self.envs.reset(seed=seed, options=None if options is None else dict(options))

    async def step(self, actions: Any) -> Any:
        await asyncio.sleep(0)
        return self.envs.step(actions)


Vector = AwaitedSync | aiovec.AsyncVectorEnv
# A vector that was driven by the script, and what it gave.
Expected = tuple[AwaitedSync, list[tuple[str, Any]]]
# From what was asked and both results to what is compared.
Adjust = Callable[[str, Any, Any], tuple[Any, Any]]


def spaces_of(envs: Any) -> dict[str, Any]:
    """What a vector shows of its spaces."""
    names = ("observation_space", "action_space", "single_observation_space", "single_action_space")
    return {name: getattr(envs, name) for name in (*names, "metadata", "render_mode", "num_envs")}


def assert_same_spaces(ours: Any, theirs: Any, where: str) -> None:
    """Fails unless both show equal spaces and metadata."""
    for name, shown in spaces_of(theirs).items():
        assert_same(spaces_of(ours)[name], shown, f"{where}: {name}")
        assert repr(spaces_of(ours)[name]) == repr(shown), f"{where}: {name}"


def ended_of(result: Any) -> Any:
    """The mask of the envs whose episode ended with this step."""
    return result[2] | result[3]


async def trajectory(envs: Vector, mode: AutoresetMode, num_steps: int = NUM_STEPS) -> AsyncIterator[tuple[str, Any]]:
    """Resets, steps, and resets in between, by a fixed script: what was asked, and its result.

    Under DISABLED whatever ended is reset by a mask, since Gymnasium's vector does not do it.
    """
    generator = np.random.default_rng(5)
    n = envs.num_envs
    yield "reset", await envs.reset(seed=7)
    mask = np.zeros(n, np.bool_)
    for number in range(num_steps):
        if number % 70 == 30:  # in the middle of episodes, and whether or not one just ended
            some = mask | (np.arange(n) == number // 70 % n)
            yield f"masked reset {number}", await envs.reset(options={"reset_mask": some, "level": number})
        elif number % 70 == 60:
            seeds = [number, *[None] * (n - 2), 1][:n]
            yield f"reset {number}", await envs.reset(seed=seeds, options={"level": number})
        elif mode is AutoresetMode.DISABLED and mask.any():
            yield f"masked reset {number}", await envs.reset(seed=number, options={"reset_mask": mask})
        space = envs.single_action_space
        actions = generator.integers(int(space.start), int(space.start + space.n), n)
        result = await envs.step(actions)
        mask = ended_of(result)
        yield f"step {number}", result


async def expected_trajectory(
    env_fns: Sequence[EnvFn], mode: AutoresetMode, num_steps: int = NUM_STEPS, **kwargs: Any
) -> Expected:
    """What `SyncVectorEnv` does with the script."""
    async with AwaitedSync(env_fns, autoreset_mode=mode, **kwargs) as envs:
        # Copied, as envs that reuse their arrays write into Gymnasium's final_obs.
        results = [(what, copy.deepcopy(result)) async for what, result in trajectory(envs, mode, num_steps)]
    steps = [result for what, result in results if what.startswith("step")]
    assert len(steps) == num_steps
    assert any(ended_of(result).any() for result in steps)  # else autoreset would not be compared
    return envs, results


async def assert_same_cells(
    env_fns: Sequence[EnvFn],
    mode: AutoresetMode,
    expected: Expected,
    number: int,
    adjust: Adjust = lambda _what, ours, theirs: (ours, theirs),
    **kwargs: Any,
) -> None:
    """Drives a vector of each cell by the script, all at once, and compares every result as it comes.

    Workers are forked; for every third `number` one cell has fresh interpreters, each time another cell.
    """
    async with contextlib.AsyncExitStack() as stack:
        cells = []
        for position, cell in enumerate(CELLS):
            arguments = cell_arguments(*cell)
            if 3 * position == number % (3 * len(CELLS)):
                arguments["context"] = None
            envs = aiovec.AsyncVectorEnv(env_fns, autoreset_mode=mode, **arguments, **kwargs)
            # One after the other: a fork while another start runs in a thread may copy a lock that is held.
            await stack.enter_async_context(envs)
            cells.append(assert_same_trajectory(envs, mode, expected, f"{arguments}", adjust))
        await asyncio.gather(*cells)


async def assert_same_trajectory(
    envs: aiovec.AsyncVectorEnv,
    mode: AutoresetMode,
    expected: Expected,
    where: str,
    adjust: Adjust = lambda _what, ours, theirs: (ours, theirs),
) -> None:
    """Drives a started vector by the script and compares every result as it comes."""
    sync, results = expected
    num_steps = sum(what.startswith("step") for what, _ in results)
    theirs: Iterator[tuple[str, Any]] = iter(results)
    assert_same_spaces(envs, sync, where)
    async for what, result in trajectory(envs, mode, num_steps):
        expected_what, expected_result = next(theirs)
        assert what == expected_what, f"{where}: {what} instead of {expected_what}"
        assert_same(*adjust(what, result, expected_result), f"{where}: {what}")
    assert next(theirs, None) is None
