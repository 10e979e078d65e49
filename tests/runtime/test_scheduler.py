from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from shoal.ids import DeploymentId, RequestId
from shoal.runtime.pipeline import LocalPipeline
from shoal.runtime.request import GenerateRequest
from shoal.runtime.scheduler import LEAST_ROWS, Pace, Pressure, SchedulerSettings, is_prefill, next_batch
from shoal.runtime.sequence import LiveSequence


def sequence(name: str, *, prompt: int = 10, output: int = 0, scheduled: int = 0, last_step: int = -1) -> LiveSequence:
    request = GenerateRequest(
        request=RequestId(name), deployment=DeploymentId("m"), prompt=tuple(range(prompt)), max_tokens=99
    )
    return LiveSequence(request, "", 0, frozenset(), [0] * output, scheduled, last_step)


def decoding(name: str, *, waiting: bool = False, last_step: int = 0) -> LiveSequence:
    return sequence(name, prompt=4, output=1, scheduled=5 if waiting else 4, last_step=last_step)


@st.composite
def sequences(draw: st.DrawFn) -> list[LiveSequence]:
    made = []
    for i in range(draw(st.integers(0, 6))):
        prompt = draw(st.integers(1, 400))
        output = draw(st.integers(0, 3))
        scheduled = draw(st.integers(0, prompt)) if not output else prompt + output - draw(st.integers(0, 1))
        made.append(
            sequence(f"s{i}", prompt=prompt, output=output, scheduled=scheduled, last_step=draw(st.integers(-1, 9)))
        )
    return made


pressures = st.builds(
    Pressure, frames=st.integers(0, 5), prefill_frames=st.integers(0, 2), last_was_prefill=st.booleans()
)
chosen = st.builds(SchedulerSettings, in_flight=st.integers(1, 5), chunk_rows=st.integers(1, 200))


@given(sequences(), pressures, chosen)
def test_a_batch_continues_each_sequence_once_within_what_is_known(
    live: list[LiveSequence], pressure: Pressure, settings: SchedulerSettings
) -> None:
    by_name = {s.request.request: s for s in live}

    batch = next_batch(live, pressure, settings)

    assert len({step.request for step in batch}) == len(batch)
    for step in batch:
        s = by_name[step.request]
        assert step.start == s.scheduled
        assert 1 <= step.count <= max(settings.chunk_rows, 1)
        assert step.start + step.count <= s.known
        assert step.logits == (1 if step.start + step.count == s.known else 0)


@given(sequences(), pressures, chosen)
def test_a_batch_is_one_chunk_or_only_decode_rows(
    live: list[LiveSequence], pressure: Pressure, settings: SchedulerSettings
) -> None:
    batch = next_batch(live, pressure, settings)

    assert not is_prefill(batch, {s.request.request: s for s in live}) or len(batch) == 1


@given(sequences(), chosen)
def test_an_empty_pipeline_never_idles_while_somebody_is_ready(
    live: list[LiveSequence], settings: SchedulerSettings
) -> None:
    assert bool(next_batch(live, Pressure(), settings)) == any(s.ready for s in live)


@given(sequences(), chosen)
def test_a_full_pipeline_takes_nothing(live: list[LiveSequence], settings: SchedulerSettings) -> None:
    assert next_batch(live, Pressure(frames=settings.in_flight), settings) == ()


def names(batch: tuple[object, ...]) -> list[str]:
    return [step.request for step in batch]


def test_prefill_and_decode_take_turns() -> None:
    live = [decoding("d"), sequence("p", prompt=500)]

    assert names(next_batch(live, Pressure(last_was_prefill=False), SchedulerSettings())) == ["p"]
    assert names(next_batch(live, Pressure(last_was_prefill=True), SchedulerSettings())) == ["d"]


def test_only_one_chunk_is_under_way_while_somebody_decodes() -> None:
    live = [decoding("d", waiting=True), sequence("p", prompt=500, scheduled=128)]

    assert next_batch(live, Pressure(frames=2, prefill_frames=1), SchedulerSettings()) == ()
    assert names(next_batch(live[1:], Pressure(frames=2, prefill_frames=1), SchedulerSettings())) == ["p"]


def test_who_was_served_longest_ago_comes_first() -> None:
    live = [decoding("new", last_step=9), decoding("old", last_step=2), decoding("mid", last_step=5)]

    assert names(next_batch(live, Pressure(), SchedulerSettings(in_flight=3))) == ["old"]


def test_decoding_sequences_are_spread_over_the_frames_that_may_be_in_flight() -> None:
    live = [decoding(f"d{i}", last_step=i) for i in range(6)]

    assert len(next_batch(live, Pressure(), SchedulerSettings(in_flight=1))) == 6
    assert len(next_batch(live, Pressure(), SchedulerSettings(in_flight=4))) == 2


@given(row_s=st.floats(1e-6, 10), stall_s=st.floats(0.01, 1), most=st.integers(3, 256))
def test_a_chunk_holds_up_the_others_for_as_long_as_is_allowed_or_is_a_short_one(
    row_s: float, stall_s: float, most: int
) -> None:
    pace = Pace()
    assert pace.rows(SchedulerSettings(chunk_rows=most)) == most
    pace.passed(10, 10 * row_s)
    rows = pace.rows(SchedulerSettings(chunk_rows=most, stall_s=stall_s))

    assert min(LEAST_ROWS, most) <= rows <= most
    assert rows * row_s <= stall_s * 1.001 or rows == min(LEAST_ROWS, most)


def test_chunks_are_short_while_others_decode_and_long_again_afterwards(
    make_pipeline: Callable[..., LocalPipeline], make_request: Callable[..., GenerateRequest]
) -> None:
    """A row takes 10 ms: ten of them fit into the tenth of a second that others may be held up, and 16 are the least."""
    pipeline = make_pipeline(slots=2, context=900, step_s=lambda _, steps: 0.01 * sum(s.count for s in steps))
    sizes: list[tuple[bool, int]] = []
    first = pipeline.machines[0].first
    assert first is not None
    pipeline.submit(make_request("a", prompt=100, max_tokens=30))
    for _ in range(6):
        pipeline.turn()
    pipeline.submit(make_request("bb", prompt=800, max_tokens=2))
    while pipeline.turn():
        running = pipeline.machines[0].running
        steps = running[0].sequences if running else ()
        sizes += [(RequestId("a") in first.live, s.count) for s in steps if s.request == "bb" and s.start < 800]

    assert {count for others, count in sizes if others} == {LEAST_ROWS}
    assert max(count for others, count in sizes if not others) == 128
