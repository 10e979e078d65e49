"""From a command to the gateway that it is about."""

import os
from collections.abc import Sequence
from pathlib import Path

from shoal.client import Shoal
from shoal.client.calls import gateway_url
from shoal.errors import InvalidRequestError, NodeUnreachableError
from shoal.fleet.views import NodeView
from shoal.node.running import Running, running_node
from shoal.node.settings import read_settings

DEMO_GATEWAY = "gateway"
"""The demo's node that is asked where no other node runs."""
URL_HELP = "The gateway to ask; by default $SHOAL_URL, else the node that runs on this machine."


def find_url(url: str = "") -> str:
    """The gateway's address; raises SettingsError for one that is none, NodeUnreachableError when no node runs here."""
    named = url or os.environ.get("SHOAL_URL")
    if named:
        return gateway_url(named)
    running = local_node() or running_node(demo_home(DEMO_GATEWAY))
    if running is None:
        raise NodeUnreachableError(
            "no node runs on this machine", hint="start one with `shoal up`, or name one with --url"
        )
    if not running.url:
        raise NodeUnreachableError(
            f"node {running.name} has no gateway", hint="name the fleet's gateway with --url http://HOST:PORT"
        )
    return running.url


def demo_home(device: str) -> Path:
    """Where the demo keeps a node."""
    return Path(read_settings().home) / "demo" / device


def local_node() -> Running | None:
    """The node that runs from this user's home, or None."""
    return running_node(Path(read_settings().home))


def connect(url: str = "") -> Shoal:
    """The SDK at the gateway that `find_url` finds, with `$SHOAL_API_KEY`."""
    return Shoal(find_url(url), api_key=api_key())


def api_key() -> str | None:
    """`$SHOAL_API_KEY`, or None."""
    return os.environ.get("SHOAL_API_KEY") or None


def find_node(wanted: str, nodes: Sequence[NodeView]) -> NodeView:
    """The node of that name, or whose id begins so (four characters at least); raises InvalidRequestError."""
    found = [n for n in nodes if wanted in {n.name, n.id} or (len(wanted) >= 4 and n.id.startswith(wanted))]
    if len(found) != 1:
        names = ", ".join(n.name for n in nodes)
        raise InvalidRequestError(
            f"{len(found) or 'no'} node{'s are' if found else ' is'} called {wanted!r}",
            hint=f"`shoal nodes --json` lists ids; names are: {names}",
            param="node",
        )
    return found[0]
