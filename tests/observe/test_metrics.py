"""What /metrics shows."""

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from shoal.ids import DeploymentId
from shoal.observe.figures import Figures, MoveFigures, PredictionError, StageFigures, register
from shoal.observe.metrics import Metrics

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


def test_the_fleet_and_its_stages_are_read_at_each_scrape() -> None:
    registry = CollectorRegistry()
    now = Figures()
    register(registry, lambda: now)
    metrics = Metrics(registry)
    assert not [name for name in samples(metrics) if name[0] == "shoal_node_up"]

    stage = StageFigures(deployment=MODEL, stage=0, steps=7, busy_s=0.5, busy_share=0.75, running=2, waiting=3)
    later = StageFigures(deployment=MODEL, stage=1, steps=6, busy_s=0.25)
    now = Figures(
        nodes={"a": True, "b": False},
        predicted_s={MODEL: 0.05},
        errors=(PredictionError(deployment=MODEL, figure="time_per_output_token", ratio=0.08),),
        stages=(stage, later),
        moves=(MoveFigures(deployment=MODEL, made=2, dropped=1, regret_s=1.5),),
        bytes_sent=10,
        bytes_received=20,
        failed_writes=3,
    )

    seen = samples(metrics)
    assert (seen["shoal_moves_total", MODEL, "made"], seen["shoal_moves_total", MODEL, "dropped"]) == (2, 1)
    assert seen["shoal_regret_seconds", MODEL] == 1.5
    assert (seen["shoal_node_up", "a"], seen["shoal_node_up", "b"]) == (1, 0)
    assert seen["shoal_predicted_time_per_output_token_seconds", MODEL] == 0.05
    assert seen["shoal_prediction_error_ratio", MODEL, "time_per_output_token"] == 0.08
    assert (seen["shoal_stage_steps_total", MODEL, "0"], seen["shoal_stage_busy_seconds_total", MODEL, "1"]) == (
        7,
        0.25,
    )
    assert seen["shoal_stage_busy_ratio", MODEL, "0"] == 0.75
    assert ("shoal_stage_busy_ratio", MODEL, "1") not in seen, "nobody has said"
    assert (seen["shoal_requests_running", MODEL], seen["shoal_queue_depth", MODEL]) == (2, 3)
    assert (seen["shoal_fabric_bytes_total", "sent"], seen["shoal_fabric_bytes_total", "received"]) == (10, 20)
    assert seen["shoal_journal_failed_writes_total",] == 3


def test_two_nodes_in_one_process_do_not_share_counters(metrics: Metrics) -> None:
    other = Metrics(CollectorRegistry())

    metrics.answered(MODEL, "stop", 1, 1)

    assert ("shoal_requests_total", MODEL, "stop") not in samples(other)
