"""Fetching chunks from other nodes over the in-memory fabric."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from shoal.store.home import Store, fetching, missing_bytes, open_store
from shoal.store.manifest import Manifest
from shoal.store.memory import MemoryTier
from shoal.store.pace import FAST, PIECE_BYTES
from shoal.store.peer import Wanted
from shoal.store.verified import Verified
from shoal.store.write import write_model
from shoal.transport.bus import Bus
from shoal.transport.keys import ChunkTopic, key_of, pattern_of

DATA = bytes(range(256)) * 5000
FLEET = "f"


Room = Any  # of conftest


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

    room.fetcher().chunks([ref_of(DATA)], [NodeId("nobody")], arrived=room.arrived.append)

    assert room.arrived == [], "nothing came over the fabric"


def test_the_next_node_is_asked_when_one_has_nothing_or_does_not_answer(room: Room) -> None:
    empty, full = room.serve("empty", MemoryTier()), room.serve("full", holding(DATA))

    room.fetcher().chunks([ref_of(DATA)], [NodeId("dead"), empty, full])

    assert bytes(room.store.chunks.get(digest_of(DATA))) == DATA


def test_nobody_having_it_is_told_from_nobody_answering(room: Room) -> None:
    empty = room.serve("empty", MemoryTier())

    with pytest.raises(UnavailableError, match="none of the 1 nodes that were asked has chunk"):
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

    with pytest.raises(MalformedFrameError, match="answer"):
        room.fetcher().chunks([ref_of(DATA)], [NodeId("garbage")])


def test_a_question_for_too_much_is_refused(room: Room) -> None:
    node = room.serve("full", holding(DATA))
    key = key_of(ChunkTopic(fleet=FLEET, node=node, digest=digest_of(DATA)))

    for offset, size in ((-1, 10), (0, PIECE_BYTES + 1), (0, 0)):
        with pytest.raises(MalformedFrameError, match="cannot be asked for"):
            room.bus.query(key, msgspec.msgpack.encode(Wanted(offset=offset, size_bytes=size)), timeout_s=5)
    with pytest.raises(MalformedFrameError, match="no question"):
        room.bus.query(key, b"\xc1", timeout_s=5)


class Watching:
    """The asker's bus; keeps the keys that it was asked, and those that were under way together, at each question."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._lock = threading.Lock()
        self._under_way: list[str] = []
        self.keys: list[str] = []
        self.together: list[tuple[str, ...]] = []

    @property
    def most(self) -> int:
        return max(map(len, self.together))

    def query(self, key: str, payload: bytes, *, timeout_s: float) -> bytes:
        with self._lock:
            self.keys.append(key)
            self._under_way.append(key)
            self.together.append(tuple(self._under_way))
        try:
            time.sleep(0.02)  # long enough for every question that is allowed to be under way
            return self._bus.query(key, payload, timeout_s=timeout_s)
        finally:
            with self._lock:
                self._under_way.remove(key)

    def asked(self, node: NodeId) -> int:
        """Questions to *node*."""
        return sum(f"/{node}/" in key for key in self.keys)


def small_chunks(count: int) -> list[bytes]:
    return [f"chunk {i}".encode() * 200 for i in range(count)]


def test_at_most_two_full_pieces_are_under_way(room: Room) -> None:
    node, watching = room.serve("full", holding(DATA)), Watching(room.bus)

    room.fetcher(watching).chunks([ref_of(DATA)], [node])

    assert watching.most == 2


def test_small_chunks_do_not_wait_for_each_other(room: Room) -> None:
    chunks = small_chunks(12)
    node, watching = room.serve("full", holding(*chunks)), Watching(room.bus)

    room.fetcher(watching).chunks(map(ref_of, chunks), [node], arrived=room.arrived.append)

    assert watching.most == FAST.pieces
    assert [bytes(room.store.chunks.get(digest_of(data))) for data in chunks] == chunks
    assert sum(room.arrived) == sum(map(len, chunks))


def test_the_last_piece_of_a_chunk_is_under_way_with_the_first_of_the_next(room: Room) -> None:
    chunks = [DATA[i : i + (3 + i % 2) * PIECE_BYTES] for i in range(4)]
    node, watching = room.serve("full", holding(*chunks)), Watching(room.bus)

    room.fetcher(watching).chunks(map(ref_of, chunks), [node])

    assert any(len(set(keys)) > 1 for keys in watching.together)
    assert [bytes(room.store.chunks.get(digest_of(data))) for data in chunks] == chunks


def test_a_frozen_source_is_waited_for_once_and_then_asked_last(room: Room) -> None:
    chunks = small_chunks(30)
    frozen, full = room.serve("frozen", holding(*chunks)), room.serve("full", holding(*chunks))
    room.cut_off("frozen")
    watching = Watching(room.bus)
    fetcher = room.fetcher(watching)

    fetcher.chunks(map(ref_of, chunks[:20]), [frozen, full])
    fetcher.chunks(map(ref_of, chunks[20:]), [frozen, full])

    assert all(room.store.chunks.get(digest_of(data)) is not None for data in chunks)
    assert 1 <= watching.asked(frozen) <= FAST.pieces, "what was under way when the first timeout passed, and no more"


def test_a_source_that_is_heard_again_gets_its_place_back(room: Room) -> None:
    rare, common, later = small_chunks(3)
    watching = Watching(room.bus)
    fetcher = room.fetcher(watching)
    with pytest.raises(NodeUnreachableError):
        fetcher.chunks([ref_of(rare)], [NodeId("back")])
    back, other = room.serve("back", holding(rare, later)), room.serve("other", holding(common, later))

    fetcher.chunks([ref_of(common), ref_of(rare)], [back, other])
    assert bytes(room.store.chunks.get(digest_of(rare))) == rare, "asked last, but asked"
    before = watching.asked(other)
    fetcher.chunks([ref_of(later)], [back, other])

    assert watching.asked(other) == before


def test_chunks_that_lie_on_several_nodes_are_gathered(room: Room) -> None:
    chunks = small_chunks(9)
    nodes = [room.serve(f"n{i}", holding(*chunks[i::3])) for i in range(3)]

    room.fetcher().chunks(map(ref_of, chunks), nodes)

    assert [bytes(room.store.chunks.get(digest_of(data))) for data in chunks] == chunks


def test_a_fetch_that_was_cut_before_its_last_step_asks_nobody(room: Room) -> None:
    room.store.partial.mkdir(parents=True)
    (room.store.partial / f"{digest_of(DATA)}.chunk").write_bytes(DATA)
    watching = Watching(room.bus)

    room.fetcher(watching).chunks([ref_of(DATA)], [NodeId("nobody")])

    assert bytes(room.store.chunks.get(digest_of(DATA))) == DATA
    assert watching.keys == []


def test_a_chunk_that_is_damaged_where_it_lies_is_dropped_there_and_comes_from_elsewhere(room: Room) -> None:
    damaged = MemoryTier()
    damaged.put(digest_of(DATA), DATA[::-1])
    nodes = [
        room.serve("damaged", damaged, first=Verified(damaged)),
        room.serve("full", holding(DATA)),
    ]

    room.fetcher().chunks([ref_of(DATA)], nodes)

    assert bytes(room.store.chunks.get(digest_of(DATA))) == DATA
    assert damaged.get(digest_of(DATA)) is None


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


def test_a_fetch_whose_turn_does_not_come_in_time_says_so_and_succeeds_afterwards(room: Room) -> None:
    node = room.serve("one", holding(DATA))
    hasty = room.fetcher().with_turn_within(0.2)

    with fetching(room.store), pytest.raises(UnavailableError, match="another fetch, or `shoal gc`, is still at work"):
        hasty.chunks([ref_of(DATA)], [node])
    hasty.chunks([ref_of(DATA)], [node])

    assert bytes(room.store.chunks.get(digest_of(DATA))) == DATA


def test_bytes_that_only_claim_to_be_a_manifest_are_refused(room: Room) -> None:
    node = room.serve("one", holding(DATA))

    with pytest.raises(CorruptFileError, match="is not a manifest"):
        room.fetcher().manifest(digest_of(DATA), [node])
