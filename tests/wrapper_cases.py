"""Each of Gymnasium's vector wrappers with an env that suits it, and a script that plays it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv, VectorEnv
from gymnasium.wrappers import TransformAction as SingleTransformAction
from gymnasium.wrappers import TransformObservation as SingleTransformObservation
from gymnasium.wrappers import TransformReward as SingleTransformReward
from gymnasium.wrappers import vector as wrappers

NUM_ENVS = 3
NUM_STEPS = 40
HEIGHT, WIDTH = 32, 48


class Painted(gym.Env[Any, Any]):
    """Observations, actions, rewards and frames of a chosen kind, drawn from its own generator; episodes of 7 steps."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 1000}  # noqa: RUF012  as Gymnasium has it

    def __init__(self, kind: str = "vector", render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        vector = gym.spaces.Box(-2, 2, (6,), np.float32)
        image = gym.spaces.Box(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
        nested = gym.spaces.Dict({"vector": vector, "image": image})
        self.observation_space = {"vector": vector, "image": image, "dict": nested}[kind]
        self.action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        self.steps = 0

    def _observation(self) -> Any:
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        return self.observation_space.sample()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._observation(), {"level": float((options or {}).get("level", 0))}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        reward = float(np.sum(action) + self.np_random.normal())
        return self._observation(), reward, self.steps >= 7, False, {"action": np.asarray(action), "steps": self.steps}

    def render(self) -> Any:
        frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        frame[:, : 5 * self.steps] = 50 + 20 * self.steps
        return frame


Wrap = Callable[[VectorEnv[Any, Any, Any]], VectorEnv[Any, Any, Any]]


@dataclass(frozen=True)
class Case:
    """A wrapper around some envs.

    Attributes:
        wrap: What is put around the vector.
        kind: Of the envs; see `Painted`.
        needs: Modules without which it cannot be tested.
        render_mode: Of the envs.
        sees: What a test compares beside the results, of the outermost wrapper.
        takes_mask: Whether a reset of some envs is part of the script; JAX's wrappers turn the mask into an array of
            theirs, which Gymnasium's vectors refuse, as ours does.
    """

    wrap: Wrap
    kind: str = "vector"
    needs: tuple[str, ...] = ()
    render_mode: str | None = None
    sees: Callable[[Any], Any] = lambda _envs: None
    takes_mask: bool = True


def twice(values: Any) -> Any:
    return values * 2


def half(values: Any) -> Any:
    return values / 2


def screen(_envs: Any) -> Any:
    """The picture that is shown to the human."""
    import pygame

    return pygame.surfarray.array3d(pygame.display.get_surface())


def counted(envs: Any) -> Any:
    return envs.episode_count, list(envs.return_queue), list(envs.length_queue)


def array_conversion(envs: Any) -> Any:
    import torch
    from array_api_compat import numpy  # noqa: F401  ArrayConversion asks for these

    return wrappers.ArrayConversion(envs, env_xp=np, target_xp=torch)


BOX = gym.spaces.Box(-4, 4, (6,), np.float32)

CASES: dict[str, Case] = {
    "RecordEpisodeStatistics": Case(wrappers.RecordEpisodeStatistics, sees=counted),
    "DictInfoToList": Case(wrappers.DictInfoToList),
    "TransformObservation": Case(partial(wrappers.TransformObservation, func=twice, single_observation_space=BOX)),
    "VectorizeTransformObservation": Case(
        partial(
            wrappers.VectorizeTransformObservation,
            wrapper=SingleTransformObservation,
            func=twice,
            observation_space=BOX,
        )
    ),
    "FilterObservation": Case(partial(wrappers.FilterObservation, filter_keys=["vector"]), kind="dict"),
    "FlattenObservation": Case(wrappers.FlattenObservation, kind="dict"),
    "GrayscaleObservation": Case(wrappers.GrayscaleObservation, kind="image"),
    "ResizeObservation": Case(partial(wrappers.ResizeObservation, shape=(16, 20)), kind="image", needs=("cv2",)),
    "ReshapeObservation": Case(partial(wrappers.ReshapeObservation, shape=(2, 3))),
    "RescaleObservation": Case(partial(wrappers.RescaleObservation, min_obs=0, max_obs=1)),
    "DtypeObservation": Case(partial(wrappers.DtypeObservation, dtype=np.float64)),
    "NormalizeObservation": Case(wrappers.NormalizeObservation, sees=lambda envs: envs.obs_rms.mean),
    "TransformAction": Case(partial(wrappers.TransformAction, func=half)),
    "VectorizeTransformAction": Case(
        partial(wrappers.VectorizeTransformAction, wrapper=SingleTransformAction, func=half, action_space=None)
    ),
    "ClipAction": Case(wrappers.ClipAction),
    "RescaleAction": Case(partial(wrappers.RescaleAction, min_action=-0.5, max_action=0.5)),
    "TransformReward": Case(partial(wrappers.TransformReward, func=twice)),
    "VectorizeTransformReward": Case(
        partial(wrappers.VectorizeTransformReward, wrapper=SingleTransformReward, func=twice)
    ),
    "ClipReward": Case(partial(wrappers.ClipReward, min_reward=-0.5, max_reward=0.5)),
    "NormalizeReward": Case(wrappers.NormalizeReward, sees=lambda envs: envs.return_rms.mean),
    "HumanRendering": Case(wrappers.HumanRendering, needs=("pygame", "cv2"), render_mode="rgb_array", sees=screen),
    "RecordVideo": Case(
        partial(wrappers.RecordVideo, video_folder="videos", episode_trigger=lambda episode: episode % 2 == 0),
        needs=("moviepy",),
        render_mode="rgb_array",
        sees=lambda envs: (envs.recording, [frame.copy() for frame in envs.recorded_frames]),
    ),
    "ArrayConversion": Case(array_conversion, needs=("torch", "array_api_compat")),
    "JaxToNumpy": Case(lambda envs: wrappers.JaxToNumpy(envs), needs=("jax",), takes_mask=False),
    "JaxToTorch": Case(lambda envs: wrappers.JaxToTorch(envs), needs=("jax", "torch"), takes_mask=False),
    "NumpyToTorch": Case(lambda envs: wrappers.NumpyToTorch(envs), needs=("torch", "array_api_compat")),
}


class FairSync(SyncVectorEnv):
    """Leaves the caller's options as they are; Gymnasium's own takes the mask out, so that wrappers miss it."""

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        return super().reset(seed=seed, options=None if options is None else dict(options))


Script = Generator[tuple[str, Callable[[Any], Any]], Any, list[Any]]


def env_fns_of(case: Case) -> list[Callable[[], Painted]]:
    """The envs of a case; skips the test where a module is missing that the wrapper needs."""
    for module in case.needs:
        pytest.importorskip(module, reason=f"this wrapper needs {module}")
    return [partial(Painted, case.kind, case.render_mode)] * NUM_ENVS


def script(case: Case, envs: Any) -> Script:
    """Resets and steps the wrapped envs: yields what to call, is sent the result, returns all that was seen."""
    seen: list[Any] = [
        envs.observation_space,
        envs.action_space,
        envs.single_observation_space,
        envs.single_action_space,
        envs.render_mode,
        envs.metadata["autoreset_mode"],
        envs.num_envs,
    ]
    envs.action_space.seed(5)
    mask = np.array([True, False, True])
    seen.append((yield "reset", lambda: envs.reset(seed=3)))
    for step in range(NUM_STEPS):
        actions = envs.action_space.sample()
        if step == 20:
            seen.append((yield "reset", lambda: envs.reset(options={"level": 1})))
        if step == 30 and case.takes_mask:
            seen.append((yield "reset", lambda: envs.reset(options={"reset_mask": mask})))
        seen.append((yield "step", lambda actions=actions: envs.step(as_wanted(case, actions))))
        seen.append(case.sees(envs))
    return [comparable(result) for result in seen]


def as_wanted(case: Case, actions: Any) -> Any:
    """Actions as who uses the wrapper has them."""
    if "torch" in case.needs:
        import torch

        return torch.from_numpy(actions)
    return actions


def comparable(result: Any) -> Any:
    """Tensors by their kind and values; without the seconds that an episode took."""
    if isinstance(result, dict):
        return {
            key: {name: comparable(part) for name, part in value.items() if name not in ("t", "_t")}
            if key == "episode" and isinstance(value, dict)
            else comparable(value)
            for key, value in result.items()
        }
    if isinstance(result, (tuple, list)):
        return [comparable(item) for item in result]
    if type(result).__module__.partition(".")[0] in ("torch", "jax", "jaxlib"):
        return [type(result).__name__, np.asarray(result)]
    return result


def played(steps: Script) -> list[Any]:
    """Plays a script over envs whose methods block."""
    outcome = None
    while True:
        try:
            _, call = steps.send(outcome)
        except StopIteration as end:
            return list(end.value)
        outcome = call()


async def played_under_await(steps: Script) -> list[Any]:
    """Plays a script over envs whose methods are awaited."""
    outcome = None
    while True:
        try:
            _, call = steps.send(outcome)
        except StopIteration as end:
            return list(end.value)
        outcome = await call()
