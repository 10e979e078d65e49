"""The law of cutting (ADR 1) where it counts: real models, pulled, cut, lowered and run as a worker runs them.

What Shoal lowers itself (SmolLM2, MiniLM in fp32) must not change a bit, wherever it is cut.  Other graphs get all of the
engine's fusions, and which of them it finds depends on the cut:

- A cut between a convolution and an addition that the engine would make one kernel keeps them apart: the sum is rounded once
  more.  All cuts of the OCR models that change a bit are of this sort; with Conv + Add fusion off (NchwcTransformer,
  ConvAddActivationFusion) none does.
- Some fusions need shapes.  A shard is told those of its boundary and the engine infers what it can of the rest, so that
  behind a cut it fuses what it leaves apart in the whole model.  In MiniLM int8 this is SkipLayerNormalization, once per cut
  between an attention and its feed-forward part; with SkipLayerNormFusion off no cut changes a bit.  Nothing is quantised on
  the way: the int8 weights are made fp32 when the model is loaded, and all products are in fp32.

The error of a rounding is relative to the terms of a sum, which may nearly cancel, and the engine's sigmoid has steps of 6e-8
above 0.  Hence rtol 1e-4 plus 1e-6 of the largest value as atol: 5.6e-6 for MiniLM int8, where cuts need up to 1.4e-6 on a
padded batch; 1e-6 for probabilities, where they need up to 2.1e-7 (ONNX Runtime 1.31, AVX-512).  What is read out of the numbers
(text, pixels of text, neighbours) must be equal.

Both ends, two seeded cuts, three seeded sets of cuts, and every block by itself; with SHOAL_TEST_ALL_CUTS=1 every single cut
and twenty sets.
"""

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from shoal.ids import Digest, RequestId
from shoal.node.artifacts import Artifact, load_shard, open_artifact
from shoal.runtime.backend.onnx import OnnxBackend
from shoal.runtime.ports import SequenceStep
from shoal.runtime.request import Array
from shoal.store.home import Store

ALL = bool(os.environ.get("SHOAL_TEST_ALL_CUTS"))
RTOL = 1e-4
ATOL_OF_LARGEST = 1e-6
CONTEXT = 16
WORD = "SHOAL"
GLYPHS = {
    "S": (".####", "#....", "#....", ".###.", "....#", "....#", "####."),
    "H": ("#...#", "#...#", "#...#", "#####", "#...#", "#...#", "#...#"),
    "O": (".###.", "#...#", "#...#", "#...#", "#...#", "#...#", ".###."),
    "A": (".###.", "#...#", "#...#", "#####", "#...#", "#...#", "#...#"),
    "L": ("#....", "#....", "#....", "#....", "#....", "#....", "#####"),
}
Step = tuple[Sequence[SequenceStep], Mapping[str, Array]]
Fixture = Callable[[str], Any]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a model is asked, how its numbers are read, and whether that is the right answer.  `exact`: to the last bit."""

    file: Path
    steps: Sequence[Step]
    read: Callable[[Array], Any]
    right: Callable[[Any], bool]
    exact: bool = False


def picture(size: tuple[int, int], dots: int) -> Array:
    """WORD in black (0) on white (1), each point of its glyphs *dots* wide, behind a margin of 20 and halfway down."""
    rows = [".".join(GLYPHS[letter][row] for letter in WORD) for row in range(7)]
    ink = np.kron(np.array([[point == "#" for point in row] for row in rows]), np.ones((dots, dots)))
    paper = np.ones(size, np.float32)
    top = (size[0] - ink.shape[0]) // 2
    paper[top : top + ink.shape[0], 20 : 20 + ink.shape[1]] -= ink
    return paper


def reading_of(model: Path) -> dict[str, Any]:
    """How the model's own description wants its numbers read."""
    text = (model.parent / "inference.yml").read_text(encoding="utf-8")
    return yaml.load(text, yaml.CSafeLoader)["PostProcess"]


def recogniser(fixture: Fixture, size: str) -> Question:
    """Greedy CTC over its dictionary: class 0 is the blank, the one behind the last character a space."""
    file = fixture("ocr_folder") / size / "rec" / "rec.onnx"
    characters = ["", *reading_of(file)["character_dict"], " "]
    x = np.repeat(2 * picture((48, 160), 4)[None, None] - 1, 3, axis=1)
    return Question(
        file=file,
        steps=[((), {"x": x})],
        read=lambda scores: "".join(characters[best] for best, _ in groupby(scores[0].argmax(-1))),
        right=lambda text: text == WORD,
    )


def detector(fixture: Fixture, size: str) -> Question:
    """The pixels that belong to text; they lie where the word is."""
    file = fixture("ocr_folder") / size / "det" / "det.onnx"
    threshold = reading_of(file)["thresh"]
    paper = picture((96, 160), 3)
    x = np.stack([(paper - mean) / std for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))])
    return Question(
        file=file,
        steps=[((), {"x": x[None].astype(np.float32)})],
        read=lambda scores: scores[0, 0] > threshold,
        right=lambda text: text.sum() == text[30:66, 12:116].sum() > 500,
    )


def encoder(fixture: Fixture, model: str, *, exact: bool) -> Question:
    """For each of the recorded sentences (a padded batch) the others, nearest first; the nearest is the recorded one."""
    recorded = np.load(fixture("golden") / "minilm" / "reference.npz")
    mask = recorded["mask"]

    def neighbours(embeddings: Array) -> list[list[int]]:
        unit = embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)
        return (-(unit @ unit.T)).argsort().tolist()

    feeds = {"input_ids": recorded["ids"], "attention_mask": mask, "token_type_ids": recorded["types"]}
    return Question(
        file=fixture(model),
        steps=[((), feeds)],
        read=lambda vectors: neighbours((vectors * mask[..., None]).sum(1)),
        right=lambda order: [row[1] for row in order] == [row[1] for row in neighbours(recorded["embeddings"])],
        exact=exact,
    )


def language_model(fixture: Fixture) -> Question:
    """The likeliest token at each position of a prefill and two decode steps, as it was recorded."""
    recorded = np.load(fixture("golden") / "smollm2" / "reference.npz")
    ids = recorded["ids"][None, :12]

    def step(start: int, stop: int) -> Step:
        count = stop - start
        rows = SequenceStep(request=RequestId("r"), slot=0, start=start, count=count, logits=count)
        return (rows,), {"input_ids": ids[:, start:stop]}

    return Question(
        file=fixture("smollm2_gguf"),
        steps=[step(0, 10), step(10, 11), step(11, 12)],
        read=lambda logits: logits.argmax(-1).tolist(),
        right=lambda tokens: tokens == recorded["top_tokens"][:12, 0].tolist(),
        exact=True,
    )


QUESTIONS: dict[str, Callable[[Fixture], Question]] = {
    "smollm2": language_model,
    "minilm-fp32": lambda fixture: encoder(fixture, "minilm_folder", exact=True),
    "minilm-int8": lambda fixture: encoder(fixture, "minilm_int8", exact=False),
    "recogniser-tiny": lambda fixture: recogniser(fixture, "tiny"),
    "recogniser-small": lambda fixture: recogniser(fixture, "small"),
    "detector-tiny": lambda fixture: detector(fixture, "tiny"),
    "detector-small": lambda fixture: detector(fixture, "small"),
}


@pytest.fixture(params=QUESTIONS)
def question(request: pytest.FixtureRequest) -> Question:
    return QUESTIONS[request.param](request.getfixturevalue)


def some_cuts(blocks: int, seed: str) -> list[tuple[int, ...]]:
    """Single cuts, sets of two to six, and all at once; see the module's docstring."""
    inner = range(1, blocks)
    draw = random.Random(seed)
    single = inner if ALL else sorted({inner[0], inner[-1], *draw.sample(inner, 2)})
    several = [sorted(draw.sample(inner, draw.randint(2, 6))) for _ in range(20 if ALL else 3)]
    return [*((cut,) for cut in single), *map(tuple, several), tuple(inner)]


def answer(store: Store, artifact: Artifact, cuts: Sequence[int], steps: Sequence[Step]) -> Array:
    """What the last shard gives at all of *steps*; each gets what the one before it gave, and nothing else."""
    spans = pairwise((0, *cuts, len(artifact.blocks)))
    shards = (load_shard(store, artifact, span, slots=1, context_tokens=CONTEXT, threads=1) for span in spans)
    sessions = [OnnxBackend().load(shard) for shard in shards]
    rows = []
    for sequences, tensors in steps:
        for session in sessions:
            tensors = session.step(sequences, tensors)
        (array,) = tensors.values()
        rows.append(array)
    return np.concatenate(rows)


def test_shards_in_the_serving_engine_give_what_the_whole_model_gives(
    question: Question, pulled: Callable[[Path], tuple[Store, Digest]], request: pytest.FixtureRequest
) -> None:
    store, digest = pulled(question.file)
    artifact = open_artifact(store, digest)
    whole = answer(store, artifact, (), question.steps)
    expected = question.read(whole)
    rtol, atol = (0, 0) if question.exact else (RTOL, ATOL_OF_LARGEST * float(np.abs(whole).max()))

    assert question.right(expected)
    for cuts in some_cuts(len(artifact.blocks), request.node.callspec.id):
        found = answer(store, artifact, cuts, question.steps)
        np.testing.assert_allclose(found, whole, rtol=rtol, atol=atol, err_msg=f"cuts {cuts}")
        np.testing.assert_array_equal(question.read(found), expected, err_msg=f"cuts {cuts}")
