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
from shoal.node.hub import HubFile, chosen, download_repository
from shoal.node.progress import Quiet
from shoal.store.quota import Quota

COMMIT = "c" * 40
FILES = {
    "model.safetensors": b"weights" * 1000,
    "config.json": b"{}",
    "pytorch_model.bin": b"pickle",
    "onnx/model.onnx": b"graph",
    "onnx/model.onnx_data": b"weights",
    "onnx/config.json": b"{}",
    "1_Pooling/config.json": b"{}",
    "consolidated.safetensors": b"once more" * 1000,
    "original/consolidated.00.safetensors": b"and again" * 1000,
    "checkpoint-10/model.safetensors": b"earlier" * 1000,
}
SPOILT = {"model.safetensors": b"not these", "config.json": b"{}"}
REPOSITORIES = {"org/model": FILES, "org/spoilt": SPOILT}

needs_client = pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None, reason="huggingface_hub is not installed (extra hf)"
)


def sibling(name: str, data: bytes) -> dict[str, object]:
    """A file as the hub lists it: large ones with their SHA-256."""
    said = FILES.get(name, data)
    lfs = {"sha256": hashlib.sha256(said).hexdigest(), "size": len(data), "pointerSize": 134}
    return {"rfilename": name, "size": len(data)} | ({"lfs": lfs} if name.endswith(".safetensors") else {})


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        repository = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        files = REPOSITORIES.get(repository, {})
        if path.startswith("/api/models/") and files:
            siblings = [sibling(name, data) for name, data in files.items()]
            body = {"id": repository, "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
            return
        name = path.split("/resolve/")[-1].partition("/")[2]
        if name in files:
            etag = hashlib.sha256(files[name]).hexdigest()
            self.answer(200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
            return
        self.answer(404, b"", {"X-Error-Code": "EntryNotFound" if files else "RepoNotFound"})

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
        from shoal.store.quota import Quota

        class Told:
            total_bytes, done_bytes = None, 0
            def start(self, what, total_bytes=None): self.total_bytes = total_bytes
            def advance(self, by_bytes): self.done_bytes += by_bytes

        for number, reference in enumerate(sys.argv[2:]):
            folder, told, quota = Path(sys.argv[1], str(number)), Told(), Quota(100_000)
            try:
                got = download_repository(parse_reference(reference), folder, told, quota).relative_to(folder)
                (folder / "told").write_text(f"{told.total_bytes} {told.done_bytes}")
                print(got)
            except ShoalError as error:
                print(type(error).__name__)
    """
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(folder), *references],
        # The client draws bars only where somebody looks; this variable of its makes it draw them here.
        env={**os.environ, **settings, "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_POSITION": "-1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (folder / "stderr").write_text(done.stderr)
    return dict(zip(references, done.stdout.splitlines(), strict=True))


REFERENCES = [
    "hf:org/model",
    "hf:org/model/onnx/model.onnx",
    "hf:org/model/onnx/",
    "hf:org/ghost",
    "hf:org/model/ghost.gguf",
    "hf:org/model/ghost/",
    "hf:org/spoilt",
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
    here = {
        path.relative_to(got).as_posix() for path in got.rglob("*.*") if path.is_file() and ".cache" not in path.parts
    }
    assert here == {"model.safetensors", "config.json", "1_Pooling/config.json"}


@needs_client
def test_one_bar_is_told_how_much_will_come_and_comes(answers: dict[str, str], folder: Path) -> None:
    total_bytes, done_bytes = map(int, (folder / "0" / "told").read_text().split())

    assert total_bytes == len(FILES["model.safetensors"]) + 4
    assert done_bytes >= total_bytes
    assert "%" not in (folder / "stderr").read_text()


@needs_client
def test_a_file_that_is_not_what_the_hub_says_is_refused(answers: dict[str, str], folder: Path) -> None:
    assert answers["hf:org/spoilt"] == "DigestMismatchError"
    assert not list((folder / str(REFERENCES.index("hf:org/spoilt"))).glob("*.safetensors"))


@needs_client
def test_one_file_and_one_folder_can_be_named(answers: dict[str, str], folder: Path) -> None:
    assert (folder / "1" / answers["hf:org/model/onnx/model.onnx"]).read_bytes() == b"graph"
    assert (folder / "1" / "onnx" / "model.onnx_data").exists()
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
        download_repository(HfRef(repository="org/model"), tmp_path, Quiet(), Quota(None))

    assert caught.value.hint == "pip install 'shoal[hf]'"


@pytest.mark.parametrize(
    ("listed", "weights"),
    [
        (["model.safetensors", "model.fp16.safetensors", "adapter.safetensors"], ["model.safetensors"]),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "consolidated.safetensors"],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
        (["consolidated.safetensors"], ["consolidated.safetensors"]),
        (["original/model.safetensors", "onnx/model.onnx"], []),
    ],
)
def test_weights_that_a_repository_holds_twice_are_fetched_once(listed: list[str], weights: list[str]) -> None:
    files = [HubFile(path=path) for path in [*listed, "config.json", "sub/config.json"]]

    found = [file.path for file in chosen(HfRef(repository="org/model"), files)]

    assert found == [*weights, *(["config.json"] if weights else [])]
