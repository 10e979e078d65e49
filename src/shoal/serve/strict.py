"""The web framework's hook for request bodies, bound to our strict parser.

Litestar would convert a body leniently ("5" passes for a number) and word the fault its own way.  A DTO may decode the
bytes itself, and the OpenAPI page still shows the struct.
"""

from collections.abc import Generator
from typing import Any

import msgspec
from litestar.dto import AbstractDTO, DTOFieldDefinition
from litestar.openapi.spec import Reference, Schema
from litestar.typing import FieldDefinition

from shoal.serve.body import FieldRules, parse_body


def strict(kind: type[msgspec.Struct], rules: FieldRules = FieldRules()) -> type[AbstractDTO[Any]]:  # noqa: B008 - frozen
    """A DTO that decodes a body with `parse_body`."""

    class StrictBody(AbstractDTO[Any]):
        """Decodes and documents one struct; encodes nothing."""

        def decode_bytes(self, value: bytes) -> Any:  # noqa: ANN401 - the framework's signature
            return parse_body(value, kind, rules)

        @classmethod
        def create_for_field_definition(
            cls,
            field_definition: FieldDefinition,
            handler_id: str,
            backend_cls: Any = None,  # noqa: ANN401 - same
        ) -> None:
            """No transfer model is needed: the struct is the wire format."""

        @classmethod
        def create_openapi_schema(
            cls,
            field_definition: FieldDefinition,
            handler_id: str,  # noqa: ARG003 - the framework's signature
            schema_creator: Any,  # noqa: ANN401 - private to the framework
        ) -> Reference | Schema:
            schema: Reference | Schema = schema_creator.for_field_definition(field_definition)
            return schema

        @classmethod
        def generate_field_definitions(cls, model_type: type[Any]) -> Generator[DTOFieldDefinition, None, None]:  # noqa: ARG003
            yield from ()

        @classmethod
        def detect_nested_field(cls, field_definition: FieldDefinition) -> bool:  # noqa: ARG003 - the framework's signature
            return False

    return StrictBody
