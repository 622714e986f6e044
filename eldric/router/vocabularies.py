"""What a router needs of each model to turn text into tokens and back: made once per model file, kept, shared."""

import asyncio
import hashlib
import logging
from collections import OrderedDict
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from eldric.channels import call_errors
from eldric.engine.chat import ChatTemplate
from eldric.engine.errors import InvalidModel, InvalidPrompt
from eldric.engine.gguf import ModelFile
from eldric.engine.tokenizer import Tokenizer
from eldric.errors import DataLoss, EldricError, NotFound, Unavailable
from eldric.nfs.mountinfo import remote_mount
from eldric.node import Node
from eldric.v1 import model_store_pb2, model_store_pb2_grpc, registry_pb2, registry_pb2_grpc, stage_pb2

log = logging.getLogger(__name__)

#: A header holds the vocabulary: a quarter of a million tokens with merges and scores take about 15 MiB.
MAX_HEADER_BYTES = 256 * 1024 * 1024
PULL_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A model's tokenizer and chat template; both may be shared between threads."""

    tokenizer: Tokenizer
    template: ChatTemplate
    stop_tokens: tuple[int, ...]  # that end a generation, in order
    longest_token_bytes: int  # no token stands for more text

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """What a generated token adds to a text; nothing for the ids by which some models fill up their output."""
        try:
            return self.tokenizer.token_bytes(token, special=special)
        except InvalidPrompt:
            return b""


class Vocabularies:
    """Vocabularies by the SHA-256 of the model file's header: the newest used are kept.

    The header is read from the file where it is visible here, else pulled from a data worker. Concurrent requests for
    one model share the work; a failure is not kept.
    """

    def __init__(self, node: Node, mount: Path | None, executor: Executor, limit: int) -> None:
        """`mount`: where the store's folder lies here; None: where the data worker says."""
        self._node = node
        self._mount = mount
        self._executor = executor
        self._limit = limit
        self._made: OrderedDict[bytes, asyncio.Task[Vocabulary]] = OrderedDict()
        self._prefetched: set[bytes] = set()

    async def get(self, source: stage_pb2.ModelSource) -> Vocabulary:
        """The vocabulary of a model. Raises UnsupportedModel for a tokenizer that is not known, InvalidModel for a
        damaged one, Unavailable when no data worker has the file, DataLoss when it is another file there."""
        return await asyncio.shield(self._task(source))

    def prefetch(self, source: stage_pb2.ModelSource) -> None:
        """Makes the vocabulary in the background, so that the first request need not wait. Tried once for each model:
        what fails, or is dropped for newer ones, waits for a request."""
        key = _key(source)
        if source.files and key not in self._prefetched:
            self._prefetched.add(key)
            self._task(source)

    async def close(self) -> None:
        for task in self._made.values():
            task.cancel()
        await asyncio.gather(*self._made.values(), return_exceptions=True)
        self._made.clear()

    def _task(self, source: stage_pb2.ModelSource) -> "asyncio.Task[Vocabulary]":
        key = _key(source)
        task = self._made.get(key)
        if task is None:
            task = asyncio.create_task(self._make(source), name=f"vocabulary {source.model}")
            task.add_done_callback(lambda done: self._forget_failure(key, done))
            self._made[key] = task
            while len(self._made) > self._limit:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        return task

    def _forget_failure(self, key: bytes, task: "asyncio.Task[Vocabulary]") -> None:
        if task.cancelled() or task.exception() is None:
            return
        log.warning("event=vocabulary_failed task=%s error=%r", task.get_name(), str(task.exception()))
        if self._made.get(key) is task:
            del self._made[key]

    async def _make(self, source: stage_pb2.ModelSource) -> Vocabulary:
        loop = asyncio.get_running_loop()
        vocabulary = await loop.run_in_executor(self._executor, _from_file, source, self._mount)
        if vocabulary is None:
            header = await self._pull(source)
            vocabulary = await loop.run_in_executor(self._executor, _from_header, source, header)
        log.info("event=vocabulary_ready model=%s tokens=%d", source.model, vocabulary.tokenizer.vocab_size)
        return vocabulary

    async def _pull(self, source: stage_pb2.ModelSource) -> bytes:
        """The header from the first data worker that has it. Raises Unavailable, or what the last one said."""
        problem: EldricError = Unavailable(f"the cluster has no data worker that is up to read {source.model!r} from")
        for data_worker in await self._data_workers():
            try:
                with call_errors(f"data worker {data_worker.name}"):
                    header = await self._pull_from(data_worker, source.model)
                if not source.header_sha256 or hashlib.sha256(header).digest() == source.header_sha256:
                    return header
                problem = DataLoss(f"the model {source.model!r} in the store is not the file that was deployed")
            except NotFound as error:
                problem = Unavailable(f"the file of {source.model!r} is not in the store any more: {error.message}")
            except EldricError as error:
                problem = error
        raise problem

    async def _data_workers(self) -> list[registry_pb2.Node]:
        problem: EldricError | None = None
        for address in self._node.controllers:
            stub = registry_pb2_grpc.RegistryStub(self._node.channels.to(address, "controller"))
            try:
                with call_errors(f"controller at {address}"):
                    answer = await stub.List(registry_pb2.ListNodesRequest(kind=registry_pb2.DATA), timeout=5.0)
                return [node for node in answer.nodes if node.state == registry_pb2.UP]
            except EldricError as error:
                problem = error
        raise problem or Unavailable("this router knows no controller")

    async def _pull_from(self, data_worker: registry_pb2.Node, model: str) -> bytes:
        channel = self._node.channels.to(data_worker.grpc_address, "data", data_worker.name)
        request = model_store_pb2.PullRequest(id=model, header=True)
        header = bytearray()
        async for chunk in model_store_pb2_grpc.ModelStoreStub(channel).Pull(request, timeout=PULL_TIMEOUT_S):
            header += chunk.data
            if max(len(header), chunk.total_bytes) > MAX_HEADER_BYTES:
                raise DataLoss(f"the header of {model!r} is longer than {MAX_HEADER_BYTES} bytes")
        return bytes(header)


def _key(source: stage_pb2.ModelSource) -> bytes:
    return source.header_sha256 or source.SerializeToString(deterministic=True)


def _from_file(source: stage_pb2.ModelSource, mount: Path | None) -> Vocabulary | None:
    """From the model's own file; None when that file, or not this very one, is visible here."""
    path = PurePosixPath(source.files[0].path) if source.files else PurePosixPath()
    if path.is_absolute() or ".." in path.parts or not path.parts or not (mount or source.folder):
        return None
    folder = mount or Path(source.folder)
    if remote_mount(folder) is not None:
        return None  # a file server that hangs would hang the router, and a header is soon pulled
    try:
        with ModelFile.open(folder.joinpath(*path.parts)) as model:
            if source.header_sha256 and bytes.fromhex(model.header_sha256()) != source.header_sha256:
                return None
            return _make_vocabulary(model)
    except (OSError, InvalidModel):
        return None  # the store's copy will do, or say what is wrong


def _from_header(source: stage_pb2.ModelSource, header: bytes) -> Vocabulary:
    file = source.files[0] if source.files else stage_pb2.ModelFile(path=source.model, size_bytes=len(header))
    return _make_vocabulary(ModelFile.from_header(header, file.path, file.size_bytes))


def _make_vocabulary(model: ModelFile) -> Vocabulary:
    tokenizer = Tokenizer.from_metadata(model.metadata)
    longest = max((len(tokenizer.token_bytes(id, special=True)) for id in range(tokenizer.vocab_size)), default=1)
    return Vocabulary(
        tokenizer=tokenizer,
        template=ChatTemplate.from_metadata(model.metadata, tokenizer),
        stop_tokens=tuple(sorted(tokenizer.eog_ids)),
        longest_token_bytes=max(1, longest),
    )
