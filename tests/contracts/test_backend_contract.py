"""What every Backend keeps: run on the null engine and on ONNX Runtime, the latter with every kind of graph that it is fed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest

from shoal.errors import InvalidRequestError, ShoalError
from shoal.ids import DeploymentId, RequestId
from shoal.model.affine import Blocked, Format
from shoal.model.derive import derive
from shoal.model.frontier import blocks, shard
from shoal.model.lower import lower
from shoal.model.rope import Rope, inverse_frequencies
from shoal.model.transformer import TransformerConfig, build, matrix_shapes, vector_sizes
from shoal.runtime.backend.null import NullBackend, null_shard
from shoal.runtime.backend.onnx import OnnxBackend
from shoal.runtime.backend.onnx_session import OnnxSession
from shoal.runtime.backend.passing import PassingSession
from shoal.runtime.backend.throttled import Throttled
from shoal.runtime.pipeline import LocalPipeline, LocalStage
from shoal.runtime.ports import Backend, SequenceStep, Session, Shard
from shoal.runtime.request import Array, GenerateRequest, SamplingParams
from shoal.runtime.scheduler import SchedulerSettings
from shoal.runtime.settings import StageSettings

CONTEXT = 64
SLOTS = 6
VOCABULARY = 64
IDS = np.array([[(11 * i * i + 3) % VOCABULARY for i in range(24)]])
CONFIG = TransformerConfig(
    architecture="llama",
    layers=2,
    hidden=32,
    ffn=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocabulary=VOCABULARY,
    context_tokens=CONTEXT,
    norm_epsilon=1e-5,
    rope=Rope(base=10_000.0, dims=16),
)


@dataclass
class Rig:
    """An engine and a tiny model that it can cut anywhere: `load(start, stop)` of `parts`; `noise` between different row counts."""

    load: Callable[[int, int], Session]
    parts: int
    noise: float

    def whole(self) -> Session:
        return self.load(0, self.parts)


def weights(formats: dict[str, Format]) -> dict[str, Array]:
    """Random, but not so that everything drowns in the residual stream."""
    source = np.random.Generator(np.random.PCG64(7))  # noqa: TID251 - test data, the decisions under test draw nothing
    arrays: dict[str, Array] = {name: np.ones(size, np.float32) for name, size in vector_sizes(CONFIG).items()}
    arrays |= {name: inverse_frequencies(rope) for name, rope in CONFIG.rotations.items()}
    for name, (rows, columns) in matrix_shapes(CONFIG).items():
        match formats.get(name):
            case Blocked(block=block, scale=scale):
                arrays[f"{name}.q"] = source.integers(0, 256, (rows, columns // block, block // 2), dtype=np.uint8)
                arrays[f"{name}.d"] = source.uniform(0.02, 0.06, (rows, columns // block)).astype(scale)
            case _:
                arrays[name] = source.normal(0, 0.2, (rows, columns)).astype(np.float32)
    return arrays


def onnx_rig(folder: Path, backend: Backend, *, target: str | None, blocked: bool, mapped_every: int = 2) -> Rig:
    """*target* None runs the canonical graph as it is; one weight of *mapped_every* is mapped from a file."""
    form = Blocked(bits=4, block=32, zero_point=8, affine=False)
    formats: dict[str, Format] = {name: form for name in matrix_shapes(CONFIG) if blocked and "embd" not in name}
    graph = build(CONFIG, formats)
    stored = weights(formats)
    chain = blocks(graph)

    def mapped(name: str, array: Array) -> Array:
        path = folder / f"{name}.npy"
        np.save(path, array)
        return np.load(path, mmap_mode="r")

    def load(start: int, stop: int) -> Session:
        part = shard(graph, chain, start, stop)
        tensors = dict(stored)
        if target is not None:
            lowered = lower(part, target=target, context_tokens=CONTEXT)
            part = lowered.graph
            tensors |= {d.name: derive(d.op, [stored[i] for i in d.inputs]) for d in lowered.derived}
        wanted = {t.name for t in part.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
        given = {n: tensors[n] if i % mapped_every else mapped(n, tensors[n]) for i, n in enumerate(sorted(wanted))}
        return backend.load(Shard(graph=part, tensors=given, slots=SLOTS, context_tokens=CONTEXT, threads=1))

    return Rig(load, len(chain), noise=1e-4)


def null_rig() -> Rig:
    def load(start: int, stop: int) -> Session:
        vocabulary = VOCABULARY if stop == 4 else 0
        part = null_shard(start, stop, embeds=start == 0, vocabulary=vocabulary, slots=SLOTS, context_tokens=CONTEXT)
        return NullBackend().load(part)

    return Rig(load, 4, noise=0.0)


@pytest.fixture(params=["null", "lowered", "lowered-int8", "canonical", "throttled"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Rig:
    match request.param:
        case "null":
            return null_rig()
        case "lowered":
            return onnx_rig(tmp_path, OnnxBackend(), target="cpu-exact", blocked=False)
        case "lowered-int8":
            made = onnx_rig(tmp_path, OnnxBackend(), target="cpu", blocked=True)
            made.noise = 0.3  # activations are rounded to int8: a last-bit difference grows
            return made
        case "canonical":
            return onnx_rig(tmp_path, OnnxBackend(), target=None, blocked=True, mapped_every=1)
        case "throttled":
            return onnx_rig(tmp_path, Throttled(OnnxBackend(), slowdown=lambda: 1.5), target="cpu-exact", blocked=False)
        case other:
            raise AssertionError(other)


def rows(start: int, count: int, *, slot: int = 0, logits: int = 1, exact: bool = False) -> SequenceStep:
    request = RequestId(f"r{slot}")
    return SequenceStep(request=request, slot=slot, start=start, count=count, logits=logits, exact=exact)


def run(session: Session, *steps: SequenceStep, ids: np.ndarray = IDS) -> np.ndarray:
    """Logits of the wanted rows; each sequence has the same ids at the same positions."""
    given = np.concatenate([ids[:, s.start : s.start + s.count] for s in steps], axis=1)
    return session.step(steps, {"input_ids": given})["logits"]


def test_a_prompt_in_chunks_gives_what_the_whole_prompt_gives(rig: Rig) -> None:
    whole = run(rig.whole(), rows(0, 20))

    chunked = rig.whole()
    chunked.step([rows(0, 7, logits=0)], {"input_ids": IDS[:, :7]})
    chunked.step([rows(7, 8, logits=0)], {"input_ids": IDS[:, 7:15]})

    assert run(chunked, rows(15, 5)) == pytest.approx(whole, abs=rig.noise)


def test_a_chunk_whose_logits_nobody_wants_returns_none(rig: Rig) -> None:
    outputs = rig.whole().step([rows(0, 5, logits=0)], {"input_ids": IDS[:, :5]})

    assert "logits" not in outputs


def test_logits_of_several_last_rows_come_in_order(rig: Rig) -> None:
    together = run(rig.whole(), rows(0, 12, logits=3))
    single = [run(rig.whole(), rows(0, n))[0] for n in (10, 11, 12)]

    assert together.shape == (3, VOCABULARY)
    assert together == pytest.approx(np.stack(single), abs=rig.noise)


def test_going_back_forgets_what_was_behind(rig: Rig) -> None:
    straight = rig.whole()
    run(straight, rows(0, 10))
    expected = run(straight, rows(10, 1))

    wandering = rig.whole()
    run(wandering, rows(0, 10))
    run(wandering, rows(10, 6), ids=(IDS + 5) % VOCABULARY)
    back = run(wandering, rows(10, 1))

    assert np.array_equal(back, expected)


def test_two_slots_do_not_disturb_each_other(rig: Rig) -> None:
    alone = rig.whole()
    expected = [run(alone, rows(0, 6))] + [run(alone, rows(i, 1)) for i in range(6, 10)]

    shared = rig.whole()
    other = (IDS * 3 + 1) % VOCABULARY
    answers = [run(shared, rows(0, 6))]
    run(shared, rows(0, 9, slot=1), ids=other)
    for i in range(6, 10):
        answers.append(run(shared, rows(i, 1)))
        run(shared, rows(i + 3, 1, slot=1), ids=other)

    assert np.array_equal(answers, expected)


def test_several_sequences_in_one_step_get_what_each_would_get_alone(rig: Rig) -> None:
    session = rig.whole()
    run(session, rows(0, 4, slot=1))

    together = run(session, rows(0, 5), rows(4, 3, slot=1))

    alone = rig.whole()
    first = run(alone, rows(0, 5))
    run(alone, rows(0, 4, slot=1))
    assert np.array_equal(together, np.concatenate([first, run(alone, rows(4, 3, slot=1))]))


PROMPTS = (5, 3, 9, 1, 7, 2)
"""Lengths of what is in each slot before rows of answers come."""


def filled(rig: Rig, slots: Sequence[int]) -> Session:
    """A session whose *slots* hold the beginnings that `PROMPTS` says."""
    session = rig.whole()
    for slot in slots:
        run(session, rows(0, PROMPTS[slot], slot=slot))
    return session


@pytest.mark.parametrize(
    "order", [(0, 1), (5, 0, 3, 1, 2, 4), (0, 2, 3, 5), (1, 4), (4, 2)], ids=lambda order: "-".join(map(str, order))
)
def test_rows_of_several_answers_in_one_step_are_what_each_would_get_alone(rig: Rig, order: tuple[int, ...]) -> None:
    alone, together = filled(rig, range(SLOTS)), filled(rig, range(SLOTS))
    for ahead in range(4):
        steps = [rows(PROMPTS[slot] + ahead, 1, slot=slot, exact=True) for slot in order]
        expected = np.concatenate([run(alone, step) for step in steps])

        assert np.array_equal(run(together, *steps), expected)


def test_a_row_that_is_only_told_again_has_the_bits_that_it_had_among_others(rig: Rig) -> None:
    first, again = filled(rig, range(SLOTS)), filled(rig, range(SLOTS))
    following = [rows(PROMPTS[2] + ahead, 1, slot=2, exact=True) for ahead in range(2)]
    others = [rows(PROMPTS[slot], 1, slot=slot) for slot in (1, 3)]
    run(first, following[0], *others)
    run(again, rows(PROMPTS[2], 1, slot=2, logits=0, exact=True), *others)

    assert np.array_equal(run(first, following[1]), run(again, following[1]))


def test_rows_of_answers_disturb_no_slot_between_them(rig: Rig) -> None:
    quiet, busy = filled(rig, range(SLOTS)), filled(rig, range(SLOTS))
    for ahead in range(3):
        run(busy, *(rows(PROMPTS[slot] + ahead, 1, slot=slot) for slot in (0, 2, 4)))

    for slot in (1, 3, 5):
        assert np.array_equal(
            run(busy, rows(PROMPTS[slot], 2, slot=slot)), run(quiet, rows(PROMPTS[slot], 2, slot=slot))
        )


def test_a_slot_without_a_position_left_is_not_written_between_others(rig: Rig) -> None:
    session, alone = filled(rig, (0, 2)), filled(rig, (0, 2))
    long = np.resize(IDS, (1, CONTEXT))
    whole = run(session, rows(0, CONTEXT, slot=1), ids=long)
    run(session, *(rows(PROMPTS[slot], 1, slot=slot) for slot in (0, 2)))
    run(alone, rows(0, CONTEXT, slot=1), ids=long)

    again, expected = (run(s, rows(CONTEXT - 1, 1, slot=1), ids=long) for s in (session, alone))
    assert whole.shape == again.shape
    assert np.array_equal(again, expected)


def test_a_slot_that_a_step_fills_is_not_written_between_others(rig: Rig) -> None:
    session, alone = filled(rig, (0, 2)), filled(rig, (0, 2))
    long = np.resize(IDS, (1, CONTEXT))
    steps = [rows(PROMPTS[0], 1), rows(0, CONTEXT, slot=1), rows(PROMPTS[2], 1, slot=2)]

    together = run(session, *steps, ids=long)
    assert np.allclose(together, np.concatenate([run(alone, s, ids=long) for s in steps]), atol=rig.noise)


def test_rows_of_answers_and_chunks_of_prompts_share_a_step(rig: Rig) -> None:
    session, alone = filled(rig, (0, 1, 2)), filled(rig, (0, 1, 2))
    steps = [
        rows(PROMPTS[0], 1, slot=0, exact=True),
        rows(PROMPTS[1], 4, slot=1, logits=3),
        rows(PROMPTS[2], 1, slot=2, exact=True),
        rows(0, 6, slot=3, logits=0),
    ]
    together = run(session, *steps)

    parts = [alone.step([s], {"input_ids": IDS[:, s.start : s.start + s.count]}).get("logits") for s in steps]
    assert np.array_equal(together, np.concatenate([p for p in parts if p is not None]))


def test_a_copy_goes_on_as_what_it_was_copied_from(rig: Rig) -> None:
    session, alone = filled(rig, (0, 2)), filled(rig, (0,))
    run(session, rows(PROMPTS[0], 3))  # what follows is not copied
    session.copy(0, 2, PROMPTS[0])

    assert np.array_equal(run(session, rows(PROMPTS[0], 2, slot=2)), run(alone, rows(PROMPTS[0], 2)))
    with pytest.raises(InvalidRequestError):
        run(session, rows(PROMPTS[0] + 3, 1, slot=2))


def test_no_more_can_be_copied_than_is_there(rig: Rig) -> None:
    session = filled(rig, (0,))

    with pytest.raises(InvalidRequestError, match="slot 0"):
        session.copy(0, 1, PROMPTS[0] + 1)


def test_a_released_slot_starts_afresh(rig: Rig) -> None:
    session = rig.whole()
    expected = run(session, rows(0, 5))
    run(session, rows(5, 9))
    session.release(0)

    assert np.array_equal(run(session, rows(0, 5)), expected)


def test_a_released_slot_of_the_engine_gives_its_pages_back(tmp_path: Path) -> None:
    session = onnx_rig(tmp_path, OnnxBackend(), target="cpu-exact", blocked=False).whole()
    assert isinstance(session, OnnxSession)
    run(session, rows(0, 5))
    pages = session._pages
    assert pages is not None
    assert all(array.any() for array in pages.arrays.values())

    session.release(0)

    # A page that the system took back reads as zeros; one that we still hold, as what was in it.
    assert not any(array.any() for array in pages.arrays.values())


def test_rows_after_a_release_need_their_beginning_again(rig: Rig) -> None:
    session = rig.whole()
    run(session, rows(0, 5))
    session.release(0)

    with pytest.raises(InvalidRequestError, match="slot 0"):
        run(session, rows(5, 1))


def test_what_a_step_returned_stays_as_it_was(rig: Rig) -> None:
    session = rig.whole()

    first = run(session, rows(0, 1))
    kept = first.copy()
    run(session, rows(1, 1))

    np.testing.assert_array_equal(first, kept)


def test_positions_beyond_the_context_are_refused(rig: Rig) -> None:
    with pytest.raises(InvalidRequestError, match="64"):
        rig.whole().step([rows(0, 65)], {"input_ids": np.zeros((1, 65), np.int64)})


def test_shards_compute_what_the_whole_computes_bit_for_bit(rig: Rig) -> None:
    steps = [rows(0, 9, logits=0), rows(9, 6), rows(15, 1), rows(16, 1)]
    whole = rig.whole()
    expected = [whole.step([s], {"input_ids": IDS[:, s.start : s.start + s.count]}) for s in steps]
    middle = range(1, rig.parts)

    for edges in [[0, cut, rig.parts] for cut in middle] + [[0, *middle, rig.parts]]:
        chain = [rig.load(start, stop) for start, stop in pairwise(edges)]
        for step, wanted in zip(steps, expected, strict=True):
            tensors: dict[str, Array] = {"input_ids": IDS[:, step.start : step.start + step.count]}
            for session in chain:
                tensors = session.step([step], tensors)
            assert tensors.keys() == wanted.keys()
            assert all(np.array_equal(tensors[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9, seed=5)], ids=["greedy", "seeded"]
)
def test_a_pipeline_of_shards_answers_token_for_token_like_the_whole(rig: Rig, sampling: SamplingParams) -> None:
    def answers(edges: list[int]) -> list[list[int]]:
        stages = []
        for index, (start, stop) in enumerate(pairwise(edges)):
            settings = StageSettings(
                plan_epoch=1,
                index=index,
                stages=len(edges) - 1,
                slots=SLOTS,
                context_tokens=CONTEXT,
                scheduler=SchedulerSettings(chunk_rows=6),
            )
            stages.append(LocalStage(settings, rig.load(start, stop)))
        pipeline = LocalPipeline(stages)
        requests = [
            GenerateRequest(
                request=RequestId(name), deployment=DeploymentId("m"), prompt=prompt, max_tokens=9, sampling=sampling
            )
            for name, prompt in (("a", tuple(IDS[0, :15].tolist())), ("b", tuple(IDS[0, 3:7].tolist())), ("c", (1,)))
        ]
        for request in requests:
            pipeline.submit(request)
        pipeline.run()
        return [pipeline.tokens(request.request) for request in requests]

    whole = answers([0, rig.parts])

    assert [len(tokens) for tokens in whole] == [9, 9, 9]
    assert answers([0, 1, rig.parts]) == answers([0, rig.parts // 2, rig.parts - 1, rig.parts]) == whole


def test_a_relay_between_two_shards_changes_no_bit(rig: Rig) -> None:
    step = rows(0, 9, logits=2)
    cut = rig.parts // 2
    chains = [[rig.load(0, cut), *relays, rig.load(cut, rig.parts)] for relays in ([], [PassingSession()])]

    direct, relayed = [through(chain, step) for chain in chains]

    assert direct.keys() == relayed.keys() == {"logits"}
    assert np.array_equal(direct["logits"], relayed["logits"])


def through(chain: Sequence[Session], step: SequenceStep) -> dict[str, Array]:
    tensors: dict[str, Array] = {"input_ids": IDS[:, step.start : step.start + step.count]}
    for session in chain:
        tensors = session.step([step], tensors)
    return tensors


def test_a_closed_session_refuses_to_work_and_closes_again(rig: Rig) -> None:
    for session in (rig.whole(), PassingSession()):
        session.close()
        session.close()

        with pytest.raises(ShoalError, match="closed"):
            run(session, rows(0, 3))


def test_releasing_a_slot_that_holds_nothing_is_harmless(rig: Rig) -> None:
    PassingSession().release(1)
    session = rig.whole()
    session.release(1)
    session.release(99)

    assert run(session, rows(0, 3)).shape == (1, VOCABULARY)
