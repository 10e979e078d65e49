"""Whatever bytes come for whatever is expected, there is a value of that type or one error of ours.

The damage is done to real messages, for garbage rarely gets past the first byte: bits are turned, ends cut off, lengths made to
lie, values swapped for others in order, text made to be none, and nesting deeper than the stack put where a field is unknown.
"""

import struct
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.msgpack import Decoder
from tests.transport.wire_values import values_of

from shoal.errors import MalformedFrameError, RequestTooLargeError, UnsupportedVersionError, UntrustedError
from shoal.fleet.order import Order, Reply
from shoal.fleet.report import NodeReport, ShardReport
from shoal.fleet.view import CoordinatorView
from shoal.node.calls import Answer as CallAnswer
from shoal.node.calls import Call
from shoal.node.messages import (
    AskEvents,
    AskNodes,
    AskProblem,
    AskProfile,
    BlocksOf,
    Deploy,
    Drop,
    Events,
    Leave,
    Links,
    ModelBlocks,
    Nodes,
    Preview,
    Previewed,
    ProbeLinks,
    Profiled,
    ProfileModel,
    Stated,
)
from shoal.node.worker_spec import Wiring
from shoal.runtime.frames import GatewayMessage, StageFrame
from shoal.store.peer import Absent, Piece, Wanted
from shoal.transport import frame
from shoal.transport.fault import Fault
from shoal.transport.frame import pack, unpack
from shoal.transport.parse import parse, shown

KINDS: list[Any] = [
    StageFrame, GatewayMessage, Order, Reply, NodeReport, ShardReport, CoordinatorView, Call, CallAnswer, Wiring, Fault,
    Wanted, Piece | Absent, AskEvents, AskNodes, AskProblem, AskProfile, BlocksOf, Deploy, Drop, Events, Leave, Links,
    ModelBlocks, Nodes, Preview, Previewed, ProbeLinks, Profiled, ProfileModel, Stated,
]  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: getattr(kind, "__name__", None) or str(kind)[:40])

DEEP = 200_000
STRANGE = [
    b"\xc1", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01", b"\xcf" + b"\xff" * 8, b"\xd3\x80" + bytes(7), b"\xcb" + struct.pack(">d", float("nan")),
    b"\xcb" + struct.pack(">d", float("inf")), b"\xa4\xff\xfe\xed\xa0", b"\xd7\xff" + b"\xff" * 8, b"\xc7\x0c\xff" + b"\xff" * 12,
    b"\x91" * DEEP + b"\xc0", b"\x81\xa1a" * DEEP + b"\xc0", b"\x81\x90\xc0", b"\xc0", b"\xc3", b"\x90", b"\x80",
]  # fmt: skip
"""Pieces of msgpack: lengths that lie, numbers out of range, text that is none, depth, and a list as a key."""


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.integers(0, 4)):
            case 0 if data:
                data[at] ^= draw(st.integers(1, 255))
            case 1:
                del data[at:]
            case 2:
                data[at : at + draw(st.integers(0, 9))] = draw(st.sampled_from(STRANGE))
            case 3:
                data[at:at] = data[at : at + draw(st.integers(1, 40))]
            case _:
                data += draw(st.binary(max_size=9))
    return bytes(data)


def taken(data: bytes, kind: object) -> object:
    """The value, or None where it was refused: with an error of ours that can be told in a line."""
    said = ""
    try:
        return parse(data, Decoder(kind), "message")
    except MalformedFrameError as error:
        said = error.message
    assert 0 < len(said) < 500
    return None


@every_kind
def test_any_value_that_travels_arrives_as_it_was_or_is_refused_and_damage_to_it_is_never_another_error(
    kind: object,
) -> None:
    @settings(max_examples=40, deadline=None)
    @given(st.data())
    def law(data: st.DataObject) -> None:
        sent = data.draw(values_of(kind))
        written = msgspec.msgpack.encode(sent)

        got = taken(written, kind)
        assert got is None or msgspec.msgpack.encode(got) == written
        taken(data.draw(damaged(written)), kind)

    law()


@every_kind
@pytest.mark.parametrize("odd", STRANGE, ids=lambda odd: odd[:6].hex())
def test_a_message_that_is_nothing_but_strange_is_refused(kind: object, odd: bytes) -> None:
    assert taken(odd, kind) is None or odd == b"\x80" or odd == b"\x90"  # structs without a field that must be there


@every_kind
def test_a_field_that_nobody_knows_may_be_as_deep_as_it_likes(kind: object) -> None:
    for depth in (b"\x91" * DEEP, b"\x81\xa1a" * DEEP):
        first = b"\x82\xa4type\xa5batch\xa4evil"

        assert taken(first + depth + b"\xc0", kind) is None


@given(st.binary(max_size=200))
def test_garbage_in_place_of_an_order_is_malformed_or_of_a_version_that_we_do_not_speak(data: bytes) -> None:
    with pytest.raises((MalformedFrameError, UnsupportedVersionError)):
        parse(data, Decoder(Order), "known order", unknown=UnsupportedVersionError)


def test_an_order_of_another_release_is_told_from_bytes_that_are_none() -> None:
    with pytest.raises(UnsupportedVersionError, match="no known order"):
        parse(msgspec.msgpack.encode({"type": "dance"}), Decoder(Order), "known order", unknown=UnsupportedVersionError)
    with pytest.raises(MalformedFrameError, match="3 bytes are no known order"):
        parse(b"\xdd\xff\xff", Decoder(Order), "known order", unknown=UnsupportedVersionError)


def test_lengths_that_lie_allocate_nothing() -> None:
    lies = [written for written in STRANGE if written[:1] in b"\xdd\xdf\xdb\xc6\xc9"]
    tracemalloc.start()
    try:
        for lie in lies:
            taken(b"\x82\xa4type\xa6tokens\xa6tokens" + lie, StageFrame)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_name_of_a_million_characters_is_not_repeated_in_the_error() -> None:
    name = "x" * 1_000_000
    with pytest.raises(MalformedFrameError) as refused:
        parse(msgspec.msgpack.encode({"type": name}), Decoder(StageFrame), "message")
    assert len(str(refused.value)) < 500
    assert shown(name).endswith("(1000000 characters)")


def test_a_header_that_would_cost_more_than_it_may_is_neither_sent_nor_read() -> None:
    with pytest.raises(RequestTooLargeError, match="each may have"):
        pack(bytes(frame.MAX_HEADER_BYTES + 1), {})
    head = frame._HEAD.pack(frame.MAGIC, frame.WIRE_VERSION, frame.MAX_HEADER_BYTES + 1, 0, 0)
    with pytest.raises(MalformedFrameError, match="each may have"):
        unpack(head + bytes(100))


@settings(deadline=None)
@given(st.lists(st.sampled_from(STRANGE), min_size=1, max_size=3), st.binary(max_size=64))
def test_a_strange_tensor_table_under_a_right_check_sum_is_refused(pieces: list[bytes], body: bytes) -> None:
    table = b"".join(pieces)
    head = frame._HEAD.pack(frame.MAGIC, frame.WIRE_VERSION, 0, len(table), len(body))
    check = frame._CHECK.pack(frame._crc(head, b"", table))
    whole = head + check + table + frame._zeros(frame._FIXED_BYTES + len(table)) + body
    if table == b"\x90" and not body:
        return  # no tensors: that is one of ours

    with pytest.raises(UntrustedError):
        unpack(whole)
