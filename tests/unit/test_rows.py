"""What envs return is written whole columns at a time, or row by row: never broadcast, never half wrong."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from unit.strategies import fixed_spaces, nested_spaces, same

from aiovec.errors import InvalidEnvResultError
from aiovec.exchange.layout import Layout
from aiovec.exchange.slab import Buffer, Geometry, Slab
from aiovec.worker.rows import RowWriter

ENV_IDS = range(4, 7)  # the second worker's envs
ROWS = slice(4, 7)


def make_writer(space: gym.Space[Any]) -> tuple[RowWriter, Buffer, Slab]:
    """A writer of the rows 4 to 6 of nine, all bytes 1 before."""
    layout = Layout(space)
    slab = Slab.private(Geometry(9, layout, Layout(spaces.Discrete(2))))
    slab.memory.fill(1)
    return RowWriter(layout, slab.strip_of(0).arrays, ENV_IDS, ENV_IDS), slab.buffer(0).rows(ROWS), slab


def untouched(slab: Slab) -> bool:
    """Whether the rows of other workers are as they were."""
    others = [array[part] for array in slab.buffer(0).arrays() for part in (slice(0, 4), slice(7, 9))]
    return all(np.all(np.ascontiguousarray(array).view(np.uint8) == 1) for array in others)


@given(nested_spaces, st.integers(0, 50))
def test_columns_and_rows_write_the_same(space: gym.Space[Any], seed: int) -> None:
    """The fast path and the path that looks at each row; neither touches the rows of others."""
    space.seed(seed)
    observations = [space.sample() for _ in ENV_IDS]
    (fast, fast_rows, fast_slab), (slow, slow_rows, slow_slab) = make_writer(space), make_writer(space)
    assert fast.write_observations(observations) == {}
    assert slow.write_some(range(3), observations) == {}
    assert all(map(same, fast_rows.observations, slow_rows.observations))
    for leaf, array in zip(Layout(space).fixed, fast_rows.observations, strict=True):
        assert same(array, np.array(leaf.column(observations), dtype=leaf.dtype).reshape(array.shape))
    assert untouched(fast_slab)
    assert untouched(slow_slab)


@given(fixed_spaces, st.integers(0, 50), st.permutations(range(3)), st.integers(0, 3))
def test_some_rows_are_written_in_any_order(space: gym.Space[Any], seed: int, rows: list[int], count: int) -> None:
    """As a reset of some envs asks for; the other rows stay."""
    space.seed(seed)
    chosen = rows[:count]
    observations = [space.sample() for _ in chosen]
    writer, written, slab = make_writer(space)
    before = [array.copy() for array in written.observations]
    assert writer.write_some(chosen, observations) == {}
    for leaf, array, old in zip(Layout(space).fixed, written.observations, before, strict=True):
        for row in range(3):
            value = leaf.column([observations[chosen.index(row)]])[0] if row in chosen else old[row]
            assert same(array[row], np.asarray(value, leaf.dtype)[()])
    assert untouched(slab)


FOUR = spaces.Box(0, 9, (4,), np.float32)
GRID = spaces.Box(0, 9, (4, 3), np.float32)
SCALAR = spaces.Box(0, 9, (), np.float32)
BYTES = spaces.Box(0, 255, (2,), np.uint8)
NUMBER = spaces.Discrete(5)
STRUCTURE = spaces.Dict(a=FOUR, b=spaces.Tuple([NUMBER, spaces.Text(3)]))
GOOD_STRUCTURE = {"a": np.zeros(4, np.float32), "b": (1, "x")}

WRONG = [
    # space, what one env returned, leaf, expected, got
    (FOUR, np.zeros(3), "observation", "shape (4,) of float32", "shape (3,) of float64"),
    (FOUR, np.zeros(5, np.float32), "observation", "shape (4,) of float32", "shape (5,) of float32"),
    (FOUR, np.zeros(1, np.float32), "observation", "shape (4,) of float32", "shape (1,) of float32"),
    (FOUR, np.zeros((), np.float32), "observation", "shape (4,) of float32", "shape () of float32"),
    (FOUR, np.float32(1), "observation", "shape (4,) of float32", "shape () of float32"),
    (FOUR, 1.0, "observation", "shape (4,) of float32", "1.0 (float)"),
    (FOUR, np.zeros((4, 1), np.float32), "observation", "shape (4,) of float32", "shape (4, 1) of float32"),
    (FOUR, np.zeros((1, 4), np.float32), "observation", "shape (4,) of float32", "shape (1, 4) of float32"),
    (FOUR, np.zeros(4, np.complex64), "observation", "shape (4,) of float32", "shape (4,) of complex64"),
    (FOUR, np.array(["a"] * 4), "observation", "shape (4,) of float32", "shape (4,) of <U1"),
    (FOUR, [0.0, [1.0], 2.0, 3.0], "observation", "shape (4,) of float32", "a list of length 4"),
    (FOUR, [0.0, 1.0], "observation", "shape (4,) of float32", "a list of length 2"),
    (FOUR, None, "observation", "shape (4,) of float32", "None (NoneType)"),
    (FOUR, {"a": 1}, "observation", "shape (4,) of float32", "a dict with the keys ['a']"),
    (FOUR, "abcd", "observation", "shape (4,) of float32", "'abcd' (str)"),
    (GRID, np.zeros(4, np.float32), "observation", "shape (4, 3) of float32", "shape (4,) of float32"),
    (GRID, np.zeros((4, 1), np.float32), "observation", "shape (4, 3) of float32", "shape (4, 1) of float32"),
    (GRID, np.zeros((1, 3), np.float32), "observation", "shape (4, 3) of float32", "shape (1, 3) of float32"),
    (GRID, np.zeros((3, 4), np.float32), "observation", "shape (4, 3) of float32", "shape (3, 4) of float32"),
    (SCALAR, np.zeros(1, np.float32), "observation", "shape () of float32", "shape (1,) of float32"),
    (SCALAR, [0.0], "observation", "shape () of float32", "a list of length 1"),
    (BYTES, np.zeros(2, np.float32), "observation", "shape (2,) of uint8", "shape (2,) of float32"),
    (NUMBER, 1.5, "observation", "shape () of int64", "1.5 (float)"),
    (NUMBER, np.array([1]), "observation", "shape () of int64", "shape (1,) of int64"),
    (STRUCTURE, {"b": (1, "x")}, "observation['a']", "", "a dict with the keys ['b']"),
    (STRUCTURE, {"a": np.zeros(4)}, "observation['b']", "", "a dict with the keys ['a']"),
    (STRUCTURE, {**GOOD_STRUCTURE, "b": (1,)}, "observation['b'][1]", "", "a dict"),
    (STRUCTURE, {**GOOD_STRUCTURE, "b": (1.5, "x")}, "observation['b'][0]", "shape () of int64", "1.5 (float)"),
    (STRUCTURE, {**GOOD_STRUCTURE, "a": np.zeros(1)}, "observation['a']", "shape (4,)", "shape (1,) of float64"),
    (STRUCTURE, np.zeros(4), "observation['a']", "", "shape (4,) of float64"),
    (STRUCTURE, None, "observation['a']", "", "None (NoneType)"),
]


def good(space: gym.Space[Any], value: int) -> Any:
    """A right observation, filled with a number."""
    if space is STRUCTURE:
        return {"a": np.full(4, value, np.float32), "b": (value, "x")}
    return value if space is NUMBER else np.full(space.shape or (), value, space.dtype)


@pytest.mark.parametrize("bad_row", range(3))
@pytest.mark.parametrize(("space", "bad", "leaf", "expected", "got"), WRONG)
def test_a_wrong_observation_is_named_and_the_right_ones_kept(
    space: gym.Space[Any], bad: Any, leaf: str, expected: str, got: str, bad_row: int
) -> None:
    """Env, leaf and both shapes; the rows of the other envs hold their observations, that of the wrong one nothing."""
    writer, written, slab = make_writer(space)
    observations = [good(space, row + 2) for row in range(3)]
    observations[bad_row] = bad
    errors = writer.write_observations(observations)
    assert list(errors) == [bad_row]
    error = errors[bad_row]
    assert isinstance(error, InvalidEnvResultError)
    assert error.env_index == ENV_IDS[bad_row]
    text = str(error)
    assert text.startswith(f"env {ENV_IDS[bad_row]} returned a wrong observation")
    assert leaf in text
    assert expected in text
    assert f", got {got}" in text
    for row in {0, 1, 2} - {bad_row}:
        assert all(np.all(array[row] == row + 2) for array in written.observations)
    assert untouched(slab)


@pytest.mark.parametrize(("space", "bad", "leaf", "expected", "got"), WRONG)
def test_all_wrong_alike_are_all_named(space: gym.Space[Any], bad: Any, leaf: str, expected: str, got: str) -> None:
    """Envs of one class are wrong together: their stack may have the right number of values, and must not be taken."""
    writer, _, slab = make_writer(space)
    assert {row: error.env_index for row, error in writer.write_observations([bad] * 3).items()} == {0: 4, 1: 5, 2: 6}
    assert untouched(slab)


def test_lengths_that_make_up_for_each_other_are_wrong() -> None:
    """3 + 5 + 4 values are as many as 4 + 4 + 4."""
    writer, written, _ = make_writer(FOUR)
    errors = writer.write_observations([np.zeros(3), np.zeros(5), np.full(4, 6.0)])
    assert sorted(errors) == [0, 1]
    assert written.observations[0][2].tolist() == [6.0] * 4


def test_shapes_that_make_up_for_each_other_are_wrong() -> None:
    """Right lengths, right dtype, and together as many bytes as there should be."""
    writer, _, _ = make_writer(FOUR)
    wrong = [np.zeros((4, count), np.float32) for count in (0, 2, 1)]
    assert sorted(writer.write_observations(wrong)) == [0, 1, 2]


@pytest.mark.parametrize(
    "values",
    [
        np.arange(8, dtype=np.float32)[::2],
        np.arange(4, dtype=np.float32)[::-1],
        np.arange(4, dtype=">f4"),
        np.ma.masked_array(np.arange(4, dtype=np.float32)),
    ],
    ids=["strided", "reversed", "other byte order", "masked"],
)
def test_arrays_of_any_layout_are_written_by_value(values: Any) -> None:
    """What is in the array, not what is in its memory."""
    writer, written, _ = make_writer(FOUR)
    assert writer.write_observations([values] * 3) == {}
    assert written.observations[0].tolist() == [list(values)] * 3


def test_a_leaf_behind_a_wrong_one_is_not_written_for_that_env() -> None:
    """A row is all of one observation, or nothing of it: `a` is right here, `b` is not."""
    writer, written, _ = make_writer(STRUCTURE)
    written.observations[0][...] = 0
    errors = writer.write_some([1], [{"a": np.full(4, 5, np.float32), "b": ("no", "x")}])
    assert list(errors) == [1]
    assert not written.observations[0].any()


@pytest.mark.parametrize("values", [[1, 2, 3, 4], (1, 2, 3, 4), np.arange(1, 5), np.arange(1, 5, dtype=np.float64)])
def test_what_gymnasium_casts_is_cast(values: Any) -> None:
    """Lists, and numbers of the same kind, as `np.stack` into the space's dtype takes them."""
    writer, written, _ = make_writer(FOUR)
    assert writer.write_observations([values] * 3) == {}
    assert written.observations[0].tolist() == [[1.0, 2.0, 3.0, 4.0]] * 3


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0)], ids=str)
def test_observations_without_values(shape: tuple[int, ...]) -> None:
    """No neighbours, no objects in sight: a shape with a zero is a shape."""
    writer, _, _ = make_writer(spaces.Box(0, 1, shape))
    assert writer.write_observations([np.zeros(shape, np.float32)] * 3) == {}
    assert list(writer.write_observations([np.zeros((1, *shape), np.float32)] * 3)) == [0, 1, 2]


numbers: st.SearchStrategy[Any] = st.one_of(
    st.floats(),
    st.integers(-(2**40), 2**40),
    st.booleans(),
    st.floats(width=32).map(np.float32),
    st.integers(-100, 100).map(np.int8),
    st.floats().map(np.array),
)
flags: st.SearchStrategy[Any] = st.one_of(st.booleans(), st.booleans().map(np.bool_), st.integers(0, 1))


@given(st.lists(st.tuples(numbers, flags, flags), min_size=3, max_size=3))
def test_outcomes_equal_gymnasiums_assignment(outcomes: list[tuple[Any, Any, Any]]) -> None:
    """Whatever number an env returns, the array holds what `rewards[i] = reward` makes of it."""
    writer, written, slab = make_writer(FOUR)
    assert writer.write_outcomes(*zip(*outcomes, strict=True)) == {}
    expected = np.zeros(3)
    for row, (reward, _, _) in enumerate(outcomes):
        expected[row] = reward
    assert same(written.rewards, expected)
    assert written.terminations.tolist() == [bool(terminated) for _, terminated, _ in outcomes]
    assert written.truncations.tolist() == [bool(truncated) for _, _, truncated in outcomes]
    assert untouched(slab)


@pytest.mark.parametrize(
    ("what", "position", "bad"),
    [
        ("reward", 0, np.zeros(2)),
        ("reward", 0, np.ones(1)),
        ("reward", 0, [1.0]),
        ("reward", 0, "much"),
        ("reward", 0, 1j),
        ("reward", 0, {"a": 1}),
        ("terminated", 1, np.zeros(2, bool)),
        ("truncated", 2, np.ones((2, 2), bool)),
    ],
)
@pytest.mark.parametrize("bad_row", range(3))
def test_a_wrong_outcome_is_named_and_the_right_ones_kept(what: str, position: int, bad: Any, bad_row: int) -> None:
    """Which env, which of the three, what came."""
    writer, written, slab = make_writer(FOUR)
    outcomes = [[float(row), True, False] for row in range(3)]
    outcomes[bad_row][position] = bad
    errors = writer.write_outcomes(*zip(*outcomes, strict=True))
    assert list(errors) == [bad_row]
    assert errors[bad_row].env_index == ENV_IDS[bad_row]
    assert f"env {ENV_IDS[bad_row]} returned a wrong {what}: expected a scalar" in str(errors[bad_row])
    for row in {0, 1, 2} - {bad_row}:
        assert written.rewards[row] == row
        assert written.terminations[row]
        assert not written.truncations[row]
    assert untouched(slab)


def test_arrays_are_the_rows() -> None:
    """What a worker without shared memory sends, in the buffer's order."""
    writer, written, _ = make_writer(STRUCTURE)
    assert all(map(np.shares_memory, writer.arrays(), written.arrays()))
    assert [len(array) for array in writer.arrays()] == [3] * 5
