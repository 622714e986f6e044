"""What the client says of options that are wrong, before anything is sent."""

from collections.abc import Mapping
from typing import Any

import pytest

from eldric.client import convert
from eldric.errors import InvalidRequest


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stages": -1}, "stages cannot be -1: it must be a whole number from 0 to 4294967295"),
        ({"stages": "two"}, "stages cannot be 'two': it must be a whole number from 0 to 4294967295"),
        ({"context": -4}, "context cannot be -4: it must be a whole number from 0 to 4294967295"),
        ({"name": 7}, "name cannot be 7: it must be a text"),
        (
            {"layers": [3, "x"]},
            "layers cannot be [3, 'x']: it must be a list, each a whole number from 0 to 4294967295",
        ),
        ({"satges": 2}, "there is no option 'satges'"),
    ],
)
def test_a_wrong_option_of_a_deployment_is_said_in_words(options: Mapping[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest) as wrong:
        convert.deploy_request("m", options)
    assert str(wrong.value) == words


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"temperature": "hot"}, "temperature cannot be 'hot': it must be a number"),
        ({"temprature": 1}, "there is no option 'temprature'"),
    ],
)
def test_a_wrong_option_of_sampling_is_said_in_words(sampling: Mapping[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest) as wrong:
        convert.generate_request("m", 0, (), False, True, sampling)
    assert str(wrong.value) == words
