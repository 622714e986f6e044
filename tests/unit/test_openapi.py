"""The description of the REST faces, and its page."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eldric.openapi import describe, page
from eldric.rest import bindings_of
from eldric.v1 import stage_pb2
from tests.faces import PIPELINE, STORE, Face


def schemas_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"].rpartition("/")[2]
        for each in value.values():
            yield from schemas_in(each)
    elif isinstance(value, list):
        for each in value:
            yield from schemas_in(each)


def test_description_holds_every_face_and_every_type() -> None:
    document = describe("Eldric", [PIPELINE, STORE])
    for binding in (*bindings_of(PIPELINE), *bindings_of(STORE)):
        assert binding.verb.lower() in document["paths"][binding.path]
    assert set(schemas_in(document)) <= set(document["components"]["schemas"])
    deploy = document["paths"]["/api/v1/pipeline/deploy"]["post"]
    assert set(deploy["responses"]["200"]["content"]) == {"text/event-stream", "application/json"}
    names = {
        each["name"]: each["in"] for each in document["paths"]["/api/v1/models/{id}/metadata"]["get"]["parameters"]
    }
    assert names == {"id": "path"}
    assert "ALREADY_EXISTS: a pipeline of that name is there" in deploy["description"]
    stages = document["components"]["schemas"]["DeployRequest"]["properties"]["stages"]
    assert stages == {"type": "integer", "minimum": 0, "description": "Number of stages. 0: as few as fit."}
    json.dumps(document)


async def test_page_shows_every_call_and_loads_nothing(tmp_path: Path) -> None:
    face = Face(tmp_path)
    html = (await face.ask("GET", "/docs")).body.decode()
    assert "POST /api/v1/pipeline/deploy" in html
    assert not re.search(r"src|url\(|@import|<(script|link|iframe|object|img|form)", html)
    assert {target for target in re.findall(r"href=([^ >]+)", html) if target[0] != "#"} == {"openapi.json"}
    document = (await face.ask("GET", "/openapi.json")).json()
    assert page(document) == html


def test_paths_are_those_that_users_know() -> None:
    def paths(service: Any) -> set[tuple[str, str]]:
        return {(binding.verb, binding.path) for binding in bindings_of(service)}

    assert paths(PIPELINE) >= {
        ("GET", "/api/v1/pipeline/models"),
        ("POST", "/api/v1/pipeline/deploy"),
        ("POST", "/api/v1/pipeline/undeploy"),
        ("GET", "/api/v1/pipeline/status"),
        ("POST", "/api/v1/pipeline/rebalance"),
    }
    assert paths(STORE) >= {
        ("GET", "/api/v1/models/registry"),
        ("GET", "/api/v1/models/{id}/metadata"),
        ("GET", "/api/v1/models/{id}/tensors"),
        ("POST", "/api/v1/models/{id}/pull"),
    }
    assert paths(stage_pb2.DESCRIPTOR.services_by_name["Stage"]) == {
        ("POST", "/api/v1/pipeline/load"),
        ("POST", "/api/v1/pipeline/unload"),
        ("GET", "/api/v1/pipeline/status"),
    }
