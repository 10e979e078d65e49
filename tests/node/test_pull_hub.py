"""Pulling from a Hugging Face hub: a small one on the loopback, spoken to by the real client in a process of its own."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from shoal.errors import InvalidRequestError
from shoal.model.catalog import HfRef
from shoal.node.hub import download_repository

COMMIT = "c" * 40
FILES = {
    "model.safetensors": b"weights" * 1000,
    "config.json": b"{}",
    "pytorch_model.bin": b"pickle",
    "onnx/model.onnx": b"graph",
}

needs_client = pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None, reason="huggingface_hub is not installed (extra hf)"
)


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/model/tree/"):
            tree = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in FILES.items()]
            self.answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
            return
        if path.startswith("/api/models/org/model"):
            body = {"id": "org/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
            self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
            return
        name = path.split("/resolve/")[-1].partition("/")[2]
        if path.startswith("/org/model/resolve/") and name in FILES:
            etag = hashlib.sha256(FILES[name]).hexdigest()
            self.answer(200, FILES[name], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
            return
        code = "EntryNotFound" if path.startswith("/org/model/") else "RepoNotFound"
        self.answer(404, b"", {"X-Error-Code": code})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


def fetched(port: int, folder: Path, references: list[str]) -> dict[str, str]:
    """What each reference gives from the hub at *port*: the path below *folder*, or the class of an error of ours."""
    program = """
        import sys
        from pathlib import Path
        from shoal.errors import ShoalError
        from shoal.model.catalog import parse_reference
        from shoal.node.hub import download_repository
        for number, reference in enumerate(sys.argv[2:]):
            folder = Path(sys.argv[1], str(number))
            try:
                print(download_repository(parse_reference(reference), folder).relative_to(folder))
            except ShoalError as error:
                print(type(error).__name__)
    """
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(folder), *references],
        env={**os.environ, **settings, "HF_HUB_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return dict(zip(references, done.stdout.splitlines(), strict=True))


REFERENCES = [
    "hf:org/model",
    "hf:org/model/onnx/model.onnx",
    "hf:org/model/onnx/",
    "hf:org/ghost",
    "hf:org/model/ghost.gguf",
    "hf:org/model/ghost/",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def answers(port: int, folder: Path) -> dict[str, str]:
    """Every reference in one process: the client takes seconds to import."""
    return fetched(port, folder, REFERENCES)


@needs_client
def test_a_repository_brings_its_safetensors_and_nothing_pickled(answers: dict[str, str], folder: Path) -> None:
    got = folder / "0" / answers["hf:org/model"]

    assert (got / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert {path.name for path in got.iterdir() if path.name[0] != "."} == {"model.safetensors", "config.json"}


@needs_client
def test_one_file_and_one_folder_can_be_named(answers: dict[str, str], folder: Path) -> None:
    assert (folder / "1" / answers["hf:org/model/onnx/model.onnx"]).read_bytes() == b"graph"
    assert (folder / "2" / answers["hf:org/model/onnx/"] / "model.onnx").read_bytes() == b"graph"


@needs_client
@pytest.mark.parametrize("reference", ["hf:org/ghost", "hf:org/model/ghost.gguf", "hf:org/model/ghost/"])
def test_what_does_not_exist_is_an_unknown_model(answers: dict[str, str], reference: str) -> None:
    assert answers[reference] == "UnknownModelError"


@needs_client
def test_no_network_can_be_tried_again(tmp_path: Path) -> None:
    assert fetched(9, tmp_path, ["hf:org/model"]) == {"hf:org/model": "UnavailableError"}


def test_without_the_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)

    with pytest.raises(InvalidRequestError, match="not installed") as caught:
        download_repository(HfRef(repository="org/model"), tmp_path)

    assert caught.value.hint == "pip install 'shoal[hf]'"
