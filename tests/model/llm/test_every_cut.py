"""The law of cutting (ADR 1): two shards one after another give the bits of the whole model, wherever the cut is.

All cuts of every recorded architecture, with a prefill and two decode steps.  SmolLM2: every block by itself, a cut in each
kind of place, and, with SHOAL_TEST_ALL_CUTS=1, every one of its 61 cuts.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from shoal.model.derive import derive
from shoal.model.frontier import Block, blocks, shard
from shoal.model.gguf import import_gguf
from shoal.model.hf import import_hf
from shoal.model.lower import Lowered, lower
from shoal.model.spec import ImportedModel

Logits = Callable[..., np.ndarray]
STEPS = (6, 1, 1)
CASES = ("llama", "llama3-rope", "llama-linear-rope", "mistral", "qwen2", "qwen3", "gemma3")
SMOLLM2_CUTS = range(1, 62)
SOME_CUTS = (1, 2, 31, 60, 61)
"""Behind the embedding, within a layer, in the middle, before the last block, before the head."""
ALL = bool(os.environ.get("SHOAL_TEST_ALL_CUTS"))


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


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Pieces:
    return Pieces(import_gguf(smollm2_gguf, name="smollm2"))


@pytest.fixture(scope="module")
def smollm2_ids(golden: Path) -> np.ndarray:
    return np.load(golden / "smollm2" / "reference.npz")["ids"][: sum(STEPS)]


@pytest.fixture(scope="module")
def smollm2_logits(smollm2: Pieces, smollm2_ids: np.ndarray, run_chain: Logits) -> np.ndarray:
    return run_chain([smollm2.whole()], smollm2_ids, STEPS)


def test_smollm2_in_blocks_of_one_gives_the_bits_of_the_whole(
    smollm2: Pieces, smollm2_ids: np.ndarray, smollm2_logits: np.ndarray, run_chain: Logits
) -> None:
    assert len(smollm2.chain) == SMOLLM2_CUTS.stop

    np.testing.assert_array_equal(run_chain(smollm2.cut(*SMOLLM2_CUTS), smollm2_ids, STEPS), smollm2_logits)


@pytest.mark.parametrize("cut", SMOLLM2_CUTS if ALL else SOME_CUTS)
def test_smollm2_cut_once_gives_the_bits_of_the_whole(
    cut: int, smollm2: Pieces, smollm2_ids: np.ndarray, smollm2_logits: np.ndarray, run_chain: Logits
) -> None:
    np.testing.assert_array_equal(run_chain(smollm2.cut(cut), smollm2_ids, STEPS), smollm2_logits)
