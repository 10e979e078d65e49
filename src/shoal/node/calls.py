"""Questions between nodes that take a while: ask, then ask again until the answer is there.

A query of the fabric must be answered at once, and an answer put to somebody who is disconnected vanishes.  So a call has an id:
the first query starts the work, repeated ones find it pending or done, and a lost message costs one more round (ADR 4).
"""

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import anyio
import anyio.abc
import anyio.to_thread
import msgspec
from msgspec.msgpack import Decoder

from shoal.errors import DeadlineExceededError, NodeUnreachableError, ShoalError, UnsupportedVersionError
from shoal.fleet.faults import Fault, describe, restore
from shoal.ids import NodeId
from shoal.node.mailbox import Mailbox
from shoal.transport.bus import Bus, Closable, Sample
from shoal.transport.keys import ControlTopic, key_of, pattern_of
from shoal.transport.parse import parse, shown

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

_ANSWER: Decoder[Answer] = Decoder(Answer)
_CALL = Decoder(Call)


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
                said = parse(raw, _ANSWER, f"answer of node {node}")
                match said:
                    case Done(body=body):
                        return parse(body, Decoder(answer), f"{answer.__name__} of node {node}")
                    case Failed(fault=fault):
                        raise restore(fault)
                    case Pending():
                        await anyio.sleep(_POLL_S)
        raise DeadlineExceededError(f"node {node} did not finish {verb!r} within {timeout_s:.0f} s")


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
        call = parse(sample.payload, _CALL, "call")
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

    def _handler(self, verb: str) -> Handler:
        handler = self._handlers.get(verb)
        if handler is None:
            raise UnsupportedVersionError(f"this node does not know the question {shown(verb)!r}", hint="upgrade it")
        return handler

    async def _work(self, call: Call) -> None:
        try:
            self._answers[call.id] = Done(body=await self._handler(call.verb)(call.body))
        except ShoalError as error:
            self._answers[call.id] = Failed(fault=describe(error))
        except Exception as error:
            logging.getLogger(__name__).warning("the call %s failed", call.verb, exc_info=True)
            said = f"{call.verb}: {type(error).__name__}: {error}"
            self._answers[call.id] = Failed(fault=Fault(message=said, code=ShoalError.code))
        finished = [i for i, a in self._answers.items() if not isinstance(a, Pending)]
        for old in finished[:-_KEPT_ANSWERS]:
            del self._answers[old]
