"""`serve.py` as a process, over HTTP: many clients at once, everything that can go wrong, and its end in mid-traffic."""

from __future__ import annotations

import asyncio
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_runs import EXAMPLES, needs, workers_of

needs("httpx", "starlette", "uvicorn")

import httpx  # noqa: E402  it is skipped without

BOUND_SECONDS = 20.0
"""Generous: nothing here takes a tenth of it, and what hangs shall say where."""

ORDINARY, LAST, BROKEN, WAIT = range(4)  # what the env of these tests does at an action
ENV_MODULE = """
import os, time
import gymnasium as gym
import numpy as np

class Trial(gym.Env):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if options == {"fail": True}:
            raise LookupError("there is no pole")
        self.steps = 0
        return np.zeros(2, np.float32), {"worker": np.int64(os.getpid()), "options": options}

    def step(self, action):
        if action == 2:
            raise LookupError("the pole broke")
        while action == 3 and not os.path.exists(os.environ["TRIAL_GATE"]):
            time.sleep(0.005)
        self.steps += 1
        return np.full(2, self.steps, np.float32), np.nan if action == 3 else 1, action == 1, False, {}

gym.register("Trial-v0", Trial, disable_env_checker=True)  # it warns of NaN
"""


@dataclass
class Server:
    """A `serve.py` that serves, and a client of it."""

    process: subprocess.Popen[str]
    client: httpx.AsyncClient
    mark: str
    gate: Path  # steps that wait go on once it is there

    async def ask(self, method: str, path: str, status: int, **body: Any) -> Any:
        """What is answered, with this status."""
        response = await self.client.request(method, path, json=body or None)
        assert response.status_code == status, response.text
        return response.json() if response.content else None

    async def begin(self, **body: Any) -> str:
        """A new session."""
        begun = await self.ask("POST", "/sessions", 201, **body)
        return f"/sessions/{begun['session']}"

    async def health(self, holds: Callable[[dict[str, Any]], bool] = lambda _health: True) -> dict[str, Any]:
        """The health, once this holds of it."""
        async with asyncio.timeout(BOUND_SECONDS):
            while not holds(health := await self.ask("GET", "/health", 200)):
                await asyncio.sleep(0.005)
        return health

    async def ends(self, number: signal.Signals) -> tuple[int | None, str, str]:
        """Sends it a signal; its exit code, and what it has printed to stdout and stderr since it serves."""
        self.process.send_signal(number)
        begin = time.perf_counter()
        printed, errors = await asyncio.to_thread(self.process.communicate, timeout=BOUND_SECONDS)
        print(f"ended {time.perf_counter() - begin:.2f} s after {number.name}")
        assert await self.workers() == set()
        return self.process.returncode, printed, errors

    async def workers(self) -> set[int]:
        """The pids of its worker processes."""
        return await asyncio.to_thread(workers_of, self.mark)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@asynccontextmanager
async def serving(tmp_path: Path, *arguments: str) -> AsyncIterator[Server]:
    """Serves on a free port, by the kind of event loop that the test has; killed if the test has not ended it."""
    loop = "uvloop" if type(asyncio.get_running_loop()).__module__.startswith("uvloop") else "asyncio"
    (tmp_path / "trial.py").write_text(ENV_MODULE)
    mark, gate = f"AIOVEC_TEST_MARK={tmp_path}", tmp_path / "gate"
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    process = await asyncio.to_thread(  # it waits for the child, which waits for a CPU
        subprocess.Popen,
        [sys.executable, str(EXAMPLES / "serve.py"), "--port=0", f"--loop={loop}", *arguments],
        cwd=tmp_path,
        env=os.environ | dict([mark.split("=")]) | {"PYTHONPATH": path, "TRIAL_GATE": str(gate)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    too_late = threading.Timer(60, process.kill)
    too_late.start()
    try:
        assert process.stdout is not None
        match = re.search(r"http://[\d.]+:\d+$", await asyncio.to_thread(process.stdout.readline))
        assert match is not None, process.communicate()[1]
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=match[0], timeout=BOUND_SECONDS, limits=limits) as client:
            yield Server(process, client, mark, gate)
    finally:
        too_late.cancel()
        if process.returncode is None:
            process.kill()
            await asyncio.to_thread(process.communicate)


async def test_many_clients_at_once_beside_health_checks(tmp_path: Path) -> None:
    """More clients than envs, so some are told to come again; no step is lost, none is taken twice."""
    async with serving(tmp_path, "--num-envs=4") as server:
        await server.health()
        descriptors = server.descriptors()
        counts, latencies = Counter[str](), list[float]()

        async def play(seed: int) -> None:
            while True:
                response = await server.client.post("/sessions", json={"seed": seed})
                if response.status_code == 201:
                    break
                assert response.status_code == 503
                counts["come again"] += 1
                assert int(response.headers["Retry-After"]) == 1
                await asyncio.sleep(0.05)
            session = f"/sessions/{response.json()['session']}"
            for number in range(10):
                body = {"action": number % 2} if number % 3 else {}
                step = await server.ask("POST", f"{session}/step", 200, **body)
                assert not step["terminated"]
                assert len(step["observation"]) == 4
                assert "action" not in body or step["action"] == body["action"]
                counts["steps"] += 1
                counts["by the policy"] += "action" not in body
            episode = await server.ask("POST", f"{session}/episode", 200, seed=seed, max_steps=60)
            assert (episode["return"], episode["length"]) == (60, 60)  # CartPole's own policy is good
            counts["steps"] += 60
            counts["by the policy"] += 60
            await server.ask("DELETE", session, 204)

        async def check_health() -> None:
            while True:
                begin = time.perf_counter()
                health = await server.health()
                latencies.append(time.perf_counter() - begin)
                assert health["free_envs"] + health["sessions"] <= 4
                await asyncio.sleep(0.002)

        begin = time.perf_counter()
        async with asyncio.timeout(60):
            checking = asyncio.create_task(check_health())
            async with asyncio.TaskGroup() as clients:
                for seed in range(8):
                    clients.create_task(play(seed))
            checking.cancel()
            await asyncio.wait([checking])
        seconds = time.perf_counter() - begin
        median, *_, slow = statistics.quantiles(latencies, n=100)[49:]
        print(
            f"{counts['steps']} steps in {seconds:.2f} s; {len(latencies)} health checks: "
            f"median {median * 1e3:.1f} ms, 99 % within {slow * 1e3:.1f} ms"
        )
        assert checking.cancelled()
        assert max(latencies) < BOUND_SECONDS / 2
        assert counts["come again"] > 0

        told = await server.ask("GET", "/statistics", 200)
        assert told["envs"]["steps"] == counts["steps"]
        assert told["policy"]["calls"] == counts["by the policy"]
        assert told["policy"]["batches"] <= told["policy"]["calls"]
        health = await server.health()
        assert (health["sessions"], health["free_envs"], health["pending"]) == (0, 4, [])
        await server.client.aclose()
        async with asyncio.timeout(BOUND_SECONDS):
            while server.descriptors() > descriptors:
                await asyncio.sleep(0.02)
        code, printed, errors = await server.ends(signal.SIGTERM)
        assert (code, errors) == (0, "")
        assert printed.endswith("every worker has ended\n")


async def test_every_mistake_of_a_client_has_its_answer(tmp_path: Path) -> None:
    async with serving(tmp_path, "--env-id=trial:Trial-v0", "--num-envs=1") as server:
        assert "no session 'nobody'" in (await server.ask("POST", "/sessions/nobody/step", 404))["error"]
        assert "Not Found" in (await server.ask("GET", "/nowhere", 404))["error"]
        assert "Method" in (await server.ask("GET", "/sessions", 405))["error"]
        for body in ({"seed": -1}, {"seed": "1"}, {"seed": True}, {"options": 1}, {"sead": 1}):
            (name,) = body
            assert name in (await server.ask("POST", "/sessions", 422, **body))["error"]
        for content in (b"{", b"[]", b"\xff"):
            response = await server.client.post("/sessions", content=content)
            assert response.status_code == 422
            assert "JSON" in response.json()["error"]
        assert (await server.health())["free_envs"] == 1  # none of these has taken an env

        begun = await server.ask("POST", "/sessions", 201, seed=3, options={"colour": "red"})
        session = f"/sessions/{begun['session']}"
        assert begun["observation"] == [0, 0]
        assert begun["info"]["worker"] in await server.workers()
        assert begun["info"]["options"] == {"colour": "red"}
        response = await server.client.post("/sessions")
        assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
        assert response.json() == {"error": "all 1 envs are in use"}

        for action in (4, -1, 1.5, "1", "x", [1], {}, 1 << 70):
            assert "action=" in (await server.ask("POST", f"{session}/step", 422, action=action))["error"]
        assert "no policy" in (await server.ask("POST", f"{session}/step", 422))["error"]
        assert "max_steps" in (await server.ask("POST", f"{session}/episode", 422, max_steps=-1))["error"]
        step = await server.ask("POST", f"{session}/step", 200, action=ORDINARY)
        assert step == {
            "action": ORDINARY, "observation": [1, 1], "reward": 1, "terminated": False, "truncated": False, "info": {}
        }  # fmt: skip  # the first: none of these was a step

        slow = asyncio.create_task(server.ask("POST", f"{session}/step", 200, action=WAIT))
        health = await server.health(lambda health: health["pending"])
        assert (health["busy_sessions"], health["pending"][0]["command"]) == (1, "step")
        for method, path in (("POST", "step"), ("POST", "reset"), ("POST", "episode"), ("DELETE", "")):
            busy = await server.ask(method, f"{session}/{path}".rstrip("/"), 409)
            assert busy == {"error": "another request uses this session: await its answer first"}
        server.gate.touch()
        step = await slow
        assert step["observation"] == [2, 2]
        assert math.isnan(step["reward"])

        assert (await server.ask("POST", f"{session}/step", 200, action=LAST))["terminated"]
        ended = (await server.ask("POST", f"{session}/step", 409, action=ORDINARY))["error"]
        assert f"POST {session}/reset begins another" in ended
        assert (await server.ask("POST", f"{session}/reset", 200))["observation"] == [0, 0]
        await server.ask("POST", f"{session}/step", 200, action=ORDINARY)
        await server.ask("DELETE", session, 204)
        await server.ask("DELETE", session, 404)
        await server.begin()
        code, printed, errors = await server.ends(signal.SIGINT)
        assert (code, errors) == (130, "")
        assert printed.endswith("every worker has ended\n")


async def test_an_env_that_fails_and_a_worker_that_dies(tmp_path: Path) -> None:
    """The client is told what happened; it may go on after a reset, and so may the next one who leases the env."""
    async with serving(tmp_path, "--env-id=trial:Trial-v0", "--num-envs=3", "--num-workers=2") as server:
        error = (await server.ask("POST", "/sessions", 502, options={"fail": True}))["error"]
        assert error.startswith("LookupError: there is no pole\nraised by env 0 during reset, worker pid ")
        health = await server.health()
        assert (health["free_envs"], health["sessions"]) == (3, 0)
        await server.ask("POST", "/sessions", 502, options={"fail": True})  # env 1
        await server.ask("POST", "/sessions", 502, options={"fail": True})  # env 2: the next one is env 0 again
        sessions = [await server.begin() for _ in range(3)]  # env 0 and 1 in one worker, env 2 in the other
        error = (await server.ask("POST", f"{sessions[1]}/step", 502, action=BROKEN))["error"]
        assert error.startswith("LookupError: the pole broke\nraised by env 1 during step, worker pid ")
        await server.ask("POST", f"{sessions[1]}/step", 409, action=ORDINARY)
        await server.ask("POST", f"{sessions[0]}/step", 200, action=ORDINARY)
        await server.ask("DELETE", sessions[1], 204)
        sessions[1] = await server.begin()
        await server.ask("POST", f"{sessions[1]}/step", 200, action=ORDINARY)

        slow = asyncio.create_task(server.ask("POST", f"{sessions[0]}/step", 502, action=WAIT))
        await server.health(lambda health: health["pending"])
        worker = (await server.ask("POST", f"{sessions[2]}/reset", 200))["info"]["worker"]
        (killed,) = await server.workers() - {worker}
        os.kill(killed, signal.SIGKILL)
        error = (await slow)["error"]
        assert error.startswith(f"WorkerDied: the worker of envs 0, 1 (pid {killed}) was killed by SIGKILL")
        step = await server.ask("POST", f"{sessions[2]}/step", 200, action=ORDINARY)
        assert step["observation"] == [1, 1]  # the other worker has not noticed
        lost = await server.ask("POST", f"{sessions[1]}/step", 502, action=ORDINARY)
        assert f"(pid {killed}) was killed by SIGKILL" in lost["error"]
        await server.ask("POST", f"{sessions[1]}/step", 409, action=ORDINARY)
        for session in sessions[:2]:
            reset = await server.ask("POST", f"{session}/reset", 200)
            assert reset["info"]["worker"] not in {killed, worker}
            await server.ask("POST", f"{session}/step", 200, action=ORDINARY)
        code, printed, errors = await server.ends(signal.SIGTERM)
        assert (code, errors) == (0, "")
        assert "502 for env 1: LookupError: the pole broke" in printed
        assert "502 for env 0: WorkerDied" in printed


@pytest.mark.parametrize("goes_on_with", ["the same session", "another session"])
async def test_a_client_that_hangs_up_in_the_middle_of_a_step(tmp_path: Path, goes_on_with: str) -> None:
    """The step goes on, and nobody is given its answer."""
    async with serving(tmp_path, "--env-id=trial:Trial-v0", "--num-envs=1") as server:
        session = await server.begin()
        slow = asyncio.create_task(server.ask("POST", f"{session}/step", 200, action=WAIT))
        await server.health(lambda health: health["pending"])
        slow.cancel()  # httpx closes its connection
        await asyncio.wait([slow])
        health = await server.health(lambda health: not health["busy_sessions"])
        assert health["sessions"] == 1
        error = (await server.ask("POST", f"{session}/step", 409, action=ORDINARY))["error"]
        assert f"hung up during a step, and its answer is lost: POST {session}/reset" in error
        if goes_on_with == "the same session":
            begins = asyncio.create_task(server.ask("POST", f"{session}/reset", 200))
            await server.health(lambda health: health["busy_sessions"])
        else:
            await server.ask("DELETE", session, 204)
            begins = asyncio.create_task(server.ask("POST", "/sessions", 201))
            await server.health(lambda health: not health["free_envs"])
        server.gate.touch()
        begun = await begins
        assert begun["observation"] == [0, 0]
        step = await server.ask("POST", f"/sessions/{begun['session']}/step", 200, action=ORDINARY)
        assert step["observation"] == [1, 1]
        code, _printed, errors = await server.ends(signal.SIGTERM)
        assert (code, errors) == (0, "")


async def test_a_session_that_nobody_uses_is_taken_back_when_its_env_is_needed(tmp_path: Path) -> None:
    async with serving(tmp_path, "--num-envs=2", "--session-seconds=0.3") as server:
        unused, used = await server.begin(), await server.begin()
        async with asyncio.timeout(BOUND_SECONDS):
            while (await server.health())["free_envs"] != 1:
                await server.ask("POST", f"{used}/step", 200, action=0)
                await server.ask("POST", f"{used}/reset", 200)
        another = await server.begin()
        await server.ask("POST", f"{another}/step", 200)
        await server.ask("POST", f"{unused}/step", 404)
        await server.ask("POST", f"{used}/step", 200)
        code, _printed, errors = await server.ends(signal.SIGTERM)
        assert (code, errors) == (0, "")


async def test_sigterm_in_the_middle_of_it_all(tmp_path: Path) -> None:
    """Who can be answered is answered, the step that is stuck gets a 503, and nothing is left."""
    async with serving(
        tmp_path, "--env-id=trial:Trial-v0", "--num-envs=4", "--num-workers=4", "--grace-seconds=1"
    ) as server:
        statuses = Counter[int]()

        async def play() -> None:
            session = await server.begin()
            while True:
                try:
                    response = await server.client.post(f"{session}/step", json={"action": ORDINARY})
                except httpx.TransportError:  # it takes no connection any more
                    return
                statuses[response.status_code] += 1

        stuck_session = await server.begin()
        stuck = asyncio.create_task(server.ask("POST", f"{stuck_session}/step", 503, action=WAIT))
        async with asyncio.TaskGroup() as clients:
            for _ in range(3):
                clients.create_task(play())
            await server.health(lambda health: health["sessions"] == 4)
            while statuses[200] < 50:
                await asyncio.sleep(0.005)
            code, printed, errors = await server.ends(signal.SIGTERM)
        assert set(statuses) <= {200, 503}
        assert await stuck == {"error": "the server ends"}
        assert code == 0
        assert re.fullmatch(r"ERROR: +Cancel \d running task\(s\), timeout graceful shutdown exceeded\n", errors)
        assert "step has waited for env" in printed
        assert printed.endswith("every worker has ended\n")


async def test_a_step_that_hangs_is_ended_by_its_timeout(tmp_path: Path) -> None:
    async with serving(tmp_path, "--env-id=trial:Trial-v0", "--num-envs=1", "--step-timeout=0.5") as server:
        session = await server.begin()
        error = (await server.ask("POST", f"{session}/step", 502, action=WAIT))["error"]
        assert error.startswith("EnvTimeoutError: env 0 did not end step within 0.5 s")
        await server.ask("POST", f"{session}/reset", 200)
        await server.ask("POST", f"{session}/step", 200, action=ORDINARY)
        code, _printed, errors = await server.ends(signal.SIGTERM)
        assert (code, errors) == (0, "")


async def test_it_acts_by_weights_from_a_file(tmp_path: Path) -> None:
    """As `evaluate_while_training.py` leaves them. These find both actions as good, and so take the first."""
    np.save(tmp_path / "weights.npy", np.zeros((4, 2), np.float32))
    async with serving(tmp_path, "--weights=weights.npy") as server:
        session = await server.begin(seed=1)
        steps = [await server.ask("POST", f"{session}/step", 200) for _ in range(5)]
        assert [step["action"] for step in steps] == [0] * 5
        episode = await server.ask("POST", f"{session}/episode", 200, seed=1)
        assert episode["terminated"]
        assert episode["return"] == episode["length"] < 20
        code, _printed, errors = await server.ends(signal.SIGTERM)
        assert (code, errors) == (0, "")


def test_weights_that_do_not_fit_are_told_at_the_start(tmp_path: Path) -> None:
    np.save(tmp_path / "weights.npy", np.zeros((3, 2), np.float32))
    command = [sys.executable, str(EXAMPLES / "serve.py"), "--port=0", "--weights=weights.npy"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode != 0
    assert "ValueError: weights.npy has weights for another env than CartPole-v1" in ended.stderr
    assert "serving" not in ended.stdout
