"""`shoal plan --problem FILE --pareto`, its picture, and limits by flags."""

import re
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import pytest
import typer
from msgspec.structs import replace
from tests.plan.test_plan_command import SAMPLE, shown
from typer.testing import CliRunner

from shoal.cli.front_picture import MOST_LISTED, picture, ticks
from shoal.cli.front_table import MOST_ROWS, render_front
from shoal.cli.plan import plan
from shoal.ids import NodeId
from shoal.plan.budget import StepBudget
from shoal.plan.document import parse_problem
from shoal.plan.pareto import Front, pareto
from shoal.plan.problem import Objective, Problem

WATTS = {"orin-nx": 15.0, "agx-orin": 40.0, "rtx-3090": 300.0}


@pytest.fixture(scope="module")
def problem() -> Problem:
    found = parse_problem(SAMPLE.read_bytes())
    return replace(found, devices=tuple(replace(d, active_watts=WATTS.get(d.node, 50.0)) for d in found.devices))


@pytest.fixture
def path(problem: Problem, tmp_path: Path) -> Path:
    written = tmp_path / "problem.json"
    written.write_bytes(msgspec.json.encode(problem))
    return written


@pytest.fixture(scope="module")
def front(problem: Problem) -> Front:
    found = pareto(problem, StepBudget(10**9), (Objective.LATENCY, Objective.ENERGY))
    assert isinstance(found, Front)
    return found


def asked(*words: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(plan)
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "80"})
    return result.exit_code, result.output


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_a_front_is_a_table_of_80_columns(path: Path) -> None:
    code, output = asked("--problem", str(path), "--pareto", "--objectives", "latency,joules")

    assert code == 0
    assert max(map(len, output.splitlines())) <= 80
    for text in ("LATENCY", "JOULES", "WHAT RUNS WHERE", "latency against energy: all nondominated plans", "proven"):
        assert text in output


def test_json_has_all_points(path: Path, front: Front) -> None:
    code, output = asked("--problem", str(path), "--pareto", "--objectives", "latency,energy", "--json")

    assert code == 0
    told = msgspec.json.decode(output, type=Front)
    assert len(told.points) == len(front.points)


def test_the_picture_is_written_with_units_numbers_and_the_knee(path: Path, tmp_path: Path, front: Front) -> None:
    drawn = tmp_path / "front.svg"

    asked("--problem", str(path), "--pareto", "--objectives", "latency,energy", "--picture", str(drawn))

    words = texts(drawn.read_text())
    assert "latency of a request (s), less is better" in words
    assert "energy of a request (J), less is better" in words
    assert front.knee is not None
    assert f"{front.knee + 1} knee" in words
    assert any(word.startswith("1: ") for word in words)


def test_every_point_of_a_picture_is_drawn_within_its_axes(front: Front) -> None:
    circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', picture(front))

    assert len(circles) == len(front.points)
    assert all(78 <= float(x) <= 496 and 52 <= float(y) <= 302 for x, y in circles)


def test_names_that_look_like_markup_stay_text(front: Front) -> None:
    names = {stage.node: "<a & b>" for point in front.points for stage in point.stages}

    assert any("<a & b>" in word for word in texts(picture(front, names)))


def test_a_long_front_is_thinned_in_table_and_legend_but_keeps_its_ends_and_knee(front: Front) -> None:
    many = replace(front, points=front.points[:1] * 98 + front.points[-1:] * 2, knee=57)

    table = shown(render_front(many)).splitlines()
    rows = [line for line in table if re.match(r"\s*\d+ ", line)]

    assert len(rows) <= MOST_ROWS
    assert {1, 58, 100} <= {int(row.split()[0]) for row in rows}
    listed = [word for word in texts(picture(many)) if re.match(r"\d+: ", word)]
    assert len(listed) <= MOST_LISTED
    assert {"1", "58", "100"} <= {word.split(":")[0] for word in listed}


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (3.2, 3.9), (0.0004, 0.0011), (120.0, 12_000.0)])
def test_axes_have_a_few_round_ticks(low: float, high: float) -> None:
    found = ticks(low, high)

    assert 3 <= len(found) <= 8
    assert all(low <= tick <= high for tick in found)


def test_one_point_is_a_picture_too(front: Front) -> None:
    alone = replace(front, points=front.points[:1], knee=None)

    assert picture(alone).count("<circle") == 1


def test_flags_limit_a_plan_and_say_what_is_out_of_reach(path: Path) -> None:
    code, output = asked("--problem", str(path), "--max-latency", "0.5")

    assert code == 2
    assert "a request's latency of at most 500 ms is out of reach" in " ".join(output.split())
    assert asked("--problem", str(path), "--max-latency", "60")[0] == 0


def test_an_unknown_objective_is_named(path: Path) -> None:
    app = typer.Typer()
    app.command()(plan)
    result = CliRunner().invoke(app, ["--problem", str(path), "--pareto", "--objectives", "latency,beauty"])

    assert "'beauty' is no objective" in str(result.exception)


def test_a_picture_of_one_plan_is_refused(path: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(plan)
    result = CliRunner().invoke(app, ["--problem", str(path), "--picture", str(tmp_path / "x.svg")])

    assert "--picture draws what --pareto finds" in str(result.exception)


def test_nodes_are_shown_by_name(front: Front) -> None:
    node = front.points[0].stages[0].node

    assert "kitchen" in shown(render_front(front, {NodeId(node): "kitchen"}))
