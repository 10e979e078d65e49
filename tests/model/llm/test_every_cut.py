"""The law of cutting (ADR 1): two shards one after another give the bits of the whole model, wherever the cut is.

All cuts of every recorded architecture, with a prefill and two decode steps.  SmolLM2, as it is served, is in
tests/node/test_cuts_as_served.py.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from shoal.model.derive import derive
from shoal.model.frontier import Block, blocks, shard
from shoal.model.hf import import_hf
from shoal.model.lower import Lowered, lower
from shoal.model.spec import ImportedModel

Logits = Callable[..., np.ndarray]
STEPS = (6, 1, 1)
CASES = ("llama", "llama3-rope", "llama-linear-rope", "mistral", "qwen2", "qwen3", "gemma3")


class Pieces:
    """Shards of one model, lowered, with the arrays that lowering derives made once."""

    def __init__(self, model: ImportedModel) -> None:
        self.model = model
        self.chain: Sequence[Block] = blocks(model.graph)
        self.array = cache(lambda name: model.tensors[name]())
        self.derived = cache(lambda d: derive(d.op, [self.array(name) for name in d.inputs]))

    def whole(self) -> ImportedModel:
        return self._joined(lower(self.model.graph))

    def cut(self, *cuts: int) -> list[ImportedModel]:
        edges = (0, *cuts, len(self.chain))
        return [self._joined(lower(shard(self.model.graph, self.chain, a, b))) for a, b in pairwise(edges)]

    def _joined(self, lowered: Lowered) -> ImportedModel:
        stored = {name: lambda name=name: self.array(name) for name in self.model.tensors}
        made = {d.name: lambda d=d: self.derived(d) for d in lowered.derived}
        return dataclasses.replace(self.model, graph=lowered.graph, tensors=stored | made)


@pytest.mark.parametrize("case", CASES)
def test_every_single_cut_and_all_at_once_change_no_bit(case: str, golden: Path, run_chain: Logits) -> None:
    pieces = Pieces(import_hf(golden / case, name=case, quantise="int8"))
    ids = np.load(golden / case / "reference.npz")["ids"][: sum(STEPS)]
    inner = range(1, len(pieces.chain))

    whole = run_chain([pieces.whole()], ids, STEPS)

    assert len(inner) >= 5
    for cuts in [*((cut,) for cut in inner), tuple(inner)]:
        np.testing.assert_array_equal(run_chain(pieces.cut(*cuts), ids, STEPS), whole, err_msg=f"cuts {cuts}")
