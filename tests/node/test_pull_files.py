"""Pulling local files: what is here already, what is replaced, and that a failure leaves nothing half-made."""

import dataclasses
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest

from shoal.errors import CorruptFileError, InvalidRequestError, StorageFullError, UnknownModelError
from shoal.model.spec import ImportedModel, ModelKind, ModelSpec
from shoal.node.pull import PullRequest, pull
from shoal.store.garbage import collect
from shoal.store.home import Store, open_store, writing
from shoal.store.tensor import open_array

SIZE = 200_000


class BytesImporter:
    """Takes any file as a model of two tensors, its halves; a file that starts with BAD is corrupt; of a folder, its m.onnx."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str | None]] = []

    def __call__(self, path: Path, name: str, quantise: str | None) -> ImportedModel:
        self.calls.append((name, quantise))
        path = path / "m.onnx" if path.is_dir() else path
        data = np.frombuffer(path.read_bytes(), np.uint8)
        if data[:3].tobytes() == b"BAD":
            raise CorruptFileError(f"{path} is corrupt")
        graph = onnx.helper.make_graph([], "bytes", [], [])
        halves = dict(zip(("first", "second"), np.array_split(data, 2), strict=True))
        for key, half in halves.items():
            stub = graph.initializer.add(name=key, data_type=onnx.TensorProto.UINT8, dims=half.shape)
            stub.data_location = onnx.TensorProto.EXTERNAL
        return ImportedModel(
            spec=ModelSpec(name=name, kind=ModelKind.TENSOR, architecture="bytes"),
            graph=onnx.helper.make_model(graph),
            tensors={key: (lambda half=half: half) for key, half in halves.items()},
        )


@pytest.fixture
def importer() -> BytesImporter:
    return BytesImporter()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "home")


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "My Model.onnx"
    path.write_bytes(bytes(range(250)) * (SIZE // 250))
    return path


def request(path: Path, **more: object) -> PullRequest:
    return PullRequest(reference=str(path), **more)


def content(store: Store, name: str) -> bytes:
    entries = store.library.read(name).tensors
    return b"".join(open_array(store.chunks, entry).tobytes() for entry in entries)


def below(home: Path) -> set[str]:
    """Files of a store, locks apart."""
    return {
        str(p.relative_to(home)) for p in home.rglob("*") if p.is_file() and p.suffix != ".lock" and p.name != "gate"
    }


def test_a_file_is_here_afterwards_without_it(store: Store, model_file: Path, importer: BytesImporter) -> None:
    data = model_file.read_bytes()

    pulled = pull(store, request(model_file), importer)
    model_file.unlink()

    assert (pulled.name, pulled.was_here) == ("my-model", False)
    assert content(open_store(store.home), "my-model") == data
    assert pulled.manifest.spec.source == "file:My Model.onnx"


def test_the_same_again_imports_nothing(store: Store, model_file: Path, importer: BytesImporter) -> None:
    first = pull(store, request(model_file), importer)

    again = pull(store, request(model_file), importer)

    assert again.was_here
    assert again.digest == first.digest
    assert len(importer.calls) == 1


@pytest.mark.parametrize("change", ["quantise", "again", "damage"])
def test_what_changed_is_imported_again(store: Store, model_file: Path, importer: BytesImporter, change: str) -> None:
    pulled = pull(store, request(model_file), importer)
    more: dict[str, object] = {}
    match change:
        case "quantise":
            more = {"quantise": "int8"}
        case "again":
            more = {"again": True}
        case "damage":
            store.disk.drop(pulled.manifest.tensors[0].chunk.digest)

    again = pull(store, request(model_file, **more), importer)

    assert not again.was_here
    assert content(store, "my-model") == model_file.read_bytes()


def test_a_model_from_elsewhere_is_not_replaced_by_one_of_the_same_name(
    store: Store, model_file: Path, importer: BytesImporter, tmp_path: Path
) -> None:
    pull(store, request(model_file, name="mine"), importer)
    other = tmp_path / "other.onnx"
    other.write_bytes(b"other")

    with pytest.raises(InvalidRequestError, match=r"'mine' is here already, from file:My Model\.onnx") as caught:
        pull(store, request(other, name="mine"), importer)

    assert "--name" in caught.value.hint


@pytest.mark.parametrize("folders", [False, True])
def test_another_file_of_the_same_name_replaces_a_model_only_when_told_so(
    store: Store, importer: BytesImporter, tmp_path: Path, *, folders: bool
) -> None:
    paths = []
    for home, data in (("a", b"A" * SIZE), ("b", b"B" * SIZE)):
        (tmp_path / home / "model").mkdir(parents=True)
        (tmp_path / home / "model" / "m.onnx").write_bytes(data)
        paths.append(tmp_path / home / "model" / ("" if folders else "m.onnx"))
    first = pull(store, request(paths[0]), importer)

    with pytest.raises(InvalidRequestError, match=r"is here already, from a file:.* with other bytes") as caught:
        pull(store, request(paths[1]), importer)

    assert "--name" in caught.value.hint
    assert "--again" in caught.value.hint
    assert content(store, first.name)[:1] == b"A"
    assert pull(store, request(paths[0]), importer).was_here
    pull(store, request(paths[1], again=True), importer)
    assert content(store, first.name)[:1] == b"B"


def test_a_file_that_cannot_be_imported_leaves_nothing(store: Store, importer: BytesImporter, tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"BAD file")

    with pytest.raises(CorruptFileError):
        pull(store, request(bad), importer)

    assert below(store.home) == set()


def test_a_failed_second_pull_leaves_the_first_model_as_it_was(
    store: Store, importer: BytesImporter, model_file: Path
) -> None:
    data = model_file.read_bytes()
    pull(store, request(model_file), importer)
    model_file.write_bytes(b"BAD file")

    with pytest.raises(CorruptFileError):
        pull(store, request(model_file, again=True), importer)

    assert content(store, "my-model") == data


class Interrupted(BytesImporter):
    """Of the model that it gives, the second tensor cannot be read to its end."""

    def __call__(self, path: Path, name: str, quantise: str | None) -> ImportedModel:
        def stop() -> np.ndarray:
            raise KeyboardInterrupt

        imported = super().__call__(path, name, quantise)
        return dataclasses.replace(imported, tensors={**imported.tensors, "second": stop})


def test_an_interrupted_import_leaves_nothing(store: Store, model_file: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        pull(store, request(model_file), Interrupted())

    assert below(store.home) == set()


def test_an_interrupted_import_keeps_what_other_models_need(
    store: Store, model_file: Path, importer: BytesImporter
) -> None:
    data = model_file.read_bytes()
    pull(store, request(model_file), importer)

    with pytest.raises(KeyboardInterrupt):
        pull(store, request(model_file, name="twin"), Interrupted())

    assert content(store, "my-model") == data


def test_an_interrupted_import_drops_nothing_while_others_write(store: Store, model_file: Path) -> None:
    with writing(store, "another"), pytest.raises(KeyboardInterrupt):
        pull(store, request(model_file), Interrupted())

    assert len(store.disk.sizes_bytes()) == 1
    assert collect(store).chunks == 1


def test_a_damaged_manifest_is_replaced(store: Store, importer: BytesImporter, model_file: Path) -> None:
    pull(store, request(model_file), importer)
    (store.home / "models" / "my-model.json").write_bytes(b"{")

    pull(store, request(model_file), importer)

    assert content(store, "my-model") == model_file.read_bytes()


def test_a_pull_past_the_quota_is_refused_and_leaves_nothing(
    tmp_path: Path, model_file: Path, importer: BytesImporter
) -> None:
    store = open_store(tmp_path / "home", quota_bytes=SIZE // 2)

    with pytest.raises(StorageFullError, match=f"{SIZE} bytes more do not fit"):
        pull(store, request(model_file), importer)

    assert below(store.home) == set()


def test_a_damaged_model_stops_no_pull_of_another_below_a_quota(
    tmp_path: Path, model_file: Path, importer: BytesImporter
) -> None:
    store = open_store(tmp_path / "home", quota_bytes=10 * SIZE)
    pull(store, request(model_file, name="damaged"), importer)
    (store.home / "models" / "damaged.json").write_bytes(b"{")

    assert pull(store, request(model_file), importer).name == "my-model"


def test_a_path_that_is_not_there_is_named(store: Store, importer: BytesImporter, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"ghost\.gguf does not exist"):
        pull(store, request(tmp_path / "ghost.gguf"), importer)


@pytest.mark.parametrize("path", ["./" + "x" * 5000, "~nobody-of-this-name/m.gguf"])
def test_a_path_that_no_system_opens_is_the_callers_to_change(store: Store, importer: BytesImporter, path: str) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be opened"):
        pull(store, PullRequest(reference=path), importer)


def test_an_unknown_name_is_answered_with_near_ones(store: Store, importer: BytesImporter) -> None:
    with pytest.raises(UnknownModelError) as caught:
        pull(store, PullRequest(reference="smollm2"), importer)

    assert caught.value.hint == "did you mean smollm2-135m?"


def test_an_unknown_quantisation_is_answered_with_the_known_ones(
    store: Store, importer: BytesImporter, model_file: Path
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        pull(store, request(model_file, quantise="int3"), importer)

    assert "int4" in caught.value.hint


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is not known to Windows")
@pytest.mark.parametrize("moment", ["import", "second tensor"])
def test_a_pull_that_was_killed_is_simply_done_again(
    store: Store, importer: BytesImporter, model_file: Path, moment: str
) -> None:
    killed_during = """
        import importlib.util, os, signal, sys
        from dataclasses import replace
        from pathlib import Path
        from shoal.node.pull import PullRequest, pull
        from shoal.store.home import open_store

        home, file, tests, moment = sys.argv[1:]
        spec = importlib.util.spec_from_file_location("tests", tests)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        die = lambda: os.kill(os.getpid(), signal.SIGKILL)

        def dying(path, name, quantise):
            if moment == "import":
                die()
            imported = module.BytesImporter()(path, name, quantise)
            return replace(imported, tensors={**imported.tensors, "second": die})

        pull(open_store(Path(home)), PullRequest(reference=file), dying)
    """
    arguments = [str(store.home), str(model_file), __file__, moment]
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(killed_during), *arguments], timeout=60, check=False)
    assert done.returncode == -9
    assert store.library.names() == []

    pull(store, request(model_file), importer)

    assert content(store, "my-model") == model_file.read_bytes()
    assert collect(store, dry_run=True).total_bytes == 0


def test_two_pulls_of_one_model_at_once_import_it_once(store: Store, importer: BytesImporter, model_file: Path) -> None:

    def one(_: int) -> bool:
        return pull(open_store(store.home), request(model_file), importer).was_here

    with ThreadPoolExecutor(2) as pool:
        outcomes: list[bool] = sorted(pool.map(one, range(2)))

    assert outcomes == [False, True]
    assert len(importer.calls) == 1
