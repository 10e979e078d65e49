"""What flags change of a problem file.

A flag replaces what the file says; one that was not given leaves it.  A file's times hold for its context alone, so that another
context is refused: it would be priced wrongly.
"""

from pathlib import Path

from msgspec.structs import replace

from shoal.cli.files import read_cloud
from shoal.cli.plan_flags import Activations, AskFlags, DemandFlags, parse_pin
from shoal.errors import InvalidRequestError
from shoal.plan.problem import Choose, Pin, Problem, Relays, Residency


def with_flags(stated: Problem, ask: AskFlags, demands: DemandFlags) -> Problem:
    """A file's problem with what the flags ask and demand; raises InvalidRequestError, or SettingsError for a pin."""
    return with_demands(_asked(stated, ask), demands, ask.cloud)


def with_demands(stated: Problem, demands: DemandFlags, cloud: Path | None = None) -> Problem:
    """A file's problem with what flags demand besides; a flag replaces what the file says."""
    limits, rule = demands.limits(), demands.residency()
    kept = {name: getattr(limits, name) for name in limits.__struct_fields__ if getattr(limits, name) is not None}
    changed = replace(stated, limits=replace(stated.limits, **kept))
    if cloud is not None:
        changed = replace(changed, cloud=read_cloud(cloud))
    changed = changed if rule == Residency() else replace(changed, residency=rule)
    if demands.activations is not Activations.EXACT:
        raise InvalidRequestError(
            "--activations has no part in a problem of a file: its blocks say how many bytes they send",
            hint="state the problem with it: `shoal plan MODEL --activations ...`",
            param="activations",
        )
    if demands.draft:
        raise InvalidRequestError(
            "--draft has no part in a problem of a file: its devices say what memory is taken",
            hint="state the problem with it: `shoal plan MODEL --draft ...`",
            param="draft",
        )
    match demands.relays:
        case Relays.IF_NEEDED:  # not said: what the file says
            return changed
        case Relays.NEVER | Relays.ALWAYS as said:
            return replace(changed, relay=said is Relays.ALWAYS, relay_if_needed=False)


def _asked(stated: Problem, ask: AskFlags) -> Problem:
    if ask.context not in {None, stated.shape.context_tokens}:
        raise InvalidRequestError(
            f"the file's times are those at a context of {stated.shape.context_tokens}, not of {ask.context}",
            hint="leave out --context, or state a problem with the times at that context",
            param="context",
        )
    shape, choose = stated.shape, stated.choose
    said = {"batch": ask.batch, "in_flight": ask.in_flight, "slots": ask.slots}
    shape = replace(shape, **{name: number for name, number in said.items() if number})
    shape = replace(shape, cache_tokens=ask.cache_tokens or shape.cache_tokens)
    if choose != Choose():  # what is said is not to be chosen
        fixed = {"batch": (), "in_flight": 0, "slots": 0}
        choose = replace(choose, **{name: none for name, none in fixed.items() if said[name]})
    return replace(
        stated,
        shape=shape,
        choose=choose,
        objective=ask.objective or stated.objective,
        stages_exactly=ask.stages or stated.stages_exactly,
        pins=_pinned(stated, ask),
    )


def _pinned(stated: Problem, ask: AskFlags) -> tuple[Pin, ...]:
    known = [(str(device.node), device.node) for device in stated.devices]
    asked = [parse_pin(text, known) for text in ask.pins or ()]
    kept = [pin for pin in stated.pins if pin.block not in {new.block for new in asked}]
    return (*kept, *asked)
