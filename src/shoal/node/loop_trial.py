"""What a step costs a stage beside its engine: taking a frame, scheduling, sampling, sending, and the threads' wake-ups.

Two stages whose engine does nothing pass a request's tokens round over an in-memory fabric.  Nothing of it is emulated but the
engine and the fabric (links are measured apart), and the processor's caches are left as an engine leaves them.
"""

import io
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from statistics import median

import numpy as np

from shoal.clock import Clock
from shoal.fleet.report import ShardId
from shoal.ids import DeploymentId, NodeId, RequestId
from shoal.model.spec import LOGITS
from shoal.node.stage_keys import submit_topic
from shoal.node.stage_loop import StageLoop, Stopped, Wired
from shoal.observe.log import set_up_logs
from shoal.runtime import frames
from shoal.runtime.ports import SequenceStep
from shoal.runtime.request import Array, FinishReason, GenerateRequest
from shoal.runtime.settings import StageSettings
from shoal.threads import SystemThreads
from shoal.transport.bus import Lane
from shoal.transport.frame import pack, unpack
from shoal.transport.keys import EventTopic, key_of
from shoal.transport.memory import MemoryFabric

TOKENS = 48
HIDDEN = 1024
"""Of the boundary between the two, in numbers of 4 bytes."""
_FLEET, _NODE, _DEPLOYMENT = "trial", NodeId("trial"), DeploymentId("trial")
_PATIENCE_S = 10.0


@dataclass(slots=True)
class IdleSession:
    """Does nothing but to *work*, and notes when each step began and ended."""

    outputs: Mapping[str, Array]
    clock: Clock
    work: Callable[[], object]
    began_s: list[float] = field(default_factory=list)
    ended_s: list[float] = field(default_factory=list)

    def step(self, sequences: Sequence[SequenceStep], tensors: Mapping[str, Array]) -> dict[str, Array]:
        """See `Session.step`."""
        del tensors
        self.began_s.append(self.clock.now_s())
        self.work()
        rows = sum(step.count for step in sequences)
        outputs = {
            name: np.repeat(array, 1 if name == LOGITS else rows, axis=-2) for name, array in self.outputs.items()
        }
        self.ended_s.append(self.clock.now_s())
        return outputs

    def worked_s(self) -> list[float]:
        """Seconds of each step."""
        return [ended_s - began_s for began_s, ended_s in zip(self.began_s, self.ended_s, strict=True)]

    def copy(self, source: int, target: int, count: int) -> None:
        """See `Session.copy`."""

    def release(self, slot: int) -> None:
        """See `Session.release`."""

    def close(self) -> None:
        """See `Session.close`."""


def loop_overhead_s(vocabulary: int, clock: Clock, work: Callable[[], object]) -> float:
    """Seconds per step and stage; 0 when the two stages do not answer, which the trials must not fail for."""
    boundary = {"boundary": np.zeros((1, 1, HIDDEN), np.float32)}
    logits = {LOGITS: np.zeros((1, max(2, vocabulary)), np.float32)}
    first, last = IdleSession(boundary, clock, work), IdleSession(logits, clock, work)
    with _pipeline((first, last), vocabulary) as ask:
        ask()
    idle_s = [sum(parts) for parts in zip(first.worked_s(), last.worked_s(), strict=False)]
    laps = [(b - a) - idle for a, b, idle in zip(first.began_s, first.began_s[1:], idle_s, strict=False)]
    return max(0.0, median(laps) / 2) if len(laps) >= TOKENS // 2 else 0.0


@contextmanager
def _pipeline(sessions: tuple[IdleSession, IdleSession], vocabulary: int) -> Iterator[Callable[[], None]]:
    fabric, log = MemoryFabric(), set_up_logs(io.StringIO())
    reply_to = key_of(EventTopic(fleet=_FLEET, node=_NODE, kind="answers"))
    ended: SimpleQueue[bool] = SimpleQueue()
    with ExitStack() as stack:
        outside, control = (stack.enter_context(closing(fabric.attach(name))) for name in ("outside", "control"))
        loops = []
        for index, session in enumerate(sessions):
            inbound, outbound = (stack.enter_context(closing(fabric.attach(f"{w}{index}"))) for w in ("in", "out"))
            loop = StageLoop(
                fleet=_FLEET,
                shard=ShardId(deployment=_DEPLOYMENT, plan_epoch=1, stage=index),
                settings=StageSettings(
                    plan_epoch=1, index=index, stages=2, slots=1, context_tokens=2 * TOKENS, vocabulary=vocabulary
                ),
                session=session,
                control=control,
                inbound=inbound,
                threads=SystemThreads(),
                told=lambda: None,
                log=log,
            )
            loop.listen(key_of(submit_topic(_FLEET, _NODE, loop.shard)))
            loop.hear_next(outbound)
            loop.inbox.put(Wired(outbound))
            thread = threading.Thread(target=loop.run, daemon=True)
            thread.start()
            stack.callback(thread.join, _PATIENCE_S)
            stack.callback(loop.inbox.put, Stopped())
            loops.append(loop)
        stack.enter_context(closing(outside.subscribe(reply_to, lambda sample: _hear(sample.payload, ended))))

        def ask() -> None:
            wanted = GenerateRequest(
                request=RequestId("trial"), deployment=_DEPLOYMENT, prompt=(0,), max_tokens=TOKENS, ignore_eos=True
            )
            payload = pack(frames.encode(frames.Submit(request=wanted, reply_to=reply_to)), {})
            outside.put(key_of(submit_topic(_FLEET, _NODE, loops[0].shard)), payload, lane=Lane.DECODE)
            try:
                ended.get(timeout=_PATIENCE_S)
            except Empty:
                return

        yield ask


def _hear(payload: bytes, ended: "SimpleQueue[bool]") -> None:
    header, _ = unpack(payload)
    match frames.decode_gateway_message(header):
        case frames.Delta(delta=delta) if delta.finish is not None:
            ended.put(delta.finish is FinishReason.LENGTH)
        case _:
            pass
