"""`BlockingVectorEnv`: the same vector for code without an event loop, as a `gymnasium.vector.VectorEnv`."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import os
import threading
import warnings
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv

from aiovec.arguments import reset_targets
from aiovec.batches import Batches, ResetResult, StepBatch, StepResult
from aiovec.errors import (
    AlreadyPendingCallError,
    CallTimeoutError,
    ClosedEnvironmentError,
    NoAsyncCallError,
    RunningLoopError,
)
from aiovec.make import VECTOR_OPTIONS, env_maker, find_spec
from aiovec.method_calls import begin_call
from aiovec.pool.calls import Calls
from aiovec.pool.pending_call import PendingCall
from aiovec.pool.spaces import ObservationMode
from aiovec.pool.start import EnvFn
from aiovec.private_loop import PrivateLoop
from aiovec.rollouts import Policy, Rollout
from aiovec.statistics import VectorStatistics
from aiovec.vector_env import AsyncVectorEnv

__all__ = ["BlockingVectorEnv", "register_vec"]

_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")


def _in_one_thread(
    method: Callable[Concatenate[BlockingVectorEnv, _Arguments], _Result],
) -> Callable[Concatenate[BlockingVectorEnv, _Arguments], _Result]:
    """A method that is refused inside a running event loop, and while another thread is in one of these.

    A Ctrl-C does not end it in the middle of a request, which would leave workers asked and the others not.
    """
    name = f"{method.__name__}()"

    @functools.wraps(method)
    def guarded(self: BlockingVectorEnv, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        _refuse_in_running_loop(name)
        in_use = self._in_use  # pyright: ignore[reportPrivateUsage]  the decorator is the class's own
        try:
            with self._interrupts_held_back():  # pyright: ignore[reportPrivateUsage]  likewise
                if not in_use.acquire(blocking=False):
                    raise AlreadyPendingCallError(method.__name__, (), owed=False)
                try:
                    return method(self, *args, **kwargs)
                finally:
                    in_use.release()
        except KeyboardInterrupt:
            self._note_interrupt()  # pyright: ignore[reportPrivateUsage]  likewise
            raise

    return guarded


@dataclass
class _Begun:
    """A call whose answer was not taken yet."""

    command: str  # "step", "reset" or "call"
    call: PendingCall
    result: Callable[[PendingCall, list[Any]], Any]
    is_late: bool = False  # a wait for it has ended without it


class BlockingVectorEnv(VectorEnv[Any, Any, npt.NDArray[Any]]):
    """An `AsyncVectorEnv` whose methods block: a `gymnasium.vector.VectorEnv`, for code without an event loop.

    It takes the place of `gymnasium.vector.AsyncVectorEnv` by a change of the import: constructor, methods and classes
    of exceptions are the same, and Gymnasium's vector wrappers take it. A private loop runs in the calling thread while a
    call waits; there is no other thread. Building it starts the workers. One thread at a time may use it.

    A call that times out, or is ended by a Ctrl-C, goes on in the workers: the same ``…_wait`` waits for it again, `reset`
    waits it out and discards it. No answer is ever paired with another call.

    Args:
        env_fns: A function for each env that builds it; see `AsyncVectorEnv`.
        shared_memory: Whether observations, actions, rewards and flags travel in memory that the workers share.
        copy: `True`, `None`: what is returned is yours to keep; large observations are lent without a copy, unless it is
            `True`. `False`: observations are views that hold until the next `reset` or `step`.
        context: `None`: workers are fresh interpreters, and no ``if __name__ == "__main__"`` is needed. ``"fork"``,
            ``"forkserver"``, ``"spawn"``: `multiprocessing` starts them. ``"ray"``: actors on a Ray cluster.
        daemon: Without effect: workers always end with this process, and may always start processes of their own.
        worker: Must be `None`: there is one kind of worker.
        observation_mode: ``"same"``, ``"different"``, or a pair of spaces.
        autoreset_mode: Gymnasium's; also by name.
        max_concurrency: How many envs may run at the same time: the number of workers, unless `num_workers` is given.
        **options: The others of `AsyncVectorEnv`: `num_workers`, `step_timeout`, `on_failure`, ….

    Attributes:
        observation_space: Of a batch; and `single_observation_space`, `action_space`, `single_action_space`,
            `metadata`, `render_mode`, `num_envs`, as Gymnasium's.

    Raises:
        RunningLoopError: An event loop runs in this thread.
        Exception: What building an env raised, with the worker's frames, or an `ExceptionGroup` of several; nothing is left.
    """

    num_envs: int
    metadata: dict[str, Any]
    render_mode: str | None
    observation_space: gym.Space[Any]
    single_observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    single_action_space: gym.Space[Any]
    closed: bool = False

    def __init__(
        self,
        env_fns: Sequence[EnvFn],
        shared_memory: bool = True,
        copy: bool | None = None,
        context: Literal["fork", "forkserver", "spawn", "ray"] | None = None,
        daemon: bool = True,  # noqa: ARG002  Gymnasium's
        worker: None = None,
        observation_mode: ObservationMode = "same",
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        max_concurrency: int | None = None,
        **options: Any,
    ) -> None:
        _refuse_in_running_loop("BlockingVectorEnv(…)")
        if worker is not None:
            raise TypeError("worker: aiovec has one kind of worker, and takes no function in its place")
        if unknown := sorted(options.keys() - VECTOR_OPTIONS):
            raise TypeError(
                f"BlockingVectorEnv has no option {', '.join(unknown)}; it has {', '.join(sorted(VECTOR_OPTIONS))}"
            )
        if max_concurrency is not None:
            options.setdefault("num_workers", min(max_concurrency, len(env_fns)))
        self._begun: _Begun | None = None
        self._in_use = threading.Lock()
        self._envs = AsyncVectorEnv(
            env_fns,
            shared_memory=shared_memory,
            copy=copy,
            context=context,
            observation_mode=observation_mode,
            autoreset_mode=autoreset_mode,
            **options,
        )
        self._owner_pid = os.getpid()
        self._loop = PrivateLoop()
        try:
            with self._interrupts_held_back():
                self._batches: Batches | None = self._loop.run(_start(self._envs))
        except BaseException:
            self.closed = True
            self._envs.terminate()
            self._loop.close()
            raise
        self.num_envs = self._envs.num_envs
        self.metadata = self._envs.metadata
        self.render_mode = self._envs.render_mode
        self.observation_space = self._envs.observation_space
        self.single_observation_space = self._envs.single_observation_space
        self.action_space = self._envs.action_space
        self.single_action_space = self._envs.single_action_space

    @property
    def num_workers(self) -> int:
        """How many worker processes."""
        return self._envs.num_workers

    def statistics(self) -> VectorStatistics:
        """What the vector has done so far, and what it is doing; see `AsyncVectorEnv.statistics`."""
        return self._envs.statistics()

    # ---- reset and step

    @_in_one_thread
    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
        env_ids: Sequence[int] | None = None,
    ) -> ResetResult:
        """Resets all envs, or some; see `AsyncVectorEnv.reset` for arguments, result and errors.

        What an earlier call owes that timed out, or was interrupted, is waited out and discarded.
        """
        self._begin_reset(seed, options, env_ids)
        result: ResetResult = self._wait("reset", None)
        return result

    @_in_one_thread
    def reset_async(
        self,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
        env_ids: Sequence[int] | None = None,
    ) -> None:
        """Begins a reset; `reset_wait` takes its result.

        Raises:
            AlreadyPendingCallError: An earlier call was begun, and its answer not waited for; nothing was changed.
        """
        self._begin_reset(seed, options, env_ids)

    def _begin_reset(
        self, seed: int | Sequence[int | None] | None, options: dict[str, Any] | None, env_ids: Sequence[int] | None
    ) -> None:
        batches = self._ready("reset")
        target = reset_targets(self.num_envs, seed, options, env_ids)
        if self._begun is not None and self._begun.is_late:
            batches.calls.leave(self._begun.call)
            self._begun = None
        self._refuse_begun("reset")
        self._begun = _Begun("reset", batches.begin_reset(target), batches.reset_result)

    @_in_one_thread
    def reset_wait(self, timeout: float | None = None) -> ResetResult:
        """Waits for a reset that was begun; see `step_wait`."""
        result: ResetResult = self._wait("reset", timeout)
        return result

    @_in_one_thread
    def step(self, actions: Any) -> StepResult:
        """Steps every env once; see `AsyncVectorEnv.step` for arguments, result and errors.

        Raises:
            KeyboardInterrupt: A Ctrl-C; the envs go on with the step: `step_wait` takes its result, or `reset` discards it.
        """
        self._begin_step(actions)
        result: StepResult = self._wait("step", None)
        return result

    @_in_one_thread
    def step_async(self, actions: Any) -> None:
        """Sends an action to every env; `step_wait` takes the result. Until then this process is free for other work.

        Raises:
            InvalidActionsError: The actions do not fit `action_space`; no env was stepped.
            AlreadyPendingCallError: An earlier call was begun, and its answer not taken; no env was stepped.
        """
        self._begin_step(actions)

    def _begin_step(self, actions: Any) -> None:
        batches = self._ready("step")
        self._refuse_begun("step")
        self._begun = _Begun("step", batches.begin_step(actions), batches.step_result)

    @_in_one_thread
    def step_wait(self, timeout: float | None = None) -> StepResult:
        """Waits for a step that was begun.

        Args:
            timeout: Seconds; `None`: no limit.

        Raises:
            NoAsyncCallError: None was begun.
            CallTimeoutError: It was not answered in time (`multiprocessing.TimeoutError` too, as Gymnasium's). It goes on:
                another `step_wait` waits for it again, `reset` waits it out and discards it.
            KeyboardInterrupt: A Ctrl-C; likewise.
        """
        result: StepResult = self._wait("step", timeout)
        return result

    # ---- calls

    @_in_one_thread
    def call(self, name: str, /, *args: Any, env_ids: Sequence[int] | None = None, **kwargs: Any) -> tuple[Any, ...]:
        """Calls a method of each env, or of some; see `AsyncVectorEnv.call`."""
        self._begin_call(name, args, kwargs, env_ids)
        result: tuple[Any, ...] = self._wait("call", None)
        return result

    @_in_one_thread
    def call_async(self, name: str, /, *args: Any, env_ids: Sequence[int] | None = None, **kwargs: Any) -> None:
        """Begins a call; `call_wait` takes its results.

        Raises:
            AlreadyPendingCallError: An earlier call was begun, and its answer not taken; nothing was called.
        """
        self._begin_call(name, args, kwargs, env_ids)

    def _begin_call(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], env_ids: Sequence[int] | None
    ) -> None:
        batches = self._ready("call")
        self._refuse_begun("call")
        asked = begin_call(batches, name, args, kwargs, env_ids)
        self._begun = _Begun("call", asked.call, asked.result)

    @_in_one_thread
    def call_wait(self, timeout: float | None = None) -> tuple[Any, ...]:
        """Waits for a call that was begun; see `step_wait`."""
        result: tuple[Any, ...] = self._wait("call", timeout)
        return result

    def get_attr(self, name: str, *, env_ids: Sequence[int] | None = None) -> tuple[Any, ...]:
        """An attribute of each env, or of some; as in Gymnasium, a callable one is called."""
        return self.call(name, env_ids=env_ids)

    @_in_one_thread
    def set_attr(self, name: str, values: Any, *, env_ids: Sequence[int] | None = None) -> None:
        """Sets an attribute of each env, or of some; a list or tuple has one value an env."""
        self._run("set_attr", self._envs.set_attr, name, values, env_ids=env_ids)

    def render(self, *, env_ids: Sequence[int] | None = None) -> tuple[Any, ...]:
        """What each env, or some, render."""
        return self.call("render", env_ids=env_ids)

    @property  # type: ignore[misc]  # read-only, as Gymnasium's own vectors have it
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]  # as Gymnasium's own vectors
        """A copy of each env's random number generator."""
        return self.get_attr("np_random")

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]  # as Gymnasium's own vectors
        """Of each env."""
        return self.get_attr("np_random_seed")

    # ---- beyond Gymnasium

    @_in_one_thread
    def send(self, actions: Any, env_ids: Sequence[int] | None = None) -> None:
        """Sends an action to some envs, each of which steps by itself; see `AsyncVectorEnv.send`."""
        self._run("send", self._envs.send, actions, env_ids)

    @_in_one_thread
    def recv(self, min_envs: int | None = None, max_envs: int | None = None) -> StepBatch:
        """Collects the first rows of envs that were sent an action; see `AsyncVectorEnv.recv`."""
        return self._run("recv", self._envs.recv, min_envs, max_envs)

    @_in_one_thread
    def rollout(self, policy: Policy, num_steps: int, *, groups: int = 1, pin_memory: bool = False) -> Rollout:
        """Steps all envs so many times by the actions of a policy; see `AsyncVectorEnv.rollout`."""
        return self._run("rollout", self._envs.rollout, policy, num_steps, groups=groups, pin_memory=pin_memory)

    # ---- lifetime

    @_in_one_thread
    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """What `close(timeout=…, terminate=…)` does: ends what was begun, closes the envs, ends the workers.

        Args:
            timeout: Seconds for the envs to close; then the workers are killed. `None`: `close_grace` seconds.
            terminate: Kill the workers at once, without letting the envs close.

        Raises:
            Exception: What an env's `close` raised, or an `ExceptionGroup` of several; everything is freed all the same.
        """
        self.closed = True
        self._leave_begun()
        try:
            if timeout is not None:
                self._loop.call_later(timeout, self._envs.terminate)
            self._loop.run(self._envs.close(terminate=terminate))
        finally:
            self._envs.terminate()
            self._loop.close()

    def terminate(self) -> None:
        """Ends the workers at once: from any place, also inside a running event loop.

        Another thread that waits in a call raises `ClosedEnvironmentError`; then `close` is what frees the rest. Else this
        is the same as `close(terminate=True)`, which frees everything.
        """
        try:
            self.close(terminate=True)
        except AlreadyPendingCallError:  # in another thread, whose loop may be about to run
            self._end_soon()
        except RunningLoopError:
            if not self._in_use.acquire(blocking=False):  # a call is under way: of another thread, or under this one
                self._end_soon()
                return
            try:
                self._end_at_once()
            finally:
                self._in_use.release()

    def __del__(self) -> None:
        if self.closed or getattr(self, "_loop", None) is None:
            return
        if os.getpid() != self._owner_pid:  # a fork: workers, and what they have sent, are another's
            self._loop.close_at_once()
            return
        try:
            warnings.warn(f"{self!r} was never closed: call `envs.close()`", ResourceWarning, stacklevel=2, source=self)
        finally:  # also where warnings are errors
            self._end_at_once()

    def _end_at_once(self) -> None:
        """Ends the workers and frees everything, wherever this is."""
        self.closed = True
        self._leave_begun()
        self._envs.terminate()
        self._loop.close()

    def _end_soon(self) -> None:
        """Ends the workers, and has the call that is under way free everything."""
        self._envs._terminate(is_at_work=True)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  two faces of one house

    # ---- one call at a time

    def _interrupts_held_back(self) -> AbstractContextManager[None]:
        # Without workers envs run within a request, and a Ctrl-C is to end them.
        return self._loop.held_back() if self._envs.num_workers else nullcontext()

    def _note_interrupt(self) -> None:
        """A Ctrl-C came through: what was begun can be waited for again, or discarded by a reset."""
        if self._begun is not None:
            self._begun.is_late = True

    def _ready(self, command: str) -> Batches:
        """What calls go through, while the vector is open."""
        if self._batches is None or self._envs.closed:
            raise ClosedEnvironmentError(f"{command}()")
        return self._batches

    def _refuse_begun(self, command: str) -> None:
        if self._begun is not None:
            raise AlreadyPendingCallError(command, (), owed=True, begun=self._begun.command)

    def _wait(self, command: str, timeout: float | None) -> Any:
        batches, begun = self._ready(f"{command}_wait"), self._begun
        if begun is None or begun.command != command:
            raise NoAsyncCallError(command)
        begun.is_late = True  # unless it is taken below
        assert begun.call.future is not None  # noqa: S101
        if not self._loop.wait(begun.call.future, timeout):
            waits_for = [call.env_ids for call in self._envs.statistics().pending]
            raise CallTimeoutError(command, timeout or 0.0, waits_for[-1] if waits_for else ())
        self._begun = None
        if batches.calls.has_nothing_to_say(begun.call):
            return batches.calls.completed(begun.call, begun.result, [])
        return self._loop.run(_taken(batches.calls, begun))

    def _run(
        self,
        command: str,
        method: Callable[_Arguments, Coroutine[Any, Any, _Result]],
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> _Result:
        self._ready(command)
        self._refuse_begun(command)
        return self._loop.run(method(*args, **kwargs))

    def _leave_begun(self) -> None:
        """Nothing more is asked of the vector, nor of what was begun."""
        if self._batches is not None and self._begun is not None:
            self._batches.calls.leave(self._begun.call)
        self._batches = self._begun = None


async def _taken(calls: Calls, begun: _Begun) -> Any:
    replies = await calls.answered(begun.call)
    return calls.completed(begun.call, begun.result, replies)


async def _start(envs: AsyncVectorEnv) -> Batches:
    await envs
    return envs._ready("start")  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  two faces of one house


def _refuse_in_running_loop(command: str) -> None:
    if asyncio._get_running_loop() is not None:  # noqa: SLF001  without the exception of get_running_loop
        raise RunningLoopError(command)


def register_vec(env_id: str) -> str:
    """Registers an env once more with Gymnasium, so that `gymnasium.make_vec` builds a `BlockingVectorEnv` of it.

        envs = gymnasium.make_vec(aiovec.register_vec("CartPole-v1"), num_envs=64, num_workers=2)

    Options of the vector stand among the arguments of the env there, since Gymnasium takes no `vector_kwargs` for vectors
    that are not its own.

    Args:
        env_id: Of a registered env, such as ``"CartPole-v1"`` or ``"module:Env-v0"``.

    Returns:
        The id to use: ``"aiovec/CartPole-v1"``, or ``"aiovec-ALE/Pong-v5"`` for an id that has a namespace; by it
        `gymnasium.make` builds the single env.

    Raises:
        gymnasium.error.UnregisteredEnv: Nobody registered that id.
    """
    spec = find_spec(env_id)
    # A namespace stays one: `x/y-v0` and `x-y-v0` are two envs.
    vector_id = f"aiovec-{spec.id}" if "/" in spec.id else f"aiovec/{spec.id}"
    known = gym.registry.get(vector_id)
    entry_point: Any = known.vector_entry_point if known is not None else None
    if not isinstance(entry_point, _VectorEntryPoint) or entry_point.spec is not spec:  # it may be registered anew
        gym.registry.pop(vector_id, None)  # else Gymnasium warns of it
        gym.register(
            vector_id,
            entry_point=spec.entry_point,
            reward_threshold=spec.reward_threshold,
            nondeterministic=spec.nondeterministic,
            max_episode_steps=spec.max_episode_steps,
            order_enforce=spec.order_enforce,
            disable_env_checker=spec.disable_env_checker,
            additional_wrappers=spec.additional_wrappers,
            vector_entry_point=_VectorEntryPoint(spec),
            kwargs=copy.deepcopy(spec.kwargs),  # Gymnasium adds to it
        )
    return vector_id


_OPTIONS = VECTOR_OPTIONS | inspect.signature(BlockingVectorEnv).parameters.keys() - {"env_fns", "options"}


@dataclass(frozen=True)
class _VectorEntryPoint:
    """What Gymnasium calls for a vector."""

    spec: EnvSpec

    def __call__(self, **arguments: Any) -> BlockingVectorEnv:
        num_envs = arguments.pop("num_envs")
        options = {name: arguments.pop(name) for name in _OPTIONS & arguments.keys()}
        return BlockingVectorEnv([env_maker(self.spec, (), arguments)] * num_envs, **options)
