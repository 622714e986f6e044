"""What is said beside a name that is not known."""

import pytest

from eldric.nearest import known_names


@pytest.mark.parametrize(
    ("name", "known", "words"),
    [
        ("x", [], "there are: none"),
        ("other", ["tale", "smol"], "there are: tale, smol"),
        ("tael", ["tale", "smol"], "did you mean 'tale'? There are: tale, smol"),
        ("TALE", ["tale"], "did you mean 'tale'? There are: tale"),
        ("worker", ["worker-1", "worker-2"], "did you mean 'worker-2' or 'worker-1'? There are: worker-1, worker-2"),
    ],
)
def test_names_that_may_have_been_meant(name: str, known: list[str], words: str) -> None:
    assert known_names(name, known) == words


def test_of_many_names_some_are_listed_and_the_one_that_was_meant_is_among_all() -> None:
    said = known_names("model-x99", [f"m{number}" for number in range(98)] + ["model-99"])
    assert said.startswith("did you mean 'model-99'? There are: m0, m1,") and said.endswith("m19, ...")
