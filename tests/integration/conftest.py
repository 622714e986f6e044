"""Surroundings that several files of these tests need."""

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from eldric.data.store import ModelStore
from eldric.security import Authority
from tests.fake_cluster import STORY, FakeCluster, fake_cluster, speak
from tests.hubs import FakeHub, serving_hub
from tests.models import storyteller
from tests.pulling import REPOSITORY, Pulling, without_waiting
from tests.replicas import BigStore, big_model, filled_store


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[FakeCluster]:
    """A router whose one pipeline tells STORY, whatever it is asked."""
    async with fake_cluster(tmp_path) as made:
        made.head.say = speak(made.words(STORY))
        yield made


@pytest.fixture(scope="session")
def big(tmp_path_factory: pytest.TempPathFactory) -> BigStore:
    """A store with a model of some blocks. Nobody changes it: tests that damage a store fill one of their own."""
    folder = tmp_path_factory.mktemp("big")
    path = big_model(folder)
    return BigStore(folder, filled_store(folder, path), path, Authority.create("test"))


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pulls that wait for little, and know nothing of this machine's settings."""
    without_waiting(monkeypatch)


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """A hub that has the storyteller as Q8_0, and something else as Q4_0."""
    with serving_hub() as made:
        made.add(REPOSITORY, {"README.md": b"A tale.", "Tale-Q8_0.gguf": storyteller(), "Tale-Q4_0.gguf": b"no"})
        yield made


@pytest.fixture
def pull(store: ModelStore, hub: FakeHub) -> Callable[[], Pulling]:
    """New pulls from the hub into the store."""
    return lambda: Pulling(store, hub)
