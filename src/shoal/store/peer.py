"""What nodes say to each other about chunks: a question for a piece, and the piece.

A chunk is asked for in pieces, one query each: an answer that is lost costs one piece, and nobody keeps a state for anybody.
Pieces are not verified, wholes are (`fetch`).  The first piece is answered from a tier that verifies, so that a damaged chunk is
dropped where it lies; the others are not, for that would read a gigabyte to send a quarter of a megabyte.
"""

import msgspec
from msgspec.msgpack import Decoder

from shoal.errors import MalformedFrameError
from shoal.ids import NodeId
from shoal.store.chunk import parse_digest
from shoal.store.pace import PIECE_BYTES
from shoal.store.tier import Tier
from shoal.transport.bus import Bus, Closable, Sample
from shoal.transport.keys import ChunkTopic, key_of, pattern_of, topic_of
from shoal.transport.parse import parse, shown

UNKNOWN_MAX_BYTES = 64 * 1024 * 1024
"""Bound on a chunk whose size the asker does not know, which is a manifest."""


class Wanted(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A question: at most `size_bytes` bytes of the key's chunk from `offset`."""

    offset: int
    size_bytes: int


class Piece(msgspec.Struct, frozen=True, kw_only=True, tag="piece", array_like=True):
    """The answer: bytes from the offset that was asked, and the size of the whole."""

    total_bytes: int
    data: bytes


class Absent(msgspec.Struct, frozen=True, kw_only=True, tag="absent", array_like=True):
    """This node does not have the chunk."""


_WANTED = Decoder(Wanted)
_ANSWER: Decoder[Piece | Absent] = Decoder(Piece | Absent)


def serve_chunks(bus: Bus, fleet: str, node: NodeId, tier: Tier, *, first: Tier | None = None) -> Closable:
    """Answer pieces of the chunks in *tier* until closed; those at offset 0 from *first*, the same chunks but verified."""

    def reply(sample: Sample) -> bytes:
        topic, wanted = _parsed(sample)
        data = (tier if wanted.offset or first is None else first).get(topic.digest)
        if data is None:
            return msgspec.msgpack.encode(Absent())
        piece = bytes(data[wanted.offset : wanted.offset + wanted.size_bytes])
        return msgspec.msgpack.encode(Piece(total_bytes=data.nbytes, data=piece))

    return bus.answer(pattern_of(ChunkTopic, fleet=fleet, node=node), reply)


def _parsed(sample: Sample) -> tuple[ChunkTopic, Wanted]:
    topic = topic_of(sample.key)
    wanted = parse(sample.payload, _WANTED, "question for a chunk")
    if not isinstance(topic, ChunkTopic) or parse_digest(topic.digest) is None:
        raise MalformedFrameError(f"{shown(sample.key)} names no chunk")
    if wanted.offset < 0 or not 0 < wanted.size_bytes <= PIECE_BYTES:
        raise MalformedFrameError(f"bytes {wanted.offset} + {wanted.size_bytes} of {sample.key} cannot be asked for")
    return topic, wanted


def ask(bus: Bus, topic: ChunkTopic, wanted: Wanted, total_bytes: int, *, timeout_s: float) -> Piece | Absent:
    """One piece of a chunk of *total_bytes* (0: not known) from the topic's node.

    Raises NodeUnreachableError when it does not answer, MalformedFrameError when it answers with something else.
    """
    key = key_of(topic)
    data = bus.query(key, msgspec.msgpack.encode(wanted), timeout_s=timeout_s)
    answer = parse(data, _ANSWER, f"answer to {key}")
    if isinstance(answer, Piece):
        _check_piece(key, answer, wanted, total_bytes)
    return answer


def _check_piece(key: str, piece: Piece, wanted: Wanted, total_bytes: int) -> None:
    """Raise MalformedFrameError unless the piece is as long as was asked, of a whole of the size that was named."""
    most_bytes = total_bytes or UNKNOWN_MAX_BYTES
    wrong_size = piece.total_bytes != total_bytes if total_bytes else piece.total_bytes > most_bytes
    if wrong_size or len(piece.data) != max(0, min(wanted.size_bytes, piece.total_bytes - wanted.offset)):
        raise MalformedFrameError(
            f"{key} was answered with {len(piece.data)} bytes at {wanted.offset} of {piece.total_bytes}, "
            f"where at most {most_bytes} exist"
        )
