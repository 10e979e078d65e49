"""A node's name is the hash of its public key, from its first start on (ADR 5): names cannot be claimed without the key."""

import base64
import os
from pathlib import Path

from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from shoal.errors import CorruptFileError
from shoal.ids import NodeId

_ID_BYTES = 20


def node_id(key: Ed25519PublicKey) -> NodeId:
    """The first 160 bits of BLAKE3 over the raw Ed25519 public key (32 bytes, RFC 8032), as 32 base-32 characters."""
    raw = key.public_bytes(Encoding.Raw, PublicFormat.Raw)
    return NodeId(base64.b32encode(blake3(raw).digest()[:_ID_BYTES]).decode().lower())


def load_or_create(path: Path) -> Ed25519PrivateKey:
    """The node's private key (PKCS#8 PEM, readable by its owner only); made at the first start.

    Raises CorruptFileError when the file is there but is not an Ed25519 key: a new name must be the owner's decision.
    """
    if not path.exists():
        _write_new(path, Ed25519PrivateKey.generate())
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except ValueError as error:
        raise _broken(path) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _broken(path)
    return key


def _write_new(path: Path, key: Ed25519PrivateKey) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _broken(path: Path) -> CorruptFileError:
    return CorruptFileError(
        f"{path} is not an Ed25519 private key",
        hint="restore it from a backup, or remove it: the node then joins under a new name",
    )
