"""What the controller keeps: records come back as they were, damage and newer versions are named, tokens count."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from eldric.controller.pipelines import Phase, PipelineRecord, StageRecord
from eldric.controller.replication import Goal
from eldric.controller.state import MIGRATIONS, Store
from eldric.errors import DataLoss, NotReady, PermissionDenied, Unauthenticated, Unavailable
from eldric.security import JoinToken, new_token
from eldric.v1 import common_pb2, pipeline_pb2, stage_pb2

DIGEST = "0" * 64


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    made = await Store.open(tmp_path / "state.db")
    yield made
    await made.close()


def record(name: str = "m", **changes: object) -> PipelineRecord:
    stages = (StageRecord(0, "a", (1 << 64) - 1, 0, 3, 1, 2, 3, 6), StageRecord(1, "b", 7, 3, 6, 4, 5, 6, 15))
    made = PipelineRecord(
        id=f"id-{name}",
        name=name,
        model="model",
        phase=Phase.DEPLOYING,
        epoch=1,
        stages=stages,
        created_at=1234.5,
        request=pipeline_pb2.DeployRequest(model="model", stages=2, workers=["a", "b"]),
        options=common_pb2.StageOptions(context=512, exact=False),
        source=stage_pb2.ModelSource(model="model", header_sha256=b"\0\xff"),
        transport="zmq",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


async def test_a_record_comes_back_as_it_was_after_a_restart(store: Store, tmp_path: Path) -> None:
    moving = record("other", phase=Phase.RUNNING, epoch=3, next_stages=record().stages[:1])
    await store.save(record())
    await store.save(moving)
    await store.close()
    again = await Store.open(tmp_path / "state.db")
    assert sorted(await again.pipelines(), key=lambda kept: kept.name) == [record(), moving]
    await again.close()


async def test_a_record_takes_the_place_of_the_one_before(store: Store) -> None:
    await store.save(record())
    moved = record(phase=Phase.RUNNING, epoch=2, stages=record().stages[1:])
    await store.save(moved)
    assert await store.pipelines() == [moved]
    await store.delete(moved.id)
    assert await store.pipelines() == []


async def test_a_pipeline_takes_the_place_of_one_of_its_name_that_could_not_be_forgotten(store: Store) -> None:
    await store.save(record(phase=Phase.UNDEPLOYING))
    again = record(id="id-again")
    await store.save(again)
    assert await store.pipelines() == [again]


async def test_a_full_disk_is_named_changes_nothing_and_is_over_when_there_is_room(
    store: Store, tmp_path: Path
) -> None:
    await store.save(record())
    large = record("large", request=pipeline_pb2.DeployRequest(model="m" * 200_000))
    await store._run(lambda database: database.execute("PRAGMA max_page_count = 1"))  # as many as there are
    for _ in range(2):
        with pytest.raises(NotReady, match=f"cannot keep its state in {tmp_path}/state.db: .* is full: make room"):
            await store.save(large)
    assert await store.pipelines() == [record()]
    await store._run(lambda database: database.execute("PRAGMA max_page_count = 100000"))
    await store.save(large)
    assert len(await store.pipelines()) == 2


async def test_a_failed_write_changes_nothing(store: Store) -> None:
    await store.save(record())
    twice = record(stages=record().stages[:1] * 2)
    with pytest.raises(DataLoss, match="UNIQUE"):
        await store.save(twice)
    assert await store.pipelines() == [record()]


async def test_how_many_copies_there_should_be_is_kept(store: Store, tmp_path: Path) -> None:
    source = stage_pb2.ModelSource(model="m", header_sha256=b"\0\xff", files=[stage_pb2.ModelFile(size_bytes=1 << 40)])
    for goal in (Goal("m", 2, source), Goal("other", 2, source), Goal("m", 3, source)):
        await store.save_goal(goal)
    await store.delete_goal("other")
    await store.delete_goal("unknown")
    await store.close()
    again = await Store.open(tmp_path / "state.db")
    assert await again.goals() == [Goal("m", 3, source)]
    await again.close()


async def test_state_of_an_older_program_is_brought_up_to_date(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "state.db")
    database.executescript(f"{MIGRATIONS[0]}; PRAGMA user_version = 1")
    database.close()
    store = await Store.open(tmp_path / "state.db")
    await store.save(record())
    assert (await store.pipelines(), await store.goals()) == ([record()], [])
    await store.close()


async def test_damage_is_named_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(DataLoss, match=r"state\.db is damaged"):
        await Store.open(tmp_path / "state.db")


async def test_the_state_of_a_newer_program_is_left_alone(store: Store, tmp_path: Path) -> None:
    await store.close()
    database = sqlite3.connect(tmp_path / "state.db")
    database.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    database.close()
    with pytest.raises(NotReady, match=f"is of version {len(MIGRATIONS) + 1}, this program knows"):
        await Store.open(tmp_path / "state.db")


async def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotReady, match="cannot keep its state in"):
        await Store.open(tmp_path / "nowhere" / "state.db")


async def test_a_closed_store_says_that_the_controller_is_ending(store: Store) -> None:
    await store.close()
    with pytest.raises(Unavailable, match="is ending"):
        await store.pipelines()


async def test_a_token_is_used_as_often_as_it_may_even_by_many_at_once(store: Store) -> None:
    token, kept = new_token(DIGEST, now=0.0, uses=3)
    await store.add_token(kept, 0.0)
    await store.check_token(token, "worker", 1.0)
    ends = await asyncio.gather(*(store.use_token(token, "worker", 1.0) for _ in range(5)), return_exceptions=True)
    assert [end for end in ends if end is None] == [None] * 3
    assert all(isinstance(end, Unauthenticated) for end in ends if end is not None)


async def test_tokens_that_are_unknown_expired_or_for_others_are_refused(store: Store) -> None:
    token, kept = new_token(DIGEST, now=0.0, lifetime_s=10, uses=None, kind="data")
    await store.add_token(kept, 0.0)
    await store.use_token(token, "data", 9.0)
    with pytest.raises(PermissionDenied):
        await store.use_token(token, "worker", 9.0)
    with pytest.raises(Unauthenticated, match="expired"):
        await store.use_token(token, "data", 10.0)
    with pytest.raises(Unauthenticated, match="unknown"):
        await store.use_token(JoinToken(DIGEST, token.id, b"\0" * 32), "data", 1.0)
    with pytest.raises(Unauthenticated, match="unknown"):
        await store.use_token(JoinToken(DIGEST, "0" * 16, token.secret), "data", 1.0)


async def test_expired_tokens_are_forgotten_and_secrets_never_kept(store: Store, tmp_path: Path) -> None:
    old, kept = new_token(DIGEST, now=0.0, lifetime_s=1)
    await store.add_token(kept, 0.0)
    new, kept = new_token(DIGEST, now=5.0)
    await store.add_token(kept, 5.0)
    await store.close()
    database = sqlite3.connect(tmp_path / "state.db")
    rows = database.execute("SELECT * FROM join_tokens").fetchall()
    database.close()
    assert [row[0] for row in rows] == [new.id]
    files = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert old.secret not in files and new.secret not in files
