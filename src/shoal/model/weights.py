"""Matrices of a checkpoint in the format in which the model keeps them, and what rounding them to it costs.

The arrays are computed when they are asked for, matrix by matrix: keeping them all would be a second copy of the model in
memory.  The error is wanted before (`spec.import_error` travels with the model), and rounding to blocks is most of an import's
time, so that it is measured on rows spread over each matrix: a Frobenius norm over a hundred thousand weights is as good.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from shoal.errors import UnsupportedModelError
from shoal.model.affine import FLOAT_DTYPES, Array, Blocked, Blocks, Dense, Floats, Format
from shoal.model.checkpoint import Checkpoint
from shoal.model.quantize import INT8, blocks_from_float, fits, format_named, relative_error

MEASURED_ROWS = 128
"""Rows of a matrix whose rounding to blocks is measured; smaller matrices are measured whole."""
_SAID = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_HALVES = {"F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A matrix [outputs, inputs]: its name in the checkpoint, and how the model keeps it."""

    stored: str
    shape: tuple[int, int]
    form: Format


def choose_formats(shapes: Mapping[str, tuple[int, int]], quantise: str, fine: Collection[str]) -> dict[str, Format]:
    """The format of each matrix; those in *fine* get 8 bits where the others get 4.

    A 4-bit head alone costs about thirty times the KL divergence of all the rest.  Rows that are not whole blocks stay in fp16.
    """
    form = format_named(quantise)
    four_bits = isinstance(form, Blocked) and form.bits < INT8.bits
    wanted = {name: INT8 if four_bits and name in fine else form for name in shapes}
    return {
        name: wanted[name] if fits(wanted[name], shape) else Dense(dtype="float16") for name, shape in shapes.items()
    }


def kept_formats(checkpoint: Checkpoint, stored: Mapping[str, str]) -> dict[str, Format]:
    """The formats in which *checkpoint* has the matrices (our name: its name): nothing is rounded, and nothing grows.

    A tensor that is missing counts as fp32 here: reading it says what is wrong.
    """
    types = {ours: found.dtype if (found := checkpoint.stored.get(theirs)) else "" for ours, theirs in stored.items()}
    return {name: Dense(dtype=_HALVES.get(dtype, "float32")) for name, dtype in types.items()}


def commonest(formats: Mapping[str, Format], shapes: Mapping[str, tuple[int, int]]) -> str:
    """What a user calls the dense format of most weights."""
    sizes: Counter[str] = Counter()
    for name, form in formats.items():
        if isinstance(form, Dense):
            sizes[_SAID[form.dtype]] += math.prod(shapes[name])
    return sizes.most_common(1)[0][0]


def matrix_arrays(checkpoint: Checkpoint, matrices: Mapping[str, Matrix]) -> dict[str, Callable[[], Array]]:
    """Readers of the arrays that the matrices are kept as, by array name (`shoal.model.affine`)."""

    # The arrays of one matrix are asked for one after another: quantise it once.
    @lru_cache(maxsize=1)
    def blocks(name: str) -> Blocks:
        matrix = matrices[name]
        assert isinstance(matrix.form, Blocked)
        return blocks_from_float(_floats(checkpoint, matrix), matrix.form)[0]

    readers: dict[str, Callable[[], Array]] = {}
    for name, matrix in matrices.items():
        match matrix.form:
            case Dense(dtype=dtype):
                readers[name] = partial(_dense, checkpoint, matrix, dtype)
            case Blocked(suffixes=suffixes):
                readers |= {name + suffix: partial(_part, blocks, name, suffix) for suffix in suffixes}
    return readers


def read_float32(checkpoint: Checkpoint, stored: str, shape: tuple[int, ...], offset: float = 0.0) -> Array:
    """A norm, bias or small table in fp32, plus *offset*."""
    return checkpoint.read(stored, shape).astype(np.float32) + np.float32(offset)


def worst_error(checkpoint: Checkpoint, matrices: Mapping[str, Matrix]) -> float | None:
    """Largest relative error of the matrices (reads each of them once); None where every format is exact.

    Raises UnsupportedModelError naming a tensor that holds numbers which its format cannot.
    """
    rounded = [m for m in matrices.values() if _rounds(checkpoint, m)]
    return max((_error(checkpoint, m) for m in rounded), default=None)


def _rounds(checkpoint: Checkpoint, matrix: Matrix) -> bool:
    match matrix.form:
        case Dense(dtype="float32"):
            return False
        case Dense(dtype=dtype):
            return _HALVES.get(checkpoint.stored[matrix.stored].dtype) != dtype
        case Blocked():
            return True


def _error(checkpoint: Checkpoint, matrix: Matrix) -> float:
    exact = _floats(checkpoint, matrix)
    match matrix.form:
        case Dense(dtype=dtype):
            with np.errstate(over="ignore"):
                error = relative_error(exact, exact.astype(FLOAT_DTYPES[dtype]).astype(np.float32))
            kept = dtype
        case Blocked() as form:
            error = blocks_from_float(_spread(exact), form)[1] if np.isfinite(exact).all() else math.inf
            kept = f"int{form.bits}"
    if not math.isfinite(error):
        raise UnsupportedModelError(
            f"tensor {matrix.stored} holds numbers up to {np.abs(exact).max():g}, which {kept} cannot",
            hint="import as fp32 or bf16",
        )
    return error


def _spread(exact: Floats) -> Floats:
    """At most MEASURED_ROWS rows, from the first to the last."""
    return exact[np.linspace(0, len(exact) - 1, min(len(exact), MEASURED_ROWS)).astype(np.int64)]


def _floats(checkpoint: Checkpoint, matrix: Matrix) -> Floats:
    return checkpoint.read(matrix.stored, matrix.shape).astype(np.float32)


def _dense(checkpoint: Checkpoint, matrix: Matrix, dtype: str) -> Array:
    return checkpoint.read(matrix.stored, matrix.shape).astype(FLOAT_DTYPES[dtype], copy=False)


def _part(blocks: Callable[[str], Blocks], name: str, suffix: str) -> Array:
    return blocks(name).part(suffix)
