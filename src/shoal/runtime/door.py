"""What a frame must be before a stage acts on it: parsed is not yet plausible.

Whoever reaches a stage's port can send it frames of the right form, and so can a node with a fault.  A frame that names
impossible slots, carries other tensors than the shard takes, or asks for what no sampler can do is dropped at the door; inside,
nobody looks again.  Ids of a vocabulary that is not known are only checked for their sign.
"""

from collections.abc import Sequence

from shoal.errors import InvalidRequestError
from shoal.ids import RequestId
from shoal.runtime.effects import Tensors
from shoal.runtime.frames import BatchFrame, OpenedSequence
from shoal.runtime.grammar import MAX_GRAMMAR_CHARS
from shoal.runtime.request import Array
from shoal.runtime.sampling import check_sampling
from shoal.runtime.settings import StageSettings, TensorForm
from shoal.transport.codec import dtype_name

MAX_GAP = 1 << 20
"""So many steps in a row are not lost on a link whose windows are a few frames: a frame further ahead is not of this pipeline."""


def plausible(frame: BatchFrame, tensors: Tensors, settings: StageSettings) -> bool:
    """Whether a stage with *settings* can act on *frame* and the tensors beside it."""
    return (
        frame.plan_epoch == settings.plan_epoch
        and frame.step >= 0
        and (not (frame.opened or frame.closed) or _names_slots(frame, settings))
        and _rows_fit(frame, settings)
        and _carries(frame, tensors, settings)
    )


def _names_slots(frame: BatchFrame, settings: StageSettings) -> bool:
    named = [slot for s in frame.opened for slot in (s.slot, s.source)] + [s.slot for s in frame.closed]
    return (
        all(0 <= slot < settings.slots for slot in named)
        and len({s.slot for s in frame.opened}) == len(frame.opened)
        and all(_can_open(opened, settings) for opened in frame.opened)
    )


def _rows_fit(frame: BatchFrame, settings: StageSettings) -> bool:
    """Asked of every frame: one pass, no generators.

    A row is sampled for what is known, and one more behind each id that was guessed.
    """
    sequences, drafts = frame.sequences, frame.drafts
    if drafts and not _in_vocabulary([token for draft in drafts.values() for token in draft], settings):
        return False
    slots: set[int] = set()
    requests: set[RequestId] = set()
    for s in sequences:
        rows = s.start >= 0 and 0 <= s.logits <= s.count and s.count > 0
        if s.logits and s.logits != 1 + len(drafts.get(s.request, ())):
            return False
        if not rows or s.start + s.count > settings.context_tokens or not 0 <= s.slot < settings.slots:
            return False
        slots.add(s.slot)
        requests.add(s.request)
    return len(slots) == len(requests) == len(sequences)


def _can_open(opened: OpenedSequence, settings: StageSettings) -> bool:
    try:
        check_sampling(opened.sampling, settings.vocabulary)
    except InvalidRequestError:
        return False
    if not 0 <= opened.reuse < max(1, len(opened.prompt) + len(opened.resume)):
        return False
    too_long = opened.grammar is not None and len(opened.grammar.text) > MAX_GRAMMAR_CHARS
    if too_long or not 0 < len(opened.prompt) <= settings.context_tokens:
        return False
    return _in_vocabulary(opened.prompt, settings) and _in_vocabulary(opened.resume, settings)


def _in_vocabulary(ids: Sequence[int], settings: StageSettings) -> bool:
    return not ids or (min(ids) >= 0 and max(ids) < (settings.vocabulary or 1 << 31))


def _carries(frame: BatchFrame, tensors: Tensors, settings: StageSettings) -> bool:
    if frame.infer is not None:
        return not frame.sequences and all(
            form.name in tensors and dtype_name(tensors[form.name].dtype) == form.dtype for form in settings.takes
        )
    return not frame.sequences or _rows_carried(sum([s.count for s in frame.sequences]), tensors, settings.takes)


def _rows_carried(count: int, tensors: Tensors, takes: Sequence[TensorForm]) -> bool:
    """Asked of every frame, as above."""
    if not tensors or (takes and len(tensors) != len(takes)):
        return False
    for array in tensors.values():
        if array.shape[:2] != (1, count):
            return False
    for form in takes:
        found = tensors.get(form.name)
        if found is None or not _fits(found, form):
            return False
    return True


def _fits(array: Array, form: TensorForm) -> bool:
    if len(array.shape) != len(form.shape) or dtype_name(array.dtype) != form.dtype:
        return False
    # The first two dimensions are the batch of one and the rows, whatever the graph calls them.
    have, wanted = array.shape[2:], form.shape[2:]
    return have == wanted or all(w in (None, h) for h, w in zip(have, wanted, strict=True))
