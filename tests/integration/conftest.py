"""Surroundings that several files of these tests need."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from eldric.security import Authority
from tests.fake_cluster import STORY, FakeCluster, fake_cluster, speak
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
