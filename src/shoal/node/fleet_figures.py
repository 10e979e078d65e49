"""What this node's `/metrics` shows of the fleet: from the coordinator if it is here, else from this node alone."""

from collections.abc import Iterable, Mapping

import msgspec

from shoal.fleet.report import NodeReport, ShardReport
from shoal.fleet.state import Standing
from shoal.fleet.view import CoordinatorView
from shoal.fleet.views import PredictionView
from shoal.node.coordinator import Coordinator
from shoal.observe.figures import Figures, MoveFigures, PredictionError, StageFigures
from shoal.plan.problem import Plan
from shoal.transport.stats import BusStats


def figures(
    coordinator: Coordinator | None,
    own: NodeReport,
    view: CoordinatorView | None,
    traffic: BusStats,
    failed_writes: int,
) -> Figures:
    """One moment of the fleet as seen from here."""
    members = coordinator.nodes() if coordinator is not None else {}
    nodes = {report.facts.name: stands is Standing.ALIVE for report, stands, _ in members.values()}
    reports = [report for report, stands, _ in members.values() if stands is not Standing.LOST]
    return Figures(
        nodes=nodes or {own.facts.name: True},
        predicted_s=_predicted(view),
        stages=tuple(_stages(reports or [own])),
        moves=tuple(_moves(coordinator)) if coordinator is not None else (),
        bytes_sent=traffic.bytes_sent,
        bytes_received=traffic.bytes_received,
        failed_writes=failed_writes,
    )


def errors_of(predictions: Mapping[str, PredictionView]) -> tuple[PredictionError, ...]:
    """What could be compared, deployment by deployment."""
    figures_of = {
        name: (
            ("time_to_first_token", view.time_to_first_token_error),
            ("time_per_output_token", view.time_per_output_token_error),
        )
        for name, view in predictions.items()
    }
    return tuple(
        PredictionError(deployment=name, figure=figure, ratio=error)
        for name, errors in figures_of.items()
        for figure, error in errors
        if error is not None
    )


def _predicted(view: CoordinatorView | None) -> dict[str, float]:
    plans = [status.deployment for status in view.deployments] if view is not None else []
    return {d.spec.deployment: d.answer.estimate.time_per_output_token_s for d in plans if isinstance(d.answer, Plan)}


def _moves(coordinator: Coordinator) -> Iterable[MoveFigures]:
    counts, regrets_s = coordinator.moving.counts, coordinator.moving.weighing.regrets_s()
    for name in coordinator.state.deployments:
        yield MoveFigures(
            deployment=name,
            made=counts[name, "made"],
            dropped=counts[name, "dropped"],
            regret_s=regrets_s.get(name, 0.0),
        )


def _stages(reports: Iterable[NodeReport]) -> Iterable[StageFigures]:
    newest: dict[tuple[str, int], StageFigures] = {}
    epochs: dict[tuple[str, int], int] = {}
    requests: dict[tuple[str, int], list[int]] = {}
    for shard in (shard for report in reports for shard in report.shards):
        key = (shard.shard.deployment, shard.shard.stage)
        requests[key] = [sum(pair) for pair in zip(requests.get(key, (0, 0)), _requests(shard), strict=True)]
        if epochs.get(key, -1) < shard.shard.plan_epoch:
            epochs[key] = shard.shard.plan_epoch
            newest[key] = StageFigures(
                deployment=key[0],
                stage=key[1],
                steps=shard.steps,
                busy_s=shard.busy_s,
                busy_share=shard.busy_share,
            )
    # While a deployment moves, two first stages answer.
    return [msgspec.structs.replace(f, running=requests[k][0], waiting=requests[k][1]) for k, f in newest.items()]


def _requests(shard: ShardReport) -> tuple[int, int]:
    return shard.live_requests, shard.waiting_requests
