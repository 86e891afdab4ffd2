"""`FaultyEnv`: an env that fails on demand."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NoReturn, get_args

import gymnasium as gym
import numpy as np
import numpy.typing as npt

__all__ = ["Fault", "FaultyEnv", "Moment", "UnpicklableError"]

Fault = Literal[
    "raise",
    "raise-unpicklable",
    "exit",
    "kill",
    "segfault",
    "hang",
    "hang-in-c",
    "slow",
    "wrong-shape",
    "wrong-dtype",
    "nan-reward",
]
Moment = Literal["init", "reset", "step", "render", "close"]
_Observation = npt.NDArray[np.float32]

# What would not fail an env, but end or stop the very process that it is in.
_ENDS_PROCESS = ("kill", "segfault", "hang", "hang-in-c")
_MOMENTS_OF_RESULTS: Mapping[str, tuple[Moment, ...]] = MappingProxyType(
    {
        "wrong-shape": ("reset", "step"),
        "wrong-dtype": ("reset", "step"),
        "nan-reward": ("step",),
    }
)


class UnpicklableError(Exception):
    """Holds a lock, and so cannot leave its process as itself."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock: Any = threading.Lock()


@dataclass
class _Demand:
    fault: Fault
    calls_before: int  # that are still to go well
    seconds: float


class FaultyEnv(gym.Env[_Observation, np.int64]):
    """Fails on demand: for tests of how a training program, a backend or a wrapper bears failures.

    A fault is asked for where the env is built, or at any time from outside, and happens once; after that the env
    does its work again, if there still is one:

        envs = aiovec.AsyncVectorEnv([FaultyEnv, FaultyEnv, functools.partial(FaultyEnv, "raise", after=3)])
        await envs.call("fail", "kill", env_ids=[1])  # at its next step

    | fault | what the env does | what the awaiting task is told |
    | --- | --- | --- |
    | ``"raise"`` | raises `ValueError` with two arguments and a note | that very exception; the env needs a reset |
    | ``"raise-unpicklable"`` | raises what cannot leave its process | `RemoteError` with its text and traceback |
    | ``"exit"`` | `sys.exit(3)` | `RemoteError`, whose cause is the `SystemExit`; the worker lives |
    | ``"kill"`` | SIGKILL of its own process | `WorkerDied`, for all envs of that worker |
    | ``"segfault"`` | reads at address 0, in C | `WorkerDied`, with the worker's last Python stack |
    | ``"hang"`` | sleeps for ever, whatever is raised in it | `EnvTimeoutError`, if there is a `step_timeout` |
    | ``"hang-in-c"`` | the same in C, and holds Python's lock | the same |
    | ``"slow"`` | sleeps for `seconds`, then does its work | nothing, unless `step_timeout` is shorter |
    | ``"wrong-shape"`` | observes one number too many | `InvalidEnvResultError`, never a broadcast row |
    | ``"wrong-dtype"`` | observes complex numbers | `InvalidEnvResultError` |
    | ``"nan-reward"`` | gives the reward NaN | nothing: rewards are the env's |

    In the moment ``"init"`` the start fails; so does each reset that builds the env anew. In ``"close"`` the vector is
    closed all the same, and then raises; a hang is ended after `close_grace`. With `on_failure="restart"` most faults of
    ``"step"`` and ``"reset"`` become a row with the reward NaN; the new env is built as the first one was, and so has the
    fault that was asked for there, but not what was asked for by `fail`.

    ``"kill"``, ``"segfault"``, ``"hang"`` and ``"hang-in-c"`` are refused where an event loop runs in the same thread:
    with `num_workers=0` they would take the caller with them. Elsewhere the env does what it is told, also without a vector.

    The observation tells how the env fares: how many steps its episode has, how many episodes there were since a seed was
    given, and a number that `reset` draws from `np_random`. The reward is the number of steps; the info of a step has its action, that of
    a reset the options. An episode terminates after `episode_length` steps.

    Args:
        fault: What to do in the first place; `None`: nothing.
        moment: In which method.
        after: How many calls of that method go well before.
        seconds: How long ``"slow"`` sleeps.
        episode_length: How many steps an episode has.

    Raises:
        ValueError: There is no such fault or moment, or that fault has no such moment; `after` is negative.
        RuntimeError: The fault would end the process of the event loop.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 10}  # type: ignore[misc]
    render_mode: str | None = "rgb_array"

    def __init__(
        self,
        fault: Fault | None = None,
        moment: Moment = "step",
        *,
        after: int = 0,
        seconds: float = 1.0,
        episode_length: int = 10,
    ) -> None:
        self.observation_space: gym.Space[_Observation] = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space: gym.Space[np.int64] = gym.spaces.Discrete(4)
        self.episode_length: int = episode_length
        self._demands: dict[Moment, _Demand] = {}
        self._steps = 0
        self._episodes = 0
        self._number = 0
        if fault is not None:
            self._ask(fault, moment, after, seconds)
            self._come_to("init")

    def fail(self, fault: Fault, moment: Moment = "step", *, after: int = 0, seconds: float = 1.0) -> None:
        """Asks for a fault, in place of another one in that moment: `await envs.call("fail", "kill", env_ids=[2])`.

        Args:
            fault: What to do.
            moment: In which method; ``"init"`` is past.
            after: How many calls of that method go well before.
            seconds: How long ``"slow"`` sleeps.

        Raises:
            ValueError: As for the constructor; the moment is ``"init"``.
            RuntimeError: As for the constructor.
        """
        if moment == "init":
            raise ValueError("the env is built already: a fault in 'init' is asked for by the constructor")
        self._ask(fault, moment, after, seconds)

    def _ask(self, fault: Fault, moment: Moment, after: int, seconds: float) -> None:
        if fault not in get_args(Fault):
            raise ValueError(f"fault={fault!r}: expected one of {', '.join(map(repr, get_args(Fault)))}")
        moments = _MOMENTS_OF_RESULTS.get(fault, get_args(Moment))
        if moment not in moments:
            raise ValueError(f"moment={moment!r}: expected one of {', '.join(map(repr, moments))} for {fault!r}")
        if after < 0 or (after and moment == "init"):
            raise ValueError(f"after={after!r}: expected a number of calls of {moment!r} from 0, and 0 for 'init'")
        if fault in _ENDS_PROCESS and _runs_in_a_loop():
            raise RuntimeError(
                f"{fault!r} refused: an event loop runs in this very thread (pid {os.getpid()}), so the fault would take "
                "your program with it. Ask for it in a vector whose envs have worker processes: num_workers=1 or more."
            )
        self._demands[moment] = _Demand(fault, after, seconds)

    def _come_to(self, moment: Moment) -> Fault | None:
        """Does what is asked for in this moment; gives a fault that is one of the result."""
        demand = self._demands.get(moment)
        if demand is None:
            return None
        if demand.calls_before:
            demand.calls_before -= 1
            return None
        del self._demands[moment]
        match demand.fault:
            case "raise":
                error = ValueError(f"FaultyEnv failed in {moment}", self._steps)
                error.add_note("a note of the env")
                raise error
            case "raise-unpicklable":
                raise UnpicklableError(f"FaultyEnv failed in {moment}")
            case "exit":
                sys.exit(3)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "segfault":
                ctypes.string_at(0)
            case "hang":
                _hang()
            case "hang-in-c":
                _hang_in_c()
            case "slow":
                time.sleep(demand.seconds)
            case "wrong-shape" | "wrong-dtype" | "nan-reward":
                return demand.fault
        return None

    def _observe(self, fault: Fault | None) -> _Observation:
        observation: Any = np.array([self._steps, self._episodes, self._number], np.float32)
        if fault == "wrong-shape":
            observation = np.append(observation, np.float32(0))
        if fault == "wrong-dtype":
            observation = observation.astype(np.complex64)
        return observation  # type: ignore[no-any-return]  # but for a fault

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[_Observation, dict[str, Any]]:
        super().reset(seed=seed)
        fault = self._come_to("reset")
        self._steps = 0
        self._episodes = 1 if seed is not None else self._episodes + 1
        self._number = int(self.np_random.integers(1_000_000))
        return self._observe(fault), {"options": str(options)}

    def step(self, action: np.int64) -> tuple[_Observation, float, bool, bool, dict[str, Any]]:
        fault = self._come_to("step")
        self._steps += 1
        reward = float("nan") if fault == "nan-reward" else float(self._steps)
        return self._observe(fault), reward, self._steps >= self.episode_length, False, {"action": int(action)}

    def render(self) -> npt.NDArray[np.uint8]:
        self._come_to("render")
        return np.full((2, 2, 3), self._steps % 256, np.uint8)

    def close(self) -> None:
        self._come_to("close")


def _runs_in_a_loop() -> bool:
    """In a worker, no env that is not an `AsyncEnv` has a running loop in its thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _hang() -> NoReturn:
    while True:
        with contextlib.suppress(BaseException):  # a Ctrl-C, or what a debugger raises here: nothing is to end it
            time.sleep(1)


def _hang_in_c() -> NoReturn:
    sleep = ctypes.PyDLL(None).sleep  # unlike CDLL, this keeps Python's lock
    while True:  # a signal, as the one that asks for the Python stack, ends a sleep
        sleep(1_000_000)
