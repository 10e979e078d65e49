"""What passes between stages is written as the settings say."""

from queue import SimpleQueue

import pytest
from structlog.typing import FilteringBoundLogger
from tests.node.test_stage_loop import FLEET, M, asked, stages_of, tokens, use

from shoal.node.pipeline import Pipeline
from shoal.runtime.executor.staged import StagedExecutor
from shoal.transport.codec import Codec
from shoal.transport.keys import FrameTopic, key_of
from shoal.transport.memory import MemoryFabric


@pytest.mark.parametrize(("codec", "least", "most"), [(Codec.FP16, 0.4, 0.6), (Codec.INT8, 0.2, 0.6)])
def test_activations_are_written_as_small_as_the_settings_say(
    log: FilteringBoundLogger, codec: Codec, least: float, most: float
) -> None:
    sizes: dict[Codec, int] = {}
    for used in (Codec.RAW, codec):
        fabric, heard = MemoryFabric(), SimpleQueue[bytes]()
        with stages_of(2, fabric.attach, log, activations=used) as stages:
            frames_of = key_of(FrameTopic(fleet=FLEET, deployment=M, plan_epoch=1, stage=1))
            stages.outside.subscribe(frames_of, lambda sample, heard=heard: heard.put(bytes(sample.payload)))  # type: ignore[misc]

            async def then(executor: StagedExecutor, _: Pipeline) -> None:
                assert len(await tokens(executor, asked("a", prompt=100, max_tokens=2))) == 2

            use(fabric.attach, log, stages, then)
        sizes[used] = max(len(heard.get()) for _ in range(heard.qsize()))

    assert least < sizes[codec] / sizes[Codec.RAW] < most
