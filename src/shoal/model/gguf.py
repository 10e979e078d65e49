"""From a GGUF file to the canonical model: numbers kept, nothing computed that the file does not say.

What the file has and the graph would not use is refused: a tensor left over means an architecture that we do not know.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from shoal.errors import CorruptFileError, UnsupportedModelError
from shoal.model.affine import Array, Blocked, Dense, Format
from shoal.model.gguf_blocks import block_array, dense_array, dense_types, format_of
from shoal.model.gguf_config import ROPE_FREQS, config_of, special_tokens
from shoal.model.gguf_file import GgufFile, GgufTensor, read_gguf
from shoal.model.gguf_tokenizer import tokenizer_files
from shoal.model.rope import inverse_frequencies
from shoal.model.spec import ImportedModel, ModelKind, ModelSpec
from shoal.model.transformer import TransformerConfig, build, matrix_shapes, vector_sizes


def import_gguf(path: Path, *, name: str) -> ImportedModel:
    """Import a file under *name*; raises CorruptFileError, UnsupportedModelError or OSError.

    Arrays stay mapped and are computed when asked for; `files` are the tokenizer and the template that the file carries inside.
    """
    file = read_gguf(path)
    config = config_of(file)
    matrices = {n: _matrix(file, n, shape) for n, shape in matrix_shapes(config).items()}
    vectors = {n: _vector(file, n, size) for n, size in vector_sizes(config).items()}
    _refuse_leftovers(file, {*matrices, *vectors, ROPE_FREQS})
    formats = {n: format_of(tensor) for n, tensor in matrices.items()}
    tensors: dict[str, Callable[[], Array]] = {}
    for n, tensor in matrices.items():
        tensors |= _arrays(tensor, n, formats[n])
    tensors |= {n: partial(_as_float32, tensor) for n, tensor in vectors.items()}
    tensors |= {n: partial(inverse_frequencies, rope) for n, rope in config.rotations.items()}
    return ImportedModel(
        spec=_spec(file, config, name),
        graph=build(config, formats),
        tensors=tensors,
        files=tokenizer_files(file.metadata),
    )


def _arrays(tensor: GgufTensor, name: str, form: Format) -> dict[str, Callable[[], Array]]:
    match form:
        case Dense():
            return {name: partial(dense_array, tensor)}
        case Blocked(suffixes=suffixes):
            return {name + suffix: partial(block_array, tensor, suffix) for suffix in suffixes}


def _as_float32(tensor: GgufTensor) -> Array:
    return dense_array(tensor).astype(np.float32)


def _matrix(file: GgufFile, name: str, shape: tuple[int, int]) -> GgufTensor:
    tensor = _tensor(file, name)
    if tensor.shape != shape:
        raise CorruptFileError(
            f"tensor {name} has the shape {tensor.shape}, the metadata say {shape}", hint="download the file again"
        )
    return tensor


def _vector(file: GgufFile, name: str, size: int) -> GgufTensor:
    tensor = _tensor(file, name)
    if prod(tensor.shape) != size:
        raise CorruptFileError(
            f"tensor {name} has the shape {tensor.shape}, the metadata say {size}", hint="download the file again"
        )
    if tensor.type not in dense_types():
        raise UnsupportedModelError(
            f"tensor {name} has the type {tensor.type.name}", hint="norms and biases must be F32, F16 or BF16"
        )
    return tensor


def _tensor(file: GgufFile, name: str) -> GgufTensor:
    if name not in file.tensors:
        raise CorruptFileError(
            f"the file has no tensor {name}", hint="download it again, whole: split files are not supported"
        )
    return file.tensors[name]


def _refuse_leftovers(file: GgufFile, used: set[str]) -> None:
    left = sorted(set(file.tensors) - used)
    if left:
        architecture = file.metadata["general.architecture"]
        raise UnsupportedModelError(
            f"{len(left)} tensors have no place in the architecture {architecture}, the first is {left[0]}",
            hint="this variant (mixture of experts, extra biases, vision, ...) is not supported yet",
        )


def _spec(file: GgufFile, config: TransformerConfig, name: str) -> ModelSpec:
    special = special_tokens(file.metadata)
    weights = [t for n, t in file.tensors.items() if n != ROPE_FREQS]
    return ModelSpec(
        name=name,
        kind=ModelKind.CAUSAL_LM,
        architecture=config.architecture,
        licence=str(file.metadata.get("general.license", "unknown")),
        parameters=sum(prod(t.shape) for t in weights),
        context_tokens=config.context_tokens,
        vocabulary=config.vocabulary,
        hidden=config.hidden,
        layers=config.layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        bos_token_id=special.bos,
        eos_token_ids=special.eos,
        add_bos=special.add_bos,
        quantisation=_commonest_type(weights),
    )


def _commonest_type(tensors: list[GgufTensor]) -> str:
    """The type of most layer weights (embedding and head apart, which are often kept finer)."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            sizes[tensor.type.name] += prod(tensor.shape)
    return sizes.most_common(1)[0][0]
