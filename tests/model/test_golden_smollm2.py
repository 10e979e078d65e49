"""SmolLM2 out of its GGUF file against what Transformers computed on the dequantised weights."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shoal.model.gguf import import_gguf
from shoal.model.spec import ImportedModel

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def reference(golden: Path) -> dict[str, np.ndarray]:
    return dict(np.load(golden / "smollm2" / "reference.npz"))


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> ImportedModel:
    return import_gguf(smollm2_gguf, name="smollm2")


def test_logits_in_full_precision_are_those_of_transformers(
    reference: dict[str, np.ndarray],
    smollm2: ImportedModel,
    lowered: Callable[..., ImportedModel],
    causal_logits: Callable[..., np.ndarray],
) -> None:
    logits = causal_logits(lowered(smollm2, "cpu-exact"), reference["ids"][:32], prefill=30)

    top = np.take_along_axis(logits, reference["top_tokens"][:32].astype(np.int64), axis=-1)
    np.testing.assert_allclose(top, reference["top_logits"][:32], atol=1e-3)
    partition = np.logaddexp.reduce(logits.astype(np.float64), axis=-1)
    np.testing.assert_allclose(partition, reference["logsumexp"][:32], atol=1e-3)


def test_rounded_activations_cost_little(
    reference: dict[str, np.ndarray],
    smollm2: ImportedModel,
    lowered: Callable[..., ImportedModel],
    causal_logits: Callable[..., np.ndarray],
) -> None:
    logits = causal_logits(lowered(smollm2, "cpu"), reference["ids"], prefill=60)

    partition = np.logaddexp.reduce(logits.astype(np.float64), axis=-1, keepdims=True)
    ours = np.take_along_axis(logits, reference["top_tokens"].astype(np.int64), axis=-1) - partition
    theirs = reference["top_logits"] - reference["logsumexp"][:, None]
    # Over the 32 likeliest tokens: the rest of the sum is small and cannot be negative enough to hide an error.
    kl = (np.exp(theirs) * (theirs - ours)).sum(-1).mean()
    assert abs(kl) < 0.02
