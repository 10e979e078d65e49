"""The OpenAPI page at `/schema`: plain HTML from the schema itself.

The usual viewers load their scripts from a public server, which a site at the edge may not reach; `/schema/openapi.json`
feeds any of them.
"""

from collections.abc import Iterator
from html import escape
from typing import Any

from litestar import MediaType, Request
from litestar.openapi.plugins import OpenAPIRenderPlugin

Json = dict[str, Any]

_HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Shoal API</title>
<style>body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}code{background:#eee;padding:0 .2em}
table{border-collapse:collapse;width:100%}td,th{border:1px solid #ccc;padding:.2em .5em;text-align:left;vertical-align:top}</style>
"""


class SchemaPage(OpenAPIRenderPlugin):
    """Litestar's hook for a page."""

    def __init__(self) -> None:
        super().__init__(path="/", media_type=MediaType.HTML)

    def render(self, request: Request[Any, Any, Any], openapi_schema: Json) -> bytes:  # noqa: ARG002 - the hook's signature
        return render_html(openapi_schema).encode()


def render_html(schema: Json) -> str:
    """The whole page."""
    rows = "".join(
        f"<tr><td><code>{escape(method)} {escape(path)}</code></td><td>{escape(summary)}</td>"
        f"<td>{_link(asks)}</td><td>{_link(tells)}</td></tr>"
        for method, path, summary, asks, tells in operations(schema)
    )
    structs = "".join(_struct(name, body) for name, body in sorted(schema["components"]["schemas"].items()))
    info = schema["info"]
    return (
        f"{_HEAD}<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info['description'])}</p>"
        f'<p>For tools: <a href="/schema/openapi.json">openapi.json</a></p>'
        f"<table><tr><th>Call</th><th></th><th>Asks</th><th>Answers</th></tr>{rows}</table>{structs}</html>"
    )


def operations(schema: Json) -> Iterator[tuple[str, str, str, str, str]]:
    """(method, path, summary, struct of the body, struct of the answer) of every call."""
    for path, methods in sorted(schema["paths"].items()):
        for method, operation in methods.items():
            answers = operation["responses"]
            good = answers[min(answers)]
            yield (
                method.upper(),
                path,
                operation.get("summary", ""),
                _content(operation.get("requestBody", {})),
                _content(good),
            )


def fields(struct: Json) -> Iterator[tuple[str, str, bool]]:
    """(name, type in words, whether it must be given) of a component's fields."""
    required = set(struct.get("required", ()))
    for name, field in struct.get("properties", {}).items():
        yield name, type_words(field), name in required


def type_words(field: Json) -> str:
    """A field's type as people say it, with its range."""
    if "$ref" in field:
        return str(field["$ref"]).rsplit("/", 1)[-1]
    for union in ("oneOf", "anyOf"):
        if union in field:
            return " or ".join(dict.fromkeys(type_words(f) for f in field[union]))
    if "enum" in field:
        return " or ".join(repr(v) for v in field["enum"])
    if "const" in field:
        return repr(field["const"])
    if field.get("type") == "array":
        return f"list of {type_words(field.get('items') or {'type': 'any'})}"
    return f"{field.get('type', 'any')}{_range(field)}"


def _range(field: Json) -> str:
    low, high = field.get("minimum"), field.get("maximum")
    if low is None and high is None:
        return ""
    return f" in [{'' if low is None else low}, {'' if high is None else high}]"


def _content(body: Json) -> str:
    for media in body.get("content", {}).values():
        if "schema" in media:
            words = type_words(media["schema"])
            return "" if words in {"any", "null"} else words
    return ""


def _link(words: str) -> str:
    name = words.rsplit(" ", 1)[-1]
    return words if not name[:1].isupper() else f'<a href="#{escape(name)}">{escape(words)}</a>'


def _struct(name: str, body: Json) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(field)}</code></td><td>{escape(words)}</td><td>{'required' if must else ''}</td></tr>"
        for field, words, must in fields(body)
    )
    return f'<h3 id="{escape(name)}">{escape(name)}</h3><table>{rows}</table>' if rows else ""
