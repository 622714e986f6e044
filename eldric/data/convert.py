"""A store's models as messages of the contract."""

import hashlib

from eldric.data.checksums import BLOCK_BYTES
from eldric.data.header import ModelHeader
from eldric.data.model import StoredFile, StoredModel
from eldric.data.puller import Resolved
from eldric.errors import NotReady
from eldric.v1 import model_store_pb2 as pb
from eldric.v1 import stage_pb2


def model_info(model: StoredModel) -> pb.ModelInfo:
    """What a list shows. Of a damaged model little is known."""
    info = pb.ModelInfo(id=model.id, size_bytes=model.size_bytes, format="gguf", problem=model.problem)
    if header := model.header:
        info.layers = header.layers
        info.architecture = header.architecture
        info.quantization = header.quantization
        info.parameters = header.parameters
        info.context = header.context
    return info


def model_metadata(model: StoredModel) -> pb.ModelMetadata:
    """All of the header but the tensors. Raises DataLoss for a damaged model."""
    header = model.sound_header
    sums = [file.sha256 for file in model.files]
    return pb.ModelMetadata(
        info=model_info(model),
        hidden_size=header.hidden_size,
        heads=header.heads,
        kv_heads=header.kv_heads,
        vocab_size=header.vocab_size,
        tensor_count=len(header.tensors),
        source=_source(model, header),
        header=header.entries,
        sha256=sums if all(sums) else (),
        costs=_costs(header),
        origin=model.origin,
    )


def model_blocks(model: StoredModel) -> pb.ModelBlocks:
    """Sums of all blocks. Raises DataLoss for a damaged model, NotReady when the sums are not known yet."""
    _ = model.sound_header
    if any(file.size_bytes and not file.sums.blocks for file in model.files):
        raise NotReady(
            f"the block sums of {model.id} are not known yet: `eldric-cli models verify {model.id}` finds them"
        )
    return pb.ModelBlocks(
        block_bytes=BLOCK_BYTES,
        files=[
            pb.FileBlocks(
                size_bytes=file.size_bytes,
                sha256=bytes.fromhex(file.sha256),
                block_sha256=[bytes.fromhex(block) for block in file.sums.blocks],
            )
            for file in model.files
        ],
    )


def resolved_source(resolved: Resolved) -> pb.ResolvedSource:
    return pb.ResolvedSource(
        source=resolved.uri,
        id=resolved.model,
        quantization=resolved.quantization,
        files=[pb.SourceFile(name=name, size_bytes=size) for name, size in resolved.files],
        kept_bytes=resolved.kept_bytes,
        problem=resolved.problem,
    )


def model_tensors(model: StoredModel) -> pb.ModelTensors:
    """All tensors, in the order of the files. Raises DataLoss for a damaged model."""
    tensors = sorted(model.sound_header.tensors.values(), key=lambda tensor: (tensor.file, tensor.offset))
    return pb.ModelTensors(
        tensors=[
            pb.TensorEntry(
                name=tensor.name,
                type=tensor.type.name,
                shape=tensor.shape,
                file=tensor.file,
                offset=tensor.offset,
                size_bytes=tensor.nbytes,
            )
            for tensor in tensors
        ]
    )


def _source(model: StoredModel, header: ModelHeader) -> stage_pb2.ModelSource:
    return stage_pb2.ModelSource(
        model=model.id,
        files=[_source_file(file, size) for file, size in zip(model.files, _header_sizes(header), strict=True)],
        header_sha256=bytes.fromhex(header.sha256),
        folder=str(model.folder),
    )


def _source_file(file: StoredFile, header_bytes: int) -> stage_pb2.ModelFile:
    blocks = bytes.fromhex("".join(file.sums.blocks))
    return stage_pb2.ModelFile(
        path=file.path.as_posix(),
        size_bytes=file.size_bytes,
        header_bytes=header_bytes,
        sha256=bytes.fromhex(file.sha256),
        blocks_sha256=hashlib.sha256(blocks).digest() if blocks else b"",
    )


def _header_sizes(header: ModelHeader) -> list[int]:
    """Of the first file what its header's sum is over, of the others the bytes before their first tensor."""
    model = header.model
    sizes = list(model.file_sizes)
    for tensor in model.tensors.values():
        sizes[tensor.file] = min(sizes[tensor.file], tensor.offset)
    return [model.header_bytes, *sizes[1:]]


def _costs(header: ModelHeader) -> pb.ModelCosts | None:
    costs = header.costs
    if costs is None:
        return None
    return pb.ModelCosts(
        layer_bytes=costs.layer_bytes,
        head_bytes=costs.head_bytes,
        tail_bytes=costs.tail_bytes,
        shared_bytes=costs.shared_bytes,
        every_bytes=costs.every_bytes,
        kv_bytes_per_cell_per_layer=costs.kv_bytes_per_cell_per_layer,
        row_bytes=costs.row_bytes,
        logits_row_bytes=costs.logits_row_bytes,
    )
