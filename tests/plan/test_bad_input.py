"""What is wrong with a problem is said, and said for what it is: never a wrong plan, never a crash, never for ever."""

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from shoal.errors import InvalidRequestError, ShoalError, UnsupportedVersionError
from shoal.ids import NodeId
from shoal.plan.budget import StepBudget
from shoal.plan.check import LARGEST, check
from shoal.plan.cost import Span
from shoal.plan.document import parse_problem
from shoal.plan.exact import satisfies
from shoal.plan.placement import place
from shoal.plan.problem import (
    BatchTimes,
    BlockSpec,
    DeviceSpec,
    Infeasible,
    LinkSpec,
    Objective,
    Pin,
    Plan,
    Problem,
    RequestShape,
    Residency,
    SharedTensor,
)

Chain = Callable[..., Problem]
NODES = tuple(NodeId(f"n{index}") for index in range(3))
ODD = (0, -1, 1, 0.5, 2**40, 2**62, 2**70, -(2**70), LARGEST, 1e308, 1e-300, "", "n9", "n1", None, True, [], {}, [0],
       ["n0"], [None])  # fmt: skip
Place = tuple[str | int, ...]


@pytest.fixture(scope="module")
def rich() -> Problem:
    """Three devices, and every field that there is in use."""
    return Problem(
        blocks=tuple(
            BlockSpec(
                name=f"block {index}",
                weights_bytes=5,
                kv_bytes_per_token=1,
                output_bytes_per_token=2,
                load_peak_bytes=1,
                workspace_bytes=1,
            )
            for index in range(3)
        ),
        devices=tuple(
            DeviceSpec(
                node=node,
                memory_budget_bytes=40,
                decode_s=(1.0,) * 3,
                prefill_s=(1.0,) * 3,
                batched=(BatchTimes(batch=2, decode_s=(1.5,) * 3),),
                joules_limit=100.0,
                active_watts=1.0,
                price_per_hour=1.0,
                region="home",
                trust="own",
            )
            for node in NODES
        ),
        links=tuple(
            LinkSpec(source=a, target=b, latency_s=0.1, bytes_per_s=1e3, medium="air" if a == NODES[0] else "")
            for a in NODES
            for b in NODES
            if a != b
        ),
        shape=RequestShape(tokens_in=2, tokens_out=2, context_tokens=4, slots=1),
        source=NODES[0],
        pins=(Pin(block=2, node=NODES[1]),),
        max_stages=3,
        require=(NODES[1],),
        residency=Residency(regions=("home",)),
        shared=(SharedTensor(size_bytes=1, blocks=(0, 1)),),
    )


def places(value: object, at: Place = ()) -> Iterator[Place]:
    yield at
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from places(inner, (*at, key))


def changed(problem: Problem, at: Place, value: object) -> bytes:
    raw: Any = json.loads(msgspec.json.encode(problem))
    inner = raw
    for key in at[:-1]:
        inner = inner[key]
    if at:
        inner[at[-1]] = value
    return json.dumps(raw if at else value).encode()


def answered(document: bytes) -> Plan | Infeasible | ShoalError:
    """Anything else that is raised is a crash."""
    try:
        return place(parse_problem(document), StepBudget(2000))
    except ShoalError as error:
        return error


@pytest.mark.parametrize("objective", Objective)
def test_whatever_stands_in_a_field_there_is_a_clear_error_a_reason_or_a_plan_that_keeps_the_rules(
    rich: Problem, objective: Objective
) -> None:
    """A quarter of all fields and odd values for each objective."""
    problem = replace(rich, objective=objective)
    everywhere = list(places(json.loads(msgspec.json.encode(problem))))
    refused = 0
    for number, (at, value) in enumerate((at, value) for at in everywhere for value in ODD):
        if number % 4 != list(Objective).index(objective):
            continue
        asked = changed(problem, at, value)
        answer = answered(asked)
        refused += isinstance(answer, ShoalError)
        if isinstance(answer, ShoalError | Infeasible):
            assert str(answer) if isinstance(answer, ShoalError) else answer.reason
            continue
        read = parse_problem(asked)
        assert satisfies(read, [Span(stage.node, stage.start, stage.stop) for stage in answer.stages]), (at, value)
        figures = (*msgspec.structs.astuple(answer.estimate), answer.lower_bound, answer.gap)
        assert all(math.isfinite(figure) and figure >= 0 for figure in figures), (at, value)
    assert refused > 100


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0, 1e300])
@pytest.mark.parametrize(
    "change",
    [
        lambda p, x: replace(p, devices=(replace(p.devices[0], decode_s=(x, 1.0, 1.0)), *p.devices[1:])),
        lambda p, x: replace(p, devices=(replace(p.devices[0], prefill_s=(1.0, x, 1.0)), *p.devices[1:])),
        lambda p, x: replace(p, devices=(replace(p.devices[0], step_overhead_s=x), *p.devices[1:])),
        lambda p, x: replace(p, devices=(replace(p.devices[0], weights_factor=x), *p.devices[1:])),
        lambda p, x: replace(p, devices=(replace(p.devices[0], joules_limit=x), *p.devices[1:])),
        lambda p, x: replace(p, devices=(replace(p.devices[0], active_watts=x), *p.devices[1:])),
        lambda p, x: replace(p, links=(replace(p.links[0], latency_s=x), *p.links[1:])),
        lambda p, x: replace(p, links=(replace(p.links[0], bytes_per_s=x), *p.links[1:])),
        lambda p, x: replace(p, links=(replace(p.links[0], joules_per_byte=x), *p.links[1:])),
    ],
)
def test_a_figure_that_is_no_measurement_is_refused_also_where_no_file_was_read(
    rich: Problem, change: Callable[[Problem, float], Problem], wrong: float
) -> None:
    check(rich)
    with pytest.raises(InvalidRequestError):
        place(change(rich, wrong), StepBudget(1000))


def test_no_time_at_all_is_a_plan_without_a_division_by_it(chain: Chain) -> None:
    """A block may be too quick to time; figures stay numbers then."""
    for objective in Objective:
        answer = place(chain([1] * 3, [0, 0], [9, 9], {(0, 1): 0}, objective=objective), StepBudget(1000))

        assert isinstance(answer, Plan)
        assert answer.estimate.latency_s == pytest.approx(0, abs=1e-6)
        assert (answer.gap, answer.lower_bound) == (0, pytest.approx(0, abs=1e-6))


LINKS = {(0, 1): 1.0, (0, 2): 1.0, (1, 2): 1.0}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pins": (Pin(block=1, node=NODES[1]), Pin(block=2, node=NODES[0]))}, "the pins contradict each other"),
        ({"stages_exactly": 3, "max_stages": 2}, "no chain has exactly 3 stages"),
        ({"stages_exactly": 9}, "3 nodes can run 3 stages at most, 9 are asked for"),
        ({"require": NODES, "max_stages": 2}, "no chain has at most 2 stages"),
        ({"residency": Residency(regions=("mars",))}, "block 0 belongs on n0, which may hold none"),
        ({"residency": Residency(regions=("mars",)), "pin_first": False}, "every device is excluded or outside"),
    ],
)
def test_demands_that_exclude_each_other_are_named(chain: Chain, changes: dict[str, object], reason: str) -> None:
    answer = place(chain([1] * 4, [1, 1, 1], [9, 9, 9], LINKS, **changes), StepBudget(10**6))

    assert isinstance(answer, Infeasible)
    assert answer.reason.startswith(reason)
    assert answer.hint


def test_a_block_larger_than_every_device_is_a_matter_of_memory_with_the_bytes_that_lack(chain: Chain) -> None:
    answer = place(chain([1, 50, 1], [1, 1, 1], [9, 20, 30], LINKS), StepBudget(10**6))

    assert isinstance(answer, Infeasible)
    assert answer.missing_bytes == 20
    assert "n2 would need 50 B for blocks 1-1 and has 30 B" in answer.reason


def test_a_fleet_without_the_links_that_a_chain_needs_says_so(chain: Chain) -> None:
    """The model fits on no device alone, and the source reaches nobody."""
    apart = chain([1] * 6, [1, 1, 1], [3, 3, 3], {(1, 2): 1})
    one_way = chain([1] * 6, [1, 1], [3, 3], {(0, 1): 1})
    one_way = replace(one_way, links=one_way.links[:1])

    for problem in (apart, one_way):
        answer = place(problem, StepBudget(10**6))

        assert isinstance(answer, Infeasible)
        assert answer.needed_bytes == 0 or answer.missing_bytes > 0
        assert "links" in answer.reason or "memory" in answer.reason


def many(chain: Chain, devices: int, blocks: int) -> Problem:
    return chain([1] * blocks, [1] * devices, [1] * devices, {})


def test_thousands_of_devices_are_too_many_at_once_and_the_number_that_is_not_is_said(chain: Chain) -> None:
    with pytest.raises(InvalidRequestError, match=r"3000 devices are too many for 10 blocks: at most \d+ are planned"):
        place(many(chain, 3000, 10), StepBudget(100))


def test_excluded_devices_do_not_count(chain: Chain) -> None:
    problem = many(chain, 3000, 10)
    few = replace(problem, exclude=tuple(device.node for device in problem.devices[3:]))

    assert isinstance(place(few, StepBudget(100)), Infeasible)


def test_hundreds_of_devices_without_links_are_answered_within_the_budget(chain: Chain) -> None:
    answer = place(many(chain, 200, 4), StepBudget(20))

    assert isinstance(answer, Infeasible)
    assert answer.reason


def test_a_context_of_any_size_is_answered(chain: Chain) -> None:
    """The largest context that fits is searched, not listed."""
    problem = chain([1] * 3, [1, 1], [9, 9], {(0, 1): 1})
    blocks = tuple(replace(block, kv_bytes_per_token=1) for block in problem.blocks)
    shape = RequestShape(tokens_in=1, tokens_out=1, context_tokens=10**15, slots=1)

    answer = place(replace(problem, blocks=blocks, shape=shape), StepBudget(10**6))

    assert isinstance(answer, Infeasible)
    assert "it fits with a context of" in answer.hint


def test_a_budget_that_is_spent_ends_the_search_for_reasons_too(chain: Chain) -> None:
    """Pins that contradict each other: no plan is proven, which demand it is takes several searches."""
    pins = (Pin(block=1, node=NODES[1]), Pin(block=2, node=NODES[0]))
    answer = place(chain([1] * 4, [1, 1, 1], [9, 9, 9], LINKS, pins=pins), StepBudget(0))

    assert isinstance(answer, Infeasible)
    assert "no placement of 4 blocks on 3 devices keeps to all demands" in answer.reason
    assert "not found before the search ended" in answer.reason
    assert "allow more time" in answer.hint


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (("links", 0, "target"), "n9", "links.0.target is 'n9', which is no device here"),
        (("links", 0, "source"), "n9", "links.0.source is 'n9', which is no device here"),
        (("exclude",), ["n9"], "exclude.0 is 'n9', which is no device here"),
        (("links", 0, "bytes_per_s"), 1e-9, "it must lie between"),
        (("shape", "slots"), 10**30, "shape.slots is 1e\\+30; it must be at most 1e\\+18"),
        (("version",), 0, "version is 0; there are 1 to"),
        (("version",), "2", "Expected `int`"),
        (("shape", "in_fligth"), 2, "unknown field shape.in_fligth"),
    ],
)
def test_a_file_with_a_mistake_is_refused_with_the_place(rich: Problem, at: Place, value: object, message: str) -> None:
    parse_problem(changed(rich, ("version",), 1))
    with pytest.raises(InvalidRequestError, match=message):
        parse_problem(changed(rich, at, value))


def test_a_newer_file_is_refused_for_its_version_and_not_for_its_new_fields(rich: Problem) -> None:
    raw = json.loads(msgspec.json.encode(rich)) | {"version": 99, "colour": "blue"}

    with pytest.raises(UnsupportedVersionError, match="version 99"):
        parse_problem(json.dumps(raw).encode())


def test_pins_that_tear_a_device_apart_are_named(chain: Callable[..., Problem]) -> None:
    pins = tuple(Pin(block=b, node=NodeId(n)) for b, n in ((1, "n1"), (2, "n2"), (3, "n1")))
    problem = chain((1,) * 5, (1.0, 1.0, 1.0), (9, 9, 9), {(0, 1): 0.1, (0, 2): 0.1, (1, 2): 0.1}, pins=pins)

    answer = place(problem, StepBudget(10**6))

    assert isinstance(answer, Infeasible)
    assert answer.reason.endswith("yet blocks 1 and 3 belong on n1, block 2 between them on n2")


def test_batteries_that_allow_nothing_are_told_in_joules(chain: Callable[..., Problem]) -> None:
    problem = chain((1, 1), (1.0, 1.0), (9, 9), {(0, 1): 0.1})
    tired = tuple(replace(device, active_watts=2.0, joules_limit=1.5) for device in problem.devices)

    answer = place(replace(problem, devices=tired), StepBudget(10**6))

    assert isinstance(answer, Infeasible)
    assert "n0 gives 1.5 J and draws 2 J or more for its smallest shard" in answer.reason


def test_a_block_larger_than_every_device_is_named_with_its_size(chain: Callable[..., Problem]) -> None:
    answer = place(chain((1, 50, 1), (1.0, 1.0), (9, 9), {(0, 1): 0.1}), StepBudget(10**6))

    assert isinstance(answer, Infeasible)
    assert "block 1 (block 1) alone needs 50 B, no device has more than 9 B for it" in answer.reason


def test_where_only_the_number_of_stages_is_in_the_way_of_memory_the_hint_says_so(
    chain: Callable[..., Problem],
) -> None:
    answer = place(chain((4, 4), (1.0, 1.0), (5, 5), {(0, 1): 0.1}, max_stages=1), StepBudget(10**6))

    assert isinstance(answer, Infeasible)
    assert answer.hint == "it fits with another number of stages (now at most 1)"


def test_text_that_is_no_json_is_shown_with_its_line() -> None:
    with pytest.raises(InvalidRequestError, match=r"line 2: NaN; JSON has no NaN"):
        parse_problem(b'{\n"blocks": NaN, "devices": []}')
