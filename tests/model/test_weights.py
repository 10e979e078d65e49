"""What rounding costs is measured on part of a matrix, and told of all of it."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from shoal.errors import UnsupportedModelError
from shoal.model.affine import Blocked
from shoal.model.checkpoint import Checkpoint, open_checkpoint
from shoal.model.quantize import INT4, INT8, blocks_from_float
from shoal.model.weights import MEASURED_ROWS, Matrix, worst_error


def checkpoint_of(matrix: np.ndarray, folder: Path) -> Checkpoint:
    save_file({"w": matrix}, folder / "model.safetensors")
    return open_checkpoint(folder)


@pytest.mark.parametrize("form", [INT8, INT4], ids=["int8", "int4"])
def test_the_error_of_rows_spread_over_a_matrix_is_that_of_the_matrix(form: Blocked, tmp_path: Path) -> None:
    matrix = np.sin(np.arange(8 * MEASURED_ROWS * 64, dtype=np.float32) ** 2).reshape(-1, 64)
    matrix *= np.linspace(0.5, 2, len(matrix), dtype=np.float32)[:, None]

    error = worst_error(checkpoint_of(matrix, tmp_path), {"w": Matrix(stored="w", shape=matrix.shape, form=form)})

    assert error == pytest.approx(blocks_from_float(matrix, form)[1], rel=0.05)


@pytest.mark.parametrize("form", [INT8, INT4], ids=["int8", "int4"])
def test_a_single_infinite_weight_is_noticed_whether_or_not_its_row_is_measured(form: Blocked, tmp_path: Path) -> None:
    matrix = np.ones((8 * MEASURED_ROWS, 32), np.float32)
    matrix[1, 7] = np.inf

    with pytest.raises(UnsupportedModelError, match="tensor w holds numbers up to inf"):
        worst_error(checkpoint_of(matrix, tmp_path), {"w": Matrix(stored="w", shape=matrix.shape, form=form)})
