"""Step many reinforcement-learning environments at once, in worker processes, under ``await``.

    async with aiovec.make_vec("CartPole-v1", num_envs=64) as envs:
        observations, infos = await envs.reset(seed=42)

A worker process imports this package too, and must not wait for asyncio and anyio, which it does not use: there,
and only there, the names are imported when they are first asked for.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# Set by `aiovec.pool.process`, and taken away here, so that what a worker starts does not have it.
_is_worker = os.environ.pop("AIOVEC_WORKER", None) is not None

if TYPE_CHECKING or not _is_worker:
    from aiovec.async_env import AsyncEnv
    from aiovec.batcher import Batcher, BatcherStatistics
    from aiovec.batches import ResetResult, StepBatch, StepResult, Transition
    from aiovec.blocking import BlockingVectorEnv, register_vec
    from aiovec.display import Frames
    from aiovec.errors import (
        AiovecError,
        AlreadyPendingCallError,
        BatcherClosedError,
        BatcherFullError,
        CallTimeoutError,
        ClosedEnvironmentError,
        CrashLoopError,
        EnvTimeoutError,
        Failure,
        InvalidActionsError,
        InvalidBatchResultError,
        InvalidEnvResultError,
        InvalidExtrasError,
        InvalidObservationError,
        NoAsyncCallError,
        NotStartedError,
        RemoteError,
        ResetNeeded,
        RunningLoopError,
        SlabMemoryError,
        SpaceMismatchError,
        WorkerDied,
        WorkerStartError,
        WrappedCallError,
        WrongLoopError,
        failures,
    )
    from aiovec.make import make_vec
    from aiovec.pool.spaces import ObservationMode
    from aiovec.pool.start import EnvFn
    from aiovec.rollouts import Policy, Rollout, Rollouts
    from aiovec.statistics import PendingStatistics, VectorStatistics
    from aiovec.sub_env import SubEnv
    from aiovec.vector_env import AsyncVectorEnv
    from aiovec.wrapped_env import VectorWrapperFn, WrappedVectorEnv
    from aiovec.wrapping import wrap

__all__ = [
    "AiovecError",
    "AlreadyPendingCallError",
    "AsyncEnv",
    "AsyncVectorEnv",
    "Batcher",
    "BatcherClosedError",
    "BatcherFullError",
    "BatcherStatistics",
    "BlockingVectorEnv",
    "CallTimeoutError",
    "ClosedEnvironmentError",
    "CrashLoopError",
    "EnvFn",
    "EnvTimeoutError",
    "Failure",
    "Frames",
    "InvalidActionsError",
    "InvalidBatchResultError",
    "InvalidEnvResultError",
    "InvalidExtrasError",
    "InvalidObservationError",
    "NoAsyncCallError",
    "NotStartedError",
    "ObservationMode",
    "PendingStatistics",
    "Policy",
    "RemoteError",
    "ResetNeeded",
    "ResetResult",
    "Rollout",
    "Rollouts",
    "RunningLoopError",
    "SlabMemoryError",
    "SpaceMismatchError",
    "StepBatch",
    "StepResult",
    "SubEnv",
    "Transition",
    "VectorStatistics",
    "VectorWrapperFn",
    "WorkerDied",
    "WorkerStartError",
    "WrappedCallError",
    "WrappedVectorEnv",
    "WrongLoopError",
    "failures",
    "make_vec",
    "register_vec",
    "wrap",
]

_HOMES = {
    "AsyncEnv": "aiovec.async_env",
    "AsyncVectorEnv": "aiovec.vector_env",
    "Batcher": "aiovec.batcher",
    "BatcherStatistics": "aiovec.batcher",
    "BlockingVectorEnv": "aiovec.blocking",
    "EnvFn": "aiovec.pool.start",
    "Frames": "aiovec.display",
    "ObservationMode": "aiovec.pool.spaces",
    "PendingStatistics": "aiovec.statistics",
    "Policy": "aiovec.rollouts",
    "ResetResult": "aiovec.batches",
    "Rollout": "aiovec.rollouts",
    "Rollouts": "aiovec.rollouts",
    "StepBatch": "aiovec.batches",
    "StepResult": "aiovec.batches",
    "SubEnv": "aiovec.sub_env",
    "Transition": "aiovec.batches",
    "VectorStatistics": "aiovec.statistics",
    "VectorWrapperFn": "aiovec.wrapped_env",
    "WrappedVectorEnv": "aiovec.wrapped_env",
    "make_vec": "aiovec.make",
    "register_vec": "aiovec.blocking",
    "wrap": "aiovec.wrapping",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'aiovec' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES.get(name, "aiovec.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
