"""The models of this machine by name: one small manifest file each.

The manifest's bytes are what its digest says, so the file is also put into the chunk tier: a node that is told a model's
digest fetches the manifest from its peers as it fetches any chunk.
"""

import re
from pathlib import Path, PurePosixPath

import msgspec

from shoal.errors import CorruptFileError, InvalidRequestError, UnknownModelError, UnsupportedVersionError
from shoal.ids import Digest
from shoal.store.chunk import digest_of, parse_digest
from shoal.store.disk import home_named, sync_all, sync_folder, write_whole
from shoal.store.manifest import MANIFEST_VERSION, Manifest
from shoal.store.tier import Tier

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,95}")


def check_name(name: str) -> str:
    """*name* if models may be called so; raises InvalidRequestError."""
    if _NAME.fullmatch(name):
        return name
    raise InvalidRequestError(
        f"{name!r} is no name for a model",
        hint="use up to 96 lower-case letters, digits, dots, dashes and underscores, for example smollm2-135m",
        param="name",
    )


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes whose digest is the model's version."""
    return msgspec.json.encode(manifest, order="deterministic")


def decode_manifest(data: bytes | memoryview, what: str) -> Manifest:
    """Parse and check; *what* names the source in CorruptFileError and UnsupportedVersionError."""
    try:
        version = msgspec.json.decode(data, type=_Versioned).version
        if version > MANIFEST_VERSION:
            raise UnsupportedVersionError(
                f"{what} is a manifest of version {version}; this Shoal reads up to {MANIFEST_VERSION}",
                hint="upgrade Shoal",
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.MsgspecError as error:
        raise CorruptFileError(
            f"{what} is not a manifest: {error}", hint="remove it and pull the model again"
        ) from error
    _check_paths(manifest, what)
    return manifest


def _check_paths(manifest: Manifest, what: str) -> None:
    """Digests and file names become paths on some machine: a manifest from elsewhere must not choose others."""
    for digest in manifest.chunks():
        if parse_digest(digest) is None:
            raise CorruptFileError(
                f"{what} names a chunk {digest!r}, which is no digest", hint="fetch it from another source"
            )
    for file in manifest.files:
        parts = PurePosixPath(file.name).parts
        if not parts or parts[0] == "/" or ".." in parts or "\\" in file.name:
            raise CorruptFileError(
                f"{what} names a file {file.name!r} outside its folder", hint="fetch it from another source"
            )


class _Versioned(msgspec.Struct):
    version: int = MANIFEST_VERSION


class Library:
    """Manifests at `folder/<name>.json`, and as chunks in *chunks*."""

    def __init__(self, folder: Path, *, tmp: Path, chunks: Tier) -> None:
        self._folder = folder
        self._tmp = tmp
        self._chunks = chunks

    def names(self) -> list[str]:
        """Names of all models, sorted."""
        return sorted(path.stem for path in self._folder.glob("*.json"))

    def find(self, name: str) -> Manifest | None:
        """The model's manifest, or None when there is no such model."""
        data = self._bytes(name)
        return None if data is None else decode_manifest(data, f"{self._path(name)}")

    def read(self, name: str) -> Manifest:
        """The model's manifest; raises UnknownModelError that lists what is there."""
        manifest = self.find(name)
        if manifest is None:
            raise self._unknown(name)
        return manifest

    def digest(self, name: str) -> Digest:
        """The model's version: the digest of its manifest's bytes; raises UnknownModelError."""
        data = self._bytes(name)
        if data is None:
            raise self._unknown(name)
        return digest_of(data)

    def write(self, name: str, manifest: Manifest) -> Digest:
        """Publish *manifest* under *name*, in place of what was there; its chunks should be here already."""
        data = encode_manifest(manifest)
        digest = digest_of(data)
        self._chunks.put(digest, data)
        sync_all()
        write_whole(self._path(name), data, tmp=self._tmp, sync=True)
        return digest

    def adopt(self, manifest: Manifest) -> str:
        """Publish a manifest that came from another node, and return the name it got.

        That is its own, or with its digest appended where another version has that name here.
        """
        data = encode_manifest(manifest)
        digest = digest_of(data)
        own = manifest.spec.name
        name = own if self._bytes(own) in {None, data} else f"{own[:80]}-{digest[:8]}"
        # Publishing waits for the disk: what is here as it should be is left alone.
        if self._bytes(name) != data or self._chunks.get(digest) is None:
            self.write(name, manifest)
        return name

    def remove(self, name: str) -> None:
        """Forget the name; chunks stay until they are collected.  Raises UnknownModelError."""
        try:
            with home_named(self._folder.parent):
                self._path(name).unlink()
        except FileNotFoundError:
            raise self._unknown(name) from None
        sync_folder(self._folder)

    def _bytes(self, name: str) -> bytes | None:
        try:
            return self._path(name).read_bytes()
        except FileNotFoundError:
            return None

    def _path(self, name: str) -> Path:
        return self._folder / f"{check_name(name)}.json"

    def _unknown(self, name: str) -> UnknownModelError:
        names = self.names()
        hint = f"models here: {', '.join(names)}" if names else "no model is here yet: try `shoal pull smollm2-135m`"
        return UnknownModelError(f"there is no model {name!r} on this machine", hint=hint, param="model")
