"""What the paper prints (arXiv 2405.14371, table of results), by model and method.

Tags: V, read in a published text of the paper; U, from notes on it, still to be confirmed against its table.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Printed(NamedTuple):
    """A figure; None: out of memory."""

    value: float | None
    tag: str


def _row(solo: Printed, even: Printed, opt: Printed, theirs: Printed) -> Mapping[str, Printed]:
    names = ("Edge-Solo", "Cloud-Edge-Even", "Cloud-Edge-Opt", "EdgeShard")
    return MappingProxyType(dict(zip(names, (solo, even, opt, theirs), strict=True)))


_OOM, _OOM_V = Printed(None, "U"), Printed(None, "V")

LATENCY_MS: Mapping[str, Mapping[str, Printed]] = MappingProxyType(
    {
        "7b": _row(Printed(140.34, "U"), Printed(227.35, "U"), Printed(140.34, "U"), Printed(75.88, "V")),
        "13b": _row(_OOM, Printed(319.44, "U"), Printed(243.45, "U"), Printed(173.43, "U")),
        "70b": _row(_OOM_V, _OOM_V, _OOM_V, Printed(3086.0, "V")),
    }
)

TOKENS_PER_S: Mapping[str, Mapping[str, Printed]] = MappingProxyType(
    {
        "7b": _row(Printed(24.36, "U"), Printed(7.56, "U"), Printed(24.36, "U"), Printed(52.45, "V")),
        "13b": _row(_OOM, Printed(4.68, "U"), Printed(4.74, "U"), Printed(10.45, "U")),
        "70b": _row(_OOM_V, _OOM_V, _OOM_V, Printed(1.25, "V")),
    }
)
