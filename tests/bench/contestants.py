"""What the table compares: each steps the same envs with the same actions, and says how long it took.

All of them are alive at the same time and take turns, so that a noisy machine is noisy for all; who is not
asked sleeps.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import signal
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

import aiovec

EnvFn = Callable[[], gym.Env[Any, Any]]
NUM_ACTION_ROWS = 64
BARE, LOCK_STEP = 0, 1
_ORDER = struct.Struct("<BI")


def action_rows(env_fn: EnvFn, num_envs: int) -> list[Any]:
    """Random batches that every contestant repeats in turn."""
    env = env_fn()
    env.action_space.seed(0)
    rows = [np.array([env.action_space.sample() for _ in range(num_envs)]) for _ in range(NUM_ACTION_ROWS)]
    env.close()
    return rows


class Processes:
    """Bare processes: each steps its share of the envs; the lock-step limit is them with one byte each way."""

    def __init__(self, env_fn: EnvFn, num_envs: int, num_workers: int, rows: list[Any]) -> None:
        self._workers: list[tuple[int, socket.socket]] = []
        share = -(-num_envs // num_workers)
        for start in range(0, num_envs, share):
            ours, theirs = socket.socketpair()
            pid = os.fork()
            if pid == 0:
                ours.close()
                for _, earlier in self._workers:
                    earlier.close()
                _bare_worker(theirs, env_fn, [list(row[start : start + share]) for row in rows], start)
                os._exit(0)
            theirs.close()
            self._workers.append((pid, ours))
        for _, connection in self._workers:
            connection.recv(1)

    def run(self, steps: int, mode: int) -> float:
        """Seconds for so many vector steps."""
        connections = [connection for _, connection in self._workers]
        began = time.perf_counter()
        for connection in connections:
            connection.send(_ORDER.pack(mode, steps))
        if mode == LOCK_STEP:
            for _ in range(steps):
                for connection in connections:
                    connection.recv(1)
                for connection in connections:
                    connection.send(b"g")
        for connection in connections:
            connection.recv(1)
        return time.perf_counter() - began

    def close(self) -> None:
        """Ends the processes."""
        for pid, connection in self._workers:
            os.kill(pid, signal.SIGKILL)  # Gymnasium's forks hold copies of our ends, which hide their end
            os.waitpid(pid, 0)
            connection.close()


def _bare_worker(connection: socket.socket, env_fn: EnvFn, rows: list[list[Any]], first: int) -> None:
    envs = [env_fn() for _ in rows[0]]
    for index, env in enumerate(envs):
        env.reset(seed=first + index)
    done = [False] * len(envs)
    connection.send(b"r")
    while order := connection.recv(_ORDER.size):
        mode, steps = _ORDER.unpack(order)
        for step in range(steps):
            row = rows[step % NUM_ACTION_ROWS]
            for index, env in enumerate(envs):
                if done[index]:
                    env.reset()
                    done[index] = False
                else:
                    _, _, terminated, truncated, _ = env.step(row[index])
                    done[index] = terminated or truncated
            if mode == LOCK_STEP:
                connection.send(b"x")
                connection.recv(1)
        connection.send(b"d")


class Aiovec:
    """`AsyncVectorEnv` on a loop of its own.

    A heartbeat of 5 ms beats beside start, close and `run_beside_heartbeat`. Not beside `run`, since nothing
    beats beside the others either: a loop with a timer sets the machine's clock before each wait, some 10 µs.
    """

    def __init__(
        self,
        env_fn: EnvFn,
        num_envs: int,
        num_workers: int,
        rows: list[Any],
        new_loop: Any = None,
        wrappers: tuple[Any, ...] = (),
        **kwargs: Any,
    ) -> None:
        self._rows = rows
        self._runner = asyncio.Runner(loop_factory=new_loop)
        self._envs: Any = aiovec.AsyncVectorEnv([env_fn] * num_envs, num_workers=num_workers, **kwargs)
        if wrappers:
            self._envs = aiovec.wrap(self._envs, *wrappers)
        self.longest_gap = 0.0
        self.cpu_seconds = 0.0
        self.steps = 0
        self._runner.run(self._beside_heartbeat(self._start()))

    async def _start(self) -> None:
        await self._envs
        await self._envs.reset(seed=0)

    async def _beside_heartbeat(self, work: Any) -> Any:
        heartbeat = asyncio.create_task(self._beat())
        try:
            return await work
        finally:
            heartbeat.cancel()

    async def _beat(self) -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.005)
            now = time.perf_counter()
            self.longest_gap = max(self.longest_gap, now - last - 0.005)
            last = now

    async def _steps(self, steps: int) -> float:
        step, rows = self._envs.step, self._rows
        began = time.perf_counter()
        for index in range(steps):
            await step(rows[index % NUM_ACTION_ROWS])
        return time.perf_counter() - began

    def run(self, steps: int) -> float:
        """Seconds for so many vector steps."""
        cpu = time.process_time()
        seconds: float = self._runner.run(self._steps(steps))
        self.cpu_seconds += time.process_time() - cpu
        self.steps += steps
        return seconds

    def run_parts(self, steps: int, min_envs: int) -> float:
        """Seconds for so many steps of each env in the mean, first come, first served."""
        return float(self._runner.run(self._parts(steps, min_envs)))

    async def _parts(self, steps: int, min_envs: int) -> float:
        envs, rows = self._envs, self._rows
        left = steps * len(envs)
        began = time.perf_counter()
        await envs.send(rows[0])
        async for batch in envs.batches(min_envs):
            left -= len(batch.env_ids)
            if left > 0:
                await envs.send(rows[left % NUM_ACTION_ROWS][batch.env_ids], batch.env_ids)
        return time.perf_counter() - began

    def run_rollouts(self, num_rollouts: int, num_steps: int, groups: int) -> float:
        """Seconds for so many rollouts, by a policy that costs nothing."""
        return float(self._runner.run(self._rollouts(num_rollouts, num_steps, groups)))

    async def _rollouts(self, num_rollouts: int, num_steps: int, groups: int) -> float:
        of_group = [row[: len(self._envs) // groups].copy() for row in self._rows]
        actions = itertools.cycle(of_group)
        began = time.perf_counter()
        for _ in range(num_rollouts):
            await self._envs.rollout(lambda _observations: next(actions), num_steps, groups=groups)
        return time.perf_counter() - began

    def run_tasks(self, steps: int) -> float:
        """Seconds for so many steps of each env, each in a task of its own."""
        return float(self._runner.run(self._tasks(steps)))

    async def _tasks(self, steps: int) -> float:
        async def drive(sub_env: aiovec.SubEnv) -> None:
            await sub_env.reset()
            for index in range(steps):
                _, _, terminated, truncated, _ = await sub_env.step(rows[index % NUM_ACTION_ROWS][sub_env.env_index])
                if terminated or truncated:
                    await sub_env.reset()

        rows = self._rows
        began = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for sub_env in self._envs:
                tasks.create_task(drive(sub_env))
        return time.perf_counter() - began

    def run_beside_heartbeat(self, steps: int) -> None:
        """So many vector steps, of which `longest_gap` tells."""
        self._runner.run(self._beside_heartbeat(self._steps(steps)))

    def close(self) -> None:
        """Closes the vector and its loop."""
        self._runner.run(self._beside_heartbeat(self._envs.close()))
        self._runner.close()


class Gymnasium:
    """Gymnasium's AsyncVectorEnv: shared memory, one process an env."""

    def __init__(self, env_fn: EnvFn, num_envs: int, rows: list[Any]) -> None:
        self._rows = rows
        self._envs = gym.vector.AsyncVectorEnv([env_fn] * num_envs)
        self._last, _ = self._envs.reset(seed=0)

    def run(self, steps: int) -> float:
        """Seconds for so many vector steps."""
        step, rows = self._envs.step, self._rows
        began = time.perf_counter()
        for index in range(steps):
            step(rows[index % NUM_ACTION_ROWS])
        return time.perf_counter() - began

    def run_rollout(self, num_steps: int) -> float:
        """Seconds for so many vector steps that are kept and stacked, as users write it."""
        began = time.perf_counter()
        observations, rewards, terminations, truncations = [self._last], [], [], []
        for index in range(num_steps):
            observation, reward, terminated, truncated, _infos = self._envs.step(self._rows[index % NUM_ACTION_ROWS])
            observations.append(observation)
            rewards.append(reward)
            terminations.append(terminated)
            truncations.append(truncated)
        self._last = observations[-1]
        stacked = [np.stack(values) for values in (observations, rewards, terminations, truncations)]
        seconds = time.perf_counter() - began
        assert len(stacked[0]) == num_steps + 1
        return seconds

    def close(self) -> None:
        """Ends the processes."""
        self._envs.close()


class Blocking(Gymnasium):
    """`BlockingVectorEnv`, whose loop is run in each step."""

    def __init__(self, env_fn: EnvFn, num_envs: int, num_workers: int, rows: list[Any]) -> None:
        self._rows = rows
        self._envs = aiovec.BlockingVectorEnv([env_fn] * num_envs, num_workers=num_workers)
        self._last, _ = self._envs.reset(seed=0)


class Tianshou(Gymnasium):
    """tianshou's RayVectorEnv: an actor an env, its observations pickled; it awaits nothing, and resets nobody."""

    def __init__(self, env_fn: EnvFn, num_envs: int, rows: list[Any]) -> None:
        from tianshou.env import RayVectorEnv

        self._rows = rows
        self._envs = RayVectorEnv([env_fn] * num_envs)
        self._envs.reset()


class TorchRL:
    """TorchRL's AsyncEnvPool: the same envs in as many processes, each of which has a thread an env; tensors in shm."""

    def __init__(self, env_fn: EnvFn, num_envs: int, num_workers: int, num_actions: int) -> None:
        import torch
        from torchrl.envs import AsyncEnvPool

        makers = [functools.partial(_torchrl_env, env_fn)] * num_envs
        per_worker = num_envs // num_workers
        self._pool = AsyncEnvPool(makers, backend="multiprocessing", exchange="auto", envs_per_worker=per_worker)
        self._num_envs = num_envs
        self._actions = torch.randint(0, num_actions, (NUM_ACTION_ROWS, num_envs))

    def run_parts(self, steps: int, min_envs: int) -> float:
        """Seconds for so many steps of each env in the mean, first come, first served."""
        pool, left, pending = self._pool, steps * self._num_envs, self._num_envs
        batch = pool.reset()
        batch["action"] = self._actions[0]
        began = time.perf_counter()
        pool.async_step_and_maybe_reset_send(batch)
        while left > 0:
            _, batch = pool.async_step_and_maybe_reset_recv(min_get=min_envs)
            count = len(batch)
            left -= count
            pending -= count
            if left > 0:
                batch["action"] = self._actions[left % NUM_ACTION_ROWS][:count]
                pool.async_step_and_maybe_reset_send(batch)
                pending += count
        seconds = time.perf_counter() - began
        while pending:
            pending -= len(pool.async_step_and_maybe_reset_recv(min_get=pending)[1])
        return seconds

    def close(self) -> None:
        """Ends the processes."""
        self._pool.close()


def _torchrl_env(env_fn: EnvFn) -> Any:
    import torch
    from torchrl.envs import GymWrapper

    torch.set_num_threads(1)
    return GymWrapper(env_fn(), categorical_action_encoding=True)


class EnvPool:
    """EnvPool's send and recv: the same game in C++, in threads, which gives the same frames but for their axes."""

    def __init__(self, pool: Any, num_envs: int) -> None:
        self._pool = pool
        self._num_envs = num_envs
        self._actions = np.random.default_rng(0).integers(0, 4, (NUM_ACTION_ROWS, num_envs))

    @classmethod
    def of_breakout(cls, num_envs: int, batch_size: int, num_threads: int) -> EnvPool:
        """Raw frames."""
        import envpool

        raw = {"frame_skip": 1, "stack_num": 1, "gray_scale": False, "img_height": 210, "img_width": 160}
        sizes = {"num_envs": num_envs, "batch_size": batch_size, "num_threads": num_threads}
        return cls(envpool.make("Breakout-v5", env_type="gymnasium", noop_max=1, **raw, **sizes), num_envs)

    def run_parts(self, steps: int) -> float:
        """Seconds for so many steps of each env in the mean, first come, first served."""
        pool, left, pending = self._pool, steps * self._num_envs, self._num_envs
        pool.async_reset()
        began = time.perf_counter()
        while left > 0:
            env_ids = pool.recv()[4]["env_id"]
            left -= len(env_ids)
            pending -= len(env_ids)
            if left > 0:
                pool.send(self._actions[left % NUM_ACTION_ROWS][: len(env_ids)], env_ids)
                pending += len(env_ids)
        seconds = time.perf_counter() - began
        while pending:  # a reset of envs that are still at work crashes it
            pending -= len(pool.recv()[4]["env_id"])
        return seconds
