"""A worker process: its node, its stages and its membership."""

import logging
import resource
import sys

from eldric.engine.kernels.compiler import prepare
from eldric.member import Member
from eldric.node import Node
from eldric.security import Identity
from eldric.v1 import (
    heartbeat_pb2,
    inference_pb2,
    inference_pb2_grpc,
    stage_pb2,
    stage_pb2_grpc,
)
from eldric.worker.config import WorkerConfig
from eldric.worker.inference_service import InferenceService
from eldric.worker.loading import StageLoader
from eldric.worker.metrics import StageCollector, WorkerMetrics
from eldric.worker.mounted.watch import MountWatch
from eldric.worker.range_cache.cache import RangeCache
from eldric.worker.range_cache.fetcher import RangeFetcher
from eldric.worker.range_cache.metrics import FetchMetrics
from eldric.worker.relay import relay_of
from eldric.worker.resources import resources
from eldric.worker.stage_service import StageService
from eldric.worker.stages import StageTable

log = logging.getLogger(__name__)

#: How long the control loop may keep the interpreter from a compute thread that waits for it, in seconds. Python's own
#: 5 ms is a tenth of a token.
SWITCH_INTERVAL_S = 0.0005


class Worker:
    """Wires a worker's parts together."""

    def __init__(self, config: WorkerConfig) -> None:
        self.node = Node(config.node, Identity.load(config.node.folder))
        cache = RangeCache(config.cache_folder, config.cache_bytes)
        fetched = FetchMetrics(self.node.metrics, cache.nbytes)
        fetcher = RangeFetcher(cache, lambda: self.node.identity, fetched)
        relay = relay_of(self.node)
        loader = StageLoader(config, WorkerMetrics(self.node.metrics), self._changed, fetcher, relay)
        self.stages = StageTable(config, loader)
        watch = MountWatch(loader.mounts, self.stages, self._changed, self.node.metrics)
        self.node.metrics.register(StageCollector(self))
        self._resources = resources(config)
        log.info("device=%s kernels=%s", self._resources.device, prepare() or "none")
        self.node.service(
            StageService(self.stages),
            stage_pb2_grpc.add_StageServicer_to_server,
            stage_pb2.DESCRIPTOR.services_by_name["Stage"],
        )
        self.node.service(
            InferenceService(self.stages),
            inference_pb2_grpc.add_InferenceServicer_to_server,
            inference_pb2.DESCRIPTOR.services_by_name["Inference"],
        )
        self._member = Member(self.node, lambda: self._resources, self._beat, self._answered)
        self.node.on_start(watch.start)
        self.node.on_drain(self.stages.drain)
        self.node.on_stop(watch.stop)
        self.node.on_stop(watch.unmount)
        self.node.on_stop(self.stages.close)

    def statuses(self) -> list[stage_pb2.StageStatus]:
        return [held.status() for held in self.stages]

    def _beat(self) -> heartbeat_pb2.BeatRequest:
        return heartbeat_pb2.BeatRequest(stages=self.statuses(), memory_used_bytes=self.stages.memory_used_bytes)

    async def _answered(self, answer: heartbeat_pb2.BeatResponse) -> None:
        await self.stages.follow(list(answer.wanted))

    def _changed(self) -> None:
        self._member.beat_now()


async def run(config: WorkerConfig) -> None:
    """Serve until a signal ends the process."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))  # weights are locked as far as it goes
    await Worker(config).node.run()
