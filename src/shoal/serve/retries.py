"""A request that is sent again with the same `Idempotency-Key` does not run twice.

The first one runs by itself: not for a connection but for its key, so that a client that loses its connection and asks again
finds the answer under way, or whole.  Whoever asks hears it from its first byte.  What failed is not kept: a retry of it
runs anew.  The header and its meaning follow the draft `draft-ietf-httpapi-idempotency-key-header`, sections 2.6 and 2.7: another
body under a key that is known is refused.  Answers are kept in memory for `KEEP_S`, so many and so large as the bounds say.
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import anyio

from shoal.clock import Clock
from shoal.errors import InvalidRequestError, KeyReusedError, UnavailableError

KEEP_S = 900.0
KEPT = 256
MOST_BYTES = 32 << 20
"""Of all answers together."""
MOST_KEY = 255

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(slots=True)
class Recorded:
    """An answer as it comes: `error` where it failed before its first byte."""

    fingerprint: bytes
    headers: Headers
    at_s: float
    parts: list[bytes] = field(default_factory=list)
    ended: bool = False
    broken: bool = False
    """It ended with an error event."""
    error: Exception | None = None
    task: "asyncio.Task[None] | None" = None
    _news: anyio.Event = field(default_factory=anyio.Event)

    @property
    def size_bytes(self) -> int:
        return sum(map(len, self.parts))

    def add(self, part: bytes) -> None:
        """The next bytes."""
        self.parts.append(part)
        self._tell()

    def end(self, error: Exception | None = None) -> None:
        """Nothing comes any more."""
        self.ended, self.error = True, error
        self._tell()

    async def heard(self) -> AsyncIterator[bytes]:
        """All parts from the first on, as they come; raises `error`."""
        at = 0
        while True:
            while at < len(self.parts):
                yield self.parts[at]
                at += 1
            if self.ended:
                if self.error is not None:
                    raise self.error
                return
            await self._news.wait()

    def _tell(self) -> None:
        news, self._news = self._news, anyio.Event()
        news.set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Who asks what: *fingerprint* stands for the body."""

    path: str
    credentials: str
    key: str
    fingerprint: bytes

    def name(self) -> bytes:
        """What the answer is kept under: a digest, so that nobody's credentials are."""
        return hashlib.sha256(f"{self.path}\x00{self.credentials}\x00{self.key}".encode()).digest()


@dataclass(slots=True)
class Retries:
    """Answers by key, oldest first.  Belongs to the event loop."""

    clock: Clock
    _kept: "OrderedDict[bytes, Recorded]" = field(default_factory=OrderedDict)

    def find(self, asked: Asked, headers: Headers, run: Callable[[Recorded], Awaitable[None]]) -> Recorded:
        """The answer to what was *asked*; begun by *run*, with these *headers*, where there is none.

        Raises KeyReusedError for another request under that key, InvalidRequestError for a key that is too long.
        """
        if not 0 < len(asked.key) <= MOST_KEY:
            raise InvalidRequestError(
                f"Idempotency-Key has {len(asked.key)} characters",
                hint=f"send 1 to {MOST_KEY}",
                param="Idempotency-Key",
            )
        name = asked.name()
        self._forget_old()
        known = self._kept.get(name)
        if known is not None:
            if known.fingerprint != asked.fingerprint:
                raise KeyReusedError(
                    "another request was sent with this Idempotency-Key",
                    hint="send each request with a key of its own, and a retry with the same body",
                    param="Idempotency-Key",
                )
            return known
        recorded = self._kept[name] = Recorded(asked.fingerprint, headers, self.clock.now_s())
        recorded.task = asyncio.get_running_loop().create_task(self._run(name, recorded, run))
        return recorded

    async def _run(self, name: bytes, recorded: Recorded, run: Callable[[Recorded], Awaitable[None]]) -> None:
        error: Exception | None = None
        try:
            await run(recorded)
        except asyncio.CancelledError:
            error = UnavailableError("the gateway is stopping", hint="send the request again")
            raise
        except Exception as failed:  # noqa: BLE001 whoever listens raises it
            error = failed
        finally:
            recorded.end(error)
            if (error is not None or recorded.broken) and self._kept.get(name) is recorded:
                del self._kept[name]

    def _forget_old(self) -> None:
        """Those that have ended and are too old, or too many, or too large together."""
        now_s = self.clock.now_s()
        total = sum(r.size_bytes for r in self._kept.values())
        for name, recorded in list(self._kept.items()):
            crowded = len(self._kept) >= KEPT or total > MOST_BYTES
            if recorded.ended and (crowded or now_s - recorded.at_s > KEEP_S):
                total -= recorded.size_bytes
                del self._kept[name]
