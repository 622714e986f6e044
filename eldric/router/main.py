"""A router process: its node, the pipelines that it knows, and its two faces."""

from concurrent.futures import ThreadPoolExecutor

from eldric.member import Member
from eldric.node import Node
from eldric.router.admission import Admission
from eldric.router.config import RouterConfig
from eldric.router.generation import Heads
from eldric.router.http_body import BodyReader
from eldric.router.inference_service import InferenceService
from eldric.router.metrics import RouterMetrics
from eldric.router.openai_api import OpenAiApi
from eldric.router.openai_embeddings import Embeddings
from eldric.router.openai_generation import Completions
from eldric.router.pipelines import DEPLOYING, READY, Pipelines
from eldric.router.prompts import Prompts
from eldric.router.vocabularies import Vocabularies
from eldric.router.watch import PipelineWatcher
from eldric.security import Identity
from eldric.v1 import inference_pb2, inference_pb2_grpc, pipeline_pb2


class Router:
    """Wires a router's parts together. It holds nothing that it cannot lose."""

    def __init__(self, config: RouterConfig) -> None:
        self.node = Node(config.node, Identity.load(config.node.folder))
        self.pipelines = Pipelines()
        self._executor = ThreadPoolExecutor(config.threads, thread_name_prefix="text")
        self._vocabularies = Vocabularies(self.node, config.models, self._executor, config.vocabularies)
        self._admission = Admission(config.max_requests, lambda: self.node.draining)
        metrics = RouterMetrics(self.node.metrics, lambda: self._admission.active)
        prompts = Prompts(self.pipelines, self._vocabularies, self._executor)
        heads = Heads(self.node.channels, self.pipelines, metrics)
        completions = Completions(prompts, heads, self._admission)
        self.bodies = BodyReader(config.max_body_bytes, config.max_bodies_bytes, self._executor)
        embeddings = Embeddings(prompts, heads)
        api = OpenAiApi(self.pipelines, prompts, completions, embeddings, self._admission, metrics, self.bodies)
        self.node.routes(api.routes())
        self.node.service(
            InferenceService(prompts, heads, self._admission),
            inference_pb2_grpc.add_InferenceServicer_to_server,
            inference_pb2.DESCRIPTOR.services_by_name["Inference"],
        )
        self.node.health(self.pipelines.health)
        Member(self.node)
        watcher = PipelineWatcher(self.node, self.pipelines, self._changed)
        self.node.on_start(watcher.start)
        self.node.on_drain(self._admission.wait_idle)
        self.node.on_stop(self._close)
        self.node.on_stop(watcher.stop)

    def _changed(self, info: pipeline_pb2.PipelineInfo) -> None:
        if info.state in (DEPLOYING, READY):
            self._vocabularies.prefetch(info.source)

    async def _close(self) -> None:
        await self._vocabularies.close()
        self._executor.shutdown(wait=False, cancel_futures=True)


async def run(config: RouterConfig) -> None:
    """Serve until a signal ends the process."""
    await Router(config).node.run()
