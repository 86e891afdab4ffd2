"""The actor without Ray: calls bring requests and take replies, in whichever order either comes."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest
from gymnasium.vector import AutoresetMode
from sample_envs import Counter

from aiovec.exchange import pickles, replies
from aiovec.exchange.frames import FrameKind
from aiovec.exchange.messages import BuildRequest
from aiovec.worker.ray_actor import EnvActor

pytestmark = pytest.mark.anyio


def reply(actor: EnvActor, seq: int) -> None:
    """As an env's thread does, on the loop at once."""
    actor._take((seq, b"", ()))


class Silent(EnvActor):
    """Its envs never answer by themselves."""

    def _serve(self) -> None:
        pass


@pytest.fixture
def actor() -> EnvActor:
    """One whose replies the test gives."""
    return Silent(0, 4, ())


async def calls(*asks: tuple[Any, ...], actor: EnvActor) -> list[asyncio.Task[Any]]:
    """Calls that have begun to wait."""
    tasks = [asyncio.ensure_future(actor.exchange(ask)) for ask in asks]
    await asyncio.sleep(0)
    return tasks


def seqs(task: asyncio.Task[Any]) -> list[int]:
    """Of the replies that a call has taken back."""
    return [seq for seq, _, _ in task.result()[1]]


REQUEST = (int(FrameKind.STEP), 7, 0, b"", 0)


async def test_a_call_waits_for_a_reply(actor: EnvActor) -> None:
    """And takes all that is there then."""
    (call,) = await calls((0, 3, REQUEST), actor=actor)
    assert not call.done()
    reply(actor, 7)
    reply(actor, 8)
    await asyncio.sleep(0)
    assert seqs(call) == [7]
    (more,) = await calls((1, 0, None), actor=actor)
    await asyncio.sleep(0)
    assert seqs(more) == [8]
    (last,) = await calls((2, 0, None), actor=actor)
    assert not last.done()
    reply(actor, 9)
    await asyncio.sleep(0)
    assert seqs(last) == [9]


async def test_a_call_with_nothing_to_wait_for_comes_back(actor: EnvActor) -> None:
    """The replies to two requests came together, by the first call."""
    first, second = await calls((0, 1, REQUEST), (1, 1, REQUEST), actor=actor)
    actor._replies += [(7, b"", ())]
    reply(actor, 8)
    await asyncio.sleep(0)
    assert seqs(first) == [7, 8]
    assert seqs(second) == []
    assert (first.result()[0], second.result()[0]) == (0, 1)


async def test_requests_are_taken_in_order(actor: EnvActor) -> None:
    """Whichever call comes first."""
    await calls((1, 1, (2, 1, 0, b"", 0)), actor=actor)
    assert actor._link._requests.empty()
    await calls((0, 1, (1, 0, 0, b"", 0)), actor=actor)
    assert [actor._link._requests.get().seq for _ in range(2)] == [0, 1]
    for seq in (0, 1):
        reply(actor, seq)


async def test_what_fails_in_it_is_raised_by_each_call() -> None:
    """Else the parent would wait for ever."""

    class Crashing(EnvActor):
        def _serve(self) -> None:
            self._link._requests.get()
            self._crash = OSError("no more")
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._give)

    actor = Crashing(0, 1, ())
    first = asyncio.ensure_future(actor.exchange((0, 1, REQUEST)))
    with pytest.raises(OSError, match="no more"):
        await first
    with pytest.raises(OSError, match="no more"):
        await actor.exchange((1, 0, None))


async def test_real_envs_behind_it() -> None:
    """A request that cannot be read is answered, as behind a socket; and its path is that of the parent."""
    actor = EnvActor(3, 2, [*sys.path, "/not/there"])
    assert repr(actor) == "aiovec worker 3"
    assert sys.path.pop() == "/not/there"
    told = await actor.exchange((0, 1, (int(FrameKind.CALL), 5, 0, b"nonsense", 0)))
    assert told[0] == 0
    ((seq, data, arrays),) = told[1]
    assert (seq, arrays) == (5, ())
    assert replies.loads(data).failures == []  # it holds no env yet
    look = await actor.look(True)
    assert (look.doing, look.stack) == ([], "")

    build = BuildRequest(range(2), (pickles.dumps_to_worker(Counter),) * 2, AutoresetMode.NEXT_STEP)
    told = await actor.exchange((1, 1, (int(FrameKind.BUILD), 6, 0, pickles.dumps_to_worker(build), 0)))
    ((seq, data, _),) = told[1]
    assert seq == 6
    assert replies.loads(data).spaces[0].env_ids == [0, 1]
    told = await actor.exchange((2, 1, (int(FrameKind.CLOSE), 7, 0, b"", 0)))
    assert told[1][0][0] == 7
