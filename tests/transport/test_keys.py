"""Keys and patterns: every topic round-trips, and our matching is Zenoh's."""

from typing import get_args

import pytest
import zenoh
from hypothesis import assume, example, given
from hypothesis import strategies as st

from shoal.errors import InvalidRequestError, MalformedFrameError
from shoal.ids import DeploymentId, NodeId
from shoal.transport.keys import (
    FrameTopic,
    HeartbeatTopic,
    TokensTopic,
    Topic,
    check_key,
    check_pattern,
    key_of,
    matches,
    pattern_of,
    topic_of,
)

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12) | st.sampled_from(
    ["a/b", "*", "@x", "%2F", "."]
)
numbers = st.integers(0, 2**40)


def topics() -> st.SearchStrategy[Topic]:
    def build(kind: type) -> st.SearchStrategy[Topic]:
        fields = {name: numbers if kind.__annotations__[name] is int else names for name in kind.__struct_fields__}
        return st.builds(kind, **fields)

    return st.one_of([build(kind) for kind in get_args(Topic)])


@given(topics())
def test_every_topic_round_trips(topic: Topic) -> None:
    key = key_of(topic)

    assert topic_of(key) == topic
    check_key(key)
    zenoh.KeyExpr(key)


@given(topics(), topics())
def test_two_topics_share_no_key(one: Topic, other: Topic) -> None:
    assert (key_of(one) == key_of(other)) == (one == other)


@given(topics(), st.data())
def test_a_pattern_covers_its_topics_and_no_other_kind(topic: Topic, data: st.DataObject) -> None:
    fixed = data.draw(st.sets(st.sampled_from(topic.__struct_fields__)))
    pattern = pattern_of(type(topic), **{name: getattr(topic, name) for name in fixed})

    check_pattern(pattern)
    assert matches(pattern, key_of(topic))
    for kind in get_args(Topic):
        assert kind is type(topic) or not matches(pattern_of(kind), key_of(topic))


def test_frames_have_the_documented_key() -> None:
    topic = FrameTopic(fleet="home", deployment=DeploymentId("smollm2-135m"), plan_epoch=3, stage=1)

    assert key_of(topic) == "shoal/home/f/smollm2-135m/3/1"
    assert pattern_of(FrameTopic, fleet="home", plan_epoch=3) == "shoal/home/f/*/3/*"


@given(
    st.text(max_size=40)
    | st.lists(st.sampled_from(["shoal", "f", "h", "t", "x", "1", "01", "-1", "%61", ""])).map("/".join)
)
@example("shoal/home/t/m/01")
@example("shoal/home/t/m/-1")
@example("shoal/home/h/%61")
@example("shoal/home/h/%ff")
def test_no_other_key_is_taken_for_ours(key: str) -> None:
    try:
        topic = topic_of(key)
    except MalformedFrameError:
        return
    assert key_of(topic) == key


def test_a_field_that_cannot_be_a_chunk_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="node"):
        key_of(HeartbeatTopic(fleet="home", node=NodeId("")))
    with pytest.raises(InvalidRequestError, match="plan_epoch"):
        key_of(TokensTopic(fleet="home", deployment=DeploymentId("m"), plan_epoch=-1))
    with pytest.raises(InvalidRequestError, match="Unicode"):
        key_of(HeartbeatTopic(fleet="\ud800", node=NodeId("n")))
    with pytest.raises(InvalidRequestError, match="no field"):
        pattern_of(HeartbeatTopic, stage=1)


chunks = st.sampled_from(["a", "b", "@a", "ab"])
keys = st.lists(chunks, min_size=1, max_size=6).map("/".join)
patterns = st.lists(chunks | st.sampled_from(["*", "**"]), min_size=1, max_size=6).map("/".join)


@given(patterns, keys)
@example("**/@a/**/b", "@a/a/@a/b")
@example("a/**", "a")
def test_matching_is_zenohs(pattern: str, key: str) -> None:
    try:
        check_pattern(pattern)
    except InvalidRequestError:
        assume(False)

    assert matches(pattern, key) == zenoh.KeyExpr(pattern).includes(zenoh.KeyExpr(key))


sound = st.sampled_from(["a", "*", "**", "@"])
strange = st.sampled_from(["", "#", "a*", "?", "$*", "a$"])


# Mostly of sound chunks: what is refused for one of them says nothing of how they may stand beside each other.
@given(st.lists(sound | sound | sound | strange, min_size=1, max_size=5).map("/".join))
@example("**/*")
@example("a/**/**")
def test_a_pattern_that_we_accept_zenoh_accepts_too(pattern: str) -> None:
    try:
        check_pattern(pattern)
    except InvalidRequestError:
        return
    assert str(zenoh.KeyExpr(pattern)) == pattern
