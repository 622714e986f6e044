"""Which files of a repository are the model that is meant."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from eldric.data.sources import HubSource
from eldric.errors import DataLoss, InvalidRequest, NotFound

#: What is taken when nobody says which and there is a choice.
DEFAULT_QUANTIZATION = "Q4_K_M"

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_QUANTIZATION = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:I?Q\d[A-Z0-9_]*|TQ\d_\d|BF16|FP?16|FP?32|MXFP4(?:_MOE)?))$", re.IGNORECASE
)
#: Files beside a model that are none: vision projectors, and what quantizing was steered by.
_BESIDE = re.compile(r"(?:^|[-._])(?:mmproj|imatrix)(?:[-._]|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class FileSet:
    """One model of a repository: its files in order, and its quantization as the names say it, or ""."""

    stem: str
    quantization: str
    names: tuple[str, ...]


def file_sets(names: Sequence[str]) -> list[FileSet]:
    """The models among a repository's files. A set that lacks parts is left out."""
    parts: dict[tuple[str, int], dict[int, str]] = defaultdict(dict)
    for name in names:
        path = PurePosixPath(name)
        if path.suffix.lower() != ".gguf" or _BESIDE.search(path.stem) or not _is_sound(name):
            continue
        if part := _PART.fullmatch(name):
            parts[part["stem"], int(part["count"])][int(part["number"])] = name
        else:
            parts[name[:-5], 1][1] = name
    sets = []
    for (stem, count), numbered in parts.items():
        if numbered.keys() == set(range(1, count + 1)):
            ordered = tuple(numbered[number] for number in range(1, count + 1))
            sets.append(FileSet(stem, _quantization(stem), ordered))
    return sorted(sets, key=lambda each: each.stem)


def choose(source: HubSource, names: Sequence[str]) -> FileSet:
    """The model that is meant. Raises NotFound, which names what there is, and InvalidRequest when it is not clear."""
    sets = file_sets(names)
    if source.file:
        return _of_file(source, sets, names)
    if not sets:
        raise NotFound(f"{source.repository} holds no GGUF model: look for a repository whose name ends in -GGUF")
    if source.quantization or len(sets) > 1:
        found = _called(sets, source.quantization or DEFAULT_QUANTIZATION)
    else:
        found = sets
    if len(found) == 1:
        return found[0]
    there = ", ".join(sorted({each.quantization or each.stem for each in sets})[:40])
    if not found and source.quantization:
        raise NotFound(f"{source.repository} has no quantization {source.quantization}: it has {there}")
    if not found:
        raise InvalidRequest(f"{source.repository} has several quantizations, say which: {there}")
    files = ", ".join(each.names[0] for each in found[:10])
    raise InvalidRequest(f"{source.repository} has several models of that quantization, name one's file: {files}")


def _of_file(source: HubSource, sets: Sequence[FileSet], names: Sequence[str]) -> FileSet:
    for each in sets:
        if source.file in each.names:
            return each
    if source.file in names:
        raise DataLoss(f"{source.repository} has {source.file}, but not all parts of that set")
    raise NotFound(f"{source.repository} has no file {source.file}")


def _called(sets: Sequence[FileSet], quantization: str) -> Sequence[FileSet]:
    """Those of a quantization, or else those whose names end in that word."""
    wanted = _plain(quantization)
    same = [each for each in sets if _plain(each.quantization) == wanted]
    return same or [each for each in sets if _plain(PurePosixPath(each.stem).name).endswith(f"-{wanted}")]


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _quantization(stem: str) -> str:
    match = _QUANTIZATION.search(PurePosixPath(stem).name)
    return match[1].upper() if match else ""


def _is_sound(name: str) -> bool:
    """Whether it is a path inside a repository, and nothing that a repository cannot have."""
    parts = name.split("/")
    return name.isprintable() and len(name) < 1000 and "\\" not in name and not {"", ".", ".."} & set(parts)


def sound_siblings(siblings: object) -> Mapping[str, Mapping[str, object]]:
    """The files of a hub's answer by name; what makes no sense is left out."""
    if not isinstance(siblings, list):
        return {}
    entries = [entry for entry in siblings if isinstance(entry, dict) and isinstance(entry.get("rfilename"), str)]
    return {entry["rfilename"]: entry for entry in entries}
