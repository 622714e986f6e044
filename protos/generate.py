"""Generates eldric/v1 from protos/eldric/v1: messages, services and typed stubs.

Usage: python protos/generate.py [OUTPUT_ROOT]
"""

import sys
from pathlib import Path

import grpc_tools
from google.api import annotations_pb2
from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent


def _beside_python(program: str) -> Path:
    """A program of this interpreter's environment, which need not be activated."""
    return Path(sys.executable).parent / program


def generate(output: Path) -> None:
    """Write eldric/v1/*_pb2.py, *_pb2_grpc.py and *.pyi below `output`. Raises SystemExit when protoc fails."""
    output.mkdir(parents=True, exist_ok=True)
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.glob("eldric/v1/*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    google_api = Path(annotations_pb2.__file__).parents[2]
    status = protoc.main(
        [
            "protoc",
            f"--proto_path={PROTOS}",
            f"--proto_path={well_known}",
            f"--proto_path={google_api}",
            f"--python_out={output}",
            f"--grpc_python_out={output}",
            f"--plugin=protoc-gen-mypy={_beside_python('protoc-gen-mypy')}",
            f"--plugin=protoc-gen-mypy_grpc={_beside_python('protoc-gen-mypy_grpc')}",
            f"--mypy_out={output}",
            f"--mypy_grpc_out={output}",
            *sources,
        ]
    )
    if status:
        raise SystemExit(f"protoc failed with status {status}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PROTOS.parent)
