"""Pulls from a hub of the tests' own."""

import threading
from pathlib import Path
from typing import Any

import pytest

from eldric.data import fetch
from eldric.data.http_client import Hangup
from eldric.data.hub import Hub
from eldric.data.importer import Importer
from eldric.data.peer import Peers
from eldric.data.puller import Puller, Resolved
from eldric.data.store import ModelStore
from tests.hubs import FakeHub
from tests.models import storyteller
from tests.stores import ignore

REPOSITORY = "owner/Tale-GGUF"
URI = f"hf://{REPOSITORY}:Q8_0"
SIZE = storyteller().stat().st_size


class Stopped(Exception):
    pass


def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses, and nothing of this machine's settings for hubs."""
    monkeypatch.setattr(fetch, "PAUSES_S", (0.01, 0.01))
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


def no_identity() -> Any:
    raise AssertionError


class Pulling:
    """Pulls, and notes what it was told."""

    def __init__(self, store: ModelStore, hub: FakeHub) -> None:
        self.puller = Puller(store, Importer(store), Hub(hub.url), Peers(no_identity), None)
        self.hangup = Hangup()
        self.resolved: list[Resolved] = []
        self.reports: list[tuple[str, int, int]] = []
        self.stop_at = 1 << 60

    def __call__(self, uri: str = URI, model: str = "", mode: str = "") -> "Pulling":
        self.puller.run(uri, model, mode, self._report, self.resolved.append, self.hangup)
        return self

    def _report(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        self.reports.append((phase, done_bytes, total_bytes))
        if phase == "downloading" and done_bytes >= self.stop_at:
            raise Stopped

    @property
    def phases(self) -> list[str]:
        return list(dict.fromkeys(phase for phase, _, _ in self.reports))


def in_thread(pulling: Pulling) -> tuple[threading.Thread, list[BaseException]]:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            pulling()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, failures


def partial(store: ModelStore, model: str = "Tale-Q8_0") -> Path:
    return store.folder / ".eldric" / "partial" / model


def kept_bytes(store: ModelStore) -> int:
    path = partial(store) / "Tale-Q8_0.gguf"
    return path.stat().st_size if path.exists() else 0


def is_whole(store: ModelStore, model: str = "Tale-Q8_0") -> bool:
    """Whether the model is there, right, and nothing else is left."""
    found = store.get(model)
    store.verify(model, ignore)
    names = sorted(path.name for path in (store.folder / model).iterdir())
    left = list((store.folder / ".eldric" / "partial").iterdir())
    return (
        found.problem == ""
        and names == sorted([*(file.path.name for file in found.files), "manifest.json"])
        and not left
    )
