"""What the payloads of requests and replies hold.

`pool` builds requests and reads replies, `worker` the other way round; a backend that has no socket (a
worker in the parent's own process) hands these very objects over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium as gym
import numpy.typing as npt
from gymnasium.vector import AutoresetMode

from aiovec.exchange.failures import FailureRecord
from aiovec.exchange.infos import Columns
from aiovec.exchange.packed_infos import PackedInfos

__all__ = [
    "BatchReply",
    "BuildReply",
    "BuildRequest",
    "CallReply",
    "CallRequest",
    "MapRequest",
    "RebuildRequest",
    "ResetRequest",
    "SetAttrRequest",
    "SpaceFacts",
]


@dataclass(frozen=True)
class BuildRequest:
    """Build your envs.

    Attributes:
        env_ids: The contiguous envs of this worker.
        env_fns: One an env; pickled where they must travel, and the same ones pickled and sent once.
        autoreset_mode: For all of them.
        traceback_locals: Whether a failure bears the variables of its frames.
        max_restarts: How often in a row an env that failed is built anew before it is used again; `None`: never.
        num_threads: How many threads share the envs that are not async.
        step_timeout: Seconds for each call of an async env, which is cancelled then.
        close_grace: Seconds for it to clean up.
    """

    env_ids: range
    env_fns: tuple[bytes | Callable[[], gym.Env[Any, Any]], ...]
    autoreset_mode: AutoresetMode
    traceback_locals: bool = False
    max_restarts: int | None = None
    num_threads: int = 1
    step_timeout: float | None = None
    close_grace: float = 3.0


@dataclass(frozen=True)
class RebuildRequest:
    """Build your envs in place of a worker that died.

    Attributes:
        build: The `BuildRequest` of that worker, as it was prepared for it; pickled by the time that it travels.
        delay: Seconds to wait before.
        asynchronous: The rows that hold async envs.
        lost: The rows whose loss was not told yet: the first step of each fails with `exchange.failures.EnvLost`.
    """

    build: Any
    delay: float = 0.0
    lost: Sequence[int] = ()
    asynchronous: Sequence[int] = ()


@dataclass(frozen=True)
class SpaceFacts:
    """The spaces that some envs share.

    Attributes:
        env_ids: The envs.
        observation_space: Of each of them.
        action_space: Of each of them.
    """

    env_ids: list[int]
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]


@dataclass(frozen=True)
class BuildReply:
    """The envs are built, or some failed.

    Attributes:
        spaces: The distinct pairs of spaces, with the envs that have them.
        metadata: Of the first env.
        render_mode: Of the first env.
        asynchronous: The worker's rows that hold an `AsyncEnv`.
        failures: Envs that could not be built; then the rest is empty.
    """

    spaces: list[SpaceFacts]
    metadata: dict[str, Any]
    render_mode: str | None
    asynchronous: list[int]
    failures: list[FailureRecord]


@dataclass(frozen=True)
class MapRequest:
    """Map the slab: what `exchange.slab.Geometry` needs, and whether the memory is shared at all.

    Attributes:
        worker_index: Whose reply area is this worker's.
    """

    num_envs: int
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    num_workers: int
    worker_index: int
    shared: bool


@dataclass(frozen=True)
class ResetRequest:
    """Reset some envs.

    Attributes:
        rows: Which of the worker's envs, or `None` for all.
        seeds: One for each of them.
        options: For all of them.
        whole_batch: Whether the rows of the worker's other envs are part of the answer (`reset_mask`).
    """

    rows: Sequence[int] | None
    seeds: Sequence[int | None]
    options: dict[str, Any] | None
    whole_batch: bool


@dataclass(frozen=True)
class CallRequest:
    """Call a method of some envs, or get an attribute that is not callable."""

    rows: Sequence[int] | None
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class SetAttrRequest:
    """Set an attribute of some envs, a value each."""

    rows: Sequence[int] | None
    name: str
    values: Sequence[Any]


class BatchReply(NamedTuple):
    """What `step` and `reset` answer beside the slab; as bytes see `exchange.replies`.

    A named tuple, since it is on the step path: it pickles in a third of a dataclass's time.

    Attributes:
        infos: Columns by env index, or packed where that is all there is to say.
        dynamic: For each leaf without a fixed size the values of the answered rows.
        failures: The envs that failed; their rows hold nothing of this call.
        arrays: The answered rows of the buffer, where no memory is shared; not part of the bytes.
    """

    infos: Columns | PackedInfos
    dynamic: Sequence[list[Any]] = ()
    failures: Sequence[FailureRecord] = ()
    arrays: Sequence[npt.NDArray[Any]] = ()


@dataclass(frozen=True)
class CallReply:
    """Results in the order of the rows asked for, and the envs that failed."""

    results: list[Any]
    failures: list[FailureRecord]
