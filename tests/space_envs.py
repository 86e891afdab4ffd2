"""Environments for every kind of space, info and action, and the spaces themselves.

Everything an env does follows from its seed and its actions, so that two vectors of the same envs can be
compared step by step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array

# ---- spaces of one's own


@dataclass(frozen=True)
class Card:
    """A value of `Deck`."""

    suit: str
    rank: int


class Deck(spaces.Space[Card]):
    """A custom space, of which Gymnasium's vectors know nothing."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks

    def sample(self, mask: Any = None, probability: Any = None) -> Card:
        return Card("♠♥♦♣"[int(self.np_random.integers(4))], int(self.np_random.integers(self.ranks)))

    def contains(self, x: Any) -> bool:
        return isinstance(x, Card) and x.rank < self.ranks

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Deck) and other.ranks == self.ranks

    def __hash__(self) -> int:
        return hash(self.ranks)

    def __repr__(self) -> str:
        return f"Deck({self.ranks})"


class Angles(spaces.Space[Any]):
    """A custom space that is registered with Gymnasium's vectors: its batch is one array."""

    def __init__(self, count: int) -> None:
        super().__init__((count,), np.float64)
        self.count = count

    def sample(self, mask: Any = None, probability: Any = None) -> Any:
        return self.np_random.random(self.count) * 2 * np.pi

    def contains(self, x: Any) -> bool:
        return isinstance(x, np.ndarray) and x.shape == (self.count,)

    @property
    def is_np_flattenable(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Angles) and other.count == self.count

    def __hash__(self) -> int:
        return hash(self.count)

    def __repr__(self) -> str:
        return f"Angles({self.count})"


@batch_space.register(Angles)
def _(space: Angles, n: int = 1) -> Any:
    return spaces.Box(0, 2 * np.pi, (n, space.count), np.float64)


@create_empty_array.register(Angles)
def _(space: Angles, n: int = 1, fn: Callable[..., Any] = np.zeros) -> Any:
    return fn((n, space.count), np.float64)


@concatenate.register(Angles)
def _(space: Angles, items: Any, out: Any) -> Any:
    return np.stack(list(items), out=out)


class UnitBox(spaces.Box):
    """A subclass of a space that has a place in shared memory."""

    def __init__(self) -> None:
        super().__init__(0, 1, (2,), np.float32)


# ---- a space of every class

_BOX = spaces.Box(-1, 1, (3,), np.float32)
_GRAPH = spaces.Graph(spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(4))

OBSERVATION_SPACES: dict[str, spaces.Space[Any]] = {
    "box_float16": spaces.Box(-1, 1, (3,), np.float16),
    "box_float32": _BOX,
    "box_float64": spaces.Box(-np.inf, np.inf, (3,), np.float64),
    "box_uint8": spaces.Box(0, 255, (3, 4, 1), np.uint8),
    "box_bool": spaces.Box(0, 1, (3,), np.bool_),
    "box_int32": spaces.Box(-5, 5, (3,), np.int32),
    "box_scalar": spaces.Box(-1, 1, (), np.float32),
    "box_2d": spaces.Box(-1, 1, (2, 3), np.float32),
    "discrete_start": spaces.Discrete(5, start=-2),
    "multi_discrete": spaces.MultiDiscrete([2, 3, 4]),
    "multi_binary": spaces.MultiBinary(4),
    "dict": spaces.Dict({"b": _BOX, "a": spaces.Discrete(3), "c": spaces.MultiBinary(2)}),
    "tuple": spaces.Tuple([_BOX, spaces.Discrete(3), spaces.Box(-1, 1, (), np.float64)]),
    "text": spaces.Text(12, charset="abcäöü→∞"),
    "one_of": spaces.OneOf([spaces.Discrete(3), _BOX, spaces.Text(4)]),
    "graph": _GRAPH,
    "sequence": spaces.Sequence(spaces.Discrete(4)),
    "sequence_stacked": spaces.Sequence(_BOX, stack=True),
    "custom": Deck(13),
    "nested": spaces.Dict(
        {
            "parts": spaces.Tuple([_BOX, spaces.Text(6), _GRAPH]),
            "inner": spaces.Dict({"index": spaces.Discrete(3, start=1), "either": spaces.OneOf([_BOX, Deck(3)])}),
            "frames": spaces.Sequence(spaces.Tuple([spaces.Box(0, 9, (2, 2), np.uint8), spaces.Text(3)])),
        }
    ),
    "nested_tuple": spaces.Tuple(
        [
            spaces.Dict({"card": Deck(5), "image": spaces.Box(0, 255, (4, 4), np.uint8)}),
            spaces.Tuple([spaces.MultiDiscrete([3, 2]), spaces.Tuple([spaces.Text(3), Angles(3)])]),
            spaces.Sequence(spaces.Box(-1, 1, (), np.float32), stack=True),
        ]
    ),
}

# Forms that are rarer, but have ways of their own to go wrong.
RARE_SPACES: dict[str, spaces.Space[Any]] = {
    "box_no_items": spaces.Box(-1, 1, (0,), np.float32),
    "box_no_columns": spaces.Box(-1, 1, (2, 0), np.float32),
    "box_subclass": UnitBox(),
    "discrete": spaces.Discrete(5),
    "discrete_int32": spaces.Discrete(5, dtype=np.int32),
    "multi_discrete_2d_start": spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[1, 0], [-1, 2]], dtype=np.int32),
    "multi_binary_2d": spaces.MultiBinary([2, 3]),
    "dict_integer_keys": spaces.Dict({1: _BOX, 0: spaces.Text(4)}),
    "dict_empty": spaces.Dict({}),
    "tuple_empty": spaces.Tuple([]),
    "graph_without_edges": spaces.Graph(spaces.Discrete(3), None),
    "sequence_of_dicts_stacked": spaces.Sequence(spaces.Dict({"x": _BOX, "y": spaces.Discrete(2)}), stack=True),
    "custom_registered": Angles(2),
}

ACTION_SPACES: dict[str, spaces.Space[Any]] = {
    # Gymnasium cannot iterate over a batch that has no leaves.
    **{name: space for name, space in (OBSERVATION_SPACES | RARE_SPACES).items() if not name.endswith("_empty")},
    "discrete_uint8": spaces.Discrete(5, dtype=np.uint8),
    "dict_of_text": spaces.Dict({"say": spaces.Text(5), "move": spaces.Discrete(3)}),
    "tuple_of_texts": spaces.Tuple([spaces.Text(5), spaces.Text(3)]),
    "dict_of_dicts": spaces.Dict({"a": spaces.Dict({"b": spaces.Box(-1, 1, (2,), np.float32)}), "c": spaces.Text(2)}),
}

# ---- envs

_NUMBERS: tuple[Callable[[Any], Any], ...] = (float, np.float32, int, np.float64, np.int16, np.array, bool)
_FLAGS: tuple[Callable[[Any], Any], ...] = (bool, np.bool_, int)


class SpaceEnv(gym.Env[Any, Any]):
    """Draws everything from its own generator; observations out of a few samples of its space, which are slow."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 7}

    def __init__(self, observation_space: spaces.Space[Any], render_mode: str | None = None) -> None:
        self.observation_space = copy.deepcopy(observation_space)  # envs must not share one generator
        self.action_space = spaces.Discrete(5, start=-2)
        self.render_mode = render_mode
        self.steps = 0
        self.samples: list[Any] = []

    def _observation(self) -> Any:
        return self.samples[self.np_random.integers(len(self.samples))]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if not self.samples:
            self.observation_space.seed(seed)
            self.samples = [self.observation_space.sample() for _ in range(20)]
        self.steps = 0
        info = {} if options is None and seed is None else {"options": repr(options), "seed": repr(seed)}
        return self._observation(), info

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        self.steps += 1
        draw = self.np_random.random(3)
        reward = _NUMBERS[self.steps % len(_NUMBERS)](10 * draw[0] + action)
        flag = _FLAGS[self.steps % len(_FLAGS)]
        info = {"steps": self.steps, "draw": draw, "nested": {"action": action}} if self.steps % 3 else {}
        return self._observation(), reward, flag(draw[1] < 0.06), flag(draw[2] < 0.06), info

    def render(self) -> Any:
        return None if self.render_mode is None else np.full((2, 2, 3), self.steps, np.uint8)


class SeededSpaceEnv(SpaceEnv):
    """Seeds its spaces when it is built."""

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        super().__init__(observation_space)
        self.observation_space.seed(11)
        self.action_space.seed(12)


class LooseEnv(gym.Env[Any, Any]):
    """Returns what fits its space without being of its types: lists, wider floats, other key orders, more keys."""

    def __init__(self) -> None:
        self.observation_space = spaces.Dict(
            {
                "list": spaces.Box(-9, 99, (3,), np.float32),
                "wide": spaces.Box(-9, 9, (2, 2), np.float32),
                "number": spaces.Box(-9, 999, (), np.float64),
                "index": spaces.Discrete(9),
                "flags": spaces.MultiBinary(2),
                "pair": spaces.Tuple([spaces.Discrete(999), spaces.Text(4)]),
                "special": spaces.Box(-np.inf, np.inf, (4,), np.float32),
            }
        )
        self.action_space = spaces.Discrete(2)
        self.steps = 0

    def _observation(self) -> dict[str, Any]:
        n = self.steps
        return {
            "special": np.array([np.nan, np.inf, -np.inf, -0.0], np.float32),
            "pair": [n, str(n)],
            "flags": [True, np.int8(0)] if n % 2 else (1, 0),
            "more": object,
            "index": (n % 9, np.int32(n % 9), np.array(n % 9), np.int64(n % 9))[n % 4],
            "number": (n, n / 3, np.float32(n), True)[n % 4],
            "wide": [[n % 9, 1.5], [2.0, 3]] if n % 2 else np.array([[n % 9, 1], [2, 3]]).T,
            "list": ([n % 9, 2, 3], np.arange(3.0), (1, 2.5, 3), range(3))[n % 4],
        }

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps += 1
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self._observation(), self.steps, self.steps % 7 == 0, self.steps % 11 == 0, {}


class Recorder(gym.Env[Any, Any]):
    """Keeps every action, seed and options that reach it, with their types."""

    metadata: ClassVar = {"render_modes": ["ansi"]}

    def __init__(self, action_space: spaces.Space[Any] | None = None, name: str = "", length: int = 5) -> None:
        self.observation_space = spaces.Discrete(1000)
        self.action_space = spaces.Discrete(3) if action_space is None else action_space
        self.render_mode = "ansi"
        self.name = name
        self.length = length
        self.kept: list[Any] = []
        self.told: list[Any] = []
        self.level = 1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.told.append((seed, repr(options)))
        if options is not None and "taken" in options:
            del options["taken"]
        return 0, {"draw": self.np_random.random()}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.kept.append(action)
        return len(self.kept), 0.0, len(self.kept) % self.length == 0, False, {}

    def actions(self) -> list[Any]:
        """All actions so far, described."""
        return [described(action) for action in self.kept]

    def last_action(self) -> Any:
        """The last action, described."""
        return described(self.kept[-1])

    def add(self, first: int, second: int = 10, *, third: int = 100) -> tuple[str, int]:
        """A method with every kind of argument."""
        return self.name, first + second + third + self.level

    def render(self) -> Any:
        return f"{self.name}: {len(self.kept)} steps"


class DefaultsEnv(Recorder):
    """Its `reset` has defaults of its own, which an explicit `None` overrides."""

    def reset(  # type: ignore[override]
        self, *, seed: int | None = 13, options: Any = "none given"
    ) -> tuple[Any, dict[str, Any]]:
        observation, _ = super().reset(seed=seed)
        return observation, {"options": options, "seed": seed}


def described(value: Any) -> Any:
    """Type, dtype, shape and value of anything nested, to be compared by `==`."""
    if isinstance(value, np.ndarray):
        return "ndarray", str(value.dtype), value.shape, [described(item) for item in value.tolist()]
    if isinstance(value, dict):
        return type(value).__name__, [(key, described(item)) for key, item in value.items()]
    if isinstance(value, (tuple, list)):
        return type(value).__name__, [described(item) for item in value]
    return type(value).__name__, repr(value)


# ---- infos


def info_of(env_index: int, step: int) -> dict[str, Any]:
    """An info with a key for each kind of value, sometimes nothing; a pure function."""
    if step % 10 == 9:
        return {}  # nobody has any
    if (step + env_index) % 7 == 0:
        return {}
    number = 100 * env_index + step
    array = np.arange(3, dtype=np.float32) + number
    info: dict[str, Any] = {
        "int": number,
        "float": number / 3,
        "bool": number % 2 == 0,
        "float32": np.float32(number / 3),
        "int8": np.int8(number % 100),
        "complex64": np.complex64(number),
        "numpy_bool": np.bool_(number % 2),
        "numpy_str": np.str_(number),
        "str": str(number),
        "none": None,
        "bytes": b"x" * env_index,
        "list": [number, "x"],
        "tuple": (number, array),
        "card": Card("♠", number),
        "type": int,
        "array": array,
        "array_int": np.array([[number, 2]]),
        "array_0d": np.array(number),
        "array_no_items": np.zeros((2, 0)),
        "array_bool": np.array([number % 2 == 0, True]),
        "array_object": np.array([None, number, "x"], object),
        "array_str": np.array(["x" * (1 + (step + env_index) % 4), "y"]),
        "array_view": np.arange(12).reshape(3, 4).T[::2] + number,
        "nested": {"int": number, "deeper": {"array": array, "str": str(number)}, "empty": {}},
        "empty": {},
        7: number,
        # Values that Gymnasium casts to the dtype of the first env that has the key.
        "int_or_float": number if (env_index + step) % 2 else number / 3,
        "float_or_bool": number / 3 if (env_index + step) % 2 else True,
        "float_or_none": number / 3 if env_index % 2 == 0 else None,
        "none_or_float": None if env_index % 2 == 0 else number / 3,
        "int_or_digits": number if env_index % 2 == 0 else str(number),
        "array_0d_or_scalar": np.array(number) if env_index % 2 == 0 else number / 3,
        "array_or_list": array if env_index % 2 == 0 else [1, 2, 3],
        "array_float_or_int": array if (env_index + step) % 2 else np.arange(3),
        "array_int_or_float": np.arange(3) if (env_index + step) % 2 else array,
    }
    # Keys that only some envs have at some steps.
    info |= {"only_even_envs": number} if env_index % 2 == 0 else {}
    info |= {"only_odd_envs": array} if env_index % 2 else {}
    info |= {f"step_{step % 3}": {"by": env_index, f"env_{env_index}": number}}
    info |= {"only_sometimes": {"x": number}} if (env_index * step) % 3 == 1 else {}
    return info


RAGGED: dict[str, Callable[[int], Any]] = {
    "lengths": lambda env_index: np.arange(env_index + 1.0),
    "dimensions": lambda env_index: np.ones((2,) * (1 + env_index % 2)) * env_index,
    "array_or_text": lambda env_index: np.arange(2) if env_index % 2 == 0 else "text",
    "int_or_text": lambda env_index: env_index if env_index % 2 == 0 else "text",
    "int_or_none": lambda env_index: env_index if env_index % 2 == 0 else None,
    "int_or_array": lambda env_index: env_index if env_index % 2 == 0 else np.arange(2),
    "int_or_huge": lambda env_index: env_index if env_index % 2 == 0 else 2**70,
    "int_or_dict": lambda env_index: env_index if env_index % 2 == 0 else {"x": env_index},
    "dict_or_text": lambda env_index: {"x": env_index, "y": {"z": "w"}} if env_index % 2 == 0 else "text",
}
"""One info value an env, of kinds for which Gymnasium raises."""


class InfoEnv(gym.Env[Any, Any]):
    """Its infos are those of a function of env index and step, or one value each time."""

    def __init__(self, env_index: int, ragged: str | None = None) -> None:
        self.observation_space = spaces.Discrete(2)
        self.action_space = spaces.Discrete(2)
        self.env_index = env_index
        self.ragged = ragged
        self.steps = 0

    def _info(self) -> dict[str, Any]:
        if self.ragged is None:
            return info_of(self.env_index, self.steps)
        value = RAGGED[self.ragged](self.env_index)
        return {"value": value, "inside": {"value": value}}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps += 1
        if self.ragged:
            return 0, {}
        info: dict[str, Any] = {"only_reset": self.steps}
        if self.steps == 1:  # all envs, in their order: a later one could not be first with these
            info["str_or_int"] = "x" if self.env_index == 0 else self.env_index
            info["array_or_scalar"] = np.arange(3) if self.env_index == 0 else self.env_index
        return 0, self._info() | info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        ended = self.steps % (5 + self.env_index) == 0
        return 1, 1.0, ended and self.steps % 2 == 0, ended and self.steps % 2 == 1, self._info()


class InfoSizesEnv(gym.Env[Any, Any]):
    """Its infos are empty, small, or of 100 KB, each env at steps of its own."""

    observation_space = spaces.Discrete(2)
    action_space = spaces.Discrete(2)

    def __init__(self, env_index: int) -> None:
        self.env_index = env_index
        self.steps = 0

    def _info(self) -> dict[str, Any]:
        size = (0, 1, 100_000)[(self.steps // (1 + self.env_index)) % 3]
        return {f"array{size}": np.full(size, self.steps % 256, np.uint8)} if size else {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps += 1
        return 0, self._info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return 1, float(self.steps), self.steps % (5 + self.env_index) == 0, False, self._info()


class ReusingEnv(gym.Env[Any, Any]):
    """Reuses its arrays in place at steps and resets; or its info too, with all that is in it."""

    def __init__(self, length: int, reuses_info: bool) -> None:
        self.reuses_info = reuses_info
        self.observation_space = spaces.Dict(
            {"array": spaces.Box(-99, 999, (2,), np.float32), "graph": spaces.Graph(spaces.Discrete(999), None)}
        )
        self.action_space = spaces.Discrete(2)
        self.length = length
        self.steps = 0
        self.array = np.zeros(2, np.float32)
        self.nodes = np.zeros(3, np.int64)
        self.trace = np.zeros(2, np.int64)
        self.inner: dict[str, Any] = {}
        self.info: dict[str, Any] = {"inner": self.inner, "trace": self.trace}

    def _now(self) -> tuple[Any, dict[str, Any]]:
        self.array[:] = self.nodes[:] = self.trace[:] = self.steps
        self.inner["steps"] = self.info["steps"] = self.steps
        info = self.info if self.reuses_info else {"steps": self.steps}
        return {"array": self.array, "graph": spaces.GraphInstance(self.nodes, None, None)}, info

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._now()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        observation, info = self._now()
        return observation, 1.0, self.steps >= self.length, False, info


class ImageEnv(gym.Env[Any, Any]):
    """Large observations, beside small ones and texts if asked for, in arrays that it reuses within an episode."""

    def __init__(self, nested: bool = False) -> None:
        image = spaces.Box(0, 255, (96, 96, 3), np.uint8)
        self.nested = nested
        self.observation_space: spaces.Space[Any] = (
            spaces.Dict({"image": image, "steps": spaces.Box(0, 999, (1,), np.int32), "text": spaces.Text(9)})
            if nested
            else image
        )
        self.action_space = spaces.Discrete(2)
        self.image = np.zeros((96, 96, 3), np.uint8)
        self.count = np.zeros(1, np.int32)

    def _now(self) -> Any:
        self.image[...] = self.np_random.integers(0, 256, (96, 1, 3), np.uint8)
        self.count += 1
        return {"image": self.image, "steps": self.count, "text": f"{self.count[0]}"} if self.nested else self.image

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.image = np.zeros_like(self.image)  # another array, so that Gymnasium's final_obs are the terminal ones
        self.count = self.count.copy()
        return self._now(), {"count": self.count}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation = self._now()
        ended = bool(self.np_random.random() < 0.1)
        return observation, float(self.count[0]), ended, False, {"count": self.count}


class LoggingEnv(gym.Env[Any, Any]):
    """Its infos hold objects that it goes on changing: a list, and arrays that fit no common array."""

    def __init__(self, env_index: int) -> None:
        self.observation_space = spaces.Discrete(2)
        self.action_space = spaces.Discrete(2)
        self.log: list[int] = []
        self.ragged = np.zeros(1 + env_index)

    def _info(self) -> dict[str, Any]:
        self.log.append(len(self.log))
        self.ragged += 1
        return {"log": self.log, "ragged": self.ragged, "inner": {"log": self.log}}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return 0, self._info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return 1, 1.0, len(self.log) % 5 == 0, False, self._info()


class Widened(gym.Env[Any, Any]):
    """Bounds that differ from env to env; shapes and dtypes do not."""

    def __init__(self, env_index: int, kind: str) -> None:
        self.observation_space = WIDENED[kind](env_index)
        self.action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        ended = bool(self.np_random.random() < 0.1)
        return self.observation_space.sample(), self.np_random.random(), ended, False, {}


WIDENED: dict[str, Callable[[int], spaces.Space[Any]]] = {
    "box": lambda env_index: spaces.Box(-1 - env_index, 1 + env_index, (3,), np.float32),
    "discrete": lambda env_index: spaces.Discrete(2 + env_index, start=env_index),
    "multi_discrete": lambda env_index: spaces.MultiDiscrete([2 + env_index, 3]),
    "multi_binary": lambda env_index: spaces.MultiBinary(3),
    "text": lambda env_index: spaces.Text(6, min_length=env_index % 6),
    "sequence": lambda env_index: spaces.Sequence(spaces.Discrete(2 + env_index)),
    "graph": lambda env_index: spaces.Graph(spaces.Box(-1 - env_index, 1, (2,), np.float32), None),
    "nested": lambda env_index: spaces.Dict(
        {
            "a": spaces.Tuple([spaces.Box(0, 1 + env_index, (2,), np.float64), spaces.Discrete(3 + env_index)]),
            "b": spaces.Text(6, min_length=env_index % 6),
        }
    ),
}
"""By kind: the observation space of env i."""
