"""What people see of a fleet, and what the flags of a node accept."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from shoal.cli.deploy import curl_line
from shoal.cli.logs import line
from shoal.cli.main import app
from shoal.cli.nodes import render_nodes
from shoal.cli.plan_flags import parse_pin
from shoal.cli.ps import missed_by, moved_lines, render_deployments
from shoal.cli.serve import parse_keep_alive
from shoal.cli.start import options_from, parse_size
from shoal.errors import SettingsError
from shoal.fleet.state import Standing
from shoal.fleet.views import DeploymentState, DeploymentView, EventView, LinkView, NodeView, PredictionView
from shoal.ids import DeploymentId, NodeId
from shoal.node.fleet_api import check_name
from shoal.plan.problem import Estimate, Objective, Pin, Plan, RequestShape, Stage

A, B = NodeId("a" * 32), NodeId("b" * 32)
NODES = (
    NodeView(
        id=A,
        name="desk",
        standing=Standing.ALIVE,
        roles=("coordinator", "gateway"),
        cores=4,
        load=0.5,
        memory_budget_bytes=2_000_000_000,
        memory_promised_bytes=500_000_000,
        providers=("CPUExecutionProvider",),
        links=(LinkView(target=B, rtt_p50_s=0.0042, rtt_p99_s=0.01, bytes_per_s=12.5e6, jitter_s=0.0017),),
    ),
    NodeView(id=B, name="attic", standing=Standing.LOST),
)
FLAGS = {
    "http": ("127.0.0.1", 8400),
    "api_keys": "",
    "listen": "127.0.0.1:7400",
    "name": "desk",
    "memory": "",
    "threads": 0,
    "slowdown": 1.0,
    "links": None,
    "discover": False,
}


def shown(renderable: object) -> str:
    console = Console(width=120, color_system=None)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def test_the_list_of_nodes_names_state_engine_and_links() -> None:
    text = shown(render_nodes(NODES))

    for word in (
        "desk",
        "alive",
        "coordinator gateway",
        "CPU",
        "500 MB of 2 GB",
        "attic",
        "lost",
        "desk -> attic",
        "4.20 ms",
        "+-1.70 ms",
        "100",
    ):
        assert word in text


def test_what_has_moved_says_what_that_gained_and_cost() -> None:
    stays = DeploymentView(name=DeploymentId("chat"), model="m", state=DeploymentState.READY)
    moved = msgspec.structs.replace(stays, moved="51 -> 31 ms per token, move costs 3.1 s")

    assert moved_lines([stays, moved]) == ["chat moved: 51 -> 31 ms per token, move costs 3.1 s"]


def test_a_deployment_shows_why_it_is_not_ready() -> None:
    view = DeploymentView(
        name=DeploymentId("chat"), model="m", state=DeploymentState.DEGRADED, detail="node attic is gone"
    )

    assert "degraded: node attic is gone" in shown(render_deployments([view], {}))


def test_a_model_that_is_loaded_on_demand_shows_that_the_next_request_loads_it() -> None:
    view = DeploymentView(
        name=DeploymentId("chat"), model="m", state=DeploymentState.ASLEEP, detail="the next request loads it"
    )

    assert "asleep: the next request loads it" in shown(render_deployments([view], {}))


@pytest.mark.parametrize(
    ("text", "kept_s"), [("", 300.0), ("90", 90.0), ("0.5m", 30.0), ("2h", 7200.0), ("forever", None)]
)
def test_how_long_a_model_stays_is_said_in_seconds_minutes_or_hours(text: str, kept_s: float | None) -> None:
    assert parse_keep_alive(text, on_demand=True) == kept_s


@pytest.mark.parametrize(("text", "on_demand"), [("soon", True), ("-5m", True), ("5 m", True), ("5m", False)])
def test_a_time_that_cannot_be_kept_is_refused_with_what_can(text: str, on_demand: bool) -> None:
    with pytest.raises(SettingsError, match="--keep-alive"):
        parse_keep_alive(text, on_demand=on_demand)


def test_a_deployment_shows_how_far_its_plan_was_off() -> None:
    told = PredictionView(requests=9, time_per_output_token_error=0.083)
    view = DeploymentView(name=DeploymentId("chat"), model="m", state=DeploymentState.READY, prediction=told)

    assert "- first, 8% per token" in shown(render_deployments([view], {}))
    assert missed_by(None) == "-"


def test_a_relay_is_among_the_stages_of_a_deployment(chain_through: Plan) -> None:
    view = DeploymentView(name=DeploymentId("chat"), model="m", state=DeploymentState.READY, plan=chain_through)

    text = shown(render_deployments([view], {A: "desk", B: "attic"}))

    assert "desk [0, 1) -> attic (relay) -> desk [1, 2)" in text


def test_each_stage_shows_how_busy_it_was_where_its_worker_says(chain_through: Plan) -> None:
    view = DeploymentView(
        name=DeploymentId("chat"), model="m", state=DeploymentState.READY, plan=chain_through, busy=(0.12, None, 0.97)
    )

    text = shown(render_deployments([view], {A: "desk", B: "attic"}))

    assert "desk [0, 1) 12% -> attic (relay) -> desk [1, 2) 97%" in text


@pytest.fixture
def chain_through() -> Plan:
    def stage(node: NodeId, start: int, stop: int) -> Stage:
        return Stage(
            node=node, start=start, stop=stop, weights_bytes=0, kv_bytes=0, memory_bytes=0, prefill_s=0.0, decode_s=0.0,
            send_prefill_s=0.0, send_decode_s=0.0,
        )  # fmt: skip

    figures = Estimate(time_to_first_token_s=1.0, time_per_output_token_s=0.1, tokens_per_s=10.0, latency_s=2.0)
    return Plan(
        stages=(stage(A, 0, 1), stage(B, 1, 1), stage(A, 1, 2)), objective=Objective.LATENCY, shape=RequestShape(),
        estimate=figures, lower_bound=2.0, gap=0.0, solver="x",
    )  # fmt: skip


def test_an_event_is_one_line_with_its_time() -> None:
    event = EventView(sequence=1, kind="node.lost", node=B, unix_s=0.0, text="attic")

    assert line(event).split() == ["1970-01-01", "00:00:00", "node.lost", "bbbbbbbb", "attic"]


@pytest.mark.parametrize("text", ["3=attic", "3=bbbb"])
def test_a_pin_names_a_node_by_name_or_by_the_beginning_of_its_id(text: str) -> None:
    assert parse_pin(text, [(n.name, n.id) for n in NODES]) == Pin(block=3, node=B)


@pytest.mark.parametrize("text", ["", "3", "3=", "=attic", "x=attic", "3=cellar", "-1=attic"])
def test_a_pin_that_cannot_be_read_lists_the_nodes(text: str) -> None:
    with pytest.raises(SettingsError, match="desk, attic"):
        parse_pin(text, [(n.name, n.id) for n in NODES])


@pytest.mark.parametrize(
    ("text", "expected"), [("123", 123), ("2GiB", 2 << 30), ("800MB", 800_000_000), ("1.5 kib", 1536), ("7B", 7)]
)
def test_sizes_are_read_as_people_write_them(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "much", "2 cups", "-1GB", "1e9", "GB"])
def test_a_size_that_is_none_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(SettingsError, match="800MB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0", "0GB", "0.0 MiB"])
def test_a_budget_of_nothing_does_not_mean_everything(text: str) -> None:
    with pytest.raises(SettingsError, match="leaves nothing for models"):
        options_from({**FLAGS, "memory": text})


@pytest.mark.parametrize("name", ["a b/c", "/a", "a/", "a//b", "..", "a/../b", "-x", "é", "a\n", "x" * 201])
def test_a_name_that_shells_and_addresses_would_spoil_is_refused_before_anything_is_measured(name: str) -> None:
    done = CliRunner().invoke(app, ["serve", "m", "--url", "http://127.0.0.1:9", f"--name={name}"])

    assert done.exit_code == 2
    assert "cannot be a deployment's name" in done.stderr


@pytest.mark.parametrize("name", ["chat", "org/Model-1.5_b:small", "a@v2"])
def test_names_as_people_give_them_are_accepted(name: str) -> None:
    check_name(name)


def test_flags_become_options_under_the_home_of_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))

    options = options_from({**FLAGS, "memory": "1GiB", "links": [f"{B}=10ms,50mbit"]})

    assert (options.home, options.listen, options.memory_bytes) == (str(tmp_path), "tcp/127.0.0.1:7400", 1 << 30)
    assert msgspec.structs.asdict(options.links[0]) == {"target": B, "latency_s": 0.01, "bytes_per_s": 6.25e6}


@pytest.mark.parametrize(
    "wrong",
    [
        {"listen": "nowhere"},
        {"listen": "h:99999"},
        {"links": ["b=1ms,1mbit"]},
        {"links": [f"{B}=1ms,0mbit"]},
        {"connect": ["x"]},
        {"allow_hosts": ["box.local:8400"]},
        {"allow_origins": ["chat.example"]},
    ],
)
def test_a_flag_that_cannot_be_read_says_how_to_write_it(
    wrong: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))

    with pytest.raises(SettingsError, match="for example"):
        options_from({**FLAGS, **wrong})


def test_the_line_to_copy_fits_the_kind_of_model() -> None:
    assert "/v1/chat/completions" in curl_line("http://h:1", "m", "causal_lm")
    assert "/v1/embeddings" in curl_line("http://h:1", "m", "encoder")


@pytest.mark.parametrize("command", ["nodes", "ps", "logs", "profile", "chat"])
def test_without_a_node_here_a_command_says_how_to_start_one(command: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shoal", command],
        env={"SHOAL_HOME": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )

    assert done.returncode == 69
    assert "no node runs on this machine" in done.stderr
    assert "shoal up" in done.stderr


@pytest.mark.parametrize("command", ["nodes", "ps", "chat", "serve", "plan"])
def test_an_address_without_a_scheme_is_answered_with_how_to_write_it(command: str) -> None:
    arguments = [command, *(["m"] if command in {"serve", "plan"} else []), "--url", "localhost:8400"]

    done = CliRunner().invoke(app, arguments)

    assert done.exit_code == 2
    assert done.stderr.startswith("error: 'localhost:8400' is no address of a gateway\nhint: write http://HOST:PORT")


def test_listening_beyond_this_machine_takes_an_explicit_flag(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shoal", "up", "--listen", "0.0.0.0:0", "--port", "0"],
        env={"SHOAL_HOME": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )

    assert done.returncode == 2
    assert "--expose" in done.stderr
