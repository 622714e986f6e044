"""The Python client, sync and async.

with Client(folder="my-cluster") as client:
    client.deploy("smollm2", stages=3)
    for event in client.chat("smollm2", [{"role": "user", "content": "Hello!"}]):
        if isinstance(event, Delta):
            print(event.text, end="", flush=True)
"""

from eldric.client.aio import AsyncClient, collect
from eldric.client.cluster import Cluster, find_cluster
from eldric.client.sync import Client
from eldric.client.types import (
    Answer,
    Delta,
    DeployEvent,
    Embedding,
    Event,
    Finished,
    ImportProgress,
    LinkInfo,
    ModelDetails,
    ModelInfo,
    ModelReplicas,
    NodeInfo,
    PipelineInfo,
    Plan,
    PlannedStage,
    PullEvent,
    ReplicaProgress,
    ResolvedSource,
    StageInfo,
    StageProgress,
    Started,
    Token,
    Worker,
)

__all__ = [
    "Answer",
    "AsyncClient",
    "Client",
    "Cluster",
    "Delta",
    "DeployEvent",
    "Embedding",
    "Event",
    "Finished",
    "ImportProgress",
    "LinkInfo",
    "ModelDetails",
    "ModelInfo",
    "ModelReplicas",
    "NodeInfo",
    "PipelineInfo",
    "Plan",
    "PlannedStage",
    "PullEvent",
    "ReplicaProgress",
    "ResolvedSource",
    "StageInfo",
    "StageProgress",
    "Started",
    "Token",
    "Worker",
    "collect",
    "find_cluster",
]
