"""Workers on Ray: whose Ray it is, what it has no place for, and what dies on it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from sample_envs import Counter

from aiovec import AsyncVectorEnv, EnvTimeoutError, WorkerDied, WorkerStartError

ray = pytest.importorskip("ray", reason="Ray is not installed: `pip install aiovec[ray]`")
cluster_utils = pytest.importorskip("ray.cluster_utils")

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray's own sockets and processes
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

BOUND_SECONDS = 100.0


class Sleeper(gym.Env[Any, Any]):
    """Sleeps for as long as its action says, or fails."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(1000)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """As Gymnasium's."""
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def node(self) -> str:
        """Of the cluster, where it lives."""
        return str(ray.get_runtime_context().get_node_id())

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Action 999 raises."""
        if action == 999:
            raise LookupError("this is the env's own error")
        time.sleep(action)
        return np.ones(2, np.float32), 1.0, False, False, {}


def init(**options: Any) -> None:
    """Before the loop runs: Ray's own C code keeps Python's lock for seconds then, in whichever thread."""
    ray.init(include_dashboard=False, logging_level="ERROR", log_to_driver=False, **options)


@pytest.fixture
def callers_ray() -> Iterator[None]:
    """A Ray that the user has started."""
    init(address="local", num_cpus=2)
    yield
    ray.shutdown()


def cart_poles(count: int) -> list[Any]:
    """Functions that build them."""
    return [functools.partial(gym.make, "CartPole-v1")] * count


@pytest.mark.blocks_loop  # in Ray's own C code, which keeps Python's lock while it starts
async def test_a_ray_of_its_own() -> None:
    """The same results as `SyncVectorEnv`; and when the last vector is closed, Ray is gone."""
    async with asyncio.timeout(BOUND_SECONDS):
        async with AsyncVectorEnv(cart_poles(4), num_workers=2, context="ray") as envs:
            async with AsyncVectorEnv([Counter], num_workers=1, context="ray") as beside:
                await beside.reset()
            expected = gym.vector.SyncVectorEnv(cart_poles(4))
            observations, _ = await envs.reset(seed=7)
            np.testing.assert_array_equal(observations, expected.reset(seed=7)[0])
            envs.action_space.seed(7)
            for _ in range(60):
                actions = envs.action_space.sample()
                for ours, theirs in zip((await envs.step(actions))[:4], expected.step(actions)[:4], strict=True):
                    np.testing.assert_array_equal(ours, theirs)
            expected.close()
        assert not ray.is_initialized()


@pytest.mark.usefixtures("callers_ray")
async def test_the_callers_ray_stays() -> None:
    """It is not ours to stop."""
    async with asyncio.timeout(BOUND_SECONDS):
        async with AsyncVectorEnv([Counter] * 2, num_workers=2, context="ray") as envs:
            await envs.reset()
        assert ray.is_initialized()


@pytest.mark.usefixtures("callers_ray")
async def test_an_exception_bears_the_frames_of_the_actor() -> None:
    """It is raised as itself, and the others are whole."""
    async with asyncio.timeout(BOUND_SECONDS):
        async with AsyncVectorEnv([Sleeper] * 2, num_workers=2, context="ray") as envs:
            await envs.reset()
            with pytest.raises(LookupError, match="the env's own error") as caught:
                await envs.step([0, 999])
            assert caught.traceback[-1].name == "step"
            assert (await envs.recv()).env_ids.tolist() == [0]
            await envs.reset(env_ids=[1])
            assert (await envs.step([0, 0]))[1].tolist() == [1.0, 1.0]


@pytest.mark.usefixtures("callers_ray")
async def test_a_killed_actor() -> None:
    """Who awaits is told at once, of which node and actor, and why; a reset builds its envs anew."""
    async with asyncio.timeout(BOUND_SECONDS):
        async with AsyncVectorEnv([Sleeper] * 4, num_workers=2, context="ray") as envs:
            await envs.reset()
            step = asyncio.ensure_future(envs.step([5, 5, 0, 0]))
            await asyncio.sleep(0.2)
            os.kill(pid_of_first(envs), signal.SIGKILL)
            with pytest.raises(WorkerDied) as caught:
                await step
            assert caught.value.env_ids == (0, 1)
            assert "Ray node" in caught.value.place
            assert caught.value.cause
            assert (await envs.recv(2)).env_ids.tolist() == [2, 3]
            await envs.reset()
            assert (await envs.step([0] * 4))[1].tolist() == [1.0] * 4


def pid_of_first(envs: AsyncVectorEnv) -> int:
    """Of the first worker."""
    assert envs._started is not None
    return envs._started.pool.workers[0].pid


@pytest.mark.usefixtures("callers_ray")
async def test_a_killed_actor_is_replaced() -> None:
    """With `on_failure="restart"`: its rows say so, and nothing is raised."""
    async with asyncio.timeout(BOUND_SECONDS):
        options: Any = {"num_workers": 2, "context": "ray", "on_failure": "restart"}
        async with AsyncVectorEnv([Sleeper] * 4, **options) as envs:
            await envs.reset()
            os.kill(pid_of_first(envs), signal.SIGKILL)
            rewards = np.zeros(4)
            while not np.isnan(rewards).any():
                _, rewards, _, truncations, infos = await envs.step([0] * 4)
            assert np.isnan(rewards).tolist() == truncations.tolist() == [True, True, False, False]
            assert isinstance(infos["failure"][0], WorkerDied)
            await envs.step([0] * 4)
            assert (await envs.step([0] * 4))[1].tolist() == [1.0] * 4


@pytest.mark.usefixtures("callers_ray")
async def test_a_stuck_env() -> None:
    """It is named, with the stack that its actor gave."""
    async with asyncio.timeout(BOUND_SECONDS):
        async with AsyncVectorEnv([Sleeper] * 2, num_workers=2, context="ray", step_timeout=1.0) as envs:
            await envs.reset()
            with pytest.raises(EnvTimeoutError) as caught:
                await envs.step([0, 60])
            assert caught.value.env_ids == (1,)
            assert "in step" in caught.value.stack


@pytest.mark.usefixtures("callers_ray")
async def test_no_place_in_the_cluster() -> None:
    """The error says what was asked for, and what there is; in bounded time."""
    async with asyncio.timeout(BOUND_SECONDS):
        options: Any = {"num_workers": 2, "context": "ray", "worker_options": {"num_cpus": 64}, "start_timeout": 3}
        with pytest.raises(WorkerStartError, match=r"num_cpus=64; the cluster has 1 node \(CPU 2"):
            async with AsyncVectorEnv([Counter] * 2, **options):
                pass


@pytest.mark.usefixtures("callers_ray")
async def test_an_option_that_ray_does_not_know() -> None:
    """Ray says which; nothing is left of the start, and another vector starts."""
    async with asyncio.timeout(BOUND_SECONDS):
        with pytest.raises(ValueError, match="num_cups"):
            await AsyncVectorEnv([Counter] * 2, num_workers=2, context="ray", worker_options={"num_cups": 1})
        async with AsyncVectorEnv([Counter] * 2, num_workers=2, context="ray") as envs:
            await envs.reset()


@pytest.mark.usefixtures("callers_ray")
async def test_ray_is_shut_down() -> None:
    """All workers are lost, and no other Ray is started, or joined, for new ones."""
    async with asyncio.timeout(BOUND_SECONDS):
        async with AsyncVectorEnv([Sleeper] * 2, num_workers=2, context="ray") as envs:
            await envs.reset()
            await asyncio.to_thread(ray.shutdown)
            with pytest.raises(WorkerDied):
                await envs.step([0, 0])
            with pytest.raises(WorkerStartError, match="Ray was shut down"):
                await envs.reset()
            assert not ray.is_initialized()


class Large(Sleeper):
    """Its observation goes through the object store."""

    observation_space = gym.spaces.Box(-1, 1, (2_000_000,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """8 MB."""
        super().reset(seed=seed)
        return np.zeros(2_000_000, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """8 MB."""
        return np.ones(2_000_000, np.float32), *super().step(action)[1:]


@pytest.fixture
def a_ray_of_little_memory() -> Iterator[None]:
    """For objects; nor does Ray put them on a disk, for which it thinks that it is full."""
    init(
        address="local",
        num_cpus=2,
        object_store_memory=80_000_000,  # not less than Ray takes
        _system_config={"local_fs_capacity_threshold": 0.01},
    )
    yield
    ray.shutdown()


@pytest.mark.usefixtures("a_ray_of_little_memory")
async def test_a_full_object_store() -> None:
    """A worker whose rows find no place is lost, and Ray says why; with room again, all goes on."""
    async with asyncio.timeout(BOUND_SECONDS):
        async with AsyncVectorEnv([Large] * 2, num_workers=2, context="ray") as envs:
            await envs.reset()
            assert (await envs.step([0, 0]))[0].mean() == 1
            held: list[Any] = []
            with pytest.raises(ray.exceptions.OutOfDiskError):
                while True:
                    held.append(await asyncio.to_thread(ray.put, np.zeros(4_000_000, np.uint8)))
            with pytest.raises(WorkerDied) as caught:
                while True:
                    await envs.step([0, 0])
            assert "Ray node" in caught.value.place
            assert "object store is full" in caught.value.cause
            held.clear()
            await reset_until_there(envs)
            assert (await envs.step([0, 0]))[0].mean() == 1


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Three nodes on this machine, the first of which has no place for workers. Ray sets a signal's handler here."""
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    init(address=cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


async def reset_until_there(envs: AsyncVectorEnv) -> None:
    """Ray may put a new actor on a node of whose end it has not heard: that dies, too, before it has begun."""
    while True:
        with contextlib.suppress(WorkerDied):
            await envs.reset()
            return


@pytest.mark.usefixtures("cluster")  # first of all: it takes seconds, which are not the loop's
@pytest.mark.parametrize("on_failure", ["raise", "restart"])
async def test_a_node_that_is_killed(on_failure: Any, cluster: Any) -> None:
    """Its workers die, the others go on, and what is lost is built anew on another node."""
    options: Any = {"worker_options": {"num_cpus": 1, "scheduling_strategy": "SPREAD"}, "on_failure": on_failure}
    async with asyncio.timeout(BOUND_SECONDS):
        async with AsyncVectorEnv([Sleeper] * 2, num_workers=2, context="ray", **options) as envs:
            await envs.reset()
            assert len(set(await envs.call("node"))) == 2
            lost = next(node for node in cluster.worker_nodes)
            await asyncio.to_thread(cluster.remove_node, lost, allow_graceful=False)
            if on_failure == "raise":
                with pytest.raises(WorkerDied) as caught:
                    while True:
                        await envs.step([0, 0])
                assert caught.value.cause
                await reset_until_there(envs)
            else:
                seen: list[list[float]] = []
                while seen[-1:] != [[1.0, 1.0]] or len(seen) < 2 or not np.isnan(seen).any():
                    seen.append((await envs.step([0, 0]))[1].tolist())
                # More than once, if Ray has put the next actor on the node of whose end it had not heard.
                told = np.isnan(seen).any(axis=0)
                assert told.sum() == 1
            assert (await envs.step([0, 0]))[1].tolist() == [1.0, 1.0]
            assert len(set(await envs.call("node"))) == 1


@pytest.fixture
def soon_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time for which a head may be gone, for Ray and for us."""
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "24")


@pytest.mark.usefixtures("soon_given_up", "cluster")
async def test_a_cluster_that_goes_away(cluster: Any) -> None:
    """It is told before Ray ends the program, which `ray.shutdown()` prevents."""
    async with asyncio.timeout(BOUND_SECONDS):
        async with AsyncVectorEnv([Sleeper] * 2, num_workers=2, context="ray") as envs:
            await envs.reset()
            cluster.head_node.kill_gcs_server()
            with pytest.raises(WorkerDied, match=r"head of the cluster, .* has not answered for 1\d s") as caught:
                while True:
                    await envs.step([0, 0])
            assert "Ray node" in caught.value.place
            with pytest.raises(WorkerStartError, match="has not answered"):
                await envs.reset()
        await asyncio.to_thread(ray.shutdown)
