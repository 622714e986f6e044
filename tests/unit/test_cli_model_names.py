"""What a person may write for a model."""

from pathlib import Path

import pytest

from eldric.cli.model_names import Elsewhere, OnDisk, ShortName, Stored, model_folders, resolve, short_names, to_pull
from eldric.data.sources import HubSource, parse_source
from eldric.errors import InvalidRequest, NotFound

LLAMA = ShortName("llama-70b", "bartowski/Llama-3.3-70B-Instruct-GGUF", "Q4_K_M")
TABLE = {LLAMA.name: LLAMA}


@pytest.fixture
def nobody(tmp_path: Path) -> Path:
    """A user file that is not there."""
    return tmp_path / "models.toml"


def test_the_table_that_comes_along_is_sound(nobody: Path) -> None:
    table = short_names(nobody)
    assert "llama-70b" in table
    for name, entry in table.items():
        assert entry.name == name
        assert entry.repository.count("/") == 1
        assert entry.is_called(f"{entry.base}-{entry.quantization}.gguf")


def test_the_users_table_extends_and_overrides(nobody: Path) -> None:
    nobody.write_text(
        '[mine]\nrepository = "me/Mine-GGUF"\nquantization = "Q8_0"\n'
        '[llama-70b]\nrepository = "me/Other-GGUF"\nquantization = "Q2_K"\n'
    )
    table = short_names(nobody)
    assert table["mine"] == ShortName("mine", "me/Mine-GGUF", "Q8_0")
    assert table["llama-70b"].repository == "me/Other-GGUF"
    assert "tinyllama" in table


@pytest.mark.parametrize("text", ["[x", "x = 3", "[x]\nrepository = 'a/b'", "[x]\nrepository = 1\nquantization = 2"])
def test_a_broken_user_table_is_named(nobody: Path, text: str) -> None:
    nobody.write_text(text)
    with pytest.raises(InvalidRequest, match=r"models\.toml"):
        short_names(nobody)


def test_a_name_of_the_store_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("llama-70b").write_text("a file of that name")
    assert resolve("llama-70b", ["llama-70b"], TABLE, []) == Stored("llama-70b")


def test_a_file_comes_before_a_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("llama-70b").write_text("a file of that name")
    assert resolve("llama-70b", [], TABLE, []) == OnDisk(tmp_path / "llama-70b")


@pytest.mark.parametrize("stored", ["Llama-3.3-70B-Instruct-Q4_K_M", "llama-3.3-70b-instruct.q4_k_m"])
def test_a_short_name_finds_its_model_in_the_store(stored: str) -> None:
    others = ["Llama-3.3-70B-Instruct-Q8_0", "Llama-3.1-70B-Instruct-Q4_K_M"]
    assert resolve("llama-70b", [*others, stored], TABLE, []) == Stored(stored)
    assert isinstance(resolve("llama-70b", others, TABLE, []), Elsewhere)


def test_a_short_name_finds_its_file_on_disk(tmp_path: Path) -> None:
    part = "Llama-3.3-70B-Instruct-Q4_K_M-00001-of-00002.gguf"
    for name in ("Llama-3.3-70B-Instruct-Q8_0.gguf", part, part.replace("00001", "00002", 1)):
        path = tmp_path / "models--bartowski--x" / "snapshots" / "abc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    found = resolve("llama-70b", [], TABLE, [tmp_path])
    assert isinstance(found, OnDisk)
    assert found.path.name == part


def test_a_short_name_that_is_neither_stored_nor_on_disk_is_pulled() -> None:
    source = "hf://bartowski/Llama-3.3-70B-Instruct-GGUF:Q4_K_M"
    assert resolve("llama-70b", [], TABLE, []) == Elsewhere(source, "llama-70b")
    assert isinstance(parse_source(source), HubSource)


def test_a_source_is_pulled_as_it_is() -> None:
    assert resolve("ollama://llama3.2:1b", ["x"], TABLE, []) == Elsewhere("ollama://llama3.2:1b", "")
    with pytest.raises(InvalidRequest, match="names no source"):
        resolve("http://example.com/x.gguf", [], TABLE, [])


@pytest.mark.parametrize(
    ("model", "quantization", "expected"),
    [
        ("llama-70b", "Q8_0", Elsewhere("hf://bartowski/Llama-3.3-70B-Instruct-GGUF:Q8_0", "llama-70b-q8_0")),
        ("llama-70b", "q4_k_m", Elsewhere("hf://bartowski/Llama-3.3-70B-Instruct-GGUF:Q4_K_M", "llama-70b")),
        ("hf://o/r", "Q8_0", Elsewhere("hf://o/r:Q8_0", "")),
        ("hf://o/r@v1", "Q8_0", Elsewhere("hf://o/r@v1:Q8_0", "")),
        ("eldric://h:1/x", "", Elsewhere("eldric://h:1/x", "")),
    ],
)
def test_another_quantization_can_be_pulled(model: str, quantization: str, expected: Elsewhere) -> None:
    assert to_pull(model, quantization, TABLE) == expected


@pytest.mark.parametrize("model", ["hf://o/r:Q4_0", "hf://o/r/x.gguf", "ollama://x", "eldric://h:1/x"])
def test_a_source_without_a_choice_takes_no_other_quantization(model: str) -> None:
    with pytest.raises(InvalidRequest, match="leave --quant out"):
        to_pull(model, "Q8_0", TABLE)


def test_what_cannot_be_pulled_says_what_can() -> None:
    with pytest.raises(NotFound, match=r"no short name; pull one of .*llama-70b.*hf://"):
        to_pull("lama", "", TABLE)


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(NotFound, match=r"the store has a, b; .*models add"):
        resolve("lama", ["b", "a"], TABLE, [])
    with pytest.raises(NotFound, match="the store has none"):
        resolve("lama", [], TABLE, [])


def test_a_name_that_is_nearly_known_is_asked_after() -> None:
    with pytest.raises(NotFound, match=r"did you mean 'llama-70b'\?$"):
        to_pull("llama-70", "", TABLE)
    with pytest.raises(NotFound, match=r"did you mean 'tale'\?$"):
        resolve("tael", ["tale"], TABLE, [])


@pytest.mark.parametrize("path", ["x.gguf", "some/where", "~/x.gguf"])
def test_a_missing_file_is_a_missing_file(path: str) -> None:
    with pytest.raises(NotFound, match="no file"):
        resolve(path, [], TABLE, [])


def test_folders_that_are_searched_exist() -> None:
    assert all(folder.is_dir() for folder in model_folders())
