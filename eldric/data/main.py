"""A data worker process: its node, its model store and its membership."""

import asyncio
import contextlib
import logging
from functools import partial
from typing import Any

from eldric.data.config import DataConfig
from eldric.data.content import content_route
from eldric.data.export import exports_of
from eldric.data.hub import Hub
from eldric.data.jobs import Jobs
from eldric.data.leaving import Leaving
from eldric.data.metrics import DataMetrics
from eldric.data.peer import Peers
from eldric.data.service import ModelStoreService
from eldric.data.store import ModelStore
from eldric.data.transfers import Transfers
from eldric.errors import EldricError
from eldric.member import Member
from eldric.node import Node
from eldric.security import Identity
from eldric.v1 import model_store_pb2, model_store_pb2_grpc

log = logging.getLogger(__name__)

#: How often the folder is looked through for the gauges and for /health, in seconds.
REFRESH_INTERVAL_S = 15.0
#: Time that imports and checks get to end when the node ends, in seconds: a longer one can be done again.
JOB_GRACE_S = 2.0


class DataWorker:
    """Wires a data worker's parts together."""

    def __init__(self, config: DataConfig, identity: Identity) -> None:
        """Cleans the store up first, while nobody can import yet. Raises NotReady when its folder cannot be used."""
        self.store = ModelStore(config.folder)
        self.store.clean()
        self.node = Node(config.node, identity)
        metrics = DataMetrics(self.node.metrics)
        self._jobs = Jobs(config.jobs, config.queue)
        leaving = Leaving(self.node, lambda: self.member.controller)
        hub, peers = Hub(config.hub), Peers(lambda: self.node.identity)
        self._service = ModelStoreService(self.store, self._jobs, metrics, leaving, hub, peers, config.ollama)
        self._service.exports = partial(exports_of, self.store.folder, config.nfs)
        self._problem = ""
        self._refreshing: asyncio.Task[None] | None = None
        self.node.service(
            self._service,
            model_store_pb2_grpc.add_ModelStoreServicer_to_server,
            model_store_pb2.DESCRIPTOR.services_by_name["ModelStore"],
        )
        transfers = Transfers(config.transfers, config.waiting_transfers)
        metrics.watch(transfers)
        served = metrics.served_bytes.labels("content")
        self.node.routes([content_route(self._service.find, served, transfers, self.node.expelled)])
        self.node.health(self._look)
        self.node.on_start(self._start)
        self.node.on_drain(self._drain)
        self.node.on_stop(self._stop)
        self.member = Member(self.node)

    def _look(self) -> tuple[bool, dict[str, Any]]:
        """For /health: ready while the folder can be read."""
        if self._problem:
            return False, {"problem": self._problem}
        return True, {"models": self._service.model_count}

    async def _start(self) -> None:
        await self._refresh()
        self._refreshing = asyncio.create_task(self._refresh_for_ever(), name="refresh")

    async def _refresh_for_ever(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_INTERVAL_S)
            await self._refresh()

    async def _refresh(self) -> None:
        try:
            await self._service.refresh()
            self._problem = ""
        except EldricError as error:
            log.warning("event=store_unreadable problem=%r", error.message)
            self._problem = error.message
        except Exception:
            log.exception("event=refresh_failed")
            self._problem = "the store cannot be looked through: see this node's log"

    async def _drain(self) -> None:
        await self._jobs.close(min(JOB_GRACE_S, self.node.config.drain_s / 2))  # the rest is for cleaning up

    async def _stop(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._refreshing
        self._service.close()


async def run(config: DataConfig) -> None:
    """Serves until a signal ends the process. Raises NotReady when the store's folder cannot be used."""
    await DataWorker(config, Identity.load(config.node.folder)).node.run()
