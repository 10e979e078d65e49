"""Writing a canonical graph: nodes with typed outputs, external stubs for weights, our functions where they are used."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx
from onnx import TensorProto, helper

from shoal.model.affine import Blocked, Dense, Format, part_shape
from shoal.model.functions import DOMAIN, LINEAR, OPSET, definitions, operator

IR_VERSION = 11
ELEMENT_TYPES: Mapping[str, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "uint8": TensorProto.UINT8,
    "int64": TensorProto.INT64,
}
Shape = tuple[int | str, ...]


@dataclass(slots=True)
class GraphWriter:
    """A graph under construction; every method that adds something returns the name of what it added.

    `matrices` are the shapes [outputs, inputs] of the weights, `formats` how they are stored (absent: fp32).
    """

    matrices: Mapping[str, tuple[int, int]]
    formats: Mapping[str, Format]
    graph: onnx.GraphProto = field(default_factory=lambda: onnx.GraphProto(name="shoal"))
    operators: set[str] = field(default_factory=set)
    declared: set[str] = field(default_factory=set)

    def input(self, name: str, shape: Shape, *, dtype: str = "float32") -> str:
        """Declare a graph input."""
        self.graph.input.append(helper.make_tensor_value_info(name, ELEMENT_TYPES[dtype], shape))
        return name

    def output(self, name: str, shape: Shape) -> str:
        """Declare an fp32 graph output."""
        self.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def stub(self, name: str, shape: tuple[int, ...], *, dtype: str = "float32") -> str:
        """Declare an external initializer, once however often it is used."""
        if name not in self.declared:
            self.declared.add(name)
            self.graph.initializer.append(stub(name, ELEMENT_TYPES[dtype], shape))
        return name

    def scalar(self, name: str, value: float) -> str:
        """Declare an inline fp32 scalar, once."""
        return self._inline(helper.make_tensor(name, TensorProto.FLOAT, (), [value]))

    def integers(self, name: str, values: tuple[int, ...]) -> str:
        """Declare an inline int64 vector, once."""
        return self._inline(helper.make_tensor(name, TensorProto.INT64, (len(values),), values))

    def node(self, op: str, inputs: list[str], output: str, shape: Shape, **attributes: float | str) -> str:
        """Add a standard operator; its first output is fp32 of *shape*, further ones are the caller's to append."""
        return self._append(helper.make_node(op, inputs, [output], name=output), shape, attributes)

    def call(self, op: str, inputs: list[str], output: str, shape: Shape, **attributes: float | str) -> str:
        """Add a call of one of `shoal.model.functions`."""
        self.operators.add(op)
        return self._append(helper.make_node(op, inputs, [output], name=output, domain=DOMAIN), shape, attributes)

    def weighted(self, kind: str, x: str, weight: str, output: str, rows: Shape) -> str:
        """Apply a matrix as LINEAR or EMBEDDING to *x*; *rows* are its axes before the last, for example (1, "T")."""
        shape = self.matrices[weight]
        out_shape = (*rows, shape[0] if kind == LINEAR else shape[1])
        match self.formats.get(weight, Dense()):
            case Dense(dtype=dtype):
                return self.call(kind, [x, self.stub(weight, shape, dtype=dtype)], output, out_shape)
            case Blocked() as form:
                parts = {weight + suffix: part_shape(suffix, form, shape) for suffix in form.suffixes}
                arrays = [self.stub(name, part, dtype=dtype) for name, (dtype, part) in parts.items()]
                return self.call(
                    operator(kind, form), [x, *arrays], output, out_shape, zero_point=float(form.zero_point)
                )

    def model(self) -> onnx.ModelProto:
        """The finished model, with the definitions of the functions that it calls."""
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
        return helper.make_model(
            self.graph,
            functions=definitions(self.operators),
            opset_imports=opsets,
            ir_version=IR_VERSION,
            producer_name="shoal",
        )

    def _append(self, node: onnx.NodeProto, shape: Shape, attributes: Mapping[str, int | float | str]) -> str:
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.graph.node.append(node)
        self.graph.value_info.append(helper.make_tensor_value_info(node.name, TensorProto.FLOAT, shape))
        return str(node.name)

    def _inline(self, tensor: TensorProto) -> str:
        if tensor.name not in self.declared:
            self.declared.add(tensor.name)
            self.graph.initializer.append(tensor)
        return str(tensor.name)


def stub(name: str, element_type: int, shape: tuple[int, ...]) -> TensorProto:
    """An initializer whose data live elsewhere, under its own name."""
    tensor = TensorProto(name=name, data_type=element_type, dims=shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=name)
    return tensor
