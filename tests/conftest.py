"""What holds for every test: the loop is never blocked, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import inspect
import signal
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from multiprocessing import forkserver, resource_tracker
from typing import Any

import pytest

import aiovec
from aiovec.testing.observing import Heartbeat, held_by_process

# A shell that starts something in the background has it ignore Ctrl-C, and children inherit that: the programs
# that tests start must not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What a thread of ours waited for a CPU of a loaded machine is not counted; a start or a join on the loop takes longer.
LONGEST_GAP_SECONDS = 0.5
GONE_WITHIN_SECONDS = 2.0
ACTORS_GONE_WITHIN_SECONDS = 10.0

EVENT_LOOPS = {"asyncio": ("asyncio", {}), "uvloop": ("asyncio", {"use_uvloop": True})}


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--sample 8``: one of eight cases of each test, and all of those that are marked `every_python`."""
    parser.addoption("--sample", type=int, default=1, help="run one of so many cases of each test")
    parser.addoption("--ray", action="store_true", help="every worker is an actor on a local Ray")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Takes the sample: of each test at least one case, the same each time, and not always the first. On Ray: no others."""
    for item in items if config.getoption("--ray") else ():
        if (local := item.get_closest_marker("not_on_ray")) is not None:
            item.add_marker(pytest.mark.skip(reason=local.args[0]))
    every = config.getoption("--sample")
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    chosen: set[pytest.Item] = set()
    for test, of_test in cases.items():
        if of_test[0].get_closest_marker("every_python") is not None and not config.getoption("--ray"):
            chosen.update(of_test)
        else:
            chosen.update(of_test[zlib.crc32(test.encode()) % min(every, len(of_test)) :: every])
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


@pytest.fixture(params=list(EVENT_LOOPS.values()), ids=list(EVENT_LOOPS))
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """Every asynchronous test runs on both event loops."""
    if request.param[1]:
        pytest.importorskip("uvloop")
    backend: tuple[str, dict[str, bool]] = request.param
    return backend


@pytest.fixture(scope="session", autouse=True)
def helpers_of_others() -> None:
    """Starts what stays for the life of a process and is not ours: it must not count as left behind."""
    resource_tracker.ensure_running()
    forkserver.ensure_running()
    with contextlib.suppress(ImportError):
        import uvloop

        uvloop.run(asyncio.sleep(0))  # opens its global wake-up pipe


@pytest.fixture(scope="session", autouse=True)
def on_ray(request: pytest.FixtureRequest) -> Iterator[bool]:
    """With ``--ray``: whatever workers a test asks for are actors on a local Ray."""
    if not request.config.getoption("--ray"):
        yield False
        return
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patched:
        original = aiovec.AsyncVectorEnv.__init__

        def init(envs: aiovec.AsyncVectorEnv, env_fns: Any, **options: Any) -> None:
            if options.get("num_workers") != 0:
                options["context"] = "ray"
                if options.get("num_workers") is None:
                    options["num_workers"] = 2
            original(envs, env_fns, **options)

        patched.setattr(aiovec.AsyncVectorEnv, "__init__", init)
        ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        yield True
        ray.shutdown()


@pytest.fixture(scope="module", autouse=True)
def nothing_old_to_collect() -> Iterator[None]:
    """What is there by now is no garbage: to walk through it after each test, and in each forked worker, takes 0.1 s."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_left_behind(helpers_of_others: None, on_ray: bool) -> Iterator[None]:
    """Fails a test after which there is a new child, descriptor or file in /dev/shm; on Ray, an actor."""
    if on_ray:
        yield
        no_actor_left()
        return
    before = held_by_process()
    yield
    deadline = time.monotonic() + GONE_WITHIN_SECONDS
    while True:
        gc.collect()
        left = {kind: sorted(now - before[kind]) for kind, now in held_by_process().items() if now - before[kind]}
        if not left:
            return
        if time.monotonic() > deadline:
            pytest.fail(f"left behind: {left}")
        time.sleep(0.02)


def no_actor_left() -> None:
    """Fails while an actor lives, or waits for its place; Ray's own descriptors come and go."""
    state = importlib.import_module("ray._private.state")
    deadline = time.monotonic() + ACTORS_GONE_WITHIN_SECONDS
    while alive := [actor["ActorID"] for actor in state.actors().values() if actor["State"] != "DEAD"]:
        if time.monotonic() > deadline:
            pytest.fail(f"left behind: the actors {alive}")
        time.sleep(0.02)


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: pytest.Module | pytest.Class, name: str, obj: object) -> None:
    """Every asynchronous test has the heartbeat."""
    if collector.istestfunction(obj, name) and inspect.iscoroutinefunction(obj):
        pytest.mark.usefixtures("loop_never_blocked")(obj)


@pytest.fixture
async def loop_never_blocked(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """Fails a test in which a heartbeat on the loop waited for long; `blocks_loop` marks where that is meant."""
    async with Heartbeat(LONGEST_GAP_SECONDS, to_the_end=False) as heartbeat:
        yield
    if request.node.get_closest_marker("blocks_loop") is None and heartbeat.longest_gap > LONGEST_GAP_SECONDS:
        pytest.fail(f"the event loop was blocked for {heartbeat.longest_gap:.2f} s")
