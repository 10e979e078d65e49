"""What a node knows at the moment of a scrape: nodes, stages, plans and traffic.

These figures have a source of truth of their own (reports, plans, the bus), so they are read when asked for and never copied into
counters that could fall behind.
"""

from collections.abc import Callable, Iterator

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry


class StageFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One stage of a deployment, as its worker last reported."""

    deployment: str
    stage: int
    steps: int
    busy_s: float
    busy_share: float | None = None
    running: int = 0
    waiting: int = 0


class PredictionError(msgspec.Struct, frozen=True, kw_only=True):
    """How far requests of a deployment were from one figure of its plan: median of |predicted - measured| / measured."""

    deployment: str
    figure: str
    ratio: float


class MoveFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Moves of one deployment to other plans since this node began to coordinate, and what staying costs."""

    deployment: str
    made: int = 0
    dropped: int = 0
    regret_s: float = 0.0


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One moment.  `nodes`: display names, and whether heartbeats arrive; `predicted_s`: deployments, and seconds per token."""

    nodes: dict[str, bool] = {}
    predicted_s: dict[str, float] = {}
    errors: tuple[PredictionError, ...] = ()
    stages: tuple[StageFigures, ...] = ()
    moves: tuple[MoveFigures, ...] = ()
    bytes_sent: int = 0
    bytes_received: int = 0
    failed_writes: int = 0


class FiguresCollector(Collector):
    """Turns `Figures` into metric families at each scrape."""

    def __init__(self, read: Callable[[], Figures]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """The families, without labels where nothing is known."""
        now = self._read()
        up = GaugeMetricFamily("shoal_node_up", "1 while a node's heartbeats arrive", labels=["node"])
        for name, alive in now.nodes.items():
            up.add_metric([name], int(alive))
        predicted = GaugeMetricFamily(
            "shoal_predicted_time_per_output_token_seconds", "What the plan in force says", labels=["deployment"]
        )
        for name, time_s in now.predicted_s.items():
            predicted.add_metric([name], time_s)
        errors = GaugeMetricFamily(
            "shoal_prediction_error_ratio",
            "Median of |predicted - measured| / measured over the newest requests that were alone in the pipeline",
            labels=["deployment", "figure"],
        )
        for error in now.errors:
            errors.add_metric([error.deployment, error.figure], error.ratio)
        traffic = CounterMetricFamily(
            "shoal_fabric_bytes", "Payload bytes of this node's agent on the fabric", labels=["direction"]
        )
        traffic.add_metric(["sent"], now.bytes_sent)
        traffic.add_metric(["received"], now.bytes_received)
        failed = CounterMetricFamily("shoal_journal_failed_writes", "Records that this node's disk did not take")
        failed.add_metric([], now.failed_writes)
        yield from (up, predicted, errors, traffic, failed, *_stages(now.stages), *_moves(now.moves))


def _stages(stages: tuple[StageFigures, ...]) -> Iterator[Metric]:
    steps = CounterMetricFamily("shoal_stage_steps", "Engine steps of a stage", labels=["deployment", "stage"])
    busy = CounterMetricFamily(
        "shoal_stage_busy_seconds", "Time that a stage's engine has worked", labels=["deployment", "stage"]
    )
    share = GaugeMetricFamily(
        "shoal_stage_busy_ratio",
        "Share of the last 5 seconds that a stage's engine has worked: the greatest is the bottleneck",
        labels=["deployment", "stage"],
    )
    running = GaugeMetricFamily("shoal_requests_running", "Requests that hold a slot", labels=["deployment"])
    waiting = GaugeMetricFamily("shoal_queue_depth", "Requests that wait for a slot", labels=["deployment"])
    for stage in stages:
        steps.add_metric([stage.deployment, str(stage.stage)], stage.steps)
        busy.add_metric([stage.deployment, str(stage.stage)], stage.busy_s)
        if stage.busy_share is not None:
            share.add_metric([stage.deployment, str(stage.stage)], stage.busy_share)
        if stage.stage == 0:
            running.add_metric([stage.deployment], stage.running)
            waiting.add_metric([stage.deployment], stage.waiting)
    yield from (steps, busy, share, running, waiting)


def _moves(moves: tuple[MoveFigures, ...]) -> Iterator[Metric]:
    counted = CounterMetricFamily(
        "shoal_moves",
        "Moves of a deployment that served to another plan: made, or dropped on the way",
        labels=["deployment", "outcome"],
    )
    regret = GaugeMetricFamily(
        "shoal_regret_seconds",
        "What requests have lost because the deployment stays where it is; it moves when that has paid for the move",
        labels=["deployment"],
    )
    for move in moves:
        counted.add_metric([move.deployment, "made"], move.made)
        counted.add_metric([move.deployment, "dropped"], move.dropped)
        regret.add_metric([move.deployment], move.regret_s)
    yield from (counted, regret)


def register(registry: CollectorRegistry, read: Callable[[], Figures]) -> None:
    """Have *registry* show what *read* gives at each scrape."""
    registry.register(FiguresCollector(read))
