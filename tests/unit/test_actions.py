"""Actions: wrong ones are refused whole, right ones reach each env as Gymnasium's `iterate` gives them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.error import InvalidAction
from gymnasium.vector.utils import batch_space, iterate
from hypothesis import given
from hypothesis import strategies as st
from unit.strategies import nested_spaces, same

from aiovec.errors import InvalidActionsError
from aiovec.exchange.actions import ActionReader, ActionWriter

NUM_ENVS = 3


class Pair:
    """Both sides over one piece of memory: the parent's writer, and the readers of two workers."""

    def __init__(self, space: gym.Space[Any], num_envs: int = NUM_ENVS, *, shared: bool = True) -> None:
        self.writer = ActionWriter(space, num_envs)
        layout = self.writer.layout
        self.memory = np.full(layout.nbytes(num_envs), 0x55, np.uint8)
        arrays = layout.arrays(self.memory, num_envs)
        if shared:
            self.writer.map(arrays)
        half = num_envs // 2
        self.readers = [
            ActionReader(layout, [array[None, rows] for array in arrays])
            for rows in (slice(0, half), slice(half, num_envs))
        ]

    def through(self, actions: Any) -> list[Any]:
        """What the envs receive."""
        rows = self.writer.write(actions)
        return [row for reader in self.readers for row in reader.rows()] if rows is None else list(rows)


def expected_rows(space: gym.Space[Any], num_envs: int, actions: Any) -> list[Any]:
    """What Gymnasium's own vectors hand to the envs."""
    return list(iterate(batch_space(space, num_envs), actions))


def as_lists(actions: Any) -> Any:
    """The same batch with lists where there were arrays."""
    if isinstance(actions, dict):
        return {key: as_lists(value) for key, value in actions.items()}
    if isinstance(actions, tuple):
        return tuple(map(as_lists, actions))
    return actions.tolist() if isinstance(actions, np.ndarray) else actions


@given(nested_spaces, st.integers(0, 50), st.booleans())
def test_envs_receive_what_gymnasium_gives(space: gym.Space[Any], seed: int, shared: bool) -> None:
    """Any space, with memory or without: same values, same types."""
    try:
        batched = batch_space(space, NUM_ENVS)
        batched.seed(seed)
        actions = batched.sample()
        expected = expected_rows(space, NUM_ENVS, actions)
    except (TypeError, NotImplementedError):  # what Gymnasium cannot batch, nobody can step
        return
    got = Pair(space, shared=shared).through(actions)
    assert len(got) == NUM_ENVS
    assert all(map(equal_actions, got, expected))


def equal_actions(left: Any, right: Any) -> bool:
    """`same`, and graphs field by field."""
    if isinstance(left, tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(equal_actions, left, right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(equal_actions(left[key], right[key]) for key in left)
    return same(left, right)


ARRAY_SPACES = [
    spaces.Discrete(5),
    spaces.Discrete(5, start=-2, dtype=np.int32),
    spaces.MultiDiscrete([3, 4]),
    spaces.MultiBinary(4),
    spaces.Box(-1, 1, (2, 3), np.float32),
    spaces.Box(-1, 1, (), np.float64),
    spaces.Box(0, 255, (4,), np.uint8),
    spaces.Dict(a=spaces.Discrete(4), b=spaces.Tuple([spaces.Box(-1, 1, (2,)), spaces.Discrete(3)])),
    spaces.Tuple([spaces.MultiBinary(2), spaces.Dict(x=spaces.Discrete(2))]),
]


def batch_of(space: gym.Space[Any], seed: int = 1) -> Any:
    """A sample of the batched space."""
    batched = batch_space(space, NUM_ENVS)
    batched.seed(seed)
    return batched.sample()


@pytest.mark.parametrize("space", ARRAY_SPACES, ids=str)
def test_arrays_travel_in_the_slab(space: gym.Space[Any]) -> None:
    """Nothing is pickled on the step path."""
    assert Pair(space).writer.write(batch_of(space)) is None


@pytest.mark.parametrize("space", ARRAY_SPACES, ids=str)
def test_lists_reach_the_envs_as_lists(space: gym.Space[Any]) -> None:
    """An env that was given Python numbers by Gymnasium is given Python numbers here."""
    actions = as_lists(batch_of(space))
    got = Pair(space).through(actions)
    assert all(map(equal_actions, got, expected_rows(space, NUM_ENVS, actions)))


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.uint8, np.bool_])
@pytest.mark.parametrize("shared", [True, False])
def test_other_dtypes_of_the_kind_keep_their_type(dtype: type[np.generic], shared: bool) -> None:
    """They travel by pickle: the slab would change the type."""
    actions = np.array([1, 0, 1], dtype)
    got = Pair(spaces.Discrete(5), shared=shared).through(actions)
    assert [type(action) for action in got] == [dtype] * NUM_ENVS
    assert got == [1, 0, 1]


def test_an_env_may_keep_and_change_its_action() -> None:
    """Rows are copies of the slab: the next step must not change what an env kept, nor the other way round."""
    pair = Pair(spaces.Box(-1, 1, (2,)))
    kept = pair.through(np.zeros((NUM_ENVS, 2), np.float32))
    kept[0][0] = 9
    later = pair.through(np.ones((NUM_ENVS, 2), np.float32))
    assert [row.tolist() for row in kept] == [[9, 0], [0, 0], [0, 0]]
    assert [row.tolist() for row in later] == [[1, 1]] * NUM_ENVS


def test_the_callers_actions_are_not_changed() -> None:
    """Nor kept: they are taken when `write` returns."""
    space = spaces.Dict(a=spaces.Discrete(4), t=spaces.Text(3))
    actions = {"a": np.array([1, 2, 3]), "t": ("x", "y", "z")}
    before = copy.deepcopy(actions)
    Pair(space).through(actions)
    assert same(actions, before)


class Tensor:
    """An array of a library that the env need not have."""

    def __init__(self, values: np.ndarray[Any, Any]) -> None:
        self._values = values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return self._values

    def __len__(self) -> int:
        return len(self._values)


@pytest.mark.parametrize("shared", [True, False])
def test_foreign_arrays_arrive_as_numpy(shared: bool) -> None:
    """Bare and inside of a structure."""
    bare = Pair(spaces.Discrete(4), shared=shared).through(Tensor(np.array([3, 1, 2])))
    assert [type(action) for action in bare] == [np.int64] * NUM_ENVS
    space = spaces.Dict(a=spaces.Discrete(4), t=spaces.Text(3))
    got = Pair(space, shared=shared).through({"a": Tensor(np.array([3, 1, 2])), "t": ["x", "y", "z"]})
    assert [type(action["a"]) for action in got] == [np.int64] * NUM_ENVS
    assert [action["t"] for action in got] == ["x", "y", "z"]


def test_object_arrays_of_dynamic_leaves_travel() -> None:
    """Texts as an array of objects are one value an env too."""
    texts = np.array(["x", "yy", "z"], dtype=object)
    assert Pair(spaces.Text(3)).through(texts) == ["x", "yy", "z"]
    space = spaces.Dict(a=spaces.Discrete(4), t=spaces.Text(3))
    got = Pair(space).through({"a": np.array([1, 2, 3]), "t": texts})
    assert got == [{"a": 1, "t": "x"}, {"a": 2, "t": "yy"}, {"a": 3, "t": "z"}]


def test_dict_spaces_with_numbers_as_keys() -> None:
    """As multi-agent envs name their agents."""
    space = spaces.Dict({0: spaces.Discrete(3), 1: spaces.Discrete(3)})  # type: ignore[dict-item]
    got = Pair(space).through({0: np.array([0, 1, 2]), 1: np.array([2, 1, 0])})
    assert got == [{0: 0, 1: 2}, {0: 1, 1: 1}, {0: 2, 1: 0}]


def test_lists_for_unsigned_spaces() -> None:
    """`[1, 2, 3]` is what a user writes for a space of bytes as well."""
    got = Pair(spaces.Box(0, 9, (1,), np.uint8)).through([[1], [2], [3]])
    assert got == [[1], [2], [3]]


DISCRETE = spaces.Discrete(4)
BOX = spaces.Box(-1, 1, (2,), np.float32)
DICT = spaces.Dict(a=DISCRETE, b=spaces.Tuple([BOX, DISCRETE]))
GOOD = {"a": np.zeros(3, np.int64), "b": (np.zeros((3, 2), np.float32), np.zeros(3, np.int64))}

WRONG = [
    # space, actions, leaf, expected, got
    (DISCRETE, np.zeros(2, np.int64), "actions", "shape (3,) of int64", "shape (2,) of int64"),
    (DISCRETE, np.zeros(4, np.int64), "actions", "shape (3,) of int64", "shape (4,) of int64"),
    (DISCRETE, np.zeros((3, 1), np.int64), "actions", "shape (3,) of int64", "shape (3, 1) of int64"),
    (DISCRETE, np.zeros(3), "actions", "shape (3,) of int64", "shape (3,) of float64"),
    (DISCRETE, [0, 1], "actions", "shape (3,) of int64", "shape (2,) of int64"),
    (DISCRETE, [0, 1, 0.5], "actions", "shape (3,) of int64", "shape (3,) of float64"),
    (DISCRETE, ["a", "b", "c"], "actions", "shape (3,) of int64", "shape (3,) of <U1"),
    (DISCRETE, 1, "actions", "shape (3,) of int64", "shape () of int64"),
    (DISCRETE, None, "actions", "shape (3,) of int64", "shape () of object"),
    (DISCRETE, {"a": 1}, "actions", "shape (3,) of int64", "shape () of object"),
    (BOX, np.zeros(2, np.float32), "actions", "shape (3, 2) of float32", "shape (2,) of float32"),
    (BOX, np.zeros((3, 1), np.float32), "actions", "shape (3, 2) of float32", "shape (3, 1) of float32"),
    (BOX, np.zeros((2, 3), np.float32), "actions", "shape (3, 2) of float32", "shape (2, 3) of float32"),
    (BOX, np.zeros((3, 2), np.complex64), "actions", "shape (3, 2) of float32", "shape (3, 2) of complex64"),
    (BOX, [[0.0, 1.0], [0.0], [0.0, 1.0]], "actions", "shape (3, 2) of float32", "a ragged list"),
    (DICT, GOOD["a"], "actions['a']", "a value", "ndarray"),
    (DICT, [GOOD] * 3, "actions['a']", "a value", "list"),
    (DICT, None, "actions['a']", "a value", "NoneType"),
    (DICT, {"a": GOOD["a"]}, "actions['b']", "a value", "dict without 'b'"),
    (DICT, {"b": GOOD["b"]}, "actions['a']", "a value", "dict without 'a'"),
    (DICT, {**GOOD, "b": GOOD["b"][:1]}, "actions['b'][1]", "a value", "tuple without 1"),
    (DICT, {**GOOD, "b": 3}, "actions['b']", "a value", "int"),
    (DICT, {**GOOD, "b": {"x": 1}}, "actions['b']", "a value", "dict"),
    (
        DICT,
        {**GOOD, "b": (GOOD["b"][0], np.zeros(2, np.int64))},
        "actions['b'][1]",
        "shape (3,) of int64",
        "shape (2,) of int64",
    ),
    (spaces.Text(3), ("a", "b"), "actions", "3 values, one an env", "2"),
    (spaces.Text(3), 7, "actions", "3 values, one an env", "a single int"),
    (spaces.Tuple([spaces.Text(3)]), (["a"] * 4,), "actions[0]", "3 values, one an env", "4"),
]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("space", "actions", "leaf", "expected", "got"), WRONG)
def test_wrong_actions_are_refused_whole(
    space: gym.Space[Any], actions: Any, leaf: str, expected: str, got: str, shared: bool
) -> None:
    """The message names the leaf, what was expected and what came; nothing was written, also of the right leaves."""
    pair = Pair(space, shared=shared)
    with pytest.raises(InvalidActionsError) as caught:
        pair.writer.write(actions)
    named, _, found = str(caught.value).partition(", got ")
    assert named.startswith(leaf)
    assert f": expected {expected}" in named
    assert found.startswith((got, f"a {got}"))
    assert found.endswith("No env was stepped.")
    assert isinstance(caught.value, InvalidAction)
    assert isinstance(caught.value, ValueError)
    assert np.all(pair.memory == 0x55)


def test_right_actions_are_taken_after_wrong_ones() -> None:
    """A refusal leaves the writer as it was."""
    pair = Pair(DICT)
    with pytest.raises(InvalidActionsError):
        pair.writer.write({})
    assert len(pair.through(GOOD)) == NUM_ENVS


# ---- of some envs, and of one


class Parts(Pair):
    """The same memory, asked for some of its rows."""

    def of_some(self, actions: Any, env_ids: Sequence[int]) -> list[Any]:
        """What these envs receive, in their order."""
        rows = self.writer.write(actions, env_ids)
        if rows is not None:
            return list(rows)
        half = NUM_ENVS // 2
        first, second = self.readers
        return [(first.rows_of([index]) if index < half else second.rows_of([index - half]))[0] for index in env_ids]

    def of_one(self, action: Any, env_index: int) -> Any:
        """What this env receives."""
        rows = self.writer.write_one(action, env_index)
        if rows is not None:
            (row,) = rows
            return row
        half = NUM_ENVS // 2
        reader, row_index = (self.readers[0], env_index) if env_index < half else (self.readers[1], env_index - half)
        (row,) = reader.rows_of([row_index])
        return row


@given(nested_spaces, st.integers(0, 50), st.booleans(), st.permutations(range(NUM_ENVS)), st.integers(1, NUM_ENVS))
def test_some_envs_receive_what_gymnasium_gives(
    space: gym.Space[Any], seed: int, shared: bool, order: list[int], count: int
) -> None:
    """Any space, with memory or without: the first row for the first of them."""
    env_ids = order[:count]
    try:
        batched = batch_space(space, count)
        batched.seed(seed)
        actions = batched.sample()
        expected = expected_rows(space, count, actions)
    except (TypeError, NotImplementedError):  # what Gymnasium cannot batch, nobody can step
        return
    got = Parts(space, shared=shared).of_some(actions, env_ids)
    assert len(got) == count
    assert all(map(equal_actions, got, expected))


@given(nested_spaces, st.integers(0, 50), st.booleans(), st.integers(0, NUM_ENVS - 1))
def test_one_env_receives_its_action(space: gym.Space[Any], seed: int, shared: bool, env_index: int) -> None:
    """Whatever its space; an array of the space's dtype, or the very same."""
    space.seed(seed)
    action = space.sample()
    before = copy.deepcopy(action)
    parts = Parts(space, shared=shared)
    try:
        expected_rows(space, NUM_ENVS, batch_space(space, NUM_ENVS).sample())
    except (TypeError, NotImplementedError):
        return
    assert equal_values(parts.of_one(action, env_index), action)
    assert equal_actions(action, before)


def equal_values(left: Any, right: Any) -> bool:
    """`equal_actions`, but arrays without axes are numbers too."""
    if isinstance(left, dict):
        return list(left) == list(right) and all(equal_values(left[key], right[key]) for key in left)
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(equal_values, left, right))
    if isinstance(left, np.ndarray | np.generic):
        return left.dtype == np.asarray(right).dtype and np.array_equal(left, right)
    return equal_actions(left, right)


@pytest.mark.parametrize("space", ARRAY_SPACES, ids=str)
def test_rows_of_others_are_not_touched(space: gym.Space[Any]) -> None:
    """An env that is busy reads its action when it comes to it."""
    parts = Parts(space)
    whole = parts.through(batch_of(space, 1))
    sampled = batch_space(space, 1)
    sampled.seed(9)
    (received,) = parts.of_some(sampled.sample(), [1])
    again = [row for reader in parts.readers for row in reader.rows()]
    assert equal_actions(again[0], whole[0])
    assert equal_actions(again[2], whole[2])
    assert equal_actions(again[1], received)
    single = copy.deepcopy(space)
    single.seed(5)
    received = parts.of_one(single.sample(), 2)
    again = [row for reader in parts.readers for row in reader.rows()]
    assert equal_actions(again[0], whole[0])
    assert equal_actions(again[2], received)


def test_rows_of_are_copies() -> None:
    """In any order; the next action does not change what an env kept."""
    pair = Parts(spaces.Box(-9, 9, (2,), np.float32))
    pair.writer.write(np.arange(6, dtype=np.float32).reshape(3, 2))
    kept = pair.readers[1].rows_of([1, 0])
    pair.writer.write(np.zeros((3, 2), np.float32))
    assert [row.tolist() for row in kept] == [[4, 5], [2, 3]]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("space", "actions", "env_ids", "expected"),
    [
        (DISCRETE, [0, 1], [1], "shape (1,) of int64"),
        (DISCRETE, [0], [1, 2], "shape (2,) of int64"),
        (DISCRETE, 0, [1], "shape (1,) of int64"),
        (DISCRETE, [0.5], [1], "shape (1,) of int64"),
        (BOX, np.zeros(2, np.float32), [1], "shape (1, 2) of float32"),
        (DICT, {"a": [1]}, [1], "a value for every leaf"),
        (spaces.Text(3), ("a", "b"), [1], "1 values, one an env"),
    ],
)
def test_wrong_actions_of_some_envs(
    space: gym.Space[Any], actions: Any, env_ids: list[int], expected: str, shared: bool
) -> None:
    """Refused whole, with nothing written."""
    pair = Parts(space, shared=shared)
    with pytest.raises(InvalidActionsError) as caught:
        pair.writer.write(actions, env_ids)
    assert f"expected {expected}" in str(caught.value)
    assert np.all(pair.memory == 0x55)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("space", "action", "leaf", "expected"),
    [
        (DISCRETE, [0], "action", "shape () of int64"),
        (DISCRETE, 0.5, "action", "shape () of int64"),
        (DISCRETE, None, "action", "shape () of int64"),
        (BOX, 1.0, "action", "shape (2,) of float32"),
        (BOX, [[0.0, 1.0]], "action", "shape (2,) of float32"),
        (BOX, [[0.0], [1.0, 2.0]], "action", "shape (2,) of float32"),
        (DICT, {"a": 1, "b": ([0.0, 1.0],)}, "action['b'][1]", "a value for every leaf"),
        (DICT, {"a": 1, "b": ([0.0, 1.0], [1])}, "action['b'][1]", "shape () of int64"),
    ],
)
def test_a_wrong_action_of_one_env(space: gym.Space[Any], action: Any, leaf: str, expected: str, shared: bool) -> None:
    """The message names the leaf; nothing was written, also of the right leaves."""
    pair = Parts(space, shared=shared)
    with pytest.raises(InvalidActionsError) as caught:
        pair.writer.write_one(action, 1)
    assert str(caught.value).startswith(f"{leaf}: expected {expected}")
    assert np.all(pair.memory == 0x55)
