"""The shortest introduction: 64 CartPoles under `await`, a failure at the await, a loop that stays free.

Shows how a vector is started and closed, how episodes are counted from rewards and flags, how the exception of
an env arrives, and that other tasks of the event loop run meanwhile. The policy is random. Needs only aiovec:

    python examples/quickstart.py
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import time
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, get_type_hints

import gymnasium as gym
import numpy as np

import aiovec


@dataclass(frozen=True)
class Arguments:
    """What can be chosen on the command line."""

    num_envs: Annotated[int, "How many CartPoles are stepped at once."] = 64
    steps: Annotated[int, "How many steps each of them takes."] = 500
    seed: Annotated[int, "Seed of the first env, and of the random policy."] = 42


def parse_arguments() -> Arguments:
    """Each field of `Arguments` is an option."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    hints = get_type_hints(Arguments, include_extras=True)
    for field in dataclasses.fields(Arguments):
        option, sentence = f"--{field.name.replace('_', '-')}", hints[field.name].__metadata__[0]
        parser.add_argument(option, type=type(field.default), default=field.default, help=sentence)
    return Arguments(**vars(parser.parse_args()))


class OutOfFuelError(Exception):
    """An exception type of this very file."""

    def __init__(self, altitude: float) -> None:
        super().__init__(f"no fuel left at {altitude:.0f} m")
        self.altitude = altitude


class Rocket(gym.Env[Any, Any]):
    """Climbs 50 or 100 m a step, and fails when its fuel is gone."""

    observation_space = gym.spaces.Box(0, np.inf, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, fuel: int) -> None:
        self.tank = fuel

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Stands on the ground, with a full tank or what the options say."""
        super().reset(seed=seed)
        self.fuel, self.altitude = (options or {}).get("fuel", self.tank), 0.0
        return np.array([self.altitude], np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Burns one unit of fuel."""
        if self.fuel == 0:
            raise OutOfFuelError(self.altitude)
        self.fuel -= 1
        self.altitude += (50.0, 100.0)[action]
        return np.array([self.altitude], np.float32), 1.0, False, False, {}


async def play(args: Arguments) -> None:
    """Steps CartPole and counts the episodes by hand."""
    async with aiovec.make_vec("CartPole-v1", num_envs=args.num_envs) as envs:
        envs.action_space.seed(args.seed)
        await envs.reset(seed=args.seed)

        returns, lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, int)
        finished: list[tuple[float, int]] = []
        ended = np.zeros(args.num_envs, bool)
        moves = 0
        begin = time.perf_counter()
        for _ in range(args.steps):
            playing = ~ended  # an env whose episode ended is reset by the next step (NEXT_STEP), not counted
            actions = envs.action_space.sample()
            _observations, rewards, terminations, truncations, _infos = await envs.step(actions)
            returns += rewards
            lengths += playing
            moves += int(np.count_nonzero(playing))
            ended = terminations | truncations
            finished += zip(returns[ended].tolist(), lengths[ended].tolist(), strict=True)
            returns[ended] = 0
            lengths[ended] = 0
        seconds = time.perf_counter() - begin

        print(f"CartPole: {envs.num_envs} envs in {envs.num_workers} workers, {args.steps} steps in {seconds:.2f} s")
        print(f"          {moves / seconds:,.0f} env steps/s, {seconds / args.steps * 1e3:.2f} ms for a step of all")
        if finished:
            episodes = np.array(finished)
            print(
                f"          {len(episodes)} episodes, mean return {episodes[:, 0].mean():.1f}, "
                f"mean length {episodes[:, 1].mean():.1f}, longest {episodes[:, 1].max():.0f}"
            )


async def fail() -> None:
    """One of three rockets runs out of fuel: its own exception is raised here, and the vector goes on."""
    async with aiovec.AsyncVectorEnv([partial(Rocket, fuel) for fuel in (9, 3, 9)]) as rockets:
        await rockets.reset()
        try:
            while True:
                await rockets.step(rockets.action_space.sample())
        except OutOfFuelError as error:
            (failure,) = aiovec.failures(error)
            print(f"Rockets:  caught {type(error).__name__} of env {failure.env_index}: {error} ({error.altitude=})")
            await rockets.reset(env_ids=[failure.env_index], options={"fuel": 9})  # the other two are as they were
        observations, *_ = await rockets.step(rockets.action_space.sample())
        print(f"          after its reset all three fly: {observations[:, 0].tolist()} m")


async def heartbeat(gaps: list[float]) -> None:
    """Notes how long each sleep of 5 ms took: much longer, if anything else blocked the loop."""
    last = time.perf_counter()
    while True:
        await asyncio.sleep(0.005)
        now = time.perf_counter()
        gaps.append(now - last)
        last = now


async def main(args: Arguments) -> None:
    """Everything in one event loop, start and close of the workers included."""
    gaps: list[float] = []
    beating = asyncio.create_task(heartbeat(gaps))
    await play(args)
    await fail()
    beating.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await beating
    print(f"Loop:     {len(gaps)} heartbeats of 5 ms meanwhile, the longest took {max(gaps) * 1e3:.1f} ms")


if __name__ == "__main__":
    asyncio.run(main(parse_arguments()))
