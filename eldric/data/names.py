"""Names of models in a store, and the names of their files."""

import re

from eldric.errors import InvalidRequest

MAX_ID_CHARACTERS = 128

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-\d{5}", re.DOTALL)
_FOREIGN = re.compile(r"[^A-Za-z0-9._:-]+")


def check_id(model: str) -> str:
    """A model's name: letters, digits, '-', '_', '.' and ':', the first a letter or digit, at most 128 characters.

    So a name is one plain folder, never hidden and never a way out of the store. A name that ends like a part of a
    split set ("-00001-of-00003") would make a single file look like one. Raises InvalidRequest.
    """
    if not _ID.fullmatch(model):
        raise InvalidRequest(
            f"{model[:200]!r} is no name for a model: use letters, digits, '-', '_', '.' and ':', "
            f"a letter or digit first, at most {MAX_ID_CHARACTERS} characters"
        )
    if _PART.fullmatch(model):
        raise InvalidRequest(f"{model!r} ends like a part of a split set: leave that ending out")
    return model


def id_of(file_name: str) -> str:
    """The name that a model gets from its file's name: without ".gguf" and part number, other characters as '-'.

    Raises InvalidRequest when nothing is left.
    """
    stem = file_name.removesuffix(".gguf")
    if part := _PART.fullmatch(stem):
        stem = part["stem"]
    model = _FOREIGN.sub("-", stem).strip("-._:")[:MAX_ID_CHARACTERS].rstrip("-._:")
    if not model:
        raise InvalidRequest(f"{file_name!r} gives no name for a model: give one")
    return check_id(model)


def is_later_part(file_name: str) -> bool:
    """Whether a file is a part of a split set, but not the first: the first stands for the set."""
    part = _PART.fullmatch(file_name.removesuffix(".gguf"))
    return part is not None and int(part["number"]) != 1


def stored_names(model: str, parts: int) -> tuple[str, ...]:
    """Names of a model's files in its folder: "ID.gguf", or those of a split set in order."""
    if parts == 1:
        return (f"{model}.gguf",)
    return tuple(f"{model}-{part:05}-of-{parts:05}.gguf" for part in range(1, parts + 1))
