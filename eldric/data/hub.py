"""Models on Hugging Face.

GET {endpoint}/api/models/{repository}/revision/{revision}?blobs=true lists the files with sizes and, of large ones, the
SHA-256; GET {endpoint}/{repository}/resolve/{commit}/{file} gives one, mostly by way of another host, with Range.
"""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import httpx2
from huggingface_hub import constants, get_token

from eldric import __version__
from eldric.data.checksums import FileSums
from eldric.data.http_client import TIMEOUT, get_json, redirect_check
from eldric.data.hub_files import choose, sound_siblings
from eldric.data.names import id_of
from eldric.data.remote import MAX_FILE_BYTES, MAX_FILES, Remote, RemoteFile
from eldric.data.sources import HubSource
from eldric.engine.families import FAMILIES
from eldric.errors import DataLoss, NotFound, NotReady, PermissionDenied

_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40,64}")


class Hub:
    """One hub. endpoint: "https://host"; empty: what HF_ENDPOINT says, else Hugging Face itself."""

    def __init__(self, endpoint: str = "") -> None:
        self._endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._peer = "Hugging Face" if self._endpoint == "https://huggingface.co" else self._endpoint

    def client(self) -> httpx2.Client:
        """Shows HF_TOKEN (or the token of `hf auth login`) to the hub, and to no host that it redirects to."""
        headers = {"user-agent": f"eldric/{__version__}", "accept-encoding": "identity"}
        if token := get_token():
            headers["authorization"] = f"Bearer {token}"
        hooks = {"request": [redirect_check(self._endpoint, self._peer)]}
        return httpx2.Client(
            headers=headers, follow_redirects=True, max_redirects=5, timeout=TIMEOUT, event_hooks=hooks
        )

    def find(self, client: httpx2.Client, extensions: Mapping[str, Any], source: HubSource) -> Remote:
        """The model that a source means. Raises NotFound, PermissionDenied, InvalidRequest, Unavailable, DataLoss,
        NotReady."""
        if constants.is_offline_mode():
            raise NotReady("HF_HUB_OFFLINE is set where the data worker runs: nothing is fetched from Hugging Face")
        document = self._look(client, extensions, source)
        files = sound_siblings(document.get("siblings"))
        chosen = choose(source, list(files))
        if len(chosen.names) > MAX_FILES:
            raise DataLoss(f"{source.repository} has a model of {len(chosen.names)} files, which is not believed")
        commit = str(document.get("sha"))
        if not _COMMIT.fullmatch(commit):
            raise DataLoss(f"{self._peer} names no commit of {source.repository}")
        base = f"{self._endpoint}/{source.repository}/resolve/{commit}"
        return Remote(
            uri=source.uri(chosen.quantization or source.quantization),
            model=id_of(chosen.names[0].rpartition("/")[2]),
            quantization=chosen.quantization,
            files=tuple(_file(name, f"{base}/{quote(name)}", files[name]) for name in chosen.names),
            problem=_problem(document),
        )

    def _look(self, client: httpx2.Client, extensions: Mapping[str, Any], source: HubSource) -> Mapping[str, Any]:
        path = f"/api/models/{source.repository}/revision/{quote(source.revision, safe='')}"
        try:
            document = get_json(client, f"{self._endpoint}{path}?blobs=true", self._peer, extensions)
        except NotFound:
            raise NotFound(f"{self._peer} has no {source.repository} (revision {source.revision})") from None
        except PermissionDenied:
            raise PermissionDenied(
                f"{self._peer} has no {source.repository}, or gives it only to those who may have it: accept its terms "
                "there, and set HF_TOKEN where the data worker runs"
            ) from None
        if not isinstance(document, dict):
            raise DataLoss(f"{self._peer} answers what is no description of {source.repository}")
        return document


def _problem(document: Mapping[str, Any]) -> str:
    """What the hub, which looks into GGUF files, tells of the architecture."""
    about = document.get("gguf")
    architecture = about.get("architecture") if isinstance(about, dict) else None
    if not isinstance(architecture, str) or architecture in FAMILIES:
        return ""
    return f"architecture {architecture[:80]!r} is not supported; supported: {', '.join(FAMILIES)}"


def _file(name: str, url: str, entry: Mapping[str, Any]) -> RemoteFile:
    lfs = entry.get("lfs")
    size = lfs.get("size") if isinstance(lfs, dict) else None
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else None
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise DataLoss(f"the hub names no SHA-256 of {name}, so that nobody could tell whether it came right")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= MAX_FILE_BYTES:
        raise DataLoss(f"the hub gives {name} the size {size!r:.40}")
    return RemoteFile(name, url, size, FileSums(sha256))
