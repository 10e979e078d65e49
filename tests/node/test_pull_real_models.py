"""Real files through the real importers into a store."""

from pathlib import Path

import pytest

from shoal.errors import CorruptFileError
from shoal.model.spec import ModelKind
from shoal.node.importing import import_files
from shoal.node.pull import PullRequest, pull
from shoal.store.home import missing_bytes, open_store, read_file, read_graph

pytestmark = pytest.mark.model


def test_a_gguf_file_brings_its_tokenizer_and_template(smollm2_gguf: Path, tmp_path: Path) -> None:
    store = open_store(tmp_path)

    manifest = pull(store, PullRequest(reference=str(smollm2_gguf), name="s"), import_files).manifest

    assert manifest.spec.kind is ModelKind.CAUSAL_LM
    assert read_file(store.chunks, manifest, "tokenizer.json")
    assert read_file(store.chunks, manifest, "chat_template.jinja")
    assert missing_bytes(store, manifest) == {}
    assert read_graph(store.chunks, manifest).graph.node


def test_a_truncated_gguf_file_is_named_and_leaves_nothing(smollm2_gguf: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    with smollm2_gguf.open("rb") as file:
        cut.write_bytes(file.read(30_000_000))
    store = open_store(tmp_path / "home")

    with pytest.raises(CorruptFileError, match="the file has 30000000 bytes"):
        pull(store, PullRequest(reference=str(cut)), import_files)

    assert store.disk.sizes_bytes() == {}
    assert store.library.names() == []


def test_an_encoder_folder_brings_its_tokenizer(minilm_folder: Path, tmp_path: Path) -> None:
    store = open_store(tmp_path)

    manifest = pull(store, PullRequest(reference=str(minilm_folder), name="m"), import_files).manifest

    assert manifest.spec.kind is ModelKind.ENCODER
    assert read_file(store.chunks, manifest, "tokenizer.json")
