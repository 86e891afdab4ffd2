"""64 agents that use tools over HTTP: quick ones, slow ones, some that fail, some that hang. Who waited for what?

Shows an `AsyncEnv` whose `step` awaits a real local server, a task for each agent at its own pace, what
`step_timeout` and `on_failure="restart"` make of answers that fail or never come, and what all this waiting costs.
The server lives in this process' event loop, so its quick answers are quick only if that loop stays free. The agents
choose their tools at random. Needs `pip install '.[examples]'` in the repository:

    python examples/tool_agents.py
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple, get_type_hints

import aiohttp
import gymnasium as gym
import numpy as np
from aiohttp import web
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import aiovec

TOOLS = {"quick": 0.5, "slow": 0.35, "failing": 0.1, "hanging": 0.05}  # and how often an agent chooses each
QUESTIONS = 3  # that a step asks its tool at once
NEW_ENV = "new env"
OUTCOMES = ("answered", "HTTP 500", "timed out")
ANSWER_SECONDS = 0.02  # of a quick tool, and of a failing one until it fails


@dataclass(frozen=True)
class Arguments:
    """What can be chosen on the command line."""

    num_agents: Annotated[int, "How many agents there are, each with an env and a task."] = 64
    num_workers: Annotated[int, "How many processes share their envs."] = 2
    steps: Annotated[int, "How many steps each agent takes."] = 14
    slow_seconds: Annotated[float, "What a slow answer takes on average; the times are exponential."] = 0.3
    step_timeout: Annotated[float, "Seconds after which a step is given up."] = 1.5
    seed: Annotated[int, "Seed of the agents' choices, and of the slow answers."] = 9


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


class ToolError(Exception):
    """A tool answered, but not with a result. (aiohttp's own error cannot be pickled, so its type would be lost.)"""


class ToolEnv(aiovec.AsyncEnv[Any, Any]):
    """An action is a tool, which is asked some questions at once; the answers are the observation."""

    observation_space = gym.spaces.Box(0, np.inf, (QUESTIONS,), np.float32)
    action_space = gym.spaces.Discrete(len(TOOLS))

    def __init__(self, url: str) -> None:
        self.url = url
        self.session: aiohttp.ClientSession | None = None  # it needs the running loop that `reset` has

    async def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Opens the session."""
        await super().reset(seed=seed, options=options)
        self.session = self.session or aiohttp.ClientSession(self.url)
        return np.zeros(QUESTIONS, np.float32), {}

    async def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Waits for all answers; the first failure ends the other questions, and the time-out all of them."""
        async with asyncio.TaskGroup() as group:
            answers = [group.create_task(self.ask(list(TOOLS)[action])) for _ in range(QUESTIONS)]
        return np.array([answer.result() for answer in answers], np.float32), 1.0, False, False, {}

    async def ask(self, tool: str) -> float:
        """One question."""
        async with self.session.get(tool) as response:  # a cancelled one hangs up
            if response.status != 200:
                raise ToolError(f"{tool}: HTTP {response.status}")
            return float(await response.text())

    async def close(self) -> None:
        """Closes the session; also when the env is built anew."""
        if self.session is not None:
            await self.session.close()


@asynccontextmanager
async def tool_server(args: Arguments) -> AsyncIterator[tuple[str, Counter[str]]]:
    """Serves on a free port of this machine: its address, and what it counts."""
    chance, counts = random.Random(args.seed), Counter[str]()

    async def answer(request: web.Request) -> web.Response:
        tool = request.match_info["tool"]
        counts["asked"] += 1
        counts["open"] += 1
        counts["most open"] = max(counts["most open"], counts["open"])
        try:
            if tool == "hanging":
                await asyncio.Event().wait()  # until the client hangs up
            await asyncio.sleep(chance.expovariate(1 / args.slow_seconds) if tool == "slow" else ANSWER_SECONDS)
            return web.Response(text="42", status=500 if tool == "failing" else 200)
        finally:
            counts["open"] -= 1

    app = web.Application()
    app.router.add_get("/{tool}", answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/", counts
    finally:
        await runner.cleanup()


class Wait(NamedTuple):
    """What one agent once waited for."""

    agent: int
    what: str
    seconds: float
    outcome: str


def outcome_of(failure: BaseException | None) -> str:
    """A failed row has the exception itself; a tool's is in a group, which the task group of `step` has made."""
    if failure is None:
        return "answered"
    if isinstance(failure, aiovec.EnvTimeoutError):
        return "timed out"
    if isinstance(failure, ExceptionGroup) and failure.subgroup(ToolError):
        return "HTTP 500"
    raise failure  # not a tool's doing: it ends the run


async def act(env: aiovec.SubEnv, args: Arguments, waits: list[Wait]) -> int:
    """One agent, for which a failed step is a row like any other; how often its env was built anew."""
    chance, generation = random.Random(f"{args.seed} {env.env_index}"), 0

    async def timed(what: str, call: Awaitable[tuple[Any, ...]]) -> dict[str, Any]:
        begin = time.perf_counter()
        *_, info = await call
        waits.append(Wait(env.env_index, what, time.perf_counter() - begin, outcome_of(info.get("failure"))))
        return info

    await env.reset()
    for _ in range(args.steps):
        (tool,) = chance.choices(list(TOOLS), TOOLS.values())
        info = await timed(tool, env.step(list(TOOLS).index(tool)))
        if "failure" in info:  # the reward is NaN, the episode truncated; after several in a row the new env is delayed
            generation = info["generation"]
            await timed(NEW_ENV, env.reset())
    return generation


def report(waits: list[Wait], seconds: float) -> None:
    """Who waited for what."""
    table = Table(title="What the agents waited for", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("for", "times", "in all", "mean", "longest", *OUTCOMES):
        table.add_column(heading, justify="left" if heading == "for" else "right", no_wrap=True)
    for what in (*TOOLS, NEW_ENV):
        times = [wait.seconds for wait in waits if wait.what == what] or [0.0]
        outcomes = Counter(wait.outcome for wait in waits if wait.what == what)
        cells = (f"{sum(times):.1f} s", f"{statistics.fmean(times):.3f} s", f"{max(times):.3f} s")
        table.add_row(what, str(outcomes.total()), *cells, *(str(outcomes[outcome]) for outcome in OUTCOMES))
    Console(highlight=False).print(table)

    by_agent: dict[int, Counter[str]] = {}
    for wait in waits:
        by_agent.setdefault(wait.agent, Counter())[wait.what] += wait.seconds
    in_all = sum(wait.seconds for wait in waits)
    print(f"All agents together waited {in_all:.1f} s, within {seconds:.1f} s: {in_all / seconds:.0f} times as much.")
    agent, of_agent = max(by_agent.items(), key=lambda item: item[1].total())
    parts = ", ".join(f"{what} {of_what:.1f} s" for what, of_what in of_agent.most_common())
    print(f"Agent {agent} waited longest, {of_agent.total():.1f} s: {parts}.")


async def run(args: Arguments) -> None:
    """The server, the envs and the agents."""
    waits: list[Wait] = []
    async with tool_server(args) as (url, counts):
        envs = aiovec.AsyncVectorEnv(
            [partial(ToolEnv, url)] * args.num_agents,
            num_workers=args.num_workers,
            step_timeout=args.step_timeout,
            on_failure="restart",
            max_restarts=args.steps,  # whatever its tools do in a row, no agent is given up
        )
        async with envs:
            print(f"{envs.num_envs} agents in {envs.num_workers} workers use the tools at {url}", flush=True)
            begin = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                agents = [group.create_task(act(env, args, waits)) for env in envs]
            seconds = time.perf_counter() - begin
        report(waits, seconds)
        print(f"Envs were built anew {sum(agent.result() for agent in agents)} times.")
        asked, most_open, still_open = counts["asked"], counts["most open"], counts["open"]
        print(f"The server was asked {asked} questions, up to {most_open} at once; {still_open} are still open.")


def main() -> None:
    """Ctrl-C is an end like any other, with the exit code that shells expect."""
    try:
        asyncio.run(run(parse_arguments()))
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; every worker has ended")
        sys.exit(130)


if __name__ == "__main__":
    main()
