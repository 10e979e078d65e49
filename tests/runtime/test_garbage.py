"""When a stage is blamed for numbers that nobody can read."""

from hypothesis import given
from hypothesis import strategies as st

from shoal.ids import RequestId
from shoal.runtime.frames import BatchFrame
from shoal.runtime.garbage import FRAMES, REQUESTS, Garbage, original
from shoal.runtime.ports import SequenceStep

NAMES = ["a", "a~2", "a~3", "b", "b~2", "c"]


def frame(names: list[str]) -> BatchFrame:
    rows = [SequenceStep(request=RequestId(n), slot=i, start=0, count=1, logits=1) for i, n in enumerate(names)]
    return BatchFrame(plan_epoch=1, step=0, sequences=tuple(rows))


seen = st.lists(st.tuples(st.lists(st.sampled_from(NAMES), max_size=3, unique=True), st.booleans()), max_size=12)


@given(seen=seen)
def test_a_stage_is_blamed_for_frames_in_a_row_of_different_requests_and_for_nothing_else(
    seen: list[tuple[list[str], bool]],
) -> None:
    garbage = Garbage()
    for names, sound in seen:
        garbage.saw(frame(names), frame(names if sound else []))

    last = max((at for at, (names, sound) in enumerate(seen) if names and sound), default=-1)
    bad = [names for names, _ in seen[last + 1 :] if names]
    requests = {original(RequestId(name)) for names in bad for name in names}
    assert garbage.proven == (len(bad) >= FRAMES and len(requests) >= REQUESTS)


def test_one_answer_that_is_tried_again_and_again_blames_nobody() -> None:
    garbage = Garbage()
    for times in range(20):
        garbage.saw(frame([f"a~{times}"]), frame([]))

    assert not garbage.proven
