"""`shoal plan --problem FILE`, and what plans and profiles look like in a terminal."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import msgspec
import pytest
import typer
from msgspec.structs import replace
from rich.console import Console, RenderableType
from typer.testing import CliRunner

from shoal.cli.plan import plan, solve_file
from shoal.cli.plan_table import render_plan
from shoal.cli.profile_table import render_profile
from shoal.errors import InvalidRequestError
from shoal.ids import NodeId
from shoal.plan.budget import StepBudget
from shoal.plan.document import parse_problem
from shoal.plan.placement import place
from shoal.plan.problem import Answer, Infeasible, Objective, Plan, Problem
from shoal.profile.fleet import BlockTrial, Declared, DeviceProfile, FleetProfile, LinkProfile

SAMPLE = Path(__file__).resolve().parents[2] / "examples" / "problems" / "llama2_7b_three_nodes.json"


def app() -> typer.Typer:
    made = typer.Typer()
    made.command()(plan)
    return made


def shown(renderable: RenderableType) -> str:
    stream = StringIO()
    Console(file=stream, width=200).print(renderable)
    return stream.getvalue()


@pytest.fixture
def too_small(chain: Callable[..., Problem], tmp_path: Path) -> Path:
    path = tmp_path / "problem.json"
    path.write_bytes(msgspec.json.encode(chain([5_000_000, 5_000_000], [1], [6_000_000], {})))
    return path


def test_a_plan_shows_stages_prediction_certificate_alternatives_and_reasons() -> None:
    result = CliRunner().invoke(app(), ["--problem", str(SAMPLE)], env={"COLUMNS": "200"})

    assert result.exit_code == 0
    for text in (
        "0-5 (embedding to layer 4)",
        "5.05 GB",
        "first token 932 ms, then 95.7 ms per token",
        "proven optimal",
        "not possible: the whole model needs 27.8 GB, 13 GB are free",
        "orin-nx: runs blocks 6-6 of 34",
    ):
        assert text in result.output


def test_json_is_the_answer_as_a_value() -> None:
    result = CliRunner().invoke(app(), ["--problem", str(SAMPLE), "--json"])

    assert isinstance(msgspec.json.decode(result.output, type=Answer), Plan)


def test_a_problem_that_does_not_fit_says_what_is_missing_and_fails(too_small: Path) -> None:
    text = CliRunner().invoke(app(), ["--problem", str(too_small)], env={"COLUMNS": "200"})
    as_json = CliRunner().invoke(app(), ["--problem", str(too_small), "--json"])

    assert (text.exit_code, as_json.exit_code) == (2, 2)
    assert "missing: 4 MB (needed 10 MB, there 6 MB)" in text.output
    assert "hint: add a device" in text.output
    assert json.loads(as_json.output)["type"] == "infeasible"


@pytest.fixture
def way_round(chain: Callable[..., Problem], tmp_path: Path) -> Path:
    """The direct link is the slower way."""
    links = {(0, 1): 1.0, (0, 2): 0.01, (2, 1): 0.01}
    path = tmp_path / "round.json"
    path.write_bytes(msgspec.json.encode(chain((1, 1), (5.0, 0.1, 9.0), (1, 1, 0), links, relay=True)))
    return path


@pytest.mark.parametrize(
    ("said", "relays"), [([], True), (["--relays", "always"], True), (["--relays", "never"], False)]
)
def test_a_relay_is_shown_as_one_and_can_be_forbidden(way_round: Path, said: list[str], relays: bool) -> None:
    result = CliRunner().invoke(app(), ["--problem", str(way_round), *said], env={"COLUMNS": "200"})

    assert result.exit_code == 0
    assert ("relay, no blocks" in result.output) is relays


def test_relays_that_a_file_leaves_out_can_be_asked_for(way_round: Path) -> None:
    stated = parse_problem(way_round.read_bytes())
    way_round.write_bytes(msgspec.json.encode(replace(stated, relay=False)))

    shown = [
        CliRunner().invoke(app(), ["--problem", str(way_round), *said], env={"COLUMNS": "200"}).output
        for said in ([], ["--relays", "always"])
    ]

    assert ["relay, no blocks" in text for text in shown] == [False, True]


def test_a_wrong_word_about_relays_is_refused_with_the_right_ones(way_round: Path) -> None:
    result = CliRunner().invoke(app(), ["--problem", str(way_round), "--relays", "maybe"])

    assert result.exit_code == 2
    assert "if-needed" in result.output


def test_a_file_that_is_not_there_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"cannot read .*none\.json: No such file"):
        solve_file(tmp_path / "none.json")


def test_nodes_are_shown_by_their_names_wherever_their_ids_stand() -> None:
    answer = solve_file(SAMPLE)

    text = shown(render_plan(answer, {NodeId("agx-orin"): "kitchen"}))

    assert "kitchen" in text
    assert "agx-orin" not in text
    refusal = Infeasible(reason="agx-orin is full", needed_bytes=0, available_bytes=0)
    assert "kitchen is full" in shown(render_plan(refusal, {NodeId("agx-orin"): "kitchen"}))


def test_declared_figures_of_a_profile_are_not_taken_for_measured_ones() -> None:
    device = DeviceProfile(
        node=NodeId("a"), fingerprint="x", cores=4, threads=2, memory_total_bytes=8, memory_budget_bytes=2,
        declared=Declared(watts=15.0, price_per_hour=0.2, joules_per_byte=3e-7, region="eu", trust="own"),
    )  # fmt: skip

    text = shown(render_profile(FleetProfile(profile_epoch=7, devices=(device,), links=())))

    assert "declared, not measured" in text
    assert text.splitlines()[-1].split() == ["a", "15", "0.2", "0.3", "eu", "own"]
    silent = replace(device, declared=Declared())
    assert "declared" not in shown(render_profile(FleetProfile(profile_epoch=7, devices=(silent,), links=())))


def test_joules_and_money_of_a_plan_are_said_to_rest_on_declared_rates() -> None:
    problem = parse_problem(SAMPLE.read_bytes())
    rated = tuple(replace(device, active_watts=20.0, price_per_hour=0.3) for device in problem.devices)
    for goal, certificate in ((Objective.ENERGY, "best energy proven"), (Objective.PRICE, "best price proven")):
        answer = place(replace(problem, devices=rated, objective=goal), StepBudget(10**9))

        text = shown(render_plan(answer))

        assert "from declared rates, not measured" in text
        assert certificate in text


def test_a_profile_shows_devices_trials_and_links() -> None:
    trial = BlockTrial(kind="0123456789abcdef", rows=16, batch=1, context=0, time_s=0.00412, spread_s=0.0001)
    device = DeviceProfile(
        node=NodeId("a"), fingerprint="feedbeef00", cores=4, threads=2, memory_total_bytes=8 * 10**9,
        memory_budget_bytes=2 * 10**9, providers=("CPUExecutionProvider",), trials=(trial,), trials_took_s=6.5,
        cached=True,
    )  # fmt: skip
    link = LinkProfile(
        source=NodeId("a"),
        target=NodeId("b"),
        rtt_p50_s=0.002,
        rtt_p99_s=0.05,
        bytes_per_s=1.25e6,
        jitter_s=0.003,
        round_trips=150,
        probe_s=0.7,
    )

    text = shown(render_profile(FleetProfile(profile_epoch=7, devices=(device,), links=(link,)), {NodeId("a"): "desk"}))

    for part in (
        "profile epoch 7",
        "desk",
        "8 GB",
        "2 GB",
        "feedbeef",
        "0123456789ab",
        "4.12 ms",
        "+-2 %",
        "1.25 MB/s",
        "50 ms",
        "+-3 ms",
        "150",
        "700 ms",
        "6.50 s, cached",
    ):
        assert part in text


def test_what_live_times_corrected_is_shown_beside_what_was_measured() -> None:
    device = DeviceProfile(
        node=NodeId("a"), fingerprint="f", cores=1, threads=1, memory_total_bytes=1, memory_budget_bytes=1, factor=1.5
    )
    link = LinkProfile(
        source=NodeId("a"), target=NodeId("b"), rtt_p50_s=0.01, rtt_p99_s=0.01, bytes_per_s=1e6, factor=2.0
    )

    text = shown(render_profile(FleetProfile(profile_epoch=7, devices=(device,), links=(link,))))

    assert "x1.50" in text
    assert "x2.00" in text
