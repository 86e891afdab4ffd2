"""Checks of a vector whose envs do not fail."""

from __future__ import annotations

import asyncio
import copy
import functools
import gc
import itertools
import time
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import error as gymnasium_error
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate

from aiovec.testing.faulty_env import FaultyEnv, Moment
from aiovec.testing.observing import Heartbeat, held_by_process
from aiovec.testing.subject import NOT_AS_SYNC, Subject
from aiovec.testing.tapes import VECTOR_FACTS, Asked, EnvFn, record_env

__all__ = [
    "attributes",
    "autoreset",
    "before_start",
    "cancellation",
    "close",
    "free_loop",
    "nothing_left",
    "num_workers",
    "ownership",
    "part_batches",
    "part_resets",
    "render",
    "spaces",
    "sub_envs",
]

_LONGEST_GAP_SECONDS = 0.5
_GONE_WITHIN_SECONDS = 5.0


async def before_start(subject: Subject) -> None:
    """A vector that was not started says so, knows its numbers, and can be closed."""
    where, meaning = (
        "before the start",
        "Building a vector starts nothing; how many envs and workers there are is known.",
    )
    envs = subject.build()
    try:
        subject.expect_same(envs.num_envs, subject.num_envs, f"{where}, num_envs", meaning)
        subject.expect_same(len(envs), subject.num_envs, f"{where}, len()", meaning)
        subject.expect(isinstance(envs.num_workers, int), f"{where}, num_workers", "an int", envs.num_workers, meaning)
        subject.expect_same(envs.closed, False, f"{where}, closed", meaning)

        async def ask_space() -> Any:
            return envs.single_observation_space

        await subject.expect_raised(RuntimeError, ask_space, f"{where}, single_observation_space", meaning)
        await envs.close()
        subject.expect_same(envs.closed, True, "a close before the start, closed", "It is closed for good.")
        await _expect_closed(subject, envs, ("reset",), "after a close before the start")
    finally:
        envs.terminate()


async def spaces(subject: Subject) -> None:
    """Spaces and metadata are those of `SyncVectorEnv`."""
    for mode in AutoresetMode:
        tape = await subject.tape(mode)
        async with subject.started(autoreset_mode=mode) as envs:
            for name in VECTOR_FACTS:
                got, expected = getattr(envs, name), tape.facts[name]
                subject.expect_same(got, expected, f"{name} ({mode.name})", NOT_AS_SYNC)
                # A bound or a dtype that `==` of a space does not compare.
                subject.expect_same(repr(got), repr(expected), f"{name} ({mode.name})", NOT_AS_SYNC)


async def autoreset(subject: Subject, mode: AutoresetMode) -> None:
    """Step for step what `SyncVectorEnv` does."""
    tape = await subject.tape(mode)
    async with subject.started(autoreset_mode=mode) as envs:
        await subject.replay(envs, tape)


async def num_workers(subject: Subject) -> None:
    """Trajectories do not depend on `num_workers`, which the maker must accept."""
    tape = await subject.tape(AutoresetMode.NEXT_STEP)
    for number in (1, 2, subject.num_envs):
        async with subject.started(num_workers=number) as envs:
            meaning = f"The results depend on how many workers there are: so it is with num_workers={number}."
            await subject.replay(envs, tape, meaning)


async def ownership(subject: Subject) -> None:
    """What `reset` and `step` returned never changes, neither in later steps nor by the close."""
    tape = await subject.tape(AutoresetMode.SAME_STEP)
    kept: list[tuple[Asked, Any, Any]] = []

    def look_again(after: str) -> None:
        for asked, result, before in kept:
            meaning = "What was returned is the caller's: it must be a copy, or memory that is not used again."
            where = f"{asked.what}, looked at again after {after}"
            subject.expect_result(result, before, where, asked.method, meaning)

    async with subject.started(autoreset_mode=AutoresetMode.SAME_STEP) as envs:
        for asked in tape.asked:
            result = await subject.ask(envs, asked)
            kept.append((asked, result, copy.deepcopy(result)))
            if len(kept) == 3:
                look_again(asked.what)
        look_again(tape.asked[-1].what)
    look_again("the close")


async def render(subject: Subject) -> None:
    """A frame of each env, as it renders by itself."""
    tape = await subject.tape(AutoresetMode.NEXT_STEP)
    meaning = "`render` gives a tuple with what each env renders, in the order of the envs."
    async with subject.started() as envs:
        for asked in tape.asked:
            await subject.ask(envs, asked)
        subject.expect_same(await envs.render(), tape.frames, "render()", meaning)
        last = subject.num_envs - 1
        frames = await envs.render(env_ids=[last, 0])
        subject.expect_same(frames, (tape.frames[last], tape.frames[0]), f"render(env_ids=[{last}, 0])", meaning)


async def attributes(subject: Subject) -> None:
    """`set_attr`, `get_attr` and `call` reach each env."""
    values = list(range(100, 100 + subject.num_envs))
    last = subject.num_envs - 1
    async with subject.started() as envs:
        await envs.set_attr("aiovec_check", values)
        got = await envs.get_attr("aiovec_check")
        subject.expect_same(got, tuple(values), "get_attr after set_attr", "Each env has a value of its own.")
        await envs.set_attr("aiovec_check", 7, env_ids=[0])
        got = await envs.call("aiovec_check", env_ids=[last, 0])
        where, meaning = f"call(…, env_ids=[{last}, 0])", "The results are in the order of `env_ids`."
        subject.expect_same(got, (values[last], 7), where, meaning)


# ---- not in lock-step


async def part_resets(subject: Subject) -> None:
    """`reset(env_ids=…)` gives dense rows of those envs, in that order, and leaves the others as they are."""
    tape = await subject.tape(AutoresetMode.NEXT_STEP)
    space = tape.facts["single_observation_space"]
    async with subject.started() as envs:
        for asked in tape.asked:
            mask = asked.keywords.get("options", {}).get("reset_mask")
            if mask is None:
                meaning = (
                    "The envs that were not meant must go on as if there had been no reset, the others from theirs."
                )
                subject.expect_result(await subject.ask(envs, asked), asked.result, asked.what, asked.method, meaning)
                continue
            env_ids = np.flatnonzero(mask).tolist()[::-1]
            subject.where = f"reset(env_ids={env_ids}) in place of the {asked.what}"
            seeds = [asked.keywords["seed"][env_index] for env_index in env_ids]
            observations, _ = await envs.reset(seed=seeds, options={}, env_ids=env_ids)
            rows = _rows(space, asked.result[0], subject.num_envs)
            expected = _batch(space, [rows[env_index] for env_index in env_ids])
            meaning = "A reset of some envs gives one row for each of them, in the order of `env_ids`."
            subject.expect_same(observations, expected, f"{subject.where}, observations", meaning)


async def part_batches(subject: Subject) -> None:
    """`send` and `recv`: each row is its env's next one, whichever envs were sent together, and comes once."""
    tape = await subject.tape(AutoresetMode.NEXT_STEP, resets_between=False)
    reset, *steps = tape.asked
    space, action_space = tape.facts["single_observation_space"], tape.facts["single_action_space"]
    expected = [_outcomes(space, asked.result, subject.num_envs) for asked in steps]
    actions = [list(iterate(tape.facts["action_space"], asked.arguments[0])) for asked in steps]
    generator = np.random.default_rng(subject.seed)
    taken = [0] * subject.num_envs
    owed: set[int] = set()

    async with subject.started() as envs:

        async def send(env_ids: Sequence[int]) -> None:
            batch = _batch(action_space, [actions[taken[env_index]][env_index] for env_index in env_ids])
            await envs.send(batch, env_ids)
            owed.update(env_ids)

        await subject.ask(envs, reset)
        await send(range(subject.num_envs))
        while owed:
            at_least = int(generator.integers(1, len(owed) + 1))
            subject.where = f"recv(min_envs={at_least}) with {sorted(owed)} owed, after {taken} steps of the envs"
            batch = await envs.recv(min_envs=at_least)
            env_ids = batch.env_ids.tolist()
            is_part = len(set(env_ids)) == len(env_ids) >= at_least and owed.issuperset(env_ids)
            meaning = "`recv` gives so many rows, of envs that are owed, each of them once."
            subject.expect(
                is_part, f"{subject.where}, env_ids", f"{at_least} or more of {sorted(owed)}", env_ids, meaning
            )
            result = (batch.observations, batch.rewards, batch.terminations, batch.truncations)
            outcomes = _outcomes(space, result, len(env_ids))
            for env_index, got in zip(env_ids, outcomes, strict=True):
                where = f"step {taken[env_index]} of env {env_index} by send and recv"
                meaning = "A row must be what its env gave for its own last action, whatever other envs do."
                for name, value, right in zip(_ROW, got, expected[taken[env_index]][env_index], strict=True):
                    subject.expect_same(value, right, f"{where}, {name}", meaning)
                taken[env_index] += 1
            owed.difference_update(env_ids)
            generator.shuffle(env_ids)
            if again := [env_index for env_index in env_ids if taken[env_index] < len(steps)]:
                await send(again)
        meaning = "Nothing is owed: a `recv` would wait for ever."
        await subject.expect_raised(gymnasium_error.NoAsyncCallError, envs.recv, "recv() with nothing owed", meaning)


async def sub_envs(subject: Subject) -> None:
    """`envs[i]`, each in a task of its own, gives what the env gives by itself, without autoreset."""
    subject.where = "the envs by themselves"
    tapes = await asyncio.gather(
        *(
            asyncio.to_thread(record_env, env_fn, subject.seed + env_index, subject.num_steps)
            for env_index, env_fn in enumerate(subject.env_fns)
        )
    )
    async with subject.started() as envs:
        await asyncio.gather(
            *(_drive_sub_env(subject, envs[env_index], env_index, tape) for env_index, tape in enumerate(tapes))
        )


async def _drive_sub_env(subject: Subject, sub: Any, env_index: int, tape: Sequence[Asked]) -> None:
    meaning = (
        "A sub-env gives what the env itself gives for the same seed and actions, as Gymnasium's single-env tuple."
    )
    space = sub.observation_space
    for asked in tape:
        where = f"{asked.what} of envs[{env_index}]"
        observation, *others = await subject.ask(sub, asked)
        expected, *right = asked.result
        subject.expect_same(_batch(space, [observation]), _batch(space, [expected]), f"{where}, observation", meaning)
        if asked.method == "step":
            reward, terminated, truncated, info = right
            right = [float(reward), bool(terminated), bool(truncated), info]
        subject.expect_same(others, right, f"{where}, what follows the observation", meaning)
        if asked.method == "step" and (right[1] or right[2]):
            step = functools.partial(sub.step, *asked.arguments)
            meaning_of_end = "The episode has ended, and a sub-env has no autoreset."
            await subject.expect_raised(
                gymnasium_error.ResetNeeded, step, f"another step after {where}", meaning_of_end
            )


async def cancellation(subject: Subject) -> None:
    """A cancelled step is owed: `step` is refused, `recv` collects it, `reset` discards it."""
    tape = await subject.tape(AutoresetMode.NEXT_STEP)
    space = tape.facts["single_observation_space"]
    async with subject.started() as envs:
        for number, (asked, following) in enumerate(itertools.pairwise(tape.asked)):
            if asked.method == "reset" or number % 2:
                meaning = "The answer of a cancelled step must never be paired with another call."
                subject.expect_result(await subject.ask(envs, asked), asked.result, asked.what, asked.method, meaning)
                continue
            await _cancel(subject, envs, asked)
            where, step = (
                f"another step after the cancelled {asked.what}",
                functools.partial(envs.step, *asked.arguments),
            )
            meaning = "The answer of the cancelled step is owed: another step would be paired with it."
            await subject.expect_raised(gymnasium_error.AlreadyPendingCallError, step, where, meaning)
            if following.method == "reset" and "options" not in following.keywords:
                continue  # a reset of all waits it out, and discards it
            subject.where = f"recv(min_envs={subject.num_envs}) after the cancelled {asked.what}"
            batch = await envs.recv(min_envs=subject.num_envs)
            result = (batch.observations, batch.rewards, batch.terminations, batch.truncations)
            got = dict(zip(batch.env_ids.tolist(), _outcomes(space, result, len(batch.env_ids)), strict=True))
            expected = dict(enumerate(_outcomes(space, asked.result, subject.num_envs)))
            meaning = "A cancelled step goes on, and `recv` collects the rows of that very step."
            subject.expect_same(got, expected, f"{subject.where}, rows by env", meaning)


async def _cancel(subject: Subject, envs: Any, asked: Asked) -> None:
    subject.where = f"{asked.what}, cancelled"
    task = asyncio.ensure_future(envs.step(*asked.arguments))
    await asyncio.sleep(0)  # it is sent now, and waits
    meaning = "`step` must wait on the event loop for the workers: as long as it does not, nothing else can run."
    subject.expect(
        not task.done(), f"{asked.what} in a task", "a task that waits", "one that has ended at once", meaning
    )
    task.cancel()
    await asyncio.wait([task])
    meaning = (
        "The task was cancelled while it waited: it must end as cancelled, or task groups and time-outs do not work."
    )
    subject.expect(task.cancelled(), f"{asked.what} in a task that is cancelled", "CancelledError", task, meaning)


# ---- its life


async def close(subject: Subject) -> None:
    """A close is for good, may be repeated, and later calls are refused."""
    async with subject.build() as envs:
        await envs.reset(seed=subject.seed)
        actions = envs.action_space.sample()
        subject.expect_same(envs.closed, False, "closed, before the close", "It is not closed yet.")
    try:
        subject.expect_same(
            envs.closed, True, "closed, after the end of `async with`", "The end of the block closes it."
        )
        await envs.close()
        await envs.close()
        await _expect_closed(subject, envs, ("reset", "recv"), "after the close")
        closed, meaning = gymnasium_error.ClosedEnvironmentError, "A vector that is closed is closed for good."
        await subject.expect_raised(closed, lambda: envs.step(actions), "step after the close", meaning)
        await subject.expect_raised(closed, lambda: envs.call("spec"), "call after the close", meaning)
    finally:
        envs.terminate()  # changes nothing, if it is closed


async def _expect_closed(subject: Subject, envs: Any, methods: Sequence[str], when: str) -> None:
    for method in methods:
        meaning = "A vector that is closed is closed for good."
        closed = gymnasium_error.ClosedEnvironmentError
        await subject.expect_raised(closed, getattr(envs, method), f"{method} {when}", meaning)


async def nothing_left(subject: Subject) -> None:
    """After a close, and after `terminate`, no process and no descriptor is left.

    It looks at this whole process: nothing else should open files or start processes meanwhile.
    """
    async with subject.started() as envs:
        await envs.reset(seed=subject.seed)  # what is opened once, for the life of this process, is open now
    before = held_by_process()
    async with subject.started() as envs:
        await envs.reset(seed=subject.seed)
        await envs.step(envs.action_space.sample())
    await _expect_nothing_new(subject, before, "after the close")
    envs = await subject.build()
    await envs.reset(seed=subject.seed)
    envs.terminate()
    await _expect_nothing_new(subject, before, "after terminate()")


async def _expect_nothing_new(subject: Subject, before: dict[str, set[str]], where: str) -> None:
    deadline = time.monotonic() + _GONE_WITHIN_SECONDS
    for kind in ("children", "descriptors"):
        while True:
            gc.collect()
            left = sorted(held_by_process()[kind] - before[kind])
            if not left:
                break
            meaning = "What a vector started or opened, it must end and close itself, and reap its children."
            is_late = time.monotonic() > deadline
            subject.expect(not is_late, f"{kind} {where}", "none that were not there before", left, meaning)
            await asyncio.sleep(0.02)


async def free_loop(subject: Subject) -> None:
    """The event loop goes on while envs are built, reset, stepped and closed."""
    env_fns: Sequence[EnvFn] = subject.env_fns
    if subject.users_env is None:
        seconds = 2 * _LONGEST_GAP_SECONDS
        env_fns = [functools.partial(FaultyEnv, "slow", moment, seconds=seconds) for moment in _SLOW_MOMENTS]
    async with Heartbeat(_LONGEST_GAP_SECONDS) as heartbeat, subject.started(env_fns) as envs:
        subject.where = "reset"
        await envs.reset(seed=subject.seed)
        subject.where = "step"
        for _ in range(20):
            await envs.step(envs.action_space.sample())
    got = f"a gap of {heartbeat.longest_gap:.2f} s"
    meaning = "While a vector starts, steps or closes, other tasks must run: nothing in it may wait but by `await`."
    is_free = heartbeat.longest_gap <= _LONGEST_GAP_SECONDS
    subject.expect(is_free, "a heartbeat on the event loop", f"no gap above {_LONGEST_GAP_SECONDS} s", got, meaning)


_SLOW_MOMENTS: tuple[Moment, ...] = ("init", "reset", "step", "close")


# ---- rows

_ROW = ("observation", "reward", "terminated", "truncated")


def _rows(space: gym.Space[Any], observations: Any, num_rows: int) -> list[Any]:
    """A batch of observations, env by env."""
    return list(iterate(batch_space(space, num_rows), observations))


def _outcomes(space: gym.Space[Any], result: Sequence[Any], num_rows: int) -> list[tuple[Any, ...]]:
    """The rows of a batch without its infos, whose dtypes depend on who else is in the batch."""
    observations, rewards, terminations, truncations = result[:4]
    return list(zip(_rows(space, observations, num_rows), rewards, terminations, truncations, strict=True))


def _batch(space: gym.Space[Any], members: Sequence[Any]) -> Any:
    """The batch of some observations, or actions, as Gymnasium makes it."""
    out: Any = create_empty_array(space, len(members))
    return concatenate(space, members, out)
