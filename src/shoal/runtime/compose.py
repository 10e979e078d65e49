"""Rows of sequences as a frame: which ids they are, and whom the other stages hear of for the first time."""

from collections.abc import Mapping
from typing import NamedTuple

import msgspec
import numpy as np

from shoal.ids import RequestId
from shoal.model.spec import INPUT_IDS
from shoal.runtime.effects import Tensors
from shoal.runtime.frames import BatchFrame, OpenedSequence
from shoal.runtime.ports import SequenceStep
from shoal.runtime.prefix import Reuse
from shoal.runtime.sequence import LiveSequence
from shoal.runtime.settings import StageSettings
from shoal.runtime.speculate.speculator import Drafts


class Load(NamedTuple):
    """What a step is to carry; *reuse* is what its newcomer begins behind."""

    step: int
    batch: tuple[SequenceStep, ...]
    drafts: Drafts
    reuse: Reuse | None


def compose(settings: StageSettings, load: Load, live: Mapping[RequestId, LiveSequence]) -> tuple[BatchFrame, Tensors]:
    """The frame of *load* and its `input_ids [1, T]`; the sequences have been handed to the pipeline from now on."""
    ids: list[int] = []
    opened: list[OpenedSequence] = []
    for rows in load.batch:
        sequence = live[rows.request]
        draft = load.drafts.get(rows.request, ())
        ids += (*sequence.ids(rows.start, rows.count - len(draft)), *draft)
        if not sequence.opened:
            opened.append(_opened(sequence, load.reuse))
        sequence.opened, sequence.scheduled, sequence.last_step = True, rows.start + rows.count, load.step
    frame = BatchFrame(
        plan_epoch=settings.plan_epoch, run=settings.run, step=load.step, sequences=load.batch, opened=tuple(opened),
        drafts=dict(load.drafts),
    )  # fmt: skip
    return frame, {INPUT_IDS: np.array([ids], np.int64)}


def _opened(sequence: LiveSequence, reuse: Reuse | None) -> OpenedSequence:
    request = sequence.request
    opened = OpenedSequence(
        request=request.request,
        slot=sequence.slot,
        prompt=request.prompt,
        sampling=request.sampling,
        grammar=request.grammar,
        resume=request.resume,
    )
    if reuse is None:
        return opened
    return msgspec.structs.replace(opened, reuse=reuse.count, source=reuse.source, of=reuse.request)
