"""Pulling over HTTP from a server on the loopback that can die in the middle, and change its mind."""

import hashlib
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from shoal.errors import (
    DigestMismatchError,
    InvalidRequestError,
    ShoalError,
    StorageFullError,
    UnavailableError,
    UnknownModelError,
    UnsupportedModelError,
    UntrustedError,
)
from shoal.model.catalog import HttpsRef
from shoal.model.spec import ImportedModel
from shoal.node.download import check_redirect, download, forget, partial_path
from shoal.node.progress import Quiet
from shoal.node.pull import PullRequest, pull
from shoal.store.home import open_store

DATA = bytes(range(256)) * 4000


class Shelf:
    """One file as a server offers it; `cut_after` bytes the connection breaks."""

    def __init__(self) -> None:
        self.data = DATA
        self.etag: str | None = '"v1"'
        self.cut_after: int | None = None
        self.claimed: int | None = None
        self.ranges: list[str | None] = []
        self.sent = 0
        self.says_length = True
        self.stuck: threading.Event | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/models/a%20model.gguf"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def handler(shelf: Shelf) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith(("circle.gguf", "away.gguf")):
                self.send_response(302)
                self.send_header("Location", self.path if "circle" in self.path else "gopher://example.org/m.gguf")
                self.end_headers()
                return
            if not self.path.endswith(".gguf"):
                self.send_error(404)
                return
            wanted = self.headers["Range"]
            shelf.ranges.append(wanted)
            unchanged = self.headers["If-Range"] in {None, shelf.etag}
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and unchanged else 0
            if start >= len(shelf.data):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            if shelf.says_length:
                self.send_header("Content-Length", str(shelf.claimed or len(shelf.data) - start))
            if shelf.etag:
                self.send_header("ETag", shelf.etag)
            self.end_headers()
            body = shelf.data[start:][: shelf.cut_after]
            shelf.sent += len(body)
            self.wfile.write(body)
            self.wfile.flush()
            if shelf.stuck:
                shelf.stuck.wait(60)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    return Handler


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    shelf = Shelf()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(shelf))
    shelf.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield shelf
    if shelf.stuck:
        shelf.stuck.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_file_arrives_whole_under_its_name(shelf: Shelf, tmp_path: Path) -> None:
    path = download(HttpsRef(url=shelf.url, sha256=shelf.sha256), tmp_path, Quiet())

    assert path.name == "a model.gguf"
    assert path.read_bytes() == DATA


def test_a_broken_download_goes_on_where_it_stopped(shelf: Shelf, tmp_path: Path) -> None:
    shelf.cut_after = 300_000
    with pytest.raises(UnavailableError, match="cannot be downloaded"):
        download(HttpsRef(url=shelf.url), tmp_path, Quiet())
    shelf.cut_after = None

    path = download(HttpsRef(url=shelf.url), tmp_path, Quiet())

    assert path.read_bytes() == DATA
    assert shelf.ranges[0] is None
    assert shelf.ranges[1] is not None
    assert shelf.sent == len(DATA)


def test_a_file_that_changed_meanwhile_is_downloaded_from_its_start(shelf: Shelf, tmp_path: Path) -> None:
    shelf.cut_after = 300_000
    with pytest.raises(UnavailableError):
        download(HttpsRef(url=shelf.url), tmp_path, Quiet())
    shelf.cut_after, shelf.etag, shelf.data = None, '"v2"', DATA[::-1]

    path = download(HttpsRef(url=shelf.url), tmp_path, Quiet())

    assert path.read_bytes() == DATA[::-1]


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_validator_nothing_is_resumed(shelf: Shelf, tmp_path: Path, etag: str | None) -> None:
    shelf.cut_after, shelf.etag = 300_000, etag
    with pytest.raises(UnavailableError):
        download(HttpsRef(url=shelf.url), tmp_path, Quiet())
    shelf.cut_after = None

    path = download(HttpsRef(url=shelf.url), tmp_path, Quiet())

    assert path.read_bytes() == DATA
    assert shelf.ranges == [None, None]


def test_a_known_hash_makes_resuming_safe_without_validator(shelf: Shelf, tmp_path: Path) -> None:
    shelf.cut_after, shelf.etag = 300_000, None
    ref = HttpsRef(url=shelf.url, sha256=shelf.sha256)
    with pytest.raises(UnavailableError):
        download(ref, tmp_path, Quiet())
    shelf.cut_after = None

    assert download(ref, tmp_path, Quiet()).read_bytes() == DATA
    assert shelf.sent == len(DATA)


def test_what_is_whole_already_is_not_sent_again(shelf: Shelf, tmp_path: Path) -> None:
    ref = HttpsRef(url=shelf.url, sha256=shelf.sha256)
    download(ref, tmp_path, Quiet())

    assert download(ref, tmp_path, Quiet()).read_bytes() == DATA
    assert shelf.sent == len(DATA)


def test_a_wrong_hash_keeps_nothing(shelf: Shelf, tmp_path: Path) -> None:
    ref = HttpsRef(url=shelf.url, sha256="0" * 64)

    with pytest.raises(DigestMismatchError, match="asked for is " + "0" * 64):
        download(ref, tmp_path, Quiet())

    assert not partial_path(tmp_path, ref).exists()


def test_an_address_without_a_file_is_an_unknown_model(shelf: Shelf, tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match="404"):
        download(HttpsRef(url=f"http://127.0.0.1:{shelf.port}/ghost"), tmp_path, Quiet())


@pytest.mark.parametrize(("path", "error"), [("circle.gguf", UnavailableError), ("away.gguf", InvalidRequestError)])
def test_a_redirect_that_leads_nowhere_is_no_fault_of_ours(
    shelf: Shelf, tmp_path: Path, path: str, error: type[ShoalError]
) -> None:
    with pytest.raises(error, match=f"{path} cannot be"):
        download(HttpsRef(url=f"http://127.0.0.1:{shelf.port}/{path}"), tmp_path, Quiet())


@pytest.mark.parametrize(
    "url", ["https://h/%00.gguf", "https://h/%2e%2e", "https://h/" + "x" * 500, "https://h/a%2f.."]
)
def test_any_address_gives_a_file_name(url: str, tmp_path: Path) -> None:
    path = partial_path(tmp_path, HttpsRef(url=url))
    path.parent.mkdir()

    path.touch()

    assert len(path.relative_to(tmp_path).parts) == 2


@pytest.mark.parametrize("url", ["https://\x7f/m.gguf", "https://a..b/m.gguf"])
def test_an_address_that_cannot_be_asked_is_the_callers_to_change(url: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError):
        download(HttpsRef(url=url), tmp_path, Quiet())


def test_no_network_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="cannot be downloaded"):
        download(HttpsRef(url="http://127.0.0.1:9/m.gguf"), tmp_path, Quiet())


def test_what_cannot_fit_on_the_disk_is_not_begun(shelf: Shelf, tmp_path: Path) -> None:
    shelf.claimed = 10**18

    with pytest.raises(StorageFullError, match="1000000000000000000 bytes to come"):
        download(HttpsRef(url=shelf.url), tmp_path, Quiet())


def test_an_encrypted_address_may_not_lead_to_an_unencrypted_one_unchecked() -> None:
    url, plain = "https://example.org/m.gguf", "http://example.org/m.gguf"

    with pytest.raises(UntrustedError, match="not encrypted"):
        check_redirect(HttpsRef(url=url), plain)
    check_redirect(HttpsRef(url=url), "https://mirror.example.org/m.gguf")
    check_redirect(HttpsRef(url=url, sha256="0" * 64), plain)


def test_forgetting_leaves_nothing(shelf: Shelf, tmp_path: Path) -> None:
    path = download(HttpsRef(url=shelf.url), tmp_path, Quiet())

    forget(path)

    assert list(tmp_path.rglob("*")) == []


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is not known to Windows")
def test_a_killed_download_is_resumed_by_another_process(shelf: Shelf, tmp_path: Path) -> None:
    shelf.cut_after, shelf.stuck = 500_000, threading.Event()
    program = """
        import sys
        from pathlib import Path
        from shoal.model.catalog import HttpsRef
        from shoal.node.download import download

        class Told:
            def start(self, what, total_bytes=None): pass
            def advance(self, by_bytes):
                if by_bytes: print(by_bytes, flush=True)

        download(HttpsRef(url=sys.argv[1]), Path(sys.argv[2]), Told())
    """
    command = [sys.executable, "-c", textwrap.dedent(program), shelf.url, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    shelf.cut_after = None
    shelf.stuck.set()

    path = download(HttpsRef(url=shelf.url), tmp_path, Quiet())

    assert path.read_bytes() == DATA


def unsupported(path: Path, name: str, quantise: str | None) -> ImportedModel:
    raise UnsupportedModelError(f"{path.name} is of no known kind")


def files_below(home: Path) -> set[str]:
    return {path.name for path in home.rglob("*") if path.is_file() and path.parent.name != "locks"}


def test_a_quota_bounds_downloads(shelf: Shelf, tmp_path: Path) -> None:
    store = open_store(tmp_path, quota_bytes=len(DATA) - 1)

    with pytest.raises(StorageFullError, match=f"{len(DATA)} bytes more do not fit"):
        pull(store, PullRequest(reference=f"{shelf.url}#sha256={shelf.sha256}"), unsupported)

    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 1000


def test_a_quota_bounds_downloads_of_unknown_length(shelf: Shelf, tmp_path: Path) -> None:
    shelf.says_length = False
    store = open_store(tmp_path, quota_bytes=len(DATA) // 2)

    with pytest.raises(StorageFullError):
        pull(store, PullRequest(reference=f"{shelf.url}#sha256={shelf.sha256}"), unsupported)

    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < len(DATA) // 2 + 1000


def test_unfinished_downloads_count_against_the_quota(shelf: Shelf, tmp_path: Path) -> None:
    store = open_store(tmp_path, quota_bytes=len(DATA) + 1000)
    shelf.cut_after = 300_000
    with pytest.raises(UnavailableError):
        pull(store, PullRequest(reference=f"{shelf.url}#sha256={shelf.sha256}"), unsupported)
    shelf.cut_after = None

    with pytest.raises(StorageFullError):
        pull(store, PullRequest(reference=f"{shelf.url}?other.gguf#sha256={shelf.sha256}"), unsupported)
    with pytest.raises(UnsupportedModelError):  # the rest of the first one does fit
        pull(store, PullRequest(reference=f"{shelf.url}#sha256={shelf.sha256}"), unsupported)


def test_a_whole_download_that_nothing_can_import_is_not_kept(shelf: Shelf, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError):
        pull(open_store(tmp_path), PullRequest(reference=f"{shelf.url}#sha256={shelf.sha256}"), unsupported)

    assert files_below(tmp_path) == set()
