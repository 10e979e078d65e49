"""Stage loops on threads, joined by an in-memory fabric to a gateway: answers, strangers, cancellations, endings."""

import io
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

import anyio
import pytest
from structlog.typing import FilteringBoundLogger

from shoal.clock import SystemClock
from shoal.errors import ContextLengthError, ShardLostError, ShoalError
from shoal.fleet.report import ShardId
from shoal.ids import DeploymentId, NodeId, RequestId
from shoal.node.pipeline import AnswerDesk, Pipeline
from shoal.node.stage_keys import submit_topic
from shoal.node.stage_loop import StageLoop, Stopped, Wired
from shoal.runtime import frames
from shoal.runtime.backend.null import NullBackend, null_shard
from shoal.runtime.effects import SubmitArrived
from shoal.runtime.executor.staged import StagedExecutor
from shoal.runtime.request import GenerateRequest, SamplingParams
from shoal.runtime.scheduler import SchedulerSettings
from shoal.runtime.settings import StageSettings
from shoal.threads import SystemThreads
from shoal.transport.bus import Bus, Sample
from shoal.transport.codec import Codec
from shoal.transport.frame import pack, unpack
from shoal.transport.keys import CreditTopic, EventTopic, FrameTopic, TokensTopic, key_of
from shoal.transport.memory import MemoryBus, MemoryFabric
from shoal.transport.pieces import Joiner

FLEET, NODE, M = "f", NodeId("n" * 32), DeploymentId("m")
LAYERS, VOCABULARY, SLOTS, CONTEXT = 6, 64, 2, 256
Attach = Callable[[str], MemoryBus]


@dataclass
class Stages:
    """Stages at work.  Data travels on a fabric of its own, as it does over sessions of its own."""

    loops: list[StageLoop]
    data: MemoryFabric
    outside: Bus

    def shard(self, stage: int = 0) -> ShardId:
        return self.loops[stage].shard


@contextmanager
def stages_of(
    count: int,
    bus_of: Attach,
    log: FilteringBoundLogger,
    *,
    step_s: float = 0.0,
    wait: Callable[[float], object] | None = None,
    heartbeat_s: float = 2.0,
    wired: bool = True,
    activations: Codec = Codec.RAW,
) -> Iterator[Stages]:
    data = MemoryFabric()
    wait = wait or threading.Event().wait
    engine = NullBackend(cost_s=lambda _: step_s, wait=wait) if step_s else NullBackend()
    with ExitStack() as stack:
        loops = []
        for index in range(count):
            start, stop = LAYERS * index // count, LAYERS * (index + 1) // count
            last = index == count - 1
            piece = null_shard(start, stop, embeds=index == 0, vocabulary=VOCABULARY if last else 0, slots=SLOTS)
            settings = StageSettings(
                plan_epoch=1, index=index, stages=count, slots=SLOTS, context_tokens=CONTEXT, vocabulary=VOCABULARY,
                scheduler=SchedulerSettings(in_flight=2), heartbeat_s=heartbeat_s, activations=activations,
            )  # fmt: skip
            inbound = data.attach(f"in{index}")
            stack.callback(inbound.close)
            loops.append(
                StageLoop(
                    fleet=FLEET,
                    shard=ShardId(deployment=M, plan_epoch=1, stage=index),
                    settings=settings,
                    session=engine.load(piece),
                    control=bus_of(f"worker{index}"),
                    inbound=inbound,
                    threads=SystemThreads(),
                    told=lambda: None,
                    log=log,
                )
            )
        threads = []
        for index, loop in enumerate(loops):
            loop.listen(key_of(submit_topic(FLEET, NODE, loop.shard)))
            if count > 1 and wired:
                outbound = data.attach(f"out{index}")
                stack.callback(outbound.close)
                loop.hear_next(outbound)
                loop.inbox.put(Wired(outbound))
            threads.append(threading.Thread(target=loop.run))
        outside = data.attach("outside")
        stack.callback(outside.close)
        for thread in threads:
            thread.start()
        try:
            yield Stages(loops, data, outside)
        finally:
            for loop, thread in zip(loops, threads, strict=True):
                loop.inbox.put(Stopped())
                thread.join(10)


def asked(name: str, prompt: int = 5, max_tokens: int = 12, **sampling: float) -> GenerateRequest:
    ids = tuple((7 * i + 3) % VOCABULARY for i in range(prompt))
    return GenerateRequest(
        request=RequestId(name), deployment=M, prompt=ids, max_tokens=max_tokens, sampling=SamplingParams(**sampling)
    )


def use(
    bus_of: Attach,
    log: FilteringBoundLogger,
    stages: Stages,
    then: Callable[[StagedExecutor, Pipeline], Awaitable[None]],
) -> None:
    """Run *then* with a gateway's executor."""

    async def scenario() -> None:
        desk = AnswerDesk(bus_of("gateway"), FLEET, NODE, SystemClock(), log)
        desk.open()
        pipeline = Pipeline(desk, M, NODE, stages.shard())
        try:
            with anyio.fail_after(30):
                await then(StagedExecutor(client=pipeline), pipeline)
        finally:
            desk.close()

    anyio.run(scenario)


async def tokens(executor: StagedExecutor, request: GenerateRequest) -> list[int]:
    return [t.token async for delta in executor.generate(request) for t in delta.tokens]


def answers(
    count: int, bus_of: Attach, log: FilteringBoundLogger, requests: list[GenerateRequest]
) -> dict[RequestId, list[int]]:
    """What *count* stages say to *requests*, all asked at once."""
    found: dict[RequestId, list[int]] = {}

    async def then(executor: StagedExecutor, _: Pipeline) -> None:
        async def one(request: GenerateRequest) -> None:
            found[request.request] = await tokens(executor, request)

        async with anyio.create_task_group() as group:
            for request in requests:
                group.start_soon(one, request)

    with stages_of(count, bus_of, log) as stages:
        use(bus_of, log, stages, then)
    return found


REQUESTS = [
    asked("greedy", temperature=0.0),
    asked("long", prompt=150),
    asked("seeded", seed=5),
    asked("more", prompt=9),
]


@pytest.mark.parametrize("count", [2, 3])
def test_stages_over_a_fabric_answer_like_one_whatever_else_is_asked(
    count: int, bus_of: Attach, log: FilteringBoundLogger
) -> None:
    alone: dict[RequestId, list[int]] = {}
    for request in REQUESTS:
        # A fabric each: the names of its buses are free again.
        fabric = MemoryFabric()
        alone |= answers(1, fabric.attach, log, [request])

    assert answers(count, bus_of, log, REQUESTS) == alone
    assert all(len(found) == 12 for found in alone.values())


def test_a_token_is_said_while_the_engine_makes_the_next(bus_of: Attach, log: FilteringBoundLogger) -> None:
    begun: list[float] = []
    heard_two, ended = threading.Event(), threading.Event()

    def wait(seconds: float) -> None:
        begun.append(seconds)
        if len(begun) == 3:
            heard_two.wait(5)
            ended.set()

    async def then(executor: StagedExecutor, _: Pipeline) -> None:
        said = 0
        async for delta in executor.generate(asked("a", max_tokens=3, temperature=0.0)):
            said += len(delta.tokens)
            if said == 2:
                assert not ended.is_set()
                heard_two.set()
        assert said == 3

    with stages_of(1, bus_of, log, step_s=0.001, wait=wait) as stages:
        use(bus_of, log, stages, then)


def test_garbage_is_dropped_and_counted_and_said_once(
    bus_of: Attach, log: FilteringBoundLogger, logged: io.StringIO
) -> None:
    def rubbish() -> list[bytes]:
        odd = pack(frames.encode(frames.Cancel(request=RequestId("x"))), {})
        return [b"", b"\x00", bytes(range(256)) * 3, odd[: len(odd) // 2]]

    async def then(executor: StagedExecutor, pipeline: Pipeline) -> None:
        before = await tokens(executor, asked("before", temperature=0.0))
        outside = bus_of("stranger")
        answer = pack(frames.encode(frames.InferDone(request=RequestId("x"))), {})
        for payload in [*rubbish(), answer]:
            outside.put(key_of(submit_topic(FLEET, NODE, stages.shard())), payload)
        for payload in rubbish():
            stages.outside.put(key_of(TokensTopic(fleet=FLEET, deployment=M, plan_epoch=1)), payload)
            stages.outside.put(key_of(FrameTopic(fleet=FLEET, deployment=M, plan_epoch=1, stage=1)), payload)
            outside.put(key_of(EventTopic(fleet=FLEET, node=NODE, kind="answers")), payload)
        assert await tokens(executor, asked("after", temperature=0.0)) == before
        while (  # noqa: ASYNC110 - counted on other threads
            [loop.malformed for loop in stages.loops] != [9, 4] or logged.getvalue().count("answer.dropped") < 4
        ):
            await anyio.sleep(0.01)

    with stages_of(2, bus_of, log) as stages:
        use(bus_of, log, stages, then)

    assert [loop.malformed for loop in stages.loops] == [9, 4]
    assert logged.getvalue().count("frame.dropped") == 2
    assert logged.getvalue().count("answer.dropped") == 4


@pytest.mark.parametrize("reply_to", ["", "answers//here", "answers/*", "a#b"])
def test_a_request_that_cannot_be_answered_anywhere_is_dropped_and_the_next_is_served(
    reply_to: str, bus_of: Attach, log: FilteringBoundLogger
) -> None:
    lost = RequestId("lost")

    async def then(executor: StagedExecutor, _: Pipeline) -> None:
        stranger = bus_of("stranger")
        for message in (
            frames.Submit(request=asked("lost"), reply_to=reply_to),
            frames.SubmitInfer(request=lost, deployment=M, reply_to=reply_to),
        ):
            stranger.put(key_of(submit_topic(FLEET, NODE, stages.shard())), pack(frames.encode(message), {}))
        infer = frames.InferStep(request=lost, reply_to=reply_to)
        frame = frames.BatchFrame(plan_epoch=1, step=0, infer=infer)
        onward = key_of(FrameTopic(fleet=FLEET, deployment=M, plan_epoch=1, stage=1))
        stages.outside.put(onward, pack(frames.encode(frame), {}))
        while [loop.malformed for loop in stages.loops] != [2, 1]:  # noqa: ASYNC110 - counted on other threads
            await anyio.sleep(0.01)

        assert len(await tokens(executor, asked("next"))) == 12

    with stages_of(2, bus_of, log) as stages:
        use(bus_of, log, stages, then)


def test_answers_that_cannot_be_said_are_counted_and_the_others_go_on(
    bus_of: Attach, log: FilteringBoundLogger, logged: io.StringIO
) -> None:
    async def then(executor: StagedExecutor, _: Pipeline) -> None:
        for name in ("mute", "dumb"):
            stages.loops[0].inbox.put(SubmitArrived(submit=frames.Submit(request=asked(name), reply_to="no/*/key")))

        assert len(await tokens(executor, asked("next"))) == 12

    with stages_of(1, bus_of, log) as stages:
        use(bus_of, log, stages, then)

    assert stages.loops[0].unsaid >= 12
    assert logged.getvalue().count("reply.lost") == 1


@pytest.mark.parametrize("count", [1, 2], ids=["alone", "two stages"])
def test_a_request_that_nobody_listens_to_any_more_gives_its_slot_up(
    count: int, bus_of: Attach, log: FilteringBoundLogger
) -> None:
    async def then(executor: StagedExecutor, _: Pipeline) -> None:
        running = [executor.generate(asked(f"left{n}", max_tokens=240)) for n in range(SLOTS)]
        for one in running:
            await anext(one)
            await one.aclose()

        assert len(await tokens(executor, asked("next", max_tokens=3))) == 3

    with stages_of(count, bus_of, log, step_s=0.02) as stages:  # 240 tokens would take five seconds
        use(bus_of, log, stages, then)
        assert stages.loops[0].steps < 120


@pytest.mark.parametrize("count", [1, 2], ids=["alone", "two stages"])
def test_a_short_request_beside_a_long_one_is_answered_first(
    count: int, bus_of: Attach, log: FilteringBoundLogger
) -> None:
    async def then(executor: StagedExecutor, _: Pipeline) -> None:
        long = executor.generate(asked("long", max_tokens=240))
        await anext(long)

        assert len(await tokens(executor, asked("short", max_tokens=3))) == 3
        assert stages.loops[0].steps < 120
        await long.aclose()

    with stages_of(count, bus_of, log, step_s=0.02) as stages:
        use(bus_of, log, stages, then)


def test_a_stage_alone_is_stopped_between_two_tokens(bus_of: Attach, log: FilteringBoundLogger) -> None:
    async def then(executor: StagedExecutor, _: Pipeline) -> None:
        running = executor.generate(asked("cut", max_tokens=240))
        await anext(running)
        stages.loops[0].inbox.put(Stopped())
        with pytest.raises(ShardLostError, match="stopping"):
            async for _delta in running:
                pass

    with stages_of(1, bus_of, log, step_s=0.02) as stages:
        use(bus_of, log, stages, then)


def test_a_prompt_that_cannot_fit_comes_back_as_that_error(bus_of: Attach, log: FilteringBoundLogger) -> None:
    async def then(executor: StagedExecutor, _: Pipeline) -> None:
        with pytest.raises(ContextLengthError, match="256"):
            await tokens(executor, asked("long", prompt=CONTEXT))

    with stages_of(2, bus_of, log) as stages:
        use(bus_of, log, stages, then)


def test_a_stage_that_is_stopped_ends_its_requests_with_an_error(bus_of: Attach, log: FilteringBoundLogger) -> None:
    async def then(executor: StagedExecutor, _: Pipeline) -> None:
        running = executor.generate(asked("cut", max_tokens=240))
        await anext(running)
        stages.loops[0].inbox.put(Stopped())
        with pytest.raises(ShardLostError, match="stopping"):
            async for _delta in running:
                pass

    with stages_of(2, bus_of, log, step_s=0.02) as stages:
        use(bus_of, log, stages, then)


def test_a_stage_shows_signs_of_life_to_both_sides_while_its_engine_is_busy(
    bus_of: Attach, log: FilteringBoundLogger
) -> None:
    busy, free = threading.Event(), threading.Event()
    seen: SimpleQueue[str] = SimpleQueue()

    def step(_seconds: float) -> None:
        busy.set()
        free.wait(20)

    with stages_of(2, bus_of, log, step_s=0.001, wait=step, heartbeat_s=0.1) as stages:
        credit = key_of(CreditTopic(fleet=FLEET, deployment=M, plan_epoch=1, stage=1))
        stages.outside.subscribe(credit, lambda _: seen.put("credit"))
        gateway = bus_of("gateway")
        gateway.subscribe("answers", lambda _: seen.put("delta"))
        submit = frames.Submit(request=asked("a", max_tokens=1), reply_to="answers")
        gateway.put(key_of(submit_topic(FLEET, NODE, stages.shard())), pack(frames.encode(submit), {}))
        assert busy.wait(10)
        try:
            assert {seen.get(timeout=10) for _ in range(4)} == {"credit", "delta"}
        finally:
            free.set()


def test_an_engine_that_fails_in_a_way_of_its_own_ends_that_answer_and_serves_the_next(
    bus_of: Attach, log: FilteringBoundLogger, logged: io.StringIO
) -> None:
    ailing = [KeyError("embedding"), IndexError("tuple index out of range")]

    def step(_seconds: float) -> None:
        if ailing:
            raise ailing.pop()

    async def then(executor: StagedExecutor, _: Pipeline) -> None:
        for error in ("IndexError", "KeyError"):
            with pytest.raises(ShoalError, match=error):
                await tokens(executor, asked(f"unlucky {error}"))
        assert len(await tokens(executor, asked("next"))) == 12

    with stages_of(2, bus_of, log, step_s=0.001, wait=step) as stages:
        use(bus_of, log, stages, then)
    assert logged.getvalue().count("step.failed") == 2


def test_a_pipeline_that_is_no_more_breaks_its_answers_off_and_no_others(
    bus_of: Attach, log: FilteringBoundLogger
) -> None:
    async def then(executor: StagedExecutor, pipeline: Pipeline) -> None:
        other = Pipeline(pipeline.desk, M, NODE, stages.shard())
        kept = StagedExecutor(client=other).generate(asked("kept", max_tokens=30))
        broken = executor.generate(asked("broken", max_tokens=240))
        await anext(kept)
        await anext(broken)

        pipeline.break_off("its node died")

        with pytest.raises(ShardLostError, match="its node died"):
            async for _delta in broken:
                pass
        assert len([t async for delta in kept for t in delta.tokens]) >= 20
        assert not pipeline.running
        assert other.last_token_s is not None

    with stages_of(2, bus_of, log, step_s=0.01) as stages:
        use(bus_of, log, stages, then)


def test_a_stage_that_has_no_way_out_yet_loses_what_it_would_send_says_so_and_answers_when_it_is_wired(
    bus_of: Attach, log: FilteringBoundLogger, logged: io.StringIO
) -> None:
    answered: SimpleQueue[int] = SimpleQueue()
    said: SimpleQueue[str] = SimpleQueue()

    def probe(step: int) -> None:
        frame = frames.BatchFrame(plan_epoch=1, run=3, step=step, probe=True)
        onward = key_of(FrameTopic(fleet=FLEET, deployment=M, plan_epoch=1, stage=1))
        stages.outside.put(onward, pack(frames.encode(frame), {}))

    def heard(sample: Sample) -> None:
        match frames.decode_stage_frame(unpack(sample.payload)[0]):
            case frames.CreditFrame(trouble=trouble):
                said.put(trouble)
            case other:
                raise AssertionError(other)

    def tokens_came(sample: Sample) -> None:
        whole = Joiner().add(sample.payload)
        assert whole is not None
        answered.put(frames.decode_stage_frame(unpack(whole)[0]).step)  # type: ignore[union-attr]

    with stages_of(2, bus_of, log, wired=False) as stages:
        stages.outside.subscribe(key_of(CreditTopic(fleet=FLEET, deployment=M, plan_epoch=1, stage=0)), heard)
        stages.outside.subscribe(key_of(TokensTopic(fleet=FLEET, deployment=M, plan_epoch=1)), tokens_came)
        assert said.get(timeout=10) == "", "nobody has missed the way yet"

        probe(0)
        while said.get(timeout=10) != "stage 1 is not wired yet":
            pass

        stages.loops[1].inbox.put(Wired(stages.outside))
        probe(1)
        assert answered.get(timeout=10) == 1
        while said.get(timeout=10):
            pass
    assert logged.getvalue().count("frame.lost") == 1


def test_the_first_request_counts_as_running_from_the_beginning_of_its_first_step(
    bus_of: Attach, log: FilteringBoundLogger
) -> None:
    """A node that leaves waits for what runs, and a long prompt may take a minute."""
    busy, free = threading.Event(), threading.Event()

    def step(_seconds: float) -> None:
        busy.set()
        free.wait(20)

    with stages_of(1, bus_of, log, step_s=0.001, wait=step) as stages:
        submit = frames.Submit(request=asked("a", max_tokens=1), reply_to="answers")
        stages.loops[0].inbox.put(SubmitArrived(submit=submit))
        assert busy.wait(10)
        try:
            assert stages.loops[0].live_requests == 1
        finally:
            free.set()


def test_answers_to_hellos_that_were_not_said_are_dropped_and_the_true_one_counts_once(
    bus_of: Attach, log: FilteringBoundLogger
) -> None:
    def answer(number: int) -> None:
        hello = frames.HelloFrame(plan_epoch=1, number=number, back=True)
        stages.outside.put(
            key_of(CreditTopic(fleet=FLEET, deployment=M, plan_epoch=1, stage=0)), pack(frames.encode(hello), {})
        )

    with stages_of(2, bus_of, log) as stages:
        first = stages.loops[0]
        for number in (-1, 0, 1, 7):
            answer(number)
        while first.malformed < 4:
            threading.Event().wait(0.01)
        assert first.greeted.empty()

        said = first.greet(stages.outside)
        assert first.greeted.get(timeout=10).number == said
        answer(said)
        answer(9)
        while first.malformed < 5:
            threading.Event().wait(0.01)
        assert first.greeted.empty()
