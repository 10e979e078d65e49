"""What a stage makes of time passing: signs of life, silence of the next stage, frames of which nothing has come back."""

from shoal.errors import ShardLostError
from shoal.runtime.effects import Effect, SendSent, Suspect, Tick
from shoal.runtime.frames import SentFrame
from shoal.runtime.stage_state import StageState


def watch(state: StageState, tick: Tick) -> list[Effect]:
    """Take the time, say what is due, and notice what has been silent for too long."""
    state.tell_time(tick.now_s)
    if tick.heard_s is not None and state.began_s is not None:
        state.edge.hear(tick.heard_s - state.began_s)
    due = (state.first.overdue() if state.first is not None else []) + _beat(state)
    if state.running is not None:  # nobody is waited for but our own engine
        return due
    return due + _suspect(state) + _ask(state)


def _beat(state: StageState) -> list[Effect]:
    """Signs of life for the gateways; also covers requests that wait for a slot."""
    if state.first is None or state.now_s - state.beaten_s < state.settings.heartbeat_s:
        return []
    state.beaten_s = state.now_s
    return state.first.signs_of_life()


def _suspect(state: StageState) -> list[Effect]:
    """Notice that the pipeline does not work any more, or works again; then end what is served, here and for good."""
    before, state.trouble = state.trouble, _trouble(state)
    if before or not state.trouble:
        return []
    ended = state.first.abandon(ShardLostError.code, state.trouble) if state.first else []
    return [Suspect(trouble=state.trouble), *ended]


def _trouble(state: StageState) -> str:
    settings = state.settings
    if state.edge.silent_s(state.now_s) > settings.overdue_s:
        after = (settings.index + 1) % settings.stages
        return f"stage {after} has shown no sign of life for {settings.overdue_s:g} s"
    if state.first is not None:
        state.first.flights.watch()
        if state.first.flights.stuck:
            return f"every stage lives, but no answer has come out of the pipeline for {settings.lost_s:g} s"
    return ""


def _ask(state: StageState) -> list[Effect]:
    """What became of frames that have been out for a while?  (See `edge`; alone, there is nobody to ask.)"""
    settings, edge = state.settings, state.edge
    if state.first is not None and settings.stages > 1 and not edge.outbox:
        probe = state.first.probe({step for step, _ in edge.unacked})
        edge.outbox.extend([(probe, {})] if probe else [])
    newest = edge.reminder(state.now_s, settings.remind_s)
    return (
        []
        if newest is None
        else [SendSent(frame=SentFrame(plan_epoch=settings.plan_epoch, step=newest, run=state.run or 0))]
    )
