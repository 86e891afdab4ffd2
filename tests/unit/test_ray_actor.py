"""The actor without Ray: calls bring requests and take replies, in whichever order either comes."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from sample_envs import Counter

from aiovec.exchange import pickles, replies
from aiovec.exchange.frames import FrameKind
from aiovec.exchange.messages import BuildRequest
from aiovec.exchange.ray_messages import Ask, Told, by_itself, opened
from aiovec.worker.ray_actor import EnvActor

BOUND_SECONDS = 10.0


class Waiting(gym.Env[Any, Any]):
    """Its construction waits until it is let on."""

    observation_space = gym.spaces.Discrete(1)
    action_space = gym.spaces.Discrete(1)
    may_go_on = threading.Event()

    def __init__(self) -> None:
        assert self.may_go_on.wait(BOUND_SECONDS)


def request(kind: FrameKind, seq: int, message: Any = None) -> tuple[int, int, int, bytes, int]:
    """A frame."""
    return int(kind), seq, 0, b"" if message is None else pickles.dumps_to_worker(message), 0


def build(env: Callable[[], Any], num_envs: int = 2, num_threads: int = 1) -> BuildRequest:
    """Build these."""
    env_fns = (pickles.dumps_to_worker(env),) * num_envs
    return BuildRequest(range(num_envs), env_fns, AutoresetMode.NEXT_STEP, num_threads=num_threads)


def ask(actor: EnvActor, number: int, num_replies: int, frame: Any) -> Told:
    """One call."""
    return Told(*opened(actor.exchange(by_itself(Ask(number, num_replies, frame), 0))))


def beside(function: Callable[[], Any]) -> Future[Any]:
    """Calls it in a thread, as Ray does."""
    future: Future[Any] = Future()
    threading.Thread(target=lambda: future.set_result(function()), daemon=True).start()
    return future


def test_a_request_is_done_in_its_call() -> None:
    """What cannot be read is refused, as behind a socket; and what the parent imports can be imported."""
    actor = EnvActor(3, 2, [*sys.path, "/not/there"])
    assert repr(actor) == "aiovec worker 3"
    assert sys.path.pop() == "/not/there"
    told = ask(actor, 0, 1, (int(FrameKind.CALL), 5, 0, b"nonsense", 0))
    ((seq, data, arrays),) = told.replies
    assert (told.number, seq, list(arrays)) == (0, 5, [])
    assert replies.loads(data).failures == []  # it holds no env yet
    told = ask(actor, 1, 1, request(FrameKind.BUILD, 6, build(Counter)))
    ((seq, data, _),) = told.replies
    assert (told.number, seq) == (1, 6)
    assert replies.loads(data).spaces[0].env_ids == [0, 1]
    assert actor.look(True) == ([], "")
    assert len(told.times) == 1 + 4 * 2
    ((seq, _, _),) = ask(actor, 2, 1, request(FrameKind.CLOSE, 7)).replies
    assert seq == 7


def test_requests_are_taken_in_order() -> None:
    """Whichever call comes first."""
    actor = EnvActor(0, 2, ())
    early = ask(actor, 1, 1, request(FrameKind.CLOSE, 7))
    assert list(early.replies) == []
    both = ask(actor, 0, 1, request(FrameKind.BUILD, 6, build(Counter)))
    assert [seq for seq, _, _ in both.replies] == [6, 7]
    assert (early.number, both.number) == (0, 1)


def test_replies_that_come_later() -> None:
    """Another call waits for them; one that has nothing to wait for any more comes back."""
    actor = EnvActor(0, 2, ())
    assert list(Told(*opened(actor.more())).replies) == []
    Waiting.may_go_on.clear()
    own = EnvActor(0, 1, ())
    with actor._changed:
        actor._num_due = 1
    waiting = beside(actor.more)
    assert not waiting.done()
    actor._reply(4, b"", ())
    assert [seq for seq, _, _ in Told(*opened(waiting.result(BOUND_SECONDS))).replies] == [4]
    Waiting.may_go_on.set()
    assert ask(own, 0, 1, request(FrameKind.BUILD, 1, build(Waiting, 1))).replies


def test_what_its_envs_do() -> None:
    """Which one is called, and the stack of its thread, as the parent is told where `faulthandler` cannot."""
    Waiting.may_go_on.clear()
    actor = EnvActor(0, 1, ())
    built = beside(lambda: ask(actor, 0, 1, request(FrameKind.BUILD, 1, build(Waiting, 1))))
    deadline = time.monotonic() + BOUND_SECONDS
    while not (look := actor.look(True)).doing:
        assert time.monotonic() < deadline
    assert [doing[0] for doing in look.doing] == [0]
    assert "in __init__" in look.stack
    assert "/aiovec/" not in look.stack
    Waiting.may_go_on.set()
    assert built.result(BOUND_SECONDS).replies


@pytest.mark.parametrize("nbytes", [100, 1 << 20])
def test_large_arrays_are_left_to_ray(nbytes: int) -> None:
    """All else is bytes."""
    rows = [np.zeros(nbytes, np.uint8)]
    told = Told(3, [(7, b"x", rows)], [0.0])
    given = by_itself(told, nbytes)
    assert (type(given) is bytes) == (nbytes < 1 << 16)
    number, ((seq, data, arrays),), _ = opened(given)
    assert (number, seq, data) == (3, 7, b"x")
    np.testing.assert_array_equal(arrays[0], rows[0])
