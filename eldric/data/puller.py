"""Brings models into a store from elsewhere: Hugging Face, Ollama, another data worker."""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from eldric.data.fetch import Fetch
from eldric.data.header import read_header
from eldric.data.http_client import Hangup
from eldric.data.hub import Hub
from eldric.data.importer import Importer
from eldric.data.manifest import Manifest, ManifestFile
from eldric.data.model import StoredModel
from eldric.data.names import check_id, stored_names
from eldric.data.ollama import find_blob
from eldric.data.peer import EXTENSIONS, Peers
from eldric.data.remote import Remote
from eldric.data.sources import HubSource, OllamaSource, PeerSource, parse_source
from eldric.data.store import ModelStore, Report
from eldric.engine.errors import InvalidModel
from eldric.errors import InvalidRequest, NotEnoughSpace

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a source turned out to be. files: names at the source, and sizes in bytes. problem: see Remote."""

    uri: str
    model: str
    quantization: str
    files: tuple[tuple[str, int], ...]
    kept_bytes: int
    problem: str = ""


OnResolved = Callable[[Resolved], None]


class Puller:
    """Imports models from elsewhere into one store. Thread-safe; everything blocks."""

    def __init__(self, store: ModelStore, importer: Importer, hub: Hub, peers: Peers, ollama: Path | None) -> None:
        """ollama: the folder of an Ollama store; None: where Ollama usually keeps it."""
        self._store, self._importer, self._hub, self._peers, self._ollama = store, importer, hub, peers, ollama

    def run(
        self, uri: str, model: str, mode: str, report: Report, on_resolved: OnResolved, hangup: Hangup
    ) -> StoredModel:
        """Imports what `uri` names as `model`; "" takes the name that it has there.

        report is called with what is done, bytes done and bytes in all; when it raises, what has come is kept for the
        next try. hangup: ends the connections of this call from another thread. Raises EldricError, InvalidModel.
        """
        source = parse_source(uri)
        report("resolving", 0, 0)
        match source:
            case OllamaSource():
                blob = find_blob(source, self._ollama)
                model = check_id(model or source.model)
                size = blob.path.stat().st_size
                on_resolved(Resolved(source.uri, model, "", ((blob.path.name, size),), 0))
                return self._once(
                    model,
                    source.uri,
                    report,
                    lambda told: self._importer.take(blob.path, model, mode or "link", told, source.uri, blob.sha256),
                )
            case HubSource():
                with self._hub.client() as client:
                    line = _Line(client, hangup.extensions)
                    remote = self._hub.find(client, line.extensions, source)
                    return self._pull(remote, model, mode, report, on_resolved, line)
            case PeerSource():
                with self._peers.client() as client:
                    line = _Line(client, {**EXTENSIONS, **hangup.extensions})
                    remote = self._peers.find(client, line.extensions, source)
                    return self._pull(remote, model, mode, report, on_resolved, line)

    def _pull(
        self, remote: Remote, model: str, mode: str, report: Report, on_resolved: OnResolved, line: "_Line"
    ) -> StoredModel:
        if mode:
            raise InvalidRequest(f"mode is {mode!r}: downloads have none")
        model = check_id(model or remote.model)
        kept = self._store.partials.kept_bytes(model, remote)
        files = tuple((file.name, file.size_bytes) for file in remote.files)
        on_resolved(Resolved(remote.uri, model, remote.quantization, files, kept, remote.problem))
        return self._once(model, remote.uri, report, lambda told: self._download(remote, model, told, line))

    def _once(self, model: str, uri: str, report: Report, work: Callable[[Report], StoredModel]) -> StoredModel:
        """Does the work, unless the model is there, or on its way, from the same source."""
        while True:
            with self._store.claims.take(model, uri) as (claim, ours):
                found = self._store.find(model)
                if found is not None and found.origin == uri and found.error is None:
                    return found
                if ours:

                    def told(phase: str, done_bytes: int, total_bytes: int) -> None:
                        claim.report(phase, done_bytes, total_bytes)
                        report(phase, done_bytes, total_bytes)

                    return work(told)
                claim.follow(report)

    def _download(self, remote: Remote, model: str, report: Report, line: "_Line") -> StoredModel:
        self._store.check_free(model)
        with self._store.write_errors(), self._store.partials.open(model, remote) as folder:
            self._check_space(folder, remote, model)
            files = self._fetch(remote, model, folder, report, line)
            try:
                read_header(folder / files[0].name)
            except InvalidModel:
                self._store.partials.discard(folder)  # the source has no better one
                raise
            imported_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            Manifest("gguf", tuple(files), remote.uri, imported_at).save(folder)
            self._store.publish(folder, model)
            self._store.partials.finish(self._store.folder / model)
        log.info("event=model_pulled id=%s source=%s bytes=%d", model, remote.uri, remote.size_bytes)
        return self._store.get(model)

    def _fetch(self, remote: Remote, model: str, folder: Path, report: Report, line: "_Line") -> list[ManifestFile]:
        """All files of a model, in its partial folder."""
        known, files, done = self._store.partials.sums(folder), [], 0

        def progress(phase: str, nbytes: int) -> None:
            nonlocal done
            done += nbytes
            report(phase, done, remote.size_bytes)

        for file, name in zip(remote.files, stored_names(model, len(remote.files)), strict=True):
            path = folder / name
            sums = known.get(name, path.stat()) if path.exists() else None
            if sums is not None and sums.sha256 == file.sums.sha256:
                progress("checking", file.size_bytes)
            else:
                sums = Fetch(line.client, line.extensions, progress).run(file, path)
                known.put(name, path.stat(), sums)
            files.append(ManifestFile(name, file.size_bytes, sums.sha256, sums.blocks))
        return files

    def _check_space(self, folder: Path, remote: Remote, model: str) -> None:
        """Raises NotEnoughSpace unless what is still to come fits on the disk."""
        needed = remote.size_bytes - self._store.partials.kept_bytes(model, remote)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise NotEnoughSpace(
                f"{model} needs {needed} bytes more, the disk of the model store {self._store.folder} has {free} bytes "
                f"free: {needed - free} are missing; make room"
            )


@dataclass(frozen=True, slots=True)
class _Line:
    """What a download goes over."""

    client: httpx2.Client
    extensions: Mapping[str, Any]
