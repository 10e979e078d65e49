"""Which models this machine must not lose, whatever their names: those that its journal says are served, or held in part.

A worker keeps its weights mapped, so a model whose files are gone goes on answering - until its next start finds no chunk.
The journal is asked, not the node: a model that is served from its first start to its last is also in use while it is down.
"""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from shoal.errors import CorruptFileError
from shoal.fleet.deployment import Deployment
from shoal.fleet.order import Hold
from shoal.ids import DeploymentId, Digest
from shoal.node.journal import Journal
from shoal.node.last_plan import recall

InUse = Mapping[Digest, frozenset[DeploymentId]]
"""Manifests, each with the deployments that need it."""


def journal_file(home: Path) -> Path:
    """Where a node of this home keeps its journal."""
    return home / "journal.db"


def in_use(home: Path) -> InUse:
    """What a node of *home* serves, serves when it is started again, or holds for another's deployment.

    Raises CorruptFileError: what a journal that cannot be read names must not be thrown away on a guess.
    """
    path = journal_file(home)
    if not path.exists():
        return {}
    journal = Journal(path)
    try:
        return _named(journal)
    except msgspec.MsgspecError as error:
        raise CorruptFileError(
            f"{path} holds a record of another version ({error})", hint="start the node once with `shoal up`"
        ) from error
    finally:
        journal.close()


def _named(journal: Journal) -> InUse:
    # The last view counts as well: a deployment that another node coordinates stands in no other record here.
    view = recall(journal)
    wanted = [*journal.all("deployment", Deployment), *(s.deployment for s in (view.deployments if view else ()))]
    pairs = [(digest, d.spec.deployment) for d in wanted for digest in (d.spec.manifest, d.spec.draft)]
    holds = journal.all("hold", Hold)
    pairs += [(digest, hold.shard.deployment) for hold in holds for digest in (hold.manifest, hold.draft)]
    pairs = [(digest, name) for digest, name in pairs if digest]  # most have no draft model
    return {manifest: frozenset(name for m, name in pairs if m == manifest) for manifest, _ in pairs}
