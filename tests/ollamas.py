"""Ollama stores for tests."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tests.models import storyteller

SHA256 = hashlib.sha256(storyteller().read_bytes()).hexdigest()
MODEL = "application/vnd.ollama.image.model"


class Ollama:
    """An Ollama store, as Ollama leaves it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blob = folder / "blobs" / f"sha256-{SHA256}"
        self.blob.parent.mkdir(parents=True)
        self.blob.write_bytes(storyteller().read_bytes())
        (self.blob.parent / f"sha256-{'0' * 64}").write_text("{{ .Prompt }}")

    @property
    def layer(self) -> dict[str, Any]:
        return {"mediaType": MODEL, "digest": f"sha256:{SHA256}", "size": self.blob.stat().st_size}

    def tag(self, name: str, *layers: dict[str, Any], raw: bytes = b"") -> None:
        template = {"mediaType": "application/vnd.ollama.image.template", "digest": f"sha256:{'0' * 64}", "size": 13}
        document = {"schemaVersion": 2, "config": template, "layers": [*layers, template]}
        path = self.folder / "manifests" / "registry.ollama.ai" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw or json.dumps(document).encode())
