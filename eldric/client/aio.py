"""The asynchronous client."""

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from eldric.channels import ChannelPool, call_errors
from eldric.client import convert, types
from eldric.client.cluster import Cluster, find_cluster
from eldric.errors import InvalidRequest, Unavailable
from eldric.v1 import (
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
    membership_pb2,
    membership_pb2_grpc,
    model_store_pb2,
    model_store_pb2_grpc,
    pipeline_pb2,
    pipeline_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
)

Message = TypeVar("Message")


class AsyncClient:
    """A connection to a cluster.

    `folder` is that of a local cluster, `controller` an address; without either, ELDRIC_DIR, ELDRIC_CONTROLLER or the
    context say which cluster is meant. `timeout_s` is the deadline of calls that answer once; streams have none of
    their own. Every call raises subclasses of EldricError.
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
        self.models = Models(self)
        self._timeout_s = timeout_s
        identity = self.cluster.identity()
        self._channels = ChannelPool(lambda: identity)
        self._controller = ""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channels.close()

    # Deployments

    async def plan(self, model: str, **options: Any) -> types.Plan:
        """What `deploy` would do now; takes its arguments."""
        stub = pipeline_pb2_grpc.PipelineStub(await self.controller_channel())
        with call_errors("the controller"):
            answer = await stub.Plan(_deploy_request(model, options), timeout=self._timeout_s)
        return convert.plan(answer)

    async def deploy(self, model: str, **options: Any) -> types.PipelineInfo:
        """Deploy a model and wait until it is ready; see `deploy_events` for the arguments."""
        async for event in self.deploy_events(model, **options):
            if isinstance(event, types.PipelineInfo):
                return event
        raise Unavailable("the controller ended the deployment without a word")

    async def deploy_events(self, model: str, **options: Any) -> AsyncIterator[types.DeployEvent]:
        """Deploy a model: the plan, then the progress of each stage, then the pipeline. Closing the iterator undoes it.

        Arguments: name, stages (0: as few as fit), workers, layers (of each stage), transport, insecure_tensors, and
        the stage options context, slots, chunk, lanes, threads, exact, weights, kv_type.
        """
        stub = pipeline_pb2_grpc.PipelineStub(await self.controller_channel())
        with call_errors("the controller"):
            async for event in stub.Deploy(_deploy_request(model, options)):
                if (converted := convert.deploy_event(event)) is not None:
                    yield converted

    async def rebalance_events(self, name: str) -> AsyncIterator[types.DeployEvent]:
        """Plan a pipeline again over the workers of now, and move to that plan."""
        stub = pipeline_pb2_grpc.PipelineStub(await self.controller_channel())
        with call_errors("the controller"):
            async for event in stub.Rebalance(pipeline_pb2.RebalanceRequest(name=name)):
                if (converted := convert.deploy_event(event)) is not None:
                    yield converted

    async def undeploy(self, name: str) -> None:
        stub = pipeline_pb2_grpc.PipelineStub(await self.controller_channel())
        with call_errors("the controller"):
            await stub.Undeploy(pipeline_pb2.UndeployRequest(name=name), timeout=60.0)

    async def status(self, name: str = "") -> list[types.PipelineInfo]:
        """All pipelines, or the one of that name. Raises NotFound."""
        stub = pipeline_pb2_grpc.PipelineStub(await self.controller_channel())
        with call_errors("the controller"):
            answer = await stub.Status(pipeline_pb2.PipelineStatusRequest(name=name), timeout=self._timeout_s)
        return [convert.pipeline(info) for info in answer.pipelines]

    # Nodes

    async def workers(self) -> list[types.Worker]:
        return [convert.worker(node) for node in await self._list_nodes(registry_pb2.WORKER)]

    async def nodes(self) -> list[types.NodeInfo]:
        return [convert.node_info(node) for node in await self._list_nodes()]

    async def create_token(self, *, lifetime_s: int = 3600, uses: int = 1, kind: str = "") -> str:
        """A join token. uses 0: any number."""
        stub = membership_pb2_grpc.MembershipStub(await self.controller_channel())
        request = membership_pb2.CreateTokenRequest(lifetime_s=lifetime_s, uses=uses, unlimited=uses == 0, kind=kind)
        with call_errors("the controller"):
            return (await stub.CreateToken(request, timeout=self._timeout_s)).token

    # Text

    async def generate(
        self,
        model: str,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 0,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        **sampling: Any,
    ) -> AsyncIterator[types.Event]:
        """Continue a text (or token ids) as it is. Closing the iterator cancels.

        Sampling: temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty,
        penalty_last_n, logit_bias, seed, logprobs.
        """
        request = _generate_request(model, max_tokens, stop, ignore_eos, sampling)
        if isinstance(prompt, str):
            request.prompt = prompt
        else:
            request.tokens.ids.extend(prompt)
        async for event in self._events(request):
            yield event

    async def chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, str]],
        *,
        max_tokens: int = 0,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        **sampling: Any,
    ) -> AsyncIterator[types.Event]:
        """Answer a conversation of {"role", "content"} by the model's chat template; see `generate`."""
        request = _generate_request(model, max_tokens, stop, ignore_eos, sampling)
        request.chat.CopyFrom(convert.chat_messages(messages))
        async for event in self._events(request):
            yield event

    async def _events(self, request: inference_pb2.GenerateRequest) -> AsyncIterator[types.Event]:
        stub = inference_pb2_grpc.InferenceStub(await self.router_channel())
        with call_errors("the router"):
            call = stub.Generate(request)
            try:
                async for message in call:
                    if (event := convert.event(message)) is not None:
                        yield event
            finally:
                call.cancel()

    async def tokenize(self, model: str, text: str, *, special: bool = False) -> list[int]:
        stub = inference_pb2_grpc.InferenceStub(await self.router_channel())
        request = inference_pb2.TokenizeRequest(model=model, text=text, special=special)
        with call_errors("the router"):
            return list((await stub.Tokenize(request, timeout=self._timeout_s)).ids)

    # Connections

    async def controller_channel(self) -> grpc.aio.Channel:
        """To a controller that answers: the last one used, or the next in turn."""
        known = [self._controller] if self._controller else []
        for address in [*known, *(each for each in self.cluster.controllers if each not in known)]:
            channel = self._channels.to(address, "controller")
            if address == self._controller or len(self.cluster.controllers) == 1:
                self._controller = address
                return channel
            stub = registry_pb2_grpc.RegistryStub(channel)
            with contextlib.suppress(grpc.RpcError):
                await stub.List(registry_pb2.ListNodesRequest(kind=registry_pb2.CONTROLLER), timeout=2.0)
                self._controller = address
                return channel
        raise Unavailable(f"no controller answers at {', '.join(self.cluster.controllers)}")

    def channel(self, address: str, kind: str, name: str) -> grpc.aio.Channel:
        """To any node of the cluster."""
        return self._channels.to(address, kind, name)

    async def router_channel(self) -> grpc.aio.Channel:
        return await self._node_channel(registry_pb2.ROUTER, "router")

    async def data_channel(self) -> grpc.aio.Channel:
        return await self._node_channel(registry_pb2.DATA, "data worker")

    async def _node_channel(self, kind: "registry_pb2.NodeKind.ValueType", title: str) -> grpc.aio.Channel:
        for node in await self._list_nodes(kind):
            if node.state == registry_pb2.UP:
                name = registry_pb2.NodeKind.Name(kind).lower()
                return self._channels.to(node.grpc_address, name, node.name)
        raise Unavailable(f"the cluster has no {title} that is up")

    async def _list_nodes(
        self, kind: "registry_pb2.NodeKind.ValueType" = registry_pb2.NODE_KIND_UNSPECIFIED
    ) -> list[registry_pb2.Node]:
        stub = registry_pb2_grpc.RegistryStub(await self.controller_channel())
        with call_errors("the controller"):
            answer = await stub.List(registry_pb2.ListNodesRequest(kind=kind), timeout=self._timeout_s)
        return list(answer.nodes)


class Models:
    """The model store, through the cluster's data worker."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def _stub(self) -> "model_store_pb2_grpc.ModelStoreAsyncStub":
        return model_store_pb2_grpc.ModelStoreStub(await self._client.data_channel())

    async def list(self) -> list[types.ModelInfo]:
        stub = await self._stub()
        with call_errors("the data worker"):
            return [convert.model(info) for info in (await stub.List(model_store_pb2.ListModelsRequest())).models]

    async def show(self, name: str) -> types.ModelDetails:
        stub = await self._stub()
        with call_errors("the data worker"):
            return convert.model_details(await stub.Metadata(model_store_pb2.ModelRequest(id=name)))

    async def add_events(
        self, path: Path | str, name: str = "", mode: str = "copy"
    ) -> AsyncIterator[types.ImportProgress | types.ModelInfo]:
        """Take a GGUF file of the data worker's machine into the store: progress, then the model."""
        stub = await self._stub()
        request = model_store_pb2.ImportRequest(path=str(path), id=name, mode=mode)
        with call_errors("the data worker"):
            async for event in stub.Import(request):
                if event.HasField("model"):
                    yield convert.model(event.model)
                else:
                    yield types.ImportProgress(event.phase, event.done_bytes, event.total_bytes)

    async def add(self, path: Path | str, name: str = "", mode: str = "copy") -> types.ModelInfo:
        async for event in self.add_events(path, name, mode):
            if isinstance(event, types.ModelInfo):
                return event
        raise Unavailable("the data worker ended the import without a word")

    async def remove(self, name: str) -> None:
        stub = await self._stub()
        with call_errors("the data worker"):
            await stub.Remove(model_store_pb2.RemoveModelRequest(id=name))

    async def verify_events(self, name: str) -> AsyncIterator[types.ImportProgress]:
        """Compare the files with their checksums. Raises DataLoss, which names the file that differs."""
        stub = await self._stub()
        with call_errors("the data worker"):
            async for event in stub.Verify(model_store_pb2.ModelRequest(id=name)):
                yield types.ImportProgress("verifying", event.done_bytes, event.total_bytes)


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


def _deploy_request(model: str, options: Mapping[str, Any]) -> pipeline_pb2.DeployRequest:
    request_fields = {field.name for field in pipeline_pb2.DeployRequest.DESCRIPTOR.fields} - {"options", "model"}
    given = {name: value for name, value in options.items() if value is not None}
    try:
        stage_options = common_pb2.StageOptions(
            **{name: value for name, value in given.items() if name not in request_fields}
        )
        return pipeline_pb2.DeployRequest(
            model=model,
            options=stage_options,
            **{name: value for name, value in given.items() if name in request_fields},
        )
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"a deployment option is wrong: {error}") from error


def _generate_request(
    model: str, max_tokens: int, stop: Sequence[str], ignore_eos: bool, sampling: Mapping[str, Any]
) -> inference_pb2.GenerateRequest:
    try:
        return inference_pb2.GenerateRequest(
            model=model,
            sampling=convert.sampling(sampling),
            max_tokens=max_tokens,
            stop=[stop] if isinstance(stop, str) else stop,
            ignore_eos=ignore_eos,
        )
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"a generation option is wrong: {error}") from error
