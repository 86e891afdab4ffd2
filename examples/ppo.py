"""PPO in one file, on `rollout`: CartPole solved from its numbers, or Atari Breakout played from its pixels.

All envs are stepped together, by `await envs.rollout(policy, num_steps)`, and then learned from in a thread. It prints
where the time went: to the envs, the policy, or the learning. It ends when the mean return of 100 episodes is 475,
after some half a minute on two cores, or at Ctrl-C, and leaves a checkpoint and a learning curve. Needs
`pip install '.[examples,torch]'` in the repository:

    python examples/ppo.py
    python examples/ppo.py --env-id BreakoutNoFrameskip-v4
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import statistics
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import ale_py
import gymnasium as gym
import torch
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import aiovec

gym.register_envs(ale_py)
torch.set_num_threads(1)  # more make so small a network slower, and the workers need the other cores


@dataclass(frozen=True)
class Arguments:
    """What can be chosen on the command line; how it learns is near to CartPole in rl-baselines3-zoo's `ppo.yml`."""

    env_id: Annotated[str, "What is played: observations a vector, or an Atari game's screen; actions discrete."] = (
        "CartPole-v1"
    )
    num_envs: Annotated[int, "How many envs are stepped together."] = 16
    num_workers: Annotated[int, "How many processes share the envs."] = 2
    groups: Annotated[int, "How many groups of envs take turns: while the policy sees one, another is stepped."] = 1
    solved_return: Annotated[float, "It ends when the mean return of 100 episodes is at least this."] = 475.0
    max_steps: Annotated[
        int, "It ends after so many env steps in any case; the learning rate falls to 0 till then."
    ] = 200_000
    num_steps: Annotated[int, "How many steps each env takes in a rollout."] = 32
    epochs: Annotated[int, "How many times each rollout is learned from."] = 10
    minibatch_size: Annotated[int, "How many steps an optimizer step learns from."] = 512
    learning_rate: Annotated[float, "Of Adam, at the beginning."] = 1e-3
    gamma: Annotated[float, "The discount of a step."] = 0.98
    trace_decay: Annotated[float, "Lambda: 0 believes the value of the next step, 1 only the rewards."] = 0.8
    clip: Annotated[float, "How far from 1 the ratio of a new to an old probability is rewarded."] = 0.2
    value_weight: Annotated[float, "Of the value's loss beside the policy's."] = 0.5
    entropy_weight: Annotated[float, "How much it pays to stay undecided."] = 0.0
    max_grad_norm: Annotated[float, "Longer gradients are cut to this."] = 0.5
    seed: Annotated[int, "Of the network, its choices and the envs: the same seed, the same run."] = 1
    output: Annotated[Path, "The folder for the checkpoint and the picture."] = Path("out")

    @property
    def is_atari(self) -> bool:
        """Whether observations are screens."""
        return self.env_id.startswith("ALE/") or "NoFrameskip" in self.env_id


# What Atari has as its defaults: Schulman et al. 2017 (arXiv:1707.06347), table 5, but 4 epochs and a value weight of
# a half, as in CleanRL's `ppo_atari.py`. So many steps are a matter of a day on few cores.
ATARI_DEFAULTS: dict[str, Any] = {
    "num_envs": 8,
    "groups": 2,  # here envs and policy take about as long as each other; at CartPole a call more costs more than it saves
    "solved_return": 400.0,
    "max_steps": 10_000_000,
    "num_steps": 128,
    "epochs": 4,
    "minibatch_size": 256,
    "learning_rate": 2.5e-4,
    "gamma": 0.99,
    "trace_decay": 0.95,
    "clip": 0.1,
    "entropy_weight": 0.01,
}


def parse_arguments() -> Arguments:
    """Each field of `Arguments` is an option."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=f"For Atari: {', '.join(f'{name}={default}' for name, default in ATARI_DEFAULTS.items())}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    hints = get_type_hints(Arguments, include_extras=True)
    for argument in dataclasses.fields(Arguments):
        option, sentence = f"--{argument.name.replace('_', '-')}", hints[argument.name].__metadata__[0]
        parser.add_argument(option, type=type(argument.default), default=argument.default, help=sentence)
    args = Arguments(**vars(parser.parse_args()))
    if args.is_atari:
        parser.set_defaults(**ATARI_DEFAULTS)
        args = Arguments(**vars(parser.parse_args()))
    return args


def atari(env_id: str) -> gym.Env[Any, Any]:
    """Builds one game, in its worker: each step is four frames, each observation the last four steps, 84 x 84 grays."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # else every env greets
    return FrameStackObservation(AtariPreprocessing(gym.make(env_id, frameskip=1)), 4)


def make_envs(args: Arguments) -> aiovec.AsyncVectorEnv:
    """Nothing is started yet."""
    if args.is_atari:
        return aiovec.AsyncVectorEnv(
            [functools.partial(atari, args.env_id)] * args.num_envs, num_workers=args.num_workers
        )
    return aiovec.make_vec(args.env_id, args.num_envs, vector_kwargs={"num_workers": args.num_workers})


def scaled(layer: nn.Linear | nn.Conv2d, gain: float = 2**0.5) -> nn.Module:
    """A layer that begins orthogonal, as in detail 2 of the 37 of PPO that Huang et al. 2022 list (ICLR blog track)."""
    nn.init.orthogonal_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Network(nn.Module):
    """A policy and its value: apart from each other for a vector, on the same features for an image.

    The features of an image `[channels, 84, 84]` are those of Mnih et al. 2015, "Human-level control through deep
    reinforcement learning".
    """

    def __init__(self, shape: tuple[int, ...], num_actions: int) -> None:
        super().__init__()
        if len(shape) == 3:
            self.features: nn.Module = nn.Sequential(
                scaled(nn.Conv2d(shape[0], 32, 8, stride=4)),
                nn.ReLU(),
                scaled(nn.Conv2d(32, 64, 4, stride=2)),
                nn.ReLU(),
                scaled(nn.Conv2d(64, 64, 3)),
                nn.ReLU(),
                nn.Flatten(),
                scaled(nn.Linear(64 * 7 * 7, 512)),
                nn.ReLU(),
            )
            self.logits, self.value = scaled(nn.Linear(512, num_actions), 0.01), scaled(nn.Linear(512, 1), 1)
        else:
            self.features = nn.Identity()
            # A hundredth: it begins with no opinion.
            self.logits, self.value = (
                nn.Sequential(
                    scaled(nn.Linear(shape[0], 64)),
                    nn.Tanh(),
                    scaled(nn.Linear(64, 64)),
                    nn.Tanh(),
                    scaled(nn.Linear(64, outputs), gain),
                )
                for outputs, gain in ((num_actions, 0.01), (1, 1))
            )

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of all actions `[batch, num_actions]`, and values `[batch]`."""
        if observations.dtype == torch.uint8:
            observations = observations / 255  # not before: until here an image travels as bytes
        features = self.features(observations)
        return self.logits(features).log_softmax(-1), self.value(features).squeeze(-1)


@dataclass
class Run:
    """What is known so far."""

    args: Arguments
    network: Network = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    env_steps: int = 0
    seconds: float = 0.0  # from the first rollout on
    spent: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))  # of these, in what
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
        speed = f"{self.env_steps:,} env steps in {self.seconds:.1f} s"
        if self.seconds:
            speed += f", {self.env_steps / self.seconds:,.0f} a second"
        return f"{speed}; {len(self.episodes):,} episodes, mean return of the last 100: {self.mean_return:.1f}"

    @contextlib.contextmanager
    def clock(self, what: str) -> Iterator[None]:
        """Adds what its block takes, however that ends."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.spent[what] += time.perf_counter() - begin

    @property
    def split(self) -> str:
        """Where the time went. The envs are stepped on while the policy computes: theirs is what was waited for."""
        rollouts, policy, learning = (self.spent[what] for what in ("rollouts", "policy", "learning"))
        parts = {"env": rollouts - policy, "policy": policy, "learning": learning}
        parts["other"] = self.seconds - rollouts - learning
        shares = (f"{what} {seconds:.2f} s ({seconds / self.seconds:.1%})" for what, seconds in parts.items())
        return f"of {self.seconds:.2f} s: {', '.join(shares)}"

    # A plain function, and so on the loop: for a small network less than the way to a thread and back. It sees the
    # envs of one group, and runs while the workers step those of another.
    def choose(self, observations: Any) -> tuple[Any, dict[str, Any]]:
        """The policy, for a batch: actions, and what the learner wants to know of the moment they were chosen."""
        with self.clock("policy"), torch.inference_mode():
            log_probs, values = self.network(torch.from_numpy(observations))
            actions = log_probs.exp().multinomial(1)
            extras = {"log_prob": log_probs.gather(-1, actions).squeeze(-1).numpy(), "value": values.numpy()}
            return actions.squeeze(-1).numpy(), extras


def advantages_of(
    rewards: Tensor, values: Tensor, terminations: Tensor, autoresets: Tensor, gamma: float, trace_decay: float
) -> Tensor:
    """Generalized advantage estimation, `[T, N]`: Schulman et al. 2016 (arXiv:1506.02438), equation 16.

    Args:
        rewards: `[T, N]`.
        values: `[T + 1, N]`, of all observations.
        terminations: `[T, N]`.
        autoresets: `[T, N]`; here advantages are 0, and nothing is to be learned from them.
        gamma: The discount.
        trace_decay: Lambda.
    """
    # `observations[t + 1]` is where step t led to, always: behind the last step of an episode it is the terminal
    # observation, and the row t + 1 is no step, but the reset, which leads to the first observation of the next one.
    # So `values[1:]` needs no exception for a truncation: where only the time was up, the last state is worth what it
    # always is. A terminal state is worth nothing, whatever the network says of it.
    errors = rewards + gamma * values[1:].masked_fill(terminations, 0) - values[:-1]
    advantages = torch.zeros_like(errors)
    later = torch.zeros_like(errors[0])  # the advantage of the step behind; behind the last one nothing is known
    for t in reversed(range(len(errors))):
        # Behind each end, of either kind, is an autoreset. The 0 there keeps its own error out, which compares values
        # of two episodes, and keeps the next episode from what led to the end of the last.
        later = advantages[t] = (errors[t] + gamma * trace_decay * later).masked_fill(autoresets[t], 0)
    return advantages


def learn(run: Run, rollout: aiovec.Rollout) -> None:
    """PPO's clipped objective (arXiv:1707.06347, equation 9), in a thread."""
    args, network = run.args, run.network
    for group in run.optimizer.param_groups:
        group["lr"] = args.learning_rate * max(0.0, 1 - run.env_steps / args.max_steps)
    # The rollout's own memory, as workers have written it; only the minibatches below are copies.
    observations = torch.from_numpy(rollout.observations)
    rewards, autoresets = torch.from_numpy(rollout.rewards).float(), torch.from_numpy(rollout.autoresets)
    if args.is_atari:
        rewards = rewards.sign()  # all games alike, as in Mnih et al. 2015; the returns that are shown are the game's
    with torch.no_grad():
        _, last_values = network(observations[-1])
        values = torch.cat([torch.from_numpy(rollout.extras["value"]), last_values.unsqueeze(0)])
        terminations = torch.from_numpy(rollout.terminations)
        advantages = advantages_of(rewards, values, terminations, autoresets, args.gamma, args.trace_decay)
        targets = (advantages + values[:-1]).flatten()
        # Autoresets are no steps: their actions were ignored, so they count neither here nor in a mean.
        steps = autoresets.logical_not().flatten().nonzero().squeeze(-1)
        known = advantages.flatten()[steps]
        advantages = ((advantages - known.mean()) / (known.std(correction=0) + 1e-8)).flatten()
    observations = observations[:-1].flatten(0, 1)
    actions = torch.from_numpy(rollout.actions).flatten()
    old_log_probs = torch.from_numpy(rollout.extras["log_prob"]).flatten()
    for _ in range(args.epochs):
        shuffled = steps[torch.randperm(len(steps))]
        for begin in range(0, len(steps), args.minibatch_size):
            rows = shuffled[begin : begin + args.minibatch_size]
            log_probs, new_values = network(observations[rows])
            ratios = (log_probs.gather(-1, actions[rows].unsqueeze(-1)).squeeze(-1) - old_log_probs[rows]).exp()
            clipped = ratios.clamp(1 - args.clip, 1 + args.clip)
            gain = torch.minimum(ratios * advantages[rows], clipped * advantages[rows]).mean()
            entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
            value_loss = (new_values - targets[rows]).square().mean()
            run.optimizer.zero_grad()
            (args.value_weight * value_loss - gain - args.entropy_weight * entropy).backward()
            nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm)
            run.optimizer.step()


async def improve(envs: aiovec.AsyncVectorEnv, run: Run) -> None:
    """A rollout, and what it teaches."""
    # Not `rollouts`, which collects the next one while this one is learned from: PPO wants all steps of a rollout taken
    # by the policy that it improves, and the learner writes into that very network.
    with run.clock("rollouts"):
        rollout = await envs.rollout(run.choose, run.args.num_steps, groups=run.args.groups)
    run.env_steps += int(rollout.autoresets.size - rollout.autoresets.sum())
    for episode_return in rollout.episode_returns.tolist():
        run.last_returns.append(episode_return)
        run.episodes.append((run.env_steps, episode_return, run.mean_return))
    # In a thread, so that the loop stays free for whatever else runs on it. If this is cancelled, the update goes on in
    # its thread, which `asyncio.run` waits for before it returns.
    with run.clock("learning"):
        await asyncio.to_thread(learn, run, rollout)


async def train(run: Run, console: Console) -> None:
    """Rollout, update, rollout, until it is solved."""
    args, next_line = run.args, 0
    columns = TextColumn("mean return"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    async with make_envs(args) as envs:
        run.network = Network(envs.single_observation_space.shape, int(envs.single_action_space.n))
        run.optimizer = torch.optim.Adam(run.network.parameters(), args.learning_rate, eps=1e-5)
        await envs.reset(seed=args.seed)
        begin = time.perf_counter()
        with Progress(*columns, console=console, auto_refresh=False) as progress:
            bar = progress.add_task("", total=args.solved_return)
            while not run.solved and run.env_steps < args.max_steps:
                try:
                    await improve(envs, run)
                finally:
                    run.seconds = time.perf_counter() - begin
                numbers = f"{run.mean_return:.1f} of {args.solved_return:.0f}, {run.env_steps:,} env steps"
                progress.update(bar, completed=run.mean_return, description=numbers, refresh=True)
                if run.env_steps >= next_line:
                    progress.console.print(str(run), soft_wrap=True)
                    next_line += 20_000


def save(run: Run, console: Console) -> None:
    """The checkpoint and the learning curve."""
    checkpoint, picture = run.args.output / "ppo.pt", run.args.output / "ppo.png"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.save(run.network.state_dict(), checkpoint)
    console.print(f"Checkpoint: {checkpoint}", soft_wrap=True)
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    if run.episodes:
        env_steps, returns, means = zip(*run.episodes, strict=True)
        axes.plot(env_steps, returns, ".", alpha=0.3, label="an episode")
        axes.plot(env_steps, means, linewidth=2, label="mean of the last 100")
    axes.axhline(run.args.solved_return, color="tab:green", linestyle="--", label="solved")
    axes.set(title=f"{run.args.env_id}: PPO, {run.args.num_envs} envs", xlabel="env steps", ylabel="return")
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
    finally:
        if run.seconds:
            console.print(run.split, soft_wrap=True)
            save(run, console)


if __name__ == "__main__":
    main()
