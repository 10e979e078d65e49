"""A node's name."""

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shoal.errors import CorruptFileError
from shoal.trust.identity import load_or_create, node_id


def test_a_node_keeps_its_name_over_restarts(tmp_path: Path) -> None:
    first = load_or_create(tmp_path / "node.key")
    second = load_or_create(tmp_path / "node.key")

    assert node_id(first.public_key()) == node_id(second.public_key())


def test_two_nodes_have_two_names_of_thirty_two_characters() -> None:
    names = {node_id(Ed25519PrivateKey.generate().public_key()) for _ in range(8)}

    assert len(names) == 8
    assert all(len(name) == 32 and name.isalnum() and name == name.lower() for name in names)


def test_a_known_key_has_a_known_name() -> None:
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))

    assert node_id(key.public_key()) == "khytmww5sb6d3sxk3d5osdh6kwicmobe"


def test_only_the_owner_can_read_the_key(tmp_path: Path) -> None:
    load_or_create(tmp_path / "node.key")

    assert stat.S_IMODE((tmp_path / "node.key").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "content", [b"", b"not a key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_a_damaged_key_is_an_error_and_not_a_new_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "node.key").write_bytes(content)

    with pytest.raises(CorruptFileError, match="new name"):
        load_or_create(tmp_path / "node.key")

    assert (tmp_path / "node.key").read_bytes() == content
