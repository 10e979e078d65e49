"""Long messages in pieces, so that short ones pass between them.

    0  magic "SHPC" | 4 version u8 | 5 zero u8[3] | 8 message id u64 | 16 index u32 | 20 count u32 | 24 message bytes u64 | 32 data

A message that fits in one piece is not wrapped.  Pieces of several messages may interleave and come in any order; a message
that never becomes complete is forgotten when newer ones need its room, so memory is bounded whatever arrives.
"""

import struct
from dataclasses import dataclass, field

from shoal.errors import MalformedFrameError, UnsupportedVersionError

PIECE_MAGIC = b"SHPC"
PIECE_VERSION = 1
PIECE_BYTES = 64 << 10
"""Of one piece, its head included: the most that a decode frame waits for on the wire."""

_HEAD = struct.Struct("<4sB3xQIIQ")
_HELD_PIECE_BYTES = 160
"""What Python spends on a piece apart from its data, so that a flood of tiny pieces is bounded as well."""


def split(data: bytes, *, message_id: int, piece_bytes: int = PIECE_BYTES) -> list[bytes]:
    """Cut *data* into pieces of at most *piece_bytes*; *message_id* (u64) must be new to the receiving Joiner."""
    if len(data) <= piece_bytes and not data.startswith(PIECE_MAGIC):
        return [data]
    room = piece_bytes - _HEAD.size
    if room <= 0:
        raise ValueError(f"pieces of {piece_bytes} bytes have no room after their head of {_HEAD.size}")
    count = max(1, -(-len(data) // room))
    view = memoryview(data)
    return [
        _HEAD.pack(PIECE_MAGIC, PIECE_VERSION, message_id, index, count, len(data))
        + view[index * room : (index + 1) * room]
        for index in range(count)
    ]


@dataclass(slots=True)
class _Partial:
    count: int
    total: int
    pieces: dict[int, bytes] = field(default_factory=dict)
    held: int = 0


class Joiner:
    """Puts the pieces of one sender together again; one per subscription and sender.

    `dropped` counts messages that were forgotten for want of room.
    """

    def __init__(self, *, max_bytes: int = 128 << 20) -> None:
        self.dropped = 0
        self._max_bytes = max_bytes
        self._held = 0
        self._partial: dict[int, _Partial] = {}

    def add(self, piece: bytes) -> bytes | None:
        """The message that *piece* completes, or None; a message that was never cut comes back as it is.

        Raises MalformedFrameError when the piece contradicts itself or its siblings, UnsupportedVersionError for another version.
        """
        if not piece.startswith(PIECE_MAGIC):
            return piece
        message_id, index, count, total = self._parse(piece)
        known = self._partial.setdefault(message_id, _Partial(count, total))
        data = piece[_HEAD.size :]
        if (known.count, known.total) != (count, total) or (
            known.held + len(data) > total and index not in known.pieces
        ):
            self._forget(message_id)
            raise MalformedFrameError(f"piece {index} of message {message_id} contradicts the pieces before it")
        if index not in known.pieces:
            known.pieces[index] = data
            known.held += len(data)
            self._held += len(data) + _HELD_PIECE_BYTES
        if len(known.pieces) < count:
            self._make_room()
            return None
        self._forget(message_id)
        if known.held != total:
            raise MalformedFrameError(f"message {message_id} has {known.held} bytes, its pieces say {total}")
        return b"".join(known.pieces[at] for at in range(count))

    def _parse(self, piece: bytes) -> tuple[int, int, int, int]:
        if len(piece) < _HEAD.size:
            raise MalformedFrameError(f"a piece of {len(piece)} bytes is shorter than its head of {_HEAD.size}")
        _, version, message_id, index, count, total = _HEAD.unpack_from(piece)
        if version != PIECE_VERSION:
            message = f"a piece of wire version {version} came, this node speaks {PIECE_VERSION}"
            raise UnsupportedVersionError(message, hint="run the same version of shoal on every node")
        if index >= count or total + count * _HELD_PIECE_BYTES > self._max_bytes:
            message = f"piece {index} of {count}, of a message of {total} bytes, is out of bounds"
            raise MalformedFrameError(
                message, hint=f"at most {self._max_bytes} bytes are held, {_HELD_PIECE_BYTES} of them per piece"
            )
        return message_id, index, count, total

    def _make_room(self) -> None:
        while self._held > self._max_bytes:
            self._forget(next(iter(self._partial)))
            self.dropped += 1

    def _forget(self, message_id: int) -> None:
        partial = self._partial.pop(message_id)
        self._held -= partial.held + _HELD_PIECE_BYTES * len(partial.pieces)
