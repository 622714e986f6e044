"""What the controller keeps over a restart: pipelines, numbers of copies and join tokens, in SQLite.

Every method is one transaction, and returns when it is on disk. A kill between two of them leaves the state before or
after, never a mixture; what the states in between mean is said in `deployer`.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import TypeVar

from eldric.controller.pipelines import Phase, PipelineRecord, StageRecord
from eldric.controller.replication import Goal
from eldric.errors import DataLoss, NotReady, Unauthenticated, Unavailable
from eldric.security import JoinToken, TokenRecord
from eldric.v1 import common_pb2, pipeline_pb2, stage_pb2

T = TypeVar("T")

#: One script per version of the schema; `user_version` counts those that were run. Messages are kept as they are on
#: the wire, incarnations (64 bits, unsigned) as text.
MIGRATIONS = (
    """
    CREATE TABLE pipelines (
        id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, model TEXT NOT NULL, phase TEXT NOT NULL,
        epoch INTEGER NOT NULL, created_at REAL NOT NULL, transport TEXT NOT NULL,
        request BLOB NOT NULL, options BLOB NOT NULL, source BLOB NOT NULL
    ) STRICT;
    CREATE TABLE stages (
        pipeline_id TEXT NOT NULL REFERENCES pipelines (id) ON DELETE CASCADE,
        epoch INTEGER NOT NULL, stage INTEGER NOT NULL, worker TEXT NOT NULL, incarnation TEXT NOT NULL,
        first_layer INTEGER NOT NULL, end_layer INTEGER NOT NULL,
        weights_bytes INTEGER NOT NULL, kv_bytes INTEGER NOT NULL, compute_bytes INTEGER NOT NULL,
        limit_bytes INTEGER NOT NULL,
        PRIMARY KEY (pipeline_id, epoch, stage)
    ) STRICT;
    CREATE TABLE join_tokens (
        id TEXT PRIMARY KEY, secret_sha256 BLOB NOT NULL, kind TEXT NOT NULL, expires_at REAL NOT NULL,
        uses_left INTEGER
    ) STRICT;
    """,
    """
    CREATE TABLE replications (
        model TEXT PRIMARY KEY, copies INTEGER NOT NULL, source BLOB NOT NULL
    ) STRICT;
    """,
    """
    CREATE TABLE expelled (node_id TEXT PRIMARY KEY, at REAL NOT NULL) STRICT;
    """,
)


class Store:
    """The database, in a thread of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="state")
        self._database: sqlite3.Connection | None = None
        self._closed = False

    @classmethod
    async def open(cls, path: Path) -> "Store":
        """Opens or makes the database and brings it up to date.

        Raises DataLoss when it is damaged, NotReady when a newer program wrote it or it cannot be opened.
        """
        store = cls(path)
        try:
            await store._run(store._open)
        except BaseException:
            await store.close()
            raise
        return store

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown()

    async def pipelines(self) -> list[PipelineRecord]:
        return await self._run(self._pipelines)

    async def save(self, record: PipelineRecord) -> None:
        """Keeps a pipeline in place of what was kept of it, and of one of its name that could not be forgotten."""
        await self._run(lambda database: self._save(database, record))

    async def delete(self, pipeline_id: str) -> None:
        await self._run(lambda database: database.execute("DELETE FROM pipelines WHERE id = ?", (pipeline_id,)))

    async def goals(self) -> list[Goal]:
        """How many data workers should hold which models."""

        def read(database: sqlite3.Connection) -> list[Goal]:
            rows = database.execute("SELECT model, copies, source FROM replications ORDER BY model")
            return [Goal(model, copies, stage_pb2.ModelSource.FromString(source)) for model, copies, source in rows]

        return await self._run(read)

    async def save_goal(self, goal: Goal) -> None:
        """Keeps a goal in place of what was kept for its model."""
        row = goal.model, goal.copies, goal.source.SerializeToString()
        await self._run(lambda database: database.execute("INSERT OR REPLACE INTO replications VALUES (?, ?, ?)", row))

    async def delete_goal(self, model: str) -> None:
        await self._run(lambda database: database.execute("DELETE FROM replications WHERE model = ?", (model,)))

    async def add_token(self, record: TokenRecord, now: float) -> None:
        """Keeps a token, and forgets those that have expired."""

        def add(database: sqlite3.Connection) -> None:
            database.execute("DELETE FROM join_tokens WHERE expires_at <= ?", (now,))
            database.execute("INSERT INTO join_tokens VALUES (?, ?, ?, ?, ?)", astuple(record))

        await self._run(add)

    async def check_token(self, token: JoinToken, kind: str, now: float) -> None:
        """Raises what TokenRecord.use raises; uses nothing up."""
        await self._run(lambda database: _token(database, token).use(token, kind, now))

    async def use_token(self, token: JoinToken, kind: str, now: float) -> None:
        """Uses a token once. Raises what TokenRecord.use raises."""

        def use(database: sqlite3.Connection) -> None:
            left = _token(database, token).use(token, kind, now).uses_left
            database.execute("UPDATE join_tokens SET uses_left = ? WHERE id = ?", (left, token.id))

        await self._run(use)

    async def expel(self, node_id: str, now: float) -> None:
        """Keeps, for ever, that it is no member."""
        row = node_id, now
        await self._run(lambda database: database.execute("INSERT OR IGNORE INTO expelled VALUES (?, ?)", row))

    async def expelled(self) -> list[str]:
        """The ids of all that were expelled."""
        return await self._run(lambda database: [row[0] for row in database.execute("SELECT node_id FROM expelled")])

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        if self._closed:
            raise Unavailable("this controller is ending")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transact, work)

    def _transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            if self._database is None:
                self._database = sqlite3.connect(self._path, isolation_level=None)
            with _transaction(self._database):
                return work(self._database)
        except sqlite3.OperationalError as error:
            hint = ": make room" if error.sqlite_errorcode == sqlite3.SQLITE_FULL else ""
            raise NotReady(f"the controller cannot keep its state in {self._path}: {error}{hint}") from error
        except sqlite3.DatabaseError as error:
            raise DataLoss(f"the controller's state in {self._path} is damaged: {error}") from error

    def _open(self, database: sqlite3.Connection) -> None:
        database.execute("COMMIT")  # the settings below are made outside of transactions
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA foreign_keys = ON")
        database.execute("BEGIN IMMEDIATE")
        version = int(database.execute("PRAGMA user_version").fetchone()[0])
        if version > len(MIGRATIONS):
            raise NotReady(f"{self._path} is of version {version}, this program knows versions up to {len(MIGRATIONS)}")
        for script in MIGRATIONS[version:]:
            for statement in script.split(";"):
                database.execute(statement)
        database.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")

    def _close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def _pipelines(self, database: sqlite3.Connection) -> list[PipelineRecord]:
        stages: dict[tuple[str, int], list[StageRecord]] = {}
        for pipeline_id, epoch, *rest in database.execute("SELECT * FROM stages ORDER BY pipeline_id, epoch, stage"):
            index, worker, incarnation, *numbers = rest
            stages.setdefault((pipeline_id, epoch), []).append(StageRecord(index, worker, int(incarnation), *numbers))
        records = []
        for row in database.execute(
            "SELECT id, name, model, phase, epoch, created_at, transport, request, options, source FROM pipelines"
        ):
            identifier, name, model, phase, epoch, created_at, transport, request, options, source = row
            record = PipelineRecord(
                id=identifier,
                name=name,
                model=model,
                phase=Phase(phase),
                epoch=epoch,
                stages=tuple(stages.get((identifier, epoch), ())),
                created_at=created_at,
                request=pipeline_pb2.DeployRequest.FromString(request),
                options=common_pb2.StageOptions.FromString(options),
                source=stage_pb2.ModelSource.FromString(source),
                transport=transport,
                next_stages=tuple(stages.get((identifier, epoch + 1), ())),
            )
            records.append(record)
        return records

    def _save(self, database: sqlite3.Connection, record: PipelineRecord) -> None:
        database.execute("DELETE FROM pipelines WHERE id = ? OR name = ?", (record.id, record.name))
        messages = (message.SerializeToString() for message in (record.request, record.options, record.source))
        numbers = record.epoch, record.created_at
        row = (record.id, record.name, record.model, record.phase.value, *numbers, record.transport, *messages)
        database.execute(
            "INSERT INTO pipelines (id, name, model, phase, epoch, created_at, transport, request, options, source) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            row,
        )
        for epoch, stages in ((record.epoch, record.stages), (record.epoch + 1, record.next_stages)):
            for stage in stages:
                index, worker, incarnation, *sizes = astuple(stage)
                database.execute(
                    "INSERT INTO stages VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (record.id, epoch, index, worker, str(incarnation), *sizes),
                )


def _token(database: sqlite3.Connection, token: JoinToken) -> TokenRecord:
    row = database.execute("SELECT * FROM join_tokens WHERE id = ?", (token.id,)).fetchone()
    if row is None:
        raise Unauthenticated("unknown join token")
    return TokenRecord(*row)


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise
