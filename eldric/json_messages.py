"""Messages as JSON and back, for REST: protobuf's JSON mapping with two changes for people.

Field names are those of the proto (snake_case; camelCase is read as well), and 64-bit integers are JSON numbers up to
2^53 in size, strings above, where numbers would lose digits in JavaScript.
"""

import json
import re
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from eldric.errors import InvalidRequest

_EXACT = 2**53
_WIDE = {
    FieldDescriptor.TYPE_INT64,
    FieldDescriptor.TYPE_UINT64,
    FieldDescriptor.TYPE_SINT64,
    FieldDescriptor.TYPE_FIXED64,
    FieldDescriptor.TYPE_SFIXED64,
}
_MAX_DEPTH = 50
_UNKNOWN = re.compile(r'has no field named "(.*?)" at "(.*?)"')


def to_json(message: Message) -> dict[str, Any]:
    """A JSON object with every field that has no notion of absence, and of the others those that are present."""
    made: dict[str, Any] = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    _use_numbers(made, message.DESCRIPTOR)
    return made


def _use_numbers(made: dict[str, Any], descriptor: Any) -> None:
    for field in descriptor.fields:
        value = made.get(field.name)
        if value is None:
            continue
        entry: Any = field.message_type
        if is_map(field):
            value_field = entry.fields_by_name["value"]
            made[field.name] = {key: _numbers(item, value_field) for key, item in value.items()}
        elif field.is_repeated:
            made[field.name] = [_numbers(item, field) for item in value]
        else:
            made[field.name] = _numbers(value, field)


def _numbers(value: Any, field: FieldDescriptor) -> Any:
    if field.type in _WIDE and isinstance(value, str):
        number = int(value)
        return number if abs(number) <= _EXACT else value
    if field.message_type is not None and isinstance(value, dict):
        _use_numbers(value, field.message_type)
    return value


def from_json(text: bytes, message: Message) -> None:
    """Fills `message` from a JSON object; an empty text is an empty object. Raises InvalidRequest that names what does
    not fit."""
    try:
        value = json.loads(text, object_pairs_hook=_object) if text.strip() else {}
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {_one_line(error)}") from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body is not a JSON object")
    try:
        json_format.ParseDict(value, message, max_recursion_depth=_MAX_DEPTH)
    except (json_format.ParseError, RecursionError, TypeError, ValueError, AttributeError) as error:
        name = message.DESCRIPTOR.name
        if unknown := _UNKNOWN.search(str(error)):
            raise InvalidRequest(f"the body has an unknown field {unknown[1]!r} in {unknown[2]}") from None
        raise InvalidRequest(f"the body does not fit {name}: {_one_line(error)}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key is there twice")
    return made


def set_text(message: Message, path: str, values: list[str]) -> None:
    """Sets the field at `path` ("a" or "a.b") from the text of a path variable or query parameter.

    Raises InvalidRequest when there is no such field, or the text is no value of it.
    """
    *parents, last = path.split(".")
    descriptor: Any = message.DESCRIPTOR
    for parent in parents:
        field = field_of(descriptor, parent, path)
        if field.message_type is None or field.is_repeated:
            raise InvalidRequest(f"no parameter {path!r}: {parent!r} has no fields")
        descriptor = field.message_type
    field = field_of(descriptor, last, path)
    if is_map(field) or (field.message_type is not None and field.message_type.file.package == "eldric.v1"):
        raise InvalidRequest(f"parameter {path!r} is not a plain value: send it in a JSON body")
    if len(values) > 1 and not field.is_repeated:
        raise InvalidRequest(f"parameter {path!r} is given {len(values)} times")
    plain = [_plain(text, field, path) for text in values]
    made: Any = {field.name: plain if field.is_repeated else plain[0]}
    for parent in reversed(parents):
        made = {parent: made}
    try:
        json_format.ParseDict(made, message)
    except (json_format.ParseError, TypeError, ValueError) as error:
        raise InvalidRequest(f"parameter {path!r}: {_one_line(error)}") from None


def field_of(descriptor: Any, name: str, path: str) -> FieldDescriptor:
    """A field by its proto name or its JSON name. Raises InvalidRequest that lists the fields there are."""
    field: FieldDescriptor | None = descriptor.fields_by_name.get(name)
    for other in descriptor.fields:
        if field is None and other.json_name == name:
            field = other
    if field is None:
        known = ", ".join(other.name for other in descriptor.fields) or "none"
        raise InvalidRequest(f"no parameter {path!r}; there are: {known}")
    return field


def is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _plain(text: str, field: FieldDescriptor, path: str) -> Any:
    if field.type != FieldDescriptor.TYPE_BOOL:
        return text
    if text.lower() not in ("true", "false", "1", "0"):
        raise InvalidRequest(f"parameter {path!r} is true or false, not {text!r}")
    return text.lower() in ("true", "1")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
