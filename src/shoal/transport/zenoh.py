"""The Bus over Zenoh: the only module that imports it.

A node has three kinds of session (ADR 3).  The *agent* is a router: it listens, and keeps dialling its site gateway or the
coordinator.  A stage's *control* session is a client of its own agent.  A stage's *data* session is a peer that dials only the
next stage of its plan epoch; peers do not relay, so without that link nothing arrives and nothing is said: ask `wait_matched`
before counting on it, and let no BLOCK queue fill (credits), for a frozen receiver would then stall this whole process.

Samples and queries are taken by plain threads from FIFO channels, which costs least per message (asyncio adds 50-125 us).  The
channels are deep because a full one blocks the session's receiving task, keep-alives included, and so ends the link.
"""

import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import msgspec
import zenoh

from shoal.errors import NodeUnreachableError, ShoalError
from shoal.transport.bus import Closable, Lane, Sample
from shoal.transport.fault import pack_error, unpack_error
from shoal.transport.keys import check_key, check_pattern
from shoal.transport.session import keep_trying, must_connect, refusal, session_config, try_once
from shoal.transport.stats import BusStats, Tally

CONNECT_TIMEOUT_S = 2.0
CLOSE_TIMEOUT_S = 2.0
_CHANNEL_SAMPLES = 1 << 16
_CHANNEL_QUERIES = 1 << 10
_MAX_PUBLISHERS = 512
_POLL_S = 0.01
_ZENOH_TIMEOUT = b"Timeout"  # Zenoh's own error reply, under varying encodings; no fault of ours packs to this


def open_agent(listen: Sequence[str], connect: Sequence[str] = (), *, discover: bool = False) -> "ZenohBus":
    """A node's router: listens at *listen*, keeps trying the agents at *connect* for ever, so an absent one is no error.

    *discover* also answers and asks on the LAN by multicast.  Raises PortInUseError, SettingsError for a bad endpoint.
    """
    return _open("router", listen, connect, keep_trying(), discover=discover)


def open_control(agent_locator: str, *, zid: str = "", timeout_s: float = CONNECT_TIMEOUT_S) -> "ZenohBus":
    """A client of the agent at *agent_locator*; raises NodeUnreachableError when it does not answer in time.

    Also when *zid* is given and another agent answers there: a loopback or bridge address means another machine on each.
    """
    bus = _open("client", (), (agent_locator,), must_connect(timeout_s))
    if zid and zid not in bus.routers:
        bus.close()
        raise NodeUnreachableError(
            f"at {agent_locator} answers {', '.join(bus.routers) or 'nobody'}, not agent {zid}",
            hint="that address means another machine from here; let the node listen at one that is its own",
        )
    return bus


def open_data(listen: Sequence[str], next: Sequence[str] = (), *, timeout_s: float = CONNECT_TIMEOUT_S) -> "ZenohBus":  # noqa: A002 the ring's word
    """A stage's peer: listens at *listen* (port 0 lets the system choose, see `locators`), dials only *next*.

    Raises PortInUseError, SettingsError for a bad endpoint, NodeUnreachableError when no locator of *next* answers in time.
    """
    if len(next) < 2:
        return _open("peer", listen, next, must_connect(timeout_s))
    # Told to insist, Zenoh wants every endpoint to answer, and most machines have an address that only they reach.
    bus = _open("peer", listen, next, try_once(timeout_s))
    try:
        bus.wait_linked(timeout_s)
    except NodeUnreachableError as error:
        bus.close()
        raise NodeUnreachableError(f"nothing answers at {', '.join(next)}", hint=error.hint) from error
    return bus


def _open(
    mode: str,
    listen: Sequence[str],
    connect: Sequence[str],
    persistence: Mapping[str, object],
    *,
    discover: bool = False,
) -> "ZenohBus":
    try:
        config = zenoh.Config.from_json5(
            json.dumps(session_config(mode, listen, connect, persistence, discover=discover))
        )
        return ZenohBus(zenoh.open(config), mode)
    except zenoh.ZError as error:
        raise refusal(str(error), listen, connect) from error


class Declared(Protocol):
    """What a subscriber and a queryable have in common."""

    @property
    def key_expr(self) -> zenoh.KeyExpr: ...
    @property
    def handler(self) -> Any: ...  # noqa: ANN401 a channel of samples or of queries
    def undeclare(self) -> None: ...


class Receiver:
    """A declared subscriber or queryable with the thread that empties its channel."""

    def __init__(self, declared: Declared, handle: Callable[[Any], None], forget: Callable[["Receiver"], None]) -> None:
        # Keeping `declared` matters: Zenoh undeclares what Python collects, without a word.
        self._declared = declared
        self._handle = handle
        self._forget = forget
        self._open = True
        name = f"zenoh-{declared.key_expr}"
        self._thread = threading.Thread(target=self._run, args=(declared.handler,), name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Undeclare and end the thread; a callback that runs now may finish.  Harmless when repeated."""
        if self._open:
            self._open = False
            self._declared.undeclare()
            self._forget(self)
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_TIMEOUT_S)

    def abandon(self) -> None:
        """Deliver nothing more; the closing of the session ends the thread."""
        self._open = False

    def _run(self, channel: Iterable[Any]) -> None:
        for item in channel:  # ends when undeclared or the session is closed
            if not self._open:
                return
            try:
                self._handle(item)
            except Exception:  # a bug in one callback must not end the thread: later samples would vanish
                logging.getLogger(__name__).exception("a callback on %s failed; later ones go on", self._thread.name)


class Token:
    """A liveliness token that is held until closed."""

    def __init__(self, declared: zenoh.LivelinessToken, forget: Callable[["Token"], None]) -> None:
        self._declared: Any = declared  # kept, for Zenoh undeclares what Python collects; its stub is untyped
        self._forget = forget
        self._open = True

    def close(self) -> None:
        """Be alive no more; harmless when repeated."""
        if self._open:
            self._open = False
            self._declared.undeclare()
            self._forget(self)

    def abandon(self) -> None:
        """The closing of the session undeclares it."""
        self._open = False


class ZenohBus:
    """One session.  Made by `open_agent`, `open_control` and `open_data`."""

    def __init__(self, session: zenoh.Session, mode: str) -> None:
        self.zid = str(session.info.zid())
        self.routers = tuple(str(found) for found in session.info.routers_zid())
        """Agents that this session had a link to when it was opened."""
        self._session = session
        self._mode = mode
        self._publishers: OrderedDict[tuple[str, Lane], zenoh.Publisher] = OrderedDict()
        self._receivers: set[Receiver] = set()
        self._tokens: set[Token] = set()
        self._lock = threading.Lock()
        self._open = True
        self._tally = Tally()

    @property
    def locators(self) -> tuple[str, ...]:
        """Where this session really listens, ports filled in; empty for a control session."""
        if self._mode == "client":
            return ()
        for reply in self._session.get(f"@/{self.zid}/{self._mode}", timeout=CONNECT_TIMEOUT_S):
            if reply.ok is not None:
                return msgspec.json.decode(reply.ok.payload.to_bytes(), type=_AdminSpace).locators
        raise NodeUnreachableError(f"session {self.zid} does not say where it listens", hint="open it again")

    def put(self, key: str, payload: bytes, *, lane: Lane = Lane.CONTROL) -> None:
        """See the port; raises NodeUnreachableError once closed.  Blocks while the queue of *lane* is full."""
        publisher = self._publisher(key, lane)
        self._tally.add(messages_sent=1, bytes_sent=len(payload))
        try:
            publisher.put(payload)
        except zenoh.ZError as error:
            raise NodeUnreachableError(f"cannot send to {key}: {error}", hint="was this session closed?") from error

    def subscribe(self, pattern: str, deliver: Callable[[Sample], None]) -> Closable:
        """See the port; raises NodeUnreachableError once closed."""
        check_pattern(pattern)

        def handle(sample: zenoh.Sample) -> None:
            payload = sample.payload.to_bytes()
            self._tally.add(messages_received=1, bytes_received=len(payload))
            try:
                deliver(Sample(key=str(sample.key_expr), payload=payload))
            except Exception:
                self._tally.add(deliver_errors=1)
                raise

        self._check_open()
        channel: Any = zenoh.handlers.FifoChannel(_CHANNEL_SAMPLES)
        return self._keep(self._session.declare_subscriber(pattern, channel), handle)

    def answer(self, pattern: str, reply: Callable[[Sample], bytes]) -> Closable:
        """See the port; raises NodeUnreachableError once closed.  Of several answers to one key Zenoh asks the nearest."""
        check_pattern(pattern)

        def handle(query: zenoh.Query) -> None:
            with query:  # dropping it is what ends the asker's wait
                payload = query.payload.to_bytes() if query.payload is not None else b""
                try:
                    answer = reply(Sample(key=str(query.key_expr), payload=payload))
                    query.reply(query.key_expr, answer, express=True)
                    self._tally.add(queries_answered=1)
                except Exception as error:  # noqa: BLE001 whatever it is, the asker must hear of it
                    query.reply_err(pack_error(error))

        self._check_open()
        channel: Any = zenoh.handlers.FifoChannel(_CHANNEL_QUERIES)
        return self._keep(self._session.declare_queryable(pattern, channel, complete=True), handle)

    def alive(self, key: str) -> Closable:
        """See the port; raises NodeUnreachableError once closed.  Others hear of a frozen process when its link's lease ends."""
        check_key(key)
        self._check_open()
        token = Token(self._session.liveliness().declare_token(key), self._tokens.discard)
        self._tokens.add(token)
        return token

    def watch(self, pattern: str, gone: Callable[[str], None]) -> Closable:
        """See the port; raises NodeUnreachableError once closed."""
        check_pattern(pattern)

        def handle(sample: zenoh.Sample) -> None:
            if sample.kind == zenoh.SampleKind.DELETE:
                gone(str(sample.key_expr))

        self._check_open()
        channel: Any = zenoh.handlers.FifoChannel(_CHANNEL_SAMPLES)
        return self._keep(self._session.liveliness().declare_subscriber(pattern, channel), handle)

    def query(self, key: str, payload: bytes, *, timeout_s: float) -> bytes:
        """See the port; a key that nobody answers is told at once where this session can know it."""
        check_key(key)
        self._check_open()
        self._tally.add(queries_sent=1)
        try:
            return self._ask(key, payload, timeout_s)
        except ShoalError:
            self._tally.add(queries_failed=1)
            raise
        except zenoh.ZError as error:
            self._tally.add(queries_failed=1)
            raise NodeUnreachableError(f"cannot ask {key}: {error}", hint="was this session closed?") from error

    def wait_matched(self, key: str, timeout_s: float, *, lane: Lane = Lane.DECODE) -> None:
        """Return as soon as somebody who can be reached subscribes to *key*; raises NodeUnreachableError after *timeout_s*.

        A data session without its link looks healthy in every other way.  Between two *agents* whose link has just come up
        a match may precede the route by 0.1 s (measured; never seen on peers or clients), and what is put meanwhile vanishes.
        """
        publisher = self._publisher(key, lane)
        matched = threading.Event()
        with publisher.declare_matching_listener(lambda status: matched.set() if status.matching else None):
            now: Any = publisher.matching_status  # its stub says bool
            if not now.matching and not matched.wait(timeout_s):
                hint = "the link is missing: try the next locator, then a relayed edge"
                raise NodeUnreachableError(f"nobody subscribes to {key} within {timeout_s:g} s", hint=hint)

    def wait_linked(self, timeout_s: float) -> None:
        """Return as soon as another session is linked to this one; raises NodeUnreachableError after *timeout_s*."""
        until_s = time.monotonic() + timeout_s
        while not (self._session.info.peers_zid() or self._session.info.routers_zid()):
            if time.monotonic() > until_s:
                hint = "is the node up, and does a firewall let its ports through?"
                raise NodeUnreachableError(f"session {self.zid} has no link after {timeout_s:g} s", hint=hint)
            time.sleep(_POLL_S)

    def stats(self) -> BusStats:
        """What went through this session."""
        return self._tally.read()

    def close(self) -> None:
        """End everything within CLOSE_TIMEOUT_S, harmless when repeated.

        A session whose peer is frozen behind a full queue cannot close; it is then left to a daemon thread and a warning is
        logged: end such a process with `os._exit`.
        """
        with self._lock:
            was_open, self._open = self._open, False
            receivers, tokens = list(self._receivers), list(self._tokens)
        if not was_open:
            return
        for token in tokens:
            token.abandon()
        for receiver in receivers:
            receiver.abandon()
        closing = threading.Thread(target=self._session.close, name=f"zenoh-close-{self.zid}", daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)
        if closing.is_alive():
            logging.getLogger(__name__).warning("session %s does not close within %g s", self.zid, CLOSE_TIMEOUT_S)
            return
        for receiver in receivers:
            receiver.close()

    def _publisher(self, key: str, lane: Lane) -> zenoh.Publisher:
        publisher = self._publishers.get((key, lane))
        if publisher is None or not self._open:
            check_key(key)
            self._check_open()
            publisher = self._session.declare_publisher(
                key,
                congestion_control=zenoh.CongestionControl.BLOCK,
                priority=_priority(lane),
                express=lane in {Lane.DECODE, Lane.CONTROL},
                reliability=zenoh.Reliability.RELIABLE,
            )
            with self._lock:
                self._publishers[key, lane] = publisher
                if len(self._publishers) > _MAX_PUBLISHERS:
                    self._publishers.popitem(last=False)  # undeclared once nobody uses it
        return publisher

    def _ask(self, key: str, payload: bytes, timeout_s: float) -> bytes:
        replies = self._session.get(
            key, payload=payload, timeout=timeout_s, priority=zenoh.Priority.INTERACTIVE_HIGH, express=True
        )
        for reply in replies:
            if reply.ok is not None:
                return reply.ok.payload.to_bytes()
            refusal_bytes = reply.err.payload.to_bytes() if reply.err is not None else _ZENOH_TIMEOUT
            if refusal_bytes != _ZENOH_TIMEOUT:
                raise unpack_error(refusal_bytes)
            hint = "the node may be frozen or cut off"
            raise NodeUnreachableError(f"no answer to {key} within {timeout_s:g} s", hint=hint)
        raise NodeUnreachableError(f"nobody answers {key}", hint="is that node up, and in this fleet?")

    def _keep(self, declared: Declared, handle: Callable[[Any], None]) -> Closable:
        receiver = Receiver(declared, handle, self._receivers.discard)
        self._receivers.add(receiver)
        return receiver

    def _check_open(self) -> None:
        if not self._open:
            raise NodeUnreachableError(f"session {self.zid} is closed", hint="open a new one")


class _AdminSpace(msgspec.Struct, frozen=True):
    locators: tuple[str, ...]


def _priority(lane: Lane) -> zenoh.Priority:
    match lane:
        case Lane.DECODE:
            return zenoh.Priority.REAL_TIME
        case Lane.CONTROL:
            return zenoh.Priority.INTERACTIVE_HIGH
        case Lane.PREFILL:
            return zenoh.Priority.DATA_HIGH
        case Lane.BULK:
            return zenoh.Priority.BACKGROUND
