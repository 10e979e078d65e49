"""Tensors of a Hugging Face folder: one safetensors file, or several with an index.

Headers are read when the folder is opened, tensors when they are asked for: the peak is one tensor.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from shoal.errors import CorruptFileError, UnsupportedModelError

Array = NDArray[np.generic]

INDEX = "model.safetensors.index.json"
DTYPES = ("F32", "F16", "BF16")
_FETCH_AGAIN = "fetch the file again"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies; `dtype` is safetensors' name of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The tensors of *folder* by name."""

    folder: Path
    stored: Mapping[str, StoredTensor]

    def read(self, name: str, shape: tuple[int, ...]) -> Array:
        """The array of *name*, as stored (float32, float16 or bfloat16); raises what `check` raises."""
        self.check(name, shape)
        with _opened(self.stored[name].file) as file:
            array: Array = file.get_tensor(name)
        return array

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise CorruptFileError unless *name* is there with *shape*, UnsupportedModelError for a dtype we do not read."""
        found = self.stored.get(name)
        if found is None:
            raise CorruptFileError(
                f"tensor {name} {list(shape)} is missing: {self.folder} holds {len(self.stored)} others",
                hint="the folder is incomplete, or its config.json belongs to another model",
            )
        if found.shape != shape:
            raise CorruptFileError(
                f"tensor {name} in {found.file.name} has shape {list(found.shape)}, config.json asks for {list(shape)}",
                hint="config.json and weights belong to different models",
            )
        if found.dtype not in DTYPES:
            raise UnsupportedModelError(
                f"tensor {name} in {found.file.name} has type {found.dtype}; supported are {', '.join(DTYPES)}",
                hint="use a copy of the model in bf16, fp16 or fp32, and --quantise to shrink it here",
            )


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of all safetensors files of *folder*; raises CorruptFileError or UnsupportedModelError."""
    files = _listed(folder)
    stored: dict[str, StoredTensor] = {}
    for file in files:
        stored |= _header(file)
    for name, file_name in _weight_map(folder).items():
        if name not in stored:
            raise CorruptFileError(
                f"tensor {name} is missing from {file_name}, where {INDEX} puts it", hint=_FETCH_AGAIN
            )
    return Checkpoint(folder=folder, stored=stored)


def _listed(folder: Path) -> list[Path]:
    named = sorted(set(_weight_map(folder).values()))
    if named:
        return [_inside(folder, name) for name in named]
    whole = folder / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickled:
        raise UnsupportedModelError(
            f"{folder} has its weights in {pickled[0]}, a pickle that can run code when it is read",
            hint="use the model's safetensors version",
        )
    raise CorruptFileError(f"{folder} has a config.json and no *.safetensors file", hint="fetch the weights too")


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Index).weight_map
    except msgspec.MsgspecError as error:
        raise CorruptFileError(f"{path} is not an index of safetensors files: {error}", hint=_FETCH_AGAIN) from error


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _inside(folder: Path, name: str) -> Path:
    if Path(name).name != name:
        raise CorruptFileError(
            f"{INDEX} names {name!r}, which is not a file of {folder}", hint="do not trust this folder"
        )
    path = folder / name
    if not path.is_file():
        raise CorruptFileError(f"{name}, named in {INDEX}, is missing from {folder}", hint="fetch it")
    return path


def _header(file: Path) -> dict[str, StoredTensor]:
    with _opened(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no mapping, has only keys()
        return {
            name: StoredTensor(file=file, shape=tuple(found.get_shape()), dtype=found.get_dtype())
            for name, found in slices.items()
        }


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="np") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(f"{file}: {_damage(file) or error}", hint=_FETCH_AGAIN) from error


def _damage(file: Path) -> str:
    """What the library does not say: which tensor a truncated file ends in; empty when the header is unreadable."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        size = file.stat().st_size
        with file.open("rb") as opened:
            start = 8 + int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(min(start - 8, size)))
        ends = sorted(
            (start + entry["data_offsets"][1], name) for name, entry in header.items() if name != "__metadata__"
        )
        for end, name in ends:
            if end > size:
                return f"tensor {name} ends at byte {end:,}, the file has {size:,}"
    return ""
