"""Time a model's blocks on this machine, in a process of its own: its exit gives the memory back.

A model that is too big for the device is measured all the same: each kind of block is loaded alone, in a few instances.  Several
instances take turns, because one block that stays in the processor's cache runs almost twice as fast as it will in a model that
does not fit there.  What one engine call costs whatever its size (`step_overhead_s`) is the difference between two blocks
called one by one and called as one shard; it is taken out of the blocks' times, since a stage pays it once per step.
"""

import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

import msgspec
import numpy as np

from shoal.clock import Clock, SystemClock
from shoal.errors import ShoalError
from shoal.fleet.faults import Fault, describe
from shoal.ids import Digest, RequestId
from shoal.model.frontier import Block, Boundary
from shoal.model.spec import INPUT_IDS
from shoal.node.artifacts import Artifact, load_shard, open_artifact
from shoal.profile.fleet import BlockTrial
from shoal.profile.trial import TrialBudget, TrialLimits, measure, trial_points
from shoal.runtime.backend.onnx import OnnxBackend
from shoal.runtime.backend.throttled import Throttled
from shoal.runtime.ports import Backend, SequenceStep, Session
from shoal.runtime.request import Array
from shoal.store.home import Store, open_store
from shoal.store.lock import try_locked

TRIAL_CONTEXT_TOKENS = 1024
COLD_BYTES = 48 << 20
"""Weights that take turns: more than the last cache of most machines that Shoal runs on."""
MAX_INSTANCES = 16
TRIAL_STEPS = 80
"""Of each kind of block, over all its points."""
_OVERHEAD_STEPS = 40
_FILL_ROWS = 128
_WAIT_S = 90.0
_POLL_S = 0.05


class TrialSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the process is to measure; read from its standard input."""

    home: str
    manifest: Digest
    threads: int
    slowdown: float = 1.0
    memory_bytes: int = 0
    """Weights that may be loaded at once; 0: no bound."""


class TrialResult(msgspec.Struct, frozen=True, kw_only=True):
    """What it found; written to its standard output as one line of JSON."""

    trials: tuple[BlockTrial, ...]
    step_overhead_s: float
    took_s: float = 0.0
    """Loading and timing; 0 in a result that was kept before this was noted."""
    fault: Fault | None = None


@dataclass(slots=True)
class BlockRunner:
    """Steps blocks of one kind in turn; a `TrialRunner`."""

    sessions: Sequence[Session]
    inputs: Sequence[tuple[Boundary, ...]]
    """Of each session: blocks of a kind differ in names."""
    stateful: bool
    """Steps name sequences; `caches`: and these blocks hold their positions."""
    caches: bool
    clock: Clock
    _turn: int = 0
    _held: dict[int, int] = field(default_factory=dict)
    _feeds: dict[tuple[int, int], dict[str, Array]] = field(default_factory=dict)

    def step_s(self, *, rows: int, context: int, batch: int) -> float:
        """Seconds of one call with *context* positions cached (they are filled in before, untimed)."""
        index = self._turn % len(self.sessions)
        self._turn += 1
        while self.caches and self._held.get(index, 0) < context:
            held = self._held.get(index, 0)
            self._step(index, held, min(_FILL_ROWS, context - held), 1)
        began_s = self.clock.now_s()
        self._step(index, context, rows, batch)
        elapsed_s: float = self.clock.now_s() - began_s
        return elapsed_s

    def _step(self, index: int, start: int, rows: int, batch: int) -> None:
        if (index, rows) not in self._feeds:
            self._feeds[index, rows] = {b.name: _sample(b, rows) for b in self.inputs[index]}
        step = SequenceStep(request=RequestId("trial"), slot=0, start=start, count=rows, logits=1)
        self.sessions[index].step([step] * batch if self.stateful else (), self._feeds[index, rows])
        self._held[index] = start + rows


def run_trials(store: Store, spec: TrialSpec, backend: Backend, clock: Clock) -> TrialResult:
    """Measure one block of each kind, and the overhead of a call."""
    began_s = clock.now_s()
    artifact = open_artifact(store, spec.manifest)
    loader = _Loader(store=store, artifact=artifact, backend=backend, spec=spec)
    overhead_s = _overhead_s(loader, clock)
    trials: list[BlockTrial] = []
    for kind in dict.fromkeys(block.kind for block in artifact.blocks):
        blocks = [b for b in artifact.blocks if b.kind == kind]
        chosen = loader.instances(blocks)
        sessions = [loader.load(b.index, b.index + 1) for b in chosen]
        try:
            points = trial_points(TrialLimits(context_tokens=loader.context_tokens if loader.stateful else 0))
            runner = BlockRunner(
                sessions, [b.inputs for b in chosen], loader.stateful, bool(blocks[0].kv_layers), clock
            )
            trials += measure(kind, runner, points, TrialBudget(steps=TRIAL_STEPS))
        finally:
            for session in sessions:
                session.close()
    net = tuple(msgspec.structs.replace(t, time_s=max(t.time_s - overhead_s, 0.05 * t.time_s)) for t in trials)
    return TrialResult(trials=net, step_overhead_s=overhead_s, took_s=clock.now_s() - began_s)


@dataclass(slots=True)
class _Loader:
    store: Store
    artifact: Artifact
    backend: Backend
    spec: TrialSpec

    @property
    def stateful(self) -> bool:
        return any(block.kv_layers for block in self.artifact.blocks)

    @property
    def context_tokens(self) -> int:
        return min(TRIAL_CONTEXT_TOKENS, self.artifact.manifest.spec.context_tokens or TRIAL_CONTEXT_TOKENS)

    def load(self, start: int, stop: int) -> Session:
        shard = load_shard(
            self.store,
            self.artifact,
            (start, stop),
            slots=1,
            context_tokens=self.context_tokens,
            threads=self.spec.threads,
        )
        return self.backend.load(shard)

    def instances(self, blocks: Sequence[Block]) -> list[Block]:
        """As many of *blocks* as must take turns, within the memory that may be used."""
        bound = min(COLD_BYTES, self.spec.memory_bytes // 2 or COLD_BYTES)
        chosen: list[Block] = []
        total = 0
        for block in blocks[:MAX_INSTANCES]:
            if chosen and (total >= bound or not self._complete(block)):
                break
            chosen.append(block)
            total += block.weights_bytes
        return chosen

    def _complete(self, block: Block) -> bool:
        names = {t.name for t in block.tensors}
        wanted = [t.chunk for t in self.artifact.manifest.tensors if t.name in names]
        return all(self.store.disk.size_bytes(ref.digest) == ref.size_bytes for ref in wanted)


def _overhead_s(loader: _Loader, clock: Clock) -> float:
    """Seconds of a call apart from its work: two small neighbours one by one, less the two as one shard."""
    blocks = loader.artifact.blocks
    if len(blocks) < 2:
        return 0.0
    pairs = [p for p in pairwise(blocks) if not loader.stateful or p[0].kv_layers or p[1].kv_layers]
    first, second = min(pairs or pairwise(blocks), key=lambda p: p[0].weights_bytes + p[1].weights_bytes)
    spans = ((first.index, first.index + 1), (second.index, second.index + 1), (first.index, second.index + 1))
    sessions = [loader.load(*span) for span in spans]
    runners = [
        BlockRunner([session], [blocks[span[0]].inputs], loader.stateful, loader.stateful, clock)
        for session, span in zip(sessions, spans, strict=True)
    ]
    try:
        times = [[r.step_s(rows=1, context=16, batch=1) for r in runners] for _ in range(_OVERHEAD_STEPS)]
    finally:
        for session in sessions:
            session.close()
    one, two, both = (median(row[i] for row in times[5:]) for i in range(3))
    overhead_s: float = max(0.0, one + two - both)
    return overhead_s


def _sample(boundary: Boundary, rows: int) -> Array:
    """A plausible input: ids of 1, else small numbers; named axes get *rows* on axis 1 and 1 elsewhere."""
    shape = [d if isinstance(d, int) else (rows if axis == 1 else 1) for axis, d in enumerate(boundary.shape)]
    if boundary.name == INPUT_IDS or boundary.dtype.startswith("int"):
        return np.ones(shape, boundary.dtype)
    count = int(np.prod(shape))
    # Not constant: some kernels take shortcuts for rows of equal numbers.
    return (np.sin(np.arange(count)) * 0.5).astype(boundary.dtype).reshape(shape)


@contextmanager
def alone_on_this_machine() -> Iterator[None]:
    """Wait until no other node of this machine runs trials: they would measure each other."""
    for _ in range(int(_WAIT_S / _POLL_S)):
        with _my_turn(Path(tempfile.gettempdir()) / "shoal-trials.lock") as mine:
            if mine:
                yield
                return
        time.sleep(_POLL_S)
    yield  # somebody hangs: better a disturbed measurement than none


@contextmanager
def _my_turn(lock: Path) -> Iterator[bool]:
    """Whether nobody else measures; without a lock that can be had, better a disturbed measurement than none."""
    with ExitStack() as held:
        try:
            mine = held.enter_context(try_locked(lock))
        except OSError as error:
            said = f"measuring without {lock} ({error.strerror}): another user's node may measure at the same time"
            logging.getLogger(__name__).warning(said)
            mine = True
        yield mine


def main() -> None:
    """Entry point of the process."""
    spec = msgspec.json.decode(sys.stdin.readline(), type=TrialSpec)
    engine: Backend = OnnxBackend()
    backend = Throttled(engine, slowdown=spec.slowdown) if spec.slowdown > 1 else engine
    try:
        with alone_on_this_machine():
            result = run_trials(open_store(Path(spec.home)), spec, backend, SystemClock())
    except ShoalError as error:
        result = TrialResult(trials=(), step_overhead_s=0.0, fault=describe(error))
    sys.stdout.buffer.write(msgspec.json.encode(result) + b"\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
