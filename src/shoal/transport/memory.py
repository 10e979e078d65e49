"""A fleet's fabric in one process: the fake that passes the port's contract, with weather.

Each attachment has a thread for deliveries and one for answers, so a callback never runs on the sender's stack, as on the real
fabric.  Delay, loss and partition are set per direction of a pair of hosts; an attachment is a host of its own unless it says on
which it is.  A message is aimed at the subscriptions
that match when it is sent; delay never reorders what one sender sends to one receiver.
"""

import random
import threading
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue

import msgspec

from shoal.errors import InvalidRequestError, NodeUnreachableError, ShoalError
from shoal.threads import SystemThreads, Threads
from shoal.transport.bus import Closable, Lane, Sample
from shoal.transport.fault import pack_error, unpack_error
from shoal.transport.keys import check_key, check_pattern, matches
from shoal.transport.stats import BusStats, Tally
from shoal.transport.timed import TimedThread

Replies = SimpleQueue[bytes | ShoalError]


class Weather(msgspec.Struct, frozen=True, kw_only=True):
    """What happens to messages in one direction; `loss` is the share that vanishes, from 0 to 1."""

    delay_s: float = 0.0
    loss: float = 0.0


class Subscription:
    """Somebody who wants samples, until closed."""

    def __init__(
        self, pattern: str, deliver: Callable[[Sample], None], remove: Callable[["Subscription"], None]
    ) -> None:
        self.pattern = pattern
        self._deliver = deliver
        self._remove = remove
        self._open = True

    def hand(self, sample: Sample) -> None:
        """Deliver unless closed meanwhile."""
        if self._open:
            self._deliver(sample)

    def close(self) -> None:
        """Deliver nothing more; harmless when repeated."""
        self._open = False
        self._remove(self)


class Answerer:
    """Somebody who answers queries, until closed."""

    def __init__(self, pattern: str, reply: Callable[[Sample], bytes], remove: Callable[["Answerer"], None]) -> None:
        self.pattern = pattern
        self.reply = reply
        self._remove = remove

    def close(self) -> None:
        """Answer nothing more; harmless when repeated."""
        self._remove(self)


class Token:
    """Somebody who is alive, until closed."""

    def __init__(self, key: str, remove: Callable[["Token"], None]) -> None:
        self.key = key
        self._remove = remove

    def close(self) -> None:
        """Be alive no more; harmless when repeated."""
        self._remove(self)


class MemoryFabric:
    """Where the buses of one process meet; delays and patience are of the time of *threads*."""

    def __init__(self, *, seed: int = 0, threads: Threads | None = None) -> None:
        self._lock = threading.Lock()
        self._buses: dict[str, MemoryBus] = {}
        self._weather: dict[tuple[str, str], Weather] = {}
        self._cut: set[frozenset[str]] = set()
        self._last_due_s: dict[tuple[str, str], float] = {}
        self._dice = random.Random(seed)  # noqa: S311 loss in tests wants repeatable dice, not secrets
        self._threads = threads or SystemThreads()

    def attach(self, name: str, *, host: str = "", threads: Threads | None = None) -> "MemoryBus":
        """A new bus called *name*, whose threads are *threads*; raises InvalidRequestError while one of that name is open."""
        with self._lock:
            if name in self._buses:
                raise InvalidRequestError(f"{name!r} is attached already", hint="close its bus first")
            bus = self._buses[name] = MemoryBus(self, name, host or name, threads or self._threads)
            return bus

    def detach(self, name: str) -> None:
        """Forget the bus called *name*; its `close` does this."""
        with self._lock:
            self._buses.pop(name, None)

    def partition(self, a: str, b: str) -> None:
        """Let nothing pass between hosts *a* and *b* in either direction, silently."""
        with self._lock:
            self._cut.add(frozenset((a, b)))

    def heal(self, a: str, b: str) -> None:
        """End the partition; what was sent meanwhile stays lost."""
        with self._lock:
            self._cut.discard(frozenset((a, b)))

    def reaches(self, a: str, b: str) -> bool:
        """Whether there is a way between hosts *a* and *b*."""
        return frozenset((a, b)) not in self._cut

    def weather(self, source: str, target: str, weather: Weather) -> None:
        """Set what happens from *source* to *target* from now on."""
        with self._lock:
            self._weather[source, target] = weather

    def carry(self, source: "MemoryBus", sample: Sample) -> None:
        """Hand *sample* to every reachable bus that has a subscription for it."""
        with self._lock:
            for bus in self._buses.values():
                wanted = bus.subscriptions(sample.key)
                due_s = self._due_s(source, bus) if wanted else None
                if due_s is not None:
                    for subscription in wanted:
                        bus.deliveries.submit(due_s, partial(bus.deliver, subscription, sample))

    def bury(self, source: "MemoryBus", key: str) -> None:
        """Tell every reachable bus that watches *key* that nobody is alive under it.  A partition alone tells nobody."""
        with self._lock:
            for bus in self._buses.values():
                watchers = bus.watchers(key)
                due_s = self._due_s(source, bus) if watchers else None
                if due_s is not None:
                    for watcher in watchers:
                        bus.deliveries.submit(due_s, partial(watcher.hand, Sample(key=key, payload=b"")))

    def ask(self, source: "MemoryBus", sample: Sample, replies: Replies) -> bool:
        """Send a query to one bus that answers it, a reachable one if there is; False when nobody answers it at all."""
        with self._lock:
            able = [
                (bus, answerer) for bus in self._buses.values() if (answerer := bus.answerer(sample.key)) is not None
            ]
            able.sort(key=lambda entry: not self.reaches(source.host, entry[0].host))
            if not able:
                return False
            bus, answerer = able[0]
            due_s = self._due_s(source, bus)
            if due_s is not None:
                bus.answers.submit(due_s, partial(bus.respond, answerer, sample, (source, replies)))
            return True

    def give_back(self, source: "MemoryBus", target: "MemoryBus", deliver: Callable[[], None]) -> None:
        """Carry an answer from *source*, whose thread waits for nothing meanwhile."""
        with self._lock:
            due_s = self._due_s(source, target)
            if due_s is not None and source.name in self._buses:
                source.deliveries.submit(due_s, deliver)

    def _due_s(self, source: "MemoryBus", target: "MemoryBus") -> float | None:
        """When a message sent now arrives; None when it does not."""
        weather = self._weather.get((source.host, target.host), Weather())
        if not self.reaches(source.host, target.host) or self._dice.random() < weather.loss:
            return None
        edge = (source.name, target.name)
        due_s = max(self._threads.now_s() + weather.delay_s, self._last_due_s.get(edge, 0.0))
        self._last_due_s[edge] = due_s
        return due_s


class MemoryBus:
    """One node's attachment to a MemoryFabric."""

    def __init__(self, fabric: MemoryFabric, name: str, host: str, threads: Threads) -> None:
        self.name = name
        self.host = host
        self.deliveries = TimedThread(f"memory-bus-{name}", threads)
        self.answers = TimedThread(f"memory-bus-{name}-answers", threads)
        self._threads = threads
        self._fabric = fabric
        self._subscriptions: tuple[Subscription, ...] = ()
        self._answerers: tuple[Answerer, ...] = ()
        self._watchers: tuple[Subscription, ...] = ()
        self._tokens: tuple[Token, ...] = ()
        self._lock = threading.Lock()
        self._open = True
        self._tally = Tally()

    def put(self, key: str, payload: bytes, *, lane: Lane = Lane.CONTROL) -> None:  # noqa: ARG002 memory has no queue to jump
        """See the port; raises NodeUnreachableError once closed."""
        check_key(key)
        self._check_open()
        self._tally.add(messages_sent=1, bytes_sent=len(payload))
        self._fabric.carry(self, Sample(key=key, payload=bytes(payload)))

    def subscribe(self, pattern: str, deliver: Callable[[Sample], None]) -> Closable:
        """See the port; raises NodeUnreachableError once closed."""
        check_pattern(pattern)
        self._check_open()
        subscription = Subscription(pattern, deliver, self._unsubscribe)
        with self._lock:
            self._subscriptions += (subscription,)
        return subscription

    def answer(self, pattern: str, reply: Callable[[Sample], bytes]) -> Closable:
        """See the port; raises NodeUnreachableError once closed."""
        check_pattern(pattern)
        self._check_open()
        answerer = Answerer(pattern, reply, self._unanswer)
        with self._lock:
            self._answerers += (answerer,)
        return answerer

    def alive(self, key: str) -> Closable:
        """See the port; raises NodeUnreachableError once closed."""
        check_key(key)
        self._check_open()
        token = Token(key, self._bury)
        with self._lock:
            self._tokens += (token,)
        return token

    def watch(self, pattern: str, gone: Callable[[str], None]) -> Closable:
        """See the port; raises NodeUnreachableError once closed."""
        check_pattern(pattern)
        self._check_open()
        watcher = Subscription(pattern, lambda sample: gone(sample.key), self._unwatch)
        with self._lock:
            self._watchers += (watcher,)
        return watcher

    def query(self, key: str, payload: bytes, *, timeout_s: float) -> bytes:
        """See the port; nobody to ask is told at once.  Not from within `reply` on the same bus: that waits for itself."""
        check_key(key)
        self._check_open()
        self._tally.add(queries_sent=1)
        try:
            return self._ask(Sample(key=key, payload=bytes(payload)), timeout_s)
        except ShoalError:
            self._tally.add(queries_failed=1)
            raise

    def close(self) -> None:
        """End every subscription and answer; harmless when repeated."""
        with self._lock:
            was_open, self._open = self._open, False
            subscriptions, answerers = self._subscriptions + self._watchers, self._answerers
            tokens = self._tokens
        if was_open:
            self._fabric.detach(self.name)
        for token in tokens:
            token.close()
        for subscription in subscriptions:
            subscription.close()
        for answerer in answerers:
            answerer.close()
        self.deliveries.close()
        self.answers.close()

    def stats(self) -> BusStats:
        """What went through this bus."""
        return self._tally.read()

    def subscriptions(self, key: str) -> tuple[Subscription, ...]:
        """Who wants *key* here now (asked by the fabric)."""
        return tuple(s for s in self._subscriptions if matches(s.pattern, key))

    def answerer(self, key: str) -> Answerer | None:
        """Who answers *key* here now (asked by the fabric)."""
        return next((a for a in self._answerers if matches(a.pattern, key)), None)

    def watchers(self, key: str) -> tuple[Subscription, ...]:
        """Who watches *key* here now (asked by the fabric)."""
        return tuple(w for w in self._watchers if matches(w.pattern, key))

    def deliver(self, subscription: Subscription, sample: Sample) -> None:
        """Hand *sample* over, on the delivery thread."""
        self._tally.add(messages_received=1, bytes_received=len(sample.payload))
        try:
            subscription.hand(sample)
        except Exception:
            self._tally.add(deliver_errors=1)
            raise

    def respond(self, answerer: Answerer, sample: Sample, asker: tuple["MemoryBus", Replies]) -> None:
        """Answer one query, on the answering thread; errors travel as on the real fabric."""
        bus, replies = asker
        try:
            outcome: bytes | ShoalError = answerer.reply(sample)
            self._tally.add(queries_answered=1)
        except Exception as error:  # noqa: BLE001 whatever it is, the asker must hear of it
            outcome = unpack_error(pack_error(error))
        self._fabric.give_back(self, bus, partial(replies.put, outcome))

    def _ask(self, sample: Sample, timeout_s: float) -> bytes:
        replies: Replies = SimpleQueue()
        if not self._fabric.ask(self, sample, replies):
            raise NodeUnreachableError(f"nobody answers {sample.key}", hint="is that node up, and in this fleet?")
        try:
            outcome = self._threads.take(replies, timeout_s)
        except Empty:
            message = f"no answer to {sample.key} within {timeout_s:g} s"
            raise NodeUnreachableError(message, hint="the node may be frozen or cut off") from None
        if isinstance(outcome, ShoalError):
            raise outcome
        return outcome

    def _check_open(self) -> None:
        if not self._open:
            raise NodeUnreachableError(f"bus {self.name!r} is closed", hint="open a new one")

    def _unsubscribe(self, subscription: Subscription) -> None:
        with self._lock:
            self._subscriptions = tuple(s for s in self._subscriptions if s is not subscription)

    def _unwatch(self, watcher: Subscription) -> None:
        with self._lock:
            self._watchers = tuple(w for w in self._watchers if w is not watcher)

    def _bury(self, token: Token) -> None:
        with self._lock:
            lived, self._tokens = token in self._tokens, tuple(t for t in self._tokens if t is not token)
        if lived:
            self._fabric.bury(self, token.key)

    def _unanswer(self, answerer: Answerer) -> None:
        with self._lock:
            self._answerers = tuple(a for a in self._answerers if a is not answerer)
