"""Pipelines of null engines: they notice every scheduling mistake and cost no time."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest

from shoal.ids import DeploymentId, RequestId
from shoal.runtime.backend.null import NullBackend, null_shard
from shoal.runtime.backend.passing import PassingSession
from shoal.runtime.pipeline import LocalPipeline, LocalStage
from shoal.runtime.request import FinishReason, GenerateRequest, SamplingParams
from shoal.runtime.scheduler import SchedulerSettings
from shoal.runtime.settings import CREDITS, StageSettings

LAYERS = 6
VOCABULARY = 64


@pytest.fixture
def make_request() -> Callable[..., GenerateRequest]:
    """A request with a prompt of *prompt* ids (or that many made-up ones)."""

    def make(
        name: str,
        prompt: int | Sequence[int] = 5,
        max_tokens: int = 8,
        *,
        sampling: SamplingParams | None = None,
        **more: object,
    ) -> GenerateRequest:
        ids = (
            tuple((7 * i + len(name)) % VOCABULARY for i in range(prompt)) if isinstance(prompt, int) else tuple(prompt)
        )
        return GenerateRequest(
            request=RequestId(name),
            deployment=DeploymentId("m"),
            prompt=ids,
            max_tokens=max_tokens,
            sampling=sampling or SamplingParams(),
            **more,
        )

    return make


@pytest.fixture
def make_pipeline() -> Callable[..., LocalPipeline]:
    """*cuts* of six null layers into stages, for example (2, 4) for three; the rest are settings.

    A stage between two others that has no layer is a relay: (2, 2, 4) has one.
    """

    def make(
        cuts: Sequence[int] = (),
        *,
        slots: int = 2,
        context: int = 256,
        chunk: int = 128,
        in_flight: int = 4,
        queue: int = 64,
        frames_out: int = CREDITS,
        replays_exactly: bool = True,
        **timing: object,
    ) -> LocalPipeline:
        edges = [0, *cuts, LAYERS]
        stages = []
        for index, (begin, end) in enumerate(pairwise(edges)):
            vocabulary = VOCABULARY if index == len(cuts) else 0
            shard = null_shard(
                begin, end, embeds=index == 0, vocabulary=vocabulary, slots=slots, context_tokens=context
            )
            stage = StageSettings(
                plan_epoch=3,
                index=index,
                stages=len(edges) - 1,
                slots=slots,
                context_tokens=context,
                vocabulary=VOCABULARY,
                credits=frames_out,
                scheduler=SchedulerSettings(
                    in_flight=in_flight, chunk_rows=chunk, queue_limit=queue, replays_exactly=replays_exactly
                ),
            )
            relays = begin == end and 0 < index < len(cuts)
            stages.append(LocalStage(stage, PassingSession() if relays else NullBackend().load(shard)))
        return LocalPipeline(stages, **timing)

    return make


@pytest.fixture
def last_delta() -> Callable[[LocalPipeline, str], tuple[FinishReason | None, str]]:
    """How a request's answer ended so far: its last delta's finish and error code."""

    def find(pipeline: LocalPipeline, name: str) -> tuple[FinishReason | None, str]:
        delta = pipeline.deltas[RequestId(name)][-1]
        return delta.finish, delta.error_code

    return find
