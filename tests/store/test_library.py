from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from shoal.errors import (
    CorruptFileError,
    InvalidRequestError,
    StorageFullError,
    UnknownModelError,
    UnsupportedVersionError,
)
from shoal.model.spec import ImportedModel
from shoal.store.home import Store, missing_bytes, open_store, read_file, read_graph
from shoal.store.library import decode_manifest, encode_manifest
from shoal.store.manifest import Manifest, Origin
from shoal.store.tensor import open_array
from shoal.store.write import write_model

Make = Callable[..., ImportedModel]


def test_a_model_comes_back_as_it_was_imported(store: Store, small_model: Make) -> None:
    imported = small_model()
    store.library.write("small", write_model(store, imported, origin=Origin(reference="file:small.onnx")))

    manifest = store.library.read("small")

    assert read_graph(store.chunks, manifest) == imported.graph
    assert read_file(store.chunks, manifest, "labels.txt") == b"cat\ndog\n"
    assert read_file(store.chunks, manifest, "tokenizer.json") is None
    for entry in manifest.tensors:
        assert np.array_equal(open_array(store.chunks, entry), imported.tensors[entry.name]())
    assert missing_bytes(store, manifest) == {}


def test_every_byte_written_is_told(store: Store, small_model: Make) -> None:
    told: list[int] = []

    write_model(store, small_model(), written=told.append)

    assert told == [64 * 32 * 4, 512 * 4]


def test_tensors_inside_control_flow_are_stored_too(store: Store, small_model: Make) -> None:
    imported = small_model()
    branch = onnx.GraphProto(name="branch", initializer=[imported.graph.graph.initializer.pop(0)])
    node = imported.graph.graph.node.add(op_type="If")
    node.attribute.append(onnx.helper.make_attribute("then_branch", branch))

    manifest = write_model(store, imported)

    assert {entry.name for entry in manifest.tensors} == {"w", "b"}


def test_a_tensor_without_data_names_itself(store: Store, small_model: Make) -> None:
    imported = small_model()
    del imported.tensors["w"]

    with pytest.raises(CorruptFileError, match="tensor w"):
        write_model(store, imported)


def test_a_version_is_the_digest_of_the_manifest_and_can_be_fetched_as_a_chunk(store: Store, small_model: Make) -> None:
    manifest = write_model(store, small_model())

    digest = store.library.write("small", manifest)

    assert digest == store.library.digest("small")
    assert decode_manifest(store.chunks.get(digest), "manifest") == manifest


def test_an_unknown_model_is_answered_with_what_is_here(store: Store, small_model: Make) -> None:
    with pytest.raises(UnknownModelError) as empty:
        store.library.read("ghost")
    store.library.write("small", write_model(store, small_model()))
    with pytest.raises(UnknownModelError) as other:
        store.library.remove("ghost")

    assert "shoal pull" in empty.value.hint
    assert other.value.hint == "models here: small"


@pytest.mark.parametrize("name", ["", "../up", "Big", "a/b", ".hidden", "x" * 97])
def test_names_that_are_no_file_names_are_refused(store: Store, name: str) -> None:
    with pytest.raises(InvalidRequestError):
        store.library.find(name)


def test_a_manifest_from_a_newer_version_says_so(store: Store, small_model: Make) -> None:
    newer = msgspec.structs.replace(write_model(store, small_model()), version=9)

    with pytest.raises(UnsupportedVersionError, match="version 9"):
        decode_manifest(encode_manifest(newer), "it")


def test_a_field_of_a_later_minor_version_is_tolerated(store: Store, small_model: Make) -> None:
    manifest = write_model(store, small_model())
    raw = msgspec.json.decode(encode_manifest(manifest)) | {"signature": "later"}

    assert decode_manifest(msgspec.json.encode(raw), "it") == manifest


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"version": 1}', b"\xff\xfe"])
def test_garbage_is_no_manifest(data: bytes) -> None:
    with pytest.raises(CorruptFileError, match="manifest of x"):
        decode_manifest(data, "manifest of x")


@pytest.mark.parametrize("digest", ["../../etc/passwd", "", "A" * 64])
def test_a_manifest_cannot_choose_paths_by_digests(store: Store, small_model: Make, digest: str) -> None:
    good = write_model(store, small_model())
    bad = msgspec.structs.replace(good, graph=msgspec.structs.replace(good.graph, digest=digest))

    with pytest.raises(CorruptFileError, match="no digest"):
        decode_manifest(encode_manifest(bad), "it")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", "a\\b"])
def test_a_manifest_cannot_choose_paths_by_file_names(store: Store, small_model: Make, name: str) -> None:
    good = write_model(store, small_model())
    bad = msgspec.structs.replace(good, files=(msgspec.structs.replace(good.files[0], name=name),))

    with pytest.raises(CorruptFileError, match="outside its folder"):
        decode_manifest(encode_manifest(bad), "it")


def test_a_manifest_from_elsewhere_does_not_replace_another_version(store: Store, small_model: Make) -> None:
    mine, theirs = (write_model(store, small_model(seed=seed)) for seed in (1, 2))
    store.library.write("small", mine)

    names = [store.library.adopt(manifest) for manifest in (mine, theirs, theirs)]

    assert names[0] == "small"
    assert names[1] == names[2] != "small"
    assert store.library.read("small") == mine
    assert store.library.read(names[1]) == theirs


def test_a_model_that_is_here_already_is_not_published_again(tmp_path: Path, small_model: Make) -> None:
    store = open_store(tmp_path)
    manifest = write_model(store, small_model(seed=1))
    store.library.write("small", manifest)
    [path] = (tmp_path / "models").glob("*.json")
    before = path.stat().st_ino

    assert store.library.adopt(manifest) == "small"
    assert path.stat().st_ino == before

    store.disk.drop(store.library.digest("small"))
    store.library.adopt(manifest)
    assert store.chunks.get(store.library.digest("small")) is not None


def test_a_model_that_cannot_fit_is_refused_before_a_byte_is_written(tmp_path: Path, small_model: Make) -> None:
    store = open_store(tmp_path, quota_bytes=9000)

    with pytest.raises(StorageFullError, match="10240 bytes more do not fit"):
        write_model(store, small_model())

    assert store.disk.sizes_bytes() == {}


def test_importing_again_needs_no_second_room(tmp_path: Path, small_model: Make) -> None:
    store = open_store(tmp_path, quota_bytes=20_000)
    store.library.write("small", write_model(store, small_model()))

    again = write_model(store, small_model())

    assert again == store.library.read("small")


def test_nothing_is_deleted_to_make_room(tmp_path: Path, small_model: Make) -> None:
    store = open_store(tmp_path, quota_bytes=20_000)
    store.library.write("one", write_model(store, small_model("one", seed=1)))

    with pytest.raises(StorageFullError):
        write_model(store, small_model("two", seed=2))

    assert missing_bytes(store, store.library.read("one")) == {}


def test_equal_tensors_of_two_models_are_kept_once(store: Store, small_model: Make) -> None:
    one, two = (write_model(store, small_model(name)) for name in ("one", "two"))

    assert isinstance(two, Manifest)
    assert {t.chunk for t in one.tensors} == {t.chunk for t in two.tensors}
    assert len(store.disk.sizes_bytes()) == len(one.chunks())
