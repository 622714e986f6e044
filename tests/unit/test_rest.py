"""REST faces: requests into messages, answers and streams into JSON, errors into HTTP codes. No sockets."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from eldric import errors, event_stream, rest
from eldric.errors import EldricError, NotFound, QueueIsFull, Unavailable
from eldric.http_errors import http_code
from eldric.security import Caller
from eldric.v1 import common_pb2, pipeline_pb2
from tests.faces import Face


@pytest.fixture
def face(tmp_path: Path) -> Face:
    return Face(tmp_path)


async def test_answer_keeps_the_proto_names_and_says_numbers_as_numbers(face: Face) -> None:
    reply = await face.ask("GET", "/api/v1/pipeline/status")
    (info,) = reply.json()["pipelines"]
    assert reply.status == 200
    assert info["stages"][0]["memory"]["kv_bytes"] == 2**40
    assert info["epoch"] == str(2**60)  # beyond 2^53, where JavaScript would lose digits
    assert info["state"] == "PIPELINE_STATE_UNSPECIFIED"
    assert info["queued"] == 0


async def test_servicer_knows_who_calls(face: Face) -> None:
    reply = await face.ask("GET", "/api/v1/pipeline/status", caller=Caller("router", "r1"))
    assert reply.json()["pipelines"][0]["id"] == "router/r1"


async def test_query_parameters_fill_the_request(face: Face) -> None:
    await face.ask("GET", "/api/v1/pipeline/status?name=a%20b")
    assert face.pipelines.requests[0].name == "a b"


async def test_path_variables_fill_the_request_and_fixed_paths_come_first(face: Face) -> None:
    assert (await face.ask("GET", "/api/v1/models/llama-3:8b/metadata")).json()["info"]["id"] == "llama-3:8b"
    assert (await face.ask("GET", "/api/v1/models/registry")).json()["models"][0]["id"] == "all"
    assert (await face.ask("DELETE", "/api/v1/models/registry")).json() == {}


async def test_body_fills_the_request_in_both_spellings(face: Face) -> None:
    body = {"model": "m", "stages": 3, "options": {"kvType": "f32", "slots": 2}, "insecure_tensors": True}
    await face.ask("POST", "/api/v1/pipeline/deploy", body)
    (request,) = face.pipelines.requests
    assert request == pipeline_pb2.DeployRequest(
        model="m", stages=3, options=common_pb2.StageOptions(kv_type="f32", slots=2), insecure_tensors=True
    )


async def test_empty_body_is_an_empty_request(face: Face) -> None:
    assert (await face.ask("POST", "/api/v1/pipeline/undeploy")).json() == {}


BAD_BODIES = [
    ({"modle": "m"}, "unknown field 'modle' in DeployRequest"),
    ({"options": {"slotz": 1}}, "unknown field 'slotz' in DeployRequest.options"),
    ({"stages": "many"}, "stages"),
    ({"stages": -1}, "stages"),
    ({"stages": 1.5}, "stages"),
    ({"model": 5}, "model"),
    ({"layers": {}}, "layers"),
    ({"options": 3}, "options"),
    ([], "not a JSON object"),
    (b"null", "not a JSON object"),
    (b"{", "not JSON"),
    (b"\xff", "not UTF-8"),
    (b'{"model":"a","model":"b"}', "twice"),
    (b"[" * 100_000, "not JSON"),
    (b'{"stages": NaN}', "stages"),
    (b'{"model": "\\ud800"}', "model"),
    (b" " * (rest.MAX_BODY_BYTES + 1), "larger than"),
]


@pytest.mark.parametrize(("body", "words"), BAD_BODIES)
async def test_bad_body_is_400_and_says_what_is_wrong(face: Face, body: Any, words: str) -> None:
    reply = await face.ask("POST", "/api/v1/pipeline/deploy", body)
    error = reply.json()["error"]
    assert (reply.status, error["code"], error["status"]) == (400, 400, "INVALID_ARGUMENT")
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert face.pipelines.requests == []


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("/api/v1/pipeline/status?nmae=x", "no parameter 'nmae'; there are: name"),
        ("/api/v1/pipeline/status?name=a&name=b", "given 2 times"),
        ("/api/v1/pipeline/status?name.x=a", "'name' has no fields"),
    ],
)
async def test_bad_parameter_is_400(face: Face, target: str, words: str) -> None:
    reply = await face.ask("GET", target)
    assert reply.status == 400
    assert words in reply.json()["error"]["message"]


async def test_parameters_beside_a_body_are_refused(face: Face) -> None:
    assert (await face.ask("POST", "/api/v1/pipeline/deploy?model=m", {})).status == 400


async def test_body_where_none_is_taken_is_refused(face: Face) -> None:
    assert (await face.ask("GET", "/api/v1/pipeline/status", {"name": "x"})).status == 400


CODES = [
    (errors.InvalidRequest("x"), 400),
    (errors.NotFound("x"), 404),
    (errors.AlreadyExists("x"), 409),
    (errors.NotEnoughMemory("x"), 429),
    (errors.QueueIsFull("x"), 429),
    (errors.NotReady("x"), 412),
    (errors.StaleEpoch("x"), 412),
    (errors.Unavailable("x"), 503),
    (errors.DataLoss("x"), 500),
    (errors.Unauthenticated("x"), 401),
    (errors.PermissionDenied("x"), 403),
    (errors.DeadlineExceeded("x"), 504),
]


@pytest.mark.parametrize(("error", "code"), CODES)
async def test_errors_have_their_http_codes(face: Face, error: EldricError, code: int) -> None:
    face.pipelines.error = error
    reply = await face.ask("GET", "/api/v1/pipeline/status")
    assert reply.status == code == http_code(error.status)
    assert reply.json() == {"error": {"code": code, "status": error.status, "message": "x"}}


async def test_full_queue_says_when_to_come_back(face: Face) -> None:
    face.pipelines.error = QueueIsFull("full", retry_after_s=2.1)
    assert (await face.ask("GET", "/api/v1/pipeline/status")).headers["retry-after"] == "3"
    face.pipelines.error = Unavailable("loading")
    assert (await face.ask("GET", "/api/v1/pipeline/status")).headers["retry-after"] == "1"
    face.pipelines.error = NotFound("no")
    assert "retry-after" not in (await face.ask("GET", "/api/v1/pipeline/status")).headers


async def test_unexpected_error_is_logged_and_not_told(face: Face, caplog: pytest.LogCaptureFixture) -> None:
    face.pipelines.error = ValueError("a secret")
    reply = await face.ask("GET", "/api/v1/pipeline/status")
    message = reply.json()["error"]["message"]
    assert reply.status == 500
    assert "secret" not in reply.body.decode()
    incident = message.split("incident ")[1].split()[0]
    assert incident in caplog.text
    assert "a secret" in caplog.text


async def test_abort_on_the_context_ends_the_call(face: Face) -> None:
    reply = await face.ask("GET", "/api/v1/pipeline/status?name=abort")
    assert reply.json()["error"] == {"code": 409, "status": "ALREADY_EXISTS", "message": "there is one"}


async def test_strangers_and_other_kinds_are_refused(face: Face) -> None:
    assert (await face.ask("GET", "/api/v1/pipeline/status", caller=None)).status == 401
    worker = Caller("worker", "w1")
    reply = await face.ask("POST", "/api/v1/pipeline/deploy", {"model": "m"}, caller=worker)
    assert reply.status == 403
    assert face.pipelines.requests == []


async def test_another_sites_page_is_refused(face: Face) -> None:
    reply = await face.ask("POST", "/api/v1/pipeline/undeploy", {}, headers={"sec-fetch-site": "cross-site"})
    assert reply.status == 403


async def test_stream_is_server_sent_events(face: Face) -> None:
    reply = await face.ask("POST", "/api/v1/pipeline/deploy", {"model": "m"})
    assert reply.headers["content-type"].startswith("text/event-stream")
    (first, last) = reply.events()
    assert first[0] == last[0] == "message"
    assert first[1]["stage"]["worker"] == "w1"
    assert last[1]["ready"]["name"] == "m"


async def test_stream_that_fails_at_once_has_the_errors_code(face: Face) -> None:
    reply = await face.ask("POST", "/api/v1/pipeline/deploy", {"model": "none"})
    assert reply.status == 404
    assert reply.json()["error"]["message"] == "no model none"


async def test_stream_that_fails_midway_ends_with_an_error_event(face: Face) -> None:
    reply = await face.ask("POST", "/api/v1/pipeline/deploy", {"model": "broken"})
    assert reply.status == 200
    assert reply.events()[-1] == (
        "error",
        {"code": 412, "status": "FAILED_PRECONDITION", "message": "no worker"},
    )


async def test_stream_as_one_array(face: Face) -> None:
    accept = {"accept": "application/json"}
    reply = await face.ask("POST", "/api/v1/pipeline/deploy", {"model": "m"}, headers=accept)
    assert [next(iter(event)) for event in reply.json()] == ["stage", "ready"]
    failed = await face.ask("POST", "/api/v1/pipeline/deploy", {"model": "broken"}, headers=accept)
    assert failed.status == 412


async def test_array_is_bounded(face: Face, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "MAX_ARRAY_BYTES", 3000)
    accept = {"accept": "application/json"}
    reply = await face.ask("POST", "/api/v1/models/m/pull", {}, headers=accept)
    assert reply.status == 429
    assert "text/event-stream" in reply.json()["error"]["message"]
    assert len((await face.ask("POST", "/api/v1/models/m/pull", {})).events()) == 3


async def test_quiet_stream_shows_that_it_lives(face: Face, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "KEEP_ALIVE_S", 0.02)
    gone, seen = asyncio.Event(), asyncio.Event()
    asked = asyncio.create_task(face.ask("POST", "/api/v1/pipeline/deploy", {"model": "slow"}, gone=gone, seen=seen))
    await seen.wait()
    await asyncio.sleep(0.1)
    gone.set()
    assert b": still there" in (await asked).body


async def test_client_that_leaves_a_stream_cancels_the_call(face: Face) -> None:
    gone, seen = asyncio.Event(), asyncio.Event()
    asked = asyncio.create_task(face.ask("POST", "/api/v1/pipeline/deploy", {"model": "slow"}, gone=gone, seen=seen))
    await seen.wait()
    gone.set()
    await asyncio.wait_for(face.pipelines.ended.wait(), 5)
    await asked
    await asyncio.wait_for(face.guard.wait_idle(), 5)
    assert len(asyncio.all_tasks()) == 1


async def test_client_that_leaves_a_unary_call_cancels_it(face: Face) -> None:
    gone = asyncio.Event()
    asked = asyncio.create_task(face.ask("GET", "/api/v1/pipeline/status?name=slow", gone=gone))
    while not face.pipelines.requests:
        await asyncio.sleep(0)
    gone.set()
    await asyncio.wait_for(asked, 5)
    assert face.pipelines.ended.is_set()
    assert len(asyncio.all_tasks()) == 1


async def test_calls_are_counted(face: Face) -> None:
    await face.ask("GET", "/api/v1/pipeline/status")
    await face.ask("POST", "/api/v1/pipeline/deploy", {"model": "none"})

    def count(method: str, code: str) -> float | None:
        return face.registry.get_sample_value("eldric_calls_total", {"face": "rest", "method": method, "code": code})

    assert count("Pipeline/Status", "OK") == 1
    assert count("Pipeline/Deploy", "NOT_FOUND") == 1
    text = (await face.ask("GET", "/metrics")).body.decode()
    assert 'eldric_calls_total{code="OK",face="rest",method="Pipeline/Status"} 1.0' in text


async def test_unknown_path_and_verb_are_json_errors(face: Face) -> None:
    reply = await face.ask("GET", "/api/v1/nothing")
    assert (reply.status, reply.json()["error"]["status"]) == (404, "NOT_FOUND")
    reply = await face.ask("GET", "/api/v1/pipeline/undeploy")
    assert (reply.status, reply.json()["error"]["code"]) == (405, 405)


async def test_health_tells_of_every_check(face: Face) -> None:
    face.readiness.add(lambda: (True, {"models": 2}))
    reply = await face.ask("GET", "/health")
    assert reply.status == 200
    assert reply.json() == {"status": "ok", "ready": True, "kind": "controller", "name": "c1", "models": 2}
    face.readiness.add(lambda: (False, {"progress": 0.5}))
    reply = await face.ask("GET", "/health")
    assert (reply.status, reply.json()["status"], reply.json()["progress"]) == (503, "not ready", 0.5)


async def test_node_that_drains_or_cannot_tell_is_not_ready(face: Face) -> None:
    def broken() -> tuple[bool, dict[str, Any]]:
        raise ValueError("a secret")

    face.readiness.add(broken)
    reply = await face.ask("GET", "/health")
    assert (reply.status, "secret" in reply.body.decode()) == (503, False)
    face.readiness.draining = True
    assert (await face.ask("GET", "/health")).json()["status"] == "draining"


async def test_routes_by_hand_come_first_and_their_errors_are_answered(tmp_path: Path) -> None:
    async def status(request: Request) -> Response:
        raise QueueIsFull("full", 4)

    face = Face(tmp_path, (Route("/api/v1/pipeline/status", status),))
    reply = await face.ask("GET", "/api/v1/pipeline/status")
    assert (reply.status, reply.headers["retry-after"]) == (429, "4")
