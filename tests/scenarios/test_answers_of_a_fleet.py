"""Three nodes answer together what one answers alone, over OpenAI's own client, and bear what strangers send."""

import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import msgspec
import openai
import psutil
import pytest

from shoal.errors import ContextLengthError, InfeasibleError, UnknownModelError
from shoal.fleet.order import Accepted, Refused, Reply
from shoal.fleet.report import NodeFacts, NodeReport
from shoal.ids import DeploymentId, NodeId
from shoal.node.artifacts import shard_tensors
from shoal.node.messages import REPORT, VIEW
from shoal.plan.problem import Infeasible, RequestShape
from shoal.store.home import open_store
from shoal.transport.keys import (
    ControlTopic,
    EventTopic,
    FrameTopic,
    HeartbeatTopic,
    TokensTopic,
    WorkerTopic,
    key_of,
)
from shoal.transport.zenoh import ZenohBus, open_control, open_data

Fleet = Any  # of conftest
FLEET = "shoal"
LONG = "The tide comes in over the sand and the boats in the harbour turn around. " * 6
DEPLOYED = {"one": "a", "two": "ab", "three": "abc"}


@pytest.fixture(scope="module")
def site(fleets: Callable[[ExitStack], Any]) -> Iterator[Any]:
    """Nodes a, b, c that serve the tiny model with one, two and three stages."""
    with ExitStack() as stack:
        fleet = fleets(stack)
        machines = {m.name: m for m in fleet.site("b", "c")}
        for name, places in DEPLOYED.items():
            fleet.deploy(name, *(machines[p] for p in places), wait=False)
        for name in DEPLOYED:
            fleet.wait_ready(name)
        yield fleet


def tokens_of(client: openai.OpenAI, model: str, prompt: str, **sampling: Any) -> list[tuple[str, tuple[int, ...]]]:  # noqa: ANN401 - OpenAI's own keywords
    """The answer token by token."""
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], max_tokens=60, logprobs=True, **sampling
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    return [(t.token, tuple(t.bytes or ())) for t in logprobs.content]


def test_two_and_three_stages_answer_token_for_token_what_one_answers_also_while_others_are_answered(
    site: Fleet,
) -> None:
    client = site.openai()
    asked = [
        (prompt, sampling)
        for prompt in ("hi", LONG)
        for sampling in ({"temperature": 0}, {"temperature": 0.9, "top_p": 0.9, "seed": 11})
    ]
    alone = [tokens_of(client, "one", prompt, **sampling) for prompt, sampling in asked]

    with ThreadPoolExecutor(8) as pool:
        work = [(name, *request) for request in asked for name in ("two", "three")]
        together = list(pool.map(lambda w: tokens_of(client, w[0], w[1], **w[2]), work))

    assert together == [answer for answer in alone for _ in ("two", "three")]
    assert all(len(answer) == 60 for answer in alone)
    assert len({str(answer) for answer in alone}) == 4, "each of the four requests has an answer of its own"


def test_a_stream_has_the_text_the_usage_and_the_reason_of_the_whole_answer(site: Fleet) -> None:
    client = site.openai()
    asked = {"model": "three", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**asked)

    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))

    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason == "length"
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    assert whole.usage.completion_tokens == 40


def test_an_answer_ends_before_a_stop_string(site: Fleet) -> None:
    client = site.openai()
    asked = {"model": "three", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 60, "temperature": 0}
    text = client.chat.completions.create(**asked).choices[0].message.content
    stop = text[20:23]

    answer = client.chat.completions.create(**asked, stop=[stop]).choices[0]

    assert answer.finish_reason == "stop"
    assert answer.message.content == text[: text.index(stop)]


def steps_at_rest(site: Fleet, model: str) -> int | None:
    """Steps that the first stage of *model* has run, once it holds no request; as its node reports them."""
    found = httpx.get(f"{site.machines[0].url}/metrics").text
    value = {key: float(text) for key, _, text in (line.rpartition(" ") for line in found.splitlines()) if "{" in key}
    running = value[f'shoal_requests_running{{deployment="{model}"}}']
    steps = int(value[f'shoal_stage_steps_total{{deployment="{model}",stage="0"}}'])
    return None if running else steps or None  # 0: its first report is still to come


def test_a_cancelled_answer_frees_its_slot_at_once(site: Fleet) -> None:
    """Counted in steps: had the next answer waited for the slot, the first stage would have made the whole first one before.

    With a seed, so that each token is a step.
    """
    site.deploy("narrow", *site.machines, slots=1)
    client = site.openai()
    asked = {"model": "narrow", "messages": [{"role": "user", "content": "hi"}], "temperature": 0, "seed": 7}
    stream = client.chat.completions.create(**asked, max_tokens=3500, stream=True)
    for _ in zip(range(50), stream, strict=False):
        pass

    stream.close()
    short = client.chat.completions.create(**asked, max_tokens=5)

    assert short.usage.completion_tokens == 5
    steps = site.wait(lambda: steps_at_rest(site, "narrow"), "the stage is at rest")
    assert 50 < steps < 2500
    site.stop("narrow")


def test_a_client_that_vanishes_leaves_a_deployment_that_answers(site: Fleet) -> None:
    url = site.machines[0].url
    for _ in range(4):  # more than there are slots
        body = {"model": "two", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3500, "stream": True}
        with httpx.Client() as http, http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            next(response.iter_lines())

    assert len(tokens_of(site.openai(), "two", "hi", temperature=0)) == 60


def test_a_node_has_only_the_chunks_of_its_blocks(site: Fleet) -> None:
    """Also of those that it no longer runs: live times may have moved a cut from one deployment to the next."""
    artifact = site.stock.artifact("tiny")
    plans = [*(site.deployment(deployment).plan for deployment in DEPLOYED), *site.stopped]
    for name in "bc":
        machine = site.machine(name)
        spans = [(s.start, s.stop) for plan in plans for s in plan.stages if s.node == machine.id]
        weights = {e.chunk.digest for e in artifact.manifest.tensors}

        held = set(open_store(machine.home).disk.sizes_bytes())

        assert held & weights == {e.chunk.digest for span in spans for e in shard_tensors(artifact, *span)}
    assert not weights <= held, "c runs the last blocks only"


def test_a_prompt_longer_than_the_context_is_refused_with_its_length(site: Fleet) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        tokens_of(site.openai(), "two", LONG * 40)

    assert caught.value.code == ContextLengthError.code
    assert "4096" in str(caught.value)


def test_an_unknown_model_is_named_with_those_that_are_there(site: Fleet) -> None:
    with pytest.raises(openai.NotFoundError, match=r"no model 'four'.*one.*three.*two") as caught:
        tokens_of(site.openai(), "four", "hi")

    assert caught.value.code == UnknownModelError.code


def test_where_no_plan_fits_the_error_says_what_is_missing_and_what_would_fit(site: Fleet) -> None:
    others = tuple(m.id for m in site.machines[1:])
    huge = RequestShape(context_tokens=4096, slots=330)  # 6.3 MB each, on a node with 2 GiB
    with site.asking() as shoal:
        answer = shoal.plan("tiny", shape=huge, exclude=others)
        with pytest.raises(InfeasibleError) as caught:
            shoal.deploy("tiny", name="huge", shape=huge, exclude=others)
        names = {d.name for d in shoal.deployments()}

    assert isinstance(answer, Infeasible)
    assert answer.missing_bytes > 0
    assert "missing" in caught.value.message
    assert "it fits with" in caught.value.hint
    assert "huge" not in names


def test_two_models_answer_at_once_and_an_encoder_may_be_cut_too(site: Fleet) -> None:
    a, b, _ = site.machines
    site.stock.put(a.home, "bert")
    site.deploy("vectors", a, model="bert", context_tokens=32, wait=False)
    site.deploy("vectors-of-two", a, b, model="bert", context_tokens=32)
    site.wait_ready("vectors")
    client = site.openai()

    with ThreadPoolExecutor(4) as pool:
        chats = [pool.submit(tokens_of, client, "three", "hi", temperature=0) for _ in range(2)]
        ids = [[5, 6, 7], [8, 9]]
        asked = [pool.submit(client.embeddings.create, model=m, input=ids) for m in ("vectors", "vectors-of-two")]
        one, two = ([v.embedding for v in done.result().data] for done in asked)
        answers = [chat.result() for chat in chats]

    assert answers[0] == answers[1]
    assert [len(vector) for vector in one] == [64, 64]
    assert two == [pytest.approx(vector, rel=1e-4) for vector in one]


def test_garbage_on_the_fabric_is_dropped_and_counted_and_nobody_notices(site: Fleet) -> None:
    a, b, _ = site.machines
    epoch = site.deployment("two").plan_epoch
    two, first = DeploymentId("two"), {"deployment": DeploymentId("two"), "plan_epoch": epoch, "stage": 0}
    control = [
        HeartbeatTopic(fleet=FLEET, node=b.id),
        EventTopic(fleet=FLEET, node=b.id, kind=VIEW),
        EventTopic(fleet=FLEET, node=a.id, kind="answers"),
        WorkerTopic(fleet=FLEET, node=a.id, verb=REPORT, **first),
        WorkerTopic(fleet=FLEET, node=a.id, verb="submit", **first),
        WorkerTopic(fleet=FLEET, node=a.id, verb="wire", **first),
    ]
    data = [
        FrameTopic(fleet=FLEET, deployment=two, plan_epoch=epoch, stage=1),
        TokensTopic(fleet=FLEET, deployment=two, plan_epoch=epoch),
    ]
    before = tokens_of(site.openai(), "two", "hi", temperature=0)

    with session(open_control(f"tcp/{a.address}")) as bus:
        for topic in control:
            bus.wait_matched(key_of(topic), 3.0)
            for size in (0, 1, 40, 4000):
                bus.put(key_of(topic), secrets.token_bytes(size))
    for worker_port in [port for m in (a, b) for w in m.workers() for port in listening(w)]:
        with session(open_data((), (f"tcp/127.0.0.1:{worker_port}",))) as bus:
            for topic in data:
                for size in (0, 1, 40, 4000):
                    bus.put(key_of(topic), secrets.token_bytes(size))

    site.wait(lambda: "message.dropped" in a.log, "a says that it dropped messages")
    site.wait(lambda: "frame.dropped" in a.log and "frame.dropped" in b.log, "workers of a and b dropped frames")
    site.wait(lambda: "answer.dropped" in a.log, "the gateway dropped answers")
    assert tokens_of(site.openai(), "two", "hi", temperature=0) == before
    assert site.deployment("two").plan_epoch == epoch


def test_an_order_of_another_version_is_refused_and_a_report_of_one_is_read(site: Fleet) -> None:
    a, b, _ = site.machines
    stranger = NodeId("z" * 32)
    facts = NodeFacts(name="newer", version="99.0", locators=(), cores=1, memory_total_bytes=1, memory_budget_bytes=1)
    report = msgspec.to_builtins(NodeReport(node=stranger, incarnation=1, sequence=1, facts=facts))

    with session(open_control(f"tcp/{a.address}")) as bus:
        order = key_of(ControlTopic(fleet=FLEET, node=b.id, verb="order"))
        reply = bus.query(order, msgspec.msgpack.encode({"type": "explode", "fencing_epoch": 99}), timeout_s=3.0)
        bus.wait_matched(key_of(HeartbeatTopic(fleet=FLEET, node=stranger)), 3.0)
        bus.put(key_of(HeartbeatTopic(fleet=FLEET, node=stranger)), msgspec.msgpack.encode(report | {"mood": "fine"}))

    refused: Reply = msgspec.msgpack.decode(reply, type=Accepted | Refused)
    assert isinstance(refused, Refused)
    assert refused.code == "unsupported_version"
    site.wait(lambda: "newer" in site.nodes(), "the node of a newer version is listed")


def listening(process: psutil.Process) -> list[int]:
    return [c.laddr.port for c in process.net_connections(kind="tcp") if c.status == "LISTEN"]


@contextmanager
def session(bus: ZenohBus) -> Iterator[ZenohBus]:
    """A stranger's session, closed at the end."""
    try:
        yield bus
    finally:
        bus.close()
