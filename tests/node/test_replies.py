"""What goes back to the gateways: in order, beside the loop, and to the last word."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue

from structlog.typing import FilteringBoundLogger

from shoal.ids import RequestId
from shoal.node.replies import Replies
from shoal.runtime import frames
from shoal.runtime.request import OutputDelta, SampledToken
from shoal.threads import SystemThreads
from shoal.transport.bus import Bus, Sample
from shoal.transport.frame import unpack
from shoal.transport.memory import MemoryBus

Attach = Callable[[str], MemoryBus]
HERE = "gateway/answers"


def piece(position: int) -> OutputDelta:
    return OutputDelta(request=RequestId("r"), tokens=(SampledToken(token=1, position=position),))


@contextmanager
def gateway(bus: Bus) -> Iterator[SimpleQueue[int]]:
    """Positions of the tokens that arrive at HERE."""
    heard: SimpleQueue[int] = SimpleQueue()

    def hear(sample: Sample) -> None:
        message = frames.decode_gateway_message(unpack(sample.payload)[0])
        assert isinstance(message, frames.Delta)
        heard.put(message.delta.tokens[0].position)

    listening = bus.subscribe(HERE, hear)
    yield heard
    listening.close()


def test_what_was_said_before_closing_arrives_in_order(bus_of: Attach, log: FilteringBoundLogger) -> None:
    replies = Replies(bus_of("worker"), log, SystemThreads())
    with gateway(bus_of("gateway")) as heard:
        for position in range(50):
            replies.say(HERE, piece(position))
        replies.start("replies")
        for position in range(50, 100):
            replies.say(HERE, piece(position))

        replies.close()

        assert [heard.get(timeout=5) for _ in range(100)] == list(range(100))


def test_a_session_that_is_closed_loses_replies_and_says_so_without_an_end(
    bus_of: Attach, log: FilteringBoundLogger, logged: io.StringIO
) -> None:
    bus = bus_of("worker")
    replies = Replies(bus, log, SystemThreads())
    replies.start("replies")
    bus.close()

    replies.say(HERE, piece(0))
    replies.say(HERE, piece(1))
    replies.close()

    assert replies.lost == 2
    assert logged.getvalue().count("reply.lost") == 1, "said once, counted always"
