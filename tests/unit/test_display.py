"""How a vector looks in a notebook: mosaics, their picture, and the table."""

from __future__ import annotations

import asyncio
import functools
import html
import io
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from fault_envs import PASS_GATE, Gate, Gated
from gymnasium.envs.registration import EnvSpec
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st
from sample_envs import Counter

from aiovec import AsyncVectorEnv, InvalidEnvResultError, NotStartedError
from aiovec.display import compose

GRAY = (128, 128, 128)
GAP = 4

pictures = st.one_of(
    numpy_st.arrays(np.uint8, st.tuples(sides, sides, *channels))
    for sides in [st.integers(1, 5)]
    for channels in [(), (st.just(1),), (st.just(3),), (st.just(4),)]
)


class Renders(Counter):
    """Renders what it was given."""

    def __init__(self, render_mode: str | None, rendered: Any) -> None:
        super().__init__()
        self.render_mode = render_mode
        self.rendered = rendered
        self.times = 0

    def render(self) -> Any:
        self.times += 1
        return self.rendered


class TruthfulSpace(gym.spaces.Discrete):
    """Has what would be markup in its repr, or none at all."""

    def __init__(self, text: str | None) -> None:
        super().__init__(4)
        self.text = text

    def __repr__(self) -> str:
        if self.text is None:
            raise RuntimeError("no repr")
        return self.text


class OfSpace(Counter):
    """Declares such a space."""

    def __init__(self, text: str | None) -> None:
        super().__init__()
        self.action_space = TruthfulSpace(text)


class Table(HTMLParser):
    """Reads the rows of a table; every tag must be closed in its turn, and bear nothing but where its text is."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert attrs in ([], [("style", "text-align: left")])
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1], data))

    @property
    def rows(self) -> dict[str, str]:
        names = [text for tag, text in self.texts if tag == "th"]
        return dict(zip(names, [text for tag, text in self.texts if tag == "td"], strict=True))


def table(envs: AsyncVectorEnv) -> dict[str, str]:
    return Table(envs._repr_html_()).rows


def rgb(picture: Any) -> Any:
    """What a picture looks like on gray, computed in fractions."""
    picture = picture.reshape(*picture.shape[:2], -1)
    if picture.shape[2] == 4:
        alpha = picture[..., 3:] / 255
        return picture[..., :3] * alpha + np.array(GRAY) * (1 - alpha)
    return np.broadcast_to(picture, (*picture.shape[:2], 3))


def vector(*rendered: Any, render_mode: str | None = "rgb_array") -> AsyncVectorEnv:
    return AsyncVectorEnv([functools.partial(Renders, render_mode, one) for one in rendered], num_workers=0)


# ---- the mosaic


@given(st.lists(pictures, min_size=1, max_size=10), st.one_of(st.none(), st.integers(1, 12)))
def test_every_picture_is_in_its_cell_and_the_rest_is_gray(given_: list[Any], columns: int | None) -> None:
    before = [picture.copy() for picture in given_]
    frames = compose(range(len(given_)), given_, columns)
    height, width = max(picture.shape[0] for picture in given_) + GAP, max(picture.shape[1] for picture in given_) + GAP
    used = min(columns, len(given_)) if columns else frames.mosaic.shape[1] // width + 1
    rows = -(-len(given_) // used)
    assert frames.mosaic.shape == (rows * height - GAP, used * width - GAP, 3)
    if columns is None:
        assert 0 <= used - rows <= 1
    rest = np.ones(frames.mosaic.shape[:2], bool)
    for position, (frame, picture) in enumerate(zip(frames.frames, given_, strict=True)):
        assert frame.dtype == np.uint8
        np.testing.assert_allclose(frame, rgb(picture), atol=0.5)
        corner = position // used * height, position % used * width
        cell = tuple(slice(begin, begin + size) for begin, size in zip(corner, picture.shape[:2], strict=True))
        np.testing.assert_array_equal(frames.mosaic[cell], frame)
        rest[cell] = False
    assert (frames.mosaic[rest] == GRAY).all()
    for picture, as_it_was in zip(given_, before, strict=True):
        np.testing.assert_array_equal(picture, as_it_was)


def test_a_mosaic_owns_its_memory_and_the_frames_are_parts_of_it() -> None:
    picture = np.zeros((2, 3, 3), np.uint8)
    frames = compose([7], [picture], None)
    picture[:] = 9
    assert not frames.mosaic.any()
    frames.frames[0][0, 0] = 5
    assert frames.mosaic[0, 0].tolist() == [5, 5, 5]


def test_frames_are_an_array_for_whoever_takes_arrays() -> None:
    frames = compose([0, 1], [np.zeros((2, 3), np.uint8)] * 2, None)
    assert np.asarray(frames) is frames.mosaic
    assert np.array(frames) is not frames.mosaic
    assert np.asarray(frames, np.float32).dtype == np.float32
    assert repr(frames) == "<Frames num_envs=2 mosaic=10x2>"
    with pytest.raises(AttributeError):
        frames.mosaic = np.zeros((1, 1, 3), np.uint8)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("rendered", "got"),
    [
        (None, "got None"),
        ("##", "got '##'"),
        ([], "got an empty list: there was no step since the last render"),
        (np.zeros((2, 2, 3)), r"got shape \(2, 2, 3\) of float64"),
        (np.zeros((2, 2, 2), np.uint8), r"got shape \(2, 2, 2\) of uint8"),
        (np.zeros((0, 2, 3), np.uint8), r"got shape \(0, 2, 3\) of uint8"),
        (np.zeros(3, np.uint8), r"got shape \(3,\) of uint8"),
    ],
    ids=str,
)
def test_what_is_no_picture_is_an_error_that_names_the_env(rendered: Any, got: str) -> None:
    good = np.zeros((2, 2, 3), np.uint8)
    with pytest.raises(InvalidEnvResultError, match=rf"^env 5 returned a wrong picture: .*{got}") as caught:
        compose([2, 5], [good, rendered], None)
    assert caught.value.env_index == 5


# ---- asked of a vector


async def test_frames_are_those_of_the_envs_that_are_meant() -> None:
    envs = vector(*(np.full((2, 3, 3), shade, np.uint8) for shade in (10, 20, 30)))
    async with envs:
        every = await envs.frames()
        some = await envs.frames(env_ids=iter([2, 0]), columns=1)  # type: ignore[arg-type]
    assert every.env_ids == (0, 1, 2)
    assert [int(frame.mean()) for frame in every.frames] == [10, 20, 30]
    assert every.mosaic.shape == (8, 10, 3)
    assert some.env_ids == (2, 0)
    assert [int(frame.mean()) for frame in some.frames] == [30, 10]
    assert some.mosaic.shape == (8, 3, 3)


async def test_of_a_list_the_last_picture_is_taken() -> None:
    listed = [np.full((2, 2, 3), shade, np.uint8) for shade in (1, 2)]
    async with vector(listed, render_mode="rgb_array_list") as envs:
        frames = await envs.frames()
    assert frames.mosaic.max() == frames.mosaic.min() == 2


@pytest.mark.parametrize("render_mode", [None, "human", "ansi", "ansi_list"])
async def test_a_render_mode_without_pictures_is_refused_and_nothing_is_rendered(render_mode: str | None) -> None:
    async with vector(None, None, render_mode=render_mode) as envs:
        with pytest.raises(ValueError, match=rf'^env 1 gives .* is {render_mode!r}\. .*"rgb_array", which `make_vec`'):
            await envs.frames(env_ids=[1, 0])
        assert await envs.get_attr("times") == (0, 0)


@pytest.mark.parametrize("columns", [0, -1, 1.5, True, "2"])
async def test_columns_are_a_number_from_one(columns: Any) -> None:
    async with vector(np.zeros((2, 2), np.uint8)) as envs:
        with pytest.raises(ValueError, match=f"columns={columns!r}: expected"):
            await envs.frames(columns=columns)


async def test_frames_before_the_start_say_so() -> None:
    with pytest.raises(NotStartedError, match=r"^frames\(\) before the start"):
        await vector(None).frames()


# ---- the picture


def opened(png: bytes | Path) -> Any:
    from PIL import Image

    with Image.open(io.BytesIO(png) if isinstance(png, bytes) else png) as image:
        return np.asarray(image)


def test_a_notebook_is_shown_the_mosaic() -> None:
    frames = compose([0, 1], [np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)] * 2, None)
    png = frames._repr_png_()
    assert png is not None
    np.testing.assert_array_equal(opened(png), frames.mosaic)


def test_a_notebook_is_shown_a_large_mosaic_smaller() -> None:
    frames = compose(range(4), [np.full((1500, 1000, 3), 200, np.uint8)] * 4, None)
    png = frames._repr_png_()
    assert png is not None
    shown = opened(png)
    height, width, _ = shown.shape
    assert height * width < 1.05 * 2**20
    assert abs(height / width - 1.5) < 0.01
    assert shown[0, 0].tolist() == [200, 200, 200]


def test_a_file_has_the_mosaic_in_full_size(tmp_path: Path) -> None:
    frames = compose([0], [np.arange(1200 * 1100 * 3).reshape(1200, 1100, 3).astype(np.uint8)], None)
    frames.save(tmp_path / "seen.png")
    np.testing.assert_array_equal(opened(tmp_path / "seen.png"), frames.mosaic)
    frames.save(str(tmp_path / "seen.jpg"))
    assert opened(tmp_path / "seen.jpg").shape == frames.mosaic.shape
    with pytest.raises(ValueError, match="unknown file extension"):
        frames.save(tmp_path / "seen.unknown")


def test_without_pillow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A notebook shows the repr then, which is there in any case."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    frames = compose([0], [np.zeros((2, 2), np.uint8)], None)
    with pytest.raises(ImportError, match=r"Pillow, .*pip install 'aiovec\[notebook\]'"):
        frames.save(tmp_path / "seen.png")
    with pytest.warns(UserWarning, match=r"pip install 'aiovec\[notebook\]'"):
        assert frames._repr_png_() is None


# ---- the table


async def test_the_table_is_there_in_every_state() -> None:
    envs = AsyncVectorEnv([Counter] * 3, num_workers=0, autoreset_mode="SameStep")
    new = table(envs)
    assert new == {
        "envs": "3 in this process",
        "state": "not started",
        "spaces": "known after the start",
        "autoreset mode": "SAME_STEP",
    }
    async with envs:
        await envs.reset()
        await envs.step([0] * 3)
        started = table(envs)
    spaces = {
        "single observation space": "Box(-inf, inf, (3,), float32)",
        "single action space": "Discrete(4)",
    }
    figures = {"steps": "3", "pending calls": "none", "restarts": "0"}
    assert started | {"state": "started"} | spaces | figures == started
    assert started["overhead"].endswith("%")
    assert float(started["steps a second"].replace(",", "")) > 0
    assert table(envs) == {
        "envs": "3 in this process",
        "state": "closed",
        **spaces,
        "autoreset mode": "SAME_STEP",
    }


async def test_the_table_of_one_closed_before_its_start() -> None:
    envs = AsyncVectorEnv([Counter] * 3, num_workers=2)
    await envs.close()
    rows = table(envs)
    assert rows["envs"] == "3 in 2 workers"
    assert rows["state"] == "closed"
    assert rows["spaces"] == "known after the start"


async def test_the_table_of_one_that_was_terminated() -> None:
    envs = await AsyncVectorEnv([Counter], num_workers=0)
    envs.terminate()
    assert table(envs)["state"] == "closed"


async def test_the_table_names_what_is_pending(tmp_path: Path) -> None:
    with Gate(tmp_path) as gate:
        async with AsyncVectorEnv([functools.partial(Gated, gate.key)] * 2, num_workers=1) as envs:
            assert table(envs)["envs"] == "2 in 1 worker"
            await envs.reset()
            step = asyncio.create_task(envs.step([0, PASS_GATE]))
            await gate.arrived()
            assert table(envs)["pending calls"].startswith("step has waited for env 1 for ")
            gate.open()
            await step


async def test_what_users_name_is_text_and_no_markup() -> None:
    """Also very long, or not to be had at all."""
    envs = AsyncVectorEnv([functools.partial(OfSpace, "<script>&amp;")], num_workers=0)
    envs.spec = EnvSpec("Bold-v0", entry_point="nowhere:Nothing")
    async with envs:
        shown = envs._repr_html_()
        rows = Table(shown).rows
        assert rows["id"] == "Bold-v0"
        assert rows["single action space"] == "<script>&amp;"
        assert html.escape("<script>&amp;") in shown
    async with AsyncVectorEnv([functools.partial(OfSpace, "x" * 999)], num_workers=0) as envs:
        assert table(envs)["single action space"] == "x" * 300 + "…"
    async with AsyncVectorEnv([functools.partial(OfSpace, None)], num_workers=0) as envs:
        assert table(envs)["single action space"] == "<its __repr__ raised RuntimeError>"
