"""From the form that a request asks of its answer to the grammar that makes it so."""

import json
from collections.abc import Mapping
from typing import assert_never

from shoal.runtime.grammar import JSON_OBJECT, Grammar, GrammarKind
from shoal.serve.openai_tools import GrammarFormat, JsonObjectFormat, JsonSchemaFormat, ResponseFormat, TextFormat


def answer_grammar(wanted: ResponseFormat | None) -> Grammar | None:
    """What the answer must look like; None: any text."""
    match wanted:
        case None | TextFormat():
            return None
        case JsonObjectFormat():
            return JSON_OBJECT
        case JsonSchemaFormat(json_schema=described):
            return schema_grammar(described.schema)
        case GrammarFormat(syntax="regex", definition=text):
            return Grammar(kind=GrammarKind.REGEX, text=text)
        case GrammarFormat(definition=text):
            return Grammar(kind=GrammarKind.LARK, text=text)
        case _:
            assert_never(wanted)


def schema_grammar(schema: Mapping[str, object] | None) -> Grammar:
    """JSON that *schema* describes; None: any object."""
    if schema is None:
        return JSON_OBJECT
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema, ensure_ascii=False, separators=(",", ":")))
