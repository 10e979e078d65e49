"""When a plan is tried again, and when an order is given again."""

import pytest

from shoal.fleet.order import Retire
from shoal.fleet.reconcile import Addressed
from shoal.fleet.report import ShardId
from shoal.ids import DeploymentId, NodeId
from shoal.node.ordering import AGAIN_AFTER_S, Ordering
from shoal.node.patience import RETRY_PLAN_AT_MOST_S, RETRY_PLAN_S, Patience

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

    news(patience)  # type: ignore[operator]

    assert patience.allows(CHAT, 100.0)
    assert waits_s(patience) == RETRY_PLAN_S


def test_a_plan_that_came_to_serve_was_not_in_vain() -> None:
    patience = Patience()
    for _ in range(5):
        waits_s(patience)

    patience.serves(CHAT)

    assert patience.allows(CHAT, 100.0), "it breaks a moment later, and is planned at once"
    assert waits_s(patience) == RETRY_PLAN_S


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
