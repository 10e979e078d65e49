"""What /metrics shows."""

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from shoal.ids import DeploymentId, NodeId
from shoal.observe.metrics import Direction, Metrics

MODEL = DeploymentId("smollm2")


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


def test_a_request_leaves_its_times_tokens_and_outcome(metrics: Metrics) -> None:
    metrics.first_token(MODEL, 0.2)
    metrics.output_token(MODEL, 0.017)
    metrics.answered(MODEL, "stop", 40, 3)

    seen = samples(metrics)

    assert seen["shoal_time_to_first_token_seconds_sum", MODEL] == pytest.approx(0.2)
    assert seen["shoal_time_to_first_token_seconds_bucket", MODEL, "0.1"] == 0
    assert seen["shoal_time_to_first_token_seconds_bucket", MODEL, "0.25"] == 1
    assert seen["shoal_time_per_output_token_seconds_bucket", MODEL, "0.02"] == 1
    assert seen["shoal_tokens_total", MODEL, "prompt"] == 40
    assert seen["shoal_tokens_total", MODEL, "output"] == 3
    assert seen["shoal_requests_total", MODEL, "stop"] == 1


def test_the_fleet_and_its_stages_are_seen(metrics: Metrics) -> None:
    metrics.node_up(NodeId("a"), alive=True)
    metrics.node_up(NodeId("b"), alive=False)
    metrics.stage_step(MODEL, 1, 0.004)
    metrics.fabric_bytes(Direction.SENT, 2304)

    seen = samples(metrics)

    assert (seen["shoal_node_up", "a"], seen["shoal_node_up", "b"]) == (1, 0)
    assert seen["shoal_stage_step_seconds_count", MODEL, "1"] == 1
    assert seen["shoal_fabric_bytes_total", "sent"] == 2304


def test_a_deployment_that_is_gone_shows_no_queue_but_keeps_its_counts(metrics: Metrics) -> None:
    metrics.queue_depth(MODEL, 3)
    metrics.running(MODEL, 2)
    metrics.predicted(MODEL, 0.05)
    metrics.answered(MODEL, "shard_lost", 5, 0)

    metrics.forget_deployment(MODEL)

    assert {name[0] for name in samples(metrics) if MODEL in name} == {
        "shoal_requests_total",
        "shoal_requests_created",
        "shoal_tokens_total",
        "shoal_tokens_created",
    }


def test_two_nodes_in_one_process_do_not_share_counters(metrics: Metrics) -> None:
    other = Metrics(CollectorRegistry())

    metrics.answered(MODEL, "stop", 1, 1)

    assert ("shoal_requests_total", MODEL, "stop") not in samples(other)
