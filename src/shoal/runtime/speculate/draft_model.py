"""A small model with an engine session of its own goes on with a text: each id the most likely one."""

import numpy as np

from shoal.model.spec import INPUT_IDS, LOGITS
from shoal.runtime.effects import AskDraft, DraftDone
from shoal.runtime.ports import SequenceStep, Session


def go_on(session: Session, ask: AskDraft) -> DraftDone:
    """Tell the model in *session* what it is to know, and let it go on; raises what `Session.step` raises."""
    found: list[int] = []
    start, ids = ask.start, ask.ids
    while ids:
        wanted = 1 if len(found) < ask.count else 0
        step = SequenceStep(request=ask.request, slot=ask.slot, start=start, count=len(ids), logits=wanted)
        outputs = session.step((step,), {INPUT_IDS: np.array([ids], np.int64)})
        start += len(ids)
        if wanted:
            found.append(int(np.argmax(outputs[LOGITS][-1])))
        ids = (found[-1],) if len(found) < ask.count else ()
    return DraftDone(number=ask.number, ids=tuple(found))
