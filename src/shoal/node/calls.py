"""Questions between nodes that take a while: ask, then ask again until the answer is there.

A query of the fabric must be answered at once, and an answer put to somebody who is disconnected vanishes.  So a call has an id:
the first query starts the work, repeated ones find it pending or done, and a lost message costs one more round (ADR 4).
"""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import anyio
import anyio.abc
import anyio.to_thread
import msgspec

from shoal import errors
from shoal.errors import DeadlineExceededError, MalformedFrameError, NodeUnreachableError, ShoalError
from shoal.fleet.faults import Fault, describe, restore
from shoal.ids import NodeId
from shoal.node.mailbox import Mailbox
from shoal.transport.bus import Bus, Closable, Sample
from shoal.transport.keys import ControlTopic, key_of, pattern_of

T = TypeVar("T")
Handler = Callable[[bytes], Awaitable[bytes]]

_POLL_S = 0.1
_QUERY_TIMEOUT_S = 2.0
_AWAY_S = 6.0
_KEPT_ANSWERS = 256


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A question as it travels; `id` is unique per asker."""

    id: str
    verb: str
    body: bytes


class Pending(msgspec.Struct, frozen=True, kw_only=True, tag="pending"):
    """The work goes on: ask again."""


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """The answer."""

    body: bytes


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The error, raised again on the asker's side."""

    fault: Fault


Answer = Pending | Done | Failed


class Caller:
    """The asking side."""

    def __init__(self, bus: Bus, fleet: str, make_id: Callable[[], str]) -> None:
        self._bus = bus
        self._fleet = fleet
        self._make_id = make_id

    async def call(self, node: NodeId, verb: str, request: msgspec.Struct, answer: type[T], *, timeout_s: float) -> T:
        """Ask *node*; raises what its handler raised, NodeUnreachableError, or DeadlineExceededError.

        A node that has begun to work may be out of reach for `_AWAY_S` before the call is given up: its answer is kept.
        """
        key = key_of(ControlTopic(fleet=self._fleet, node=node, verb="call"))
        payload = msgspec.msgpack.encode(Call(id=self._make_id(), verb=verb, body=msgspec.msgpack.encode(request)))
        query = partial(self._bus.query, key, payload, timeout_s=min(_QUERY_TIMEOUT_S, timeout_s))
        heard_s = float("-inf")
        with anyio.move_on_after(timeout_s):
            while True:
                try:
                    raw = await anyio.to_thread.run_sync(query, abandon_on_cancel=True)
                except NodeUnreachableError:
                    if anyio.current_time() - heard_s > _AWAY_S:
                        raise
                    await anyio.sleep(_POLL_S)
                    continue
                heard_s = anyio.current_time()
                said: Answer = _decoded(raw, Answer, node)
                match said:
                    case Done(body=body):
                        return _decoded(body, answer, node)
                    case Failed(fault=fault):
                        raise restore(fault)
                    case Pending():
                        await anyio.sleep(_POLL_S)
        raise DeadlineExceededError(f"node {node} did not finish {verb!r} within {timeout_s:.0f} s")


def _decoded(data: bytes, kind: type[T] | Any, node: NodeId) -> T:  # noqa: ANN401 a union is no type
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise MalformedFrameError(
            f"node {node} answers with something that is not known here: {error}", hint="is it of another version?"
        ) from error


class CallDesk:
    """The answering side: handlers by verb, one task per call, finished answers kept for late askers."""

    def __init__(self, bus: Bus, fleet: str, node: NodeId, handlers: dict[str, Handler]) -> None:
        self._handlers = handlers
        self._answers: dict[str, Answer] = {}
        self._inbox: Mailbox[Call] = Mailbox()
        pattern = pattern_of(ControlTopic, fleet=fleet, node=node, verb="call")
        self._answer: Closable = bus.answer(pattern, self._reply)

    def _reply(self, sample: Sample) -> bytes:
        # On a thread of the bus; dictionary operations are atomic, and only this thread adds a Pending.
        call = msgspec.msgpack.decode(sample.payload, type=Call)
        if call.id not in self._answers:
            self._answers[call.id] = Pending()
            self._inbox.post(call)
        return msgspec.msgpack.encode(self._answers[call.id])

    async def run(self) -> None:
        """Work on calls until cancelled."""
        try:
            async with anyio.create_task_group() as group:
                async for call in self._inbox:
                    group.start_soon(self._work, call)
        finally:
            self._answer.close()
            self._inbox.discard()

    async def _work(self, call: Call) -> None:
        try:
            handler = self._handlers.get(call.verb)
            if handler is None:
                raise errors.UnsupportedVersionError(
                    f"this node does not know the question {call.verb!r}", hint="upgrade it"
                )
            self._answers[call.id] = Done(body=await handler(call.body))
        except ShoalError as error:
            self._answers[call.id] = Failed(fault=describe(error))
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            self._answers[call.id] = Failed(fault=Fault(message=f"{call.verb}: {error}", code="internal_error"))
        finished = [i for i, a in self._answers.items() if not isinstance(a, Pending)]
        for old in finished[:-_KEPT_ANSWERS]:
            del self._answers[old]
