"""What a pipeline makes of a stage that was started anew in its middle: it begins another run.

Whoever sends to that stage notices, for another worker answers its hello.  The word travels up with the credits, as a count, for
one that is lost is said again a second later; the first stage ends what it serves as `shard_lost` and begins another run, so that
every stage forgets what the new one has never seen.  Without it the first stage would wait for answers that never come, until
a probe finds that out, and the slots of those answers would stay taken as long.
"""

from shoal.errors import ShardLostError
from shoal.runtime.effects import Effect, FollowerMet, SendCredit
from shoal.runtime.frames import CreditFrame
from shoal.runtime.stage_state import StageState, release


def meet(state: StageState, met: FollowerMet) -> list[Effect]:
    """Another worker is the next stage; one of a version that says no birth counts as the one that was there.

    Behind the last stage there is the first one, which begins a run of its own.
    """
    before, state.follower_birth = state.follower_birth, met.birth or state.follower_birth
    if not before or before == state.follower_birth or state.last is not None:
        return []
    state.renewals_behind = 0
    return _renewed(state)


def hear_of(state: StageState, frame: CreditFrame) -> list[Effect]:
    """The next stage says how often a stage behind it was started anew: what a stage hears first is old news."""
    before, state.renewals_behind = state.renewals_behind, frame.renewals
    return _renewed(state) if before is not None and before != frame.renewals else []


def _renewed(state: StageState) -> list[Effect]:
    state.renewals += 1
    if state.first is None:
        return [SendCredit(frame=state.credit(-1))]
    slots = {*state.slots.held, *state.slots.kept}
    ended = state.first.begin_again(ShardLostError.code, "a stage of the pipeline was lost and started anew")
    state.run = state.first.settings.run
    state.slots.clear()
    state.edge.renew()
    state.edge.outbox.append((state.first.empty_frame(), {}))  # the others forget at once, not with the next request
    return [*ended, *release(state, slots)]
