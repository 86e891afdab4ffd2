"""Frames come out of a stream whole and in order, whichever way the stream was cut."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiovec.exchange.frames import HEADER_NBYTES, Frame, FrameKind, FrameReader, pack_frame, pack_header

CHUNK_NBYTES = 1 << 16
LARGEST_SMALL = CHUNK_NBYTES - HEADER_NBYTES  # the largest payload that fits into the chunk with its header

numbers = st.integers(0, 2**64 - 1)
payloads = st.one_of(
    st.just(b""),
    st.binary(max_size=40),
    st.builds(
        lambda nbytes, seed: bytes([seed]) * (nbytes - 1) + b"$",
        st.one_of(st.integers(LARGEST_SMALL - 2, LARGEST_SMALL + 2), st.integers(CHUNK_NBYTES, 3 * CHUNK_NBYTES)),
        st.integers(0, 255),
    ),
)
kinds = st.sampled_from(list(FrameKind)).map(int)
frames = st.builds(Frame, kinds, numbers, st.integers(0, 2**32 - 1), payloads, st.integers(0, 2**16 - 1))


def feed(reader: FrameReader, stream: bytes, cuts: Iterable[int]) -> list[Frame]:
    """Gives the stream to the reader as a socket would: never more than a cut, never more than the space."""
    taken: list[Frame] = []
    start = 0
    sizes = iter(cuts)
    while start < len(stream):
        space = reader.space()
        assert len(space) > 0
        nbytes = min(len(space), next(sizes, len(stream)), len(stream) - start)
        space[:nbytes] = stream[start : start + nbytes]
        reader.received(nbytes)
        start += nbytes
        taken += [frame._replace(payload=bytes(frame.payload)) for frame in reader.frames()]
    assert len(reader.space()) > 0
    return taken


def packed(sent: Iterable[Frame]) -> bytes:
    """The stream of some frames."""
    return b"".join(pack_frame(*frame) for frame in sent)


@settings(max_examples=60)
@given(st.lists(frames, max_size=6), st.lists(st.integers(1, 2 * CHUNK_NBYTES), max_size=30))
def test_frames_survive_any_cuts(sent: list[Frame], cuts: list[int]) -> None:
    """What goes in comes out: kind, number, buffer, payload, group, order."""
    reader = FrameReader()
    assert feed(reader, packed(sent), cuts) == sent
    assert not reader.partial


@given(st.lists(frames.filter(lambda frame: len(frame.payload) < 100), min_size=1, max_size=4))
def test_frames_survive_byte_by_byte(sent: list[Frame]) -> None:
    """The smallest cuts there are."""
    stream = packed(sent)
    assert feed(FrameReader(), stream, [1] * len(stream)) == sent


@pytest.mark.parametrize("step", [1, 7, HEADER_NBYTES, 1000])
@pytest.mark.parametrize("extra", [-2, -1, 0, 1, 2])
def test_payloads_at_the_border_of_the_chunk(extra: int, step: int) -> None:
    """A payload that just fits, and one that just does not, behind a frame that moved the start."""
    large = Frame(FrameKind.CALL, 2, 0, (bytes(range(256)) * 256)[: LARGEST_SMALL + extra])
    sent = [Frame(FrameKind.STEP, 1, 0, b""), large, Frame(FrameKind.REPLY, 3, 4, b"end")]
    stream = packed(sent)
    cuts = [HEADER_NBYTES, *[step] * 40, len(large.payload) - 40 * step, 1, 1, 1]
    assert feed(FrameReader(), stream, [cut for cut in cuts if cut > 0]) == sent


def test_many_frames_of_one_chunk() -> None:
    """More frames than fit into one chunk, received as full as it gets."""
    sent = [Frame(FrameKind.REPLY, seq, seq % 5, b"x" * (seq % 50)) for seq in range(4000)]
    assert feed(FrameReader(), packed(sent), []) == sent


def test_empty_payloads_are_their_header() -> None:
    """The step path sends nothing but headers."""
    assert pack_frame(FrameKind.STEP, 9, 2) == pack_header(FrameKind.STEP, 9, 2)
    assert feed(FrameReader(), pack_header(FrameKind.STEP, 9, 2), []) == [Frame(FrameKind.STEP, 9, 2, b"")]


@pytest.mark.parametrize("payload", [b"abc", b"l" * (2 * CHUNK_NBYTES)])
def test_partial_is_true_inside_a_frame_only(payload: bytes) -> None:
    """A worker may look for the next request only between two frames."""
    stream = pack_frame(FrameKind.CALL, 1, 0, payload)
    reader = FrameReader()
    assert not reader.partial
    for cut in (1, HEADER_NBYTES - 1, 1):
        feed(reader, stream[:cut], [])
        assert reader.partial
        stream = stream[cut:]
    assert len(feed(reader, stream[:-1], [])) == 0
    assert reader.partial
    assert len(feed(reader, stream[-1:], [])) == 1
    assert not reader.partial
    assert repr(reader) == "<FrameReader partial=False>"


@pytest.mark.parametrize("nbytes", [10, 2 * CHUNK_NBYTES])
def test_a_payload_never_changes_later(nbytes: int) -> None:
    """A payload is the reader's to give: what comes next is not written over it."""
    reader = FrameReader()
    kept = []
    for letter in (b"a", b"b", b"c"):
        stream = memoryview(pack_frame(FrameKind.REPLY, 1, 0, letter * nbytes))
        while stream:
            space = reader.space()
            count = min(len(space), len(stream))
            space[:count] = stream[:count]
            reader.received(count)
            stream = stream[count:]
            kept += [frame.payload for frame in reader.frames()]
    assert [bytes(payload) for payload in kept] == [b"a" * nbytes, b"b" * nbytes, b"c" * nbytes]
