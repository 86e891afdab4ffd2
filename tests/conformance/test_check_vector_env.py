"""`check_vector_env`: passes for what keeps the contract, and each of its checks fails for what does not."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
from async_envs import AsyncCounter
from conformance.comparing import loops_in_turn
from gymnasium import spaces
from sample_envs import Counter
from space_envs import OBSERVATION_SPACES, ImageEnv, SpaceEnv

import aiovec
from aiovec import AsyncVectorEnv, ClosedEnvironmentError, InvalidEnvResultError, RemoteError, WorkerDied
from aiovec.testing import ContractError, FaultyEnv, check_vector_env, vector_checks
from aiovec.testing.contract import CHECKS

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

ENV_CHECKS = {"env_fn_pickles", "env_is_determined", "env_fits_spaces", "env_keeps_results"}
FAILURE_CHECKS = set(list(CHECKS)[list(CHECKS).index("exception") :])
NEEDS_WORKERS = {"num_workers", "cancellation", "free_loop", "worker_died", "stuck_env"}
STEPS = 60

forked: Any = functools.partial(AsyncVectorEnv, num_workers=2, context="fork")


def all_but(*checks: str) -> set[str]:
    """What to skip, so that only these are made."""
    return set(CHECKS) - set(checks)


# ---- what keeps the contract


@loops_in_turn("num_workers", [(1,), (2,)])
async def test_a_vector_with_workers(num_workers: int) -> None:
    """Fresh interpreters, as users have them."""
    made = await check_vector_env(functools.partial(AsyncVectorEnv, num_workers=num_workers))
    assert made == tuple(name for name in CHECKS if name not in ENV_CHECKS)


@pytest.mark.blocks_loop
async def test_a_vector_without_workers() -> None:
    made = await check_vector_env(functools.partial(AsyncVectorEnv, num_workers=0), num_steps=STEPS)
    assert made == tuple(name for name in CHECKS if name not in ENV_CHECKS | NEEDS_WORKERS)


@loops_in_turn("shared_memory,copy", [(False, None), (True, True)])
async def test_a_vector_with_other_options(shared_memory: bool, copy: bool | None) -> None:
    await check_vector_env(functools.partial(forked, shared_memory=shared_memory, copy=copy), num_steps=STEPS)


ENVS: dict[str, Callable[[], Any]] = {
    "CartPole": functools.partial(gym.make, "CartPole-v1"),
    "Pendulum": functools.partial(gym.make, "Pendulum-v1", max_episode_steps=17),
    "Taxi": functools.partial(gym.make, "Taxi-v4", max_episode_steps=17),
    "FrozenLake": functools.partial(gym.make, "FrozenLake-v1"),
    "nested spaces": functools.partial(SpaceEnv, OBSERVATION_SPACES["nested"]),
    "async": functools.partial(AsyncCounter, length=5),
}


@loops_in_turn("name", [(name,) for name in ENVS])
async def test_envs(name: str) -> None:
    made = await check_vector_env(forked, ENVS[name], num_steps=STEPS)
    assert made == tuple(check for check in CHECKS if check not in FAILURE_CHECKS | {"render"})


async def test_an_env_that_renders() -> None:
    """A lambda, too."""
    made = await check_vector_env(forked, lambda: FaultyEnv(episode_length=4), num_steps=STEPS)
    assert made == tuple(check for check in CHECKS if check not in FAILURE_CHECKS)


async def test_large_observations_are_lent_and_kept() -> None:
    await check_vector_env(
        forked, functools.partial(CopiedImages, True), num_steps=STEPS, skip=all_but("ownership", "same_step")
    )


class CopiedImages(ImageEnv):
    def _now(self) -> Any:
        observation = super()._now()
        return {key: value if isinstance(value, str) else value.copy() for key, value in observation.items()}


async def test_checks_can_be_skipped() -> None:
    assert await check_vector_env(forked, skip=all_but("close", "spaces"), num_steps=STEPS) == ("spaces", "close")


async def test_arguments_are_checked() -> None:
    with pytest.raises(TypeError, match="maker='CartPole-v1': expected a function, such as a class"):
        await check_vector_env("CartPole-v1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"env_fn=.*: expected a function"):
        await check_vector_env(forked, FaultyEnv())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no such check; there are env_fn_pickles, "):
        await check_vector_env(forked, skip=["closes"])
    with pytest.raises(ValueError, match="num_steps=39: expected a number of steps from 40"):
        await check_vector_env(forked, num_steps=39)


async def test_what_could_not_be_compared_is_told() -> None:
    with pytest.warns(UserWarning, match="no episode ended within num_steps=60: autoreset was not compared"):
        await check_vector_env(
            forked, functools.partial(Counter, length=1000), skip=all_but("next_step"), num_steps=STEPS
        )


def test_the_docstring_names_every_check() -> None:
    rows = [line for line in (check_vector_env.__doc__ or "").splitlines() if line.lstrip().startswith("| ``")]
    named = [name for row in rows for name in re.findall(r"``(\w+)``", row.split("|")[1])]
    assert named == list(CHECKS)


# ---- envs that do not


class ByChance(Counter):
    """Ignores its seed."""

    def _observation(self) -> Any:
        return np.array([0, 0, random.random()], np.float32)


class SharesCounter(Counter):
    """Each env begins where the last one has ended."""

    total = 0

    def step(self, action: Any) -> Any:
        SharesCounter.total += 1
        return *super().step(action)[:4], {"total": SharesCounter.total}


class Misfit(Counter):
    """Its observation is not what its space says."""

    def __init__(self, observation: Any) -> None:
        super().__init__()
        self.observation_space = spaces.Dict(
            {
                "camera": spaces.Box(0, 9, (2,), np.float32),
                "pair": spaces.Tuple([spaces.Discrete(2), spaces.Discrete(2)]),
            }
        )
        self.observation = observation

    def _observation(self) -> Any:
        return self.observation


class Reuses(Counter):
    """Has one array for all of its observations."""

    def __init__(self) -> None:
        super().__init__()
        self.array = np.zeros(3, np.float32)

    def _observation(self) -> Any:
        self.array[:] = self.steps
        return self.array


class ReusesInfo(Counter):
    """Has one info."""

    def __init__(self) -> None:
        super().__init__()
        self.info: dict[str, Any] = {}

    def step(self, action: Any) -> Any:
        self.info["steps"] = self.steps
        return *super().step(action)[:4], self.info


def with_a_lock(_lock: Any) -> Counter:
    return Counter()


CAMERA, PAIR = np.zeros(2, np.float32), (0, 1)

BROKEN_ENVS: dict[str, tuple[str, Callable[[], Any], str]] = {
    "lock": ("env_fn_pickles", functools.partial(with_a_lock, threading.Lock()), "cannot pickle '_thread.lock' object"),
    "chance": ("env_is_determined", ByChance, r"reset of .*, observations\[2\].*does not determine what follows"),
    "shared": ("env_is_determined", SharesCounter, r"step 0 of .*, infos\['total'\]: expected 1, got"),
    "dtype": (
        "env_fits_spaces",
        functools.partial(Misfit, {"camera": CAMERA.astype(np.float64), "pair": PAIR}),
        r"reset, observation\['camera'\]: expected what is in Box.*float32.*, got float64\(2,\)",
    ),
    "shape": (
        "env_fits_spaces",
        functools.partial(Misfit, {"camera": CAMERA[:1], "pair": PAIR}),
        r"observation\['camera'\].*got float32\(1,\)",
    ),
    "range": (
        "env_fits_spaces",
        functools.partial(Misfit, {"camera": CAMERA - 1, "pair": PAIR}),
        r"observation\['camera'\].*\[-1. -1.\]",
    ),
    "tuple": (
        "env_fits_spaces",
        functools.partial(Misfit, {"camera": CAMERA, "pair": (0, 2)}),
        r"observation\['pair'\]\[1\]: expected what is in Discrete\(2\), got int 2",
    ),
    "keys": (
        "env_fits_spaces",
        functools.partial(Misfit, {"camera": CAMERA}),
        r"observation: expected what is in Dict.*got dict",
    ),
    "array": ("env_keeps_results", Reuses, r"step 0, observations\[0\], looked at again.*return a copy"),
    "info": ("env_keeps_results", ReusesInfo, r"step 0, infos\['steps'\], looked at again"),
}


@loops_in_turn("name", [(name,) for name in BROKEN_ENVS])
async def test_broken_envs(name: str) -> None:
    """The first check that fails is the one that says what is wrong with the env itself."""
    check, env_fn, message = BROKEN_ENVS[name]
    SharesCounter.total = 0
    with pytest.raises(ContractError, match=message) as caught:
        await check_vector_env(forked, env_fn, num_steps=STEPS)
    assert caught.value.check == check


# ---- vectors that do not


class KnowsSpacesTooEarly(AsyncVectorEnv):
    @property
    def single_observation_space(self) -> Any:
        return spaces.Discrete(2)


class OpensAgain(AsyncVectorEnv):
    """After a close it gives something all the same."""

    async def reset(self, **keywords: Any) -> Any:
        try:
            return await super().reset(**keywords)
        except ClosedEnvironmentError:
            return None


class OtherBounds(AsyncVectorEnv):
    @property
    def observation_space(self) -> Any:
        space = super().observation_space
        return spaces.Box(-9, 9, space.shape, space.dtype)


class PairsOldReward(AsyncVectorEnv):
    """Each observation has the reward of the step before."""

    last: Any = None

    async def step(self, actions: Any) -> Any:
        observations, rewards, *others = await super().step(actions)
        last, self.last = self.last, rewards
        return observations, rewards if last is None else last, *others


class WithoutFinalObservations(AsyncVectorEnv):
    async def step(self, actions: Any) -> Any:
        *others, infos = await super().step(actions)
        return *others, {key: value for key, value in infos.items() if key != "final_obs"}


class ResetsAll(AsyncVectorEnv):
    """Has no masks."""

    async def reset(self, *, options: Any = None, **others: Any) -> Any:
        return await super().reset(**others)


class TakesMasks(AsyncVectorEnv):
    """Takes the mask out of the caller's own dict."""

    async def reset(self, *, options: Any = None, **others: Any) -> Any:
        result = await super().reset(options=options, **others)
        (options or {}).pop("reset_mask", None)
        return result


class OtherSeeds(AsyncVectorEnv):
    """Its seeds depend on how many workers there are."""

    async def reset(self, *, seed: Any = None, **others: Any) -> Any:
        return await super().reset(seed=seed + self.num_workers - 1 if isinstance(seed, int) else seed, **others)


class OtherFrames(AsyncVectorEnv):
    async def render(self, **keywords: Any) -> Any:
        return tuple(frame + np.uint8(1) for frame in await super().render(**keywords))


class SortsEnvIds(AsyncVectorEnv):
    async def reset(self, *, env_ids: Any = None, seed: Any = None, **others: Any) -> Any:
        if env_ids is not None:
            seed, env_ids = seed[::-1], sorted(env_ids)
        return await super().reset(seed=seed, env_ids=env_ids, **others)

    async def call(self, name: str, /, *args: Any, env_ids: Any = None, **keywords: Any) -> Any:
        return await super().call(name, *args, env_ids=env_ids and sorted(env_ids), **keywords)


class ResetsOthersToo(AsyncVectorEnv):
    """A reset of some draws from the numbers of the others."""

    async def reset(self, *, env_ids: Any = None, **others: Any) -> Any:
        result = await super().reset(env_ids=env_ids, **others)
        if env_ids is not None:
            await super().reset(env_ids=[i for i in range(self.num_envs) if i not in env_ids])
        return result


class MixesRows(AsyncVectorEnv):
    async def recv(self, *arguments: Any, **keywords: Any) -> Any:
        batch = await super().recv(*arguments, **keywords)
        return batch._replace(rewards=batch.rewards[::-1])


class IgnoresMinEnvs(AsyncVectorEnv):
    async def recv(self, *_arguments: Any, **_keywords: Any) -> Any:
        return await super().recv(max_envs=1)


class GivesNothing(AsyncVectorEnv):
    """`recv` with nothing owed is no error."""

    async def recv(self, *arguments: Any, **keywords: Any) -> Any:
        try:
            return await super().recv(*arguments, **keywords)
        except aiovec.NoAsyncCallError:
            return None


class OtherSubEnvs(AsyncVectorEnv):
    def __getitem__(self, env_index: int) -> Any:
        return super().__getitem__((env_index + 1) % self.num_envs)


class ResettingSubEnv:
    """Has an autoreset."""

    def __init__(self, sub: Any) -> None:
        self.sub = sub
        self.observation_space = sub.observation_space

    async def reset(self, **keywords: Any) -> Any:
        return await self.sub.reset(**keywords)

    async def step(self, action: Any) -> Any:
        try:
            return await self.sub.step(action)
        except aiovec.ResetNeeded:
            return await self.sub.reset()


class ResettingSubEnvs(AsyncVectorEnv):
    def __getitem__(self, env_index: int) -> Any:
        return ResettingSubEnv(super().__getitem__(env_index))


class SwallowsCancellation(AsyncVectorEnv):
    async def step(self, actions: Any) -> Any:
        task = asyncio.ensure_future(super().step(actions))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            return await task


class StepsAtOnce(AsyncVectorEnv):
    """Its second step does not wait by `await`."""

    has_stepped = False

    async def step(self, actions: Any) -> Any:
        if self.has_stepped:
            return actions, 0, 0, 0, {}
        self.has_stepped = True
        return await super().step(actions)


class StepsAllTheSame(AsyncVectorEnv):
    """Throws away what is owed, and steps."""

    async def step(self, actions: Any) -> Any:
        try:
            return await super().step(actions)
        except aiovec.AlreadyPendingCallError:
            await super().recv(min_envs=self.num_envs)
            return await super().step(actions)


class PairsLateAnswers(AsyncVectorEnv):
    """After a cancelled step and a reset, the late answer is that of the next step."""

    late: Any = None

    async def step(self, actions: Any) -> Any:
        late, self.late = self.late, None
        try:
            result = await super().step(actions)
        except asyncio.CancelledError:
            self.late = (await super().recv(min_envs=self.num_envs))[2]
            raise
        return result if late is None else (result[0], late, *result[2:])

    async def recv(self, *_arguments: Any, **_keywords: Any) -> Any:
        raise AssertionError("this one only resets")


class DropsWhatIsOwed(AsyncVectorEnv):
    """`recv` gives the answer of another step than that which was cancelled."""

    async def recv(self, *arguments: Any, **keywords: Any) -> Any:
        await super().recv(*arguments, **keywords)
        await super().send([0] * self.num_envs)
        return await super().recv(*arguments, **keywords)


class KeepsOpen(AsyncVectorEnv):
    @property
    def closed(self) -> bool:
        return False


class ClosesOnce(AsyncVectorEnv):
    async def close(self, **keywords: Any) -> None:
        if self.closed:
            raise ClosedEnvironmentError("close()")
        await super().close(**keywords)


class LeavesProcess(AsyncVectorEnv):
    left: ClassVar[list[subprocess.Popen[bytes]]] = []

    async def close(self, **keywords: Any) -> None:
        await super().close(**keywords)
        self.left.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))


class LeavesDescriptors(AsyncVectorEnv):
    left: ClassVar[list[int]] = []

    def terminate(self) -> None:
        super().terminate()
        self.left += os.pipe()


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """Ends what these two left."""
    yield
    for process in LeavesProcess.left:
        process.kill()
        process.wait()
    for fd in LeavesDescriptors.left:
        os.close(fd)
    LeavesProcess.left.clear()
    LeavesDescriptors.left.clear()


class BlocksLoop(AsyncVectorEnv):
    """Waits without `await` in its first step."""

    has_waited = False

    async def step(self, actions: Any) -> Any:
        if not self.has_waited:
            self.has_waited = True
            time.sleep(1.5)
        return await super().step(actions)


class WaitsWithoutAwait(AsyncVectorEnv):
    async def close(self, **keywords: Any) -> None:
        time.sleep(1.5)
        await super().close(**keywords)


class Raises(AsyncVectorEnv):
    """Raises what `instead` makes of the env's exception; gives what that returns."""

    instead: Callable[[AsyncVectorEnv, Exception], Any]

    async def step(self, actions: Any) -> Any:
        try:
            return await super().step(actions)
        except Exception as error:
            return type(self).instead(self, error)


class Retells(Raises):
    def instead(self, error: Exception) -> Any:
        raise RuntimeError(f"a worker failed: {error}") from None


class LosesNotes(Raises):
    def instead(self, error: Exception) -> Any:
        raise type(error)(*error.args) from None


class LosesArguments(Raises):
    def instead(self, error: Exception) -> Any:
        error.args = (str(error),)
        raise error


class LosesFrames(Raises):
    def instead(self, error: Exception) -> Any:
        raise error.with_traceback(None)


class LosesEnvIndex(Raises):
    def instead(self, error: Exception) -> Any:
        error.__dict__.pop("_aiovec_failures")
        raise error


class RaisesFirst(Raises):
    def instead(self, error: Exception) -> Any:
        raise error.exceptions[0] if isinstance(error, ExceptionGroup) else error


class RaisesCause(Raises):
    def instead(self, error: Exception) -> Any:
        raise error.__cause__ or error


class LosesText(Raises):
    def instead(self, error: Exception) -> Any:
        raise RemoteError("Exception", "something failed") if isinstance(error, RemoteError) else error


class GivesZeros(Raises):
    def instead(self, error: Exception) -> Any:
        if not isinstance(error, InvalidEnvResultError):
            raise error
        return np.zeros((3, 3), np.float32), np.zeros(3), np.zeros(3, bool), np.zeros(3, bool), {}


class LosesOthers(AsyncVectorEnv):
    """One that fails has all of them reset."""

    async def step(self, actions: Any) -> Any:
        try:
            return await super().step(actions)
        except ValueError:
            await super().reset(env_ids=[1])
            raise


class DropsOthers(AsyncVectorEnv):
    async def step(self, actions: Any) -> Any:
        try:
            return await super().step(actions)
        except ValueError:
            await super().recv(min_envs=2)
            raise


class StartsWithoutReason(AsyncVectorEnv):
    def __await__(self) -> Any:
        try:
            return (yield from super().__await__())
        except ValueError:
            raise RuntimeError("the start failed") from None


class ResetsAgain(AsyncVectorEnv):
    async def reset(self, **keywords: Any) -> Any:
        try:
            return await super().reset(**keywords)
        except ValueError:
            return await super().reset(**keywords)


class ClosesQuietly(AsyncVectorEnv):
    async def close(self, **keywords: Any) -> None:
        try:
            await super().close(**keywords)
        except ValueError:
            return


class ClosesWithNoise(AsyncVectorEnv):
    """Raises again and again."""

    error: Exception | None = None

    async def close(self, **keywords: Any) -> None:
        try:
            await super().close(**keywords)
        except ValueError as error:
            self.error = error
        if self.error is not None:
            raise self.error


class TellsPipes(Raises):
    def instead(self, error: Exception) -> Any:
        raise ConnectionResetError("the pipe is closed") if isinstance(error, WorkerDied) else error


class TellsExitCode(Raises):
    def instead(self, error: Exception) -> Any:
        if isinstance(error, WorkerDied):
            error.exitcode = 0
        raise error


class WithoutTimeout(AsyncVectorEnv):
    def __init__(self, env_fns: Any, *, step_timeout: float | None = None, **options: Any) -> None:
        super().__init__(env_fns, **options)


class TellsNoStack(Raises):
    def instead(self, error: Exception) -> Any:
        if isinstance(error, aiovec.EnvTimeoutError):
            error.stack = ""
        raise error


class FillsRewards(AsyncVectorEnv):
    async def step(self, actions: Any) -> Any:
        observations, rewards, *others = await super().step(actions)
        return observations, np.nan_to_num(rewards), *others


@dataclass(frozen=True)
class Broken:
    """A vector, the check that must find it, and what that must say."""

    maker: Any
    check: str
    message: str

    def __str__(self) -> str:
        return f"{self.check}-{getattr(self.maker, '__name__', 'copy=False')}"


BROKEN_VECTORS = [
    Broken(KnowsSpacesTooEarly, "before_start", "before the start, single_observation_space: expected RuntimeError"),
    Broken(OpensAgain, "before_start", "reset after a close before the start: expected ClosedEnvironmentError"),
    Broken(OtherBounds, "spaces", r"observation_space \(NEXT_STEP\): expected .*Box\(-inf.*, got .*Box\(-9"),
    Broken(PairsOldReward, "next_step", r"step 1 \(NEXT_STEP\), rewards\[0\]: expected .*2.0.*, got .*1.0"),
    Broken(WithoutFinalObservations, "same_step", r"step 2 \(SAME_STEP\), infos: expected the keys .*final_obs"),
    Broken(ResetsAll, "disabled", r"masked reset before step 3 \(DISABLED\), observations"),
    Broken(TakesMasks, "disabled", r"masked reset .*, arguments.*The caller's arguments are his"),
    Broken(OtherSeeds, "num_workers", r"reset \(NEXT_STEP\), observations.*so it is with num_workers=2"),
    Broken(functools.partial(forked, copy=False), "ownership", r"reset .*looked at again after step 1"),
    Broken(OtherFrames, "render", r"render\(\)\[0\]"),
    Broken(SortsEnvIds, "attributes", r"call\(…, env_ids=\[2, 0\]\)\[0\]: expected 102, got 7"),
    Broken(SortsEnvIds, "part_resets", r"reset\(env_ids=\[2, 1\]\).*observations.*in the order of `env_ids`"),
    Broken(ResetsOthersToo, "part_resets", r"step 14 .*The envs that were not meant must go on"),
    Broken(MixesRows, "part_batches", r"of env \d by send and recv, reward"),
    Broken(IgnoresMinEnvs, "part_batches", r"recv\(min_envs=\d\).*, env_ids: expected [23] or more of"),
    Broken(GivesNothing, "part_batches", r"recv\(\) with nothing owed: expected NoAsyncCallError, got no exception"),
    Broken(OtherSubEnvs, "sub_envs", r"step \d+ of envs\[\d\], what follows the observation"),
    Broken(ResettingSubEnvs, "sub_envs", r"another step after step \d+ of envs\[\d\]: expected ResetNeeded"),
    Broken(SwallowsCancellation, "cancellation", r"expected CancelledError, got .*it must end as cancelled"),
    Broken(StepsAtOnce, "cancellation", r"step 1 .*in a task: expected a task that waits"),
    Broken(StepsAllTheSame, "cancellation", r"another step after the cancelled step 1 .*AlreadyPendingCallError"),
    Broken(PairsLateAnswers, "cancellation", r"after the cancelled step 1 "),
    Broken(DropsWhatIsOwed, "cancellation", r"recv\(min_envs=3\) after the cancelled step 1 .*, rows by env\[0\]\[0\]"),
    Broken(KeepsOpen, "close", r"closed, after the end of `async with`: expected True, got False"),
    Broken(ClosesOnce, "close", r"ClosedEnvironmentError: close\(\)"),
    Broken(OpensAgain, "close", r"reset after the close: expected ClosedEnvironmentError, got no exception, but None"),
    Broken(LeavesProcess, "nothing_left", r"children after the close: expected none .*, got \['pid \d+'\]"),
    Broken(LeavesDescriptors, "nothing_left", r"descriptors after terminate\(\): expected none .*pipe:"),
    Broken(Retells, "exception", r"a step that raises: expected ValueError, got RuntimeError: a worker failed"),
    Broken(LosesArguments, "exception", r"a step that raises, args: expected 2 items, got 1 items"),
    Broken(LosesNotes, "exception", r"a step that raises, notes: expected 'a note of the env' among them"),
    Broken(LosesFrames, "exception", r"a step that raises, traceback: expected the env's own frame, in step"),
    Broken(LosesEnvIndex, "exception", r"failures\(exception\): expected one failure, of env 1, got none"),
    Broken(LosesOthers, "others_whole", r"the step after a failed one: expected ResetNeeded, got no exception"),
    Broken(DropsOthers, "others_whole", r"recv\(\) after a step in which one env failed"),
    Broken(RaisesFirst, "several_failures", r"a step in which two envs raise: expected ExceptionGroup, got ValueError"),
    Broken(Retells, "unpicklable_exception", r"'raise-unpicklable': expected RemoteError, got RuntimeError"),
    Broken(LosesText, "unpicklable_exception", r"'raise-unpicklable', text: expected that of the env"),
    Broken(RaisesCause, "exit_in_env", r"'exit': expected RemoteError, got SystemExit itself"),
    Broken(GivesZeros, "wrong_result", r"'wrong-shape': expected ValueError, got no exception"),
    Broken(StartsWithoutReason, "failed_start", r"expected ValueError, got RuntimeError: the start failed"),
    Broken(ResetsAgain, "failed_reset", r"a reset that raises: expected ValueError, got no exception"),
    Broken(ClosesQuietly, "failed_close", r"a close that raises: expected ValueError, got no exception"),
    Broken(ClosesWithNoise, "failed_close", r"another close after one that raised"),
    Broken(TellsPipes, "worker_died", r"'kill': expected WorkerDied, got ConnectionResetError: the pipe is closed"),
    Broken(TellsExitCode, "worker_died", r"'kill', exitcode: expected -9, got 0"),
    Broken(WithoutTimeout, "stuck_env", r"'hang' and step_timeout=1.0: expected an end, got nothing for 2 s"),
    Broken(TellsNoStack, "stuck_env", r"stack: expected the place where it hangs, got ''"),
    Broken(FillsRewards, "restart", r"rewards\[1\]: expected nan, got 0.0"),
]
BLOCKING_VECTORS = [
    Broken(BlocksLoop, "free_loop", r"a heartbeat on the event loop: expected no gap above 0.5 s"),
    Broken(WaitsWithoutAwait, "free_loop", r"a gap of [01]\.\d\d s"),
]


async def assert_found(broken: Broken) -> None:
    maker = broken.maker
    if isinstance(maker, type):
        maker = functools.partial(maker, num_workers=2, context="fork")
    seconds = 2 if broken.maker is WithoutTimeout else 60
    with pytest.raises(ContractError, match=re.compile(broken.message, re.DOTALL)) as caught:
        await check_vector_env(maker, skip=all_but(broken.check), num_steps=STEPS, seconds_per_check=seconds)
    assert caught.value.check == broken.check


@loops_in_turn("broken", [(broken,) for broken in BROKEN_VECTORS])
async def test_broken_vectors(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is found by the check that is there for it, which says what it found."""
    monkeypatch.setattr(vector_checks, "_GONE_WITHIN_SECONDS", 0.5)
    await assert_found(broken)


@pytest.mark.blocks_loop
@loops_in_turn("broken", [(broken,) for broken in BLOCKING_VECTORS])
async def test_vectors_that_block_the_loop(broken: Broken) -> None:
    await assert_found(broken)


def test_every_check_can_fail() -> None:
    """Here."""
    found = {broken.check for broken in (*BROKEN_VECTORS, *BLOCKING_VECTORS)} | {
        check for check, *_ in BROKEN_ENVS.values()
    }
    assert found == set(CHECKS)


# ---- the error


async def test_an_exception_in_a_check_is_its_cause() -> None:
    """The message says where it was."""

    class Fails(AsyncVectorEnv):
        async def set_attr(self, *_arguments: Any, **_keywords: Any) -> None:
            raise NotImplementedError("not yet")

    maker = functools.partial(Fails, num_workers=1, context="fork")
    with pytest.raises(ContractError, match="check 'attributes', .*NotImplementedError: not yet") as caught:
        await check_vector_env(maker, skip=all_but("attributes"), num_steps=STEPS)
    assert isinstance(caught.value.__cause__, NotImplementedError)
    assert isinstance(caught.value, AssertionError)


async def test_an_env_that_cannot_be_built_raises_its_own_exception() -> None:
    with pytest.raises(ValueError, match="FaultyEnv failed in init"):
        await check_vector_env(forked, functools.partial(FaultyEnv, "raise", "init"))


async def test_a_cancellation_is_one() -> None:
    """It is no violation, and leaves nothing."""
    task = asyncio.create_task(check_vector_env(forked, skip=all_but("free_loop")))
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_the_error_travels() -> None:
    import pickle

    error = ContractError("close", "after the close", "True", "False", "It is closed for good.")
    again = pickle.loads(pickle.dumps(error))
    assert (
        str(again) == str(error) == ("check 'close', after the close: expected True, got False. It is closed for good.")
    )
    facts = (again.check, again.where, again.expected, again.got, again.meaning)
    assert facts == ("close", "after the close", "True", "False", "It is closed for good.")
