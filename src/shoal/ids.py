"""Names of things, as types that do not mix."""

from typing import NewType

NodeId = NewType("NodeId", str)
"""Hash of the node's public key: 32 lower-case base-32 characters."""

Digest = NewType("Digest", str)
"""BLAKE3 of a chunk's bytes: 64 lower-case hexadecimal characters."""

DeploymentId = NewType("DeploymentId", str)
"""One served model: the name that API clients put in `model`."""

RequestId = NewType("RequestId", str)
"""One generation or inference; unique within the fleet."""
