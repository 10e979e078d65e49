"""A small linear programme: the most of several activities that shared capacities allow, and what each capacity is worth.

    maximise sum of x   subject to   rows x <= capacities,  x >= 0

All numbers are at least 0, so x = 0 is a start and the simplex method needs no first phase.  Bland's rule (the first column that
pays, the first row that binds) never runs in circles.  For some dozens of rows and columns; a dense table.
"""

from dataclasses import dataclass

import numpy as np

from shoal.plan.arrays import Floats

PAYS = 1e-10


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """`amounts` of the columns; `prices` of the rows are at least 0 and come to the same value."""

    value: float
    amounts: Floats
    prices: Floats


def pack(rows: Floats, capacities: Floats) -> Packing:
    """Solve it; *rows* is [R, C].  Raises ValueError when a column uses nothing, as there is then no most of it."""
    count, columns = rows.shape
    if columns and not (rows > 0).any(axis=0).all():
        raise ValueError(f"column {int(np.argmin((rows > 0).any(axis=0)))} uses no capacity")
    scale = rows.max(axis=0) if columns and count else np.ones(columns)  # amounts of like size
    table = np.zeros((count + 1, columns + count + 1))
    table[:count, :columns] = rows / scale
    table[:count, columns:-1] = np.eye(count)
    table[:count, -1] = capacities
    table[-1, :columns] = -1 / scale
    pays = PAYS * float((1 / scale).max(initial=0.0))
    basis = np.arange(columns, columns + count)
    while (table[-1, :-1] < -pays).any():
        column = int(np.argmax(table[-1, :-1] < -pays))
        _pivot(table, basis, column)
    amounts = np.zeros(columns + count)
    amounts[basis] = table[:-1, -1]
    return Packing(
        value=float(table[-1, -1]), amounts=amounts[:columns] / scale, prices=np.maximum(table[-1, columns:-1], 0.0)
    )


def _pivot(table: Floats, basis: np.ndarray[tuple[int], np.dtype[np.int64]], column: int) -> None:
    """Let *column* in, and out what it uses up first."""
    ways = table[:-1, column]
    ratios = np.full(ways.size, np.inf)
    uses = ways > PAYS
    ratios[uses] = np.maximum(table[:-1, -1][uses], 0.0) / ways[uses]  # rounding may leave a little less than nothing
    tied = np.flatnonzero(ratios <= ratios.min() * (1 + 1e-12))
    row = int(tied[np.argmin(basis[tied])])
    table[row] /= table[row, column]
    factors = table[:, column].copy()
    factors[row] = 0.0
    table -= np.outer(factors, table[row])
    basis[row] = column
