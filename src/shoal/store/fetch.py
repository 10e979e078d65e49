"""Chunks from the nodes that have them, by digest: resumable, verified, paced.

One queue of pieces runs across all chunks of a fetch: while the last piece of one chunk is on its way the first of the next is
asked for, so that hundreds of small tensors do not cost a round trip each.  Answers are taken in the order of their questions:
memory holds what is under way and no more (`pace.Window`).

Pieces land in a partial file at their offset, so a fetch that was cut continues where it stopped, from any other node: content
addressing makes their bytes the same.  Only the whole is verified; when it is wrong, nobody knows which node lied, and it is asked
anew from the next.  A node that does not answer costs a timeout: from then on it is asked last, until it is heard again.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

from shoal.errors import DigestMismatchError, NodeUnreachableError, ShoalError, UnavailableError
from shoal.ids import Digest, NodeId
from shoal.store.disk import full_disk_named
from shoal.store.home import Store, fetching
from shoal.store.library import decode_manifest
from shoal.store.manifest import ChunkRef, Manifest
from shoal.store.pace import FAST, Pacer
from shoal.store.peer import Absent, Piece, Wanted, ask
from shoal.transport.bus import Bus
from shoal.transport.keys import ChunkTopic

Outcome = Piece | Absent | ShoalError
Ask = Callable[[NodeId, ChunkRef, Wanted], Outcome]


class Fetcher:
    """Brings chunks from other nodes of a fleet into a store."""

    def __init__(self, bus: Bus, fleet: str, store: Store, *, pacer: Pacer, timeout_s: float = 10.0) -> None:
        self._bus = bus
        self._fleet = fleet
        self._store = store
        self._pacer = pacer
        self._timeout_s = timeout_s
        self._turn_within_s = float("inf")
        self._silent: set[NodeId] = set()

    def with_turn_within(self, limit_s: float) -> "Fetcher":
        """The same, but it raises UnavailableError when another fetch is not done within *limit_s*.

        For what others wait for: a whole model that is fetched gently may take hours.
        """
        hasty = copy(self)
        hasty._turn_within_s = limit_s  # noqa: SLF001 of our own class
        return hasty

    def model(
        self,
        digest: Digest,
        sources: Sequence[NodeId],
        wanted: Callable[[Manifest], Iterable[ChunkRef]],
        *,
        arrived: Callable[[int], None] = lambda _: None,
    ) -> Manifest:
        """Have the manifest of *digest* in the library, and those of its chunks that *wanted* chooses on disk.

        *arrived* gets the bytes of each piece.  Blocks: run it on a thread.  Raises what `chunks` raises.
        """
        with fetching(self._store, limit_s=self._turn_within_s):
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
        """Have every chunk of *wanted* on disk, each from the first of *sources* that gives it whole.

        Their manifest should be in the library, or they are garbage.  Raises UnavailableError when no source has one,
        NodeUnreachableError or DigestMismatchError when one that might have it is silent or gave something else,
        StorageFullError.
        """
        with fetching(self._store, limit_s=self._turn_within_s):
            self._fetch(wanted, sources, arrived)

    def manifest(self, digest: Digest, sources: Sequence[NodeId]) -> Manifest:
        """The manifest of this digest, from here or from one of *sources*."""
        data = self._store.chunks.get(digest)
        if data is None:
            self._errand(sources).run([ChunkRef(digest=digest, size_bytes=0)])
            data = self._store.chunks.get(digest)
        assert data is not None  # the errand has put it, or raised
        return decode_manifest(data, f"manifest {digest}")

    def _fetch(self, wanted: Iterable[ChunkRef], sources: Sequence[NodeId], arrived: Callable[[int], None]) -> None:
        held = self._store.disk.size_bytes
        missing = {ref.digest: ref for ref in wanted if held(ref.digest) != ref.size_bytes}
        self._store.quota.check(sum(ref.size_bytes for ref in missing.values()))
        self._errand(sources, arrived).run(missing.values())

    def _errand(self, sources: Sequence[NodeId], arrived: Callable[[int], None] = lambda _: None) -> "_Errand":
        return _Errand(
            store=self._store,
            sources=sources,
            silent=self._silent,
            pacer=self._pacer,
            ask=self._ask,
            arrived=arrived,
        )

    def _ask(self, node: NodeId, ref: ChunkRef, wanted: Wanted) -> Outcome:
        topic = ChunkTopic(fleet=self._fleet, node=node, digest=ref.digest)
        try:
            return ask(self._bus, topic, wanted, ref.size_bytes, timeout_s=self._timeout_s)
        except ShoalError as error:  # whatever ails that node, another may have the chunk
            return error


@dataclass(slots=True, eq=False)
class _Chunk:
    """One chunk on its way: `node` is asked, bytes below `had_bytes` are in `part`, those below `asked_bytes` under way."""

    ref: ChunkRef
    part: Path
    node: NodeId | None = None
    attempt: int = 0
    resumed: bool = False
    had_bytes: int = 0
    asked_bytes: int = 0
    total_bytes: int | None = None
    tried: set[NodeId] = field(default_factory=set)
    error: ShoalError | None = None

    def all_asked(self) -> bool:
        return self.total_bytes is not None and self.asked_bytes >= self.total_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    chunk: _Chunk
    attempt: int
    node: NodeId
    size_bytes: int
    asked_s: float
    outcome: Future[Outcome]


@dataclass(slots=True, kw_only=True)
class _Errand:
    """One fetch: chunks of which something is still to be asked, and questions under way, both oldest first."""

    store: Store
    sources: Sequence[NodeId]
    silent: set[NodeId]
    pacer: Pacer
    ask: Ask
    arrived: Callable[[int], None]
    _waiting: deque[_Chunk] = field(default_factory=deque)
    _under_way: deque[_Question] = field(default_factory=deque)

    def run(self, refs: Iterable[ChunkRef]) -> None:
        """Have every chunk on disk; the size of one that says 0 is learned from its first piece."""
        folder = self.store.partial
        self._waiting.extend(_Chunk(ref, folder / f"{ref.digest}.chunk") for ref in refs)
        if not self._waiting:
            return
        with full_disk_named(folder), ThreadPoolExecutor(FAST.pieces) as pool:
            folder.mkdir(parents=True, exist_ok=True)
            while self._waiting or self._under_way:
                if self._waiting and self._has_room():
                    self._ask_next(pool)
                else:
                    self._take_oldest()

    def _has_room(self) -> bool:
        window = self.pacer.window()
        under_way_bytes = sum(question.size_bytes for question in self._under_way)
        return len(self._under_way) < window.pieces and under_way_bytes + window.piece_bytes <= window.total_bytes

    def _ask_next(self, pool: ThreadPoolExecutor) -> None:
        chunk = self._waiting[0]
        node = chunk.node or self._begin(chunk)
        if chunk.all_asked():  # an earlier fetch was cut after its last piece
            self._waiting.popleft()
            self._finish(chunk, node)
            return
        size_bytes = self.pacer.window().piece_bytes
        if chunk.total_bytes is not None:
            size_bytes = min(size_bytes, chunk.total_bytes - chunk.asked_bytes)
        self.pacer.wait(size_bytes)
        wanted = Wanted(offset=chunk.asked_bytes, size_bytes=size_bytes)
        question = _Question(
            chunk=chunk,
            attempt=chunk.attempt,
            node=node,
            size_bytes=size_bytes,
            asked_s=self.pacer.now_s(),
            outcome=pool.submit(self.ask, node, chunk.ref, wanted),
        )
        self._under_way.append(question)
        chunk.asked_bytes += size_bytes
        if chunk.total_bytes is None or chunk.all_asked():
            self._waiting.popleft()

    def _begin(self, chunk: _Chunk) -> NodeId:
        """Turn to the next source; raises what was wrong with the earlier ones when there is none."""
        left = [node for node in self.sources if node not in chunk.tried]
        if not left:
            raise chunk.error or _nobody_has(chunk)
        chunk.node = node = min(left, key=lambda source: source in self.silent)
        chunk.had_bytes = chunk.asked_bytes = chunk.part.stat().st_size if chunk.part.exists() else 0
        chunk.resumed = chunk.had_bytes > 0
        chunk.total_bytes = chunk.ref.size_bytes or None
        return node

    def _take_oldest(self) -> None:
        question = self._under_way.popleft()
        chunk, node, outcome = question.chunk, question.node, question.outcome.result()
        if isinstance(outcome, NodeUnreachableError):
            self.silent.add(node)
        else:
            self.silent.discard(node)
            self.pacer.arrived(question.asked_s, question.size_bytes)
        if question.attempt != chunk.attempt:
            return  # that node was given up for this chunk while the answer was on its way
        match outcome:
            case Piece():
                self._keep(chunk, node, outcome)
            case Absent():
                self._turn_from(chunk, node, None)
            case ShoalError():
                self._turn_from(chunk, node, outcome)

    def _keep(self, chunk: _Chunk, node: NodeId, piece: Piece) -> None:
        with chunk.part.open("ab") as file:
            file.write(piece.data)
        chunk.had_bytes += len(piece.data)
        self.arrived(len(piece.data))
        if chunk.total_bytes is None:
            chunk.total_bytes = piece.total_bytes
            if not chunk.all_asked():
                self._waiting.appendleft(chunk)
        if chunk.had_bytes >= chunk.total_bytes:
            self._finish(chunk, node)

    def _finish(self, chunk: _Chunk, node: NodeId) -> None:
        try:
            self.store.disk.take(chunk.ref.digest, chunk.part)
        except DigestMismatchError as error:
            chunk.part.unlink(missing_ok=True)
            # Where bytes of an earlier attempt may be at fault, the same node gets another chance.
            self._turn_from(chunk, None if chunk.resumed else node, error)

    def _turn_from(self, chunk: _Chunk, node: NodeId | None, error: ShoalError | None) -> None:
        """Ask the rest elsewhere; an error says more than that others do not have the chunk."""
        chunk.attempt += 1
        chunk.node = None
        chunk.error = error or chunk.error
        if node is not None:
            chunk.tried.add(node)
        if chunk not in self._waiting:
            self._waiting.appendleft(chunk)


def _nobody_has(chunk: _Chunk) -> UnavailableError:
    asked = f"none of the {len(chunk.tried)} nodes that were asked has" if chunk.tried else "no node is known that has"
    return UnavailableError(f"{asked} chunk {chunk.ref.digest}", hint="pull the model again on one node of the fleet")
