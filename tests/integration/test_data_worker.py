"""A data worker's service over real sockets: gRPC and REST, both with mutual TLS."""

import asyncio
import base64
import contextlib
import hashlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from eldric.channels import call_errors, channel
from eldric.engine.gguf import ModelFile
from eldric.engine.shard import LayerRange, shard_of
from eldric.engine.spec import spec_of
from eldric.errors import AlreadyExists, DataLoss, EldricError, InvalidRequest, NotFound, NotReady, PermissionDenied
from eldric.v1 import model_store_pb2 as pb
from eldric.v1.common_pb2 import LayerRange as Layers
from tests.models import SmallLlama, storyteller, write_small_llama
from tests.stores import Served, as_unknown_architecture, damage, serving, store_calls, until

CHUNK_BYTES = 1 << 20


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as made:
        yield made


async def test_an_import_streams_progress_and_ends_with_the_model(served: Served) -> None:
    events = await served.add(storyteller(), "tale")
    size = storyteller().stat().st_size
    assert {event.phase for event in events} <= {"hashing", "copying"}
    assert (events[-1].done_bytes, events[-1].total_bytes) == (size, size)
    model = events[-1].model
    assert (model.id, model.layers, model.size_bytes, model.format) == ("tale", 6, size, "gguf")
    assert (model.architecture, model.quantization, model.problem) == ("llama", "Q8_0", "")
    assert list((await served.calls.List(pb.ListModelsRequest())).models) == [model]


async def test_metadata_says_what_planning_and_loading_need(served: Served) -> None:
    await served.add(storyteller(), "tale")
    metadata = await served.calls.Metadata(pb.ModelRequest(id="tale"))
    assert (metadata.hidden_size, metadata.heads, metadata.kv_heads, metadata.vocab_size) == (256, 8, 4, 839)
    assert list(metadata.sha256) == [hashlib.sha256(storyteller().read_bytes()).hexdigest()]
    assert metadata.header["general.architecture"] == "llama"
    with ModelFile.open(storyteller()) as file:
        assert metadata.source.header_sha256.hex() == file.header_sha256()
        whole = shard_of(file, spec_of(file), LayerRange(0, 6)).nbytes
        assert metadata.tensor_count == len(file.tensors)
    costs = metadata.costs
    weights = sum(costs.layer_bytes) + costs.head_bytes + costs.tail_bytes + costs.every_bytes
    assert weights - costs.shared_bytes == whole
    (source,) = metadata.source.files
    path = Path(metadata.source.folder) / source.path
    assert path.read_bytes() == storyteller().read_bytes()
    assert source.size_bytes == path.stat().st_size


async def test_tensors_lie_where_the_list_says(served: Served) -> None:
    await served.add(storyteller(), "tale")
    tensors = (await served.calls.Tensors(pb.ModelRequest(id="tale"))).tensors
    with ModelFile.open(storyteller()) as file:
        assert len(tensors) == len(file.tensors)
        for tensor in tensors:
            info = file.tensors[tensor.name]
            assert (tensor.type, tuple(tensor.shape)) == (info.type.name, info.shape)
            assert (tensor.file, tensor.offset, tensor.size_bytes) == (info.file, info.offset, info.nbytes)


@pytest.mark.parametrize("layers", [(0, 6), (0, 1), (2, 4), (5, 6)])
async def test_a_pull_of_layers_gives_their_bytes_and_no_others(served: Served, layers: tuple[int, int]) -> None:
    await served.add(storyteller(), "tale")
    chunks = await served.pull(pb.PullRequest(id="tale", layers=Layers(start=layers[0], end=layers[1])))
    data = storyteller().read_bytes()
    with ModelFile.open(storyteller()) as file:
        shard = shard_of(file, spec_of(file), LayerRange(*layers))
    pulled = set()
    for chunk in chunks:
        assert 0 < len(chunk.data) <= CHUNK_BYTES
        assert chunk.data == data[chunk.offset : chunk.offset + len(chunk.data)]
        pulled.add((chunk.offset, len(chunk.data)))
    assert sum(length for _, length in pulled) == shard.nbytes
    assert [chunk.total_bytes for chunk in chunks] == [shard.nbytes] + [0] * (len(chunks) - 1)
    wanted = bytearray(len(data))
    for info in shard.tensors.values():
        wanted[info.offset : info.offset + info.nbytes] = b"\1" * info.nbytes
    assert all(wanted[offset] and wanted[offset + length - 1] for offset, length in pulled)
    assert sum(wanted) == shard.nbytes


async def test_a_pull_of_the_header_is_enough_to_read_it(served: Served) -> None:
    await served.add(storyteller(), "tale")
    header = b"".join(chunk.data for chunk in await served.pull(pb.PullRequest(id="tale", header=True)))
    with ModelFile.open(storyteller()) as file:
        assert len(header) == file.header_bytes
        assert ModelFile.from_header(header, "tale", file.size_bytes).tensors == file.tensors


async def test_a_pull_of_all_gives_every_file_of_a_split_set(served: Served, tmp_path: Path) -> None:
    first = write_small_llama(tmp_path / "parts.gguf", SmallLlama(), split_tensors=8)
    parts = sorted(tmp_path.glob("parts-*"))
    await served.add(first)
    pulled: dict[int, bytes] = {}
    for chunk in await served.pull(pb.PullRequest(id="parts")):
        assert chunk.offset == len(pulled.setdefault(chunk.file, b""))
        pulled[chunk.file] += chunk.data
    assert list(pulled.values()) == [part.read_bytes() for part in parts]


async def test_a_pull_that_makes_no_sense_is_refused(served: Served, tmp_path: Path) -> None:
    await served.add(storyteller(), "tale")
    for start, end in ((0, 7), (6, 7), (3, 3), (4, 2)):
        with pytest.raises(InvalidRequest, match=r"layer"):
            await served.pull(pb.PullRequest(id="tale", layers=Layers(start=start, end=end)))
    with pytest.raises(InvalidRequest, match="exclude each other"):
        await served.pull(pb.PullRequest(id="tale", header=True, layers=Layers(start=0, end=1)))
    with pytest.raises(NotFound, match="'nothing'"):
        await served.pull(pb.PullRequest(id="nothing"))
    await served.add(as_unknown_architecture(tmp_path / "odd.gguf", storyteller()))
    with pytest.raises(InvalidRequest, match="mamba"):
        await served.pull(pb.PullRequest(id="odd", layers=Layers(start=0, end=1)))


async def test_a_pull_of_a_model_that_is_removed_meanwhile_goes_on_to_its_end(served: Served) -> None:
    await served.add(storyteller(), "tale", "copy")
    call = served.calls.Pull(pb.PullRequest(id="tale"))
    data = (await anext(aiter(call))).data
    await served.calls.Remove(pb.RemoveModelRequest(id="tale", force=True))
    async for chunk in call:
        data += chunk.data
    assert data == storyteller().read_bytes()
    assert not (await served.calls.List(pb.ListModelsRequest())).models


async def test_a_pull_of_a_file_that_shrinks_is_data_loss(served: Served) -> None:
    path = served.folder / "big.gguf"
    write_small_llama(path, SmallLlama())
    os.truncate(path, 1 << 29)
    call = served.calls.Pull(pb.PullRequest(id="big"))
    with pytest.raises(DataLoss, match=r"big\.gguf ends at byte"), call_errors():
        await anext(aiter(call))
        os.truncate(path, 1 << 20)
        async for _ in call:
            pass


async def test_verify_streams_progress_and_names_a_damaged_file(served: Served) -> None:
    await served.add(storyteller(), "tale")
    events = [event async for event in served.calls.Verify(pb.ModelRequest(id="tale"))]
    assert events[-1].sound
    assert events[-1].done_bytes == events[-1].total_bytes == storyteller().stat().st_size
    assert not any(event.sound for event in events[:-1])
    damage(served.folder / "tale" / "tale.gguf")
    with pytest.raises(DataLoss, match=r"tale/tale\.gguf has the SHA-256"), call_errors():
        _ = [event async for event in served.calls.Verify(pb.ModelRequest(id="tale"))]


async def test_block_sums_are_kept_at_import_and_served(served: Served) -> None:
    await served.add(storyteller(), "tale")
    blocks = await served.calls.Blocks(pb.ModelRequest(id="tale"))
    data = storyteller().read_bytes()
    sums = [hashlib.sha256(data[begin : begin + (1 << 20)]).digest() for begin in range(0, len(data), 1 << 20)]
    assert blocks.block_bytes == 1 << 20
    whole = hashlib.sha256(data).digest()
    assert blocks.files == [pb.FileBlocks(size_bytes=len(data), sha256=whole, block_sha256=sums)]
    answer = (await served.http.get("/api/v1/models/tale/blocks")).json()
    assert [base64.b64decode(each) for each in answer["files"][0]["block_sha256"]] == sums


async def test_block_sums_of_a_file_dropped_by_hand_are_there_after_its_first_check(served: Served) -> None:
    (served.folder / "tale.gguf").write_bytes(storyteller().read_bytes())
    with pytest.raises(NotReady, match="models verify tale"), call_errors():
        await served.calls.Blocks(pb.ModelRequest(id="tale"))
    _ = [event async for event in served.calls.Verify(pb.ModelRequest(id="tale"))]
    (file,) = (await served.calls.Blocks(pb.ModelRequest(id="tale"))).files
    assert file.sha256 == hashlib.sha256(storyteller().read_bytes()).digest()
    assert file.block_sha256[0] == hashlib.sha256(storyteller().read_bytes()[: 1 << 20]).digest()


async def test_errors_keep_their_kind_over_grpc(served: Served, tmp_path: Path) -> None:
    await served.add(storyteller(), "tale")
    (tmp_path / "text.gguf").write_text("not a model at all")
    refused: list[tuple[Path, str, type[EldricError], str]] = [
        (storyteller(), "tale", AlreadyExists, "'tale'"),
        (storyteller(), "../tale", InvalidRequest, "no name for a model"),
        (tmp_path / "nothing.gguf", "", NotFound, "no file"),
        (tmp_path / "text.gguf", "", InvalidRequest, "not a GGUF file"),
    ]
    for path, model, kind, words in refused:
        with pytest.raises(kind, match=words):
            await served.add(path, model)
    with pytest.raises(NotFound), call_errors():
        await served.calls.Metadata(pb.ModelRequest(id="nothing"))
    with pytest.raises(InvalidRequest), call_errors():
        await served.calls.Remove(pb.RemoveModelRequest(id=".."))


async def test_only_operators_change_the_store(served: Served) -> None:
    await served.add(storyteller(), "tale")
    worker = served.authority.issue_identity("worker", "w1")
    async with channel(served.worker.node.grpc_address, worker, "data") as connection:
        calls = store_calls(connection)
        with call_errors():
            assert len((await calls.List(pb.ListModelsRequest())).models) == 1
        with pytest.raises(PermissionDenied), call_errors():
            await calls.Remove(pb.RemoveModelRequest(id="tale"))
        with pytest.raises(PermissionDenied), call_errors():
            _ = [event async for event in calls.Import(pb.ImportRequest(path=str(storyteller())))]
    async with served.client(worker.client_context()) as http:
        assert (await http.get("/api/v1/models/tale/content")).status_code == 200
        assert (await http.delete("/api/v1/models/tale")).status_code == 403


async def test_the_same_over_rest(served: Served) -> None:
    body = {"path": str(storyteller()), "id": "tale"}
    answer = await served.http.post("/api/v1/models/import", json=body)
    events = [json.loads(line[5:]) for line in answer.text.splitlines() if line.startswith("data:")]
    assert events[-1]["model"]["id"] == "tale"
    registry = (await served.http.get("/api/v1/models/registry")).json()["models"]
    assert [(model["id"], model["layers"], model["format"]) for model in registry] == [("tale", 6, "gguf")]
    metadata = (await served.http.get("/api/v1/models/tale/metadata")).json()
    assert metadata["hidden_size"] == 256
    tensors = (await served.http.get("/api/v1/models/tale/tensors")).json()["tensors"]
    assert len(tensors) == metadata["tensor_count"]
    pull = await served.http.post(
        "/api/v1/models/tale/pull",
        json={"layers": {"start": 2, "end": 3}},
        headers={"accept": "application/json"},
    )
    data = storyteller().read_bytes()
    for chunk in pull.json():
        piece = base64.b64decode(chunk["data"])
        offset = int(chunk["offset"])
        assert piece == data[offset : offset + len(piece)]
    assert sum(len(base64.b64decode(chunk["data"])) for chunk in pull.json()) == int(pull.json()[0]["total_bytes"])
    verify = await served.http.post("/api/v1/models/tale/verify", json={}, headers={"accept": "application/json"})
    assert verify.json()[-1]["sound"] is True
    assert (await served.http.delete("/api/v1/models/tale?force=true")).status_code == 200
    missing = await served.http.get("/api/v1/models/tale/metadata")
    assert (missing.status_code, missing.json()["error"]["status"]) == (404, "NOT_FOUND")


async def test_metrics_and_health_follow_the_store(served: Served) -> None:
    await served.add(storyteller(), "tale")
    with contextlib.suppress(EldricError):
        await served.add(storyteller(), "tale")
    await served.http.get("/api/v1/models/tale/content", headers={"range": "bytes=0-99"})
    await served.pull(pb.PullRequest(id="tale", header=True))
    _ = [event async for event in served.calls.Verify(pb.ModelRequest(id="tale"))]
    damage(served.folder / "tale" / "tale.gguf")
    with contextlib.suppress(EldricError), call_errors():
        _ = [event async for event in served.calls.Verify(pb.ModelRequest(id="tale"))]
    lines = (await served.http.get("/metrics")).text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if line.startswith("eldric_data"))
    with ModelFile.open(storyteller()) as file:
        header_bytes = file.header_bytes
    assert float(values['eldric_data_served_bytes_total{call="content"}']) == 100
    assert float(values['eldric_data_served_bytes_total{call="pull"}']) == header_bytes
    assert float(values['eldric_data_imports_total{outcome="ok"}']) == 1
    assert float(values['eldric_data_imports_total{outcome="failed"}']) == 1
    assert float(values['eldric_data_verifications_total{outcome="sound"}']) == 1
    assert float(values['eldric_data_verifications_total{outcome="damaged"}']) == 1
    assert float(values["eldric_data_models"]) == 1
    assert float(values["eldric_data_stored_bytes"]) == storyteller().stat().st_size
    health = (await served.http.get("/health")).json()
    assert health["ready"] is True and health["models"] == 1


async def test_the_loop_is_free_while_a_large_file_is_imported(served: Served, tmp_path: Path) -> None:
    path = write_small_llama(tmp_path / "big.gguf", SmallLlama())
    os.truncate(path, 1 << 28)
    call = served.calls.Import(pb.ImportRequest(path=str(path)))
    answers = 0

    async def answer() -> None:
        nonlocal answers
        while True:
            await served.calls.List(pb.ListModelsRequest())
            answers += 1

    asking = asyncio.create_task(answer())
    assert [event async for event in call][-1].model.id == "big"
    asking.cancel()
    assert answers > 10


async def test_a_cancelled_import_leaves_nothing(served: Served, tmp_path: Path) -> None:
    path = write_small_llama(tmp_path / "big.gguf", SmallLlama())
    os.truncate(path, 1 << 34)
    call = served.calls.Import(pb.ImportRequest(path=str(path), mode="move"))
    await anext(aiter(call))
    call.cancel()
    incoming = served.folder / ".eldric" / "incoming"
    await until(lambda: not list(incoming.iterdir()))
    assert path.exists()
    await served.add(storyteller(), "big")
