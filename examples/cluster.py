"""Actors on a Ray cluster, one of whose two nodes is killed: the run goes on, on what is left, and CartPole is solved.

Both nodes are processes of this machine (`ray.cluster_utils.Cluster`); with a cluster of yours, `ray.init(address=…)`
takes their place. Each env plays an episode by weights of its own, the cross-entropy method on a linear policy, and as
soon as some envs have answered these are sent on: so those on the other node do not wait for the ones that were lost.
With `on_failure="restart"` the vector builds these anew, and their rows say what happened: nothing is learned from them.
It ends when the mean return of 50 episodes is 450, after about a minute on two cores, or at Ctrl-C. Needs
`pip install '.[ray]'` in the repository:

    python examples/cluster.py --num-envs 16
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import io
import logging
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, get_type_hints

import gymnasium as gym
import numpy as np
import ray
from ray.cluster_utils import Cluster

import aiovec

say = partial(print, file=sys.stdout, flush=True)  # this stdout: for Ray there is another, see `main`


@dataclass(frozen=True)
class Arguments:
    """What can be chosen on the command line."""

    num_envs: Annotated[int, "How many CartPoles are played."] = 16
    num_workers: Annotated[int, "How many actors of Ray share them, a CPU each; either node has room for all."] = 2
    kill_after: Annotated[int, "A node is killed after so many env steps."] = 10_000
    solved_return: Annotated[float, "It ends when the mean return of 50 episodes is at least this."] = 450.0
    max_steps: Annotated[int, "It ends so many env steps after the lost envs are there again in any case."] = 200_000
    silence: Annotated[float, "After so many seconds without a sign of life Ray gives a node up; by default 15."] = 1.0
    population: Annotated[int, "How many episodes the learner takes for an update."] = 16
    elite: Annotated[int, "How many of these, the best, the next weights are drawn around."] = 4
    seed: Annotated[int, "Of the weights and the envs; rows come in another order each time, so runs differ."] = 1


def parse_arguments() -> Arguments:
    """Each field of `Arguments` is an option."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    hints = get_type_hints(Arguments, include_extras=True)
    for argument in dataclasses.fields(Arguments):
        option, sentence = f"--{argument.name.replace('_', '-')}", hints[argument.name].__metadata__[0]
        parser.add_argument(option, type=type(argument.default), default=argument.default, help=sentence)
    return Arguments(**vars(parser.parse_args()))


class Placed(gym.Wrapper[Any, Any, Any, Any]):
    """An env that knows where it lives."""

    def node(self) -> str:
        """The id of its node, shortened as in aiovec's messages."""
        return str(ray.get_runtime_context().get_node_id())[:12]


def build() -> gym.Env[Any, Any]:
    """One env, in its worker."""
    return Placed(gym.make("CartPole-v1"))


class Learner:
    """The cross-entropy method: weights are drawn around the best of those that were tried last."""

    def __init__(self, args: Arguments) -> None:
        self.args = args
        self.rng = np.random.default_rng(args.seed)
        self.mean, self.deviation = np.zeros(4), np.ones(4)
        self.tried: list[tuple[float, Any]] = []
        self.updates = 0

    def draw(self, number: int) -> Any:
        """Weights to try, `[number, 4]`."""
        return self.rng.normal(self.mean, self.deviation, (number, 4))

    def take(self, weights: Any, episode_return: float) -> None:
        """What an episode came to; of a whole population, something is learned."""
        self.tried.append((episode_return, weights.copy()))
        if len(self.tried) == self.args.population:
            best = sorted(self.tried, key=lambda tried: -tried[0])[: self.args.elite]
            elite = np.array([weights for _, weights in best])
            # A little is added, or an early lucky episode ends the search: Szita and Lörincz 2006, "Learning Tetris
            # using the noisy cross-entropy method".
            self.mean, self.deviation = elite.mean(0), elite.std(0) + 0.3 / (1 + self.updates)
            self.tried, self.updates = [], self.updates + 1


@dataclass
class Run:
    """What is known so far."""

    args: Arguments
    learner: Learner
    env_steps: int = 0
    masked: int = 0  # transitions
    episodes: int = 0
    last_returns: deque[float] = field(default_factory=lambda: deque(maxlen=50))
    speeds: dict[str, float] = field(default_factory=dict)  # env steps a second, by phase
    phase: tuple[float, int] = field(
        default_factory=lambda: (time.perf_counter(), 0)
    )  # it began when, and at which step

    @property
    def mean_return(self) -> float:
        """Of the last 50 episodes."""
        return statistics.fmean(self.last_returns) if self.last_returns else 0.0

    @property
    def solved(self) -> bool:
        """Whether 50 episodes have the mean that is wanted."""
        return len(self.last_returns) == 50 and self.mean_return >= self.args.solved_return

    def end_phase(self, name: str) -> float:
        """Notes how fast it was, and begins the next; how many seconds it took."""
        now, (begin, first) = time.perf_counter(), self.phase
        self.speeds[name] = (self.env_steps - first) / (now - begin)
        self.phase = now, self.env_steps
        return now - begin

    def __str__(self) -> str:
        return f"{self.env_steps:,} env steps, {self.episodes:,} episodes, mean return of the last 50: {self.mean_return:.1f}"


def actions_of(observations: Any, weights: Any) -> Any:
    """The policy: each env pushes to the side that its own weights say."""
    return ((observations * weights).sum(-1) > 0).astype(np.int64)


async def say_places(envs: aiovec.AsyncVectorEnv) -> int:
    """Which envs are on which node; on how many they are."""
    places: dict[str, list[int]] = {}
    for env_index, node in enumerate(await envs.call("node")):
        places.setdefault(node, []).append(env_index)
    for node, env_ids in places.items():
        say(f"  envs {env_ids[0]} to {env_ids[-1]} are on node {node}")
    return len(places)


async def play(envs: aiovec.AsyncVectorEnv, run: Run, kill: Callable[[], None]) -> None:
    """Plays until it is solved and every env is there."""
    args, learner = run.args, run.learner
    weights, returns = learner.draw(len(envs)), np.zeros(len(envs))
    resetting = np.zeros(len(envs), bool)  # the next row of these is no step, but a reset
    lost: set[int] = set()
    killing: asyncio.Future[None] | None = None
    next_line = 1_000
    observations, _infos = await envs.reset(seed=args.seed)
    run.phase = time.perf_counter(), 0
    await envs.send(actions_of(observations, weights))
    # Whatever is there: while a node is lost, the rows of the other one come as before.
    async for batch in envs.batches(min_envs=1):
        ids, ends = batch.env_ids, batch.terminations | batch.truncations
        # A worker that dies has a row for each of its envs: reward NaN, truncated, and the reason among its infos. It
        # counts for nothing, and neither does the episode that it cut short: what that had come to says little of its
        # weights. The row behind it is the reset of an env that was built anew, as behind any other end.
        failed = batch.infos.get("_failure", np.zeros(len(ids), bool))
        steps = ~failed & ~resetting[ids]
        returns[ids[steps]] += batch.rewards[steps]
        run.env_steps += int(steps.sum())
        for env_index in ids[ends & ~failed]:
            learner.take(weights[env_index], returns[env_index])
            run.last_returns.append(returns[env_index])
            run.episodes += 1
        run.masked += int(failed.sum())
        if failed.any():
            for failure in {id(failure): failure for failure in batch.infos["failure"][failed]}.values():
                say(f"{type(failure).__name__}: {failure}".replace("\n", "\n    "))
            say(
                f"  its {failed.sum()} rows: rewards {batch.rewards[failed]}, truncated {batch.truncations[failed].all()}"
            )
        was_lost = bool(lost)
        lost = (lost - set(ids[~failed].tolist())) | set(ids[failed].tolist())
        if was_lost and not lost:
            say(f"All envs are there again, {run.end_phase('while envs were lost'):.1f} s after the kill:")
            await say_places(envs)
        resetting[ids] = ends
        weights[ids[ends]], returns[ids[ends]] = learner.draw(int(ends.sum())), 0
        if run.env_steps >= next_line:
            say(f"{run}")
            next_line += 10_000
        if killing is None and run.env_steps >= args.kill_after:
            run.end_phase("before")
            # It waits for the processes that it kills, so it goes to a thread, and the loop steps on.
            killing = asyncio.ensure_future(asyncio.to_thread(kill))
        is_whole = "while envs were lost" in run.speeds and not lost
        if is_whole and (run.solved or run.env_steps - run.phase[1] >= args.max_steps):
            break
        await envs.send(actions_of(batch.observations, weights[ids]), ids)
    run.end_phase("after")
    if killing is not None:
        await killing


async def train(run: Run, kill: Callable[[], None]) -> None:
    """One vector, from its start to its close."""
    # Of itself Ray fills one node before it takes another.
    options = {"num_cpus": 1, "scheduling_strategy": "SPREAD"}
    async with aiovec.AsyncVectorEnv(
        [build] * run.args.num_envs,
        num_workers=run.args.num_workers,
        context="ray",
        worker_options=options,
        on_failure="restart",
    ) as envs:
        say(f"{len(envs)} envs in {envs.num_workers} workers:")
        if await say_places(envs) < 2:
            raise RuntimeError("Ray has put all workers on one node, so nothing can be shown: take more --num-workers")
        await play(envs, run, kill)


def say_nodes() -> None:
    """Which nodes there are."""
    for node in ray.nodes():
        state = "alive" if node["Alive"] else "dead"
        say(f"  node {node['NodeID'][:12]}: {state}, {node['Resources'].get('CPU', 0):g} CPUs")


def main() -> None:
    """A cluster, from its start to its end: by this thread, since Ray's processes end with the one that starts them."""
    args = parse_arguments()
    run = Run(args, Learner(args))
    logging.getLogger("ray").setLevel(logging.ERROR)
    # None as its port: else the cluster's head asks for the one of `ray start`, and complains where that is taken.
    head = {"include_dashboard": False, "dashboard_port": None}
    # A node is dead for Ray when it has missed three signs of life. Until then Ray may put a new worker onto it, which
    # is lost in turn: one failure more, that counts against `max_restarts`.
    signs = {"health_check_initial_delay_ms": 0, "health_check_failure_threshold": 3}
    signs |= dict.fromkeys(("health_check_period_ms", "health_check_timeout_ms"), int(args.silence * 1000 / 3))
    # Ray prints the end of a dead node's log to stdout; all of it is in the folder of its session anyway.
    with contextlib.redirect_stdout(io.StringIO()):
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=args.num_workers, _system_config=signs, **head)
            second = cluster.add_node(num_cpus=args.num_workers)
            ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
            say("A Ray cluster of two nodes:")
            say_nodes()

            def kill() -> None:
                say(f"Killing node {second.node_id[:12]}, at env step {run.env_steps:,}.")
                cluster.remove_node(second, allow_graceful=False)

            asyncio.run(train(run, kill))
            say("The nodes now:")
            say_nodes()
            say(f"Masked out: {run.masked} transitions. Env steps a second:")
            say(", ".join(f"{name} {speed:,.0f}" for name, speed in run.speeds.items()))
            say(f"{'solved' if run.solved else 'not solved'}: {run}")
        except KeyboardInterrupt:
            say(f"stopped by Ctrl-C: {run}")
            sys.exit(130)
        finally:
            ray.shutdown()
            cluster.shutdown()


if __name__ == "__main__":
    main()
