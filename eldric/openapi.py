"""The OpenAPI description of a node's REST faces, and a page that shows it; both made from the protos.

Format: OpenAPI 3.1.0.
"""

import functools
import html
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

from google.protobuf.descriptor import FieldDescriptor, ServiceDescriptor

from eldric import __version__
from eldric.json_messages import is_map
from eldric.rest import Binding, bindings_of

_INTEGER = {"type": "integer"}
_SCALARS: dict[int, dict[str, Any]] = {
    FieldDescriptor.TYPE_DOUBLE: {"type": "number", "format": "double"},
    FieldDescriptor.TYPE_FLOAT: {"type": "number", "format": "float"},
    FieldDescriptor.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.TYPE_STRING: {"type": "string"},
    FieldDescriptor.TYPE_BYTES: {"type": "string", "format": "byte"},
    FieldDescriptor.TYPE_INT32: {**_INTEGER, "format": "int32"},
    FieldDescriptor.TYPE_SINT32: {**_INTEGER, "format": "int32"},
    FieldDescriptor.TYPE_SFIXED32: {**_INTEGER, "format": "int32"},
    FieldDescriptor.TYPE_UINT32: {**_INTEGER, "minimum": 0},
    FieldDescriptor.TYPE_FIXED32: {**_INTEGER, "minimum": 0},
    FieldDescriptor.TYPE_INT64: {**_INTEGER, "format": "int64"},
    FieldDescriptor.TYPE_SINT64: {**_INTEGER, "format": "int64"},
    FieldDescriptor.TYPE_SFIXED64: {**_INTEGER, "format": "int64"},
    FieldDescriptor.TYPE_UINT64: {**_INTEGER, "minimum": 0},
    FieldDescriptor.TYPE_FIXED64: {**_INTEGER, "minimum": 0},
}
_WELL_KNOWN: dict[str, dict[str, Any]] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Duration": {"type": "string"},
    "google.protobuf.Struct": {"type": "object"},
    "google.protobuf.Value": {},
}
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "code": {"type": "integer", "description": "HTTP code"},
                "status": {"type": "string", "description": "gRPC status"},
                "message": {"type": "string"},
            },
        }
    },
}


@functools.cache
def comments() -> dict[str, str]:
    """What the protos say of services, methods, messages and fields, by their full names."""
    made: dict[str, str] = json.loads(resources.files("eldric.v1").joinpath("comments.json").read_text("utf-8"))
    return made


def _commented(made: dict[str, Any], full_name: str) -> dict[str, Any]:
    text = comments().get(full_name)
    return made if text is None else {**made, "description": text}


def describe(title: str, services: Iterable[ServiceDescriptor]) -> dict[str, Any]:
    """The OpenAPI document of the REST faces of `services`."""
    schemas: dict[str, Any] = {"Error": _ERROR}
    paths: dict[str, Any] = {}
    for service in services:
        for binding in bindings_of(service):
            operation = _operation(binding, schemas)
            paths.setdefault(binding.path, {})[binding.verb.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _operation(binding: Binding, schemas: dict[str, Any]) -> dict[str, Any]:
    method = binding.method
    answer = _reference(method.output_type, schemas)
    content = {"application/json": {"schema": answer}}
    if method.server_streaming:
        content = {
            "text/event-stream": {"schema": {"type": "string", "format": f"events of {method.output_type.name}"}},
            "application/json": {"schema": {"type": "array", "items": answer}},
        }
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    operation: dict[str, Any] = {
        "operationId": f"{method.containing_service.name}_{method.name}",
        "description": comments().get(method.full_name, ""),
        "tags": [method.containing_service.name],
        "parameters": _parameters(binding),
        "responses": {
            "200": {"description": method.output_type.name, "content": content},
            "default": {"description": "an error", "content": error},
        },
    }
    if binding.body:
        body: Any = method.input_type
        if binding.body != "*":
            body = body.fields_by_name[binding.body].message_type
        schema = _reference(body, schemas)
        operation["requestBody"] = {"content": {"application/json": {"schema": schema}}}
    return operation


def _parameters(binding: Binding) -> list[dict[str, Any]]:
    request: Any = binding.method.input_type
    made = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in binding.variables]
    if binding.body:
        return made
    for field in request.fields:
        if field.name not in binding.variables and field.message_type is None:
            made.append(_commented({"name": field.name, "in": "query", "schema": _schema(field, {})}, field.full_name))
    return made


def _reference(descriptor: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    """A reference to a message's schema, which is added with everything that it holds."""
    if descriptor.full_name in _WELL_KNOWN:
        return _WELL_KNOWN[descriptor.full_name]
    name = descriptor.name
    if name not in schemas:
        schemas[name] = {}  # a message may hold itself
        properties = {field.name: _commented(_schema(field, schemas), field.full_name) for field in descriptor.fields}
        made = {"type": "object", "properties": properties, "additionalProperties": False}
        schemas[name] = _commented(made, descriptor.full_name)
    return {"$ref": f"#/components/schemas/{name}"}


def _schema(field: FieldDescriptor, schemas: dict[str, Any]) -> dict[str, Any]:
    if is_map(field):
        entry: Any = field.message_type
        return {"type": "object", "additionalProperties": _schema(entry.fields_by_name["value"], schemas)}
    enum: Any = field.enum_type
    if field.message_type is not None:
        one = _reference(field.message_type, schemas)
    elif enum is not None:
        one = {"type": "string", "enum": [value.name for value in enum.values]}
    else:
        one = dict(_SCALARS[field.type])
    return {"type": "array", "items": one} if field.is_repeated else one


def page(document: dict[str, Any]) -> str:
    """An HTML page of an OpenAPI document; it loads nothing else."""
    title = html.escape(f"{document['info']['title']} {document['info']['version']}")
    calls = "".join(
        _call(verb, path, operation)
        for path, operations in document["paths"].items()
        for verb, operation in operations.items()
    )
    types = "".join(_type(name, schema) for name, schema in sorted(document["components"]["schemas"].items()))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1><p><a href=openapi.json>openapi.json</a></p>{calls}<h2>Types</h2>{types}</html>"
    )


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "code{font:13px ui-monospace,monospace}h3 code{font-size:15px}td,th{text-align:left;padding:.1rem 1rem .1rem 0;"
    "vertical-align:top}@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}a{color:#8bf}}"
)


def _call(verb: str, path: str, operation: dict[str, Any]) -> str:
    rows = [
        (f"{each['name']} ({each['in']})", _words(each["schema"]), each.get("description", ""))
        for each in operation["parameters"]
    ]
    for body in operation.get("requestBody", {}).get("content", {}).values():
        rows.append(("body", _words(body["schema"]), ""))
    for kind, content in operation["responses"]["200"]["content"].items():
        rows.append((f"answer, {kind}", _words(content["schema"]), ""))
    text = html.escape(operation["description"])
    return f"<h3><code>{verb.upper()} {html.escape(path)}</code></h3><p>{text}</p>{_table(rows)}"


def _type(name: str, schema: dict[str, Any]) -> str:
    rows = [
        (field, _words(value), value.get("description", "")) for field, value in schema.get("properties", {}).items()
    ]
    text = html.escape(schema.get("description", ""))
    return f"<h3 id={html.escape(name)}><code>{html.escape(name)}</code></h3><p>{text}</p>{_table(rows)}"


def _table(rows: Sequence[tuple[str, str, str]]) -> str:
    cells = (
        f"<tr><td><code>{html.escape(name)}</code><td>{words}<td>{html.escape(text)}" for name, words, text in rows
    )
    return f"<table>{''.join(cells)}</table>"


def _words(schema: dict[str, Any]) -> str:
    """A schema in words, as HTML."""
    if "$ref" in schema:
        name = html.escape(schema["$ref"].rpartition("/")[2])
        return f"<a href=#{name}>{name}</a>"
    if schema.get("type") == "array":
        return f"list of {_words(schema['items'])}"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"map to {_words(schema['additionalProperties'])}"
    if "enum" in schema:
        return html.escape(" | ".join(schema["enum"]))
    return html.escape(str(schema.get("format") or schema.get("type", "anything")))
