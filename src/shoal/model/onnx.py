"""Any ONNX file as a model: its graph kept, its weights lifted out.

Initializers (and the values of Constant nodes) above 1 KiB become stubs; their bytes stay in the file's parsed form or, when they
lie in a file beside it, are mapped when asked for.  The graph is not rewritten beyond what a chain of blocks needs: weights that
are also listed as inputs (IR 3) stop being inputs, nodes get unique names, calls of the model's own functions are inlined.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, checker, inliner, numpy_helper

from shoal.errors import CorruptFileError, UnknownModelError, UnsupportedModelError
from shoal.model.onnx_spec import describe
from shoal.model.sidecars import carried_files
from shoal.model.spec import Array, ImportedModel

INLINE_BYTES = 1024
_FIRST_IR_WITH_FREE_INITIALIZERS = 4
_FETCH_AGAIN = "fetch the file again"
_NARROW_BITS: Mapping[int, int] = {
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.FLOAT4E2M1: 4,
    TensorProto.INT2: 2,
    TensorProto.UINT2: 2,
}
Reader = Callable[[], Array]


def import_onnx(path: Path, *, name: str) -> ImportedModel:
    """Import a file (and the external data and tokenizer beside it) under *name*.

    Raises UnknownModelError, CorruptFileError, UnsupportedModelError or OSError.
    """
    model = _parse(path)
    _refuse_odd_names(model.graph, path)
    for tensor in _inner_tensors(model.graph):
        if tensor.data_location == TensorProto.EXTERNAL:
            _take_in(tensor, path)
    _lift_constants(model.graph)
    readers = _lift_weights(model.graph, path)
    _tidy_ends(model)
    if model.functions:
        model = inliner.inline_local_functions(model)
    _name_nodes(model.graph)
    _check(model, path)
    # A parsed message keeps all that was ever read into it: only a fresh one is as small as the graph.
    graph = onnx.ModelProto.FromString(model.SerializeToString())
    return ImportedModel(
        spec=describe(graph, path.parent, name), graph=graph, tensors=readers, files=carried_files(path.parent)
    )


def _parse(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise UnknownModelError(f"there is no file {path}", hint="name an .onnx file")
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise CorruptFileError(
            f"{path} ({path.stat().st_size:,} bytes) is not an ONNX model, or is cut short: {error}", hint=_FETCH_AGAIN
        ) from error
    if not model.graph.node or not model.graph.output:
        raise CorruptFileError(
            f"{path} ({path.stat().st_size:,} bytes) holds no graph: {len(model.graph.node)} nodes, "
            f"{len(model.graph.output)} outputs",
            hint=_FETCH_AGAIN,
        )
    return model


def _refuse_odd_names(graph: onnx.GraphProto, path: Path) -> None:
    """Protobuf hands out a text that is no UTF-8 as bytes, which nothing downstream expects."""
    for name in _names(graph):
        if not isinstance(name, str) or "\0" in name:
            raise CorruptFileError(f"{path}: {name!r} is no name", hint=_FETCH_AGAIN)


def _names(graph: onnx.GraphProto) -> Iterator[object]:
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield value.name
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
    for tensor in (*graph.initializer, *_inner_tensors(graph)):
        yield tensor.name
        for entry in tensor.external_data:
            yield from (entry.key, entry.value)


def _check(model: onnx.ModelProto, path: Path) -> None:
    """What ONNX's own checker says of the graph.

    Stubs stand as inputs, because it would look for their files; and inputs and outputs whose shape is not said get one, for
    engines run them (the checker only asks whether there is a shape, not which).
    """
    stubless = onnx.ModelProto()
    stubless.CopyFrom(model)
    stubs = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    inline = [t for t in model.graph.initializer if t.data_location != TensorProto.EXTERNAL]
    del stubless.graph.initializer[:]
    stubless.graph.initializer.extend(inline)
    stubless.graph.input.extend(onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in stubs)
    for value in (*stubless.graph.input, *stubless.graph.output):
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()
    try:
        checker.check_model(stubless)
    # Names that are no UTF-8 make the checker fail with ValueError.
    except (checker.ValidationError, ValueError) as error:
        reason = str(error).split("\n", 1)[0]
        if "No Op registered" in reason or "ir_version" in reason:
            raise UnsupportedModelError(f"{path}: {reason}", hint="export the model with an older opset") from error
        raise CorruptFileError(f"{path} is not a valid graph: {reason}", hint="export the model again") from error


def _inner_tensors(graph: onnx.GraphProto, *, nested: bool = False) -> Iterator[TensorProto]:
    """Tensors in the attributes of nodes, and all those of sub-graphs: they stay where they are."""
    if nested:
        yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _inner_tensors(inner, nested=True)


def _lift_constants(graph: onnx.GraphProto) -> None:
    """Turn Constant nodes with big values into initializers."""
    results = {output.name for output in graph.output}
    for node in [n for n in graph.node if n.op_type == "Constant" and n.domain in {"", "ai.onnx"}]:
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if value is not None and value.ByteSize() > INLINE_BYTES and node.output[0] not in results:
            value.name = node.output[0]
            graph.initializer.append(value)
            graph.node.remove(node)


def _lift_weights(graph: onnx.GraphProto, path: Path) -> dict[str, Reader]:
    """Replace the big initializers by stubs; return what reads them."""
    readers: dict[str, Reader] = {}
    for position, tensor in enumerate(graph.initializer):
        external = tensor.data_location == TensorProto.EXTERNAL
        if tensor.data_type == TensorProto.STRING or not (external or tensor.ByteSize() > INLINE_BYTES):
            continue
        if not tensor.name or tensor.name in readers:
            raise CorruptFileError(
                f"{path}: initializer {position} is called {tensor.name!r}, as no other or another one is",
                hint="export the model again",
            )
        if external and _size(tensor) <= INLINE_BYTES:
            _take_in(tensor, path)
            continue
        readers[tensor.name] = _external_reader(tensor, path) if external else _embedded_reader(tensor, path)
        tensor.CopyFrom(_stub(tensor))
    return readers


def _stub(tensor: TensorProto) -> TensorProto:
    stub = TensorProto(
        name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, data_location=TensorProto.EXTERNAL
    )
    stub.external_data.add(key="location", value=tensor.name)
    return stub


def _embedded_reader(tensor: TensorProto, path: Path) -> Reader:
    """Reader of a tensor inside the file; its bytes are checked now."""
    if tensor.HasField("raw_data"):
        _expect(tensor, len(tensor.raw_data), path)
    try:
        array: Array = numpy_helper.to_array(tensor)
    except (ValueError, TypeError) as error:
        raise CorruptFileError(
            f"{path}: tensor {tensor.name} {list(tensor.dims)}: {error}", hint=_FETCH_AGAIN
        ) from error
    return lambda: array


def _external_reader(tensor: TensorProto, path: Path) -> Reader:
    """Reader of a tensor in a file beside the model, mapped when asked for; its place is checked now."""
    file, offset = _place(tensor, path)
    return partial(_mapped, _stub(tensor), file, offset, _size(tensor))


def _mapped(tensor: TensorProto, file: Path, offset: int, size: int) -> Array:
    data = np.memmap(file, np.uint8, "r", offset, (size,))
    if tensor.data_type not in _NARROW_BITS:
        wide: Array = data.view(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(tuple(tensor.dims))
        return wide
    packed = TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=data.tobytes())
    narrow: Array = numpy_helper.to_array(packed)
    return narrow


def _take_in(tensor: TensorProto, path: Path) -> None:
    """Replace a reference to external data by the data."""
    file, offset = _place(tensor, path)
    with file.open("rb") as opened:
        opened.seek(offset)
        tensor.raw_data = opened.read(_size(tensor))
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]


def _place(tensor: TensorProto, path: Path) -> tuple[Path, int]:
    """File and offset of external data; raises CorruptFileError if it leaves the model's folder or is too short."""
    said = {entry.key: entry.value for entry in tensor.external_data}
    location = said.get("location", "")
    file = path.parent / location
    # Hugging Face's cache keeps a model's files as links into one folder: a link may lead where the model itself lies.
    homes = (path.parent.resolve(), path.resolve().parent)
    if not location or Path(location).is_absolute() or not any(file.resolve().is_relative_to(home) for home in homes):
        raise CorruptFileError(
            f"{path}: tensor {tensor.name} has its data in {location!r}, outside the model's folder",
            hint="do not trust this model",
        )
    if not file.is_file():
        raise CorruptFileError(
            f"{path}: tensor {tensor.name} has its data in {location}, which is missing", hint="fetch it too"
        )
    try:
        offset, length = int(said.get("offset", 0)), int(said.get("length", _size(tensor)))
    except ValueError as error:
        raise CorruptFileError(f"{path}: tensor {tensor.name} lies at {said}", hint=_FETCH_AGAIN) from error
    _expect(tensor, length, path)
    end, held = offset + length, file.stat().st_size
    if offset < 0 or end > held:
        raise CorruptFileError(
            f"tensor {tensor.name} ends at byte {end:,} of {location}, which has {held:,}", hint=_FETCH_AGAIN
        )
    return file, offset


def _expect(tensor: TensorProto, found_bytes: int, path: Path) -> None:
    if found_bytes != _size(tensor):
        raise CorruptFileError(
            f"{path}: tensor {tensor.name} {list(tensor.dims)} should have {_size(tensor):,} bytes and has {found_bytes:,}",
            hint=_FETCH_AGAIN,
        )


def _size(tensor: TensorProto) -> int:
    """Bytes of the tensor as ONNX stores it; raises UnsupportedModelError for a type without a fixed size."""
    try:
        bits = _NARROW_BITS.get(tensor.data_type) or 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, ValueError) as error:
        raise UnsupportedModelError(
            f"tensor {tensor.name} has the unknown element type {tensor.data_type}",
            hint="export the model with an older opset",
        ) from error
    if any(dim < 0 for dim in tensor.dims):
        raise CorruptFileError(f"tensor {tensor.name} has the shape {list(tensor.dims)}", hint=_FETCH_AGAIN)
    return -(-prod(tensor.dims) * bits // 8)


def _tidy_ends(model: onnx.ModelProto) -> None:
    """Inputs that are weights (older files list them) stop being inputs; an output listed twice is one output."""
    weights = {t.name for t in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) < len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(inputs)
        model.ir_version = max(model.ir_version, _FIRST_IR_WITH_FREE_INITIALIZERS)
    outputs = list({value.name: value for value in model.graph.output}.values())
    if len(outputs) < len(model.graph.output):
        del model.graph.output[:]
        model.graph.output.extend(outputs)


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Give nodes without a name of their own one from their operator and position."""
    taken: set[str] = set()
    for position, node in enumerate(graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{position}"
            while node.name in taken:
                node.name += "_"
        taken.add(node.name)
