"""What users pass, checked before anything is changed. Pure; each error names the argument and the way out."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from aiovec.exchange.black_box import MOST_THREADS
from aiovec.exchange.groups import MOST_GROUPS
from aiovec.exchange.messages import ResetRequest
from aiovec.pool.cpus import usable_cpus
from aiovec.pool.spaces import ObservationMode
from aiovec.pool.start import EnvFn, StartPlan

__all__ = [
    "ResetTargets",
    "check_batcher",
    "check_columns",
    "check_plan",
    "check_recv",
    "check_rollout",
    "env_ids_of",
    "reset_targets",
]

_CONTEXTS = (None, "fork", "forkserver", "spawn", "ray")
# What would have an actor outlive its vector, be shared with another one, or be built anew behind its back.
_NOT_OPTIONS = (
    "get_if_exists",
    "lifetime",
    "max_concurrency",
    "max_restarts",
    "max_task_retries",
    "name",
    "namespace",
)


def check_plan(
    env_fns: Sequence[EnvFn],
    num_workers: int | None,
    threads_per_worker: int,
    shared_memory: bool,
    copy: bool | None,
    observation_mode: ObservationMode,
    autoreset_mode: AutoresetMode | str,
    context: str | None,
    worker_options: Mapping[str, Any] | None,
    step_timeout: float | None,
    start_timeout: float,
    close_grace: float,
    max_buffers: int,
    traceback_locals: bool,
    on_failure: str,
    max_restarts: int,
) -> StartPlan:
    """The arguments of `AsyncVectorEnv`, checked and completed."""
    try:
        env_fns = tuple(env_fns)
    except TypeError:
        raise TypeError(f"env_fns={env_fns!r}: expected a sequence of functions, one an env") from None
    if not env_fns:
        raise ValueError("env_fns is empty: a vector needs at least one env")
    for index, env_fn in enumerate(env_fns):
        if not callable(env_fn):
            raise TypeError(
                f"env_fns[{index}] is {env_fn!r}, which cannot be called. Pass a function that builds the env, "
                "such as `lambda: gymnasium.make('CartPole-v1')`."
            )
    if num_workers is not None and (not _is_int(num_workers) or num_workers < 0):
        raise ValueError(f"num_workers={num_workers!r}: expected a number of processes from 0, or None")
    if not _is_int(threads_per_worker) or not 1 <= threads_per_worker <= MOST_THREADS:
        raise ValueError(
            f"threads_per_worker={threads_per_worker!r}: expected a number of threads, 1 to {MOST_THREADS}"
        )
    for name, flag in (("shared_memory", shared_memory), ("copy", copy), ("traceback_locals", traceback_locals)):
        if not isinstance(flag, bool) and not (flag is None and name == "copy"):
            raise TypeError(f"{name}={flag!r}: expected True or False{', or None' if name == 'copy' else ''}")
    if isinstance(observation_mode, tuple):
        if len(observation_mode) != 2 or not all(isinstance(space, gym.Space) for space in observation_mode):
            raise TypeError(
                f"observation_mode={observation_mode!r}: expected a pair (observation_space, single_observation_space)"
            )
    elif observation_mode not in ("same", "different"):
        raise ValueError(f"observation_mode={observation_mode!r}: expected 'same', 'different' or a pair of spaces")
    try:
        by_name = AutoresetMode.__members__  # as an enumeration prints itself, and the README's table
        is_name = isinstance(autoreset_mode, str) and autoreset_mode in by_name
        mode = by_name[str(autoreset_mode)] if is_name else AutoresetMode(autoreset_mode)
    except ValueError:
        names = ", ".join(repr(mode.value) for mode in AutoresetMode)
        raise ValueError(f"autoreset_mode={autoreset_mode!r}: expected an AutoresetMode, or one of {names}") from None
    if context not in _CONTEXTS:
        raise ValueError(f"context={context!r}: expected one of {', '.join(map(repr, _CONTEXTS))}")
    for name, seconds in (
        ("step_timeout", step_timeout),
        ("start_timeout", start_timeout),
        ("close_grace", close_grace),
    ):
        if seconds is None and name == "step_timeout":
            continue
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
            raise ValueError(f"{name}={seconds!r}: expected a number of seconds above 0")
    if not _is_int(max_buffers) or max_buffers < 1:
        raise ValueError(f"max_buffers={max_buffers!r}: expected a number of buffers from 1")
    if on_failure not in ("raise", "restart"):
        raise ValueError(f"on_failure={on_failure!r}: expected 'raise' or 'restart'")
    if not _is_int(max_restarts) or max_restarts < 1:
        raise ValueError(f"max_restarts={max_restarts!r}: expected a number of attempts from 1")
    options = _worker_options(context, num_workers, worker_options)
    if num_workers is None:
        num_workers = usable_cpus()
    if num_workers == 0 and threads_per_worker > 1:
        raise ValueError(
            f"threads_per_worker={threads_per_worker!r} with num_workers=0: envs in this process run on the loop's "
            "thread. Use a worker, or leave it out."
        )
    return StartPlan(
        env_fns,
        min(int(num_workers), len(env_fns)),
        int(threads_per_worker),
        shared_memory,
        copy,
        observation_mode,
        mode,
        context,
        options,
        start_timeout,
        step_timeout,
        close_grace,
        max_buffers,
        traceback_locals,
        on_failure,
        int(max_restarts),
    )


def _worker_options(
    context: str | None, num_workers: int | None, worker_options: Mapping[str, Any] | None
) -> dict[str, Any]:
    if worker_options is not None and not isinstance(worker_options, Mapping):
        raise TypeError(f"worker_options={worker_options!r}: expected a dict of options of Ray's actors, or None")
    options = dict(worker_options or {})
    if context != "ray":
        if options:
            raise ValueError(f"worker_options={options!r}: they are for workers on Ray, with context='ray'")
        return options
    if not num_workers:
        raise ValueError(
            f"num_workers={num_workers!r} with context='ray': say how many, from 1. How many CPUs a cluster has is not "
            "known before the start."
        )
    for name in _NOT_OPTIONS:
        if name in options:
            raise ValueError(f"worker_options has {name!r}: a vector sees itself to the life of its workers")
    if importlib.util.find_spec("ray") is None:
        raise ImportError("context='ray' needs Ray: `pip install aiovec[ray]`")
    return options


def check_batcher(function: object, max_batch_size: int, max_wait: float, max_pending: int | None) -> None:
    """The arguments of `Batcher`."""
    if not callable(function):
        raise TypeError(f"function={function!r}: expected a function of a batch of observations")
    if not _is_int(max_batch_size) or max_batch_size < 1:
        raise ValueError(f"max_batch_size={max_batch_size!r}: expected a number of observations from 1")
    is_number = isinstance(max_wait, (int, float, np.number)) and not isinstance(max_wait, bool)
    if not is_number or not 0 <= max_wait < math.inf:
        raise ValueError(f"max_wait={max_wait!r}: expected a number of seconds from 0")
    if max_pending is not None and (not _is_int(max_pending) or max_pending < max_batch_size):
        raise ValueError(
            f"max_pending={max_pending!r}: expected a number of callers from max_batch_size={max_batch_size}, or None"
        )


def env_ids_of(num_envs: int, env_ids: Sequence[int]) -> list[int]:
    """Checks which envs are meant: each exists, none twice."""
    given: Any = env_ids
    if isinstance(given, np.ndarray) and given.dtype == np.int64 and given.ndim == 1:  # those of a batch
        ids: list[int] = given.tolist()
        if ids and min(ids) >= 0 and max(ids) < num_envs and len(set(ids)) == len(ids):
            return ids
    ids = []
    try:
        env_ids = list(env_ids)
    except TypeError:
        raise TypeError(f"env_ids={env_ids!r}: expected a sequence of env indices") from None
    for env_index in env_ids:
        if not _is_int(env_index) or not 0 <= env_index < num_envs:
            raise ValueError(f"env_ids has {env_index!r}: the envs are numbered from 0 to {num_envs - 1}")
        ids.append(int(env_index))
    if not ids:
        raise ValueError("env_ids is empty: name at least one env, or leave it out for all")
    if len(set(ids)) != len(ids):
        twice = next(env_index for position, env_index in enumerate(ids) if env_index in ids[:position])
        raise ValueError(f"env_ids has {twice} twice")
    return ids


def check_recv(min_envs: int | None, max_envs: int | None) -> None:
    """The arguments of `recv`."""
    for name, value in (("min_envs", min_envs), ("max_envs", max_envs)):
        if value is not None and (not _is_int(value) or value < 1):
            raise ValueError(f"{name}={value!r}: expected a number of envs from 1, or None")
    if min_envs is not None and max_envs is not None and min_envs > max_envs:
        raise ValueError(f"min_envs={min_envs} is above max_envs={max_envs}")


def check_columns(columns: int | None) -> None:
    """That of `frames`."""
    if columns is not None and (not _is_int(columns) or columns < 1):
        raise ValueError(f"columns={columns!r}: expected a number of frames side by side from 1, or None")


def check_rollout(policy: object, num_steps: int, groups: int, fewest_envs: int, mode: AutoresetMode) -> None:
    """The arguments of `rollout`.

    Args:
        policy: As given.
        num_steps: As given.
        groups: As given.
        fewest_envs: How many envs the worker with the fewest has.
        mode: The autoreset mode.
    """
    if not callable(policy):
        raise TypeError(f"policy={policy!r}: expected a function of a batch of observations")
    if not _is_int(num_steps) or num_steps < 1:
        raise ValueError(f"num_steps={num_steps!r}: expected a number of steps from 1")
    most_groups = min(fewest_envs, MOST_GROUPS)
    if not _is_int(groups) or not 1 <= groups <= most_groups:
        raise ValueError(
            f"groups={groups!r}: expected a number of groups, 1 to {most_groups}, since each worker must have an env in "
            "each group"
        )
    if mode is AutoresetMode.DISABLED:
        raise ValueError(
            "a rollout goes on behind the end of an episode, and with autoreset_mode=DISABLED nobody resets the env. "
            "Use NEXT_STEP or SAME_STEP, or `step`."
        )


@dataclass(frozen=True)
class ResetTargets:
    """Who is reset, and how.

    Attributes:
        env_ids: The rows of the answer, in order.
        part: The same, or `None` for all envs.
        reset_ids: The envs that are reset, or `None` for all.
        unmasked: The envs whose last observation is repeated.
        seeds: By env index.
        options: For the envs; a copy.
    """

    env_ids: list[int]
    part: list[int] | None
    reset_ids: list[int] | None
    unmasked: list[int]
    seeds: Mapping[int, int | None]
    options: dict[str, Any] | None

    def request(self, own: range) -> ResetRequest | None:
        """What a worker is asked, given its envs; `None` if nothing."""
        if self.reset_ids is None:
            return ResetRequest(None, [self.seeds.get(index) for index in own], self.options, True)
        asked = [index for index in self.reset_ids if index in own]
        if not asked and not self.unmasked:
            return None
        rows = [index - own.start for index in asked]
        return ResetRequest(rows, [self.seeds.get(index) for index in asked], self.options, bool(self.unmasked))


def reset_targets(
    num_envs: int,
    seed: int | Sequence[int | None] | None,
    options: dict[str, Any] | None,
    env_ids: Sequence[int] | None,
) -> ResetTargets:
    """The arguments of `reset`, checked."""
    if options is not None and not isinstance(options, dict):
        raise TypeError(f"options={options!r}: expected a dict for the envs' reset, or None")
    mask = None
    if options is not None and "reset_mask" in options:
        mask = _checked_mask(num_envs, options["reset_mask"])
        options = {key: value for key, value in options.items() if key != "reset_mask"}
    if env_ids is not None:
        if mask is not None:
            raise ValueError("env_ids and options['reset_mask'] both say which envs to reset: use one of them")
        ids = env_ids_of(num_envs, env_ids)
        return ResetTargets(ids, ids, ids, [], _seeds(seed, ids, ids), options)
    every = list(range(num_envs))
    if mask is None or mask.all():
        return ResetTargets(every, None, None, [], _seeds(seed, every, every), options)
    masked = np.flatnonzero(mask).tolist()
    return ResetTargets(every, None, masked, np.flatnonzero(~mask).tolist(), _seeds(seed, every, every), options)


def _checked_mask(num_envs: int, mask: Any) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    expected = f"options['reset_mask'] must be a numpy array of shape ({num_envs},) and dtype bool"
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        got = mask.dtype if isinstance(mask, np.ndarray) else type(mask).__name__
        raise TypeError(f"{expected}, got {got}")
    if mask.shape != (num_envs,):
        raise ValueError(f"{expected}, got shape {mask.shape}")
    if not mask.any():
        raise ValueError("options['reset_mask'] has no True: nothing would be reset")
    return mask


def _seeds(seed: Any, for_ids: Sequence[int], ids: Sequence[int]) -> dict[int, int | None]:
    if seed is None:
        return {}
    if _is_int(seed):
        return {env_index: int(seed) + env_index for env_index in ids}
    try:
        seeds = list(seed)
    except TypeError:
        raise TypeError(f"seed={seed!r}: expected an int, a sequence with one seed an env, or None") from None
    if len(seeds) != len(for_ids):
        raise ValueError(f"seed has length {len(seeds)}, but {len(for_ids)} envs: one seed each, or a single int")
    for position, value in enumerate(seeds):
        if value is not None and not _is_int(value):
            raise TypeError(f"seed[{position}]={value!r}: expected an int or None")
    return {index: None if value is None else int(value) for index, value in zip(for_ids, seeds, strict=True)}


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
