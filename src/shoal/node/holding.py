"""What an agent asks of its store: bring the chunks of a shard here, and say which models are here whole."""

import contextlib
import re
from collections.abc import Callable

import anyio
import anyio.from_thread
import anyio.to_thread

from shoal.errors import ShoalError, UnavailableError
from shoal.fleet.order import Hold
from shoal.ids import Digest
from shoal.node.artifacts import Artifacts, fetch_artifact, fetch_shard
from shoal.store.fetch import Fetcher
from shoal.store.home import Store, missing_bytes


async def fetch_hold(
    store: Store, fetcher: Fetcher, artifacts: Artifacts, hold: Hold, arrived: Callable[[int], None]
) -> None:
    """Bring the chunks of a shard here; *arrived* is called on the event loop.  Cancelled, it ends with the next piece.

    A relay needs none, not even the graph.
    """
    if hold.is_relay:
        return

    def tell(size_bytes: int) -> None:
        anyio.from_thread.check_cancelled()
        anyio.from_thread.run_sync(arrived, size_bytes)

    def work() -> None:
        try:
            artifact = fetch_artifact(fetcher, artifacts, hold.manifest, hold.sources)
            fetch_shard(fetcher, artifact, (hold.start, hold.stop), hold.sources, tell)
            if hold.draft:
                with contextlib.suppress(UnavailableError):  # a stage that recovers elsewhere goes on without guesses
                    draft = fetch_artifact(fetcher, artifacts, hold.draft, hold.sources)
                    fetch_shard(fetcher, draft, (0, len(draft.blocks)), hold.sources, tell)
        except UnavailableError as error:
            if type(error) is not UnavailableError:
                raise  # a node that does not answer or a full disk: nothing is lost
            raise UnavailableError(f"{error.message}; {pull_again(store, hold.manifest)}") from error

    await anyio.to_thread.run_sync(work)


def pull_again(store: Store, digest: Digest) -> str:
    """What to type when chunks of a model are nowhere any more; where it came from is known as long as its manifest is."""
    for name in store.library.names():
        with contextlib.suppress(ShoalError):
            if store.library.digest(name) == digest:
                origin = store.library.read(name).origin
                reference = origin.reference if origin is not None else name
                where = re.sub("^file:", "PATH/", reference)  # of a file only its name is kept
                renamed = "" if where == name else f" --name {name}"
                return f"bring them back with `shoal pull {where}{renamed}`"
    return "bring them back with `shoal pull`, then deploy the model again"


def complete_manifests(store: Store) -> tuple[Digest, ...]:
    """Models of which every chunk is here; one that is damaged or just being removed is not (`shoal models` names it)."""
    found = []
    for name in store.library.names():
        with contextlib.suppress(ShoalError):
            if not missing_bytes(store, store.library.read(name)):
                found.append(store.library.digest(name))
    return tuple(found)
