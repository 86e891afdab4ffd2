"""Actors and a learner in one event loop: an actor for each env, a batched policy, CartPole solved by PPO.

Each env is played by a task of its own, at its own pace. All of these ask one small PyTorch network through a
`Batcher`, and put what they saw into a queue that the learner empties. The queue is short, and while it is full the
actors wait: so nothing is learned from that is much older than the network, and V-trace corrects for the rest. The
optimizer works in a thread, and the loop stays free. It ends when the mean return of 100 episodes is 475, after some
half a minute on two free cores, or at Ctrl-C, and leaves a checkpoint and a learning curve. Needs
`pip install '.[examples,torch]'` in the repository:

    python examples/actor_learner.py --num-envs 16
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import dataclasses
import statistics
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import aiovec

torch.set_num_threads(1)  # more make so small a network slower, and the workers need the other cores


@dataclass(frozen=True)
class Arguments:
    """What can be chosen on the command line; how it learns is near to CartPole in rl-baselines3-zoo's `ppo.yml`."""

    env_id: Annotated[str, "What is played; its observations are a vector, its actions discrete."] = "CartPole-v1"
    num_envs: Annotated[int, "How many envs, and so actors."] = 16
    num_workers: Annotated[int, "How many processes share the envs."] = 2
    solved_return: Annotated[float, "It ends when the mean return of 100 episodes is at least this."] = 475.0
    max_steps: Annotated[int, "It ends after so many env steps in any case."] = 500_000
    segment_steps: Annotated[int, "How many env steps an actor hands over at once."] = 32
    batch_segments: Annotated[int, "How many segments the learner takes for an update."] = 16
    queue_segments: Annotated[int, "How many segments may wait for the learner, before actors have to."] = 8
    epochs: Annotated[int, "How many optimizer steps an update takes, over its whole batch each time."] = 10
    learning_rate: Annotated[float, "Of Adam."] = 1e-3
    gamma: Annotated[float, "The discount of a step."] = 0.98
    trace_decay: Annotated[float, "Lambda: 0 believes the value of the next step, 1 only the rewards."] = 0.8
    clip: Annotated[float, "How far from 1 the ratio of a new to an old probability is rewarded."] = 0.2
    seed: Annotated[int, "Of the network and the envs; events come in another order each time, so runs differ."] = 1
    resume: Annotated[Path | None, "A checkpoint to begin with."] = None
    output: Annotated[Path, "The folder for the checkpoint and the picture."] = Path("out")


def parse_arguments() -> Arguments:
    """Each field of `Arguments` is an option."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    hints = get_type_hints(Arguments, include_extras=True)
    for argument in dataclasses.fields(Arguments):
        option, sentence = f"--{argument.name.replace('_', '-')}", hints[argument.name].__metadata__[0]
        kind = Path if argument.default is None else type(argument.default)
        parser.add_argument(option, type=kind, default=argument.default, help=sentence)
    return Arguments(**vars(parser.parse_args()))


class Segment(NamedTuple):
    """Consecutive steps of one env, arrays `[segment_steps, ...]`; stacked for the learner, tensors."""

    observations: Any
    actions: Any
    log_probs: Any  # of the actions, under the network that chose them
    rewards: Any
    next_observations: Any  # at the end of an episode its last one, never that of the reset
    terminations: Any
    truncations: Any


class Network(nn.Module):
    """A policy and its value, apart from each other."""

    def __init__(self, num_inputs: int, num_actions: int) -> None:
        super().__init__()
        self.logits, self.value = (
            nn.Sequential(nn.Linear(num_inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))
            for outputs in (num_actions, 1)
        )
        with torch.no_grad():  # a hundredth, so that it begins with no opinion: Andrychowicz et al. 2021, section 3.2
            self.logits[-1].weight.mul_(0.01)

    def log_probs_of(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Of actions that were taken."""
        log_probs: Tensor = self.logits(observations).log_softmax(-1)
        return log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


@dataclass
class Run:
    """What is known so far. Only the loop's thread writes it."""

    args: Arguments
    # The one that acts. The learner works on another, and replaces this one by copies to which nobody ever writes: so
    # whoever has got hold of one reads whole weights, without a lock.
    network: Network = field(init=False)
    env_steps: int = 0
    begin: float = field(default_factory=time.perf_counter)
    last_returns: deque[float] = field(default_factory=lambda: deque(maxlen=100))
    episodes: list[tuple[int, float, float]] = field(default_factory=list)  # env steps, return, mean of the last 100

    @property
    def mean_return(self) -> float:
        """Of the last 100 episodes."""
        return statistics.fmean(self.last_returns) if self.last_returns else 0.0

    @property
    def solved(self) -> bool:
        """Whether 100 episodes have the mean that is wanted."""
        return len(self.last_returns) == 100 and self.mean_return >= self.args.solved_return

    def __str__(self) -> str:
        seconds = time.perf_counter() - self.begin
        speed = f"{self.env_steps:,} env steps in {seconds:.1f} s, {self.env_steps / seconds:,.0f} a second"
        return f"{speed}; {len(self.episodes):,} episodes, mean return of the last 100: {self.mean_return:.1f}"

    # An `async def` without an `await`, so it runs on the loop: 0.1 ms, less than the way to a thread and back. A
    # larger network would go to a thread, by being a plain function.
    async def choose(self, observations: Any) -> tuple[Any, Any]:
        """The policy, for a batch: actions and their log-probabilities."""
        with torch.inference_mode():
            log_probs = self.network.logits(torch.from_numpy(observations)).log_softmax(-1)
            actions = log_probs.exp().multinomial(1)
            return actions.squeeze(-1).numpy(), log_probs.gather(-1, actions).squeeze(-1).numpy()


async def act(env: aiovec.SubEnv, policy: aiovec.Batcher, segments: asyncio.Queue[Segment], run: Run) -> None:
    """Plays one env for ever; a segment may hold the end of an episode and the begin of the next."""
    observation, _info = await env.reset(seed=run.args.seed + env.env_index)
    episode_return = 0.0
    while True:
        steps = []
        for _ in range(run.args.segment_steps):
            action, log_prob = await policy(observation)
            following, reward, terminated, truncated, _info = await env.step(action)
            steps.append((observation, action, log_prob, np.float32(reward), following, terminated, truncated))
            observation = following
            run.env_steps += 1
            episode_return += reward
            if terminated or truncated:
                run.last_returns.append(episode_return)
                run.episodes.append((run.env_steps, episode_return, run.mean_return))
                episode_return = 0.0
                observation, _info = await env.reset()
        # Here an actor waits while the learner is behind.
        await segments.put(Segment(*map(np.array, zip(*steps, strict=True))))


def judge(network: Network, batch: Segment, args: Arguments) -> tuple[Tensor, Tensor]:
    """Targets for the values, and advantages `[batch_segments, segment_steps]`: V-trace.

    Espeholt et al. 2018 (arXiv:1802.01561), section 4.1, with both truncations at 1 and the lambda of its remark 2.
    The advantage lacks the weight of its own step, which PPO's ratio brings. With data of the network itself all
    weights are 1, and this is generalized advantage estimation (arXiv:1506.02438).
    """
    with torch.no_grad():
        values = network.value(batch.observations).squeeze(-1)
        # A terminal state is worth nothing. Where the time was up, the last state is worth what it always is.
        next_values = network.value(batch.next_observations).squeeze(-1).masked_fill(batch.terminations, 0)
        weights = (network.log_probs_of(batch.observations, batch.actions) - batch.log_probs).exp().clamp(max=1)
        # What follows in the segment belongs to another episode, after either kind of end.
        decays = args.gamma * args.trace_decay * ~(batch.terminations | batch.truncations)
        advantages = batch.rewards + args.gamma * next_values - values
        corrections = torch.zeros_like(advantages)
        correction = torch.zeros(())
        for t in reversed(range(args.segment_steps)):
            advantages[:, t] += decays[:, t] * correction
            correction = corrections[:, t] = weights[:, t] * advantages[:, t]
        return values + corrections, (advantages - advantages.mean()) / (advantages.std() + 1e-8)


def improve(network: Network, optimizer: torch.optim.Optimizer, segments: list[Segment], args: Arguments) -> Network:
    """One update, in a thread: PPO's clipped objective (arXiv:1707.06347, equation 7). A copy, to act with."""
    batch = Segment(*(torch.from_numpy(np.stack(columns)) for columns in zip(*segments, strict=True)))
    targets, advantages = judge(network, batch, args)
    for _ in range(args.epochs):
        ratios = (network.log_probs_of(batch.observations, batch.actions) - batch.log_probs).exp()
        clipped = ratios.clamp(1 - args.clip, 1 + args.clip)
        gain = torch.minimum(ratios * advantages, clipped * advantages).mean()
        value_loss = (network.value(batch.observations).squeeze(-1) - targets).square().mean()
        optimizer.zero_grad()
        (value_loss - gain).backward()
        # As in Stable-Baselines3; without it a run may lose for a while what it had learned.
        nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
    return copy.deepcopy(network)


async def learn(segments: asyncio.Queue[Segment], run: Run, console: Console) -> None:
    """Takes batches out of the queue and publishes networks, until it is solved."""
    args, network = run.args, copy.deepcopy(run.network)
    optimizer = torch.optim.Adam(network.parameters(), args.learning_rate)
    next_line = 0
    columns = TextColumn("mean return"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        bar = progress.add_task("", total=args.solved_return)
        while not run.solved and run.env_steps < args.max_steps:
            batch = [await segments.get() for _ in range(args.batch_segments)]
            # If it is cancelled, the update goes on in its thread, which `asyncio.run` waits for before it returns.
            run.network = await asyncio.to_thread(improve, network, optimizer, batch, args)
            numbers = f"{run.mean_return:.1f} of {args.solved_return:.0f}, {run.env_steps:,} env steps"
            numbers += f", {segments.qsize()} of {args.queue_segments} in the queue"
            progress.update(bar, completed=run.mean_return, description=numbers, refresh=True)
            if run.env_steps >= next_line:
                progress.console.print(str(run), soft_wrap=True)
                next_line += 20_000


async def train(run: Run, console: Console) -> None:
    """The actors and the learner are one group: if one of them fails all end, and its exception names the env."""
    args, vector_kwargs = run.args, {"num_workers": run.args.num_workers}
    async with aiovec.make_vec(args.env_id, args.num_envs, vector_kwargs=vector_kwargs) as envs:
        run.network = Network(envs.single_observation_space.shape[0], int(envs.single_action_space.n))
        if args.resume is not None:
            run.network.load_state_dict(torch.load(args.resume, weights_only=True))
        segments: asyncio.Queue[Segment] = asyncio.Queue(args.queue_segments)
        # No wait for a fuller batch: those who are missing may be held up by the queue.
        async with (
            aiovec.Batcher(run.choose, max_batch_size=args.num_envs, max_wait=0) as policy,
            asyncio.TaskGroup() as group,
        ):
            actors = [group.create_task(act(env, policy, segments, run)) for env in envs]
            await learn(segments, run, console)
            for actor in actors:
                actor.cancel()


def save(run: Run, console: Console) -> None:
    """The checkpoint and the learning curve."""
    checkpoint, picture = run.args.output / "actor-learner.pt", run.args.output / "actor-learner.png"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.save(run.network.state_dict(), checkpoint)
    console.print(f"Checkpoint: {checkpoint}", soft_wrap=True)
    env_steps, returns, means = zip(*run.episodes, strict=True)
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(env_steps, returns, ".", alpha=0.3, label="an episode")
    axes.plot(env_steps, means, linewidth=2, label="mean of the last 100")
    axes.axhline(run.args.solved_return, color="tab:green", linestyle="--", label="solved")
    title = f"{run.args.env_id}: {run.args.num_envs} actors, one learner"
    axes.set(title=title, xlabel="env steps", ylabel="return")
    axes.legend(loc="upper left")
    figure.savefig(picture)
    console.print(f"Picture: {picture}", soft_wrap=True)


def main() -> None:
    """Trains, and saves however that ends; after Ctrl-C with the exit code that shells expect."""
    run, console = Run(parse_arguments()), Console(highlight=False)
    torch.manual_seed(run.args.seed)
    try:
        asyncio.run(train(run, console))
        console.print(f"{'solved' if run.solved else 'not solved'}: {run}", soft_wrap=True)
    except KeyboardInterrupt:
        console.print(f"stopped by Ctrl-C, every worker has ended: {run}", soft_wrap=True)
        sys.exit(130)
    except Exception as error:
        for failure in {failure.env_index: failure for failure in aiovec.failures(error)}.values():
            console.print(f"env {failure.env_index} failed in {failure.command}: {failure.exception}", soft_wrap=True)
        raise
    finally:
        if run.episodes:
            save(run, console)


if __name__ == "__main__":
    main()
