"""What people do with a gateway all day: long and short answers, streams, people who leave, JSON, batch work and mistakes."""

import http.client
import json
import random
import threading
from collections import Counter
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_LIMIT_S = 120.0
_SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


@dataclass(slots=True, kw_only=True)
class Load:
    """Clients that ask until they are told to stop; outcomes are counted by kind of request and how it ended."""

    url: str
    model: str
    text: str
    outcomes: "Counter[tuple[str, str]]" = field(default_factory=Counter)
    stopped: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def client(self, seed: int) -> None:
        """One person's day."""
        chance = random.Random(seed)
        while not self.stopped.is_set():
            kind = chance.choice(("short", "short", "stream", "stream", "long", "leaves", "json", "batch", "mistake"))
            ended = self._ask(kind, chance)
            with self._lock:
                self.outcomes[kind, ended] += 1
            if ended not in ("answered", "left", "400"):
                self.stopped.wait(1.0)

    def _ask(self, kind: str, chance: random.Random) -> str:
        body = self._body(kind, chance)
        where = urlsplit(self.url)
        client = http.client.HTTPConnection(where.hostname or "", where.port, timeout=_LIMIT_S)
        try:
            client.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = client.getresponse()
            if answer.status != http.client.OK:
                return str(answer.status)
            return (
                _streamed(answer, leave_after=3 if kind == "leaves" else None) if body.get("stream") else _whole(answer)
            )
        except TimeoutError:
            return "HANGS"
        except (OSError, http.client.HTTPException) as broken:
            return type(broken).__name__
        finally:
            client.close()

    def _body(self, kind: str, chance: random.Random) -> dict[str, object]:
        size = {"long": 400, "batch": 200}.get(kind, chance.randint(8, 120))
        start = chance.randrange(0, max(1, len(self.text) - 6 * size))
        prompt = self.text[start : start + 6 * size]
        body: dict[str, object] = {"model": self.model, "messages": [{"role": "user", "content": prompt}]}
        body |= {"max_tokens": chance.randint(4, 40), "seed": chance.randrange(2**31), "stream": kind != "short"}
        match kind:
            case "json":
                schema = {"name": "n", "schema": _SCHEMA, "strict": True}
                body |= {"response_format": {"type": "json_schema", "json_schema": schema}}
            case "batch":
                body |= {"service_tier": "flex"}
            case "mistake":
                body |= {"temperature": 99}
            case _:
                pass
        return body


def _whole(answer: http.client.HTTPResponse) -> str:
    return "answered" if json.loads(answer.read()).get("choices") else "empty"


def _streamed(answer: http.client.HTTPResponse, leave_after: int | None) -> str:
    """How a stream ended: `answered`, an error's code, or that it broke off."""
    for number, line in enumerate(answer):
        if leave_after is not None and number > leave_after:
            return "left"
        if line.startswith(b"data: [DONE]"):
            return "answered"
        if line.startswith(b"data: {"):
            error = json.loads(line[6:]).get("error")
            if error:
                return f"error {error.get('code')}"
    return "broken off"
