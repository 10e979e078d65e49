"""A transition, carried out step by step on a model of nodes: somebody serves at every step, wherever memory admits it."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from shoal.ids import NodeId
from shoal.plan.problem import Infeasible
from shoal.plan.transition import Action, Actual, Fetch, Link, Load, Piece, Progress, Retire, Transition, transition

NODES = tuple(NodeId(letter) for letter in "abcd")
OLD, ABANDONED, NEW = 1, 2, 3


@dataclass
class Nodes:
    """What nodes hold; refuses what no node could do."""

    actual: Actual
    held: dict[Piece, Progress] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.held = dict(self.actual.pieces)

    def do(self, action: Action, pipeline: tuple[Piece, ...]) -> None:
        piece = action.piece
        match action:
            case Fetch():
                assert self.held.get(piece, Progress.NONE) is Progress.NONE, "fetched twice"
                self.held[piece] = Progress.FETCHED
            case Load():
                assert self.held[piece] is Progress.FETCHED, "loaded without chunks, or twice"
                self.held[piece] = Progress.LOADED
                self.check_memory()
            case Link():
                follower = pipeline[(piece.stage + 1) % len(pipeline)]
                assert self.held[piece] is Progress.LOADED
                assert self.held[follower] >= Progress.LOADED, "nobody listens there"
                self.held[piece] = Progress.LINKED
            case Retire():
                del self.held[piece]

    def check_memory(self) -> None:
        for node, limit in self.actual.memory_bytes.items():
            used = sum(p.memory_bytes for p, how in self.held.items() if p.node == node and how >= Progress.LOADED)
            assert used <= limit, f"{node} holds {used} of {limit} bytes"

    def serves(self, pipeline: tuple[Piece, ...]) -> bool:
        return bool(pipeline) and all(self.held.get(p) is Progress.LINKED for p in pipeline)

    def seen(self, serving: int) -> Actual:
        return Actual(pieces=tuple(self.held.items()), memory_bytes=self.actual.memory_bytes, serving=serving)


def pipelines(epoch: int) -> st.SearchStrategy[tuple[Piece, ...]]:
    """Stages on some nodes in some order; the first node may also have the last stage."""

    def build(nodes: list[NodeId], sizes: list[int], *, closes: bool) -> tuple[Piece, ...]:
        chain = [*nodes, *(nodes[:1] if closes and len(nodes) > 1 else [])]
        return tuple(
            Piece(plan_epoch=epoch, stage=i, node=node, start=i, stop=i + 1, memory_bytes=sizes[i])
            for i, node in enumerate(chain)
        )

    return st.builds(
        build,
        st.lists(st.sampled_from(NODES), unique=True, min_size=1, max_size=4),
        st.lists(st.integers(1, 10), min_size=5, max_size=5),
        closes=st.booleans(),
    )


@dataclass
class Case:
    actual: Actual
    old: tuple[Piece, ...]
    new: tuple[Piece, ...]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A serving pipeline (or none), rests of an abandoned move, and some of the wanted pipeline already there."""
    old = draw(st.one_of(st.just(()), pipelines(OLD)))
    rests = draw(pipelines(ABANDONED))[: draw(st.integers(0, 2))]
    new = draw(pipelines(NEW))
    begun = {p: draw(st.sampled_from((Progress.NONE, Progress.FETCHED))) for p in new}
    held = {
        **dict.fromkeys(old, Progress.LINKED),
        **dict.fromkeys(rests, Progress.FETCHED),
        **{p: how for p, how in begun.items() if how},
    }
    least = {n: max(load(old, n), load(new, n)) for n in NODES}
    memory = {n: least[n] + draw(st.integers(0, 12)) for n in NODES}
    return Case(Actual(pieces=tuple(held.items()), memory_bytes=memory, serving=OLD if old else 0), old, new)


def load(pieces: tuple[Piece, ...], node: NodeId) -> int:
    return sum(p.memory_bytes for p in pieces if p.node == node)


def found(case: Case) -> Transition:
    answer = transition(case.actual, case.new)
    assert isinstance(answer, Transition)
    return answer


@given(cases())
def test_somebody_serves_at_every_step_but_those_of_the_gap_that_is_named(case: Case) -> None:
    nodes, answer = Nodes(case.actual), found(case)
    for index, action in enumerate(answer.actions):
        nodes.do(action, case.new)
        in_gap = answer.gap is not None and answer.gap.begin <= index < answer.gap.end - 1
        if case.old and not in_gap:
            assert nodes.serves(case.old) or nodes.serves(case.new)

    assert nodes.held == dict.fromkeys(case.new, Progress.LINKED)


@given(cases())
def test_a_gap_is_named_only_where_memory_does_not_admit_both_plans(case: Case) -> None:
    over = {n: load(case.old, n) + load(case.new, n) - case.actual.memory_bytes[n] for n in NODES}

    gap = found(case).gap

    assert (gap.missing_bytes if gap else {}) == {n: b for n, b in over.items() if b > 0}


@given(cases())
def test_during_a_gap_nothing_is_fetched_and_nothing_is_loaded_that_fitted_before(case: Case) -> None:
    answer = found(case)
    if answer.gap is None:
        return
    late = answer.actions[answer.gap.begin : answer.gap.end]

    assert not any(isinstance(a, Fetch) for a in late)
    crowded = [a.piece for a in late if isinstance(a, Load)]
    assert {p.node for p in crowded} == set(answer.gap.missing_bytes)


@given(cases(), st.data())
def test_whoever_stops_in_the_middle_and_asks_again_gets_the_rest(case: Case, data: st.DataObject) -> None:
    nodes, answer = Nodes(case.actual), found(case)
    count = data.draw(st.integers(0, len(answer.actions)))
    for action in answer.actions[:count]:
        nodes.do(action, case.new)
    serving = OLD if nodes.serves(case.old) else 0

    rest = transition(nodes.seen(serving), case.new)

    assert isinstance(rest, Transition)
    assert {(type(a), a.piece) for a in rest.actions} == {(type(a), a.piece) for a in answer.actions[count:]}


@given(cases())
def test_where_everything_is_as_wanted_there_is_nothing_to_do(case: Case) -> None:
    there = Actual(
        pieces=tuple((p, Progress.LINKED) for p in case.new), memory_bytes=case.actual.memory_bytes, serving=NEW
    )

    assert transition(there, case.new) == Transition()


@given(cases())
def test_what_may_be_done_before_the_break_leaves_the_old_pipeline_whole(case: Case) -> None:
    nodes, answer = Nodes(case.actual), found(case)

    before = answer.until_the_break(OLD)
    for action in before:
        nodes.do(action, case.new)

    assert not case.old or nodes.serves(case.old)
    assert len(before) == (answer.gap.begin if answer.gap and case.old else len(answer.actions) - len(case.old))


@given(pipelines(NEW))
def test_a_pipeline_that_does_not_fit_even_alone_is_infeasible_in_numbers(wanted: tuple[Piece, ...]) -> None:
    node = wanted[0].node
    memory = {n: load(wanted, n) for n in NODES} | {node: load(wanted, node) - 1}

    answer = transition(Actual(pieces=(), memory_bytes=memory), wanted)

    assert isinstance(answer, Infeasible)
    assert answer.missing_bytes == 1
    assert node in answer.reason
