"""A draft model in ONNX Runtime beside a pipeline in ONNX Runtime: pairs of tiny models with random weights."""

from collections.abc import Callable
from itertools import pairwise

import msgspec
import numpy as np
import onnx
import pytest

from shoal.ids import RequestId
from shoal.model.derive import derive
from shoal.model.frontier import blocks, shard
from shoal.model.lower import lower
from shoal.model.rope import Rope, inverse_frequencies
from shoal.model.transformer import TransformerConfig, build, matrix_shapes, vector_sizes
from shoal.runtime.backend.onnx import OnnxBackend
from shoal.runtime.pipeline import LocalPipeline, LocalStage
from shoal.runtime.ports import Session, Shard
from shoal.runtime.request import Array, GenerateRequest, SamplingParams
from shoal.runtime.settings import StageSettings
from shoal.runtime.speculate.draft_model import go_on
from shoal.runtime.speculate.speculator import OFF, Speculation

Requests = Callable[..., GenerateRequest]
CONTEXT, SLOTS, VOCABULARY, MOST = 64, 2, 64, 4
CONFIG = TransformerConfig(
    architecture="llama", layers=2, hidden=32, ffn=64, heads=4, kv_heads=2, head_dim=16, vocabulary=VOCABULARY,
    context_tokens=CONTEXT, norm_epsilon=1e-5, rope=Rope(base=10_000.0, dims=16),
)  # fmt: skip


def weights(seed: int) -> dict[str, Array]:
    source = np.random.Generator(np.random.PCG64(seed))  # noqa: TID251 - test data
    arrays: dict[str, Array] = {name: np.ones(size, np.float32) for name, size in vector_sizes(CONFIG).items()}
    arrays |= {name: inverse_frequencies(rope) for name, rope in CONFIG.rotations.items()}
    shapes = matrix_shapes(CONFIG).items()
    return arrays | {name: source.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes}


def sessions(seed: int, stages: int) -> list[Session]:
    """The model of *seed* in so many pieces."""
    graph, stored = build(CONFIG, {}), weights(seed)
    chain = blocks(graph)
    loaded: list[Session] = []
    for start, stop in pairwise(len(chain) * n // stages for n in range(stages + 1)):
        lowered = lower(shard(graph, chain, start, stop), context_tokens=CONTEXT)
        tensors = stored | {d.name: derive(d.op, [stored[i] for i in d.inputs]) for d in lowered.derived}
        initializers = lowered.graph.graph.initializer
        wanted = {t.name for t in initializers if t.data_location == onnx.TensorProto.EXTERNAL}
        given = {name: tensors[name] for name in wanted}
        piece = Shard(graph=lowered.graph, tensors=given, slots=SLOTS, context_tokens=CONTEXT, threads=1)
        loaded.append(OnnxBackend().load(piece))
    return loaded


def pipeline(speculation: Speculation, draft_seed: int = 0) -> LocalPipeline:
    """The model of seed 7 in two stages, with a draft model where *draft_seed* names one."""
    settings = StageSettings(
        plan_epoch=1, index=0, stages=2, slots=SLOTS, context_tokens=CONTEXT, vocabulary=VOCABULARY,
        speculation=speculation, draft_tokens=CONTEXT if draft_seed else 0,
    )  # fmt: skip
    stages = [
        LocalStage(msgspec.structs.replace(settings, index=index), session)
        for index, session in enumerate(sessions(7, 2))
    ]
    draft = sessions(draft_seed or 7, 1)[0]
    return LocalPipeline(stages, hop_s=lambda *_: 0.01, foretell=lambda ask: go_on(draft, ask))


def laps(made: LocalPipeline) -> int:
    return sum(bool(delta.tokens) for delta in made.deltas[RequestId("a")])


@pytest.mark.parametrize(("draft_seed", "fewer"), [(7, True), (8, False)], ids=["itself", "another"])
def test_a_draft_model_changes_the_number_of_laps_and_no_token(
    make_request: Requests, draft_seed: int, fewer: bool
) -> None:
    request = make_request("a", prompt=9, max_tokens=40)
    plain = pipeline(OFF)
    looked_up = pipeline(Speculation(most=MOST, adaptive=False))
    drafted = pipeline(Speculation(most=MOST, adaptive=False), draft_seed)
    answer = plain.generate(request)

    assert looked_up.generate(request) == answer
    assert drafted.generate(request) == answer
    assert (laps(drafted) < laps(looked_up)) is fewer
    assert laps(drafted) <= laps(plain) == 40


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_guessed_rows_keep_log_probabilities_and_stop_tokens(make_request: Requests, temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature, seed=3, logprobs=2, repetition_penalty=1.05)
    free = pipeline(OFF).generate(make_request("a", prompt=9, max_tokens=40, sampling=sampling))
    stop = next(token for token in free[12:] if free.index(token) >= 12)
    request = make_request("a", prompt=9, max_tokens=40, sampling=sampling, stop_token_ids=(stop,))
    made = [pipeline(OFF), pipeline(Speculation(most=MOST, adaptive=False), 7)]
    for each in made:
        each.generate(request)
    plain, guessed = ([token for d in each.deltas[RequestId("a")] for token in d.tokens] for each in made)

    assert [t.token for t in guessed] == [t.token for t in plain] == free[: free.index(stop)]
    assert [t.position for t in guessed] == [t.position for t in plain]
    assert [t.logprob for t in guessed] == pytest.approx([t.logprob for t in plain], abs=1e-4)
    assert [[one.token for one in t.top] for t in guessed] == [[one.token for one in t.top] for t in plain]
