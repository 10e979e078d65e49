"""BERT-type encoders: token vectors and embeddings are those of Transformers, and the graph can be cut between layers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from safetensors.numpy import load_file, save_file

from shoal.errors import CorruptFileError, UnsupportedModelError
from shoal.model.frontier import blocks
from shoal.model.hf_encoder import import_encoder
from shoal.model.spec import ImportedModel, ModelKind

Sessions = Callable[[ImportedModel], ort.InferenceSession]


def token_vectors(session: ort.InferenceSession, reference: np.lib.npyio.NpzFile) -> np.ndarray:
    feeds = {"input_ids": reference["ids"], "attention_mask": reference["mask"], "token_type_ids": reference["types"]}
    vectors: np.ndarray = session.run(["last_hidden_state"], feeds)[0]
    return vectors


def mean_pooled(vectors: np.ndarray, mask: np.ndarray) -> np.ndarray:
    sums = (vectors * mask[..., None]).sum(1)
    pooled: np.ndarray = sums / np.linalg.norm(sums, axis=-1, keepdims=True)
    return pooled


@pytest.fixture
def copied(golden: Path, tmp_path: Path) -> Path:
    """A copy of the recorded encoder that a test may spoil."""
    return Path(shutil.copytree(golden / "bert", tmp_path / "bert"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def test_token_vectors_of_a_padded_batch_are_those_of_transformers(golden: Path, open_session: Sessions) -> None:
    reference = np.load(golden / "bert" / "reference.npz")

    vectors = token_vectors(open_session(import_encoder(golden / "bert", name="b")), reference)

    np.testing.assert_allclose(vectors, reference["hidden"], atol=1e-4)


@pytest.mark.parametrize("quantise", ["int8", "int4", "fp16", "bf16"])
def test_rounded_encoders_stay_near_and_say_how_near(quantise: str, golden: Path, open_session: Sessions) -> None:
    reference = np.load(golden / "bert" / "reference.npz")
    model = import_encoder(golden / "bert", name="b", quantise=quantise)

    vectors = token_vectors(open_session(model), reference)

    error = np.linalg.norm(vectors - reference["hidden"]) / np.linalg.norm(reference["hidden"])
    assert model.spec.import_error is not None
    assert 0 < error < 8 * model.spec.import_error


def test_an_encoder_lowered_for_a_cpu_gives_the_same(
    golden: Path, open_session: Sessions, lowered: Callable[..., ImportedModel]
) -> None:
    reference = np.load(golden / "bert" / "reference.npz")

    vectors = token_vectors(open_session(lowered(import_encoder(golden / "bert", name="b"), "cpu-exact")), reference)

    np.testing.assert_allclose(vectors, reference["hidden"], atol=1e-4)


def test_only_token_vectors_and_masks_cross_the_cuts(golden: Path) -> None:
    chain = blocks(import_encoder(golden / "bert", name="b").graph)

    wide = [[b.shape for b in block.inputs if b.dtype == "float32"] for block in chain[1:]]
    narrow = {b.name for block in chain[2:] for b in block.inputs if b.dtype != "float32"}

    assert len(chain) >= 3
    assert all(shapes == [("B", "T", 64)] for shapes in wide)
    assert narrow == {"attention_mask"}


def test_the_specification_of_a_sentence_transformers_folder(minilm_folder: Path) -> None:
    model = import_encoder(minilm_folder, name="minilm")

    spec = model.spec
    assert (spec.kind, spec.architecture, spec.licence) == (ModelKind.ENCODER, "bert", "apache-2.0")
    assert (spec.layers, spec.hidden, spec.context_tokens, spec.vocabulary) == (6, 384, 256, 30522)
    assert (spec.pooling, spec.normalise) == ("mean", True)
    assert {"tokenizer.json", "config.json"} <= model.files.keys()


def test_embeddings_of_minilm_are_those_of_transformers(
    minilm_folder: Path, golden: Path, open_session: Sessions
) -> None:
    reference = np.load(golden / "minilm" / "reference.npz")

    vectors = token_vectors(open_session(import_encoder(minilm_folder, name="minilm")), reference)

    np.testing.assert_allclose(vectors[0], reference["first_hidden"], atol=1e-4)
    cosines = (mean_pooled(vectors, reference["mask"]) * reference["embeddings"]).sum(-1)
    assert cosines.min() > 0.9999


def test_int8_weights_hardly_move_the_embeddings_of_minilm(
    minilm_folder: Path, golden: Path, open_session: Sessions
) -> None:
    reference = np.load(golden / "minilm" / "reference.npz")

    vectors = token_vectors(open_session(import_encoder(minilm_folder, name="minilm", quantise="int8")), reference)

    cosines = (mean_pooled(vectors, reference["mask"]) * reference["embeddings"]).sum(-1)
    assert 0.999 < cosines.min() < 0.99999


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
def test_pooling_is_what_the_modules_say(pooling: dict[str, object], expected: str, copied: Path) -> None:
    kinds = ("Transformer", "Pooling")
    (copied / "1_Pooling").mkdir()
    (copied / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    modules = [
        {"type": f"sentence_transformers.models.{k}", "path": "1_Pooling" if k == "Pooling" else ""} for k in kinds
    ]
    (copied / "modules.json").write_text(json.dumps(modules))

    spec = import_encoder(copied, name="b").spec

    assert (spec.pooling, spec.normalise) == (expected, False)


def test_pooling_that_we_cannot_do_is_named(copied: Path) -> None:
    (copied / "1_Pooling").mkdir()
    (copied / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    (copied / "modules.json").write_text(json.dumps([{"type": "x.Pooling", "path": "1_Pooling"}]))

    with pytest.raises(UnsupportedModelError, match="max_tokens"):
        import_encoder(copied, name="b")


def test_a_layer_after_pooling_is_refused(copied: Path) -> None:
    (copied / "modules.json").write_text(
        json.dumps([{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}])
    )

    with pytest.raises(UnsupportedModelError, match="Dense"):
        import_encoder(copied, name="b")


def test_a_checkpoint_with_a_language_model_head_is_the_same_encoder(copied: Path, golden: Path) -> None:
    edit_config(copied, architectures=["BertForMaskedLM"])
    edit_tensors(
        copied,
        lambda tensors: (
            {f"bert.{n}": t for n, t in tensors.items()} | {"cls.predictions.bias": np.zeros(96, np.float32)}
        ),
    )

    prefixed, plain = import_encoder(copied, name="b"), import_encoder(golden / "bert", name="b")

    assert prefixed.graph == plain.graph
    for name in plain.tensors:
        np.testing.assert_array_equal(prefixed.tensors[name](), plain.tensors[name]())


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "mish"},
        {"position_embedding_type": "relative_key"},
        {"is_decoder": True},
        {"model_type": "roberta"},
    ],
)
def test_variants_that_we_do_not_know_are_named(changes: dict[str, object], copied: Path) -> None:
    edit_config(copied, **changes)

    with pytest.raises(UnsupportedModelError, match=str(next(iter(changes.values())))):
        import_encoder(copied, name="b")


def test_a_tensor_left_over_is_named(copied: Path) -> None:
    edit_tensors(copied, lambda tensors: tensors | {"encoder.layer.0.adapter.weight": np.zeros((2, 2), np.float32)})

    with pytest.raises(UnsupportedModelError, match=r"encoder\.layer\.0\.adapter\.weight"):
        import_encoder(copied, name="b")


@pytest.mark.parametrize("changes", [{"hidden_size": 63}, {"num_attention_heads": 0}, {"hidden_size": "wide"}])
def test_sizes_that_make_no_encoder_are_corrupt(changes: dict[str, object], copied: Path) -> None:
    edit_config(copied, **changes)

    with pytest.raises(CorruptFileError, match=r"config\.json"):
        import_encoder(copied, name="b")


def test_a_missing_tensor_of_an_encoder_is_named(copied: Path) -> None:
    edit_tensors(copied, lambda tensors: {n: t for n, t in tensors.items() if not n.endswith("1.output.dense.bias")})

    with pytest.raises(CorruptFileError, match=r"encoder\.layer\.1\.output\.dense\.bias \[64\] is missing"):
        import_encoder(copied, name="b")
