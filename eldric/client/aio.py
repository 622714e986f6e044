"""The asynchronous client."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from eldric.channels import NO_DEADLINE_S
from eldric.client import convert, types
from eldric.client.cluster import Cluster, find_cluster
from eldric.client.connections import Connections
from eldric.client.store import Models
from eldric.errors import Unavailable
from eldric.v1 import (
    inference_pb2,
    inference_pb2_grpc,
    membership_pb2,
    membership_pb2_grpc,
    pipeline_pb2,
    pipeline_pb2_grpc,
    registry_pb2,
)

_CONTROLLER, _ROUTER = "the controller", "the router"

#: Deadline of Undeploy, which waits for the stages to be unloaded, in seconds.
_UNDEPLOY_S = 60.0


class AsyncClient:
    """A connection to a cluster.

    `folder` is that of a local cluster, `controller` one or more addresses; without either, ELDRIC_DIR,
    ELDRIC_CONTROLLER or the context say which cluster is meant. `timeout_s` is the deadline of calls that answer once;
    streams and `embed`, which wait for a model, have one when they are given it. Every call raises subclasses of
    EldricError.
    """

    def __init__(
        self,
        cluster: Cluster | None = None,
        *,
        folder: Path | str | None = None,
        controller: str | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        self.cluster = cluster or find_cluster(folder, controller)
        self._timeout_s = timeout_s
        self._connections = Connections(self.cluster, timeout_s)
        self.models = Models(self._connections)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._connections.close()

    # Deployments

    async def plan(self, model: str, **options: Any) -> types.Plan:
        """What `deploy` would do now; takes its arguments."""
        request = convert.deploy_request(model, options)
        stub = pipeline_pb2_grpc.PipelineStub(await self._connections.controller())
        with self._connections.calling(_CONTROLLER):
            return convert.plan(await stub.Plan(request, timeout=self._timeout_s))

    async def deploy(self, model: str, **options: Any) -> types.PipelineInfo:
        """Deploy a model and wait until it is ready; see `deploy_events` for the arguments."""
        async with contextlib.aclosing(self.deploy_events(model, **options)) as events:
            async for event in events:
                if isinstance(event, types.PipelineInfo):
                    return event
        raise Unavailable("the controller ended the deployment without a word")

    async def deploy_events(
        self, model: str, *, timeout_s: float | None = None, **options: Any
    ) -> AsyncGenerator[types.DeployEvent, None]:
        """Deploy a model: the plan, then the progress of each stage, then the pipeline. Closing the iterator undoes it.

        Arguments: name, stages (0: as few as fit), workers, layers (of each stage), transport, insecure_tensors, and
        the stage options context, slots, chunk, lanes, threads, exact, weights, kv_type.
        """
        request = convert.deploy_request(model, options)
        stub = pipeline_pb2_grpc.PipelineStub(await self._connections.controller())
        async with contextlib.aclosing(self._deployment(stub.Deploy(request, timeout=timeout_s))) as events:
            async for event in events:
                yield event

    async def rebalance_events(
        self, name: str, *, timeout_s: float | None = None
    ) -> AsyncGenerator[types.DeployEvent, None]:
        """Plan a pipeline again over the workers of now, and move to that plan."""
        stub = pipeline_pb2_grpc.PipelineStub(await self._connections.controller())
        call = stub.Rebalance(pipeline_pb2.RebalanceRequest(name=name), timeout=timeout_s)
        async with contextlib.aclosing(self._deployment(call)) as events:
            async for event in events:
                yield event

    async def _deployment(self, call: Any) -> AsyncGenerator[types.DeployEvent, None]:
        with self._connections.calling(_CONTROLLER):
            try:
                async for message in call:
                    if (event := convert.deploy_event(message)) is not None:
                        yield event
            finally:
                call.cancel()

    async def undeploy(self, name: str) -> None:
        stub = pipeline_pb2_grpc.PipelineStub(await self._connections.controller())
        with self._connections.calling(_CONTROLLER):
            await stub.Undeploy(pipeline_pb2.UndeployRequest(name=name), timeout=_UNDEPLOY_S)

    async def status(self, name: str = "") -> list[types.PipelineInfo]:
        """All pipelines, or the one of that name. Raises NotFound."""
        stub = pipeline_pb2_grpc.PipelineStub(await self._connections.controller())
        with self._connections.calling(_CONTROLLER):
            answer = await stub.Status(pipeline_pb2.PipelineStatusRequest(name=name), timeout=self._timeout_s)
        return [convert.pipeline(info) for info in answer.pipelines]

    # Nodes

    async def workers(self) -> list[types.Worker]:
        return [convert.worker(node) for node in await self._connections.nodes(registry_pb2.WORKER)]

    async def nodes(self) -> list[types.NodeInfo]:
        return [convert.node_info(node) for node in await self._connections.nodes()]

    async def create_token(self, *, lifetime_s: int = 3600, uses: int = 1, kind: str = "") -> str:
        """A join token. uses 0: any number. kind: the only one that it admits; empty: any but "client" and
        "controller"."""
        stub = membership_pb2_grpc.MembershipStub(await self._connections.controller())
        request = membership_pb2.CreateTokenRequest(lifetime_s=lifetime_s, uses=uses, unlimited=uses == 0, kind=kind)
        with self._connections.calling(_CONTROLLER):
            return (await stub.CreateToken(request, timeout=self._timeout_s)).token

    async def expel(self, node_id: str = "") -> list[str]:
        """End the membership of "KIND/NAME" for good; empty: nobody's. Returns all that were expelled so far."""
        stub = membership_pb2_grpc.MembershipStub(await self._connections.controller())
        with self._connections.calling(_CONTROLLER):
            answer = await stub.Expel(membership_pb2.ExpelRequest(node_id=node_id), timeout=self._timeout_s)
        return list(answer.expelled)

    # Text

    async def generate(
        self,
        model: str,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 0,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        cache_prompt: bool = True,
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> AsyncGenerator[types.Event, None]:
        """Continue a text (or token ids) as it is. Closing the iterator cancels; DeadlineExceeded after `timeout_s`.

        cache_prompt: go on from the beginning of the prompt that was computed for an earlier one, if there is any.
        Sampling: temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty,
        penalty_last_n, logit_bias, seed, logprobs.
        """
        request = convert.generate_request(model, max_tokens, stop, ignore_eos, cache_prompt, sampling)
        if isinstance(prompt, str):
            request.prompt = prompt
        else:
            request.tokens.CopyFrom(convert.token_ids(prompt))
        async with contextlib.aclosing(self._events(request, timeout_s)) as events:
            async for event in events:
                yield event

    async def chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, str]],
        *,
        max_tokens: int = 0,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        cache_prompt: bool = True,
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> AsyncGenerator[types.Event, None]:
        """Answer a conversation of {"role", "content"} by the model's chat template, or go on with its last message if
        that is the assistant's; see `generate`."""
        request = convert.generate_request(model, max_tokens, stop, ignore_eos, cache_prompt, sampling)
        request.chat.CopyFrom(convert.chat_messages(messages))
        async with contextlib.aclosing(self._events(request, timeout_s)) as events:
            async for event in events:
                yield event

    async def _events(
        self, request: inference_pb2.GenerateRequest, timeout_s: float | None
    ) -> AsyncGenerator[types.Event, None]:
        stub = inference_pb2_grpc.InferenceStub(await self._connections.router())
        with self._connections.calling(_ROUTER):
            call = stub.Generate(request, timeout=timeout_s)
            try:
                async for message in call:
                    if (event := convert.event(message)) is not None:
                        yield event
            finally:
                call.cancel()

    async def complete(self, model: str, prompt: str | Sequence[int], **options: Any) -> types.Answer:
        """`generate`, read to its end."""
        async with contextlib.aclosing(self.generate(model, prompt, **options)) as events:
            return await collect(events)

    async def embed(self, model: str, text: str | Sequence[int], *, timeout_s: float | None = None) -> types.Embedding:
        """A text (or token ids) as a vector of length 1: what the model makes of its last token. DeadlineExceeded after
        `timeout_s`; without one it waits, as `generate` does. Raises NotSupported for a model that was made to pool all
        of them."""
        request = inference_pb2.EmbedRequest(model=model)
        if isinstance(text, str):
            request.text = text
        else:
            request.tokens.CopyFrom(convert.token_ids(text))
        stub = inference_pb2_grpc.InferenceStub(await self._connections.router())
        with self._connections.calling(_ROUTER):
            answer = await stub.Embed(request, timeout=NO_DEADLINE_S if timeout_s is None else timeout_s)
        return types.Embedding(tuple(answer.embedding), answer.prompt_tokens)

    async def tokenize(self, model: str, text: str, *, special: bool = False) -> list[int]:
        stub = inference_pb2_grpc.InferenceStub(await self._connections.router())
        request = inference_pb2.TokenizeRequest(model=model, text=text, special=special)
        with self._connections.calling(_ROUTER):
            return list((await stub.Tokenize(request, timeout=self._timeout_s)).ids)

    # Connections, for calls that this class has no method for

    async def controller_channel(self) -> grpc.aio.Channel:
        """To a controller that answers."""
        return await self._connections.controller()

    async def router_channel(self) -> grpc.aio.Channel:
        """To a router that is up."""
        return await self._connections.router()

    def channel(self, address: str, kind: str, name: str) -> grpc.aio.Channel:
        """To any node of the cluster."""
        return self._connections.to(address, kind, name)


async def collect(events: AsyncIterator[types.Event]) -> types.Answer:
    """Read a generation to its end."""
    text: list[str] = []
    tokens: list[types.Token] = []
    async for event in events:
        if isinstance(event, types.Delta):
            text.append(event.text)
            tokens.extend(event.tokens)
        elif isinstance(event, types.Finished):
            return types.Answer("".join(text), tuple(tokens), event)
    raise Unavailable("the generation ended without a word")
