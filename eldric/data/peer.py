"""Models of another data worker of the cluster."""

from collections.abc import Callable, Mapping
from typing import Any

import httpx2
from google.protobuf import json_format
from google.protobuf.message import Message

from eldric.data.checksums import BLOCK_BYTES, FileSums, blocks_of
from eldric.data.http_client import TIMEOUT, get_json
from eldric.data.remote import MAX_FILE_BYTES, MAX_FILES, Remote, RemoteFile
from eldric.data.sources import PeerSource
from eldric.errors import DataLoss, NotFound
from eldric.names import server_name
from eldric.security import Identity
from eldric.v1 import model_store_pb2 as pb

#: What makes a request's connection ask for a data worker's certificate, whatever the address.
EXTENSIONS: Mapping[str, Any] = {"sni_hostname": server_name("data")}


class Peers:
    """Other data workers, seen with this node's certificate."""

    def __init__(self, identity: Callable[[], Identity]) -> None:
        self._identity = identity

    def client(self) -> httpx2.Client:
        """Knows the cluster's authority alone, and no proxy."""
        return httpx2.Client(
            verify=self._identity().client_context(),
            headers={"accept-encoding": "identity"},
            trust_env=False,
            timeout=TIMEOUT,
        )

    def find(self, client: httpx2.Client, extensions: Mapping[str, Any], source: PeerSource) -> Remote:
        """The model there. Raises NotFound, NotReady when it does not know its sums, Unavailable, DataLoss."""
        base = f"https://{source.address}/api/v1/models/{source.model}"
        metadata, blocks = pb.ModelMetadata(), pb.ModelBlocks()
        for name, answer in (("metadata", metadata), ("blocks", blocks)):
            document = _ask(client, extensions, f"{base}/{name}", source)
            _understand(document, answer, source)
        if not 0 < len(blocks.files) <= MAX_FILES:
            raise DataLoss(f"the data worker at {source.address} gives {source.model} {len(blocks.files)} files")
        files = [_file(source, number, f"{base}/content", blocks) for number in range(len(blocks.files))]
        about = metadata.info
        return Remote(source.uri, source.model, about.quantization, tuple(files), about.problem)


def _ask(client: httpx2.Client, extensions: Mapping[str, Any], url: str, source: PeerSource) -> Any:
    peer = f"the data worker at {source.address}"
    try:
        return get_json(client, url, peer, extensions)
    except NotFound:
        raise NotFound(f"{peer} has no model {source.model!r}") from None


def _understand(document: Any, answer: Message, source: PeerSource) -> None:
    try:
        json_format.ParseDict(document, answer, ignore_unknown_fields=True)
    except (json_format.ParseError, TypeError, ValueError, AttributeError) as error:
        raise DataLoss(f"the data worker at {source.address} answers what makes no sense: {str(error)[:200]}") from None


def _file(source: PeerSource, number: int, content: str, blocks: pb.ModelBlocks) -> RemoteFile:
    file = blocks.files[number]
    name = f"file {number} of {source.model}"
    sums = FileSums(file.sha256.hex(), tuple(block.hex() for block in file.block_sha256))
    if not 0 < file.size_bytes <= MAX_FILE_BYTES:
        raise DataLoss(f"the data worker at {source.address} gives {name} the size {file.size_bytes}")
    if blocks.block_bytes != BLOCK_BYTES:  # another version's: the sum of the file is enough
        sums = FileSums(sums.sha256)
    elif len(sums.blocks) != blocks_of(file.size_bytes):
        raise DataLoss(f"the data worker at {source.address} gives {name} {len(sums.blocks)} block sums")
    if {len(each) for each in (sums.sha256, *sums.blocks)} != {64}:
        raise DataLoss(f"the data worker at {source.address} gives {name} a SHA-256 that is none")
    return RemoteFile(name, f"{content}?file={number}", file.size_bytes, sums)
