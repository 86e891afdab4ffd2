"""Workers on a Ray cluster: where Ray comes from, and what it has no place for.

Ray is the caller's own, by `ray.init(…)`, or a local one that the first vector starts and the last one stops. All that
waits for Ray is done in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from aiovec.errors import WorkerStartError
from aiovec.exchange.tally import Tally
from aiovec.exchange.wanted import Wanted
from aiovec.pool.ray_worker import SHUT_DOWN, RayWorker
from aiovec.pool.threads import in_thread
from aiovec.pool.worker import Told, Worker

__all__ = ["RayCluster"]

_DESCRIBE_SECONDS = 5.0

# Ray ends the program itself, and raises nothing that could be caught, when the cluster's head has been gone for so long.
# Until then it may come back, and actors go on without it.
_RAY_GIVES_UP_SECONDS = 60.0
_RAY_GIVES_UP_VARIABLE = "RAY_gcs_rpc_server_reconnect_timeout_s"
_LOST_SHARE = 2 / 3
_LOOKS_PER_LIMIT = 12
_CONNECT_SECONDS = 5.0


class _OwnRay:
    """The Ray that vectors of this process have started themselves, if any.

    A thread starts it, lives as long, and stops it: the processes of a local Ray end with the thread that has started
    them (`PR_SET_PDEATHSIG`), and any other thread may end before.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_users = 0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"<_OwnRay users={self._num_users}>"

    def join(self, ray: Any) -> bool:
        """Starts it where there is no Ray; tells whether the caller is a user of it now. Blocks."""
        with self._lock:
            if self._num_users == 0:
                self.wait()
                if ray.is_initialized():
                    return False
                started: Future[None] = Future()
                self._stopping.clear()
                self._thread = threading.Thread(target=self._live, args=(ray, started), name="aiovec-ray", daemon=True)
                self._thread.start()
                started.result()
            self._num_users += 1
            return True

    def leave(self) -> None:
        """Has it stop, if this was the last user; does not wait for that."""
        with self._lock:  # who holds it for long is the first user, so there is none that could leave
            self._num_users -= 1
            if self._num_users == 0:
                self._stopping.set()

    def wait(self) -> None:
        """Waits until it has stopped, if it does. Blocks."""
        if self._thread is not None and self._stopping.is_set():
            self._thread.join()

    def _live(self, ray: Any, started: Future[None]) -> None:
        try:
            # Its warnings are about what we do on purpose, such as that a thread can set no handler for SIGTERM.
            address = os.environ.get("RAY_ADDRESS") or "local"  # else it joins whatever runs on this machine
            ray.init(address=address, include_dashboard=False, logging_level=logging.ERROR)
        except BaseException as error:  # noqa: BLE001  it is raised by who waits
            started.set_exception(error)
            return
        started.set_result(None)
        self._stopping.wait()
        ray.shutdown()


_own_ray = _OwnRay()


class RayCluster:
    """See `aiovec.pool.worker.Backend`.

    Args:
        loop: The running loop.
        env_ids: The envs of each worker.
        worker_options: Of each actor: see `AsyncVectorEnv`.
    """

    shares_memory: bool = False
    maps_memory: bool = False
    tallies: Sequence[Tally] = ()
    wanted: Wanted | None = None

    def __init__(
        self, loop: asyncio.AbstractEventLoop, env_ids: Sequence[range], worker_options: Mapping[str, Any]
    ) -> None:
        self._loop = loop
        self._env_ids = env_ids
        self._options = worker_options
        self._ray: Any = None
        self._actors: Any = None
        self._begun: dict[int, Any] = {}  # the first actors, until the pool asks for them
        self._is_user = False  # of a Ray of our own
        self._workers: dict[int, RayWorker] = {}
        self._watching: asyncio.Task[None] | None = None
        self._lost = ""

    def __repr__(self) -> str:
        return f"<RayCluster options={dict(self._options)}>"

    async def open(self) -> None:
        opening = asyncio.ensure_future(in_thread(self._connect))
        try:
            await asyncio.shield(opening)
        except asyncio.CancelledError:
            # A Ray that is starting cannot be stopped before it has started.
            opening.add_done_callback(lambda _: self.terminate())
            raise
        head = self._ray.get_runtime_context().gcs_address
        self._watching = self._loop.create_task(self._watch(head), name="aiovec: is the cluster there")

    async def _watch(self, head: str) -> None:
        """Tells all workers when the cluster has gone away."""
        if not await _answers(head):
            return  # it is not to be reached from here in this way
        gives_up = float(os.environ.get(_RAY_GIVES_UP_VARIABLE, _RAY_GIVES_UP_SECONDS))
        limit, last = _LOST_SHARE * gives_up, self._loop.time()
        while (now := self._loop.time()) - last < limit:
            await asyncio.sleep(limit / _LOOKS_PER_LIMIT)
            if await _answers(head):
                last = self._loop.time()
        self._lost = (
            f"the head of the cluster, {head}, has not answered for {now - last:.0f} s. When it has not for "
            f"{gives_up:.0f} s, Ray ends this program: save what is to be kept, and call `ray.shutdown()`"
        )
        for worker in self._workers.values():
            worker.lose(RuntimeError(self._lost))

    def _connect(self) -> None:
        try:
            self._ray = importlib.import_module("ray")  # a second, and heavy
            self._is_user = _own_ray.join(self._ray)
        except Exception as error:
            raise WorkerStartError(range(self._env_ids[-1].stop), f"Ray did not start: {error}") from error
        ours = importlib.import_module("aiovec.worker.ray_actor")
        actor = self._ray.remote(concurrency_groups=ours.CONCURRENCY_GROUPS)(ours.EnvActor)
        self._actors = actor.options(max_restarts=0, max_task_retries=0, **self._options)
        # Here, since with the first one Ray sends their class to the cluster, and waits for that.
        for index, env_ids in enumerate(self._env_ids):
            self._begun[index] = self._new_actor(index, env_ids)

    def _new_actor(self, index: int, env_ids: range) -> Any:
        try:
            return self._actors.remote(index, len(env_ids), sys.path)
        except (ValueError, TypeError):  # of the user's options: Ray says which
            raise
        except Exception as error:
            raise WorkerStartError(env_ids, f"Ray gave no actor: {error}") from error

    def start_worker(self, index: int, env_ids: range, told: Told) -> RayWorker:
        if not self._ray.is_initialized():  # else Ray would start, or join, another one
            raise WorkerStartError(env_ids, SHUT_DOWN)
        if self._lost:
            raise WorkerStartError(env_ids, self._lost)
        actor = self._begun.pop(index, None) or self._new_actor(index, env_ids)
        worker = RayWorker(self._loop, index, env_ids, actor, self._ray.is_initialized, self._kill, told)
        self._workers[index] = worker
        return worker

    def _kill(self, actor: Any) -> None:
        # Ray may be gone, and then the actor is, too; a head that is gone is waited for.
        with contextlib.suppress(Exception):
            if self._ray.is_initialized() and not self._lost:
                self._ray.kill(actor, no_restart=True)

    async def why_not_there(self, workers: Sequence[Worker]) -> str:
        if all(worker.pid for worker in workers):
            return ""
        try:
            async with asyncio.timeout(_DESCRIBE_SECONDS):
                there = await in_thread(self._describe)
        except Exception as error:  # noqa: BLE001  whatever Ray says
            there = f"and the cluster does not say what it has ({type(error).__name__}: {error})"
        missing = sum(not worker.pid for worker in workers)
        asked = ", ".join(f"{key}={value!r}" for key, value in self._options.items()) or "nothing in particular"
        return (
            f"Ray has found no place for {missing} of {len(workers)} workers. Each asks for {asked}; {there}. Ask for less "
            "by `worker_options`, use fewer workers, or add nodes."
        )

    def _describe(self) -> str:
        if not self._ray.is_initialized():  # who asks would start, or join, another one
            return SHUT_DOWN
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        shown = "; ".join(_shown(resources) for resources in nodes[:8]) + (" and more" if len(nodes) > 8 else "")
        free = _shown(self._ray.available_resources())
        return f"the cluster has {len(nodes)} node{'s' * (len(nodes) != 1)} ({shown}), of which is free: {free}"

    async def close(self) -> None:
        self.terminate()
        await in_thread(_own_ray.wait)

    def terminate(self) -> None:
        if self._watching is not None and not self._loop.is_closed():
            self._watching.cancel()
        self._begun.clear()  # an actor whose handle is gone ends
        if self._is_user:
            self._is_user = False
            _own_ray.leave()


async def _answers(address: str) -> bool:
    """Whether somebody is there."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            writer.close()
            await writer.wait_closed()
    except OSError:  # a time-out is one, too
        return False
    return True


def _shown(resources: Mapping[str, float]) -> str:
    """Without what Ray adds for itself, such as a resource for each node's address; memory in GB."""
    parts = [
        f"{name} {amount / 1e9:.1f} GB" if "memory" in name else f"{name} {amount:g}"
        for name, amount in sorted(resources.items())
        if not name.startswith("node:")
    ]
    return ", ".join(parts) or "nothing"
