"""How a vector looks in a notebook: a table of what it is and does, and what its envs render as one picture."""

from __future__ import annotations

import html
import io
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode

from aiovec.errors import InvalidEnvResultError, NotStartedError

if TYPE_CHECKING:
    from aiovec.vector_env import AsyncVectorEnv

__all__ = ["Frames", "check_render_modes", "compose", "vector_html"]

_GAP = 4  # pixels between frames: those of CartPole are white to their edges
_BACKGROUND = 128  # a gray that is seen beside white and beside black
# A larger mosaic is shown smaller: a notebook keeps every picture, and encodes it on its event loop.
_SHOWN_PIXELS = 1 << 20
_LONGEST_TEXT = 300  # characters of the repr of a space
_WITHOUT_PICTURE = (None, "human", "ansi", "ansi_list")  # of Gymnasium's render modes


@dataclass(frozen=True, eq=False, repr=False)
class Frames:
    """What some envs rendered, side by side in one picture, which a notebook shows; yours to keep, and to write into.

    To see it, and to save it, takes Pillow: ``pip install 'aiovec[notebook]'``. `numpy.asarray(frames)`, and what takes
    arrays, such as matplotlib's `imshow`, take the mosaic.

    Attributes:
        frames: One `[H, W, 3]`, uint8, for each env: RGB, whatever the env gave. They are parts of the mosaic's memory.
        env_ids: The envs, in this order.
        mosaic: `[H', W', 3]`, uint8: the frames row by row, in cells of the height of the highest and the width of the
            widest, on gray, 4 pixels apart.
    """

    frames: tuple[npt.NDArray[np.uint8], ...]
    env_ids: tuple[int, ...]
    mosaic: npt.NDArray[np.uint8]

    def __repr__(self) -> str:
        height, width, _ = self.mosaic.shape
        return f"<Frames num_envs={len(self.frames)} mosaic={width}x{height}>"

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self.mosaic, dtype, copy=copy)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the mosaic, in full size, as the suffix of the path says: ``.png``, ``.jpg``, ….

        Synchronous: it encodes, which takes some 50 ms a megapixel or more, and writes. Where others wait for the event
        loop: ``await asyncio.to_thread(frames.save, path)``.

        Raises:
            ImportError: There is no Pillow.
            ValueError: Pillow knows no such suffix.
            OSError: The file cannot be written.
        """
        _pillow_image().fromarray(self.mosaic).save(path)

    def _repr_png_(self) -> bytes | None:
        # IPython would print an exception with all of its own frames. Like this the repr is shown, below one line.
        try:
            pillow_image = _pillow_image()
        except ImportError as error:
            warnings.warn(str(error), stacklevel=2)
            return None
        picture = pillow_image.fromarray(self.mosaic)
        if self.mosaic.size > 3 * _SHOWN_PIXELS:
            picture = picture.reduce(math.ceil(math.sqrt(self.mosaic.size / (3 * _SHOWN_PIXELS))))
        encoded = io.BytesIO()
        picture.save(encoded, "png")
        return encoded.getvalue()


def _pillow_image() -> ModuleType:
    try:
        from PIL import Image  # noqa: PLC0415  an extra
    except ImportError as error:
        raise ImportError("frames are drawn by Pillow, which is not there: pip install 'aiovec[notebook]'") from error
    return Image


def check_render_modes(env_ids: Sequence[int], render_modes: Sequence[str | None]) -> None:
    """Refuses envs that give no picture, before one of them opens a window."""
    for env_index, render_mode in zip(env_ids, render_modes, strict=True):
        if render_mode in _WITHOUT_PICTURE:
            raise ValueError(
                f"env {env_index} gives no picture: its render_mode is {render_mode!r}. Build it with "
                'render_mode="rgb_array", which `make_vec` takes, too.'
            )


def compose(env_ids: Sequence[int], rendered: Sequence[Any], columns: int | None) -> Frames:
    """Copies what envs rendered into one picture.

    Args:
        env_ids: Who rendered it.
        rendered: From each an array, uint8: gray `[H, W]` or `[H, W, 1]`, RGB `[H, W, 3]` or RGBA `[H, W, 4]`; or a list
            of these, of which the last one is taken.
        columns: How many frames stand side by side; `None`: as many as rows, or one more.

    Raises:
        InvalidEnvResultError: Something else was rendered.
    """
    pictures = [_picture_of(*of_env) for of_env in zip(env_ids, rendered, strict=True)]
    columns = min(columns or math.ceil(math.sqrt(len(pictures))), len(pictures))
    rows = math.ceil(len(pictures) / columns)
    height = max(len(picture) for picture in pictures) + _GAP
    width = max(picture.shape[1] for picture in pictures) + _GAP
    mosaic = np.full((rows * height - _GAP, columns * width - _GAP, 3), _BACKGROUND, np.uint8)
    frames: list[npt.NDArray[np.uint8]] = []
    for position, picture in enumerate(pictures):
        top, left = position // columns * height, position % columns * width
        frame = mosaic[top : top + len(picture), left : left + picture.shape[1]]
        _paint(frame, picture)
        frames.append(frame)
    return Frames(tuple(frames), tuple(env_ids), mosaic)


def _picture_of(env_index: int, rendered: Any) -> npt.NDArray[np.uint8]:
    """What an env rendered as `[H, W, 1 or 3 or 4]`."""
    picture = rendered[-1] if isinstance(rendered, list) and rendered else rendered
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.size:
        if picture.ndim == 2:
            return picture[..., np.newaxis]
        if picture.ndim == 3 and picture.shape[2] in (1, 3, 4):
            return picture
    if isinstance(picture, np.ndarray):
        got = f"shape {picture.shape} of {picture.dtype}"
    elif isinstance(picture, list):
        got = "an empty list: there was no step since the last render"
    else:
        got = _text(picture)
    raise InvalidEnvResultError(env_index, "picture", "shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8", got)


def _paint(frame: npt.NDArray[np.uint8], picture: npt.NDArray[np.uint8]) -> None:
    """Puts a picture on the background that is there."""
    if picture.shape[2] < 4:
        frame[...] = picture
    else:
        alpha = picture[..., 3:].astype(np.uint16)  # 255 * 255 fits
        frame[...] = (picture[..., :3] * alpha + frame * (255 - alpha) + 127) // 255


def vector_html(envs: AsyncVectorEnv, state: str, autoreset_mode: AutoresetMode) -> str:
    """A table of what a vector is and does, in whatever state it is; in the colours that the page has.

    Args:
        envs: The vector.
        state: As its `repr` names it.
        autoreset_mode: Of the vector.
    """
    rows = {} if envs.spec is None else {"id": envs.spec.id}
    where = f"in {envs.num_workers} worker{'s' * (envs.num_workers > 1)}" if envs.num_workers else "in this process"
    rows |= {"envs": f"{envs.num_envs} {where}", "state": state}
    try:
        rows["single observation space"] = _text(envs.single_observation_space)
        rows["single action space"] = _text(envs.single_action_space)
    except NotStartedError:
        rows["spaces"] = "known after the start"
    rows["autoreset mode"] = autoreset_mode.name
    if state == "started":
        statistics = envs.statistics()
        rows |= {
            "steps": f"{statistics.steps:,}",
            "steps a second": f"{statistics.steps_per_second:,.0f}",
            "overhead": f"{statistics.overhead:.0%}",
            "pending calls": "; ".join(map(str, statistics.pending)) or "none",
            "restarts": f"{statistics.restarts:,}",
        }
    cells = "".join(
        f'<tr><th style="text-align: left">{name}</th><td style="text-align: left">{html.escape(text)}</td></tr>'
        for name, text in rows.items()
    )
    caption = html.escape(type(envs).__name__)
    return f'<table><caption style="text-align: left">{caption}</caption><tbody>{cells}</tbody></table>'


def _text(value: Any) -> str:
    try:
        text = repr(value)
    except Exception as error:  # noqa: BLE001  the user's own __repr__
        text = f"<its __repr__ raised {type(error).__name__}>"
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…"
