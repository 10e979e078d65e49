"""When a stage that sends numbers that are not finite is taken for broken, and not the request that it computed.

A request may overflow a model by itself: its answer ends with an error, tried again or not.  A stage whose memory or engine is
broken spoils whatever comes through it.  So the next stage counts: several frames in a row without one that is sound, of more than
one request (an answer that is tried again is the same one).
"""

from dataclasses import dataclass, field

from shoal.ids import RequestId
from shoal.runtime.frames import BatchFrame

FRAMES = 3
REQUESTS = 2


def original(request: RequestId) -> str:
    """The name that a request had at its first try; see `shoal.node.routed`."""
    return request.partition("~")[0]


@dataclass(slots=True)
class Garbage:
    """What came from the stage before since the last sound frame."""

    frames: int = 0
    requests: set[str] = field(default_factory=set)

    @property
    def proven(self) -> bool:
        """Whether that stage must be replaced."""
        return self.frames >= FRAMES and len(self.requests) >= REQUESTS

    def saw(self, sent: BatchFrame, sound: BatchFrame) -> None:
        """Of the frame *sent*, the sequences of *sound* could be read."""
        if not sent.sequences:
            return
        if sound.sequences:
            self.forget()
            return
        self.frames += 1
        if len(self.requests) < REQUESTS:
            self.requests |= {original(rows.request) for rows in sent.sequences}

    def forget(self) -> None:
        """Another worker sends, or a sound frame has come."""
        self.frames = 0
        self.requests.clear()
