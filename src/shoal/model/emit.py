"""Writing a lowered graph: nodes in order, derived initializers, and of the rest only what is used."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx
from onnx import TensorProto, helper

from shoal.model.canonical import stub
from shoal.model.derive import Derivation
from shoal.model.functions import DOMAIN

MICROSOFT = "com.microsoft"
Attribute = float | str | list[int]


@dataclass(slots=True)
class Emitter:
    """A lowered graph under construction from the canonical *source*, whose initializers have the `shapes`."""

    source: onnx.GraphProto
    shapes: Mapping[str, tuple[int, ...]]
    graph: onnx.GraphProto = field(default_factory=lambda: onnx.GraphProto(name="shoal"))
    derived: dict[str, Derivation] = field(default_factory=dict)
    emitted: set[str] = field(default_factory=set)

    def node(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Attribute
    ) -> str:
        """Add an operator; return its first output."""
        node = helper.make_node(op, list(inputs), list(outputs), name=outputs[0], domain=domain)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.copy(node)
        return outputs[0]

    def copy(self, node: onnx.NodeProto) -> None:
        """Add a node as it is."""
        self.graph.node.append(node)
        self.emitted.update(node.output)

    def derive(
        self, name: str, op: str, inputs: Sequence[str], shape: tuple[int, ...], *, bytes_only: bool = False
    ) -> str:
        """Declare a derived initializer (fp32, or uint8 if `bytes_only`) once; return its name."""
        if name not in self.derived:
            self.derived[name] = Derivation(name, op, tuple(inputs))
            self.graph.initializer.append(stub(name, TensorProto.UINT8 if bytes_only else TensorProto.FLOAT, shape))
        return name

    def integers(self, name: str, values: Sequence[int]) -> str:
        """Declare an inline int64 vector once; return its name."""
        if name not in self.emitted:
            self.emitted.add(name)
            self.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, (len(values),), values))
        return name

    def model(self, original: onnx.ModelProto) -> onnx.ModelProto:
        """The finished model; inputs, initializers and functions that nothing uses are left out."""
        used = {name for node in self.graph.node for name in node.input}
        self.graph.initializer.extend(t for t in self.source.initializer if t.name in used)
        # An input that is passed on untouched (a mask on its way to later blocks) is read by no node.
        passed = {o.name for o in self.source.output}
        self.graph.input.extend(i for i in self.source.input if i.name in used or i.name in passed)
        self.graph.output.extend(self.source.output)
        self.graph.value_info.extend(v for v in self.source.value_info if v.name in self.emitted)
        calls = {node.op_type for node in self.graph.node if node.domain == DOMAIN}
        opsets = [o for o in original.opset_import if o.domain != MICROSOFT] + [helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(
            self.graph,
            functions=[f for f in original.functions if f.name in calls],
            opset_imports=opsets,
            ir_version=original.ir_version,
            producer_name="shoal",
        )


def attribute(node: onnx.NodeProto, name: str) -> float:
    """A numeric attribute that our functions always carry."""
    return float(next(helper.get_attribute_value(a) for a in node.attribute if a.name == name))
