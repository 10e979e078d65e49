"""What a search over chains is asked for beside cost, and what it hands back."""

from dataclasses import dataclass

from shoal.plan.arrays import INF, Whole
from shoal.plan.chain import Final
from shoal.plan.cost import Span
from shoal.plan.tables import Chain, Tables, spans_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Bit masks of devices that must, or must not, take part; and what a search through a crowd may be content with."""

    require: int = 0
    forbid: int = 0
    below: float = INF
    """Any chain that costs less will do, and no other is looked for; infinite: the cheapest."""
    near: float = 0.0
    """A gap that need not be closed."""

    def admits(self, mask: int) -> bool:
        return not (self.require & ~mask or self.forbid & mask)


FREE = Choice()


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A chain (or none), its cost, a proven lower bound of the cost, and who found it.

    `finals` holds the cheapest chain of each set of devices, where the exact solver went through all of them.
    """

    cost: float
    chain: Chain | None
    bound: float
    solver: str
    finals: tuple[Final, ...] = ()
    via: Whole | None = None
    """The relays of the search that found the chain."""

    def spans(self, tables: Tables) -> tuple[Span, ...]:
        """The chain in the problem's words; no spans where there is none."""
        return spans_of(tables, self.chain, self.via) if self.chain and self.via is not None else ()


def mask_of(chain: Chain) -> int:
    """The devices that take part, as bits."""
    mask = 0
    for device, _, _ in chain:
        mask |= 1 << device
    return mask
