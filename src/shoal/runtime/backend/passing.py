"""What a stage without blocks runs: nothing.  Its session gives each frame's tensors back as they came (ADR 17).

So a relay is a stage like any other: it counts steps, gives credit, notices lost rows and dead neighbours, and no machine
has a case for it.  It takes any tensors, for it has no graph to tell which would be right; the next shard looks at its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shoal.errors import InvalidRequestError
from shoal.runtime.ports import SequenceStep
from shoal.runtime.request import Array


@dataclass(slots=True)
class PassingSession:
    """Holds no weights and no cache."""

    closed: bool = False

    def step(self, sequences: Sequence[SequenceStep], tensors: Mapping[str, Array]) -> dict[str, Array]:  # noqa: ARG002
        """See `Session.step`: the outputs are the inputs."""
        if self.closed:
            raise InvalidRequestError("the session is closed")
        return dict(tensors)

    def copy(self, source: int, target: int, count: int) -> None:
        """See `Session.copy`."""

    def release(self, slot: int) -> None:
        """See `Session.release`: there is nothing to forget."""

    def close(self) -> None:
        """See `Session.close`."""
        self.closed = True
