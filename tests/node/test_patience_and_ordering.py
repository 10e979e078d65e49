"""When a plan is tried again, and when an order is given again."""

import pytest

from shoal.fleet.order import Retire
from shoal.fleet.reconcile import Addressed
from shoal.fleet.report import ShardId
from shoal.ids import DeploymentId, NodeId
from shoal.node.ordering import AGAIN_AFTER_S, Ordering
from shoal.node.patience import RETRY_PLAN_AT_MOST_S, RETRY_PLAN_S, STEADY_S, Patience

CHAT, OTHER = DeploymentId("chat"), DeploymentId("other")


def waits_s(patience: Patience, name: DeploymentId = CHAT, now_s: float = 100.0) -> float:
    """A plan is made in vain at *now_s*: how long until the next?"""
    patience.began(name)
    assert not patience.allows(name, float("inf")), "not two at once"
    patience.counted(name)
    patience.ended(name, now_s)
    return next(s for s in range(1, 1000) if patience.allows(name, now_s + s))


def test_what_is_planned_in_vain_is_tried_ever_more_rarely_but_for_ever() -> None:
    patience = Patience()

    waits = [waits_s(patience) for _ in range(30)]

    assert waits[:3] == [RETRY_PLAN_S, 2 * RETRY_PLAN_S, 4 * RETRY_PLAN_S]
    assert waits[-1] == RETRY_PLAN_AT_MOST_S
    assert patience.allows(OTHER, 100.0)


@pytest.mark.parametrize("news", [lambda p: p.forget(CHAT), lambda p: p.forget_all()])
def test_a_new_declaration_or_a_node_that_comes_ends_the_wait(news: object) -> None:
    patience = Patience()
    for _ in range(5):
        waits_s(patience)
    serve_and_break(patience, 100.0, 101.0)
    serve_and_break(patience, 102.0, 103.0)
    assert not patience.allows(CHAT, 103.0)

    news(patience)  # type: ignore[operator]

    assert patience.allows(CHAT, 100.0)
    assert waits_s(patience) == RETRY_PLAN_S


def serve_and_break(patience: Patience, since_s: float, until_s: float) -> None:
    for seen_s in (since_s, until_s):
        patience.serves(CHAT, seen_s)
    patience.breaks(CHAT, until_s)


def test_what_breaks_after_it_has_served_for_long_is_planned_at_once_however_often_it_failed_before() -> None:
    patience = Patience()
    for _ in range(5):
        waits_s(patience)

    serve_and_break(patience, 100.0, 3700.0)

    assert patience.allows(CHAT, 3700.0)
    assert waits_s(patience, now_s=3700.0) == RETRY_PLAN_S, "and it is not said to have failed"

    serve_and_break(patience, 3703.0, 3703.0 + STEADY_S)
    assert patience.allows(CHAT, 3703.0 + STEADY_S)


def test_what_dies_of_its_first_answer_is_mended_once_at_once_and_then_ever_more_rarely() -> None:
    patience, now_s, pauses = Patience(), 100.0, []
    for _ in range(9):
        waits_s(patience, now_s=now_s)
        now_s += 200.0  # it is loaded for longer than the longest wait, so that this one is over
        serve_and_break(patience, now_s, now_s + STEADY_S - 1)
        now_s += STEADY_S - 1
        pauses.append(next(s for s in range(1000) if patience.allows(CHAT, now_s + s)))
        now_s += pauses[-1]

    assert pauses[:4] == [0, 2 * RETRY_PLAN_S, 4 * RETRY_PLAN_S, 8 * RETRY_PLAN_S]
    assert pauses[-1] == RETRY_PLAN_AT_MOST_S


def test_service_counts_as_long_only_without_a_break() -> None:
    patience = Patience()
    waits_s(patience)

    serve_and_break(patience, 200.0, 200.0 + STEADY_S - 1)
    patience.serves(CHAT, 200.0 + STEADY_S)  # it came back by itself
    patience.breaks(CHAT, 200.0 + STEADY_S + 1)

    assert not patience.allows(CHAT, 200.0 + STEADY_S + 1)


def test_nodes_that_leave_one_after_another_do_not_make_plans_vain() -> None:
    patience = Patience()
    waits_s(patience)
    serve_and_break(patience, 200.0, 201.0)  # the break that is mended at once
    waits_s(patience, now_s=201.0)

    patience.serves(CHAT, 210.0)
    patience.drains(CHAT)
    patience.breaks(CHAT, 211.0)

    assert patience.allows(CHAT, 211.0)


def retire(stage: int, node: str = "a") -> Addressed:
    shard = ShardId(deployment=CHAT, plan_epoch=1, stage=stage)
    return Addressed(node=NodeId(node), order=Retire(fencing_epoch=1, shard=shard))


def test_an_order_is_given_at_once_and_again_only_after_a_while() -> None:
    ordering = Ordering()

    assert ordering.due([retire(0)], 10.0) == [retire(0)]
    assert ordering.due([retire(0), retire(1), retire(0, "b")], 10.1) == [retire(1), retire(0, "b")]
    assert ordering.due([retire(0)], 10.0 + AGAIN_AFTER_S) == [retire(0)]


def test_what_is_remembered_of_orders_is_bounded() -> None:
    ordering = Ordering()
    for stage in range(1001):
        ordering.due([retire(stage)], float(stage))

    assert len(ordering._not_before_s) == 500
    assert ordering.due([retire(1000)], 1000.1) == [], "the newest are the ones that are kept"
