"""What `bench/links` measures and what it makes of it: the grid, the questions, the peer's flags, the verdicts and the picture."""

import itertools
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from bench.links import claim, ours, peer
from bench.links.asking import Stream, figures
from bench.links.plot import Panel, picture, tick_step
from bench.links.settings import BASE, CORNERS, CROWD, FAR_CROWD, grid
from bench.links.texts import Kind, Texts, document_twice, prose_at
from bench.measure import Options, SkippedError

from shoal.ids import NodeId


def test_the_grid_has_the_middle_each_factor_and_the_corners_once() -> None:
    found = grid()

    assert len(set(found)) == len(found) == 19
    assert found[:3] == [BASE, CROWD, FAR_CROWD]
    assert {s.rtt_ms for s in found} == {0, 5, 20, 50, 100}
    assert {s.mbit for s in found} == {10, 50, 1000}
    assert ({s.nodes for s in found}, {s.streams for s in found}, {s.prompt for s in found}) == (
        {2, 3},
        {1, 8},
        {32, 512},
    )
    assert len(CORNERS) == 8
    assert len({s.name for s in found}) == 19


def test_a_quick_run_has_the_middle_alone() -> None:
    assert [cell.name for cell in claim.cells(Options(quick=True))] == [BASE.name]


def test_both_sides_have_equal_shares_of_the_work() -> None:
    # Layers on the first host and on the others, the output matrix as eight of them.
    assert peer.far_layers(2, output_here=True) == 19
    assert peer.far_layers(2, output_here=False) == 11
    assert peer.far_layers(3, output_here=True) == 25
    # A layer is two blocks, behind the one of the embedding.
    assert ours.CUTS[2] == (1 + 2 * (peer.LAYERS - peer.far_layers(2, output_here=False)),)


def test_the_peer_gets_a_context_for_each_stream_and_keeps_the_output_matrix() -> None:
    flags = peer.server_flags(CROWD, ["10.0.0.2:1"], peer.PLAIN)

    said = dict(itertools.pairwise(flags))
    assert (said["--rpc"], said["-ngl"], said["-np"], said["-c"]) == ("10.0.0.2:1", "20", "8", "8192")
    assert said["--override-tensor"] == "^output=CPU,^token_embd=CPU"


def test_without_the_peers_programs_it_is_said_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / peer.SERVER).write_text("")
    (tmp_path / peer.SERVER).chmod(0o755)

    assert "--llama-rpc" in peer.missing(Options())
    assert peer.missing(Options(llama_rpc=str(tmp_path))) == f"{tmp_path} has no {peer.WORKER}"


def test_a_failed_cell_is_skipped_and_leaves_the_grid_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")

    with pytest.raises(SkippedError, match="iproute2"):
        claim.cells(Options(quick=True))[0].measure()


def test_documents_come_twice_and_begin_a_third_time() -> None:
    text = document_twice(3)
    first, second, rest = text.split("\n\n")

    assert first.replace("true", "false", 1) == second
    assert rest == "["
    assert document_twice(4) != text


def test_pieces_of_prose_are_others_each_time_and_the_same_for_each_side() -> None:
    prose = list(range(5000))
    asked = Texts(tokenizer=None, prose=prose)  # type: ignore[arg-type]
    first = [asked.next(Kind.PROSE, 32) for _ in range(30)]
    asked.taken = 0

    assert len({tuple(piece) for piece in first}) == 30
    assert [asked.next(Kind.PROSE, 32) for _ in range(30)] == first
    assert prose_at(prose, 7, 512)[:32] != prose_at(prose, 8, 512)[:32]


def test_an_answer_is_counted_by_what_it_says_and_timed_by_what_comes() -> None:
    stream = Stream()
    stream.take(b'data: {"choices": [{"text": "a"}], "usage": null}\n', 1.0)
    stream.take(b": a comment\n", 1.5)
    stream.take(b'data: {"choices": [{"text": ""}]}\n', 2.0)
    stream.take(b'data: {"choices": [{"text": "bcd"}]}\n', 3.0)
    stream.take(b'data: {"choices": [], "usage": {"completion_tokens": 5}}\n', 3.1)
    stream.take(b"data: [DONE]\n", 3.1)

    assert (stream.times_s, stream.tokens, stream.error) == ([1.0, 3.0], 5, "")
    said = figures([[stream], [stream]])
    assert said["tokens_per_s"]["median"] == pytest.approx(5 / 3)
    assert said["first_token_s"]["median"] == 1.0
    assert said["per_token_ms"]["median"] == pytest.approx(500.0)


def test_pins_force_the_cut_and_streams_are_served_for_throughput() -> None:
    ids = {"first": NodeId("a"), "second": NodeId("b")}

    alone, crowd = (ours.wanted(ids, setting, ours.PLAIN) for setting in (BASE, CROWD))

    assert [(pin.block, pin.node) for pin in alone["pins"]] == [(38, "a"), (39, "b")]
    assert "objective" not in alone
    assert (crowd["choose"].in_flight, crowd["shape"].slots) == (8, 8)


def measured(own: float, other: float) -> dict[str, object]:
    def rate(value: float) -> dict[str, object]:
        return {
            "tokens_per_s": {"median": value}, "first_token_s": {"median": 0.1}, "per_token_ms": {"median": 9.0},
            "gap_ms": {"p50": 1.0, "p95": 2.0}, "wire_bytes_per_token": 5, "cpu_ms_per_token": 3.0,
        }  # fmt: skip

    sides = {"ours": {"plain prose": rate(own), "guessing prose": rate(2 * own)}, "peer": {"plain prose": rate(other)}}
    return {"values": {"network": {"rtt_ms": 20.5, "mbit_per_s": 47.6}, **sides}}


def test_goals_are_judged_by_the_ratio_in_their_cell() -> None:
    results = {BASE.name: measured(25.9, 20.0), FAR_CROWD.name: measured(31.0, 20.0)}

    judged = {f.what: f.met for f in claim.findings(results) if f.met is not None}

    assert judged == {"1 stream, plain decoding": False, "8 streams, 100 ms, as served by default": True}
    assert f"| {BASE.name} | Shoal plain prose | 25.9 |" in claim.details(results)


def test_the_picture_is_an_svg_with_a_bar_or_point_for_each_value() -> None:
    drawn = claim.draw({BASE.name: measured(26.0, 20.0)})[claim.PICTURE]

    root = ET.fromstring(drawn)
    titles = [element.text for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert root.tag.endswith("svg")
    assert sorted(text for text in titles if text) == ["Shoal, prose, plain: 26"] * 3 + ["llama.cpp, prose: 20"] * 3
    assert claim.draw({}) == {}


def test_names_are_escaped_in_a_picture_and_missing_values_left_out() -> None:
    panel = Panel(title="a < b", places=("1", "2"), series={"x & y": [None, 3.0]}, unit="s")

    texts = {element.text for element in ET.fromstring(picture([panel], "<heading>")).iter()}
    assert {"<heading>", "x & y"} <= texts
    assert not any("None" in text or "nan" in text for text in texts if text)


@pytest.mark.parametrize("top", [0.3, 1.0, 7.0, 52.0, 99.0, 160.0])
def test_an_axis_has_four_to_eight_round_steps(top: float) -> None:
    assert 4 <= top / tick_step(top) < 10
