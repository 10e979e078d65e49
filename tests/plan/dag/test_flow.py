"""The least cut of a network is the least of all cuts."""

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.plan.dag.flow import Network, least_cut

ENDLESS = 10**9
Edges = list[tuple[int, int, int, int]]


@st.composite
def networks(draw: st.DrawFn) -> tuple[int, Edges]:
    """Vertices, and edges with a capacity each way; vertex 0 is the source, 1 the sink."""
    count = draw(st.integers(2, 7))
    vertex, capacity = st.integers(0, count - 1), st.sampled_from((0, 0, 1, 2, 3, 5, 8, ENDLESS))
    edges = draw(st.lists(st.tuples(vertex, vertex, capacity, capacity), max_size=16))
    return count, [edge for edge in edges if edge[0] != edge[1]]


@settings(max_examples=400)
@given(networks())
def test_the_flow_is_the_least_cut_and_the_side_has_it(case: tuple[int, Edges]) -> None:
    count, edges = case
    network = Network()
    for _ in range(count):
        network.vertex()
    for edge in edges:
        network.edge(*edge)

    def through(side: tuple[bool, ...]) -> int:
        there = sum(capacity for tail, head, capacity, _ in edges if side[tail] and not side[head])
        return there + sum(back for tail, head, _, back in edges if side[head] and not side[tail])

    flow, side = least_cut(network, 0, 1, ENDLESS)

    least = min(through((True, False, *rest)) for rest in product((False, True), repeat=count - 2))
    if least >= ENDLESS:
        assert flow >= ENDLESS
    else:
        assert flow == least == through(tuple(side))


def test_a_long_line_is_cut_at_its_narrowest_edge() -> None:
    network = Network()
    line = [network.vertex() for _ in range(20_000)]
    for at in range(len(line) - 1):
        network.edge(line[at], line[at + 1], 2 if at == 12_345 else 5)

    flow, side = least_cut(network, line[0], line[-1], ENDLESS)

    assert (flow, sum(side)) == (2, 12_346)
