"""The HTTP face without sockets: no request, however strange, is an internal error."""

import asyncio
import base64
import json
import struct
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from eldric.engine.chat import ChatTemplate
from eldric.engine.gguf import ModelFile
from eldric.engine.tokenizer import Tokenizer
from eldric.errors import NotReady, NotSupported, QueueIsFull
from eldric.router.admission import Admission
from eldric.router.errors import PipelineLost
from eldric.router.generation import Delta, Event, Finished, Heads, Job, Started, Token
from eldric.router.http_body import BodyReader
from eldric.router.metrics import RouterMetrics
from eldric.router.openai_api import OpenAiApi
from eldric.router.openai_embeddings import Embeddings
from eldric.router.openai_generation import Completions
from eldric.router.openai_types import ChatBody
from eldric.router.pipelines import Pipelines
from eldric.router.prompts import Prompts, Target
from eldric.router.vocabularies import Vocabularies, Vocabulary
from eldric.v1 import pipeline_pb2
from tests.models import storyteller


class Talker:
    """In the place of Heads: says two tokens, or fails."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    async def generate(self, target: Target, job: Job) -> AsyncGenerator[Event, None]:
        if self.error is not None:
            raise self.error
        yield Started(job.request_id, len(job.prompt), "p")
        yield Delta("Once upon", (Token(20, -0.5, ((20, -0.5),)), Token(21, -1.0, ())), 2)
        yield Finished("length", "", len(job.prompt), 2, 1.0, 2.0, 3.0)

    async def embed(self, target: Target, tokens: Sequence[int]) -> Sequence[float]:
        if self.error is not None:
            raise self.error
        return [0.6, -0.8] if len(tokens) > 1 else [1.0, 0.0]


class OneVocabulary:
    def __init__(self) -> None:
        with ModelFile.open(storyteller()) as model:
            tokenizer = Tokenizer.from_metadata(model.metadata)
            self.vocabulary = Vocabulary(tokenizer, ChatTemplate.from_metadata(model.metadata, tokenizer), (4,), 13)

    async def get(self, source: Any) -> Vocabulary:
        return self.vocabulary


class Face:
    """The routes over made-up parts, called as an ASGI server would."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self.executor = ThreadPoolExecutor(1)
        self.heads = Talker()
        pipelines = Pipelines()
        ready = pipeline_pb2.PipelineInfo(id="1", name="p", model="m", state=pipeline_pb2.READY)
        ready.options.context = 64
        pipelines.update(ready)
        self.draining = False
        self.runner.run(asyncio.sleep(0))
        self.admission = Admission(200, lambda: self.draining)
        metrics = RouterMetrics(CollectorRegistry(), lambda: self.admission.active)
        prompts = Prompts(pipelines, cast(Vocabularies, OneVocabulary()), self.executor)
        bodies = BodyReader(100_000, 100_000, self.executor)
        completions = Completions(prompts, cast(Heads, self.heads), self.admission)
        embeddings = Embeddings(prompts, cast(Heads, self.heads))
        api = OpenAiApi(pipelines, prompts, completions, embeddings, self.admission, metrics, bodies)
        self.app = Starlette(routes=api.routes())

    def call(self, method: str, path: str, body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
        return self.runner.run(self._call(method, path, body))

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        code, _, answer = self.call("POST", path, json.dumps(body).encode())
        return code, json.loads(answer) if answer.startswith(b"{") else answer.decode()

    async def _call(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        incoming = iter([{"type": "http.request", "body": body, "more_body": False}])
        sent: list[Any] = []

        async def receive() -> Any:
            message = next(incoming, None)
            return message if message is not None else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": [], "root_path": ""}
        active = self.admission.active
        async with asyncio.timeout(10):
            await self.app(scope, receive, send)
        headers = {key.decode(): value.decode() for key, value in sent[0]["headers"]}
        assert len(asyncio.all_tasks()) == 1
        assert self.admission.active == active
        return sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent[1:])

    def close(self) -> None:
        self.runner.close()
        self.executor.shutdown()


@pytest.fixture(scope="module")
def shared() -> Iterator[Face]:
    face = Face()
    yield face
    face.close()


@pytest.fixture
def face(shared: Face) -> Iterator[Face]:
    yield shared
    shared.heads.error, shared.draining = None, False


HELLO = {"messages": [{"role": "user", "content": "Hi"}]}


def test_a_chat_is_answered(face: Face) -> None:
    code, answer = face.post("/v1/chat/completions", {"model": "m", **HELLO})
    assert (code, answer["choices"][0]["message"]["content"]) == (200, "Once upon")
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 2


def test_several_prompts_and_choices_are_numbered_through(face: Face) -> None:
    _, answer = face.post("/v1/completions", {"prompt": ["A", [5, 6]], "n": 2, "echo": True})
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"][:1] for choice in answer["choices"][:2]] == ["A", "A"]


def test_texts_and_token_ids_are_embedded_in_their_order(face: Face) -> None:
    code, answer = face.post("/v1/embeddings", {"model": "m", "input": [[5], [5, 6], "A dog"], "dimensions": 2})
    assert (code, answer["model"]) == (200, "m")
    assert [each["index"] for each in answer["data"]] == [0, 1, 2]
    assert [each["embedding"] for each in answer["data"][:2]] == [[1.0, 0.0], pytest.approx([0.6, -0.8])]
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] >= 5
    _, packed = face.post("/v1/embeddings", {"input": [5, 6], "encoding_format": "base64"})
    assert struct.unpack("<2f", base64.b64decode(packed["data"][0]["embedding"])) == pytest.approx((0.6, -0.8))


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "input", "Missing required parameter: 'input'"),
        ({"input": []}, "input", "a string, an array of strings"),
        ({"input": [["a"]]}, "input", "a string, an array of strings"),
        ({"input": ["a"] * 2049}, "input", "at most 2048 prompts"),
        ({"input": ["a", []]}, "input", "the prompt is empty"),
        ({"input": [[5], [-1]]}, "input", "outside the vocabulary"),
        ({"input": [5] * 64}, "input", "context of 64 tokens"),
        ({"input": "a", "dimensions": 1}, "dimensions", "have 2 dimensions and cannot be shortened"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
    ],
)
def test_what_cannot_be_embedded_is_refused(face: Face, body: Any, param: str, message: str) -> None:
    code, answer = face.post("/v1/embeddings", body)
    assert (code, answer["error"]["param"]) == (400, param)
    assert message in answer["error"]["message"]


def test_a_failure_to_embed_is_answered_once_and_ends_the_others(face: Face) -> None:
    face.heads.error = QueueIsFull("the queue is full")
    code, answer = face.post("/v1/embeddings", {"input": [[5]] * 20})
    assert (code, answer["error"]["code"]) == (429, "rate_limit_exceeded")
    face.heads.error = NotSupported("its model pools its tokens")
    code, answer = face.post("/v1/embeddings", {"input": "A dog"})
    assert (code, answer["error"]["code"]) == (400, "unsupported_model")
    assert "pools its tokens" in answer["error"]["message"]


def test_many_texts_to_embed_do_not_keep_the_event_loop(face: Face) -> None:
    loop = face.runner.get_loop()
    turns, ended = 0, False

    def turn() -> None:
        nonlocal turns
        turns += 1
        if not ended:
            loop.call_soon(turn)

    loop.call_soon(turn)
    code, answer = face.post("/v1/embeddings", {"input": ["A dog"] * 300})
    ended = True
    assert (code, len(answer["data"])) == (200, 300)
    assert turns >= 300


def test_no_tokens_wanted_are_none_generated(face: Face) -> None:
    for stream in (False, True):
        code, answer = face.post(
            "/v1/completions", {"prompt": "A dog", "max_tokens": 0, "echo": True, "stream": stream}
        )
        assert code == 200
        assert "A dog" in json.dumps(answer)
        assert '"length"' in json.dumps(answer).replace("\\", "")


@pytest.mark.parametrize(
    ("error", "code", "kind", "retry"),
    [
        (QueueIsFull("full", 2.5), 429, "rate_limit_error", "3"),
        (PipelineLost("stage 1 is lost"), 503, "server_error", "5"),
        (NotReady("strange"), 500, "server_error", None),
        (RuntimeError("secret"), 500, "server_error", None),
    ],
)
def test_errors_have_openais_shape(face: Face, error: Exception, code: int, kind: str, retry: str | None) -> None:
    face.heads.error = error
    status, headers, body = face.call("POST", "/v1/chat/completions", json.dumps(HELLO).encode())
    answer = json.loads(body)["error"]
    assert (status, answer["type"], headers.get("retry-after")) == (code, kind, retry)
    assert set(answer) == {"message", "type", "param", "code"}
    assert "secret" not in answer["message"]


def test_more_choices_than_the_router_takes_are_refused(face: Face) -> None:
    code, answer = face.post("/v1/completions", {"prompt": ["a"] * 100, "n": 2})
    assert (code, answer["error"]["param"]) == (400, "n")
    with face.admission.admit(100):
        code, answer = face.post("/v1/completions", {"prompt": ["a"] * 120})
    assert (code, answer["error"]["type"]) == (429, "rate_limit_error")


def test_a_draining_router_takes_nothing_new(face: Face) -> None:
    face.draining = True
    assert face.post("/v1/chat/completions", HELLO)[0] == 503


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/responses"),
        ("GET", "/v1"),
        ("GET", "/v1/"),
        ("GET", "/v1/models/"),
        ("POST", "/v1/chat/completions/"),
        ("OPTIONS", "/v1/nothing"),
        ("TRACE", "/v1/nothing"),
        ("POST", "/chat/completions"),
    ],
)
def test_what_is_not_served_is_said_in_openais_shape(face: Face, method: str, path: str) -> None:
    code, _, body = face.call(method, path)
    assert (code, json.loads(body)["error"]["code"]) == (404, "unknown_url")
    assert ("ends with /v1" in json.loads(body)["error"]["message"]) is (path == "/chat/completions")


@pytest.mark.parametrize(
    ("method", "path", "takes"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("HEAD", "/v1/embeddings", "POST"),
        ("OPTIONS", "/v1/completions", "POST"),
        ("BREW", "/v1/completions", "POST"),
        ("DELETE", "/v1/models/m", "GET, HEAD"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("PUT", "/tokenize", "POST"),
    ],
)
def test_another_method_is_told_which_there_is(face: Face, method: str, path: str, takes: str) -> None:
    code, headers, body = face.call(method, path)
    assert (code, headers["allow"], json.loads(body)["error"]["code"]) == (405, takes, "method_not_supported")


def test_a_long_name_is_not_repeated_whole(face: Face) -> None:
    for path, body in (("/v1/chat/completions", {"model": "x" * 5000, **HELLO}), ("/v1/" + "x" * 5000, {})):
        code, answer = face.post(path, body)
        assert code == 404 and len(answer["error"]["message"]) < 300


def test_models_are_listed_and_shown(face: Face) -> None:
    assert [each["id"] for each in json.loads(face.call("GET", "/v1/models")[2])["data"]] == ["m", "p"]
    assert json.loads(face.call("GET", "/v1/models/m")[2])["context_length"] == 64
    code, _, body = face.call("GET", "/v1/models/x")
    assert (code, json.loads(body)["error"]["code"]) == (404, "model_not_found")


def test_text_goes_to_tokens_and_back(face: Face) -> None:
    _, answer = face.post("/tokenize", {"content": "Once upon a time", "with_pieces": True})
    assert "".join(token["piece"] for token in answer["tokens"]) == "Once upon a time"
    ids = [token["id"] for token in answer["tokens"]]
    assert face.post("/detokenize", {"tokens": ids}) == (200, {"content": "Once upon a time"})
    _, more = face.post("/tokenize", {"content": "Once upon a time", "add_special": True})
    assert more["tokens"] == [0, *ids]
    code, answer = face.post("/detokenize", {"tokens": [100_000]})
    assert (code, answer["error"]["type"]) == (400, "invalid_request_error")


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(face: Face) -> None:
    code, answer = face.post("/v1/completions", {"prompt": [5] * 64})
    assert (code, answer["error"]["code"], answer["error"]["param"]) == (400, "context_length_exceeded", "prompt")
    assert answer["error"]["message"].count("64") == 2
    code, answer = face.post("/v1/completions", {"prompt": "never tokenized " * 5000})
    assert (code, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert "at least" in answer["error"]["message"]


@pytest.mark.parametrize("prompt", [[839], [-1], [[5], [2**40]]])
def test_token_ids_outside_the_vocabulary_are_refused(face: Face, prompt: Any) -> None:
    code, answer = face.post("/v1/completions", {"prompt": prompt})
    assert (code, answer["error"]["param"]) == (400, "prompt")
    code, answer = face.post("/v1/completions", {"prompt": "a", "logit_bias": {"839": 1}})
    assert (code, answer["error"]["param"]) == (400, "logit_bias")


def test_a_stop_token_outside_the_vocabulary_is_refused(face: Face) -> None:
    code, answer = face.post("/v1/completions", {"prompt": "a", "stop_token_ids": [839]})
    assert (code, answer["error"]["param"]) == (400, "stop_token_ids")


def test_a_prompt_gets_no_begin_token_where_none_is_wanted(face: Face) -> None:
    for path, field in (("/v1/completions", "prompt"), ("/v1/embeddings", "input")):
        counts = [
            face.post(path, {field: "A dog", "add_special_tokens": wanted})[1]["usage"]["prompt_tokens"]
            for wanted in (None, True, False)
        ]
        assert counts[0] == counts[1] == counts[2] + 1


def test_a_template_that_fails_on_a_requests_variables_is_the_clients_error(face: Face) -> None:
    several: list[dict[str, Any]] = [{"raise_exception": 1}, {"a": [[[]]]}, {"range": None, "loop": 3}]
    for variables in several:
        assert face.post("/v1/chat/completions", {**HELLO, "chat_template_kwargs": variables})[0] in (200, 400)


PATHS = st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [
        *ChatBody.model_fields,
        "prompt",
        "input",
        "echo",
        "tools",
        "content",
        "tokens",
        "with_pieces",
        "add_special_tokens",
    ]
)
GOOD: dict[str, Any] = {
    **HELLO,
    "prompt": ["Hi", [7, 8]],
    "input": "Hi",
    "content": "Hi",
    "tokens": [7, 8],
    "n": 2,
    "stop": ["a"],
    "seed": 3,
    "top_k": 4,
}


@given(path=PATHS, fields=st.dictionaries(FIELDS, JSON, max_size=4), stream=st.booleans(), counted=st.booleans())
@settings(max_examples=150, deadline=None)
def test_no_json_is_an_internal_error(
    shared: Face, path: str, fields: dict[str, Any], stream: bool, counted: bool
) -> None:
    body: dict[str, Any] = GOOD | {"stream": stream} | ({"logprobs": 1} if counted else {}) | fields
    code, _, answer = shared.call("POST", path, json.dumps(body).encode())
    assert code in (200, 400, 404), answer
    if code != 200:
        assert set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}


@given(path=PATHS, body=st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
@settings(max_examples=60, deadline=None)
def test_no_bytes_are_an_internal_error(shared: Face, path: str, body: bytes) -> None:
    code, _, answer = shared.call("POST", path, body)
    assert code == 400
    assert json.loads(answer)["error"]["type"] == "invalid_request_error"
