"""From a command to the gateway that it is about."""

import os
from pathlib import Path

import msgspec

from shoal.client import Shoal
from shoal.errors import NodeUnreachableError
from shoal.node.assemble import Running, running_file
from shoal.node.settings import read_settings

URL_HELP = "The gateway to ask; by default $SHOAL_URL, else the node that runs on this machine."


def find_url(url: str = "") -> str:
    """The gateway's address; raises NodeUnreachableError when none is named and no node runs here."""
    if url or os.environ.get("SHOAL_URL"):
        return url or os.environ["SHOAL_URL"]
    running = local_node()
    if running is None:
        raise NodeUnreachableError(
            "no node runs on this machine", hint="start one with `shoal up`, or name one with --url"
        )
    if not running.url:
        raise NodeUnreachableError(
            f"node {running.name} has no gateway", hint="name the fleet's gateway with --url http://HOST:PORT"
        )
    return running.url


def local_node() -> Running | None:
    """The node that runs from this user's home, or None."""
    try:
        data = running_file(Path(read_settings().home)).read_bytes()
        return msgspec.json.decode(data, type=Running)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def connect(url: str = "") -> Shoal:
    """The SDK at the gateway that `find_url` finds, with `$SHOAL_API_KEY`."""
    return Shoal(find_url(url), api_key=api_key())


def api_key() -> str | None:
    """`$SHOAL_API_KEY`, or None."""
    return os.environ.get("SHOAL_API_KEY") or None
