"""Fresh numbers for whoever asks for a pipeline's status: beats are up to an interval old."""

import asyncio
from collections.abc import Iterable

from eldric.controller import convert
from eldric.controller.cluster import Cluster
from eldric.controller.deployments import Deployment
from eldric.controller.registry import Node
from eldric.controller.workers import Workers
from eldric.errors import EldricError

#: How long a worker may take to answer; then its last beat is good enough, in seconds.
ANSWER_S = 0.25
#: Workers that are asked for one status; with more, the last beats are good enough.
MAX_WORKERS = 64


class FreshReports:
    """Asks the workers of pipelines how their stages are."""

    def __init__(self, cluster: Cluster, workers: Workers) -> None:
        self._cluster = cluster
        self._workers = workers

    async def ask(self, deployments: Iterable[Deployment]) -> None:
        """Takes what the workers of these pipelines say now. Those that do not answer in time are left as they were."""
        ids = dict.fromkeys(stage.node_id for each in deployments for stage in each.record.stages)
        nodes = [node for node in map(self._cluster.registry.get, ids) if node is not None and node.is_alive]
        if len(nodes) <= MAX_WORKERS:
            await asyncio.gather(*(self._ask(node) for node in nodes))

    async def _ask(self, node: Node) -> None:
        try:
            statuses = await self._workers.statuses(node, timeout_s=ANSWER_S)
        except EldricError:
            return
        if self._cluster.registry.get(node.id) is node:
            for report in convert.reports(statuses):
                self._cluster.stage_seen(node.id, report)
