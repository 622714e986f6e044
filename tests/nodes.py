"""Nodes for tests: a cluster's authority, nodes in this process, and a node as a process of its own.

Run as a module (`python -m tests.nodes FOLDER [DRAIN_S]`) it is a controller that drains for DRAIN_S seconds.
"""

import asyncio
import contextlib
import datetime
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from eldric.channels import call_errors
from eldric.config import NodeConfig
from eldric.errors import Unauthenticated
from eldric.node import Node
from eldric.security import Authority, Identity, JoinToken, TokenRecord, caller_of, new_token
from eldric.v1 import membership_pb2, membership_pb2_grpc, pipeline_pb2, pipeline_pb2_grpc


def make_node(folder: Path, authority: Authority, kind: str = "controller", name: str = "n1", **settings: Any) -> Node:
    """A node on free ports of this machine, with a certificate of its own."""
    settings = {"http_port": 0, "grpc_port": 0, "join_port": 0, "drain_s": 3.0, **settings}
    if kind != "controller":
        settings.setdefault("controllers", ("127.0.0.1:1",))
    return Node(NodeConfig(kind, name, folder, **settings), authority.issue_identity(kind, name))


@contextlib.asynccontextmanager
async def running(node: Node) -> AsyncIterator[Node]:
    await node.start()
    try:
        yield node
    finally:
        await node.stop()


@contextlib.asynccontextmanager
async def http(node: Node, identity: Identity) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client that shows `identity`."""
    async with httpx.AsyncClient(
        verify=identity.client_context(), base_url=node.http_url, trust_env=False, timeout=10
    ) as client:
        yield client


STATUS = pipeline_pb2.PipelineStatusRequest


class Pipelines(pipeline_pb2_grpc.PipelineServicer):
    """Status answers with the caller, or raises `error`; Deploy sends an event and goes on at
    `release`, or sends more for ever while `busy`."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.busy = False
        self.begun, self.release, self.ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def Status(self, request: Any, context: Any) -> Any:
        if self.error is not None:
            raise self.error
        info = pipeline_pb2.PipelineInfo(id=caller_of(context).node_id, message="x" * int(request.name or 0))
        return pipeline_pb2.PipelineStatusResponse(pipelines=[info])

    async def Deploy(self, request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            yield pipeline_pb2.DeployEvent(stage=pipeline_pb2.StageProgress(worker="w1"))
            self.begun.set()
            while self.busy:
                yield pipeline_pb2.DeployEvent(stage=pipeline_pb2.StageProgress(worker="w1"))
                await asyncio.sleep(0.001)
            await self.release.wait()
            yield pipeline_pb2.DeployEvent(ready=pipeline_pb2.PipelineInfo(name=request.model))
        finally:
            self.ended.set()

    async def List(self, request: Any, context: Any) -> Any:
        self.begun.set()
        await self.release.wait()
        return pipeline_pb2.ListPipelinesResponse()

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield pipeline_pb2.PipelineEvent()
        await asyncio.Event().wait()


class Members(membership_pb2_grpc.MembershipServicer):
    """Issues certificates of a few seconds, for tokens of `record`."""

    def __init__(self, authority: Authority, lifetime_s: float = 3600) -> None:
        self.authority, self.lifetime = authority, datetime.timedelta(seconds=lifetime_s)
        self.record: TokenRecord | None = None
        self.renewals = 0

    async def Join(self, request: Any, context: Any) -> Any:
        if self.record is None:
            raise Unauthenticated("unknown join token")
        self.record = self.record.use(JoinToken.parse(request.token), request.kind, 0.0)
        return self._issue(request.csr, request.kind, request.name)

    async def Renew(self, request: Any, context: Any) -> Any:
        self.renewals += 1
        caller = caller_of(context)
        return self._issue(request.csr, caller.kind, caller.name)

    async def CreateToken(self, request: Any, context: Any) -> Any:
        token, self.record = new_token(self.authority.sha256, now=0.0)
        return membership_pb2.CreateTokenResponse(token=token.format())

    def _issue(self, csr: bytes, kind: str, name: str) -> membership_pb2.Certificate:
        made = self.authority.issue(csr, kind, name, self.lifetime)
        return membership_pb2.Certificate(certificate=made, authority=self.authority.certificate_pem)


def serve_pipelines(node: Node) -> Pipelines:
    servicer = Pipelines()  # type: ignore[abstract]
    service = pipeline_pb2.DESCRIPTOR.services_by_name["Pipeline"]
    node.service(servicer, pipeline_pb2_grpc.add_PipelineServicer_to_server, service)
    return servicer


def serve_members(node: Node, authority: Authority, lifetime_s: float = 3600) -> Members:
    servicer = Members(authority, lifetime_s)  # type: ignore[abstract]
    service = membership_pb2.DESCRIPTOR.services_by_name["Membership"]
    node.service(servicer, membership_pb2_grpc.add_MembershipServicer_to_server, service, strangers=True)
    return servicer


async def status(connection: Any, size: int = 0) -> pipeline_pb2.PipelineInfo:
    with call_errors("the controller"):
        answer = await pipeline_pb2_grpc.PipelineStub(connection).Status(STATUS(name=str(size or "")))
    info: pipeline_pb2.PipelineInfo = answer.pipelines[0]
    return info


async def main(folder: Path, drain_s: float) -> None:
    node = make_node(folder, Authority.load(folder / "authority"), drain_s=60.0)

    async def drain() -> None:
        (folder / "draining").touch()
        await asyncio.sleep(drain_s)

    node.on_drain(drain)
    await node.run()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.0))
