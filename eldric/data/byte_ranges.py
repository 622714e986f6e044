"""The Range field of HTTP (RFC 9110, section 14.1.2)."""

import re

_SPEC = re.compile(r"(\d*)-(\d*)", re.ASCII)
#: More ranges, or longer numbers, than any client asks for in earnest.
_MAX_RANGES = 100
_MAX_DIGITS = 19


def satisfiable(field: str, size_bytes: int) -> str | None:
    """The field with only those ranges that a file of this size can give.

    Returns None for a field that is to be ignored: another unit, or malformed anywhere. When the file has none of the
    ranges, one that it does not have is kept, so that the answer is 416.
    """
    unit, equals, specs = field.partition("=")
    parts = [part.strip(" \t") for part in specs.split(",")]
    parts = [part for part in parts if part]
    if unit.strip().lower() != "bytes" or not equals or not 0 < len(parts) <= _MAX_RANGES:
        return None
    kept = []
    for part in parts:
        spec = _SPEC.fullmatch(part)
        if spec is None or part == "-" or len(part) > 2 * _MAX_DIGITS + 1:
            return None
        first, last = spec[1], spec[2]
        if first and last and int(last) < int(first):
            return None
        if int(first) < size_bytes if first else int(last) > 0:
            kept.append(part)
    return f"bytes={','.join(kept)}" if kept else f"bytes={size_bytes}-"
