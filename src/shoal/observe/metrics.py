"""The figures that `/metrics` shows, by the names that serving dashboards expect.

A registry is handed in: two nodes in one process (tests, rehearsals) do not share counters, and importing this module
registers nothing. Time to first token and time per output token are histograms, for a mean hides the stalls that
users notice.
"""

from collections.abc import Sequence
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
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
STEP_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.1, 0.2, 0.35, 0.5, 1.0, 2.5, 5.0)


class Direction(StrEnum):
    """Which way bytes went over the fabric."""

    SENT = "sent"
    RECEIVED = "received"


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
        self._queue_depth = self._gauge("queue_depth", "Requests that wait for a slot", ["deployment"])
        self._running = self._gauge("requests_running", "Requests that hold a slot", ["deployment"])
        self._stage_step = self._histogram(
            "stage_step_seconds", "One step of one stage", ["deployment", "stage"], STEP_BUCKETS_S
        )
        self._predicted = self._gauge(
            "predicted_time_per_output_token_seconds", "What the plan in force says", ["deployment"]
        )
        self._fabric_bytes = self._counter("fabric_bytes", "Payload bytes on the fabric", ["direction"])
        self._node_up = self._gauge("node_up", "1 while a node's heartbeats arrive", ["node"])

    def first_token(self, deployment: str, time_s: float) -> None:
        self._first_token.labels(deployment).observe(time_s)

    def output_token(self, deployment: str, time_s: float) -> None:
        self._output_token.labels(deployment).observe(time_s)

    def answered(self, deployment: str, outcome: str, prompt_tokens: int, output_tokens: int) -> None:
        """A request ended; *outcome* is a finish reason or an error's code."""
        self._requests.labels(deployment, outcome).inc()
        self._tokens.labels(deployment, "prompt").inc(prompt_tokens)
        self._tokens.labels(deployment, "output").inc(output_tokens)

    def queue_depth(self, deployment: str, waiting: int) -> None:
        self._queue_depth.labels(deployment).set(waiting)

    def running(self, deployment: str, holding_slots: int) -> None:
        self._running.labels(deployment).set(holding_slots)

    def stage_step(self, deployment: str, stage: int, time_s: float) -> None:
        self._stage_step.labels(deployment, str(stage)).observe(time_s)

    def predicted(self, deployment: str, time_per_output_token_s: float) -> None:
        self._predicted.labels(deployment).set(time_per_output_token_s)

    def fabric_bytes(self, direction: Direction, count: int) -> None:
        self._fabric_bytes.labels(direction.value).inc(count)

    def node_up(self, node: str, *, alive: bool) -> None:
        self._node_up.labels(node).set(int(alive))

    def forget_deployment(self, deployment: str) -> None:
        """Drop the gauges of a deployment that is gone; its counters stay, as counters must."""
        for gauge in (self._queue_depth, self._running, self._predicted):
            gauge.remove_by_labels({"deployment": deployment})

    def render(self) -> bytes:
        """The text exposition format; serve it as `CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
        return Histogram(f"shoal_{name}", text, labels, buckets=buckets, registry=self._registry)

    def _counter(self, name: str, text: str, labels: Sequence[str]) -> Counter:
        return Counter(f"shoal_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str, labels: Sequence[str]) -> Gauge:
        return Gauge(f"shoal_{name}", text, labels, registry=self._registry)


CONTENT_TYPE = CONTENT_TYPE_LATEST
