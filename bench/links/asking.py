"""Streams at an endpoint, asked by threads on the first host, and what they cost the network and the processors."""

import http.client
import itertools
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.links.network import Host
from bench.links.serving import Server
from bench.links.settings import TOKENS
from bench.links.texts import Kind, Texts
from bench.measure import Values, quantile, spread

_LIMIT_S = 300.0


@dataclass(slots=True)
class Stream:
    """One answer: when its events came, seconds after it was asked for, and how many tokens it says it has."""

    times_s: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str = ""

    def ask(self, host: Host, server: Server, prompt: Sequence[int], tokens: int) -> None:
        body = {
            "model": server.model, "prompt": list(prompt), "max_tokens": tokens, "stream": True, "temperature": 0,
            "ignore_eos": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=_LIMIT_S)
        began_s = time.monotonic()
        try:
            with host.inside():
                client.connect()
            client.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = client.getresponse()
            if answer.status != http.client.OK:
                self.error = f"{answer.status}: {answer.read(300).decode(errors='replace')}"
            for line in answer:
                self.take(line, time.monotonic() - began_s)
        except (OSError, http.client.HTTPException) as broken:
            self.error = f"{type(broken).__name__}: {broken}"
        finally:
            client.close()

    def take(self, line: bytes, at_s: float) -> None:
        """One line of the stream."""
        if not line.startswith(b"data: {"):
            return
        event = json.loads(line[6:])
        self.error = json.dumps(event["error"]) if event.get("error") else self.error
        self.tokens = (event.get("usage") or {}).get("completion_tokens", self.tokens)
        if event.get("choices") and event["choices"][0].get("text"):
            self.times_s.append(at_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """Asks one endpoint after another the same questions."""

    hosts: Sequence[Host]
    texts: Texts
    streams: int
    prompt: int
    rounds: int

    def asked(self, server: Server, kind: Kind) -> Values:
        """Figures of *rounds* rounds, with as many streams at once as there are."""
        self.texts.taken = 0
        self._round(server, kind, tokens=16)
        sent_before, cpu_before_s = self._sent_bytes(), server.cpu_s()
        rounds = [self._round(server, kind, TOKENS) for _ in range(self.rounds)]
        sent, cpu_s = self._sent_bytes() - sent_before, server.cpu_s() - cpu_before_s
        tokens = sum(stream.tokens for streams in rounds for stream in streams)
        return figures(rounds) | {
            "wire_bytes_per_token": round(sent / tokens),
            "cpu_ms_per_token": round(cpu_s / tokens * 1000, 2),
        }

    def _round(self, server: Server, kind: Kind, tokens: int) -> list[Stream]:
        streams = [Stream() for _ in range(self.streams)]
        threads = [
            threading.Thread(
                target=stream.ask, args=(self.hosts[0], server, self.texts.next(kind, self.prompt), tokens)
            )
            for stream in streams
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for stream in streams:
            if stream.error or stream.tokens != tokens:
                raise RuntimeError(f"{server.model}: {stream.tokens} of {tokens} tokens; {stream.error or 'no error'}")
        return streams

    def _sent_bytes(self) -> int:
        return sum(host.sent_bytes() for host in self.hosts)


def figures(rounds: Sequence[Sequence[Stream]]) -> Values:
    """Tokens per second of all streams together, of their whole time; seconds to the first token; gaps between events."""
    rates = [sum(s.tokens for s in streams) / max(s.times_s[-1] for s in streams) for streams in rounds]
    streams = [stream for streams in rounds for stream in streams]
    gaps_s = [b - a for stream in streams for a, b in itertools.pairwise(stream.times_s)]
    per_token_s = [(s.times_s[-1] - s.times_s[0]) / (s.tokens - 1) for s in streams]
    return {
        "tokens_per_s": spread(rates),
        "first_token_s": spread([stream.times_s[0] for stream in streams]),
        "per_token_ms": spread([1000 * each_s for each_s in per_token_s]),
        "gap_ms": {"p50": 1000 * quantile(gaps_s, 0.5), "p95": 1000 * quantile(gaps_s, 0.95)},
    }
