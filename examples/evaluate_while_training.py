"""Two vectors, one event loop: CartPole is learned on one, and each new set of weights is judged on the other meanwhile.

The learner is the cross-entropy method on a linear policy: each env of the training vector plays an episode by weights of
its own, and the best of them say where the next ones are drawn. What comes of a generation, a *version*, goes into a queue.
The evaluation takes them out in their order, plays an episode in each env of its own vector, and prints a row. Neither
waits for the other, unless the queue is full or empty. It ends when a version has the mean return that is wanted, after
some seconds, or at Ctrl-C; then come the time that both went on at once, and the weights, for `serve.py --weights`.

The same seed gives the same versions and the same returns: all draws come from it, and neither the order in which things
happen nor `--num-workers` has a part in them. What differs from run to run are the times, and how far training had come
when the evaluation was content. Needs only aiovec:

    python examples/evaluate_while_training.py --seed 3
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import importlib
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import numpy as np

import aiovec

TRAINING, EVALUATION = "training", "evaluation"


@dataclass(frozen=True)
class Arguments:
    """What can be chosen on the command line."""

    env_id: Annotated[str, "What is played; its observations are a vector, its actions discrete."] = "CartPole-v1"
    population: Annotated[int, "How many weights are tried in a generation, each in an env of its own."] = 16
    elite: Annotated[int, "How many of these the next generation comes from."] = 8
    episodes: Annotated[int, "How many episodes judge a version, each in an env of its own."] = 32
    training_workers: Annotated[int, "How many processes share the envs of the training."] = 1
    evaluation_workers: Annotated[int, "How many processes share the envs of the evaluation."] = 1
    solved_return: Annotated[float, "It ends when a version's mean return is at least this."] = 475.0
    max_versions: Annotated[int, "It ends after so many versions in any case."] = 100
    queue_versions: Annotated[int, "How many versions may wait for the evaluation, before training has to."] = 4
    seed: Annotated[int, "Of the weights that are tried, and of the envs."] = 3
    output: Annotated[Path, "The folder for the weights."] = Path("out")
    loop: Annotated[str, "The event loop: asyncio, or uvloop if it is installed."] = "asyncio"


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


class Version(NamedTuple):
    """What a generation has led to."""

    number: int
    weights: Any  # [observation, actions]
    env_steps: int  # of the training so far
    training_return: float  # the mean of the generation


@dataclass
class Run:
    """What is known so far."""

    args: Arguments
    trained: int = 0  # versions
    env_steps: int = 0  # of the training
    best: Version | None = None
    best_return: float = -np.inf
    going_on: set[str] = field(default_factory=set)  # of training and evaluation
    spent: defaultdict[frozenset[str], float] = field(
        default_factory=lambda: defaultdict(float)
    )  # seconds, by what did
    since: float = field(default_factory=time.perf_counter)

    @property
    def solved(self) -> bool:
        """Whether a version has the mean return that is wanted."""
        return self.best_return >= self.args.solved_return

    @contextlib.contextmanager
    def clock(self, what: str) -> Iterator[None]:
        """Notes that this goes on meanwhile, beside what else does."""
        self.switch({what})
        try:
            yield
        finally:
            self.switch({what})

    def switch(self, what: set[str]) -> None:
        """Ends a span of time: what went on in it, and not what begins or ends now."""
        now = time.perf_counter()
        self.spent[frozenset(self.going_on)] += now - self.since
        self.since = now
        self.going_on ^= what

    def __str__(self) -> str:
        if self.best is None:
            return "no version was judged yet"
        best = f"version {self.best.number} has a mean return of {self.best_return:.1f}"
        return f"{best}, after {self.best.env_steps:,} env steps; training had come to version {self.trained}"

    @property
    def split(self) -> str:
        """How much went on at once."""
        both = self.spent[frozenset({TRAINING, EVALUATION})]
        training, evaluation = (
            sum(seconds for names, seconds in self.spent.items() if what in names) for what in (TRAINING, EVALUATION)
        )
        share = both / evaluation if evaluation else 0.0
        return (
            f"of {sum(self.spent.values()):.2f} s: training {training:.2f} s, evaluation {evaluation:.2f} s, "
            f"both at once {both:.2f} s: training went on in {share:.0%} of the time of the evaluation"
        )


async def returns_of(envs: aiovec.AsyncVectorEnv, weights: Any, seed: int) -> tuple[Any, int]:
    """Plays an episode in each env, by the action with the highest score.

    Args:
        envs: The vector.
        weights: `[num_envs, observation, actions]`: each env's own; or without the first axis the same for all.
        seed: Of the first env; the next has the next one.

    Returns:
        The returns `[num_envs]`, and how many steps were taken.
    """
    observations, _infos = await envs.reset(seed=seed)
    returns, playing, env_steps = np.zeros(envs.num_envs), np.ones(envs.num_envs, bool), 0
    while playing.any():  # who has ended early goes on with another episode, which is not looked at
        scores = (observations[:, None, :] @ weights)[:, 0]
        observations, rewards, terminations, truncations, _infos = await envs.step(scores.argmax(-1))
        returns += rewards * playing
        env_steps += int(playing.sum())
        playing &= ~(terminations | truncations)
    return returns, env_steps


async def train(envs: aiovec.AsyncVectorEnv, versions: asyncio.Queue[Version], run: Run) -> None:
    """The cross-entropy method: Szita and Lorincz 2006, "Learning Tetris using the noisy cross-entropy method"."""
    args, rng = run.args, np.random.default_rng(run.args.seed)
    mean = np.zeros((envs.single_observation_space.shape[0], int(envs.single_action_space.n)))
    deviation = np.ones_like(mean)
    for number in range(1, args.max_versions + 1):
        with run.clock(TRAINING):
            candidates = rng.normal(mean, deviation, (envs.num_envs, *mean.shape))
            seed = args.seed + number * envs.num_envs  # envs that no generation has seen before
            returns, env_steps = await returns_of(envs, candidates, seed)
            best = candidates[np.argsort(-returns, kind="stable")[: args.elite]]
            # Noise on top that fades: without it all candidates soon are alike, good or not.
            mean, deviation = best.mean(0), best.std(0) + 0.2 / number
            run.env_steps += env_steps
            run.trained = number
        # Here training waits while the evaluation is far behind.
        await versions.put(Version(number, mean, run.env_steps, float(returns.mean())))


async def evaluate(envs: aiovec.AsyncVectorEnv, versions: asyncio.Queue[Version], run: Run) -> None:
    """Judges the versions in their order, each by the same episodes, until one is good enough."""
    args, begin = run.args, time.perf_counter()
    print(
        "version   env steps   return in training   evaluation: mean    worst   versions behind   seconds", flush=True
    )
    for _ in range(args.max_versions):
        version = await versions.get()
        with run.clock(EVALUATION):
            returns, _env_steps = await returns_of(envs, version.weights, seed=1_000_000 + args.seed)
        if returns.mean() > run.best_return:
            run.best, run.best_return = version, float(returns.mean())
        columns = f"{version.number:7}{version.env_steps:12,}{version.training_return:21.1f}{returns.mean():19.1f}"
        behind, seconds = run.trained - version.number, time.perf_counter() - begin
        print(f"{columns}{returns.min():9.1f}{behind:18}{seconds:10.2f}", flush=True)
        if run.solved:
            break


async def learn(run: Run) -> None:
    """Training and evaluation, side by side: if one of them fails, both end."""
    args = run.args
    async with (
        aiovec.make_vec(
            args.env_id, args.population, vector_kwargs={"num_workers": args.training_workers}
        ) as training_envs,
        aiovec.make_vec(
            args.env_id, args.episodes, vector_kwargs={"num_workers": args.evaluation_workers}
        ) as evaluation_envs,
        asyncio.TaskGroup() as group,
    ):
        run.since = time.perf_counter()
        versions: asyncio.Queue[Version] = asyncio.Queue(args.queue_versions)
        training = group.create_task(train(training_envs, versions, run))
        await evaluate(evaluation_envs, versions, run)
        training.cancel()  # in the middle of a step, maybe: `close` ends what is owed


def save(run: Run) -> None:
    """The best weights, and how the time was used."""
    print(run.split)
    if run.best is not None:
        path = run.args.output / "weights.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, run.best.weights.astype(np.float32))
        print(f"Weights: {path}")


def main() -> None:
    """Learns, and tells what came of it however that ends; after Ctrl-C with the exit code that shells expect."""
    run = Run(parse_arguments())
    new_loop = importlib.import_module("uvloop").new_event_loop if run.args.loop == "uvloop" else None
    try:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(learn(run))
        print(f"{'solved' if run.solved else 'not solved'}: {run}")
    except KeyboardInterrupt:
        print(f"stopped by Ctrl-C, every worker has ended: {run}")
        sys.exit(130)
    finally:
        save(run)


if __name__ == "__main__":
    main()
