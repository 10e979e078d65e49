"""What the journal of a home says that must not be lost."""

from pathlib import Path

import msgspec
import pytest

from shoal.errors import CorruptFileError
from shoal.fleet.deployment import Deployment
from shoal.fleet.order import Hold
from shoal.fleet.reconcile import Phase
from shoal.fleet.report import ShardId
from shoal.fleet.spec import DeploymentSpec
from shoal.fleet.view import CoordinatorView, DeploymentStatus, Lease
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.node.in_use import in_use, journal_file
from shoal.node.journal import Journal
from shoal.node.last_plan import remember

ME = NodeId("m" * 32)


def deployment(name: str, manifest: str) -> Deployment:
    spec = DeploymentSpec(deployment=DeploymentId(name), model="m", manifest=Digest(manifest), source=ME)
    return Deployment(spec=spec)


def hold(name: str, manifest: str) -> Hold:
    shard = ShardId(deployment=DeploymentId(name), plan_epoch=1, stage=0)
    return Hold(
        fencing_epoch=1, shard=shard, stages=1, manifest=Digest(manifest), start=0, stop=1, slots=1,
        context_tokens=16, in_flight=1, memory_bytes=1, sources=(),
    )  # fmt: skip


def test_deployments_holds_and_the_last_view_name_manifests(tmp_path: Path) -> None:
    journal = Journal(journal_file(tmp_path))
    for name in ("chat", "again"):
        journal.put("deployment", name, deployment(name, "own"))
    journal.put("hold", "x", hold("theirs", "held"))
    status = DeploymentStatus(deployment=deployment("far", "heard"), phase=Phase.SERVING)
    remember(journal, CoordinatorView(lease=Lease(holder=ME, fencing_epoch=1), sequence=1, deployments=(status,)))

    found = in_use(tmp_path)  # while the node still has its journal open

    assert found == {"own": {"chat", "again"}, "held": {"theirs"}, "heard": {"far"}}
    journal.close()
    assert in_use(tmp_path) == found


def test_a_model_that_guesses_for_another_is_in_use_as_well(tmp_path: Path) -> None:
    journal = Journal(journal_file(tmp_path))
    wanted = deployment("chat", "large")
    spec = msgspec.structs.replace(wanted.spec, draft=Digest("small"))
    journal.put("deployment", "chat", msgspec.structs.replace(wanted, spec=spec))
    journal.put("hold", "x", msgspec.structs.replace(hold("theirs", "held"), draft=Digest("little")))
    journal.close()

    assert in_use(tmp_path) == {"large": {"chat"}, "small": {"chat"}, "held": {"theirs"}, "little": {"theirs"}}


def test_a_home_without_a_journal_uses_nothing_and_gets_none(tmp_path: Path) -> None:
    assert in_use(tmp_path) == {}
    assert not journal_file(tmp_path).exists()


def test_a_record_of_another_version_is_not_guessed_at(tmp_path: Path) -> None:
    journal = Journal(journal_file(tmp_path))
    journal.put("deployment", "chat", Lease(holder=ME, fencing_epoch=1))
    journal.close()

    with pytest.raises(CorruptFileError, match="another version"):
        in_use(tmp_path)
