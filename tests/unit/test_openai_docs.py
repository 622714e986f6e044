"""docs/openai-api.md lists the fields that the code takes and refuses."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from eldric.router import openai_unserved
from eldric.router.openai_embeddings import EmbeddingsBody
from eldric.router.openai_messages import Message
from eldric.router.openai_types import ChatBody, CompletionBody

PAGE = (Path(__file__).parents[2] / "docs" / "openai-api.md").read_text()
ENDPOINTS = [
    ("chats", ChatBody, openai_unserved.CHAT),
    ("completions", CompletionBody, openai_unserved.COMPLETION),
    ("embeddings", EmbeddingsBody, openai_unserved.EMBEDDING),
]


def listed(section: str, endpoint: str) -> list[str]:
    """The fields in the first table of a section that an endpoint has."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n#")[0]
    names = []
    for row in re.findall(r"^\| (`.*)", text, re.MULTILINE):
        fields, endpoints = row.split(" | ")[:2]
        said = re.findall(r"\w+", endpoints.replace("generations", "chats completions"))
        names += re.findall(r"`(\w+)`", fields) if endpoint in said else []
    return names


@pytest.mark.parametrize(("endpoint", "body", "unserved"), ENDPOINTS)
def test_the_page_lists_what_the_code_does(endpoint: str, body: type[BaseModel], unserved: Mapping[str, Any]) -> None:
    assert sorted(listed("Honoured", endpoint)) == sorted(body.model_fields)
    best_of = [] if endpoint == "embeddings" else ["best_of"]
    assert sorted(listed("Refused", endpoint)) == sorted([*unserved, *best_of])
    ignored = listed("Ignored", endpoint)
    assert ignored and not {*ignored} & {*body.model_fields, *unserved, *best_of}


def test_the_page_names_the_fields_of_a_message() -> None:
    text = PAGE.partition("\n### Messages\n")[2].partition("\n## ")[0]
    assert not [name for name in Message.model_fields if name != "role" and f"`{name}`" not in text]
