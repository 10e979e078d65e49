"""Messages in pieces: any order, any interleaving, bounded memory."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import MalformedFrameError, UnsupportedVersionError
from shoal.transport.pieces import PIECE_MAGIC, Joiner, split

messages = st.lists(st.binary(max_size=400) | st.binary(max_size=60).map(PIECE_MAGIC.__add__), max_size=6)


@given(messages, st.randoms(use_true_random=False), st.integers(33, 90))
def test_shuffled_pieces_of_several_messages_join_to_each_of_them(
    sent: list[bytes], chance: random.Random, piece_bytes: int
) -> None:
    pieces = [
        piece for number, data in enumerate(sent) for piece in split(data, message_id=number, piece_bytes=piece_bytes)
    ]
    assert all(len(piece) <= piece_bytes for piece in pieces)
    chance.shuffle(pieces)
    joiner = Joiner()

    got = [data for piece in pieces if (data := joiner.add(piece)) is not None]

    assert sorted(got) == sorted(sent)
    assert joiner._held == 0


def test_a_repeated_piece_changes_nothing() -> None:
    first, second = split(bytes(range(100)), message_id=7, piece_bytes=90)
    joiner = Joiner()

    assert [joiner.add(first), joiner.add(first), joiner.add(second)] == [None, None, bytes(range(100))]


def test_a_short_message_is_not_wrapped() -> None:
    assert split(b"short", message_id=1) == [b"short"]


def test_messages_that_never_end_are_forgotten_oldest_first() -> None:
    joiner = Joiner(max_bytes=1400)
    halves = [split(bytes([number]) * 600, message_id=number, piece_bytes=532) for number in range(4)]

    for first, _ in halves:
        assert joiner.add(first) is None
        assert joiner._held <= 1400

    assert joiner.dropped == 2
    assert joiner.add(halves[3][1]) == bytes([3]) * 600


def test_a_piece_that_contradicts_its_siblings_is_malformed() -> None:
    first, second = split(bytes(100), message_id=1, piece_bytes=90)
    other = split(bytes(150), message_id=1, piece_bytes=90)[1]
    joiner = Joiner()
    joiner.add(first)

    with pytest.raises(MalformedFrameError, match="contradicts"):
        joiner.add(other)
    assert joiner.add(second) is None


@pytest.mark.parametrize(
    ("at", "value", "error"),
    [
        (4, 9, UnsupportedVersionError),
        (16, 255, MalformedFrameError),
        (30, 255, MalformedFrameError),
        (20, 0, MalformedFrameError),
    ],
)
def test_a_head_that_lies_is_refused(at: int, value: int, error: type[Exception]) -> None:
    piece = bytearray(split(bytes(100), message_id=1, piece_bytes=90)[0])
    piece[at] = value

    with pytest.raises(error):
        Joiner().add(bytes(piece))


@given(
    st.lists(
        st.binary(max_size=40).map(PIECE_MAGIC.__add__) | st.binary(max_size=34).map((PIECE_MAGIC + b"\1").__add__)
    )
)
def test_garbage_is_refused_and_never_held_beyond_the_bound(pieces: list[bytes]) -> None:
    joiner = Joiner(max_bytes=400)

    for piece in pieces:
        try:
            joiner.add(piece)
        except (MalformedFrameError, UnsupportedVersionError):
            continue
        assert joiner._held <= 400
