"""One cluster of three workers for the tests of a process, with a small chat model deployed over all three."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cli import Cli, ending
from tests.models import storyteller

#: Name of the pipeline that is always there, and of its model.
STORY = "story"


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running cluster; `cli` speaks to it, `up` is what `up --json` printed."""

    folder: Path
    cli: Cli
    up: dict[str, Any]


@pytest.fixture(scope="session")
def home_cli(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """eldric-cli of a person who has no cluster."""
    return Cli(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, home_cli: Cli) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with ending(folder):
        up = home_cli("up", "--workers", 3, "--threads", 1, "--dir", folder, "--json").json
        cli = replace(home_cli, environment={"ELDRIC_DIR": str(folder)})
        cli("models", "add", storyteller(), "--name", STORY)
        cli("deploy", STORY, "--stages", 3, "--ctx", 512, "--slots", 2)
        yield Cluster(folder, cli, up)
        cli("down")


@pytest.fixture
def cli(cluster: Cluster) -> Cli:
    """eldric-cli that speaks to the shared cluster, within this process; `cluster.cli` is one of its own."""
    return replace(cluster.cli, inside=True)
