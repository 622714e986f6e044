"""Generates eldric/v1 from protos/eldric/v1: messages, services, typed stubs, and the comments as comments.json.

Usage: python protos/generate.py [OUTPUT_ROOT]
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc_tools
from google.api import annotations_pb2
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent


def _beside_python(program: str) -> Path:
    """A program of this interpreter's environment, which need not be activated."""
    return Path(sys.executable).parent / program


def generate(output: Path) -> None:
    """Write eldric/v1/*_pb2.py, *_pb2_grpc.py, *.pyi and comments.json below `output`. Raises SystemExit when protoc
    fails."""
    output.mkdir(parents=True, exist_ok=True)
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.glob("eldric/v1/*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    google_api = Path(annotations_pb2.__file__).parents[2]
    with tempfile.NamedTemporaryFile(suffix=".binpb") as described:
        _compile(output, sources, (PROTOS, well_known, google_api), described.name)
        files = descriptor_pb2.FileDescriptorSet.FromString(described.read())
    comments = {name: text for file in files.file for name, text in _comments(file)}
    path = output / "eldric" / "v1" / "comments.json"
    path.write_text(json.dumps(comments, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def _compile(output: Path, sources: list[str], paths: tuple[Path, ...], description: str) -> None:
    status = protoc.main(
        [
            "protoc",
            *(f"--proto_path={path}" for path in paths),
            f"--python_out={output}",
            f"--grpc_python_out={output}",
            f"--plugin=protoc-gen-mypy={_beside_python('protoc-gen-mypy')}",
            f"--plugin=protoc-gen-mypy_grpc={_beside_python('protoc-gen-mypy_grpc')}",
            f"--mypy_out={output}",
            f"--mypy_grpc_out={output}",
            f"--descriptor_set_out={description}",
            "--include_source_info",
            *sources,
        ]
    )
    if status:
        raise SystemExit(f"protoc failed with status {status}")


def _comments(file: descriptor_pb2.FileDescriptorProto) -> Iterator[tuple[str, str]]:
    """Full names of a file's services, methods, messages, fields, enums and values, and the comments before them."""
    for location in file.source_code_info.location:
        text = " ".join(location.leading_comments.split())
        if text and len(location.path) % 2 == 0:
            yield ".".join([file.package, *_names(file, list(location.path))]), text


def _names(descriptor: Any, path: list[int]) -> Iterator[str]:
    """The names along a location's path: pairs of a field's number in descriptor.proto and an index in it."""
    for number, index in zip(path[::2], path[1::2], strict=True):
        descriptor = getattr(descriptor, descriptor.DESCRIPTOR.fields_by_number[number].name)[index]
        yield descriptor.name


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PROTOS.parent)
