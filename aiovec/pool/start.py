"""The start in two phases: workers build their envs and tell the spaces, the parent sizes the slab, workers map it.

Exactly `num_envs` constructions, none of them in the parent, all workers side by side. Whatever fails or is
cancelled on the way, nothing is left of what had been started.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode

from aiovec.async_env import AsyncEnv
from aiovec.errors import EnvTimeoutError, WorkerStartError, name_envs
from aiovec.exchange import pickles
from aiovec.exchange.failures import as_one_exception
from aiovec.exchange.frames import FrameKind
from aiovec.exchange.layout import Layout
from aiovec.exchange.messages import BuildReply, BuildRequest, MapRequest
from aiovec.exchange.slab import Geometry
from aiovec.pool.pool import Pool
from aiovec.pool.restarts import Restarts
from aiovec.pool.ring import LENT_FROM_NBYTES
from aiovec.pool.spaces import ObservationMode, VectorSpaces, vector_spaces
from aiovec.pool.threads import in_thread
from aiovec.pool.worker import Worker

__all__ = ["EnvFn", "Started", "StartPlan", "start"]

EnvFn = Callable[[], gym.Env[Any, Any] | AsyncEnv[Any, Any]]


@dataclass(frozen=True)
class StartPlan:
    """What `AsyncVectorEnv` was built with."""

    env_fns: tuple[EnvFn, ...]
    num_workers: int
    threads_per_worker: int
    shared_memory: bool
    copy: bool | None
    observation_mode: ObservationMode
    autoreset_mode: AutoresetMode
    context: str | None
    worker_options: Mapping[str, Any]
    start_timeout: float
    step_timeout: float | None
    close_grace: float
    max_buffers: int
    traceback_locals: bool
    on_failure: str
    max_restarts: int


@dataclass(frozen=True)
class Started:
    """What is known after the start."""

    pool: Pool
    spaces: VectorSpaces
    metadata: dict[str, Any]
    render_mode: str | None


async def start(plan: StartPlan) -> Started:
    """Starts the workers of a vector.

    Raises:
        EnvTimeoutError: It did not end within `start_timeout`; nothing is left.
        ValueError: `step_timeout` where it cannot be kept; nothing is left.
        SpaceMismatchError: Spaces that cannot be batched; nothing is left.
        SlabMemoryError: No memory for the slab; nothing is left.
        WorkerDied: A worker ended while it built its envs; nothing is left.
        WorkerStartError: The system gave no worker; nothing is left.
        Exception: What an env's construction raised, or an `ExceptionGroup` of several; nothing is left.
    """
    pool = Pool(
        asyncio.get_running_loop(),
        len(plan.env_fns),
        plan.num_workers,
        plan.context,
        plan.worker_options,
        plan.shared_memory,
        plan.start_timeout,
        plan.step_timeout,
        Restarts(plan.max_restarts, plan.autoreset_mode) if plan.on_failure == "restart" else None,
    )
    deadline: asyncio.Timeout | None = None
    try:
        env_fns = await _travelling(plan)
        async with asyncio.timeout(plan.start_timeout) as deadline:
            await pool.start_workers()
            requests = {
                worker.index: BuildRequest(
                    worker.env_ids,
                    env_fns[worker.env_ids.start : worker.env_ids.stop],
                    plan.autoreset_mode,
                    plan.traceback_locals,
                    plan.max_restarts if plan.on_failure == "restart" else None,
                    plan.threads_per_worker,
                    plan.step_timeout,
                    plan.close_grace,
                )
                for worker in pool.workers
            }
            builds = pool.calls.prepare(requests)
            building = pool.calls.post(FrameKind.BUILD, "build", builds)
            replies: list[BuildReply] = await pool.calls.answered(building)
            pool.calls.done(building)
            failed = [record for reply in replies for record in reply.failures]
            if failed:
                raise as_one_exception("build", failed)
            num_sync = len(plan.env_fns) - sum(len(reply.asynchronous) for reply in replies)
            if not plan.num_workers and plan.step_timeout is not None and num_sync:
                raise ValueError(
                    f"step_timeout={plan.step_timeout!r} with num_workers=0: an env in this process cannot be ended, "
                    "unless it is an AsyncEnv. Use a worker, or leave it out."
                )
            facts = [fact for reply in replies for fact in reply.spaces]
            spaces = vector_spaces(plan.observation_mode, len(plan.env_fns), facts)
            asynchronous = [reply.asynchronous for reply in replies]
            pool.keep_blueprints(builds, await _map(pool, plan, spaces), asynchronous)
        return Started(
            pool,
            spaces,
            {**replies[0].metadata, "autoreset_mode": plan.autoreset_mode},
            replies[0].render_mode,
        )
    except BaseException as error:
        too_late = (
            deadline is not None
            and deadline.expired()
            and isinstance(error, TimeoutError)  # else it failed by itself meanwhile
            and not isinstance(error, EnvTimeoutError)
        )
        # That of the stage; none while this process itself was at work.
        call = next(iter(pool.calls.pending.values()), None)
        late = [pool.workers[index] for index in sorted(call.missing)] if call is not None else []
        try:
            stack = await _stacks(late) if too_late else ""
            missing = await pool.backend.why_not_there(late) if too_late else ""
        finally:
            pool.terminate()
        if too_late:
            env_ids = [env_index for worker in late for env_index in worker.env_ids] or range(len(plan.env_fns))
            if missing:
                raise WorkerStartError(env_ids, missing) from None
            command = "start" if call is None else call.command
            raise EnvTimeoutError(env_ids, command, plan.start_timeout, stack=stack) from None
        raise


async def _stacks(late: Sequence[Worker]) -> str:
    """What the Python stacks of these workers are at the moment, for those that are inside an env."""
    asked = [worker for worker in late if worker.doing]
    for worker in asked:
        worker.ask_stack()
    written: list[int] = []
    for _ in range(50):  # as long as there is something to wait for: half a second at most
        await asyncio.sleep(0.01)
        before, written = written, [worker.stack_nbytes for worker in asked]
        if all(written) and written == before:
            break
    return "\n".join(f"(worker of {name_envs(worker.env_ids)})\n{worker.stack}" for worker in asked)


async def _travelling(plan: StartPlan) -> tuple[Any, ...]:
    """The env_fns as they travel: the same function is pickled once, and in a thread, since it may hold much."""
    if plan.num_workers == 0:
        return plan.env_fns

    by_id = {id(env_fn): env_fn for env_fn in plan.env_fns}

    def pickled() -> dict[int, bytes]:
        return {key: pickles.dumps_to_worker(env_fn) for key, env_fn in by_id.items()}

    if being_imported := _modules_being_imported():
        needed = set[str]().union(*map(pickles.modules_needed, by_id.values()))
        for module in needed.intersection(being_imported):
            raise WorkerStartError(
                range(len(plan.env_fns)),
                f"the vector is started while {module!r} is being imported, where its envs come from: a worker would "
                "import that, too, and start workers of its own. Start it in a function that is called later, or under "
                "`if __name__ == '__main__'`",
            )
        by_key = pickled()  # another thread would wait for the end of the import, which waits for us
    else:
        by_key = await in_thread(pickled)
    return tuple(by_key[id(env_fn)] for env_fn in plan.env_fns)


def _modules_being_imported() -> list[str]:
    """Those whose import, further up in this very thread, is what starts the vector."""
    found: list[str] = []
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "<module>":
            spec = frame.f_globals.get("__spec__")
            if getattr(spec, "_initializing", False):  # as the import system itself tells it
                found.append(frame.f_globals["__name__"])
        frame = frame.f_back
    return found


async def _map(pool: Pool, plan: StartPlan, spaces: VectorSpaces) -> Mapping[int, Any]:
    observations = Layout(spaces.single_observation_space)
    num_envs = len(plan.env_fns)
    num_workers = plan.num_workers if pool.shared else 0
    await pool.map_slab(Geometry(num_envs, observations, Layout(spaces.single_action_space), num_workers))
    both_spaces = (spaces.single_observation_space, spaces.single_action_space)
    messages = {
        worker.index: MapRequest(num_envs, *both_spaces, num_workers, worker.index, pool.shared)
        for worker in pool.workers
    }
    maps = pool.calls.prepare(messages)
    mapping = pool.calls.post(FrameKind.MAP, "map", maps)
    for refused in await pool.calls.answered(mapping):
        if refused is not None:
            raise as_one_exception("map", refused.failures[:1])
    pool.calls.done(mapping)
    lends = plan.copy is None
    is_large = observations.nbytes(num_envs) >= LENT_FROM_NBYTES
    await pool.open_calls(plan.max_buffers if lends and is_large else 0, plan.max_buffers if lends else 0)
    return maps
