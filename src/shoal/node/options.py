"""How a node is started: settings and flags, checked together before anything is opened."""

import ipaddress
import re
from collections.abc import Iterable

import msgspec

from shoal.errors import SettingsError
from shoal.ids import NodeId
from shoal.node.worker_spec import LinkShape
from shoal.plan.replan import DWELL_S
from shoal.profile.fleet import Declared

DEFAULT_LISTEN = "tcp/127.0.0.1:7400"
DEFAULT_HTTP_PORT = 8400
_LOCATOR = re.compile(r"^(?:tcp/)?(?P<host>\[[0-9a-fA-F:]+\]|[^:/\s]+):(?P<port>\d{1,5})$")
_HOST = re.compile(r"^(?:\[[0-9a-fA-F:]+\]|[^:/\s\[\]@*]+)$")
_ORIGIN = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*://[^/\s@*]+$")
_LINK = re.compile(r"^(?P<node>[a-z2-7]{32})=(?P<ms>\d+(?:\.\d+)?)ms,(?P<mbit>\d+(?:\.\d+)?)mbit$")


class NodeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """One node.  `http` is None where no gateway is wanted; `slowdown` and `links` emulate a device, for demos."""

    home: str
    name: str
    fleet: str = "shoal"
    listen: str = DEFAULT_LISTEN
    connect: tuple[str, ...] = ()
    http: tuple[str, int] | None = None
    api_keys: str = ""
    allow_hosts: tuple[str, ...] = ()
    """Further names that requests to the gateway may give as `Host`."""
    allow_origins: tuple[str, ...] = ()
    """Web origins whose pages may call it."""
    quota_bytes: int | None = None
    fetch_bytes_per_s: int | None = None
    move_dwell_s: float = DWELL_S
    memory_bytes: int = 0
    """What shards may use; 0: what is free now, less a reserve."""
    threads: int = 0
    """Of the engine, per shard; 0: all cores."""
    coordinates: bool = False
    eager: bool = False
    """Takes the lease at once when nobody is heard (`up`); a standby waits."""
    discover: bool = False
    slowdown: float = 1.0
    declared: Declared = Declared()
    """What the owner says of the node, for plans that weigh joules, money, and where activations may be."""
    links: tuple[LinkShape, ...] = ()


def locator(text: str, *, what: str) -> str:
    """`HOST:PORT` or `tcp/HOST:PORT` as a locator of the fabric; raises SettingsError."""
    found = _LOCATOR.match(text)
    if found is None or int(found["port"]) > 65535:
        raise SettingsError(
            f"{what} {text!r} is no address", hint="write HOST:PORT, for example 192.168.1.10:7400", param=what
        )
    return f"tcp/{found['host']}:{found['port']}"


def host_name(text: str) -> str:
    """A name as `Host` gives it, without port; raises SettingsError."""
    if _HOST.match(text) is None:
        raise SettingsError(
            f"{text!r} is no host name", hint="write the name alone, for example box.local", param="--allow-host"
        )
    return text.lower()


def web_origin(text: str) -> str:
    """An origin as browsers send it; raises SettingsError."""
    if _ORIGIN.match(text) is None:
        raise SettingsError(
            f"{text!r} is no web origin",
            hint="write SCHEME://HOST or SCHEME://HOST:PORT, for example https://chat.example",
            param="--allow-origin",
        )
    return text.lower()


def check_exposed(listen: str, *, expose: bool) -> str:
    """A warning to print when *listen* is reachable from other machines, empty on loopback.

    Raises SettingsError unless the owner said *expose*: until nodes have certificates, whoever reaches the port is trusted.
    """
    host = _host(listen)
    if _is_loopback(host):
        return ""
    if not expose:
        raise SettingsError(
            f"the node would listen on {host}, reachable from other machines, without encryption or identities",
            hint="add --expose if that network is yours alone; or keep the default, which is loopback only",
            param="listen",
        )
    return (
        f"exposed: {listen} takes orders, models, prompts and activations from anybody who reaches it, unencrypted; "
        "use it on a network that is yours alone"
    )


def check_reachable(connect: Iterable[str], listen: str) -> str:
    """A warning to print when a node joins others on other machines and none of them could ever dial it; else empty."""
    far = [address.removeprefix("tcp/") for address in connect if not _is_loopback(_host(address))]
    if not far or not _is_loopback(_host(listen)):
        return ""
    return (
        f"this node joins {', '.join(far)} but listens on loopback only: no node of another machine can dial it, so it may "
        "hold whole models but no stage of a pipeline; add --listen ADDRESS_OF_THIS_MACHINE:7400 --expose"
    )


def _host(address: str) -> str:
    return address.removeprefix("tcp/").rpartition(":")[0].strip("[]")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_link(text: str) -> LinkShape:
    """`NODE=10ms,50mbit`: an emulated link to a node; raises SettingsError."""
    found = _LINK.match(text)
    if found is None or not float(found["mbit"]):
        raise SettingsError(
            f"link {text!r} cannot be read", hint="write NODE_ID=LATENCYms,RATEmbit, for example ...=10ms,50mbit"
        )
    return LinkShape(
        target=NodeId(found["node"]),
        latency_s=float(found["ms"]) / 1000,
        bytes_per_s=float(found["mbit"]) * 1e6 / 8,
    )
