"""Pipeline: deployments of models over workers."""

import contextlib
from collections.abc import AsyncIterator

from eldric.controller import convert
from eldric.controller.cluster import Cluster
from eldric.controller.deployer import Deployer
from eldric.controller.fresh import FreshReports
from eldric.controller.operation import Operation
from eldric.v1 import pipeline_pb2, pipeline_pb2_grpc


class PipelineService(pipeline_pb2_grpc.PipelineServicer):
    def __init__(self, cluster: Cluster, deployer: Deployer, fresh: FreshReports) -> None:
        self._cluster = cluster
        self._deployer = deployer
        self._fresh = fresh

    async def Plan(self, request: pipeline_pb2.DeployRequest, context: object) -> pipeline_pb2.DeploymentPlan:
        return await self._deployer.plan(request)

    async def Deploy(
        self, request: pipeline_pb2.DeployRequest, context: object
    ) -> AsyncIterator[pipeline_pb2.DeployEvent]:
        async for event in _events(self._deployer.deploy(request)):
            yield event

    async def Rebalance(
        self, request: pipeline_pb2.RebalanceRequest, context: object
    ) -> AsyncIterator[pipeline_pb2.DeployEvent]:
        async for event in _events(self._deployer.rebalance(request.name)):
            yield event

    async def Undeploy(self, request: pipeline_pb2.UndeployRequest, context: object) -> pipeline_pb2.UndeployResponse:
        await self._deployer.undeploy(request.name)
        return pipeline_pb2.UndeployResponse()

    async def Status(
        self, request: pipeline_pb2.PipelineStatusRequest, context: object
    ) -> pipeline_pb2.PipelineStatusResponse:
        deployments = self._cluster.deployments
        chosen = [deployments.find(request.name)] if request.name else list(deployments)
        await self._fresh.ask(chosen)
        return pipeline_pb2.PipelineStatusResponse(pipelines=[self._cluster.info(each) for each in chosen])

    async def List(
        self, request: pipeline_pb2.ListPipelinesRequest, context: object
    ) -> pipeline_pb2.ListPipelinesResponse:
        summaries = [convert.summary(deployment) for deployment in self._cluster.deployments]
        return pipeline_pb2.ListPipelinesResponse(pipelines=summaries)

    async def Watch(
        self, request: pipeline_pb2.WatchPipelinesRequest, context: object
    ) -> AsyncIterator[pipeline_pb2.PipelineEvent]:
        infos = [self._cluster.info(deployment) for deployment in self._cluster.deployments]
        with self._cluster.pipeline_news.watch(
            [pipeline_pb2.PipelineEvent(pipeline=info) for info in infos]
        ) as watcher:
            async for event in watcher.follow():
                yield event


async def _events(operation: Operation) -> AsyncIterator[pipeline_pb2.DeployEvent]:
    async with contextlib.aclosing(operation.follow()) as events:
        async for event in events:
            yield event
