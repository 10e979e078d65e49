"""Profiles for people: what each device and each link was measured to do.  Pure: a profile in, something to print out."""

from collections.abc import Iterable, Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shoal.ids import NodeId
from shoal.plan.figures import duration, share, size
from shoal.profile.fit import KindFit, fit
from shoal.profile.fleet import BlockTrial, Declared, DeviceProfile, FleetProfile, LinkProfile
from shoal.profile.trial import CHUNKS, LONG_CONTEXT

Names = Mapping[NodeId, str]


def render_profile(profile: FleetProfile, names: Names | None = None) -> RenderableType:
    """Devices, trials and links as tables."""
    known = names or {}
    parts: list[RenderableType] = [Text(f"profile epoch {profile.profile_epoch}"), Text(), _devices(profile, known)]
    if any(device.declared != Declared() for device in profile.devices):
        parts += [Text(), Text("declared, not measured"), _declared(profile, known)]
    if any(device.trials for device in profile.devices):
        parts += [Text(), _trials(profile, known)]
    if profile.links:
        parts += [Text(), _links(profile.links, known)]
    return Group(*parts)


def render_speeds(profile: FleetProfile, names: Names | None = None) -> RenderableType:
    """The same in brief, for 80 columns and a few devices, in the order of *names*: what a block of each kind takes, as fitted."""
    known = names or {}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("BLOCK KIND")
    devices = sorted(profile.devices, key=lambda d: [*known, d.node].index(d.node))
    for device in devices:
        table.add_column(_name(device.node, known), justify="right")
    fits = [fit(device.trials) for device in devices]
    for kind in dict.fromkeys(kind for fitted in fits for kind in fitted):
        table.add_row(kind[:8], *(_speeds(fitted.get(kind)) for fitted in fits))
    table.add_row("each call", *(duration(device.step_overhead_s) for device in devices))
    told = f"time of a block for 1 token after {LONG_CONTEXT} / for the first {CHUNKS[-1]} tokens of a prompt"
    return Group(Text(f"{told}; `shoal profile` shows all trials", style="dim"), table)


def _speeds(fitted: KindFit | None) -> str:
    if fitted is None:
        return "-"
    return f"{duration(fitted.decode_s(LONG_CONTEXT))} / {duration(fitted.step_s(CHUNKS[-1], 0))}"


def _devices(profile: FleetProfile, names: Names) -> Table:
    table = _table(
        "NODE", "CORES", "THREADS", "MEMORY", "BUDGET", "STEP OVERHEAD", "LIVE", "TRIALS TOOK", "ENGINE", "FINGERPRINT"
    )
    for device in profile.devices:
        table.add_row(
            _name(device.node, names),
            str(device.cores),
            str(device.threads),
            size(device.memory_total_bytes),
            size(device.memory_budget_bytes),
            duration(device.step_overhead_s),
            _live(device.factor),
            _took(device.trials_took_s, cached=device.cached),
            ", ".join(device.providers) or "-",
            device.fingerprint[:8],
        )
    return table


def _declared(profile: FleetProfile, names: Names) -> Table:
    table = _table("NODE", "WATTS", "PRICE PER HOUR", "J PER MB SENT", "REGION", "TRUST")
    for device in profile.devices:
        said = device.declared
        rates = (said.watts, said.price_per_hour, said.joules_per_byte * 1e6)
        table.add_row(
            _name(device.node, names),
            *(f"{rate:.4g}" if rate else "-" for rate in rates),
            said.region or "-",
            said.trust or "-",
        )
    return table


def _trials(profile: FleetProfile, names: Names) -> Table:
    table = _table("NODE", "BLOCK KIND", "ROWS", "CONTEXT", "BATCH", "TIME", "SPREAD", "FIT MISSES BY")
    for device in profile.devices:
        residuals = {kind: fitted.residual for kind, fitted in fit(device.trials).items()}
        for trial in sorted(device.trials, key=_order):
            table.add_row(*_trial_row(device, trial, names), f"{residuals.get(trial.kind, 0.0):.1%}")
    return table


def _trial_row(device: DeviceProfile, trial: BlockTrial, names: Names) -> Iterable[str]:
    numbers = (trial.rows, trial.context, trial.batch)
    times = (duration(trial.time_s), f"+-{share(trial.spread_s, trial.time_s)}")
    return (_name(device.node, names), trial.kind[:12], *map(str, numbers), *times)


def _order(trial: BlockTrial) -> tuple[str, int, int, int]:
    return trial.kind, trial.batch, trial.rows, trial.context


def _links(links: Iterable[LinkProfile], names: Names) -> Table:
    table = _table("FROM", "TO", "ROUND TRIP P50", "P99", "JITTER", "OF", "BANDWIDTH", "LIVE", "PROBE TOOK", "")
    for link in links:
        table.add_row(
            _name(link.source, names),
            _name(link.target, names),
            duration(link.rtt_p50_s),
            duration(link.rtt_p99_s),
            f"+-{duration(link.jitter_s)}",
            str(link.round_trips or "-"),
            f"{size(link.bytes_per_s)}/s",
            _live(link.factor),
            _took(link.probe_s, cached=link.cached),
            "relayed" if link.relayed else "",
        )
    return table


def _live(factor: float) -> str:
    """How many times as long it takes by what is served; nothing to say where it is as measured, or was not seen since."""
    return f"x{factor:.2f}" if factor != 1.0 else "-"


def _took(seconds_s: float, *, cached: bool) -> str:
    said = duration(seconds_s) if seconds_s else "-"
    return f"{said}, cached" if cached else said


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _name(node: NodeId, names: Names) -> str:
    return names.get(node, node)
