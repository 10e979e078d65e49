"""The figures that `/metrics` shows, by the names that serving dashboards expect.

A registry is handed in: two nodes in one process (tests, rehearsals) do not share counters, and importing this module
registers nothing. Time to first token and time per output token are histograms, for a mean hides the stalls that
users notice.
"""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
OUTPUT_TOKEN_BUCKETS_S = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.015,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    1.0,
    2.5,
)


class Metrics:
    """One node's counters; each method records one fact."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From a request to its first token", ["deployment"], FIRST_TOKEN_BUCKETS_S
        )
        self._output_token = self._histogram(
            "time_per_output_token_seconds", "From one token to the next", ["deployment"], OUTPUT_TOKEN_BUCKETS_S
        )
        self._requests = self._counter("requests", "Requests that ended", ["deployment", "outcome"])
        self._tokens = self._counter("tokens", "Tokens read and written", ["deployment", "kind"])
        self._guesses = self._counter(
            "guessed_tokens", "Tokens that were guessed and checked in one lap", ["deployment", "outcome"]
        )

        self._cached = self._counter(
            "cached_prompt_tokens",
            "Tokens of prompts that were found in the cache; of tokens with kind prompt, the hit ratio",
            ["deployment"],
        )

    def first_token(self, deployment: str, time_s: float) -> None:
        self._first_token.labels(deployment).observe(time_s)

    def output_token(self, deployment: str, time_s: float) -> None:
        self._output_token.labels(deployment).observe(time_s)

    def answered(self, deployment: str, outcome: str, prompt_tokens: int, output_tokens: int) -> None:
        """A request ended; *outcome* is a finish reason or an error's code."""
        self._requests.labels(deployment, outcome).inc()
        self._tokens.labels(deployment, "prompt").inc(prompt_tokens)
        self._tokens.labels(deployment, "output").inc(output_tokens)

    def guessed(self, deployment: str, accepted: int, rejected: int) -> None:
        """Guesses of an answer that ended: right ones and wrong ones."""
        self._guesses.labels(deployment, "accepted").inc(accepted)
        self._guesses.labels(deployment, "rejected").inc(rejected)

    def reused(self, deployment: str, tokens: int) -> None:
        """Tokens of a request's prompts that were found in the cache."""
        self._cached.labels(deployment).inc(tokens)

    def render(self) -> bytes:
        """The text exposition format; serve it as `CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
        return Histogram(f"shoal_{name}", text, labels, buckets=buckets, registry=self._registry)

    def _counter(self, name: str, text: str, labels: Sequence[str]) -> Counter:
        return Counter(f"shoal_{name}", text, labels, registry=self._registry)


CONTENT_TYPE = CONTENT_TYPE_LATEST
