"""Models of an Ollama store on this machine: manifests (JSON, as container images have them) and blobs.

FOLDER/manifests/registry.ollama.ai/NAMESPACE/NAME/TAG    {"layers": [{"mediaType", "digest", "size"}, ...]}
FOLDER/blobs/sha256-HEX                                   a GGUF file, for the layer of the model itself
"""

import json
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from eldric.data.sources import OllamaSource
from eldric.errors import DataLoss, InvalidRequest, NotFound, NotReady

#: Where Ollama keeps models, below a home directory, and where its Linux service does.
_USUAL = (Path.home() / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models"))
_REGISTRY = "registry.ollama.ai"

_MODEL = "application/vnd.ollama.image.model"
_TENSOR = "application/vnd.ollama.image.tensor"
_ADAPTER = "application/vnd.ollama.image.adapter"
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_MAX_BYTES = 1 << 20


class Blob(NamedTuple):
    """A model's file in an Ollama store, and the SHA-256 that it must have."""

    path: Path
    sha256: str


def find_blob(source: OllamaSource, folder: Path | None) -> Blob:
    """The file of a model. folder: the store's; None: where Ollama usually keeps it.

    Raises NotFound, NotReady when it cannot be read, DataLoss for a manifest that makes no sense, InvalidRequest for a
    model that is not one GGUF file.
    """
    for place in [folder] if folder else _USUAL:
        manifest = place / "manifests" / _REGISTRY / source.namespace / source.name / source.tag
        try:
            with manifest.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise NotReady(f"{manifest} cannot be read: {error.strerror}") from None
        return _blob(place, source, data)
    places = folder or " and ".join(map(str, _USUAL))
    raise NotFound(f"Ollama has no {source.name}:{source.tag} on the data worker's machine (looked in {places})")


def _blob(place: Path, source: OllamaSource, manifest: bytes) -> Blob:
    layer = _model_layer(source, _layers(source, manifest))
    digest, size = layer.get("digest"), layer.get("size")
    match = _DIGEST.fullmatch(digest) if isinstance(digest, str) else None
    if match is None or not isinstance(size, int) or isinstance(size, bool):
        raise DataLoss(f"Ollama's manifest of {source.uri} names no blob and size")
    blobs = place / "blobs"
    path = blobs / f"sha256-{match[1]}"
    try:
        real = path.resolve(strict=True)
        status = real.stat()
        inside = real.parent == blobs.resolve(strict=True)
    except (FileNotFoundError, RuntimeError):
        raise DataLoss(f"Ollama's manifest of {source.uri} names {path}, which is not there") from None
    except OSError as error:
        raise NotReady(f"{path} cannot be read: {error.strerror}") from None
    if not inside or not stat.S_ISREG(status.st_mode):
        raise DataLoss(f"{path} is no file of the Ollama store")
    if status.st_size != size:
        raise DataLoss(f"{path} has {status.st_size} bytes, Ollama's manifest says {size}")
    return Blob(real, match[1])


def _layers(source: OllamaSource, manifest: bytes) -> Iterable[dict[str, Any]]:
    try:
        document = json.loads(manifest)
    except (ValueError, RecursionError):
        document = None
    layers = document.get("layers") if isinstance(document, dict) else None
    if len(manifest) > _MAX_BYTES or not isinstance(layers, list):
        raise DataLoss(f"Ollama's manifest of {source.uri} makes no sense")
    return [layer for layer in layers if isinstance(layer, dict)]


def _model_layer(source: OllamaSource, layers: Iterable[dict[str, Any]]) -> dict[str, Any]:
    kinds = [str(layer.get("mediaType")).partition(";")[0] for layer in layers]
    models = [layer for layer, kind in zip(layers, kinds, strict=True) if kind == _MODEL]
    if _ADAPTER in kinds:
        raise InvalidRequest(f"{source.uri} is a model with an adapter beside it, which is not supported")
    if len(models) != 1 or _TENSOR in kinds:
        raise InvalidRequest(f"{source.uri} is not one GGUF file: it has {len(models)} model layers")
    return models[0]
