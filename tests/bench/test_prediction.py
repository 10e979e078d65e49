"""Placements that predictions are compared on, and what is made of the comparison."""

import pytest
from bench.prediction.claim import BLOCKS, SHAPE, findings, spearman
from bench.prediction.placements import Placement, placements

from shoal.ids import NodeId
from shoal.plan.problem import Pin

IDS = {name: NodeId(name) for name in ("gateway", "box", "board")}


def test_at_least_thirty_placements_differ_and_begin_at_the_source() -> None:
    found = placements(BLOCKS)

    assert len({placement.name for placement in found}) == len(found) >= 30
    assert all(placement.nodes[0] == "gateway" for placement in found)
    assert all(0 < cut < BLOCKS for placement in found for cut in placement.cuts)
    assert {len(placement.nodes) for placement in found} == {1, 2, 3}


def test_a_placement_is_forced_by_pins_on_both_sides_of_its_cuts() -> None:
    options = Placement(("gateway", "box", "board"), (4, 16)).options(IDS, SHAPE)

    assert options["stages"] == 3
    assert options["pins"] == tuple(
        Pin(block=block, node=IDS[name]) for block, name in ((3, "gateway"), (4, "box"), (15, "box"), (16, "board"))
    )


def test_neighbouring_cuts_pin_a_block_once() -> None:
    pins = Placement(("gateway", "box", "board"), (4, 5)).options(IDS, SHAPE)["pins"]

    assert [pin.block for pin in pins] == [3, 4, 5]


def test_ranks_agree_where_the_order_is_the_same() -> None:
    assert spearman([(1, 10), (2, 20), (3, 1000)]) == pytest.approx(1.0)
    assert spearman([(1, 3), (2, 2), (3, 1)]) == pytest.approx(-1.0)
    assert spearman([(1, 1), (1, 1), (2, 5), (3, 9)]) == pytest.approx(1.0)


def cell(*rows: tuple[float, float]) -> dict[str, object]:
    """Placements by predicted and measured seconds per token; the first token takes ten times as long."""
    placed = {
        str(n): {"predicted": [10 * p, p], "measured": [10 * m, m], "corrected": [10 * m, m]}
        for n, (p, m) in enumerate(rows)
    }
    return {"values": {"placements": placed, "choice": ["box [0, 2)"]}}


def test_errors_are_of_what_was_measured_and_the_goal_is_judged_by_their_median() -> None:
    good = findings({"placements 1 of 1": cell((0.95, 1.0), (2.0, 2.0), (3.6, 3.0))})
    bad = findings({"placements 1 of 1": cell((0.5, 1.0), (2.4, 2.0), (1.0, 3.0))})

    assert [finding.met for finding in good] == [True] * 4
    assert [finding.met for finding in bad] == [False] * 4
    assert "**5.0%** median over 3 placements" in good[0].measured


def test_the_choice_may_take_three_percent_more_than_the_best() -> None:
    for chosen_s, met in ((1.02, True), (1.05, False), (0.9, True)):
        results = cell((1.0, 1.0), (2.0, 2.0))
        rows = results["values"]["placements"]  # type: ignore[index]
        rows["choice"] = {"measured": [10 * chosen_s, chosen_s]}

        assert [finding.met for finding in findings({"choice": results})] == [met]
