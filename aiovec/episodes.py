"""Returns and lengths of the episodes that end in rollouts, of those included that began in an earlier one: pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["Episodes"]


class Episodes:
    """The episodes that are going on.

    Args:
        num_envs: How many envs.
    """

    def __init__(self, num_envs: int) -> None:
        self._returns = np.zeros(num_envs)
        self._lengths = np.zeros(num_envs, np.int64)

    def __repr__(self) -> str:
        return f"<Episodes of {len(self._lengths)} envs>"

    def restart(self, env_ids: Sequence[int] | None = None) -> None:
        """These envs, or all, have begun an episode; or were stepped elsewhere, and count from here."""
        chosen = slice(None) if env_ids is None else list(env_ids)
        self._returns[chosen] = 0
        self._lengths[chosen] = 0

    def add(
        self, rewards: npt.NDArray[np.float64], ended: npt.NDArray[np.bool_], autoresets: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Takes the steps of a rollout.

        Args:
            rewards: `[T, N]`.
            ended: `[T, N]`: whether a step ended its episode.
            autoresets: `[T, N]`: rows that are no steps.

        Returns:
            Returns and lengths of the episodes that ended, by step, then by env.
        """
        num_steps, num_envs = rewards.shape
        # Env by env, one row behind the other: a segment begins with each env, and behind each end.
        flat_ends = ended.T.ravel()
        last = np.flatnonzero(flat_ends)
        starts = np.unique(np.concatenate([np.arange(num_envs) * num_steps, last[last + 1 < flat_ends.size] + 1]))
        with np.errstate(invalid="ignore"):  # an infinity and its opposite are NaN, and no reason to warn
            returns = np.add.reduceat(np.where(autoresets, 0.0, rewards).T.ravel(), starts)
            is_first = starts % num_steps == 0
            returns[is_first] += self._returns
        lengths = np.add.reduceat((~autoresets).T.ravel().astype(np.int64), starts)
        envs = starts // num_steps
        lengths[is_first] += self._lengths
        stops = np.append(starts[1:], flat_ends.size)
        has_ended = flat_ends[stops - 1]
        self._returns[:] = 0
        self._lengths[:] = 0
        going_on = ~has_ended
        self._returns[envs[going_on]] = returns[going_on]
        self._lengths[envs[going_on]] = lengths[going_on]
        by_step = np.argsort((stops - 1)[has_ended] % num_steps, kind="stable")
        return returns[has_ended][by_step], lengths[has_ended][by_step]
