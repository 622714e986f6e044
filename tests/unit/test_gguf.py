"""Reading model files: against the reference reader, in split sets, damaged, hostile, and fast."""

import hashlib
import os
import shutil
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eldric.engine.errors import EngineError, InvalidModel
from eldric.engine.gguf import ModelFile
from eldric.engine.gguf_strings import BrokenString, skip_strings
from eldric.engine.spec import spec_of
from eldric.engine.tensor_types import TensorType
from tests.models import SmallLlama, smollm2, storyteller, write_small_llama

UINT8, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 0, 4, 5, 6, 7, 8, 9, 10


# A header by hand, field by field.


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(key: str, kind: int, count: int, elements: bytes) -> bytes:
    return pair(key, ARRAY, struct.pack("<IQ", kind, count) + elements)


def tensor(name: str | bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}qIQ", len(shape), *shape, kind, offset)


def header(pairs: list[bytes], tensors: list[bytes], *, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs + tensors)


def parsed(data: bytes, data_bytes: int = 4096) -> ModelFile:
    """A model file of this header and data_bytes bytes of tensor data."""
    return ModelFile.from_header(data + bytes(data_bytes), "made.gguf", len(data) + data_bytes)


@pytest.mark.parametrize("path", [storyteller, smollm2], ids=["storyteller", "smollm2"])
def test_tensor_infos_and_metadata_equal_the_reference_readers(path: Callable[[], Path]) -> None:
    reader = gguf.GGUFReader(path())
    with ModelFile.open(path()) as model:
        assert list(model.tensors) == [tensor.name for tensor in reader.tensors]
        for expected in reader.tensors:
            info = model.tensors[expected.name]
            assert info.shape == tuple(int(size) for size in expected.shape)
            assert (int(info.type), info.file) == (int(expected.tensor_type), 0)
            assert (info.offset, info.nbytes) == (expected.data_offset, expected.n_bytes)
        assert model.header_bytes == reader.data_offset
        assert model.size_bytes == path().stat().st_size
        fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        assert list(model.metadata) == list(fields)
        for key, field in fields.items():
            value = model.metadata[key]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents(), key


def test_block_sizes_equal_the_reference_packages() -> None:
    for kind, sizes in gguf.GGML_QUANT_SIZES.items():
        if kind.name != "Q8_1":  # there the package differs from ggml; it is never in a file
            mine = TensorType(kind)
            assert (mine.name, mine.block_size, mine.type_bytes) == (kind.name, *sizes)
    assert TensorType.Q4_K.row_bytes(512) == 288


def test_header_bytes_alone_give_the_same_model() -> None:
    data = storyteller().read_bytes()
    with ModelFile.open(storyteller()) as whole:
        head = data[: whole.header_bytes]
        model = ModelFile.from_header(head, "storyteller", len(data))
        assert model.tensors == whole.tensors
        assert (
            model.metadata.get_strings("tokenizer.ggml.tokens")[:2]
            == whole.metadata.get_strings("tokenizer.ggml.tokens")[:2]
        )
        assert model.header_sha256() == whole.header_sha256() == hashlib.sha256(head).hexdigest()
        assert (model.header_bytes, model.size_bytes) == (whole.header_bytes, whole.size_bytes)


def test_metadata_is_decoded_by_type() -> None:
    pairs = [
        pair("int", INT32, struct.pack("<i", -7)),
        pair("long", UINT64, struct.pack("<Q", 1 << 63)),
        pair("float", FLOAT32, struct.pack("<f", 0.5)),
        pair("yes", BOOL, b"\1"),
        pair("odd", BOOL, b"\2"),
        pair("text", STRING, text("Grüße")),
        pair("bad", STRING, text(b"ab\xff")),
        array("numbers", INT32, 3, struct.pack("<3i", 1, -2, 3)),
        array("truths", BOOL, 2, b"\1\0"),
        array("odd truths", BOOL, 2, b"\1\7"),
        array("words", STRING, 3, text("a") + text("") + text("ß")),
        array("bad words", STRING, 2, text("a") + text(b"\xc3")),
        array("none", STRING, 0, b""),
    ]
    metadata = parsed(header(pairs, [])).metadata
    assert metadata.get_int("int") == -7 and metadata.get_int("long") == 1 << 63
    assert metadata.get_float("float") == 0.5 and metadata.get_bool("yes") is True
    assert metadata.get_str("text") == metadata["text"] == "Grüße"
    assert metadata.get_array("numbers").tolist() == [1, -2, 3]
    assert metadata.get_array("numbers").dtype == np.int32
    assert metadata.get_array("truths").tolist() == [True, False]
    assert metadata.get_strings("words") == metadata["words"] == ["a", "", "ß"]
    assert metadata.get_strings("none") == [] and metadata.array_length("words") == 3
    assert metadata.get_int("absent", None) is None and metadata.get_str("absent", "x") == "x"
    assert "absent" not in metadata and len(metadata) == len(pairs)
    for read, key in (
        (metadata.get_int, "float"),
        (metadata.get_int, "yes"),
        (metadata.get_float, "int"),
        (metadata.get_str, "words"),
        (metadata.get_bool, "int"),
        (metadata.get_bool, "odd"),
        (metadata.get_str, "bad"),
        (metadata.get_array, "words"),
        (metadata.get_array, "odd truths"),
        (metadata.get_strings, "numbers"),
        (metadata.get_strings, "bad words"),
        (metadata.array_length, "int"),
        (metadata.get_int, "absent"),
    ):
        with pytest.raises(InvalidModel, match=key):
            read(key)


def test_old_version_is_read_and_alignment_obeyed() -> None:
    alignment = pair("general.alignment", UINT32, struct.pack("<I", 128))
    data = header([alignment], [tensor("a", (8,)), tensor("b", (2, 3, 4, 5), offset=128)], version=2)
    model = parsed(data)
    start = -(-len(data) // 128) * 128
    assert model.header_bytes == start
    assert model.tensors["a"].offset == start and model.tensors["b"].offset == start + 128
    assert model.tensors["b"].nbytes == 480


def test_tensors_may_overlap_inside_the_file() -> None:
    model = parsed(header([], [tensor("a", (8,)), tensor("b", (8,))]))
    assert model.tensors["a"].offset == model.tensors["b"].offset


HUGE = 1 << 60
ALIGNMENT = "general.alignment"
HOSTILE: dict[str, tuple[bytes, str, int]] = {
    "magic": (b"PK\3\4" + bytes(60), "not a GGUF file", 0),
    "version 1": (header([], [], version=1), "version 1", 4),
    "version 4": (header([], [], version=4), "version 4", 4),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian", 4),
    "tensor count": (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0), f"{HUGE} tensors", 8),
    "tensor count beyond the file": (b"GGUF" + struct.pack("<IQQ", 3, 60000, 0) + bytes(99), "60000", 8),
    "key count": (b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE), f"{HUGE} keys", 16),
    "key length": (header([struct.pack("<Q", HUGE) + bytes(20)], []), "key 0 is", 24),
    "key length beyond the file": (header([struct.pack("<Q", 60) + bytes(20)], []), "key 0", 32),
    "empty key": (header([pair("", UINT8, b"\0\0")], []), "key 0 is 0 bytes long", 24),
    "key not UTF-8": (header([pair(b"a\xffb", UINT8, b"\0")], []), "key 0 is not UTF-8", 33),
    "key twice": (header([pair("a", UINT8, b"\0")] * 2, []), "key a is there twice", 38),
    "value type": (header([pair("a", 13, b"\0")], []), "names no type", 33),
    "string length": (header([pair("a", STRING, struct.pack("<Q", 2**64 - 1))], []), "inside a", 37),
    "array length": (header([array("a", UINT8, 2**64 - 1, b"")], []), "array of 18446744073709551615", 41),
    "string array length": (header([array("a", STRING, 1 << 61, b"")], []), "array of", 41),
    "string in an array": (header([array("a", STRING, 1, struct.pack("<Q", 9))], []), "string of a", 49),
    "element type": (header([array("a", 99, 1, b"\0")], []), "names no type", 37),
    "nested array": (header([array("a", ARRAY, 1, bytes(40))], []), "array of arrays", 37),
    "alignment 0": (header([pair(ALIGNMENT, UINT32, bytes(4))], []), "power of two", 53),
    "alignment 24": (header([pair(ALIGNMENT, UINT32, struct.pack("<I", 24))], []), "power of two", 53),
    "alignment 4": (header([pair(ALIGNMENT, UINT32, struct.pack("<I", 4))], []), "power of two", 53),
    "alignment's type": (header([pair(ALIGNMENT, UINT64, bytes(8))], []), "32-bit", 53),
    "huge alignment": (
        header([pair(ALIGNMENT, UINT32, struct.pack("<I", 1 << 31))], [tensor("a", (8,))]),
        "but the file has",
        57,
    ),
    "empty name": (header([], [tensor("", (8,)) + b"\0"]), "name of tensor 0", 24),
    "name too long for ggml": (header([], [tensor("n" * 64, (8,))]), "64 bytes long", 24),
    "name with a zero": (header([], [tensor("a\0b", (8,))]), "printable", 32),
    "name not UTF-8": (header([], [tensor(b"\xff", (8,))]), "not UTF-8", 32),
    "tensor twice": (header([], [tensor("a", (8,))] * 2), "tensor a is there twice", 57),
    "no dimensions": (header([], [tensor("a", ()) + bytes(8)]), "0 dimensions", 33),
    "five dimensions": (header([], [tensor("a", (1,) * 5)]), "5 dimensions", 33),
    "zero dimension": (header([], [tensor("a", (8, 0))]), r"shape \[8, 0\]", 37),
    "negative dimension": (header([], [tensor("a", (-8, 8))]), r"shape \[-8, 8\]", 37),
    "dimensions that overflow": (header([], [tensor("a", (1 << 62,) * 4)]), "but the file has", 24),
    "overflow to a small product": (header([], [tensor("a", (1 << 32, 1 << 32))]), "but the file has", 24),
    "part of a block": (header([], [tensor("a", (33,), kind=8)]), "not a multiple", 37),
    "removed type": (header([], [tensor("a", (32,), kind=31)]), "tensor a is of unknown type 31", 45),
    "type of the future": (header([], [tensor("a", (32,), kind=2**32 - 1)]), "unknown type", 45),
    "unaligned offset": (header([], [tensor("a", (8,), offset=16)]), "not aligned", 49),
    "offset outside": (header([], [tensor("a", (8,), offset=1 << 40)]), "but the file has", 24),
    "offset that wraps": (header([], [tensor("a", (8,), offset=2**64 - 32)]), "but the file has", 24),
    "extent outside": (header([], [tensor("a", (8, 4096))]), "but the file has", 24),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_header_is_refused_with_the_byte_and_without_memory(name: str) -> None:
    data, problem, offset = HOSTILE[name]
    tracemalloc.start()
    try:
        with pytest.raises(InvalidModel, match=problem) as caught:
            ModelFile.from_header(data, "hostile.gguf", max(len(data), 4096))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert caught.value.offset == offset
    assert str(caught.value).startswith("hostile.gguf: ")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    strings = ["", "a\0\0\0\0\0\0\0\0b", "c" * 300]
    data = write_small_llama(tmp_path / "small.gguf", SmallLlama(layers=1), metadata={"s": strings}).read_bytes()
    head = ModelFile.from_header(data, "small", len(data)).header_bytes
    for length in range(head):
        for size_bytes in (length, len(data)):
            with pytest.raises(InvalidModel):
                ModelFile.from_header(data[:length], "small", size_bytes)
    for size_bytes in range(head, len(data), 97):
        with pytest.raises(InvalidModel, match="but the file has"):
            ModelFile.from_header(data[:head], "small", size_bytes)


def read_everything(data: bytes, size_bytes: int) -> None:
    """Whatever the bytes are: sound infos, or an error of the engine's own."""
    try:
        model = ModelFile.from_header(data, "fuzzed", size_bytes)
    except InvalidModel as error:
        assert error.offset is not None and 0 <= error.offset <= len(data)
        return
    for info in model.tensors.values():
        assert info.nbytes > 0 and model.header_bytes <= info.offset
        assert info.offset + info.nbytes <= size_bytes
    for key in model.metadata:
        try:
            _ = model.metadata[key]
        except InvalidModel as error:
            assert key in str(error)
    try:
        spec_of(model)
    except EngineError as error:
        assert str(error)


FUZZ = settings(max_examples=400, deadline=None)


def sound_file() -> bytes:
    """The smallest file that is a Llama, so that most changed bytes change its structure."""
    counts = {
        "block_count": 1,
        "embedding_length": 4,
        "feed_forward_length": 4,
        "attention.head_count": 2,
        "context_length": 64,
    }
    pairs = [pair("general.architecture", STRING, text("llama"))]
    pairs += [pair(f"llama.{key}", UINT32, struct.pack("<I", value)) for key, value in counts.items()]
    pairs.append(pair("llama.attention.layer_norm_rms_epsilon", FLOAT32, struct.pack("<f", 1e-5)))
    pairs.append(array("tokenizer.ggml.tokens", STRING, 4, text("a") + text("") + text("bc") + text("d" * 300)))
    pairs.append(array("tokenizer.ggml.scores", FLOAT32, 4, bytes(16)))
    names = ["token_embd", *(f"blk.0.attn_{part}" for part in ("q", "k", "v", "output"))]
    names += [f"blk.0.ffn_{part}" for part in ("gate", "up", "down")]
    infos = [tensor(f"{name}.weight", (4, 4), offset=64 * at) for at, name in enumerate(names)]
    for at, name in enumerate(("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"), len(infos)):
        infos.append(tensor(f"{name}.weight", (4,), offset=64 * at))
    return header(pairs, infos) + bytes(1024)


SOUND = sound_file()
PLACES = st.integers(0, len(SOUND) - 1024)


def test_what_fuzzing_starts_from_is_sound() -> None:
    assert spec_of(ModelFile.from_header(SOUND, "sound", len(SOUND))).vocab_size == 4


@FUZZ
@given(edits=st.lists(st.tuples(PLACES, st.binary(min_size=1, max_size=9)), min_size=1, max_size=4))
def test_changed_bytes_do_no_harm(edits: list[tuple[int, bytes]]) -> None:
    data = bytearray(SOUND)
    for at, new in edits:
        data[at : at + len(new)] = new
    read_everything(bytes(data), len(SOUND))


@FUZZ
@given(at=PLACES, cut=st.integers(0, 64), put=st.binary(max_size=64))
def test_bytes_put_in_and_taken_out_do_no_harm(at: int, cut: int, put: bytes) -> None:
    data = SOUND[:at] + put + SOUND[at + cut :]
    read_everything(data, len(data))


@FUZZ
@given(counts=st.tuples(*[st.integers(0, 4)] * 2), body=st.binary(max_size=400))
@example(counts=(0, 1), body=array("a", STRING, 3, bytes(24)))
def test_random_bodies_do_no_harm(counts: tuple[int, int], body: bytes) -> None:
    data = b"GGUF" + struct.pack("<IQQ", 3, *counts) + body
    read_everything(data, len(data))


STRINGS = st.lists(
    st.one_of(
        st.binary(max_size=20),
        st.binary(max_size=4).map(lambda tail: bytes(9) + tail),
        st.integers(250, 260).map(lambda length: b"x" * length),
        st.integers(4000, 9000).map(bytes),
    ),
    max_size=40,
)


@FUZZ
@given(strings=STRINGS, repeat=st.integers(1, 60), before=st.binary(max_size=9), after=st.binary(max_size=9))
def test_strings_are_skipped_to_where_they_end(strings: list[bytes], repeat: int, before: bytes, after: bytes) -> None:
    body = b"".join(text(string) for string in strings) * repeat
    count = len(strings) * repeat
    stop = len(before) + len(body)
    data = before + body + after
    assert skip_strings(data, len(before), count, len(data)) == stop
    if count:
        with pytest.raises(BrokenString):
            skip_strings(data, len(before), count, stop - 1)


def test_a_wide_vocabulary_is_skipped_without_an_object_per_token(tmp_path: Path) -> None:
    count = 100_000
    tokens = array("tokenizer.ggml.tokens", STRING, count, b"".join(text(f"t{index}") for index in range(count)))
    path = tmp_path / "wide.gguf"
    path.write_bytes(header([tokens], [tensor("a.weight", (64,))]) + bytes(1024))
    before = sys.getallocatedblocks()
    with ModelFile.open(path) as model:
        assert list(model.tensors) == ["a.weight"]
        assert sys.getallocatedblocks() - before < count // 10


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="counts resident pages as Linux tells them")
def test_no_tensor_data_becomes_resident() -> None:
    with ModelFile.open(smollm2()) as model:
        lines = Path("/proc/self/smaps").read_text().split("\n")
        at = next(number for number, line in enumerate(lines) if line.endswith(smollm2().name))
        resident = next(int(line.split()[1]) * 1024 for line in lines[at:] if line.startswith("Rss:"))
        assert 0 < resident < model.header_bytes + 500_000


def test_refused_file_is_unmapped_while_its_error_lives(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(header([array("a", STRING, 9, text("a") * 8 + struct.pack("<Q", HUGE))], []) + bytes(99))
    with pytest.raises(InvalidModel) as caught:
        ModelFile.open(path)
    assert caught.value.path is not None
    if Path("/proc/self/maps").exists():
        assert str(path) not in Path("/proc/self/maps").read_text()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    os.mkfifo(tmp_path / "pipe.gguf")
    for name, problem in ((".", "not a file"), ("empty.gguf", "empty"), ("pipe.gguf", "not a file")):
        with pytest.raises(InvalidModel, match=problem):
            ModelFile.open(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        ModelFile.open(tmp_path / "absent.gguf")


# Split sets.


def tensor_bytes(model: ModelFile) -> dict[str, bytes]:
    files = [path.read_bytes() for path in model.paths]
    return {info.name: files[info.file][info.offset : info.offset + info.nbytes] for info in model.tensors.values()}


@pytest.mark.parametrize("empty_first", [False, True], ids=["filled first", "empty first"])
def test_split_set_holds_the_tensors_of_the_whole(tmp_path: Path, empty_first: bool) -> None:
    whole = ModelFile.open(write_small_llama(tmp_path / "whole.gguf", SmallLlama(layers=3)))
    first = write_small_llama(tmp_path / "parts.gguf", SmallLlama(layers=3), split_tensors=8, empty_first=empty_first)
    with ModelFile.open(first) as model, whole:
        assert len(model.paths) == (5 if empty_first else 4)
        assert model.size_bytes == sum(path.stat().st_size for path in model.paths)
        assert tensor_bytes(model) == tensor_bytes(whole)
        assert spec_of(model) == spec_of(whole)
        assert min(info.file for info in model.tensors.values()) == (1 if empty_first else 0)
        head = ModelFile.from_header(first.read_bytes()[: model.header_bytes], first.name, model.file_sizes[0])
        assert head.header_sha256() == model.header_sha256()
        assert head.metadata.get_strings("tokenizer.ggml.tokens")[1] == "<s>"
        with ModelFile.open(model.paths[2]) as again:
            assert again.paths == model.paths


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    write_small_llama(tmp_path / "m.gguf", SmallLlama(), split_tensors=8)
    return sorted(tmp_path.glob("m-*.gguf"))


def test_missing_part_is_named(parts: list[Path]) -> None:
    parts[1].unlink()
    with pytest.raises(InvalidModel, match=rf"{parts[1].name}: this part of the split set is missing"):
        ModelFile.open(parts[0])


def test_part_under_a_wrong_name_is_refused(parts: list[Path], tmp_path: Path) -> None:
    alone = shutil.copy(parts[1], tmp_path / "alone.gguf")
    with pytest.raises(InvalidModel, match=r"part 2 of 3 of a split set, but not named …-00002-of-00003.gguf"):
        ModelFile.open(alone)
    shutil.copy(parts[0], parts[1])
    with pytest.raises(InvalidModel, match=r"named as part 2 of 3, but it is part 1 of 3"):
        ModelFile.open(parts[0])
    whole = write_small_llama(tmp_path / "whole.gguf", SmallLlama())
    whole.rename(tmp_path / "w-00001-of-00001.gguf")
    ModelFile.open(tmp_path / "w-00001-of-00001.gguf").close()
    for name in ("w-00000-of-00002.gguf", "w-00003-of-00002.gguf"):
        with pytest.raises(InvalidModel, match="there is no part"):
            ModelFile.open(tmp_path / name)


def split_part(number: int, tensors: list[bytes], total: int) -> bytes:
    pairs = [
        pair("split.no", UINT32, struct.pack("<I", number)),
        pair("split.count", UINT32, struct.pack("<I", 2)),
        pair("split.tensors.count", INT32, struct.pack("<i", total)),
    ]
    return header(pairs, tensors) + bytes(512)


def test_parts_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    first, second = tmp_path / "p-00001-of-00002.gguf", tmp_path / "p-00002-of-00002.gguf"
    first.write_bytes(split_part(0, [tensor("a", (8,))], 2))
    second.write_bytes(split_part(1, [tensor("a", (8,))], 2))
    with pytest.raises(InvalidModel, match="tensor a is in an earlier part too"):
        ModelFile.open(first)
    second.write_bytes(split_part(1, [tensor("b", (8,)), tensor("c", (8,))], 2))
    with pytest.raises(InvalidModel, match="3 tensors, expected 2"):
        ModelFile.open(first)
    second.write_bytes(split_part(1, [tensor("b", (8,))], 2))
    with ModelFile.open(first) as model:
        assert [info.file for info in model.tensors.values()] == [0, 1]
