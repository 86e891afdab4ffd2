"""`AsyncVectorEnv`: its life, and who is asked. How answers become a batch: `aiovec.batches`."""

from __future__ import annotations

import asyncio
import operator
import os
import warnings
from collections.abc import AsyncIterator, Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode

from aiovec.arguments import check_columns, check_plan, check_recv, check_rollout, env_ids_of, reset_targets
from aiovec.batches import Batches, StepBatch, StepResult
from aiovec.display import Frames, check_render_modes, compose, vector_html
from aiovec.errors import ClosedEnvironmentError, NotStartedError, WrongLoopError
from aiovec.exchange.failures import as_one_exception
from aiovec.exchange.messages import CallReply
from aiovec.method_calls import MethodCall, begin_call, begin_set_attr
from aiovec.pool.spaces import ObservationMode
from aiovec.pool.start import EnvFn, Started, start
from aiovec.pool.threads import in_thread
from aiovec.rollouts import Collector, Policy, Rollout, Rollouts
from aiovec.statistics import VectorStatistics
from aiovec.sub_env import SubEnv

__all__ = ["AsyncVectorEnv"]


class AsyncVectorEnv:
    """Many environments, stepped at once in worker processes, under `await`.

    Building it starts nothing. `async with`, `await envs`, or the first `await envs.reset()` starts the
    workers, which build the envs: exactly as many as there are `env_fns`, none of them in this process. It
    belongs to the event loop that started it.

    What `reset` and `step` return equals Gymnasium 1.4's `SyncVectorEnv`, step for step. It is yours: it never
    changes later, whatever you keep of it. Small observations are copied; large ones (64 KiB a batch and more)
    are lent from the shared memory, which is used again only once the last array or tensor over it is gone. With the
    environment variable ``AIOVEC_POISON_BUFFERS=1`` it is overwritten then, to show code that looks at it all the same.

    Args:
        env_fns: A function for each env that builds it. They travel by cloudpickle, so lambdas and classes of
            a script or a notebook work, without a guard around ``__main__``.
        num_workers: How many processes share the envs, in contiguous rows. `None`: one for each usable CPU,
            at most one an env. 0: none, the envs live and run in this process, on the loop's thread: for a debugger,
            and for `AsyncEnv`s, which only wait.
        threads_per_worker: How many threads of a worker share its envs, each env always in the same one: for envs that
            wait, for I/O or in a simulator that frees Python's lock. `AsyncEnv`s need none. Not with `num_workers=0`.
        shared_memory: Whether observations, actions, rewards and flags travel in memory that the workers
            share with this process. Without it they are pickled.
        copy: `True`: observations, and rollouts, are always copied. `False`: they are views that hold until the next
            `reset` or `step`, or the next `rollout`. `None`: small observations are copied, large ones and rollouts lent.
        observation_mode: ``"same"``: all envs have one observation space. ``"different"``: bounds may differ.
            A pair `(observation_space, single_observation_space)`: these are used as they are.
        autoreset_mode: Gymnasium's; also by name, such as ``"SameStep"``.
        context: `None`: workers are fresh interpreters. ``"fork"``, ``"forkserver"``, ``"spawn"``: they are
            started by `multiprocessing`. ``"ray"``: they are actors on a Ray cluster, the caller's own by `ray.init(…)`,
            or a local one that is started and stopped with the vector; `num_workers` must be given. Observations and
            actions go through Ray's object store, whatever `shared_memory` says, and there is no `faulthandler`: a death
            says what Ray says of it.
        worker_options: Of each actor on Ray, such as ``{"num_cpus": 1, "resources": {…}}``: where there is no place for
            it within `start_timeout`, the start raises `WorkerStartError`.
        step_timeout: Seconds that one env's own `step`, `reset` or call may take in its worker. Then the worker is
            killed, and `EnvTimeoutError` is raised, which names the env and bears the worker's Python stack; it
            comes up to a fifth later, and never too early. An `AsyncEnv` is cancelled instead, and its worker lives; only
            one that does not end for another `close_grace` and `step_timeout` is ended with its worker. `None`: no limit.
            Not with `num_workers=0`, unless all envs are `AsyncEnv`s.
        start_timeout: Seconds for the whole start, and for each worker that takes the place of a dead one.
        close_grace: Seconds that `close` waits before it goes from asking to SIGTERM, and on to SIGKILL.
        max_buffers: How many batches of large observations are lent at most, and how many rollouts; further ones are
            copied. The shared memory grows to it as they are needed, and holds them until `close`.
        traceback_locals: Whether an env's exception bears, as a note, the local variables of its frames as text.
        on_failure: ``"raise"``: what fails is raised. ``"restart"``: an env whose `step` or `reset` raises, whose
            worker dies or which is stuck, is built anew from its `env_fn`, and its transition says so: reward NaN,
            truncated, `infos["failure"]` the exception, `infos["generation"]` how often it was built anew. The row
            bears the last valid observation and the next one is the reset of the new env; under SAME_STEP the
            row waits for that, and `final_obs` is the last observation. It is not seeded, and has no attributes
            that were set. Results of `call` cannot be replaced: there a failure is raised.
        max_restarts: How many failures of an env without a successful step between them are borne; one more
            raises `CrashLoopError`. Attempts after the first wait 0.1 s, and twice as long each time.

    Raises:
        ValueError: An argument is out of its range; the message names it.
        TypeError: An argument is of a wrong type.
        ImportError: Workers on Ray, which is not installed.
    """

    spec: EnvSpec | None = None

    def __init__(
        self,
        env_fns: Sequence[EnvFn],
        *,
        num_workers: int | None = None,
        threads_per_worker: int = 1,
        shared_memory: bool = True,
        copy: bool | None = None,
        observation_mode: ObservationMode = "same",
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        context: Literal["fork", "forkserver", "spawn", "ray"] | None = None,
        worker_options: Mapping[str, Any] | None = None,
        step_timeout: float | None = None,
        start_timeout: float = 60,
        close_grace: float = 3,
        max_buffers: int = 8,
        traceback_locals: bool = False,
        on_failure: Literal["raise", "restart"] = "raise",
        max_restarts: int = 3,
    ) -> None:
        self._closed = False
        self._pid = os.getpid()
        self._started: Started | None = None
        self._start_task: asyncio.Task[None] | None = None
        self._start_waiters = 0
        self._close_task: asyncio.Task[None] | None = None
        self._left: set[asyncio.Task[Any]] = set()  # rollouts that were cancelled, and are about to end
        self._plan = check_plan(
            env_fns,
            num_workers,
            threads_per_worker,
            shared_memory,
            copy,
            observation_mode,
            autoreset_mode,
            context,
            worker_options,
            step_timeout,
            start_timeout,
            close_grace,
            max_buffers,
            traceback_locals,
            on_failure,
            max_restarts,
        )
        self._close_grace = close_grace
        self._loop: asyncio.AbstractEventLoop | None = None
        self._batches: Batches | None = None
        self._slow_call_seconds = 10.0
        self._num_envs = len(self._plan.env_fns)

    # ---- what it is

    def __repr__(self) -> str:
        name = f"{self.spec.id}, " if self.spec is not None else ""
        return f"{type(self).__name__}({name}num_envs={self._num_envs}, num_workers={self.num_workers}, {self._state})"

    def _repr_html_(self) -> str:
        return vector_html(self, self._state, self._plan.autoreset_mode)

    @property
    def _state(self) -> str:
        return "closed" if self._closed else "started" if self._started is not None else "not started"

    def __len__(self) -> int:
        return self._num_envs

    @property
    def num_envs(self) -> int:
        """How many envs; known before the start."""
        return self._num_envs

    @property
    def num_workers(self) -> int:
        """How many worker processes; known before the start."""
        return self._plan.num_workers

    @property
    def closed(self) -> bool:
        """Whether `close` or `terminate` was called."""
        return self._closed

    @property
    def metadata(self) -> dict[str, Any]:
        """Of the first env, and the `autoreset_mode`; a new dict each time."""
        return dict(self._known("metadata").metadata)

    @property
    def render_mode(self) -> str | None:
        """Of the first env."""
        return self._known("render_mode").render_mode

    @property
    def single_observation_space(self) -> gym.Space[Any]:
        """Of one env."""
        return self._known("single_observation_space").spaces.single_observation_space

    @property
    def observation_space(self) -> gym.Space[Any]:
        """Of a batch of all envs."""
        return self._known("observation_space").spaces.observation_space

    @property
    def single_action_space(self) -> gym.Space[Any]:
        """Of one env."""
        return self._known("single_action_space").spaces.single_action_space

    @property
    def action_space(self) -> gym.Space[Any]:
        """Of a batch of all envs."""
        return self._known("action_space").spaces.action_space

    def statistics(self) -> VectorStatistics:
        """What the vector has done so far, and what it is doing: to be printed, logged, or served as JSON.

        Always on; it costs a step less than 1 µs in each process.

        Raises:
            NotStartedError: Before the start.
            ClosedEnvironmentError: After the end.
        """
        if self._closed:
            raise ClosedEnvironmentError("statistics()")
        if self._batches is None:
            raise NotStartedError("statistics()")
        return self._batches.statistics()

    @property
    def slow_call_seconds(self) -> float:
        """A call that waits longer is logged once, by the logger ``aiovec``, with its envs; 10 unless it is set."""
        return self._slow_call_seconds

    @slow_call_seconds.setter
    def slow_call_seconds(self, seconds: float) -> None:
        self._slow_call_seconds = seconds
        if self._started is not None:
            self._started.pool.slow_call_seconds = seconds

    def _known(self, name: str) -> Started:
        if self._started is None:
            raise NotStartedError(name)
        return self._started

    # ---- lifetime

    async def __aenter__(self) -> Self:
        return await self._start("async with")

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __await__(self) -> Generator[Any, None, Self]:
        """Starts the workers, if they are not; gives the vector itself."""
        return self._start("await").__await__()

    async def _start(self, command: str) -> Self:
        """One start for all tasks that ask; it is cancelled when all of them are."""
        while True:
            if self._closed:
                raise ClosedEnvironmentError(command)
            if self._loop is not None and asyncio.get_running_loop() is not self._loop:
                raise WrongLoopError(command)
            if self._started is not None:
                return self
            if self._start_task is None:
                self._loop = asyncio.get_running_loop()
                self._start_task = self._loop.create_task(self._run_start(), name="aiovec start")
            await self._wait_for_start(self._start_task)

    async def _wait_for_start(self, task: asyncio.Task[None]) -> None:
        self._start_waiters += 1
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            own = asyncio.current_task()
            if task.cancelled() and own is not None and not own.cancelling():
                return  # by a close, or by another one that waited for it before us
            if self._start_waiters == 1 and not task.done():
                task.cancel()
                await asyncio.wait([task])
            raise
        finally:
            self._start_waiters -= 1
            if task.done() and self._start_task is task:
                self._start_task = None
                if task.cancelled() or task.exception() is not None:
                    self._loop = None  # a failed start leaves nothing: it may be tried again, in any loop

    async def _run_start(self) -> None:
        """The task of a start, which owns what it has started until the vector does: whoever waits may be cancelled."""
        plan = self._plan
        started = await start(plan)
        if self._closed:  # terminated in this very moment
            started.pool.terminate()
            return
        self._batches = Batches(started, self._num_envs, plan.copy, plan.autoreset_mode, plan.threads_per_worker)
        started.pool.slow_call_seconds = self._slow_call_seconds
        self._started = started

    async def close(self, *, terminate: bool = False) -> None:
        """Closes the envs and ends the workers; everything is freed when it returns or raises.

        Idempotent; callers at the same time share one close. A cancelled caller still sees the end, which is
        bounded by `close_grace`, and then raises its own cancellation.

        Args:
            terminate: End the workers at once, without letting the envs close.

        Raises:
            Exception: What an env's `close` raised, or an `ExceptionGroup` of several.
        """
        if self._close_task is None:
            if self._closed:
                return
            if self._loop is None:
                self._closed = True
                return
            if asyncio.get_running_loop() is not self._loop:
                raise WrongLoopError("close()")
            self._closed = True
            self._close_task = self._loop.create_task(self._close(ask=not terminate), name="aiovec close")
        elif self._close_task.done():
            return
        elif terminate and self._started is not None:
            self._started.pool.kill()
        task, cancelled = self._close_task, None
        while not task.done():
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError as error:
                cancelled = error
            except BaseException:  # noqa: BLE001  told below, by the task itself
                break
        if cancelled is not None:
            if not task.cancelled():
                task.exception()  # the caller's own cancellation goes first
            raise cancelled
        task.result()

    aclose = close

    async def _close(self, *, ask: bool) -> None:
        if self._start_task is not None:
            self._start_task.cancel()
            await asyncio.wait([self._start_task])
        if self._started is None:
            return
        pool = self._started.pool
        try:
            replies: list[CallReply] = await pool.close(self._close_grace, ask)
            self._release_batches()
            if pool.memory.is_large:
                await in_thread(pool.memory.forget)
            else:
                pool.memory.forget()
        except BaseException:
            self._release_batches()
            pool.terminate()
            raise
        records = [record for reply in replies for record in reply.failures]
        if records:
            raise as_one_exception("close", records)

    def terminate(self) -> None:
        """Ends the workers at once and frees everything, without `await`: from any place, also after the loop.

        Where the loop runs, it frees the rest in its next turn, and tells the tasks that wait `ClosedEnvironmentError`.
        In a process that was forked from the vector's it does nothing: nothing is its own.
        """
        self._terminate(is_at_work=self._loop is not None and self._loop.is_running())

    def _terminate(self, *, is_at_work: bool) -> None:
        self._closed = True
        if os.getpid() != self._pid:
            return
        if self._started is not None:
            self._started.pool.kill()
        if is_at_work and self._loop is not None and not self._loop.is_closed():
            # In another thread, or under this very call, which a signal has interrupted: ours goes on to its next await.
            self._loop.call_soon_threadsafe(self._end)
        else:
            self._end()

    def _end(self) -> None:
        if self._start_task is not None and self._loop is not None and not self._loop.is_closed():
            self._start_task.cancel()
        if self._started is not None:
            self._started.pool.terminate()
            self._release_batches()

    def _release_batches(self) -> None:
        if self._batches is not None:
            self._batches.release()
            self._batches = None

    def __del__(self) -> None:
        if getattr(self, "_started", None) is None or self._closed or os.getpid() != self._pid:
            return
        try:
            warnings.warn(
                f"{self!r} was never closed: use `async with`, or `await envs.close()`",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )
        finally:  # also where warnings are errors
            # Nothing of ours is under way, but the loop may run in another thread than the collector.
            in_its_thread = asyncio._get_running_loop() is self._loop  # noqa: SLF001  get_running_loop raises
            self._terminate(is_at_work=not in_its_thread and self._loop is not None and self._loop.is_running())

    def _ready(self, command: str) -> Batches:
        """What calls go through, if this one may be made here and now."""
        if self._closed:
            raise ClosedEnvironmentError(command)
        if self._batches is None:
            raise NotStartedError(command)
        if asyncio.get_running_loop() is not self._loop:
            raise WrongLoopError(command)
        return self._batches

    # ---- reset and step

    async def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
        env_ids: Sequence[int] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Resets all envs, or some; starts the workers if they are not.

        Envs whose worker died are built anew, all of them, in a new worker, and those that are meant are reset.

        Args:
            seed: `None`: none. An int: env i gets `seed + i`. A sequence: one for each env that is reset;
                with a `reset_mask` one for each env of the vector.
            options: For the envs' own `reset`. ``options["reset_mask"]``, an array `[num_envs]` of bool,
                is taken by the vector, as in Gymnasium: only those envs are reset, and the rows of the
                others repeat their last observation. The dict itself is not changed.
            env_ids: Only these envs, which may be owed or failed; the result has their rows, in this order.

        Returns:
            `observations`, batched as `observation_space` says, and `infos`. They are yours.

        Raises:
            AlreadyPendingCallError: Another task awaits some of the envs; nothing was changed.
            ResetNeeded: An env outside of the mask was never reset; nothing was changed.
            WorkerDied: A worker ended. Its envs need another reset, which builds them anew; the others were
                reset, or are owed.
            EnvTimeoutError: The same, for an env that took longer than `step_timeout`, or a new worker that took
                longer than `start_timeout`.
            WorkerStartError: The system gave no worker in place of a dead one; nothing was changed.
            Exception: What an env's `reset` raised, or an `ExceptionGroup` of several. These envs need
                another reset, the others were reset.
        """
        if not self._closed and self._started is None:
            await self._start("reset()")
        if self._left:
            await asyncio.wait(self._left)
        batches = self._ready("reset()")
        call = batches.begin_reset(reset_targets(self._num_envs, seed, options, env_ids))
        replies = await batches.calls.answered(call)
        return batches.calls.completed(call, batches.reset_result, replies)

    async def step(self, actions: Any) -> StepResult:
        """Steps every env once.

        Args:
            actions: A batch, as `action_space` says: for `Discrete` `[num_envs]`, for `Box`
                `[num_envs, *shape]`, nested for `Dict` and `Tuple`. Arrays, or lists. Each env receives what
                `gymnasium.vector.utils.iterate` gives it. Taken before the first `await`.

        Returns:
            `observations`, batched as `observation_space` says; `rewards` `[num_envs]`, float64;
            `terminations` and `truncations` `[num_envs]`, bool; `infos`, Gymnasium's dict of arrays with
            ``_key`` masks. All of them are yours.

        Raises:
            InvalidActionsError: The actions do not fit `action_space`; no env was stepped.
            AlreadyPendingCallError: An env is awaited by another task, or owed; no env was stepped.
            ResetNeeded: An env failed, was never reset, or under DISABLED ended its episode; no env was
                stepped.
            WorkerDied: A worker ended. Its envs need a reset, which builds them anew in a new worker; what had
                not answered yet is owed.
            EnvTimeoutError: The same, for an env that took longer than `step_timeout`.
            Exception: What an env's `step` raised, or an `ExceptionGroup` of several. These envs need a
                reset, the others were stepped.
            asyncio.CancelledError: The envs go on with the step, and their answer is owed: `reset` discards
                it.
        """
        batches = self._ready("step()")
        call = batches.begin_step(actions)
        replies = await batches.calls.answered(call)
        return batches.calls.completed(call, batches.step_result, replies)

    # ---- part batches

    async def send(self, actions: Any, env_ids: Sequence[int] | None = None) -> None:
        """Sends an action to some envs; they step, each by itself, and `recv` collects what they give.

        Args:
            actions: A batch, as for `step`, with one action for each of these envs. Taken before this returns.
            env_ids: The envs, which are idle: all of them, or those of an earlier `recv`.

        Raises:
            InvalidActionsError: The actions do not fit; no env was stepped.
            AlreadyPendingCallError: Some envs are awaited by another task, or owed; no env was stepped.
            ResetNeeded: Some envs must be reset first; no env was stepped.
            WorkerDied: A worker ended since the last call; no env was stepped.
        """
        ids = range(self._num_envs) if env_ids is None else env_ids_of(self._num_envs, env_ids)
        self._ready("send()").send(actions, ids)

    async def recv(self, min_envs: int | None = None, max_envs: int | None = None) -> StepBatch:
        """Collects the first rows of what is owed: of envs that were sent an action, and of cancelled calls.

        After a call that raised, the rows of the envs that did their part are there, too, until these are asked for
        something else, or a reset with a `reset_mask` repeats their observations.

        Args:
            min_envs: Waits for so many envs; `None`: for one.
            max_envs: Takes no more than so many; `None`: all that are ready.

        Returns:
            Dense rows, in the order in which the envs ended; copies, and so yours. The row of a cancelled reset has
            reward 0 and both flags false.

        Raises:
            ValueError: `min_envs` is above the number of envs that are owed; or a number is below one.
            NoAsyncCallError: No env is owed.
            AlreadyPendingCallError: Another task is in `recv`.
            WorkerDied: A worker ended. Its envs need a reset; what others gave, or will give, can still be collected.
            EnvTimeoutError: Likewise.
            Exception: What an env raised, as soon as it is there, or an `ExceptionGroup` of several; no row was
                taken with it. These envs need a reset.
            asyncio.CancelledError: Nothing was taken.
        """
        check_recv(min_envs, max_envs)
        return await self._ready("recv()").recv(min_envs, max_envs)

    async def batches(self, min_envs: int | None = None, max_envs: int | None = None) -> AsyncIterator[StepBatch]:
        """Iterates over `recv`, until no env is owed any more: `send` the next actions inside the loop.

        Args:
            min_envs: As for `recv`; where fewer envs are still owed, all of these.
            max_envs: As for `recv`.
        """
        while num_owed := self._ready("batches()").calls.num_owed():
            yield await self.recv(None if min_envs is None else min(min_envs, num_owed), max_envs)

    # ---- rollouts

    async def rollout(self, policy: Policy, num_steps: int, *, groups: int = 1, pin_memory: bool = False) -> Rollout:
        """Steps all envs so many times, by the actions of a policy, and gives it all at once.

        Workers write each step where it stays, so nothing is copied here. Rollouts continue one another, and `step`s:
        each begins with the last observations. Envs are reset by the autoreset mode.

        Args:
            policy: Called with a batch of observations, as `step` gives them, it returns a batch of actions, or a
                pair of actions and *extras*: log-probabilities, values, anything that has a row for each env, as an
                array or in a dict or tuple. Called on the loop's thread; also an `async def`. Actions are cast to the dtype of
                `action_space`, but for floats where that has integers, which are refused.
                Where a batch of actions is a tuple itself (`Tuple`, `Text`, …), it always returns the pair.
            num_steps: How many times, from 1.
            groups: Into how many groups the envs of each worker are shared out, in contiguous rows. The policy is
                called for each group by itself, in turn, with a copy of its observations: with two groups a worker
                that ends one finds the actions of the other waiting, and never sleeps.
            pin_memory: Whether the memory of the rollout is pinned for CUDA, by PyTorch, so that tensors over it are
                copied to a device without a stop. Done once for each piece of memory.

        Returns:
            The rollout; it is yours. With `copy=False` its arrays are views that hold until the next rollout.

        Raises:
            ValueError: `num_steps` or `groups` is out of its range; or the autoreset mode is DISABLED.
            RuntimeError: `pin_memory` without PyTorch, or a CUDA device.
            SlabMemoryError: There is no memory for so many steps; no env was stepped.
            AlreadyPendingCallError: An env is awaited by another task, or owed; no env was stepped.
            ResetNeeded: An env failed, or was never reset; no env was stepped.
            InvalidActionsError: The policy gave actions that do not fit `action_space`.
            InvalidExtrasError: The policy gave extras that are not like its first ones.
            WorkerDied: A worker ended. Its envs need a reset.
            EnvTimeoutError: The same, for an env that took longer than `step_timeout`.
            Exception: What an env raised, or an `ExceptionGroup` of several, or what the policy raised.

            Whatever it raises, cancellation too: nothing of the rollout is returned; envs whose step was not answered
            yet are owed, as after a cancelled `step`, and the others have taken the steps that were asked.
        """
        batches = self._ready("rollout()")
        plan = self._plan
        fewest_envs = min(len(worker.env_ids) for worker in batches.pool.workers)
        check_rollout(policy, num_steps, groups, fewest_envs, plan.autoreset_mode)
        collector = Collector(batches, plan.copy, plan.autoreset_mode, int(num_steps), int(groups))
        return await collector.collect(policy, pin_memory)

    def rollouts(self, policy: Policy, num_steps: int, *, groups: int = 1, pin_memory: bool = False) -> Rollouts:
        """Iterates over `rollout` for ever, and collects the next one while the loop's body uses the last.

        The body must await for that: a learner in a thread, for instance, `await asyncio.to_thread(learn, rollout)`.
        The next rollout then acts by the policy as it is meanwhile. Who must learn from the very policy that acts calls
        `rollout` instead. What `rollout` raises ends the iteration; to leave the loop, or cancel it, cancels the
        rollout that is being collected, whatever came of it, and leaves envs owed: `reset` takes care of them.

        Args:
            policy: As for `rollout`.
            num_steps: As for `rollout`.
            groups: As for `rollout`.
            pin_memory: As for `rollout`.
        """

        def collect() -> asyncio.Task[Rollout]:
            return asyncio.ensure_future(self.rollout(policy, num_steps, groups=groups, pin_memory=pin_memory))

        def left(collecting: asyncio.Task[Rollout]) -> None:
            self._left.add(collecting)
            collecting.add_done_callback(self._left.discard)

        return Rollouts(collect, left)

    # ---- single envs

    def __getitem__(self, env_index: int) -> SubEnv:
        """One env, for a task of its own; negative indices count from the end."""
        try:
            index = operator.index(env_index)
        except TypeError:
            raise TypeError(f"envs[{env_index!r}]: expected the index of one env") from None
        if not -self._num_envs <= index < self._num_envs:
            raise IndexError(f"envs[{index}]: the envs are numbered from 0 to {self._num_envs - 1}")
        return SubEnv(self, self._ready, index % self._num_envs)

    def __iter__(self) -> Iterator[SubEnv]:
        return (self[env_index] for env_index in range(self._num_envs))

    # ---- calls

    async def call(
        self, name: str, /, *args: Any, env_ids: Sequence[int] | None = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Calls a method of each env, or of some, through their wrappers.

        Any task may call at any time: the call is served in order, behind what its workers are doing.

        Args:
            name: The method; where it is an attribute that is not callable, its value is the result.
            *args: For the method.
            env_ids: Only these envs; the results are in this order.
            **kwargs: For the method.

        Returns:
            One result an env.

        Raises:
            WorkerDied: A worker ended, meanwhile or before; its envs need a reset.
            EnvTimeoutError: A call took longer than `step_timeout`; likewise.
            Exception: What an env's method raised, or an `ExceptionGroup` of several; the others ran.
        """
        return await self._answered(begin_call(self._ready(f"{name}()"), name, args, kwargs, env_ids))

    async def get_attr(self, name: str, *, env_ids: Sequence[int] | None = None) -> tuple[Any, ...]:
        """An attribute of each env, or of some; as in Gymnasium, a callable one is called."""
        return await self.call(name, env_ids=env_ids)

    async def set_attr(self, name: str, values: Any, *, env_ids: Sequence[int] | None = None) -> None:
        """Sets an attribute of each env, or of some, through their wrappers.

        Args:
            name: The attribute.
            values: A list or tuple has one value an env; anything else is set for all.
            env_ids: Only these envs.
        """
        await self._answered(begin_set_attr(self._ready("set_attr()"), name, values, env_ids))

    async def render(self, *, env_ids: Sequence[int] | None = None) -> tuple[Any, ...]:
        """What each env, or some, render: one frame an env, as its `render` gives it."""
        return await self.call("render", env_ids=env_ids)

    async def frames(self, *, env_ids: Sequence[int] | None = None, columns: int | None = None) -> Frames:
        """What each env, or some, render, as one picture, which a notebook shows.

        Any task may ask at any time, as with `call`. Each env has a `render_mode` that gives pictures, ``"rgb_array"``;
        of those of an ``"rgb_array_list"`` the last one is taken, and the list is empty then.

        Args:
            env_ids: Only these envs, in this order.
            columns: How many frames stand side by side; `None`: as many as rows, or one more.

        Returns:
            The frames, copied, and the mosaic of them.

        Raises:
            ValueError: An env has a `render_mode` that gives no picture; none was rendered.
            InvalidEnvResultError: What an env rendered is no picture.
            WorkerDied: A worker ended, meanwhile or before; its envs need a reset.
            EnvTimeoutError: A `render` took longer than `step_timeout`; likewise.
            Exception: What an env's `render` raised, or an `ExceptionGroup` of several; the others rendered.
        """
        self._ready("frames()")
        check_columns(columns)
        ids = range(self._num_envs) if env_ids is None else env_ids_of(self._num_envs, env_ids)
        check_render_modes(ids, await self.get_attr("render_mode", env_ids=ids))
        return await in_thread(compose, ids, await self.render(env_ids=ids), columns)

    @staticmethod
    async def _answered(asked: MethodCall) -> tuple[Any, ...]:
        calls = asked.batches.calls
        replies: list[CallReply] = await calls.answered(asked.call)
        return calls.completed(asked.call, asked.result, replies)
