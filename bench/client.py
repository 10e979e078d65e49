"""A gateway reduced to its wires: submits straight to the first stage and notes when each token comes back.

What it measures is the pipeline alone, without HTTP, text or an event loop.  `Tap` only listens: it sees the requests and the
answers of a real gateway pass by on the fabric.
"""

import itertools
import queue
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from shoal.fleet.report import ShardId
from shoal.fleet.views import DeploymentView
from shoal.ids import NodeId, RequestId
from shoal.node.stage_keys import submit_topic
from shoal.runtime import frames
from shoal.runtime.request import FinishReason, GenerateRequest, OutputDelta, SamplingParams
from shoal.transport.bus import Bus, Lane, Sample
from shoal.transport.frame import pack, unpack
from shoal.transport.keys import EventTopic, key_of, pattern_of
from shoal.transport.zenoh import open_control

FLEET = "shoal"
_ME = NodeId("bench")
_ANSWER_LIMIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Timed:
    """A message of the fabric and the moment it came here, on the monotonic clock."""

    message: frames.GatewayMessage
    at_s: float


@contextmanager
def connected(locator: str) -> Iterator[Bus]:
    """A control session of the node at *locator*."""
    bus = open_control(locator)
    try:
        yield bus
    finally:
        bus.close()


def submit_key(view: DeploymentView) -> str:
    """Where the first stage of a deployment takes requests."""
    assert view.plan is not None
    shard = ShardId(deployment=view.name, plan_epoch=view.plan_epoch, stage=0)
    return key_of(submit_topic(FLEET, view.plan.stages[0].node, shard))


@dataclass(slots=True)
class Direct:
    """Asks one question after another; belongs to one thread."""

    bus: Bus
    _heard: "queue.SimpleQueue[Timed]" = field(default_factory=queue.SimpleQueue)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    reply_to: str = key_of(EventTopic(fleet=FLEET, node=_ME, kind="answers"))

    @contextmanager
    def listening(self) -> Iterator["Direct"]:
        subscription = self.bus.subscribe(self.reply_to, lambda sample: _hear(sample, self._heard))
        try:
            yield self
        finally:
            subscription.close()

    def ask(
        self,
        view: DeploymentView,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        sampling: SamplingParams = SamplingParams(),  # noqa: B008 - frozen
        predicted: Sequence[int] = (),
    ) -> list[float]:
        """Seconds from the request to each of its tokens."""
        request = RequestId(f"bench-{next(self._numbers)}")
        wanted = GenerateRequest(
            request=request, deployment=view.name, prompt=tuple(prompt), max_tokens=max_tokens, ignore_eos=True,
            sampling=sampling, predicted=tuple(predicted),
        )  # fmt: skip
        payload = pack(frames.encode(frames.Submit(request=wanted, reply_to=self.reply_to)), {})
        began_s = time.monotonic()
        self.bus.put(submit_key(view), payload, lane=Lane.DECODE)
        times_s: list[float] = []
        while True:
            timed = self._heard.get(timeout=_ANSWER_LIMIT_S)
            match timed.message:
                case frames.Delta(delta=OutputDelta(request=of, tokens=tokens, finish=finish)) if of == request:
                    times_s += [timed.at_s - began_s] * len(tokens)
                    if finish is FinishReason.ERROR:
                        raise RuntimeError(f"request {request} failed: {timed.message}")
                    if finish is not None:
                        return times_s
                case _:
                    continue


@dataclass(slots=True)
class Tap:
    """What passes on the fabric between a gateway and the first stage of one deployment."""

    bus: Bus
    heard: "queue.SimpleQueue[Timed]" = field(default_factory=queue.SimpleQueue)

    @contextmanager
    def listening(self, view: DeploymentView) -> Iterator["Tap"]:
        keys = (submit_key(view), pattern_of(EventTopic, fleet=FLEET, kind="answers"))
        subscriptions = [self.bus.subscribe(key, lambda sample: _hear(sample, self.heard)) for key in keys]
        try:
            yield self
        finally:
            for subscription in subscriptions:
                subscription.close()

    def drain(self) -> list[Timed]:
        """Everything that came so far."""
        found: list[Timed] = []
        while not self.heard.empty():
            found.append(self.heard.get())
        return found


def _hear(sample: Sample, heard: "queue.SimpleQueue[Timed]") -> None:
    at_s = time.monotonic()
    header, _ = unpack(sample.payload)
    heard.put(Timed(frames.decode_gateway_message(header), at_s))
