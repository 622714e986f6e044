"""Surroundings that several files of these tests need."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fake_cluster import STORY, FakeCluster, fake_cluster, speak


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[FakeCluster]:
    """A router whose one pipeline tells STORY, whatever it is asked."""
    async with fake_cluster(tmp_path) as made:
        made.head.say = speak(made.words(STORY))
        yield made
