"""Which orders are given now: each missing one at once, and again only after a while, for an answer takes its time."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

from shoal.fleet.reconcile import Addressed
from shoal.ids import NodeId

AGAIN_AFTER_S = 0.5
_KEPT, _KEPT_AT_MOST = 500, 1000


@dataclass(slots=True)
class Ordering:
    """When each order may be given again."""

    _not_before_s: dict[tuple[NodeId, str], float] = field(default_factory=dict)

    def due(self, missing: Iterable[Addressed], now_s: float) -> list[Addressed]:
        """Those of *missing* that were not given a moment ago; they count as given."""
        given = []
        for addressed in missing:
            key = (addressed.node, f"{type(addressed.order).__name__} {addressed.order.shard}")
            if now_s >= self._not_before_s.get(key, 0.0):
                self._not_before_s[key] = now_s + AGAIN_AFTER_S
                given.append(addressed)
        if len(self._not_before_s) > _KEPT_AT_MOST:
            self._not_before_s = dict(heapq.nlargest(_KEPT, self._not_before_s.items(), key=lambda item: item[1]))
        return given
