"""Many clients of one gateway: each request is one thread with a connection of its own, as a crowd of strangers would come."""

import http.client
import json
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_LIMIT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """How one request went.  Times in seconds since it was sent; *first_s* and *tokens* are 0 where nothing came."""

    sent_at_s: float
    status: int
    first_s: float
    whole_s: float
    tokens: int
    retry_after: str
    error: str


@dataclass(slots=True, kw_only=True)
class Crowd:
    """Asks the same question of *model* at *url* again and again; every answer has *tokens* tokens."""

    url: str
    model: str
    prompts: Sequence[str]
    tokens: int
    extra: dict[str, object] = field(default_factory=dict)
    visits: list[Visit] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def steady(self, clients: int, for_s: float) -> list[Visit]:
        """*clients* at a time, each asking again when it has its answer: what the pipeline can do."""
        ends_s = time.monotonic() + for_s

        def client(number: int) -> None:
            while time.monotonic() < ends_s:
                self.ask(number)

        return self._together([threading.Thread(target=client, args=(n,)) for n in range(clients)])

    def arriving(self, per_s: float, for_s: float, seed: int = 1) -> list[Visit]:
        """Independent arrivals, *per_s* of them on the mean, whether or not the others have their answers."""
        chance = random.Random(seed)
        began_s, at_s, threads = time.monotonic(), 0.0, []
        while (at_s := at_s + chance.expovariate(per_s)) < for_s:
            time.sleep(max(0.0, began_s + at_s - time.monotonic()))
            thread = threading.Thread(target=self.ask, args=(len(threads),))
            thread.start()
            threads.append(thread)
        return self._together(threads, started=True)

    def ask(self, number: int) -> None:
        """One request, noted."""
        visit = self._ask(self.prompts[number % len(self.prompts)])
        with self._lock:
            self.visits.append(visit)

    def _together(self, threads: Sequence[threading.Thread], *, started: bool = False) -> list[Visit]:
        for thread in threads:
            if not started:
                thread.start()
        for thread in threads:
            thread.join()
        with self._lock:
            seen, self.visits = self.visits, []
        return seen

    def _ask(self, prompt: str) -> Visit:
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "stream": True} | self.extra
        payload = json.dumps(body | {"max_tokens": self.tokens, "temperature": 0, "ignore_eos": True})
        where = urlsplit(self.url)
        client = http.client.HTTPConnection(where.hostname or "", where.port, timeout=_LIMIT_S)
        sent_s = time.monotonic()
        first_s, tokens, error, status, again = 0.0, 0, "", 0, ""
        try:
            client.request("POST", "/v1/chat/completions", payload, {"Content-Type": "application/json"})
            answer = client.getresponse()
            status, again = answer.status, answer.headers.get("Retry-After") or ""
            for line in answer:
                event = _event(line) if status == http.client.OK else {}
                if event.get("error"):
                    error = str(event["error"]["code"])
                elif any(choice["delta"].get("content") for choice in event.get("choices", [])):
                    tokens += 1
                    first_s = first_s or time.monotonic() - sent_s
        except OSError as broken:
            error = type(broken).__name__
        finally:
            client.close()
        whole_s = time.monotonic() - sent_s
        return Visit(
            sent_at_s=sent_s,
            status=status,
            first_s=first_s,
            whole_s=whole_s,
            tokens=tokens,
            retry_after=again,
            error=error,
        )


def _event(line: bytes) -> dict[str, object]:
    if not line.startswith(b"data: {"):
        return {}
    found: dict[str, object] = json.loads(line[6:])
    return found
