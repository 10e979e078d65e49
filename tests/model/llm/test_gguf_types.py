"""Every tensor type of GGUF keeps its numbers bit for bit."""

from collections.abc import Callable

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type

from shoal.errors import UnsupportedModelError
from shoal.model.affine import Blocked, Blocks, dequantise
from shoal.model.gguf_blocks import block_array, block_types, dense_array, format_of
from shoal.model.gguf_file import GgufTensor

ROWS, COLUMNS = 3, 512
BLOCKED = sorted(block_types(), key=lambda kind: kind.name)


def tensor_of(raw: np.ndarray, kind: Type) -> GgufTensor:
    return GgufTensor("w", kind, (ROWS, COLUMNS), raw.reshape(-1))


@pytest.mark.parametrize("kind", BLOCKED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("seed", range(3))
def test_blocks_hold_exactly_what_the_type_means(kind: Type, seed: int, encoded: Callable[..., np.ndarray]) -> None:
    raw = encoded(seed, (ROWS, COLUMNS), kind)
    tensor = tensor_of(raw, kind)
    form = format_of(tensor)
    assert isinstance(form, Blocked)

    ours = dequantise(Blocks(*(block_array(tensor, suffix) for suffix in form.suffixes)), form)

    np.testing.assert_array_equal(ours, gguf.quants.dequantize(raw, kind))


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16], ids=lambda kind: kind.name)
def test_plain_numbers_stay_in_their_type(kind: Type, encoded: Callable[..., np.ndarray]) -> None:
    raw = encoded(0, (ROWS, COLUMNS), kind)

    ours = dense_array(tensor_of(raw, kind))

    assert ours.nbytes == raw.nbytes
    np.testing.assert_array_equal(ours.astype(np.float32), gguf.quants.dequantize(raw, kind))


def test_a_type_without_exact_blocks_is_refused_by_name() -> None:
    tensor = GgufTensor("blk.0.attn_q.weight", Type.IQ4_NL, (1, 32), np.zeros(18, np.uint8))

    with pytest.raises(UnsupportedModelError, match=r"blk\.0\.attn_q\.weight has the type IQ4_NL"):
        format_of(tensor)
