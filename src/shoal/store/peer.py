"""Chunks from the nodes that have them, by digest: resumable, verified, paced.

A chunk is asked for in pieces, one query each, at most two under way: that keeps a link busy across its round trip, yet
leaves no queue in which a decode frame would wait behind a gigabyte of weights (ADR 3).  Pieces land in a partial file at
their offset, so a fetch that was cut continues where it stopped, from any other node: content addressing makes their bytes
the same.  Only the whole is verified; when it is wrong, nobody knows which node lied, and it is asked anew from the next.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec

from shoal.clock import Clock, SystemClock
from shoal.errors import DigestMismatchError, MalformedFrameError, NodeUnreachableError, ShoalError, UnavailableError
from shoal.ids import Digest, NodeId
from shoal.store.disk import full_disk_named
from shoal.store.home import Store, fetching
from shoal.store.library import decode_manifest
from shoal.store.manifest import ChunkRef, Manifest
from shoal.store.tier import Tier
from shoal.transport.bus import Bus, Closable, Sample
from shoal.transport.keys import ChunkTopic, key_of, pattern_of, topic_of

PIECE_BYTES = 256 * 1024
IN_FLIGHT = 2
MANIFEST_MAX_BYTES = 64 * 1024 * 1024


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


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """How hard a fetch may press on the link; None: as fast as pieces come back."""

    bytes_per_s: float | None = None
    timeout_s: float = 10.0


def wait_s(pace: Pace, asked_bytes: int, elapsed_s: float) -> float:
    """How long to hold the next question back, when *asked_bytes* were asked for in *elapsed_s*."""
    return 0.0 if pace.bytes_per_s is None else max(0.0, asked_bytes / pace.bytes_per_s - elapsed_s)


def serve_chunks(bus: Bus, fleet: str, node: NodeId, tier: Tier) -> Closable:
    """Answer pieces of the chunks in *tier* until closed; *tier* need not verify, for the asker does."""

    def reply(sample: Sample) -> bytes:
        return msgspec.msgpack.encode(_piece(tier, sample))

    return bus.answer(pattern_of(ChunkTopic, fleet=fleet, node=node), reply)


def _piece(tier: Tier, sample: Sample) -> Piece | Absent:
    topic = topic_of(sample.key)
    try:
        wanted = msgspec.msgpack.decode(sample.payload, type=Wanted)
    except msgspec.MsgspecError as error:
        raise MalformedFrameError(f"a question for a chunk does not parse: {error}") from error
    if not isinstance(topic, ChunkTopic) or wanted.offset < 0 or not 0 < wanted.size_bytes <= PIECE_BYTES:
        raise MalformedFrameError(f"bytes {wanted.offset} + {wanted.size_bytes} of {sample.key} cannot be asked for")
    data = tier.get(topic.digest)
    if data is None:
        return Absent()
    return Piece(total_bytes=data.nbytes, data=bytes(data[wanted.offset : wanted.offset + wanted.size_bytes]))


class Fetcher:
    """Brings chunks from other nodes of a fleet into a store."""

    def __init__(self, bus: Bus, fleet: str, store: Store, *, pace: Pace, clock: Clock | None = None) -> None:
        self._bus = bus
        self._fleet = fleet
        self._store = store
        self._pace = pace
        self._clock = clock or SystemClock()

    def model(
        self,
        digest: Digest,
        sources: Sequence[NodeId],
        wanted: Callable[[Manifest], Iterable[ChunkRef]],
        *,
        arrived: Callable[[int], None] = lambda _: None,
    ) -> Manifest:
        """Have the manifest of *digest* in the library, and those of its chunks that *wanted* chooses on disk.

        *arrived* gets the bytes of each piece.  Blocks: run it on a thread.  Raises what `chunk` raises.
        """
        with fetching(self._store):
            manifest = self.manifest(digest, sources)
            self._store.library.adopt(manifest)
            self._fetch(wanted(manifest), sources, arrived)
        return manifest

    def chunks(
        self,
        wanted: Iterable[ChunkRef],
        sources: Sequence[NodeId],
        *,
        arrived: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Have every chunk of *wanted* on disk; their manifest should be in the library, or they are garbage."""
        with fetching(self._store):
            self._fetch(wanted, sources, arrived)

    def _fetch(self, wanted: Iterable[ChunkRef], sources: Sequence[NodeId], arrived: Callable[[int], None]) -> None:
        held = self._store.disk.size_bytes
        missing = {ref.digest: ref for ref in wanted if held(ref.digest) != ref.size_bytes}
        self._store.quota.check(sum(ref.size_bytes for ref in missing.values()))
        for ref in missing.values():
            self.chunk(ref, sources, arrived=arrived)

    def manifest(self, digest: Digest, sources: Sequence[NodeId]) -> Manifest:
        """The manifest of this digest, from here or from one of *sources*."""
        data = self._store.chunks.get(digest)
        if data is None:
            self.chunk(ChunkRef(digest=digest, size_bytes=0), sources)
            data = self._store.chunks.get(digest)
        assert data is not None  # `chunk` has put it, or raised
        return decode_manifest(data, f"manifest {digest}")

    def chunk(
        self, ref: ChunkRef, sources: Sequence[NodeId], *, arrived: Callable[[int], None] = lambda _: None
    ) -> None:
        """Have one chunk here, from the first of *sources* that gives it whole (`size_bytes` 0: size not known).

        Raises NodeUnreachableError when no source answers, UnavailableError when none has it, DigestMismatchError when the
        last one gave something else, StorageFullError.
        """
        part = self._store.partial / f"{ref.digest}.chunk"
        last: ShoalError = UnavailableError(f"no node is known that has chunk {ref.digest}")
        left = deque(sources)
        while left:
            node, resumed = left.popleft(), part.exists()
            try:
                if self._download(node, ref, part, arrived):
                    self._store.disk.take(ref.digest, part)
                    return
                last = UnavailableError(
                    f"node {node} does not have chunk {ref.digest}", hint="pull the model on one node"
                )
            except (NodeUnreachableError, MalformedFrameError) as error:
                last = error
            except DigestMismatchError as error:
                part.unlink(missing_ok=True)
                last = error
                if resumed:  # the bytes of an earlier attempt may be at fault, not this node
                    left.appendleft(node)
        raise last

    def _download(self, node: NodeId, ref: ChunkRef, part: Path, arrived: Callable[[int], None]) -> bool:
        """Append the rest of the chunk to *part*; False when *node* does not have it."""
        with full_disk_named(part.parent):
            part.parent.mkdir(parents=True, exist_ok=True)
            with part.open("ab") as file, ThreadPoolExecutor(IN_FLIGHT) as pool:
                for answer in self._pieces(pool, node, ref, file.tell()):
                    match answer:
                        case Absent():
                            return False
                        case Piece(data=data):
                            file.write(data)
                            arrived(len(data))
        return True

    def _pieces(self, pool: ThreadPoolExecutor, node: NodeId, ref: ChunkRef, start: int) -> Iterator[Piece | Absent]:
        """Answers in order from offset *start*; the size, where not known before, is learned from the first."""
        key = key_of(ChunkTopic(fleet=self._fleet, node=node, digest=ref.digest))
        total, offset, began_s, asked = ref.size_bytes or None, start, self._clock.now_s(), 0
        under_way: deque[Future[Piece | Absent]] = deque()
        while under_way or total is None or offset < total:
            while len(under_way) < (IN_FLIGHT if total is not None else 1) and (total is None or offset < total):
                time.sleep(wait_s(self._pace, asked, self._clock.now_s() - began_s))
                under_way.append(pool.submit(self._ask, key, offset, ref.size_bytes))
                offset, asked = offset + PIECE_BYTES, asked + PIECE_BYTES
            answer = under_way.popleft().result()
            yield answer
            if isinstance(answer, Absent):
                return
            total = answer.total_bytes

    def _ask(self, key: str, offset: int, total_bytes: int) -> Piece | Absent:
        question = msgspec.msgpack.encode(Wanted(offset=offset, size_bytes=PIECE_BYTES))
        data = self._bus.query(key, question, timeout_s=self._pace.timeout_s)
        try:
            answer: Piece | Absent = msgspec.msgpack.decode(data, type=Piece | Absent)
        except msgspec.MsgspecError as error:
            raise MalformedFrameError(
                f"{key} was answered with {len(data)} bytes that do not parse: {error}"
            ) from error
        if isinstance(answer, Piece):
            _check_piece(key, answer, offset, total_bytes)
        return answer


def _check_piece(key: str, piece: Piece, offset: int, total_bytes: int) -> None:
    """Raise MalformedFrameError unless the piece is as long as was asked, of a whole of the size that was named."""
    most_bytes = total_bytes or MANIFEST_MAX_BYTES
    wrong_size = piece.total_bytes != total_bytes if total_bytes else piece.total_bytes > most_bytes
    if wrong_size or len(piece.data) != max(0, min(PIECE_BYTES, piece.total_bytes - offset)):
        raise MalformedFrameError(
            f"{key} was answered with {len(piece.data)} bytes at {offset} of {piece.total_bytes}, where at most {most_bytes} exist"
        )
