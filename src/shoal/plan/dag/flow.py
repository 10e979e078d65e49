"""The least cut of a network with integer capacities, by Dinic's algorithm.

Levels are distances to the sink, so a search from the source only meets edges that lead there; a vertex that leads
nowhere is left at once.  Integers make the flow exact: what it proves needs no tolerance.
"""

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True)
class Network:
    """Edges under construction; edge e and its opposite are e and e ^ 1."""

    out: list[list[int]] = field(default_factory=list)
    head: list[int] = field(default_factory=list)
    room: list[int] = field(default_factory=list)

    def vertex(self) -> int:
        """A new vertex."""
        self.out.append([])
        return len(self.out) - 1

    def edge(self, tail: int, head: int, capacity: int, opposite: int = 0) -> None:
        """Let *capacity* flow from *tail* to *head*, and *opposite* back."""
        self.out[tail].append(len(self.head))
        self.out[head].append(len(self.head) + 1)
        self.head += (head, tail)
        self.room += (capacity, opposite)


def least_cut(network: Network, source: int, sink: int, limit: int) -> tuple[int, list[bool]]:
    """The flow, and which vertices are on the source's side; a flow of *limit* or more is not followed further."""
    flow = 0
    while flow < limit:
        level = _levels(network, sink)
        if level[source] < 0:
            break
        flow += _block(network, source, sink, level)
    return flow, _side(network, source)


def _levels(network: Network, sink: int) -> list[int]:
    out, head, room = network.out, network.head, network.room
    level = [-1] * len(out)
    level[sink] = 0
    queue = deque([sink])
    while queue:
        here = queue.popleft()
        for edge in out[here]:
            there = head[edge]
            if level[there] < 0 and room[edge ^ 1]:
                level[there] = level[here] + 1
                queue.append(there)
    return level


def _block(network: Network, source: int, sink: int, level: list[int]) -> int:
    """A blocking flow: paths that go down by one level each step, until none is left."""
    out, head, room = network.out, network.head, network.room
    turn = [0] * len(out)
    total, path, here = 0, list[int](), source
    while True:
        if here == sink:
            amount = min(room[edge] for edge in path)
            total += amount
            cut = 0
            for index in range(len(path) - 1, -1, -1):
                edge = path[index]
                room[edge] -= amount
                room[edge ^ 1] += amount
                if not room[edge]:
                    cut = index
            here = head[path[cut] ^ 1]
            del path[cut:]
        edges = out[here]
        while turn[here] < len(edges):
            edge = edges[turn[here]]
            if room[edge] and level[head[edge]] == level[here] - 1:
                break
            turn[here] += 1
        if turn[here] < len(edges):
            path.append(edge)
            here = head[edge]
        elif path:
            here = head[path.pop() ^ 1]
            turn[here] += 1
        else:
            return total


def _side(network: Network, source: int) -> list[bool]:
    reached = [False] * len(network.out)
    reached[source] = True
    stack = [source]
    while stack:
        for edge in network.out[stack.pop()]:
            there = network.head[edge]
            if network.room[edge] and not reached[there]:
                reached[there] = True
                stack.append(there)
    return reached
