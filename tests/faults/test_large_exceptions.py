"""An exception that carries much, or takes long to unpickle: it arrives as itself, and the loop goes on meanwhile."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_envs import (
    BOUND_SECONDS,
    LADEN_LENGTH,
    LADEN_NBYTES,
    Faulty,
    Laden,
    an_error,
    error_of_a_module,
    laden_with_an_array,
    laden_with_bytes,
    laden_with_objects,
)

from aiovec import AsyncVectorEnv, failures


def vector(moment: str, make_error: Callable[[], BaseException], on_failure: Any) -> AsyncVectorEnv:
    """Two envs, of which the second raises at a moment."""
    env_fns = [
        functools.partial(Faulty, "never", an_error),
        functools.partial(Faulty, moment, make_error, offset=1),
    ]
    return AsyncVectorEnv(env_fns, num_workers=2, on_failure=on_failure)


async def failure_of(envs: AsyncVectorEnv, moment: str, on_failure: str) -> Any:
    """What the second env raises, wherever that is told; the first one is whole, and both are after a reset."""
    await envs.reset()
    call = functools.partial(envs.step, [1, 1]) if moment == "step" else lambda: envs.reset(options={"fail": True})
    (error,) = await asyncio.gather(call(), return_exceptions=True)
    if on_failure == "restart":
        *_, infos = error
        assert infos["_failure"].tolist() == [False, True]
        error = infos["failure"][1]
    assert [(failure.env_index, failure.command) for failure in failures(error)] == [(1, moment)]
    assert any(f"env 1 during {moment}" in note for note in error.__notes__)
    assert await envs.get_attr("episodes", env_ids=[0]) == (1 if moment == "step" else 2,)
    await envs.reset()
    observations, *_ = await envs.step([0, 0])
    assert observations[:, 2].tolist() == [1, 1]
    return error


def has_its_array(error: Laden) -> bool:
    text, array = error.args
    return text == "laden" and np.array_equal(array, np.arange(LADEN_NBYTES // 8))


def has_its_bytes(error: Laden) -> bool:
    return error.args == ("laden", b"\x07" * LADEN_NBYTES)


def has_its_objects(error: Laden) -> bool:
    some = range(0, LADEN_LENGTH, 1000)  # to compare them all would hold up the loop
    return (
        error.args == ("laden",)
        and len(error.load) == LADEN_LENGTH
        and all(error.load[i] == f"number {i}" for i in some)
    )


LOADS: dict[str, tuple[Callable[[], Laden], Callable[[Laden], bool]]] = {
    "array": (laden_with_an_array, has_its_array),
    "bytes": (laden_with_bytes, has_its_bytes),
    "objects": (laden_with_objects, has_its_objects),
}
CASES = [
    ("array", "step", "raise"), ("array", "reset", "raise"), ("array", "step", "restart"),
    ("objects", "step", "raise"), ("objects", "step", "restart"),
    ("bytes", "reset", "raise"),
]  # fmt: skip


@pytest.mark.parametrize(("load", "moment", "on_failure"), CASES)
async def test_an_exception_that_carries_much(load: str, moment: str, on_failure: str) -> None:
    """A hundred megabytes, or two million objects; the heartbeat goes on."""
    make_error, is_whole = LOADS[load]
    async with asyncio.timeout(3 * BOUND_SECONDS), vector(moment, make_error, on_failure) as envs:
        error = await failure_of(envs, moment, on_failure)
        assert type(error) is Laden
        assert await asyncio.to_thread(is_whole, error)  # which takes as long as aiovec itself


@pytest.fixture
def slow_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that only its first import makes known, and that takes a second for it, as a large one."""
    name = f"slow_module_of_{tmp_path.name}"
    source = "import time\ntime.sleep(1)\n\nclass OfAModule(Exception):\n    pass\n"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


@pytest.mark.parametrize("on_failure", ["raise", "restart"])
async def test_an_exception_whose_module_is_imported_for_it(on_failure: str, slow_module: str) -> None:
    """Few bytes may take long, too."""
    make_error = functools.partial(error_of_a_module, slow_module)
    async with asyncio.timeout(BOUND_SECONDS), vector("step", make_error, on_failure) as envs:
        error = await failure_of(envs, "step", on_failure)
        assert type(error) is sys.modules[slow_module].OfAModule
        assert error.args == ("An error occurred.",)
