"""A node's fetch in a process of its own: `python -m bench.bulk.fetching` with what to fetch, as JSON, on standard input.

It brings the chunks of a model through the agent beside it, as that agent would, and prints how many bytes have arrived four times
a second.  It ends when it is told to, or has everything.
"""

import sys
import threading
import time
from pathlib import Path

import msgspec

from shoal.ids import Digest, NodeId
from shoal.store.fetch import Fetcher
from shoal.store.home import open_store
from shoal.store.manifest import ChunkRef, Manifest
from shoal.store.pace import Pacer
from shoal.transport.zenoh import open_control

_SAY_EVERY_S = 0.25


class Errand(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be fetched, by whom and from whom; *gently* as beside a model that is served."""

    home: str
    agent: str
    fleet: str
    source: NodeId
    model: Digest
    gently: bool


def run(errand: Errand) -> None:
    """Fetch every chunk of the model."""
    arrived = [0]

    def count(size_bytes: int) -> None:
        arrived[0] += size_bytes

    def say() -> None:
        while True:
            print(arrived[0], flush=True)
            time.sleep(_SAY_EVERY_S)

    threading.Thread(target=say, daemon=True).start()
    bus = open_control(errand.agent)
    pacer = Pacer(yields=lambda: errand.gently)
    fetcher = Fetcher(bus, errand.fleet, open_store(Path(errand.home)), pacer=pacer)
    fetcher.model(errand.model, (errand.source,), _all_of, arrived=count)


def _all_of(manifest: Manifest) -> list[ChunkRef]:
    return [ChunkRef(digest=digest, size_bytes=size) for digest, size in manifest.chunks().items()]


if __name__ == "__main__":
    run(msgspec.json.decode(sys.stdin.readline(), type=Errand))
