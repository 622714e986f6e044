"""A model's vocabulary: made once, shared, kept within a limit, and only of the file that was deployed."""

import asyncio
import shutil
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from eldric.engine.gguf import ModelFile
from eldric.errors import Unavailable
from eldric.node import Node
from eldric.router import vocabularies as vocabularies_module
from eldric.router.vocabularies import Vocabularies
from eldric.v1 import stage_pb2
from tests.models import SmallLlama, storyteller, write_small_llama

#: A node whose cluster cannot be reached.
ALONE = cast(Node, SimpleNamespace(controllers=()))


@pytest.fixture
def executor() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as made:
        yield made


@pytest.fixture
def store(tmp_path: Path) -> Path:
    shutil.copy(storyteller(), tmp_path / "a.gguf")
    write_small_llama(tmp_path / "b.gguf", SmallLlama())
    (tmp_path / "c.gguf").write_bytes(storyteller().read_bytes().replace(b"gpt2", b"gpt9", 1))
    return tmp_path


def source(store: Path, name: str, **fields: Any) -> stage_pb2.ModelSource:
    with ModelFile.open(store / name) as model:
        digest = bytes.fromhex(model.header_sha256())
    file = stage_pb2.ModelFile(path=name, size_bytes=(store / name).stat().st_size)
    return stage_pb2.ModelSource(
        **({"model": name, "files": [file], "header_sha256": digest, "folder": str(store)} | fields)
    )


async def test_a_visible_file_is_read_where_it_lies(store: Path, executor: Executor) -> None:
    vocabulary = await Vocabularies(ALONE, None, executor, 4).get(source(store, "a.gguf"))
    assert vocabulary.tokenizer.vocab_size == 839
    assert vocabulary.stop_tokens == (4,)
    assert vocabulary.longest_token_bytes == 13
    assert "<|user|>" in vocabulary.template.render([{"role": "user", "content": "Hi"}])
    assert vocabulary.token_bytes(839) == b""


async def test_a_mount_goes_before_the_stores_own_folder(store: Path, executor: Executor) -> None:
    elsewhere = source(store, "a.gguf", folder="/nowhere")
    assert (await Vocabularies(ALONE, store, executor, 4).get(elsewhere)).tokenizer.vocab_size == 839
    with pytest.raises(Unavailable, match="no controller"):
        await Vocabularies(ALONE, None, executor, 4).get(elsewhere)


async def test_requests_at_once_share_the_work(store: Path, executor: Executor) -> None:
    vocabularies = Vocabularies(ALONE, None, executor, 4)
    made = await asyncio.gather(*(vocabularies.get(source(store, "a.gguf")) for _ in range(3)))
    assert made[0] is made[1] is made[2]
    assert await vocabularies.get(source(store, "a.gguf")) is made[0]


async def test_the_least_used_is_dropped_beyond_the_limit(store: Path, executor: Executor) -> None:
    vocabularies = Vocabularies(ALONE, None, executor, 1)
    first = await vocabularies.get(source(store, "a.gguf"))
    await vocabularies.get(source(store, "b.gguf"))
    assert await vocabularies.get(source(store, "a.gguf")) is not first


async def test_another_file_of_that_name_is_not_used(store: Path, executor: Executor) -> None:
    with pytest.raises(Unavailable):
        await Vocabularies(ALONE, None, executor, 4).get(source(store, "a.gguf", header_sha256=b"\0" * 32))


async def test_a_file_on_a_mount_that_may_hang_is_left_alone(
    store: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabularies_module, "remote_mount", lambda folder: object() if folder == store else None)
    with pytest.raises(Unavailable, match="controller"):  # it would pull the header
        await Vocabularies(ALONE, None, executor, 4).get(source(store, "a.gguf"))


@pytest.mark.parametrize("path", ["../a.gguf", "/etc/passwd", "", "b.gguf/x", "none.gguf"])
async def test_a_path_outside_the_store_is_not_opened(store: Path, executor: Executor, path: str) -> None:
    inside = store / "folder"
    inside.mkdir()
    strange = source(store, "a.gguf", folder=str(inside), files=[stage_pb2.ModelFile(path=path, size_bytes=1)])
    with pytest.raises(Unavailable):
        await Vocabularies(ALONE, None, executor, 4).get(strange)


async def test_a_failure_is_not_kept(store: Path, executor: Executor) -> None:
    vocabularies = Vocabularies(ALONE, store, executor, 4)
    wanted = source(store, "a.gguf")
    (store / "a.gguf").rename(store / "away")
    with pytest.raises(Unavailable):
        await vocabularies.get(wanted)
    (store / "away").rename(store / "a.gguf")
    assert (await vocabularies.get(wanted)).tokenizer.vocab_size == 839


async def test_a_tokenizer_that_is_not_known_is_said_to_be(store: Path, executor: Executor) -> None:
    with pytest.raises(Exception, match="gpt9") as caught:
        await Vocabularies(ALONE, None, executor, 4).get(source(store, "c.gguf"))
    assert caught.value.status == "INVALID_ARGUMENT"  # type: ignore[attr-defined]


async def test_a_caller_that_gives_up_leaves_the_work_to_others(store: Path, executor: Executor) -> None:
    vocabularies = Vocabularies(ALONE, None, executor, 4)
    first = asyncio.ensure_future(vocabularies.get(source(store, "a.gguf")))
    second = asyncio.ensure_future(vocabularies.get(source(store, "a.gguf")))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).tokenizer.vocab_size == 839


async def test_prefetching_is_tried_once(store: Path, executor: Executor) -> None:
    vocabularies = Vocabularies(ALONE, None, executor, 1)
    vocabularies.prefetch(stage_pb2.ModelSource(model="nothing known"))
    for name in ("a.gguf", "b.gguf", "a.gguf"):
        vocabularies.prefetch(source(store, name))
    assert [task.get_name() for task in asyncio.all_tasks() if "vocabulary" in task.get_name()] != []
    b = await vocabularies.get(source(store, "b.gguf"))
    vocabularies.prefetch(source(store, "a.gguf"))
    assert await vocabularies.get(source(store, "b.gguf")) is b
    await vocabularies.close()
