"""Which tensors and rows of a frame go on: what the next stage needs, without the rows of sequences that failed here."""

from collections.abc import Sequence

import msgspec
import numpy as np

from shoal.errors import ShardLostError
from shoal.model.spec import LOGITS
from shoal.runtime.edge import Work
from shoal.runtime.effects import Tensors
from shoal.runtime.frames import BatchFrame, Failure
from shoal.runtime.ports import SequenceStep
from shoal.runtime.request import Array
from shoal.runtime.settings import StageSettings
from shoal.runtime.slots import SlotTable


def missing(settings: StageSettings, frame: BatchFrame, inputs: Tensors, outputs: Tensors) -> str:
    """What the next step needs and neither came nor was made."""
    if not (frame.sequences or frame.infer):
        return ""
    wanted = settings.sends if not settings.is_last else (LOGITS,) if any(s.logits for s in frame.sequences) else ()
    return ", ".join([name for name in wanted if name not in outputs and name not in inputs])


def outgoing(settings: StageSettings, frame: BatchFrame, inputs: Tensors, outputs: Tensors) -> Tensors:
    """What is sent to the next stage: made here, or passed on as it came."""
    if not settings.sends or not (frame.sequences or frame.infer):
        return outputs
    return {name: outputs[name] if name in outputs else inputs[name] for name in settings.sends}


def without_gaps(slots: SlotTable, frame: BatchFrame, tensors: Tensors) -> Work:
    """Fail the sequences whose earlier rows are not here, and take their rows out of the tensors."""
    kept = tuple([s for s in frame.sequences if slots.covers(s.slot, s.request, s.start)])
    if len(kept) == len(frame.sequences):
        return frame, tensors
    return _without(frame, tensors, kept, "earlier rows of this sequence never reached a stage")


def without_garbage(frame: BatchFrame, tensors: Tensors, index: int) -> Work:
    """Fail the sequences for which the stage before sent what no engine that works computes."""
    floats = [array for array in tensors.values() if array.dtype.kind == "f"]
    if not frame.sequences or all(np.isfinite(array).all() for array in floats):
        return frame, tensors
    stops = np.cumsum([s.count for s in frame.sequences]).tolist()
    bad = [s for s, stop in zip(frame.sequences, stops, strict=True) if _strange(floats, stop - s.count, stop)]
    kept = tuple([s for s in frame.sequences if s not in bad])
    return _without(frame, tensors, kept, f"stage {index - 1} sent numbers that are not finite")


def _strange(floats: Sequence[Array], start: int, stop: int) -> bool:
    return any(not np.isfinite(a[:, start:stop] if a.ndim > 1 else a).all() for a in floats)


def _without(frame: BatchFrame, tensors: Tensors, kept: tuple[SequenceStep, ...], text: str) -> Work:
    lost = [s for s in frame.sequences if s not in kept]
    failed = tuple(Failure(request=s.request, code=ShardLostError.code, text=text) for s in lost)
    rest = {name: _rows_of(array, frame.sequences, kept) for name, array in tensors.items()} if kept else {}
    return msgspec.structs.replace(frame, sequences=kept, failed=frame.failed + failed), rest


def _rows_of(array: Array, sequences: tuple[SequenceStep, ...], kept: tuple[SequenceStep, ...]) -> Array:
    """The rows of *kept* among those of *sequences*, on axis 1."""
    mask = np.concatenate([np.full(s.count, s in kept) for s in sequences])
    return array[:, mask] if array.ndim > 1 and array.shape[1] == mask.size else array
