"""The options by which a plan is asked for: said once for `plan` and `serve`, and taken whole (see `spread`)."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from shoal.cli.files import read_cloud
from shoal.client.calls import PlanOptions
from shoal.errors import SettingsError
from shoal.fleet.views import NodeView
from shoal.ids import NodeId
from shoal.plan.problem import Choose, Limits, Objective, Pin, Relays, RequestShape, Residency
from shoal.transport.codec import Codec

CONTEXT, SLOTS, MOST_SLOTS = 2048, 2, 16
"""Where nobody says how many; slots for latency, and at most for throughput."""
BATCHES = (1, 2, 4, 8)


class Activations(StrEnum):
    """Codecs by what they mean for an answer; `auto` leaves it to the plan, for each cut."""

    EXACT = "exact"
    FP16 = "fp16"
    INT8_PEAKS = "int8+peaks"
    INT8 = "int8"
    AUTO = "auto"


_CODECS = {
    Activations.EXACT: Codec.RAW,
    Activations.FP16: Codec.FP16,
    Activations.INT8_PEAKS: Codec.INT8_PEAKS,
    Activations.INT8: Codec.INT8,
    Activations.AUTO: Codec.INT8,
}


class AskFlags(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be planned."""

    context: Annotated[
        int | None, typer.Option(help="Positions that one request may use, prompt and answer; by default 2048.", min=16)
    ] = None
    slots: Annotated[
        int,
        typer.Option(help="Requests whose cache is held at once; 0: 2, and for throughput as many as pay off.", min=0),
    ] = 0
    cache_tokens: Annotated[
        int,
        typer.Option(
            "--cache-tokens",
            help="Positions of cache that all slots share; 0: a whole context for each. Requests wait until theirs fit.",
            min=0,
        ),
    ] = 0
    batch: Annotated[
        int, typer.Option(help="Sequences stepped together; 0: 1, and for throughput the planner decides.", min=0)
    ] = 0
    in_flight: Annotated[
        int, typer.Option(help="Batches in the pipeline at once; 0: 1, and for throughput the planner decides.", min=0)
    ] = 0
    stages: Annotated[int, typer.Option(help="Exactly this many stages; 0: the planner decides.", min=0)] = 0
    pins: Annotated[
        list[str] | None, typer.Option("--pin", help="BLOCK=NODE: run this block there; may be repeated.")
    ] = None
    objective: Annotated[
        Objective | None,
        typer.Option(
            "--objective", help="What the plan is judged by; by default latency, or what a problem file says."
        ),
    ] = None
    cloud: Annotated[
        Path | None, typer.Option(help="Weigh this endpoint beside the plan: a JSON file of a `Cloud`.")
    ] = None

    def shape(self) -> RequestShape:
        """A typical request, with what was not said at its least."""
        batch, in_flight = self.batch or 1, self.in_flight or 1
        slots = self.slots or max(SLOTS, batch * in_flight)
        return RequestShape(
            context_tokens=self.context or CONTEXT,
            slots=slots,
            cache_tokens=self.cache_tokens,
            batch=batch,
            in_flight=in_flight,
        )

    def choose(self) -> Choose:
        """For throughput, what was not said is to be chosen."""
        if self.objective is not Objective.THROUGHPUT or (self.batch and self.in_flight):
            return Choose()
        return Choose(
            batch=(self.batch,) if self.batch else BATCHES,
            in_flight=0 if self.in_flight else MOST_SLOTS,
            slots=0 if self.slots else max(MOST_SLOTS, self.batch, self.in_flight),
        )


class DemandFlags(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan must keep to whatever it is judged by."""

    max_latency: Annotated[float | None, typer.Option(help="Seconds that a typical request may take.", min=0.0)] = None
    max_first_token: Annotated[float | None, typer.Option(help="Seconds until its first token, at most.", min=0.0)] = (
        None
    )
    min_tokens_per_s: Annotated[
        float | None, typer.Option("--min-tokens-per-s", help="Of all streams together, at least.", min=0.0)
    ] = None
    max_joules: Annotated[float | None, typer.Option(help="Energy of a request, from declared watts.", min=0.0)] = None
    max_price: Annotated[float | None, typer.Option(help="Money of a request, from declared prices.", min=0.0)] = None
    regions: Annotated[str, typer.Option(help="Regions that activations may enter, with commas; empty: all.")] = ""
    trusts: Annotated[str, typer.Option(help="Trust classes that activations may enter, with commas; empty: all.")] = ""

    relays: Annotated[
        Relays,
        typer.Option(
            help="Whether frames may pass through a node without blocks: never, where no plan goes without, or always."
        ),
    ] = Relays.IF_NEEDED

    activations: Annotated[
        Activations,
        typer.Option(
            help="What passes from stage to stage: bit for bit, in half precision, or as 8-bit integers per token, with or "
            "without its four largest values apart; "
            "auto: as the plan finds worth its loss for each link."
        ),
    ] = Activations.EXACT

    draft: Annotated[
        str, typer.Option(help="A small model of this machine, with the same tokenizer, that guesses tokens ahead.")
    ] = ""

    def limits(self) -> Limits:
        """Bounds on predicted figures."""
        return Limits(
            latency_s=self.max_latency,
            time_to_first_token_s=self.max_first_token,
            tokens_per_s=self.min_tokens_per_s,
            joules=self.max_joules,
            price=self.max_price,
        )

    def residency(self) -> Residency:
        """Where activations may be."""
        return Residency(regions=_words(self.regions), trusts=_words(self.trusts))


ASK = AskFlags()
DEMANDS = DemandFlags()


def options(ask: AskFlags, demands: DemandFlags, nodes: Sequence[NodeView]) -> PlanOptions:
    """What the flags ask of the planner; raises SettingsError for a pin that cannot be read."""
    known = [(n.name, n.id) for n in nodes]
    return PlanOptions(
        shape=ask.shape(),
        choose=ask.choose(),
        cloud=None if ask.cloud is None else read_cloud(ask.cloud),
        objective=ask.objective or Objective.LATENCY,
        stages=ask.stages,
        pins=tuple(parse_pin(text, known) for text in ask.pins or ()),
        limits=demands.limits(),
        residency=demands.residency(),
        relays=demands.relays,
        activations=_CODECS[demands.activations],
        activations_per_cut=demands.activations is Activations.AUTO,
        draft=demands.draft,
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def parse_pin(text: str, known: Sequence[tuple[str, NodeId]]) -> Pin:
    """`BLOCK=NODE`, of nodes with their names: by name, else by the beginning of the id; raises SettingsError."""
    block, mark, wanted = text.partition("=")
    named = [node for name, node in known if name == wanted]
    found = named or [node for _, node in known if wanted and node.startswith(wanted)]
    if not mark or not block.isdigit() or len(found) != 1:
        names = ", ".join(name for name, _ in known)
        raise SettingsError(
            f"pin {text!r} cannot be read", hint=f"write BLOCK=NODE, for example 0=NAME; nodes: {names or 'none'}"
        )
    return Pin(block=int(block), node=found[0])
