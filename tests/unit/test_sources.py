"""Addresses of models, and which files of a repository they mean."""

import pytest

from eldric.data.hub_files import choose, file_sets
from eldric.data.sources import HubSource, OllamaSource, PeerSource, Source, parse_source
from eldric.errors import DataLoss, EldricError, InvalidRequest, NotFound


@pytest.mark.parametrize(
    ("uri", "source"),
    [
        ("hf://o/r", HubSource("o/r")),
        ("hf://owner/Some-7B.v2_x-GGUF:Q4_K_M", HubSource("owner/Some-7B.v2_x-GGUF", quantization="Q4_K_M")),
        ("hf://o/r@refs/pr/1:Q8_0", HubSource("o/r", "refs/pr/1", "Q8_0")),
        ("hf://o/r@v1", HubSource("o/r", "v1")),
        ("hf://o/r/sub/model-00001-of-00002.gguf", HubSource("o/r", file="sub/model-00001-of-00002.gguf")),
        ("hf://o/r@v1/model.gguf", HubSource("o/r", "v1", file="model.gguf")),
        ("ollama://llama3.2", OllamaSource("llama3.2")),
        ("ollama://someone/model:7b-q4_0", OllamaSource("model", "7b-q4_0", "someone")),
        ("eldric://10.0.0.2:8892/tale", PeerSource("10.0.0.2:8892", "tale")),
        ("eldric://[::1]:8892/llama3.2:1b", PeerSource("[::1]:8892", "llama3.2:1b")),
    ],
)
def test_an_address_names_its_source(uri: str, source: Source) -> None:
    assert parse_source(uri) == source


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "hf://",
        "hf://only-owner",
        "hf://o/r/../../etc/model.gguf",
        "hf://o/../model.gguf",
        "hf://o/r/a//b.gguf",
        "hf://o/r/readme.md",
        "hf://o/r:Q4:Q5",
        "hf://../..",
        "hf:o/r",
        "HF://o/r",
        "http://example.com/model.gguf",
        "file:///etc/passwd",
        "ollama://../x",
        "ollama://a/b/c",
        "ollama://.hidden",
        "ollama://x:../y",
        "ollama://x\0",
        "eldric://host/x",
        "eldric://host:99999/x",
        "eldric://host:1/../x",
        "eldric://host:1/",
        "eldric://user@host:1/x",
        "eldric://host#x:1/x",
        "eldric://[::1/x]:1/x",
    ],
)
def test_what_names_no_source_is_refused(uri: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_source(uri)


def test_an_address_in_full_means_the_same_source() -> None:
    assert parse_source(HubSource("o/r", "v1").uri("Q4_K_M")) == HubSource("o/r", "v1", "Q4_K_M")
    assert parse_source(HubSource("o/r", file="x.gguf").uri("Q4_K_M")) == HubSource("o/r", file="x.gguf")
    assert parse_source(HubSource("o/r").uri("")) == HubSource("o/r")
    for source in (OllamaSource("m", "7b", "me"), PeerSource("h:1", "m")):
        assert parse_source(source.uri) == source


REPOSITORY = [
    "README.md",
    "config.json",
    "imatrix.gguf",
    "mmproj-model-f16.gguf",
    "Model-7B-Q4_K_M.gguf",
    "Model-7B-Q4_0.gguf",
    "Model-7B-UD-Q4_0.gguf",
    "Model-7B-IQ2_XXS.gguf",
    "Model-7B-bf16.gguf",
    "Q8_0/Model-7B-Q8_0-00002-of-00002.gguf",
    "Q8_0/Model-7B-Q8_0-00001-of-00002.gguf",
    "Q6_K/Model-7B-Q6_K-00001-of-00002.gguf",
    "../Model-7B-Q3_K_S.gguf",
    "/etc/Model-7B-Q3_K_S.gguf",
    "a\\Model-7B-Q3_K_S.gguf",
]


SPLIT = ["Q8_0/Model-7B-Q8_0-00001-of-00002.gguf", "Q8_0/Model-7B-Q8_0-00002-of-00002.gguf"]


def test_the_models_of_a_repository_are_its_gguf_files_and_whole_sets() -> None:
    assert [(found.quantization, len(found.names)) for found in file_sets(REPOSITORY)] == [
        ("IQ2_XXS", 1),
        ("Q4_0", 1),
        ("Q4_K_M", 1),
        ("UD-Q4_0", 1),
        ("BF16", 1),
        ("Q8_0", 2),
    ]


@pytest.mark.parametrize(
    ("uri", "names"),
    [
        ("hf://o/r", ["Model-7B-Q4_K_M.gguf"]),
        ("hf://o/r:q4_0", ["Model-7B-Q4_0.gguf"]),
        ("hf://o/r:UD-Q4_0", ["Model-7B-UD-Q4_0.gguf"]),
        ("hf://o/r:Q4-K-M", ["Model-7B-Q4_K_M.gguf"]),
        ("hf://o/r:Q8_0", SPLIT),
        ("hf://o/r/Q8_0/Model-7B-Q8_0-00002-of-00002.gguf", SPLIT),
    ],
)
def test_an_address_means_one_model_of_a_repository(uri: str, names: list[str]) -> None:
    source = parse_source(uri)
    assert isinstance(source, HubSource)
    assert list(choose(source, REPOSITORY).names) == names


@pytest.mark.parametrize(
    ("uri", "names", "kind", "words"),
    [
        (
            "hf://o/r:Q5_K_M",
            REPOSITORY,
            NotFound,
            "no quantization Q5_K_M: it has BF16, IQ2_XXS, Q4_0, Q4_K_M, Q8_0, UD-Q4_0",
        ),
        ("hf://o/r:Q6_K", REPOSITORY, NotFound, "no quantization Q6_K"),
        ("hf://o/r:Q3_K_S", REPOSITORY, NotFound, "no quantization"),
        ("hf://o/r/x.gguf", REPOSITORY, NotFound, "no file x.gguf"),
        ("hf://o/r/Q6_K/Model-7B-Q6_K-00001-of-00002.gguf", REPOSITORY, DataLoss, "not all parts"),
        ("hf://o/r", ["README.md", "model.safetensors"], NotFound, "no GGUF model"),
        ("hf://o/r", ["a-Q4_0.gguf", "a-Q8_0.gguf"], InvalidRequest, "say which: Q4_0, Q8_0"),
        ("hf://o/r:Q4_0", ["a-Q4_0.gguf", "b-Q4_0.gguf"], InvalidRequest, "name one's file: a-Q4_0.gguf, b-Q4_0.gguf"),
    ],
)
def test_what_a_repository_has_not_is_said(uri: str, names: list[str], kind: type[EldricError], words: str) -> None:
    source = parse_source(uri)
    assert isinstance(source, HubSource)
    with pytest.raises(kind, match=words):
        choose(source, names)
