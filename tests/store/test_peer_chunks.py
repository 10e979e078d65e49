"""Fetching chunks from other nodes over the in-memory fabric."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from shoal.errors import (
    CorruptFileError,
    DigestMismatchError,
    MalformedFrameError,
    NodeUnreachableError,
    UnavailableError,
)
from shoal.ids import Digest, NodeId
from shoal.model.spec import ImportedModel
from shoal.store.chunk import digest_of, ref_of
from shoal.store.garbage import collect
from shoal.store.home import Store, missing_bytes, open_store
from shoal.store.manifest import Manifest
from shoal.store.memory import MemoryTier
from shoal.store.peer import PIECE_BYTES, Fetcher, Pace, Wanted, serve_chunks, wait_s
from shoal.store.tier import Tier
from shoal.store.write import write_model
from shoal.transport.bus import Bus
from shoal.transport.keys import ChunkTopic, key_of, pattern_of
from shoal.transport.memory import MemoryFabric

DATA = bytes(range(256)) * 5000
FLEET = "f"


class Room:
    """A fabric with a fetching node, and as many serving ones as a test asks for."""

    def __init__(self, stack: ExitStack, store: Store) -> None:
        self._stack = stack
        self._fabric = MemoryFabric()
        self.store = store
        self.bus = self.attach("asker")
        self.arrived: list[int] = []

    def attach(self, name: str) -> Bus:
        bus = self._fabric.attach(name)
        self._stack.callback(bus.close)
        return bus

    def serve(self, name: str, tier: Tier) -> NodeId:
        node = NodeId(name)
        self._stack.callback(serve_chunks(self.attach(name), FLEET, node, tier).close)
        return node

    def fetcher(self, store: Store | None = None, **pace: float) -> Fetcher:
        return Fetcher(self.bus, FLEET, store or self.store, pace=Pace(**({"timeout_s": 0.5} | pace)))


@pytest.fixture
def room(store: Store) -> Iterator[Room]:
    with ExitStack() as stack:
        yield Room(stack, store)


def holding(*chunks: bytes) -> MemoryTier:
    tier = MemoryTier()
    for data in chunks:
        tier.put(digest_of(data), data)
    return tier


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES])
def test_a_chunk_of_any_size_arrives_whole(room: Room, size: int) -> None:
    data = (DATA * 2)[:size]
    node = room.serve("one", holding(data))

    room.fetcher().chunks([ref_of(data)], [node], arrived=room.arrived.append)

    assert bytes(room.store.chunks.get(digest_of(data))) == data
    assert sum(room.arrived) == size
    assert collect(room.store).partial_bytes == 0


def test_what_is_here_already_is_not_asked_for(room: Room) -> None:
    room.store.chunks.put(digest_of(DATA), DATA)

    room.fetcher().chunks([ref_of(DATA)], [NodeId("nobody")])


def test_the_next_node_is_asked_when_one_has_nothing_or_does_not_answer(room: Room) -> None:
    empty, full = room.serve("empty", MemoryTier()), room.serve("full", holding(DATA))

    room.fetcher().chunks([ref_of(DATA)], [NodeId("dead"), empty, full])

    assert bytes(room.store.chunks.get(digest_of(DATA))) == DATA


def test_nobody_having_it_is_told_from_nobody_answering(room: Room) -> None:
    empty = room.serve("empty", MemoryTier())

    with pytest.raises(UnavailableError, match="does not have chunk"):
        room.fetcher().chunks([ref_of(DATA)], [empty])
    with pytest.raises(NodeUnreachableError):
        room.fetcher().chunks([ref_of(DATA)], [NodeId("dead")])


def test_a_fetch_that_was_cut_goes_on_from_another_node(room: Room) -> None:
    class Dying(MemoryTier):
        def __init__(self) -> None:
            super().__init__()
            self.left = 2

        def get(self, digest: Digest) -> memoryview | None:
            self.left -= 1
            if self.left < 0:
                raise NodeUnreachableError("gone")
            return super().get(digest)

    dying = Dying()
    dying.put(digest_of(DATA), DATA)
    nodes = [room.serve("dying", dying), room.serve("full", holding(DATA))]

    room.fetcher().chunks([ref_of(DATA)], nodes, arrived=room.arrived.append)

    assert bytes(room.store.chunks.get(digest_of(DATA))) == DATA
    assert sum(room.arrived) == len(DATA)


def test_a_node_that_sends_other_bytes_is_passed_over(room: Room) -> None:
    liar = MemoryTier()
    liar.put(digest_of(DATA), DATA[::-1])
    nodes = [room.serve("liar", liar), room.serve("full", holding(DATA))]

    room.fetcher().chunks([ref_of(DATA)], nodes)

    assert bytes(room.store.chunks.get(digest_of(DATA))) == DATA


def test_only_liars_is_an_error_and_leaves_nothing(room: Room) -> None:
    liar = MemoryTier()
    liar.put(digest_of(DATA), DATA[::-1])
    node = room.serve("liar", liar)

    with pytest.raises(DigestMismatchError):
        room.fetcher().chunks([ref_of(DATA)], [node])

    assert room.store.disk.sizes_bytes() == {}
    assert collect(room.store).total_bytes == 0


def test_a_damaged_partial_file_does_not_blame_the_node(room: Room) -> None:
    node = room.serve("full", holding(DATA))
    room.store.partial.mkdir(parents=True)
    (room.store.partial / f"{digest_of(DATA)}.chunk").write_bytes(b"torn")

    room.fetcher().chunks([ref_of(DATA)], [node])

    assert bytes(room.store.chunks.get(digest_of(DATA))) == DATA


@pytest.mark.parametrize("answer", [b"", b"\xff\xff", b"\x93\xa5piece\x05\xc4\x01x"])
def test_garbage_answers_are_errors_of_ours(room: Room, answer: bytes) -> None:
    bus = room.attach("garbage")
    bus.answer(pattern_of(ChunkTopic, fleet=FLEET, node=NodeId("garbage")), lambda _: answer)

    with pytest.raises(MalformedFrameError, match="answered with"):
        room.fetcher().chunks([ref_of(DATA)], [NodeId("garbage")])


def test_a_question_for_too_much_is_refused(room: Room) -> None:
    node = room.serve("full", holding(DATA))
    key = key_of(ChunkTopic(fleet=FLEET, node=node, digest=digest_of(DATA)))

    for offset, size in ((-1, 10), (0, PIECE_BYTES + 1), (0, 0)):
        with pytest.raises(MalformedFrameError, match="cannot be asked for"):
            room.bus.query(key, msgspec.msgpack.encode(Wanted(offset=offset, size_bytes=size)), timeout_s=5)
    with pytest.raises(MalformedFrameError, match="does not parse"):
        room.bus.query(key, b"\xc1", timeout_s=5)


def test_at_most_two_pieces_are_under_way_and_none_before_its_time(room: Room) -> None:
    under_way, most, lock = 0, 0, threading.Lock()

    class Watching:
        def query(self, key: str, payload: bytes, *, timeout_s: float) -> bytes:
            nonlocal under_way, most
            with lock:
                under_way += 1
                most = max(most, under_way)
            try:
                time.sleep(0.02)  # long enough for every question that is allowed to be under way
                return room.bus.query(key, payload, timeout_s=timeout_s)
            finally:
                with lock:
                    under_way -= 1

    node = room.serve("full", holding(DATA))
    fetcher = Fetcher(Watching(), FLEET, room.store, pace=Pace())

    fetcher.chunks([ref_of(DATA)], [node])

    assert most == 2


def test_questions_are_held_back_to_the_limit() -> None:
    limited = Pace(bytes_per_s=1000)

    assert wait_s(limited, asked_bytes=3000, elapsed_s=1.0) == 2.0
    assert wait_s(limited, asked_bytes=3000, elapsed_s=5.0) == 0.0
    assert wait_s(Pace(), asked_bytes=3000, elapsed_s=0.0) == 0.0


@pytest.fixture
def published(tmp_path: Path, small_model: Callable[..., ImportedModel]) -> tuple[Store, Digest, Manifest]:
    """A store with one model, its version and its manifest."""
    owner = open_store(tmp_path / "owner")
    manifest = write_model(owner, small_model())
    return owner, owner.library.write("small", manifest), manifest


def test_a_node_gets_a_model_by_its_version_and_only_the_tensors_it_chose(
    room: Room, published: tuple[Store, Digest, Manifest]
) -> None:
    owner, digest, manifest = published
    node = room.serve("owner", owner.disk)

    got = room.fetcher().model(digest, [node], lambda m: [m.graph, m.tensors[0].chunk])

    assert got == manifest
    assert room.store.library.digest("small") == digest
    held = {manifest.graph.digest, manifest.tensors[0].chunk.digest}
    assert missing_bytes(room.store, got).keys() == manifest.chunks().keys() - held
    assert collect(room.store).total_bytes == 0


def test_bytes_that_only_claim_to_be_a_manifest_are_refused(room: Room) -> None:
    node = room.serve("one", holding(DATA))

    with pytest.raises(CorruptFileError, match="is not a manifest"):
        room.fetcher().manifest(digest_of(DATA), [node])
