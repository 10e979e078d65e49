"""Which sequences of a step share an engine call."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from shoal.ids import RequestId
from shoal.runtime.backend.grouping import BRIDGED, Call, alone_call, calls_of, with_company
from shoal.runtime.ports import SequenceStep


def step(slot: int, count: int = 1, logits: int = 1) -> SequenceStep:
    return SequenceStep(request=RequestId(f"r{slot}"), slot=slot, start=7, count=count, logits=logits)


steps = st.lists(
    st.builds(step, st.integers(0, 11), st.sampled_from([1, 1, 1, 4])),
    min_size=1,
    max_size=8,
    unique_by=lambda s: s.slot,
)


@given(sequences=steps, full=st.sets(st.integers(0, 11)))
def test_every_sequence_is_in_one_call_and_no_call_writes_where_it_must_not(
    sequences: list[SequenceStep], full: set[int]
) -> None:
    calls = calls_of(sequences, full)

    assert sorted(at for call in calls for at in call.members) == list(range(len(sequences)))
    for call in calls:
        bridged = [slot for slot, at in call.lanes() if at is None]
        assert not full & set(bridged)
        assert not {s.slot for s in sequences if s.count == 1} & set(bridged)
        assert [slot for slot, at in call.lanes() if at is not None] == [sequences[at].slot for at in call.members]
        assert call.width == 1 or all(sequences[at].count == 1 for at in call.members)


@given(sequences=steps)
def test_neighbours_that_answer_are_never_apart(sequences: list[SequenceStep]) -> None:
    calls = [call for call in calls_of(sequences, ()) if sequences[call.members[0]].count == 1]
    ends = sorted((call.first, call.first + call.width - 1) for call in calls)

    assert all(second[0] - first[1] > BRIDGED + 1 for first, second in itertools.pairwise(ends))


@given(
    sequences=steps,
    full=st.sets(st.integers(0, 11)),
    odd=st.sets(st.integers(1, 13)),
    slots=st.integers(12, 16),
)
def test_company_is_as_wide_as_it_must_be_and_writes_into_no_full_slot(
    sequences: list[SequenceStep], full: set[int], odd: set[int], slots: int
) -> None:
    for call in calls_of(sequences, full):
        wider = with_company(call, slots, full, odd)

        added = {slot for slot, _ in wider.lanes()} - {slot for slot, _ in call.lanes()}
        assert (wider.members, wider.slots) == (call.members, call.slots)
        assert not added & full
        assert added <= set(range(slots))
        if wider.width in odd:  # then there was no room for another width
            behind = itertools.takewhile(lambda slot: slot not in full, range(call.first + call.width, slots))
            before = itertools.takewhile(lambda slot: slot not in full, range(call.first - 1, -1, -1))
            room = len(list(behind)) + len(list(before))
            assert wider == call
            assert odd >= set(range(call.width, call.width + room + 1))
        else:
            assert odd >= set(range(call.width, wider.width))


def test_a_lone_row_takes_the_slot_behind_it_or_else_the_one_before() -> None:
    call = alone_call(0, 2)

    assert with_company(call, 4, (), {1}) == Call(2, 2, (0,), (2,))
    assert with_company(call, 3, (), {1}) == Call(1, 2, (0,), (2,))
    assert with_company(call, 4, {3}, {1}) == Call(1, 2, (0,), (2,))
    assert with_company(call, 4, {1, 3}, {1}) == call
    assert with_company(call, 4, (), {3}) == call


def test_a_prompts_chunk_and_guessed_rows_have_calls_of_their_own() -> None:
    sequences = [step(0), step(1, count=128, logits=0), step(2), step(3, count=5, logits=5)]

    assert calls_of(sequences, ()) == [
        Call(1, 1, (1,), (1,)),
        Call(3, 1, (3,), (3,)),
        Call(0, 3, (0, 2), (0, 2)),
    ]
