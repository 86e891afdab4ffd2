"""`aiovec.wrap` and `BlockingVectorEnv` under each of Gymnasium's vector wrappers, beside `SyncVectorEnv`."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from conformance.comparing import assert_same
from fault_envs import context_of_loop
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import vector as wrappers
from wrapper_cases import CASES, Case, FairSync, Painted, env_fns_of, played, played_under_await, script

import aiovec

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    # Gymnasium says these of its own wrappers, and of a folder that the run before has filled.
    pytest.mark.filterwarnings("ignore:.*(Overwriting existing videos|same-step|precision lowered).*:UserWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning"),
]

MODES = (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Each wrapper."""
    return CASES[request.param]


@pytest.fixture(autouse=True)
def screen_and_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pictures go: to a screen that nobody sees, and a folder of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")


def expected_of(case: Case, mode: AutoresetMode) -> list[Any] | BaseException:
    """What the wrapper gives over `SyncVectorEnv`, or raises."""
    envs: Any = FairSync(env_fns_of(case), autoreset_mode=mode)
    try:
        envs = case.wrap(envs)
        return played(script(case, envs))
    except (ValueError, AssertionError, BufferError) as error:
        return error
    finally:
        envs.close()


def test_every_wrapper_is_in_the_table() -> None:
    """One that Gymnasium adds is to be tried."""
    assert sorted(CASES) == sorted(wrappers.__all__)


@pytest.mark.blocks_loop  # by wrappers that import PyTorch, or encode a video
@pytest.mark.parametrize("mode", MODES)
async def test_wrappers_under_await(case: Case, mode: AutoresetMode) -> None:
    """Results, spaces and the wrapper's own attributes."""
    expected = expected_of(case, mode)
    envs = aiovec.AsyncVectorEnv(env_fns_of(case), autoreset_mode=mode, num_workers=2, context=context_of_loop())
    wrapped = aiovec.wrap(envs, case.wrap)
    if isinstance(expected, BaseException):
        with pytest.raises(type(expected)) as caught:
            async with wrapped:
                await played_under_await(script(case, wrapped))
        assert str(caught.value).split("SyncVectorEnv")[0] == str(expected).split("SyncVectorEnv")[0]
    else:
        async with wrapped:
            assert_same(await played_under_await(script(case, wrapped)), expected, "")
    assert envs.closed


@pytest.mark.parametrize("mode", MODES)
def test_wrappers_around_the_blocking_face(case: Case, mode: AutoresetMode) -> None:
    """The same, as Gymnasium's users write it."""
    expected = expected_of(case, mode)
    blocking = aiovec.BlockingVectorEnv(env_fns_of(case), autoreset_mode=mode, num_workers=2, context="fork")
    envs: Any = blocking
    try:
        if isinstance(expected, BaseException):
            with pytest.raises(type(expected)):
                envs = case.wrap(envs)
                played(script(case, envs))
        else:
            envs = case.wrap(envs)
            assert_same(played(script(case, envs)), expected, "")
    finally:
        envs.close()
    assert blocking.closed


def frames_of(video: Path) -> Any:
    """By the program that moviepy itself uses, `[frames, height, width, 3]`: one env beside the other."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(video)]
    decoded = subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True, check=True)
    return np.frombuffer(decoded.stdout, np.uint8).reshape(-1, 32, 96, 3)


@pytest.mark.blocks_loop
async def test_a_video_is_written(tmp_path: Path) -> None:
    """A real file, with the frames that Gymnasium's own vector would have in it."""
    pytest.importorskip("moviepy", reason="RecordVideo needs moviepy")
    env_fns = [lambda: Painted(render_mode="rgb_array")] * 2
    actions = np.zeros((2, 2), np.float32)

    def recording(folder: str) -> Callable[[Any], Any]:
        return lambda envs: wrappers.RecordVideo(
            envs, str(tmp_path / folder), fps=10, video_length=5, episode_trigger=lambda episode: episode == 0
        )

    envs = aiovec.AsyncVectorEnv(env_fns, num_workers=1, context=context_of_loop())
    async with aiovec.wrap(envs, recording("ours")) as recorded:
        await recorded.reset(seed=1)
        for _ in range(8):
            await recorded.step(actions)
    sync = recording("theirs")(FairSync(env_fns))
    sync.reset(seed=1)
    for _ in range(8):
        sync.step(actions)
    sync.close()
    frames = [frames_of(*(tmp_path / folder).glob("*.mp4")) for folder in ("ours", "theirs")]
    assert len(frames[0]) >= 5
    assert frames[0].max() > 100
    assert_same(frames[0], frames[1], "frames")


async def test_several_wrappers_and_their_attributes() -> None:
    """The first one is the innermost; attributes are those of the outermost that has them."""
    async with aiovec.wrap(
        aiovec.AsyncVectorEnv([lambda: gym.make("CartPole-v1")] * 4, num_workers=2, context=context_of_loop()),
        wrappers.RecordEpisodeStatistics,
        wrappers.NormalizeObservation,
        lambda envs: wrappers.ClipReward(envs, 0.1, 0.5),
    ) as envs:
        assert repr(envs) == (
            "<ClipReward, <NormalizeObservation, <RecordEpisodeStatistics, "
            "AsyncVectorEnv(num_envs=4, num_workers=2, started)>>>"
        )
        assert [type(wrapper).__name__ for wrapper in envs.wrappers] == [
            "ClipReward",
            "NormalizeObservation",
            "RecordEpisodeStatistics",
        ]
        await envs.reset(seed=1)
        for _ in range(50):
            _, rewards, *_ = await envs.step(envs.action_space.sample())
            assert rewards.max() <= 0.5
        assert envs.episode_count == len(envs.return_queue) > 0
        assert envs.update_running_mean is True
        envs.update_running_mean = False
        assert envs.wrappers[1].update_running_mean is False
        assert envs.unwrapped.num_workers == envs.num_workers == 2
        assert envs.statistics().steps == 200
        assert [spec.id for spec in await envs.call("spec")] == ["CartPole-v1"] * 4
        assert len(envs) == envs.num_envs == 4
        assert await envs.get_attr("render_mode") == (None,) * 4
        with pytest.raises(AttributeError, match="none of the wrappers has an attribute 'colour'"):
            envs.colour = 1
        with pytest.raises(AttributeError, match="colour"):
            envs.colour
