"""One message of the data plane: a header that others define, and named tensors.

    0  magic "SHFR" | 4 version u8 | 5 zero u8[3] | 8 header bytes u32 | 12 table bytes u32 | 16 body bytes u64
    24 CRC-32 of bytes 0-24, header and table u32 | 28 zero u32 | 32 header | table | zeros up to a multiple of 64 | body

Little-endian.  The table is msgpack: name, dtype, shape, codec, offset in the body and size of each tensor.  Every tensor starts
at a multiple of 64; the offsets must be exactly those that `pack` writes, so no two tensors share bytes and none hide between.
The CRC covers what steers the parser; payload is guarded by its length and by the link below (TCP, TLS).
"""

import struct
import zlib
from collections.abc import Mapping

import msgspec

from shoal.errors import MalformedFrameError, RequestTooLargeError, UnsupportedVersionError
from shoal.transport.codec import Array, Buffer, Codec, applied, decode, encode, name_of
from shoal.transport.parse import parse, shown

MAGIC = b"SHFR"
WIRE_VERSION = 1
ALIGN_BYTES = 64
MAX_FRAME_BYTES = 64 << 20
"""What the fabric accepts as one message."""
MAX_HEADER_BYTES = 16 << 20
"""Of a header, and of the table: parsed, they take up to thirty times the room."""
MAX_TENSORS_BYTES = 256 << 20
"""All tensors of one frame after decoding."""

_HEAD = struct.Struct("<4sB3xIIQ")
_CHECK = struct.Struct("<I4x")
_FIXED_BYTES = _HEAD.size + _CHECK.size


class TensorSlot(msgspec.Struct, frozen=True, array_like=True):
    """A row of the table; `offset` counts from the start of the body."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: Codec
    offset: int
    size: int


_TABLE = msgspec.msgpack.Decoder(list[TensorSlot])


def pack(header: bytes, tensors: Mapping[str, Array], *, codec: Codec = Codec.RAW) -> bytes:
    """One frame; float32 tensors are written with *codec*, others exactly.

    Raises InvalidRequestError for a dtype that does not travel, RequestTooLargeError above MAX_FRAME_BYTES.
    """
    slots: list[TensorSlot] = []
    body: list[Buffer] = []
    offset = 0
    for name, tensor in tensors.items():
        dtype = name_of(tensor.dtype)
        used = applied(codec, dtype)
        parts = encode(tensor, used)
        size = sum(map(len, parts))
        slots.append(TensorSlot(name, dtype, tensor.shape, used, offset, size))
        body += [*parts, _zeros(size)]
        offset += _aligned(size)
    table = msgspec.msgpack.encode(slots)
    head = _HEAD.pack(MAGIC, WIRE_VERSION, len(header), len(table), offset)
    before = _FIXED_BYTES + len(header) + len(table)
    if max(len(header), len(table)) > MAX_HEADER_BYTES:
        message = f"a header of {len(header)} bytes and a table of {len(table)}: each may have {MAX_HEADER_BYTES}"
        raise RequestTooLargeError(message, hint="shorten the prompt or the grammar")
    if _aligned(before) + offset > MAX_FRAME_BYTES:
        message = f"a frame of {_aligned(before) + offset} bytes is above the limit of {MAX_FRAME_BYTES}"
        raise RequestTooLargeError(message, hint="send fewer rows at once")
    check = _CHECK.pack(_crc(head, header, table))
    return b"".join((head, check, header, table, _zeros(before), *body))


def unpack(data: bytes | memoryview) -> tuple[bytes, dict[str, Array]]:
    """The header and the tensors of a frame; raw tensors are read-only views of *data*.

    Raises UnsupportedVersionError for a frame of another version, MalformedFrameError for anything else that `pack` does
    not write, and nothing else; allocates no more than *data* proves and MAX_TENSORS_BYTES allow.
    """
    view = memoryview(data)
    header_bytes, table_bytes, body_bytes = _sizes(view)
    table_at = _FIXED_BYTES + header_bytes
    body_at = _aligned(table_at + table_bytes)
    if body_at + body_bytes != len(view):
        message = f"a frame of {len(view)} bytes says that it has {body_at + body_bytes}"
        raise MalformedFrameError(message, hint="it was truncated or is not one of ours")
    header, table = view[_FIXED_BYTES:table_at], view[table_at : table_at + table_bytes]
    if view[_HEAD.size : _FIXED_BYTES] != _CHECK.pack(_crc(view[: _HEAD.size], header, table)):
        raise MalformedFrameError(f"the check sum of a frame of {len(view)} bytes is wrong")
    return bytes(header), _tensors(parse(table, _TABLE, "tensor table of a frame"), view[body_at:])


def _sizes(view: memoryview) -> tuple[int, int, int]:
    if len(view) < _FIXED_BYTES or view[: len(MAGIC)] != MAGIC:
        raise MalformedFrameError(f"{len(view)} bytes are not a frame", hint="somebody else speaks on our keys")
    _, version, header_bytes, table_bytes, body_bytes = _HEAD.unpack_from(view)
    if version != WIRE_VERSION:
        message = f"a frame of wire version {version} came, this node speaks {WIRE_VERSION}"
        raise UnsupportedVersionError(message, hint="run the same version of shoal on every node")
    if max(header_bytes, table_bytes) > MAX_HEADER_BYTES:
        message = f"a header of {header_bytes} bytes and a table of {table_bytes}: each may have {MAX_HEADER_BYTES}"
        raise MalformedFrameError(message)
    return header_bytes, table_bytes, body_bytes


def _tensors(slots: list[TensorSlot], body: memoryview) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    offset, left = 0, MAX_TENSORS_BYTES
    for slot in slots:
        if slot.offset != offset or slot.size < 0 or offset + slot.size > len(body) or slot.name in tensors:
            raise MalformedFrameError(
                f"tensor {shown(slot.name)!r} at [{slot.offset}, +{slot.size}) is not where it must be ({offset})"
            )
        payload = body[offset : offset + slot.size]
        tensor = tensors[slot.name] = decode(payload, slot.codec, slot.dtype, slot.shape, max_bytes=left)
        left -= tensor.nbytes
        offset += _aligned(slot.size)
    if offset != len(body):
        raise MalformedFrameError(f"the body of a frame has {len(body)} bytes, its tensors {offset}")
    return tensors


def _crc(head: Buffer, header: Buffer, table: Buffer) -> int:
    return zlib.crc32(table, zlib.crc32(header, zlib.crc32(head)))


def _aligned(size: int) -> int:
    return -(-size // ALIGN_BYTES) * ALIGN_BYTES


def _zeros(size: int) -> bytes:
    """What is missing from *size* to the next boundary."""
    return bytes(_aligned(size) - size)
