"""One file over HTTP, resumable: a partial file, and the validator that says whether the server still means the same bytes.

`If-Range` with a strong ETag (RFC 9110, 13.1.5) makes the server choose: the rest (206) when the file is unchanged, all of it
(200) when it is not.  Without a strong ETag nothing is resumed unless the hash is known beforehand, since a mixture of two
versions would be taken for a model.
"""

import contextlib
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import httpx
import msgspec

from shoal.errors import (
    DigestMismatchError,
    InvalidRequestError,
    StorageFullError,
    UnavailableError,
    UnknownModelError,
    UntrustedError,
)
from shoal.model.catalog import HttpsRef
from shoal.node.progress import Progress
from shoal.store.chunk import digest_of
from shoal.store.disk import full_disk_named
from shoal.store.quota import Quota, free_bytes

_TIMEOUT_S = 30.0
_MAX_NAME = 100
_READ_BYTES = 1024 * 1024


class _Validator(msgspec.Struct, frozen=True, kw_only=True):
    etag: str = ""


def partial_path(folder: Path, ref: HttpsRef) -> Path:
    """Where the download of *ref* lies until it is imported: under its own name, which tells importers its format."""
    name = re.sub(r"[^\w. -]", "_", PurePosixPath(unquote(urlsplit(ref.url).path)).name)[-_MAX_NAME:].lstrip(".")
    return folder / digest_of(ref.url.encode())[:32] / (name or "file")


def download(ref: HttpsRef, folder: Path, progress: Progress, quota: Quota | None = None) -> Path:
    """Have all of *ref* at `partial_path`, where it stays until `forget`; None: what may lie on disk is bounded by the disk.

    Raises UnknownModelError (404), InvalidRequestError (no address), UnavailableError (network, server), StorageFullError,
    DigestMismatchError (the partial file is removed).
    """
    part = partial_path(folder, ref)
    with full_disk_named(folder):
        part.parent.mkdir(parents=True, exist_ok=True)
        with _translated(ref.url), httpx.Client(follow_redirects=True, timeout=_TIMEOUT_S) as client:
            _continue(client, ref, part, progress, quota or Quota(None))
    _check(ref, part)
    return part


def _continue(client: httpx.Client, ref: HttpsRef, part: Path, progress: Progress, quota: Quota) -> None:
    """Append what is missing; start over where the server sends everything."""
    have_bytes, headers = _resumption(ref, part)
    with client.stream("GET", ref.url, headers=headers) as response:
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE and have_bytes:
            return  # all of it is here: the check decides
        response.raise_for_status()
        check_redirect(ref, str(response.url))
        resumed = response.status_code == httpx.codes.PARTIAL_CONTENT
        _validator_path(part).write_bytes(msgspec.json.encode(_Validator(etag=response.headers.get("ETag", ""))))
        rest_bytes = int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
        start_bytes = have_bytes if resumed else 0
        if not resumed:
            part.unlink(missing_ok=True)
        check_room(ref.url, part.parent, rest_bytes, quota)
        progress.start("downloading", None if rest_bytes is None else start_bytes + rest_bytes)
        progress.advance(start_bytes)
        with part.open("ab") as file:
            for data in response.iter_raw():  # as it comes: what would wait in a buffer is lost when the line breaks
                with quota.room_for(len(data)):  # not every server says beforehand how much comes
                    file.write(data)
                progress.advance(len(data))
    if rest_bytes is not None and part.stat().st_size != start_bytes + rest_bytes:
        raise httpx.RemoteProtocolError(f"{part.stat().st_size} of {start_bytes + rest_bytes} bytes came")


def check_redirect(ref: HttpsRef, arrived_at: str) -> None:
    """Raise UntrustedError when an encrypted address led to an unencrypted one, unless the bytes' hash is known."""
    if not ref.sha256 and ref.url.startswith("https:") and not arrived_at.startswith("https:"):
        raise UntrustedError(
            f"{ref.url} leads to {arrived_at}, which is not encrypted",
            hint="add #sha256=HEX so that the bytes can be checked",
        )


def _resumption(ref: HttpsRef, part: Path) -> tuple[int, dict[str, str]]:
    """Bytes that may be kept, and the headers that ask for the rest.  Bodies are asked for as they are, unencoded."""
    plain = {"Accept-Encoding": "identity"}
    try:
        etag = msgspec.json.decode(_validator_path(part).read_bytes(), type=_Validator).etag
        have_bytes = part.stat().st_size
    except (FileNotFoundError, msgspec.MsgspecError):
        return 0, plain
    strong = etag.startswith('"')
    if have_bytes == 0 or not (strong or ref.sha256):
        return 0, plain
    return have_bytes, plain | {"Range": f"bytes={have_bytes}-"} | ({"If-Range": etag} if strong else {})


def _validator_path(part: Path) -> Path:
    return part.with_name(part.name + ".validator")


def forget(part: Path) -> None:
    """Remove a download and its validator."""
    shutil.rmtree(part.parent, ignore_errors=True)


def _check(ref: HttpsRef, part: Path) -> None:
    if not ref.sha256:
        return
    actual = sha256_of(part)
    if actual != ref.sha256:
        forget(part)
        raise DigestMismatchError(
            f"{ref.url} has SHA-256 {actual}, asked for is {ref.sha256}",
            hint="check the address and the hash; nothing was imported",
        )


def sha256_of(path: Path, read: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file, hexadecimal; *read* is told of the bytes as they are read."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            sha256.update(data)
            read(len(data))
    return sha256.hexdigest()


def check_room(what: str, folder: Path, needed_bytes: int | None, quota: Quota) -> None:
    """Raise StorageFullError when *needed_bytes* more fit neither into *quota* nor on the disk; None: not known."""
    if needed_bytes is None:
        return
    quota.check(needed_bytes)
    free = free_bytes(folder)
    if needed_bytes > free:
        raise StorageFullError(
            f"{what} has {needed_bytes} bytes to come and {free} are free below {folder}",
            hint="free space (`shoal rm NAME`, `shoal gc`), or set SHOAL_HOME to a folder on a larger disk",
        )


@contextlib.contextmanager
def _translated(url: str) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        if status in {httpx.codes.NOT_FOUND, httpx.codes.GONE}:
            raise UnknownModelError(
                f"{url} does not exist (HTTP {status})", hint="check the address", param="reference"
            ) from error
        raise UnavailableError(
            f"{url} was answered with HTTP {status}", hint="try again later; what came so far is kept"
        ) from error
    # The last is what the resolver makes of impossible hosts, which a redirect may name as well.
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError) as error:
        raise InvalidRequestError(
            f"{url} cannot be asked: {error}", hint="check the address", param="reference"
        ) from error
    except (
        httpx.RequestError
    ) as error:  # the network's, and answers that lead nowhere: endless redirects, broken encodings
        raise UnavailableError(
            f"{url} cannot be downloaded: {str(error) or type(error).__name__}",
            hint="check the network and pull again; what came so far is kept where the server lets it be resumed",
        ) from error
