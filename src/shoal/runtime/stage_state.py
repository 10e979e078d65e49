"""What a stage machine remembers between two inputs."""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from shoal.runtime.edge import Edge, Work
from shoal.runtime.effects import Effect, ReleaseSlot
from shoal.runtime.first import FirstStage
from shoal.runtime.frames import CreditFrame
from shoal.runtime.garbage import Garbage
from shoal.runtime.grammar import Grammars, NoGrammars
from shoal.runtime.last import LastStage
from shoal.runtime.settings import StageSettings
from shoal.runtime.slots import SlotTable
from shoal.runtime.speculate.draft import Drafter
from shoal.runtime.speculate.ngram import NgramDrafter


@dataclass(slots=True)
class StageState:
    """All that a stage remembers.  `first` and `last` are there only on those stages.

    `trouble` is what this stage sees itself, `behind` what the next one says about those behind it; empty while all is well.
    """

    settings: StageSettings
    slots: SlotTable
    first: FirstStage | None
    last: LastStage | None
    inbox: deque[Work] = field(default_factory=deque)
    running: Work | None = None
    run: int | None = None
    """Whose steps are counted; None before the first frame."""
    last_step: int = -1
    began_s: float | None = None
    now_s: float = 0.0
    beaten_s: float = 0.0
    trouble: str = ""
    behind: str = ""
    discarded: int = 0
    follower_birth: int = 0
    """Of the worker that the next stage is; 0 before one said so."""
    renewals: int = 0
    """How many stages behind this one were started anew since it was."""
    renewals_behind: int | None = None
    """The same, as the next stage said last; None before it said anything."""
    garbage: Garbage = field(default_factory=Garbage)
    """What came from the stage before that nobody can read."""
    edge: Edge = field(init=False)

    def __post_init__(self) -> None:
        self.edge = Edge(self.settings.credits)
        self.run = self.settings.run if self.settings.is_first else None

    def credit(self, step: int) -> CreditFrame:
        """All frames up to *step* are done with."""
        return CreditFrame(plan_epoch=self.settings.plan_epoch, step=step, run=self.run or 0, renewals=self.renewals)

    def tell_time(self, now_s: float) -> None:
        """A clock's zero is arbitrary: the machine's own time begins when it is first told."""
        if self.began_s is None:
            self.began_s = now_s
        self.now_s = now_s - self.began_s
        if self.first is not None:
            self.first.flights.now_s = self.now_s


def release(state: StageState, slots: Collection[int]) -> list[Effect]:
    """Give back what *slots* hold, which is nobody's any more; what runs now keeps its cache until it is over."""
    busy = {rows.slot for rows in state.running[0].sequences} if state.running is not None else set()
    return [ReleaseSlot(slot=slot) for slot in sorted(slots) if slot not in busy]


def start(settings: StageSettings, grammars: Grammars | None = None, drafter: Drafter | None = None) -> StageState:
    """A stage that has seen nothing yet.

    The last one asks *grammars* what an answer may be (None: nothing is constrained); the first one has *drafter* guess
    (None: by looking up).
    """
    slots = SlotTable(settings.slots)
    return StageState(
        settings=settings,
        slots=slots,
        first=FirstStage(settings, slots, drafter or NgramDrafter()) if settings.is_first else None,
        last=LastStage(grammars or NoGrammars()) if settings.is_last else None,
    )
