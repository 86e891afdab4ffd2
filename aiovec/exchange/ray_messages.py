"""What a parent and an actor on Ray tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy.typing as npt

from aiovec.exchange import pickles

__all__ = ["LARGE_NBYTES", "About", "Arrays", "Ask", "Look", "Request", "Told", "by_itself", "opened"]

Arrays = Sequence[npt.NDArray[Any]]
Request = tuple[int, int, int, Any, int]  # a frame

LARGE_NBYTES = 1 << 16  # Ray's own limit for what it sends without its object store is 100 KB


class Ask(NamedTuple):
    """What a call brings.

    Attributes:
        number: Of the call.
        num_replies: How many replies its request will have.
        request: A frame.
    """

    number: int
    num_replies: int
    request: Request


class Told(NamedTuple):
    """What a call takes back.

    Attributes:
        number: Of this.
        replies: Of each the number of its request, its bytes, and its rows.
        times: See `exchange.black_box.OpenBlackBox.times`.
    """

    number: int
    replies: Sequence[tuple[int, bytes, Arrays]]
    times: Sequence[float]


class About(NamedTuple):
    """Where an actor is."""

    pid: int
    node_id: str
    address: str
    actor_id: str


class Look(NamedTuple):
    """What an actor does at this moment.

    Attributes:
        doing: See `exchange.black_box.BlackBox.doing`, as plain integers.
        stack: The Python stack of its envs, innermost call first, if asked for.
    """

    doing: Sequence[tuple[int, int, int, int]]
    stack: str


def by_itself(message: Ask | Told, nbytes: int) -> Any:
    """A message as Ray is given it: as bytes, which costs Ray a third less, but where they would be many.

    Then it is a tuple whose arrays Ray puts into its object store, from where they are read without a copy.
    """
    return pickles.dumps_to_parent(tuple(message)) if nbytes < LARGE_NBYTES else tuple(message)


def opened(given: Any) -> Any:
    """The message again, as a plain tuple."""
    return pickles.loads(given) if type(given) is bytes else given
