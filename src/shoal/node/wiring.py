"""The way out of a stage: dialled, tried with a hello, and only then used.

One thread does it, because dialling and closing take seconds and neither the bus nor the loop may wait; one at a time, because
two dials of one worker would race for its way out.  The newest order counts.  A way is opened aside, and handed to the loop when
the next stage has answered over it: a session without its link, or with half of one, looks healthy in every other way.  The old
way is closed when the loop has switched.

A way that is used is tried again every `PING_S` with a hello as heavy as a frame of an answer: how long that takes shows when the
link becomes slower than it was.

It never gives up: where no coordinator is there to plan anew, the next stage may come back.  But after `UNREACHED_S` the fleet is
told who cannot reach whom, and where.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import msgspec
import numpy as np
from msgspec.msgpack import Decoder
from structlog.typing import FilteringBoundLogger

from shoal.errors import NodeUnreachableError, ShoalError, UntrustedError
from shoal.node.stage_loop import StageLoop, Wired
from shoal.node.worker_spec import Wiring, WorkerSpec
from shoal.threads import Running, Threads
from shoal.transport.bus import Bus, Closable, Sample
from shoal.transport.parse import parse

UNREACHED_S = 10.0
RETRY_S = 0.5
HELLO_TIMEOUT_S = 3.0
PING_S = 1.0
PING_BYTES = 4096
"""A row of hidden numbers, as steps of an answer send it."""


_WIRING = Decoder(Wiring)


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """Where a wiring stands: made, with its round trip (None: a stage alone needs none), or why it is not."""

    wiring: Wiring
    rtt_s: float | None = None
    birth: int = 0
    """Of the worker that answered; 0 when it did not say."""
    error: ShoalError | None = None


class _Closing:
    """Told to the thread when it is to end."""


@dataclass(frozen=True, slots=True)
class _Replaced:
    """Told to the thread when the loop has left a way."""

    way: Closable


Dial = Callable[[Sequence[str]], Bus]
"""Open a session whose only neighbour is the stage at these locators."""


@dataclass(slots=True)
class Wirer:
    """Owns the worker's way out.  `on_wire` may be called from any thread."""

    spec: WorkerSpec
    loop: StageLoop
    dial: Dial
    shape: Callable[[Bus, Wiring], Bus]
    told: Callable[[Outcome], None]
    log: FilteringBoundLogger
    threads: Threads
    unreached_s: float = UNREACHED_S
    _inbox: "SimpleQueue[Wiring | _Replaced | _Closing]" = field(default_factory=SimpleQueue)
    _wanted: Wiring | None = None
    _made: Outcome | None = None
    _way: Bus | None = None
    _failing_since_s: float | None = None
    _retry_at_s: float = 0.0
    _complaint: str = ""
    _thread: Running = field(init=False)

    def __post_init__(self) -> None:
        self._thread = self.threads.start("wire", self._run)

    def on_wire(self, sample: Sample) -> None:
        """Follow a wiring unless it is followed already."""
        try:
            wiring = parse(sample.payload, _WIRING, "wiring")
        except UntrustedError as error:
            self.log.warning("wiring.dropped", shard=str(self.spec.shard), error=error.message)
            return
        if wiring.birth in {0, self.spec.birth}:  # else for a worker of this shard before us
            self._inbox.put(wiring)

    def close(self) -> None:
        """Close the way out; harmless when there is none."""
        self._inbox.put(_Closing())
        self._thread.join(HELLO_TIMEOUT_S)
        if self._way is not None:
            self._way.close()

    def _run(self) -> None:
        while True:
            try:
                item = self.threads.take(self._inbox, self._patience_s())
            except Empty:
                item = None
                self._ping()
            match item:
                case Wiring():
                    self._want(item)
                case _Replaced(way=way):
                    way.close()
                case _Closing():
                    return
                case None:
                    pass
            self._attempt()

    def _patience_s(self) -> float | None:
        if not self._is_made():
            return RETRY_S
        return PING_S if self._way is not None else None

    def _ping(self) -> None:
        """Time a hello over the way that is used; one that is not answered says nothing: silence is the loop's to notice."""
        if self._way is None or not self._is_made():
            return
        sent_s = self.threads.now_s()
        try:
            number = self.loop.greet(self._way, load=np.zeros(PING_BYTES, np.uint8))
            while (answer := self.threads.take(self.loop.greeted, RETRY_S)).number < number:
                pass  # the answer to an earlier one that was given up
        except (Empty, ShoalError):
            return
        self.loop.live.pinged(self.threads.now_s() - sent_s)
        self._met(answer.birth)

    def _met(self, birth: int) -> None:
        """Another worker may listen where the one that was greeted did: its node was started again, and the link with it."""
        assert self._made is not None
        if birth != self._made.birth and self._way is not None:
            self._made = msgspec.structs.replace(self._made, birth=birth)
            self.loop.inbox.put(Wired(self._way, birth=birth))
            self.told(self._made)

    def _want(self, wiring: Wiring) -> None:
        if wiring == self._wanted:
            return
        self._wanted, self._failing_since_s, self._complaint, self._retry_at_s = wiring, None, "", 0.0
        # Back to the way that is still there: what was last told is of another.
        if self._made is not None and self._is_made():
            self.told(self._made)

    def _is_made(self) -> bool:
        return self._wanted == (self._made.wiring if self._made else None)

    def _attempt(self) -> None:
        wiring = self._wanted
        if wiring is None or self._is_made() or self.threads.now_s() < self._retry_at_s:
            return
        try:
            alone = Outcome(wiring=wiring, birth=self.spec.birth)
            made = self._make(wiring) if self.spec.stages > 1 else alone
        except Exception as error:  # noqa: BLE001 whatever it is, it is tried again and said
            self._failed(wiring, error)
            return
        self._made, self._failing_since_s, self._complaint = made, None, ""
        self.told(self._made)

    def _make(self, wiring: Wiring) -> Outcome:
        way = self.dial(wiring.next_locators)
        try:
            way = self.shape(way, wiring)
            self.loop.hear_next(way)
            rtt_s, birth = self._greet(way)
        except BaseException:
            way.close()
            raise
        old, self._way = self._way, way
        self.loop.live.wired()
        self.loop.inbox.put(Wired(way, switched=lambda: self._inbox.put(_Replaced(old)) if old else None, birth=birth))
        return Outcome(wiring=wiring, rtt_s=rtt_s, birth=birth)

    def _greet(self, way: Bus) -> tuple[float, int]:
        """Say hello over a new way until it is answered; the round trip of the hello that was, and who answered."""
        sent_s: dict[int, float] = {}
        until_s = self.threads.now_s() + HELLO_TIMEOUT_S
        while (now_s := self.threads.now_s()) < until_s:
            sent_s[self.loop.greet(way)] = now_s
            try:
                number, birth = self.threads.take(self.loop.greeted, RETRY_S)
            except Empty:
                continue
            if number in sent_s:
                return self.threads.now_s() - sent_s[number], birth
        raise NodeUnreachableError(f"no answer to a hello within {HELLO_TIMEOUT_S:g} s")

    def _failed(self, wiring: Wiring, error: Exception) -> None:
        now_s = self.threads.now_s()
        self._retry_at_s = now_s + RETRY_S
        self._failing_since_s = now_s if self._failing_since_s is None else self._failing_since_s
        said = error.message if isinstance(error, ShoalError) else f"{type(error).__name__}: {error}"
        if said != self._complaint:
            self.log.warning("stage.not_wired", shard=str(self.spec.shard), error=said)
            self._complaint = said
        if now_s - self._failing_since_s >= self.unreached_s:
            shard = self.spec.shard
            after = (shard.stage + 1) % self.spec.stages
            text = (
                f"stage {shard.stage} on {self.spec.node} cannot reach stage {after} on {wiring.next_node} "
                f"at {', '.join(wiring.next_locators)}: {said}"
            )
            hint = (
                "does that node listen where others can dial it (--listen ADDRESS --expose), and no firewall between?"
            )
            self.told(Outcome(wiring=wiring, error=NodeUnreachableError(text, hint=hint)))
