"""`GET /openapi.json`, and `GET /docs`: the same document as a page for people."""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from html import escape
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Response

from loramux.server.openapi import PATH, document
from loramux.server.parts import Parts
from loramux.server.wire.strict import encode_json

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h2 { margin: 2.5rem 0 .25rem; overflow-wrap: anywhere; }
code, pre { font: .9em/1.5 ui-monospace, monospace; }
pre { padding: .75rem; border: 1px solid #8888; border-radius: .5rem; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; }
tr { border-bottom: 1px solid #8884; }
"""


def reference_routes(_: Parts) -> APIRouter:
    """The routes; both say the same to everyone, so that neither needs a key."""
    router = APIRouter()

    @router.get("/openapi.json")
    async def openapi() -> Response:
        return Response(_document()[0], media_type="application/json")

    @router.get("/docs")
    async def docs() -> Response:
        headers = {"content-security-policy": POLICY}
        return Response(_document()[1], media_type="text/html; charset=utf-8", headers=headers)

    return router


@cache
def _document() -> tuple[bytes, bytes]:
    """For programs, and as a page: made when somebody asks, for most starts never need it."""
    content = document(version("loramux"))
    return encode_json(content), "".join(_page(content)).encode()


def _page(content: Mapping[str, Any]) -> Iterator[str]:
    info = content["info"]
    yield f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{info["title"]} API</title>'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<style>{_STYLE}</style></head><body><main>"
    yield f"<h1>{info['title']} {escape(info['version'])}</h1><p>{escape(info['description'])} "
    yield f'For programs: <a href="{PATH}">{PATH}</a>.</p>'
    for path, methods in content["paths"].items():
        for method, operation in methods.items():
            yield from _operation(method, path, operation, content["components"]["schemas"])
    yield "</main></body></html>"


def _operation(
    method: str, path: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]
) -> Iterator[str]:
    name = operation["operationId"]
    yield f'<section aria-labelledby="{name}"><h2 id="{name}">'
    yield f"<code>{method.upper()} {escape(path)}</code></h2>"
    yield f"<p>{escape(operation['summary'])}.</p>"
    if "requestBody" in operation:
        body = operation["requestBody"]["content"]["application/json"]
        schema = schemas[body["schema"]["$ref"].rpartition("/")[2]]
        yield "<table><thead><tr><th>field</th><th>type</th><th></th></tr></thead><tbody>"
        for field, about in schema["properties"].items():
            if about.get("description") != "Not supported.":
                needed = "required" if field in schema.get("required", ()) else ""
                yield f"<tr><td><code>{field}</code></td><td>{escape(_type(about))}</td>"
                yield f"<td>{needed}</td></tr>"
        yield f"</tbody></table><pre>{escape(json.dumps(body['example'], indent=2))}</pre>"
    codes = ", ".join(
        f"{code} {escape(said['description'])}" for code, said in operation["responses"].items()
    )
    yield f"<p>Answers: {codes}.</p></section>"


def _type(schema: Mapping[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(
            dict.fromkeys(_type(part) for part in schema["anyOf"] if part.get("type") != "null")
        )
    if "enum" in schema or "const" in schema:
        return " or ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    kind = schema.get("type", "any")
    kind = " or ".join(name for name in kind if name != "null") if isinstance(kind, list) else str(kind)
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    return kind if low is None or high is None else f"{kind}, {low:g} to {high:g}"
