"""Messages as a newer peer would send them: with fields, in every message of them, that this version does not know."""

from typing import TypeVar

from google.protobuf.message import Message

M = TypeVar("M", bound=Message)

#: Fields 1001 (a number), 1002 (text) and 1003 (a message), as on the wire
#: (https://protobuf.dev/programming-guides/encoding/).
UNKNOWN_FIELDS = b"\xc8\x3e\x2a" + b"\xd2\x3e\x05newer" + b"\xda\x3e\x02\x08\x01"


def newer(message: M) -> M:
    """The message with unknown fields in it and in each message that it holds."""
    made = type(message)()
    made.CopyFrom(message)
    for field, value in made.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for each in value if isinstance(value, list) or hasattr(value, "add") else [value]:
            each.CopyFrom(newer(each))
    made.MergeFromString(UNKNOWN_FIELDS)
    assert UNKNOWN_FIELDS in made.SerializeToString()
    return made
