"""Token ids: those of llama.cpp, for the real files, for every pre-tokenizer and for SentencePiece."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldric.engine.errors import InvalidModel, InvalidPrompt, UnsupportedModel
from eldric.engine.gguf import ModelFile
from eldric.engine.pretokenizers import PRE_TOKENIZERS
from eldric.engine.tokenizer import Tokenizer
from eldric.engine.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from tests.hard_texts import HARD_TEXTS, random_texts
from tests.models import smollm2, storyteller
from tests.vocabulary_reference import VocabularyReference

EXPECTED = Path(__file__).parents[1] / "data" / "tokenizer_ids.json"
REAL: Mapping[str, Callable[[], Path]] = {"smollm2": smollm2, "storyteller": storyteller}


def metadata_of(path: Path) -> dict[str, Any]:
    """A file's tokenizer keys."""
    model = ModelFile.open(path)
    try:
        return {key: model.metadata[key] for key in model.metadata if key.startswith(("tokenizer.", "general.name"))}
    finally:
        model.close()


def write_vocabulary(path: Path, metadata: Mapping[str, Any]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        plain = value.tolist() if isinstance(value, np.ndarray) else value
        kind = gguf.GGUFValueType.get_type(plain)
        writer.add_key_value(key, plain, gguf.GGUFValueType.UINT32 if kind is gguf.GGUFValueType.INT32 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_level(pre: str = "gpt-2", **extra: Any) -> dict[str, Any]:
    """A vocabulary in which any two neighbours of some ordinary bytes are one token, so that every cut shows."""
    spelled = [chr(c) for c in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144))]
    # A space, line ends, and the bytes that many letters, marks, digits and spaces beyond ASCII begin and end with.
    frequent = [*"as'tSL019.!-_/(", *(spelled[i] for i in (220, 198, 201, 197)), *"ÃÂâã©ģĢĤĥÌ"]
    pairs = [(left, right) for right in frequent for left in frequent] + [("ĠĠ", "Ġ")]
    texts = [*dict.fromkeys([*spelled, *(left + right for left, right in pairs), "Ġan", "<|im_end|>", "<|pad|>", "@@"])]
    kinds = np.full(len(texts), NORMAL, np.int32)
    kinds[[texts.index("<|im_end|>"), texts.index("<|pad|>")]] = CONTROL
    kinds[texts.index("@@")] = USER_DEFINED
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in pairs],
        "tokenizer.ggml.bos_token_id": texts.index("<|pad|>"),
        "tokenizer.ggml.eos_token_id": texts.index("<|im_end|>"),
    } | {f"tokenizer.ggml.{name}": value for name, value in extra.items()}


def sentencepiece(**extra: Any) -> dict[str, Any]:
    """A vocabulary of words and of their beginnings. "q" and "Q" are no tokens, but "qQ" is."""
    words = (
        "the they there she shell he hello low world lower ▁ ▁▁ ▁▁▁▁ ▁the ▁he ▁hello ▁world 日本 日本語 é 1 12 123 qQ"
    )
    pieces = dict.fromkeys(word[:end] for word in words.split() for end in range(1, len(word) + 1))
    normal = sorted({*pieces, *"abcdefghijklmnoprstuvwxyz.,!\n"} - {"q"}, key=lambda piece: (-len(piece), piece))
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *normal, "<|user|>"]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(normal), USER_DEFINED]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(normal))] + [-1000.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | {f"tokenizer.ggml.{name}": value for name, value in extra.items()}


def assert_same_ids(tokenizer: Tokenizer, path: Path, texts: list[str]) -> None:
    with VocabularyReference(path) as reference:
        for text in texts:
            for special in (False, True):
                expected = reference.encode(text, special=special, add_special=True)
                assert tokenizer.encode(text, special=special) == expected, (text, special)
        assert tokenizer.eog_ids == reference.eog_ids()


@pytest.fixture(scope="module")
def real_tokenizers() -> Mapping[str, Tokenizer]:
    return {name: Tokenizer.from_metadata(metadata_of(path())) for name, path in REAL.items()}


@pytest.mark.parametrize("name", REAL)
def test_ids_are_those_that_llama_cpp_gave(name: str, real_tokenizers: Mapping[str, Tokenizer]) -> None:
    for entry in json.loads(EXPECTED.read_text()):
        assert real_tokenizers[name].encode(entry["text"], special=True) == entry[name], entry["text"]


@pytest.mark.parametrize("name", REAL)
def test_real_vocabularies_agree_with_llama_cpp(name: str, real_tokenizers: Mapping[str, Tokenizer]) -> None:
    tokenizer = real_tokenizers[name]
    assert_same_ids(tokenizer, REAL[name](), [*HARD_TEXTS, *random_texts(400, seed=11)])
    with VocabularyReference(REAL[name]()) as reference:
        assert tokenizer.vocab_size == reference.size
        for token in range(reference.size):
            for special in (False, True):
                expected = reference.token_bytes(token, special=special)
                assert tokenizer.token_bytes(token, special=special) == expected


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_words_are_cut_as_llama_cpp_cuts_them(pre: str, tmp_path: Path) -> None:
    metadata = byte_level(pre)
    path = write_vocabulary(tmp_path / "vocabulary.gguf", metadata)
    texts = [*HARD_TEXTS, *random_texts(150, seed=3)]
    few = ["a an as", "a@@@b", "     a     ", "'ta'sta'SA'tas"]
    few += ["".join(texts[start : start + 5]) for start in range(0, len(texts), 5)]  # its regex is slow to begin
    assert_same_ids(Tokenizer.from_metadata(metadata), path, few)


@pytest.mark.parametrize("add_space_prefix", [True, False])
def test_sentencepiece_agrees_with_llama_cpp(add_space_prefix: bool, tmp_path: Path) -> None:
    metadata = sentencepiece(add_space_prefix=add_space_prefix)
    path = write_vocabulary(tmp_path / "vocabulary.gguf", metadata)
    words = [
        "hello world",
        "the shell there",
        "theythere",
        "qQ q Q qqQQ",
        "日本語日本",
        "a   b    c",
        "<|user|> hello <|user|>",
    ]
    texts = [*words, *HARD_TEXTS, *random_texts(300, seed=5)]
    assert_same_ids(Tokenizer.from_metadata(metadata), path, texts)


def test_phi_3_drops_white_space_after_its_control_tokens(tmp_path: Path) -> None:
    metadata = sentencepiece() | {"general.name": "Phi3 mini"}
    metadata["tokenizer.ggml.tokens"][-2] = "<|endoftext|>"
    path = write_vocabulary(tmp_path / "vocabulary.gguf", metadata)
    tokenizer = Tokenizer.from_metadata(metadata)
    assert_same_ids(tokenizer, path, ["<|user|>\n hello</s>  world<s> he"])
    assert tokenizer.encode("<|user|> \n he", special=True) == tokenizer.encode("<|user|>he", special=True)


def test_bytes_without_a_token_are_lost_but_keep_their_neighbours_apart(tmp_path: Path) -> None:
    metadata = byte_level()
    metadata["tokenizer.ggml.tokens"][metadata["tokenizer.ggml.tokens"].index("z")] = "zz"
    path = write_vocabulary(tmp_path / "vocabulary.gguf", metadata)
    tokenizer = Tokenizer.from_metadata(metadata)
    assert_same_ids(tokenizer, path, ["aza", "zzaza", "z"])
    assert tokenizer.encode("aza", special=False) == tokenizer.encode("a", special=False) * 2


def test_control_tokens_are_read_only_on_demand(real_tokenizers: Mapping[str, Tokenizer]) -> None:
    tokenizer = real_tokenizers["smollm2"]
    (end,) = tokenizer.encode("<|im_end|>", special=True)
    assert end in tokenizer.eog_ids
    assert end not in tokenizer.encode("<|im_end|>", special=False)
    assert tokenizer.token_bytes(end) == b""
    assert tokenizer.piece(end) == "<|im_end|>"


def test_bos_goes_in_front_as_the_file_or_the_caller_says(real_tokenizers: Mapping[str, Tokenizer]) -> None:
    adds, does_not = real_tokenizers["storyteller"], real_tokenizers["smollm2"]
    assert adds.add_bos and not does_not.add_bos
    assert adds.encode("a", special=False)[0] == adds.bos_id
    assert adds.bos_id not in adds.encode("a", special=False, add_bos=False)
    assert does_not.encode("a", special=False, add_bos=True)[0] == does_not.bos_id
    assert adds.encode("", special=False) == [adds.bos_id]


def test_eos_goes_behind_where_the_file_asks_for_it(tmp_path: Path) -> None:
    metadata = byte_level(add_bos_token=True, add_eos_token=True)
    path = write_vocabulary(tmp_path / "vocabulary.gguf", metadata)
    tokenizer = Tokenizer.from_metadata(metadata)
    assert_same_ids(tokenizer, path, ["a", ""])
    assert tokenizer.encode("", special=False) == [tokenizer.bos_id, tokenizer.eos_id]
    assert tokenizer.encode("", special=False, add_bos=True) == [tokenizer.bos_id]


def test_llama_3_takes_whole_words_before_merging(tmp_path: Path) -> None:
    metadata = byte_level("llama-bpe")
    path = write_vocabulary(tmp_path / "vocabulary.gguf", metadata)
    tokenizer = Tokenizer.from_metadata(metadata)
    assert_same_ids(tokenizer, path, ["a an an"])
    whole = metadata["tokenizer.ggml.tokens"].index("Ġan")
    assert whole in tokenizer.encode("a an", special=False)
    assert whole not in Tokenizer.from_metadata(byte_level("gpt-2")).encode("a an", special=False)


@settings(deadline=None)
@given(st.text())
def test_decoding_gives_the_encoded_text_back(text: str) -> None:
    for tokenizer in ROUND_TRIP:
        assert tokenizer.decode(tokenizer.encode(text, special=False)) == text


ROUND_TRIP = [Tokenizer.from_metadata(byte_level()), Tokenizer.from_metadata(sentencepiece())]


def test_a_lone_surrogate_becomes_the_replacement_character(real_tokenizers: Mapping[str, Tokenizer]) -> None:
    tokenizer = real_tokenizers["smollm2"]
    assert tokenizer.decode(tokenizer.encode("a\ud800b", special=False)) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00", special=False)) == "😀"


def test_decoding_a_continuation_keeps_its_space() -> None:
    tokenizer = Tokenizer.from_metadata(sentencepiece())
    ids = tokenizer.encode("hello world", special=False, add_bos=False)
    assert tokenizer.decode(ids) == "hello world"
    assert tokenizer.decode(ids, at_start=False) == " hello world"


def test_part_of_a_character_decodes_to_the_replacement_character(real_tokenizers: Mapping[str, Tokenizer]) -> None:
    tokenizer = real_tokenizers["storyteller"]
    ids = tokenizer.encode("é", special=False, add_bos=False)
    assert len(ids) == 2
    assert tokenizer.token_bytes(ids[0]) == "é".encode()[:1]
    assert tokenizer.decode(ids[:1]) == tokenizer.piece(ids[0]) == "\ufffd"


@pytest.mark.parametrize("token", [-1, 839, 1 << 40])
def test_ids_outside_the_vocabulary_are_refused(token: int, real_tokenizers: Mapping[str, Tokenizer]) -> None:
    with pytest.raises(InvalidPrompt, match="839 tokens"):
        real_tokenizers["storyteller"].decode([token])


def test_harmony_models_end_messages_and_turns_with_different_tokens(tmp_path: Path) -> None:
    metadata = byte_level()
    metadata["tokenizer.ggml.tokens"] += ["<|return|>", "<|call|>", "<|end|>", "<|channel|>"]
    metadata["tokenizer.ggml.token_type"] = np.append(metadata["tokenizer.ggml.token_type"], [CONTROL] * 4)
    path = write_vocabulary(tmp_path / "vocabulary.gguf", metadata)
    tokenizer = Tokenizer.from_metadata(metadata)
    assert_same_ids(tokenizer, path, ["<|channel|>x<|end|>y<|return|>"])
    texts = metadata["tokenizer.ggml.tokens"]
    assert {texts[token] for token in tokenizer.eog_ids} == {"<|im_end|>", "<|return|>", "<|call|>"}
    assert tokenizer.token_bytes(texts.index("<|channel|>")) == b"<|channel|>"


def test_tokens_of_code_infilling_end_a_generation(tmp_path: Path) -> None:
    metadata = byte_level(fim_sep_token_id=5, prefix_token_id=6)
    metadata["tokenizer.ggml.tokens"] += ["<reponame>", "<fim_prefix>", "<fim_pad>"]
    metadata["tokenizer.ggml.token_type"] = np.append(metadata["tokenizer.ggml.token_type"], [NORMAL] * 3)
    path = write_vocabulary(tmp_path / "vocabulary.gguf", metadata)
    assert_same_ids(Tokenizer.from_metadata(metadata), path, ["<reponame><fim_prefix><fim_pad>"])


def test_an_unknown_pre_tokenizer_is_named_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedModel, match=r"'klingon' is not known.*llama-bpe.*smollm"):
        Tokenizer.from_metadata(byte_level("klingon"))


@pytest.mark.parametrize("model", ["bert", "t5", None])
def test_other_kinds_of_tokenizers_are_refused(model: str | None) -> None:
    metadata = byte_level() | {"tokenizer.ggml.model": model}
    with pytest.raises(UnsupportedModel, match=repr(model) if model else "has no tokenizer"):
        Tokenizer.from_metadata({key: value for key, value in metadata.items() if value is not None})


def broken_vocabularies() -> Iterator[tuple[str, dict[str, Any], str]]:
    good = byte_level()
    texts, kinds = good["tokenizer.ggml.tokens"], good["tokenizer.ggml.token_type"]
    for key, value, message in (
        ("model", 3, "model is not a string"),
        ("pre", np.zeros(2), "pre is not a string"),
        ("tokens", [], "not a list of strings"),
        ("tokens", np.arange(3), "not a list of strings"),
        ("tokens", [*texts, "a"], "'a' more than once"),
        ("token_type", kinds[:-1], "entries for"),
        ("token_type", kinds.astype(np.float32), "not a list of numbers"),
        ("token_type", np.full(len(texts), BYTE, np.int32), "<0xHH>"),
        ("scores", ["1"], "not a list of numbers"),
        ("merges", None, "merges is not a list of strings"),
        ("merges", ["ab"], "'ab', which is no pair"),
        ("add_bos_token", "yes", "not a truth value"),
    ):
        yield f"{key}: {message}", good | {f"tokenizer.ggml.{key}": value}, message
    yield "no scores", sentencepiece(scores=None), "scores is missing"


@pytest.mark.parametrize(
    ("metadata", "message"), [pytest.param(broken, text, id=name) for name, broken, text in broken_vocabularies()]
)
def test_a_broken_vocabulary_is_refused(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidModel, match=message):
        Tokenizer.from_metadata({key: value for key, value in metadata.items() if value is not None})


def test_a_huge_token_costs_no_more_than_its_length() -> None:
    metadata = sentencepiece()
    metadata["tokenizer.ggml.tokens"][-1] = "h" * 300_000
    assert Tokenizer.from_metadata(metadata).encode("he", special=False)
