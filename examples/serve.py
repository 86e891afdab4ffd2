"""An actor server: envs and a batched policy behind HTTP, with health checks that answer while all of them are busy.

A client leases one env of a vector as its session, and steps it by its own actions or by the policy of the server, which
is asked once for all requests that come at about the same time. Shows what such a server does with two requests at once,
actions that are none, envs that fail, workers that die, clients that hang up in the middle of a step, and sessions that
nobody uses any more: each has its answer, and every env can be leased again. Ctrl-C and SIGTERM end it: requests under
way get their answer, or after `--grace-seconds` a 503. Needs `pip install '.[examples]'` in the repository:

    python examples/serve.py --num-envs 16
    curl -X POST localhost:8000/sessions                               # an id, and the first observation
    curl -X POST localhost:8000/sessions/$ID/step -d '{"action": 1}'   # without an action the policy acts
    curl -X POST localhost:8000/sessions/$ID/episode                   # a whole one, by the policy
    curl -X POST localhost:8000/sessions/$ID/reset -d '{"seed": 3}'
    curl -X DELETE localhost:8000/sessions/$ID
    curl localhost:8000/health localhost:8000/statistics

Errors are `{"error": "what happened, and what to do"}`: 404 no such session, 409 the session is busy or needs a reset, 422
a wrong body, 502 the env failed, or its worker died, 503 no env is free.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import secrets
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, get_type_hints

import anyio
import gymnasium as gym
import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import aiovec


@dataclass(frozen=True)
class Arguments:
    """What can be chosen on the command line."""

    env_id: Annotated[str, "What is served; `module:Name-v0` imports the module that registers it."] = "CartPole-v1"
    num_envs: Annotated[int, "How many envs, and so sessions at once."] = 16
    num_workers: Annotated[
        int, "How many processes share the envs; a step that takes long holds up those that share its own."
    ] = 2
    weights: Annotated[Path | None, "Of a linear policy, `[observation, actions]` in a .npy; else for CartPole."] = None
    max_wait: Annotated[float, "Seconds that the policy waits for a batch to fill; 0: who asks at once is one."] = 0.0
    step_timeout: Annotated[float, "Seconds that an env may take for a step, before its worker is ended."] = 30.0
    session_seconds: Annotated[float, "A session unused for so long is taken back when its env is needed."] = 60.0
    grace_seconds: Annotated[int, "How long requests under way may take to end when the server does."] = 3
    host: Annotated[str, "The address that is listened on."] = "127.0.0.1"
    port: Annotated[int, "The port; 0: any that is free."] = 8000
    loop: Annotated[str, "The event loop, asyncio or uvloop; auto: uvloop if it is installed."] = "auto"


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


# Push to where the pole falls, which is its angle and, a moment ahead, its speed; a little of the cart's own position and
# speed keeps it on the track. `[observation, actions]`, left and right.
BALANCE_CARTPOLE = np.array([0.03, 0.15, 1.0, 0.6], np.float32)[:, None] * np.array([-1, 1], np.float32)


@dataclass
class LinearPolicy:
    """Takes the action with the highest score."""

    weights: Any  # [observation, actions]

    def fits(self, observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> bool:
        """Whether it can play envs of these spaces."""
        num_actions = self.weights.shape[-1]
        return observation_space.shape == self.weights.shape[:-1] and action_space == gym.spaces.Discrete(num_actions)

    # An `async def` without an `await`, so it runs on the loop: some µs, less than the way to a thread and back. A
    # network would go to a thread, by being a plain function, and the next batch gather meanwhile.
    async def __call__(self, observations: Any) -> Any:
        """For a batch of observations, an action each."""
        return (observations @ self.weights).argmax(-1)


@dataclass
class Session:
    """Who leased an env. One request at a time uses it."""

    env: aiovec.SubEnv
    session_id: str = field(default_factory=lambda: secrets.token_urlsafe(9))
    observation: Any = None  # the last one, for the policy
    is_busy: bool = False
    last_used: float = field(default_factory=time.monotonic)


class Answer(JSONResponse):
    """JSON in which arrays and numpy's numbers are lists and numbers, and what is unknown in an info its text."""

    def render(self, content: Any) -> bytes:
        """As a line; NaN and infinity as Python writes them."""
        text = json.dumps(content, default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value))
        return f"{text}\n".encode()


EXPECTED = {int: "a whole number from 0", dict: "an object"}


async def fields_of(request: Request, **kinds: type) -> dict[str, Any]:
    """The JSON object in the body, or nothing; what is null is as if it were not there."""
    try:
        fields = json.loads(await request.body() or b"{}")
    except ValueError as error:
        raise HTTPException(422, f"the body is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise HTTPException(422, "the body is no JSON object")
    given = {name: value for name, value in fields.items() if value is not None}
    for name, value in given.items():
        if name not in kinds:
            raise HTTPException(422, f"{name!r} is unknown here; known are {', '.join(kinds)}")
        kind = kinds[name]
        if kind is not object and (type(value) is not kind or (kind is int and value < 0)):
            raise HTTPException(422, f"{name}={value!r}: expected {EXPECTED[kind]}")
    return given


async def unless_gone(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """Awaits the work of a request, and cancels it if the client hangs up before it is done.

    What a cancelled step has asked of the env goes on, and its answer is owed: the next reset discards it.
    """
    with anyio.CancelScope() as scope:

        async def watch() -> None:
            await request.receive()  # the body is read: what comes now is that the client is gone
            scope.cancel()

        watching = asyncio.create_task(watch())
        try:
            return await work
        except asyncio.CancelledError:
            if scope.cancel_called:
                raise
            # By uvicorn, when the time for a graceful end is over: this task ends, with an answer.
            raise HTTPException(503, "the server ends") from None
        finally:
            watching.cancel()
    raise ClientDisconnect


class ActorServer:
    """The envs, who has leased which, and what is answered; its endpoints are the methods that take a request."""

    def __init__(self, args: Arguments, envs: aiovec.AsyncVectorEnv) -> None:
        self.args = args
        self.envs = envs
        self.sessions: dict[str, Session] = {}
        # The one that is free for longest is leased first: what the last client left undone there has had time to end.
        self.free = deque(envs)
        self.linear = LinearPolicy(BALANCE_CARTPOLE if args.weights is None else np.load(args.weights))
        self.policy = aiovec.Batcher(self.linear, max_batch_size=envs.num_envs, max_wait=args.max_wait)

    def app(self, url: str) -> Starlette:
        """What uvicorn serves."""

        @contextlib.asynccontextmanager
        async def lifespan(_app: Starlette) -> AsyncIterator[None]:
            async with self.envs, self.policy:
                self.has_policy = self.linear.fits(self.envs.single_observation_space, self.envs.single_action_space)
                if self.args.weights is not None and not self.has_policy:
                    raise ValueError(f"{self.args.weights} has weights for another env than {self.args.env_id}")
                print(f"serving {self.envs} at {url}", flush=True)
                # At a second Ctrl-C uvicorn drops what it does, and the end of the loop cancels this, which ends all the same.
                with contextlib.suppress(asyncio.CancelledError):
                    yield
                print(f"ends: {self.envs.statistics()}", flush=True)
            print("every worker has ended", flush=True)

        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/statistics", self.statistics),
                Route("/sessions", self.begin, methods=["POST"]),
                Route("/sessions/{session_id}", self.end, methods=["DELETE"]),
                Route("/sessions/{session_id}/reset", self.reset, methods=["POST"]),
                Route("/sessions/{session_id}/step", self.step, methods=["POST"]),
                Route("/sessions/{session_id}/episode", self.episode, methods=["POST"]),
            ],
            exception_handlers={HTTPException: as_answer, ClientDisconnect: to_nobody},
            lifespan=lifespan,
        )

    # ---- what it does

    async def health(self, _request: Request) -> Response:
        """Nothing here waits, so it answers however long the envs take."""
        pending = self.envs.statistics().pending
        return Answer(
            {
                "status": "ok",
                "num_envs": self.envs.num_envs,
                "free_envs": len(self.free) + len(self.unused()),
                "sessions": len(self.sessions),
                "busy_sessions": sum(session.is_busy for session in self.sessions.values()),
                "waiting_for_policy": self.policy.statistics().pending,
                "pending": [dataclasses.asdict(call) for call in pending],
            }
        )

    async def statistics(self, _request: Request) -> Response:
        """What the envs and the policy have done so far."""
        policy = dataclasses.asdict(self.policy.statistics())
        return Answer({"envs": self.envs.statistics().as_dict(), "policy": policy})

    # ---- sessions

    async def begin(self, request: Request) -> Response:
        """Leases an env, and resets it."""
        fields = await fields_of(request, seed=int, options=dict)
        session = Session(self.lease())
        try:
            with self.failures_as_answers(session):
                answer = await unless_gone(request, self.reset_env(session, **fields))
        except BaseException:
            self.free.append(session.env)
            raise
        self.sessions[session.session_id] = session
        return Answer(answer, status_code=201)

    async def end(self, request: Request) -> Response:
        """Gives the env back."""
        with self.used_by(request) as session:
            self.take_back(session)
        return Response(status_code=204)

    async def reset(self, request: Request) -> Response:
        """Begins another episode, whatever became of the last one."""
        fields = await fields_of(request, seed=int, options=dict)
        with self.used_by(request) as session:
            return Answer(await unless_gone(request, self.reset_env(session, **fields)))

    async def step(self, request: Request) -> Response:
        """Takes the action of the client, or of the policy."""
        fields = await fields_of(request, action=object)
        with self.used_by(request) as session:
            if "action" in fields:
                return Answer(await unless_gone(request, self.step_env(session, self.action_of(fields["action"]))))
            return Answer(await unless_gone(request, self.act(session)))

    async def episode(self, request: Request) -> Response:
        """Plays an episode from its begin, to its end or for `max_steps`."""
        fields = await fields_of(request, max_steps=int, seed=int, options=dict)
        with self.used_by(request) as session:
            return Answer(await unless_gone(request, self.play(session, **fields)))

    # ---- who has which env

    def lease(self) -> aiovec.SubEnv:
        """A free env, if need be of a session that was not used for long."""
        if not self.free:
            for session in self.unused():
                self.take_back(session)
        if not self.free:
            raise HTTPException(503, f"all {self.envs.num_envs} envs are in use", {"Retry-After": "1"})
        return self.free.popleft()

    def take_back(self, session: Session) -> None:
        """Ends a session; its env is free."""
        del self.sessions[session.session_id]
        self.free.append(session.env)

    def unused(self) -> list[Session]:
        """Those that may be taken back."""
        since = time.monotonic() - self.args.session_seconds
        return [session for session in self.sessions.values() if not session.is_busy and session.last_used < since]

    @contextlib.contextmanager
    def used_by(self, request: Request) -> Iterator[Session]:
        """The session of a request, which is busy meanwhile."""
        session_id = request.path_params["session_id"]
        session = self.sessions.get(session_id)
        if session is None:
            raise HTTPException(404, f"no session {session_id!r}: it ended, or was not used for long, or never was")
        if session.is_busy:
            raise HTTPException(409, "another request uses this session: await its answer first")
        session.is_busy = True
        try:
            with self.failures_as_answers(session):
                yield session
        finally:
            session.is_busy = False
            session.last_used = time.monotonic()

    @contextlib.contextmanager
    def failures_as_answers(self, session: Session) -> Iterator[None]:
        """What aiovec raises, as the client is told it. Whatever it was, a reset makes the env whole."""
        try:
            yield
        except aiovec.InvalidActionsError as error:
            raise HTTPException(422, str(error)) from error
        except aiovec.AlreadyPendingCallError as error:
            advice = f"POST /sessions/{session.session_id}/reset begins another episode"
            raise HTTPException(409, f"the client hung up during a step, and its answer is lost: {advice}") from error
        except aiovec.ResetNeeded as error:
            advice = f"POST /sessions/{session.session_id}/reset begins another"
            raise HTTPException(409, f"the episode has ended, or its env has failed: {advice}") from error
        except Exception as error:
            if not aiovec.failures(error):  # not an env's doing: 500, and a traceback in the log
                raise
            text = "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
            print(f"502 for env {session.env.env_index}: {text}", flush=True)
            raise HTTPException(502, text) from error

    # ---- what is asked of an env

    def action_of(self, value: Any) -> Any:
        """What a client sent, as the env's action space has it. (Envs trust their actions, and fail at a wrong one.)"""
        space = self.envs.single_action_space
        try:
            (action,) = space.from_jsonable([value])
            is_valid = space.contains(action) and np.allclose(action, value)  # 1.5 would be 1
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise HTTPException(422, f"action={value!r} does not fit {space}: {error}") from error
        if not is_valid:
            raise HTTPException(422, f"action={value!r} is not in {space}")
        return action

    async def reset_env(self, session: Session, **fields: Any) -> dict[str, Any]:
        """The first observation."""
        session.observation, info = await session.env.reset(**fields)
        return {"session": session.session_id, "observation": session.observation, "info": info}

    async def step_env(self, session: Session, action: Any) -> dict[str, Any]:
        """One step."""
        session.observation, reward, terminated, truncated, info = await session.env.step(action)
        answer = {"action": action, "observation": session.observation, "reward": reward}
        return answer | {"terminated": terminated, "truncated": truncated, "info": info}

    async def act(self, session: Session) -> dict[str, Any]:
        """One step by the policy."""
        if not self.has_policy:
            raise HTTPException(422, "this server has no policy for its envs: send an action")
        return await self.step_env(session, await self.policy(session.observation))

    async def play(self, session: Session, max_steps: int | None = None, **fields: Any) -> dict[str, Any]:
        """One episode by the policy."""
        await self.reset_env(session, **fields)
        episode_return, length, step = 0.0, 0, {"terminated": False, "truncated": False}
        while not (step["terminated"] or step["truncated"] or length == max_steps):
            step = await self.act(session)
            episode_return += step["reward"]
            length += 1
        ended = {"terminated": step["terminated"], "truncated": step["truncated"]}
        return {"return": episode_return, "length": length, **ended, "observation": session.observation}


async def as_answer(_request: Request, error: Exception) -> Response:
    """An error is JSON, too."""
    assert isinstance(error, HTTPException)  # noqa: S101  it is registered for this class
    return Answer({"error": error.detail}, status_code=error.status_code, headers=error.headers)


async def to_nobody(_request: Request, _error: Exception) -> Response:
    """Who should have been answered is gone; uvicorn drops it."""
    return Response(status_code=400)


def exit_at_sigterm(_signal: int, _frame: FrameType | None) -> None:
    """The end that was asked for is a success."""
    sys.exit(0)


def main() -> None:
    """Serves until a signal; after Ctrl-C with the exit code that shells expect."""
    args = parse_arguments()
    vector_kwargs = {"num_workers": args.num_workers, "step_timeout": args.step_timeout}
    envs = aiovec.make_vec(args.env_id, args.num_envs, vector_kwargs=vector_kwargs)
    # uvicorn takes both signals and ends gracefully. Then it raises them anew, for those who had them before.
    signal.signal(signal.SIGTERM, exit_at_sigterm)
    with socket.create_server((args.host, args.port)) as listener:  # bound here, so that the port is known
        # asyncio does this itself, but not for a listener like this one, and then each answer waits 40 ms for an ACK.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        host, port = listener.getsockname()
        config = uvicorn.Config(
            ActorServer(args, envs).app(f"http://{host}:{port}"),
            loop=args.loop,
            lifespan="on",
            log_level="warning",
            timeout_graceful_shutdown=args.grace_seconds,
        )
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            sys.exit(130)


if __name__ == "__main__":
    main()
