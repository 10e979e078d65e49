"""Time a model's blocks on this machine, in a process of its own: its exit gives the memory back.

A model that is too big for the device is measured all the same: a run of neighbours as one shard, then one block of each kind,
one after another (`shoal.profile.calls` says why, and how calls are told apart from blocks).

Before each timed step something else is read that fills the processor's caches, and the core sleeps for a moment.  In service a
stage waits for the others between two steps, and its weights are read from memory again: a block that stays in the cache runs
twice as fast as it will there, and a core that has slept is some percent slower at first.
A step of another shape than the last is made once untimed, for the engine binds its tensors anew then.

Memory is faster in one second than in the next where a machine has neighbours, and steps of a single row are bound by it.  So
these are timed in several passes, loaded anew each time, some seconds apart; the median pass counts.  Blocks that are in the run
are timed alone in the first one only: it is the run that says what they cost together.
"""

import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from shoal.clock import Clock, SystemClock
from shoal.errors import ShoalError
from shoal.fleet.faults import Fault, describe
from shoal.ids import Digest, RequestId
from shoal.model.frontier import Block, Boundary
from shoal.model.spec import INPUT_IDS
from shoal.node.artifacts import Artifact, load_shard, open_artifact
from shoal.node.loop_trial import loop_overhead_s
from shoal.profile.calls import SampleSpan, apportion, sample_spans
from shoal.profile.fleet import BlockTrial
from shoal.profile.trial import (
    SHORT_CONTEXT,
    TrialBudget,
    TrialLimits,
    TrialPoint,
    measure,
    median_trials,
    trial_points,
)
from shoal.runtime.backend.onnx import OnnxBackend
from shoal.runtime.backend.throttled import Throttled
from shoal.runtime.ports import Backend, SequenceStep, Session
from shoal.runtime.request import Array
from shoal.store.home import Store, open_store
from shoal.store.lock import try_locked

TRIAL_CONTEXT_TOKENS = 1024
COLD_BYTES = 48 << 20
"""What is read before a timed step, and the weights of a run at most: more than the last cache of most machines at the edge."""
REST_S = 0.003
MAX_BATCH = 4
METHOD = 4
"""Trials that were made and kept by another method are made anew."""
PASSES = 4
BUDGET = TrialBudget(steps=50, repeats=4, burst=2, warm_up=0, timed_s=1.0)
"""Of each kind of block and of the run, in a pass."""
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
    loop_overhead_s: float = 0.0
    took_s: float = 0.0
    """Loading and timing; 0 in a result that was kept before this was noted."""
    method: int = 0
    fault: Fault | None = None


@dataclass(slots=True)
class BlockRunner:
    """Steps one shard; a `TrialRunner`."""

    session: Session
    inputs: Sequence[Boundary]
    stateful: bool
    """Steps name sequences; `caches`: and these blocks hold their positions."""
    caches: bool
    clock: Clock
    chill: Callable[[], object] = lambda: None
    """Called before each timed step, to leave the processor's caches as service does."""
    _held: int = 0
    _shape: tuple[int, int, int] | None = None
    _feeds: dict[int, dict[str, Array]] = field(default_factory=dict)

    def step_s(self, *, rows: int, context: int, batch: int) -> float:
        """Seconds of one call with *context* positions cached (they are filled in before, untimed)."""
        while self.caches and self._held < context:
            self._step(self._held, min(_FILL_ROWS, context - self._held), 1)
        if self._shape != (rows, context, batch):
            self._step(context, rows, batch)
        self._shape = (rows, context, batch)
        self.chill()
        began_s = self.clock.now_s()
        self._step(context, rows, batch)
        elapsed_s: float = self.clock.now_s() - began_s
        return elapsed_s

    def _step(self, start: int, rows: int, batch: int) -> None:
        if rows not in self._feeds:
            self._feeds[rows] = {b.name: _sample(b, rows) for b in self.inputs}
        feeds = self._feeds[rows]
        step = SequenceStep(request=RequestId("trial"), slot=0, start=start, count=rows, logits=1)
        if self.stateful:
            self.session.step([step] * batch, _repeated(feeds, batch))
        else:
            self.session.step((), feeds)
        self._held = start + rows


def run_trials(store: Store, spec: TrialSpec, backend: Backend, clock: Clock) -> TrialResult:
    """Measure a run of blocks and one of each kind; and by that, and by a loop without an engine, what a step costs beside them."""
    began_s = clock.now_s()
    bench = _Bench(store, open_artifact(store, spec.manifest), backend, spec, clock)
    blocks, vocabulary = bench.artifact.blocks, bench.artifact.manifest.spec.vocabulary
    spans = trial_spans(blocks, spec.memory_bytes)
    run = next((span for span in spans if not span.kind), None)
    inside = {block.kind for block in blocks[run.start : run.stop]} if run else set()
    passes = {span: [bench.time(span, first=True)] for span in spans}
    for _ in range(PASSES - 1):
        for span in (s for s in spans if s.kind not in inside):
            passes[span].append(bench.time(span, first=False))
    timed = {span: median_trials(found) for span, found in passes.items()}
    alone = [trial for span, trials in timed.items() if span.kind for trial in trials]
    kinds = [block.kind for block in blocks[run.start : run.stop]] if run else []
    found = apportion(alone, timed[run] if run else (), kinds)
    loop_s = loop_overhead_s(vocabulary, clock, bench.chill())
    return TrialResult(
        trials=found.trials,
        step_overhead_s=found.step_overhead_s + loop_s,
        loop_overhead_s=loop_s,
        took_s=clock.now_s() - began_s,
        method=METHOD,
    )


def trial_spans(blocks: Sequence[Block], memory_bytes: int) -> tuple[SampleSpan, ...]:
    """What is timed where shards may use *memory_bytes* (0: no bound)."""
    bound = memory_bytes // 2 or COLD_BYTES
    return sample_spans(blocks, run_bytes=min(COLD_BYTES, bound), most_bytes=bound)


@dataclass(frozen=True, slots=True)
class _Bench:
    store: Store
    artifact: Artifact
    backend: Backend
    spec: TrialSpec
    clock: Clock

    def time(self, span: SampleSpan, *, first: bool) -> tuple[BlockTrial, ...]:
        """Load the blocks of *span*, time them, and let go of them; after the *first* time single rows only."""
        blocks = self.artifact.blocks[span.start : span.stop]
        session = self._load(span)
        try:
            stateful = any(block.kv_layers for block in self.artifact.blocks)
            caches = any(block.kv_layers for block in blocks)
            runner = BlockRunner(session, blocks[0].inputs, stateful, caches, self.clock, self.chill())
            points = [p for p in self._points(span, stateful=stateful) if first or p.rows == p.batch == 1]
            return measure(span.kind, runner, points, BUDGET)
        finally:
            session.close()

    def _load(self, span: SampleSpan) -> Session:
        shard = load_shard(
            self.store,
            self.artifact,
            (span.start, span.stop),
            slots=1,
            context_tokens=self._context_tokens,
            threads=self.spec.threads,
        )
        return self.backend.load(shard)

    def _points(self, span: SampleSpan, *, stateful: bool) -> list[TrialPoint]:
        """Of a run only short contexts: what a cached position costs, its blocks alone tell as well, and sooner."""
        longest = self._context_tokens
        limits = TrialLimits(
            context_tokens=longest if stateful else 0,
            max_rows=min(_FILL_ROWS, longest),
            max_batch=MAX_BATCH if stateful else 1,
        )
        return [point for point in trial_points(limits) if span.kind or point.context <= SHORT_CONTEXT]

    @property
    def _context_tokens(self) -> int:
        return min(TRIAL_CONTEXT_TOKENS, self.artifact.manifest.spec.context_tokens or TRIAL_CONTEXT_TOKENS)

    def chill(self) -> Callable[[], object]:
        """What leaves the processor as waiting for the other stages does."""
        size_bytes = min(COLD_BYTES, self.spec.memory_bytes // 4 or COLD_BYTES)
        other = np.ones(max(1, size_bytes // 8))

        def rest() -> None:
            other.max()
            time.sleep(REST_S)

        return rest


def _repeated(feeds: Mapping[str, Array], batch: int) -> Mapping[str, Array]:
    """The rows of *batch* sequences one after another."""
    if batch == 1:
        return feeds
    return {name: np.concatenate([array] * batch, axis=1) for name, array in feeds.items()}


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
    backend = Throttled(engine, slowdown=lambda: spec.slowdown) if spec.slowdown > 1 else engine
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
