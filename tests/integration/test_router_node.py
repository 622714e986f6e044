"""A router as a node: clients that go away, replicas, where vocabularies come from, limits, metrics, its end."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from eldric import node, web
from eldric.errors import QueueIsFull, Unavailable
from eldric.names import split_address
from eldric.v1 import inference_pb2
from tests.fake_cluster import HELLO, STORY, FakeCluster, client_of, fake_cluster, http_of, silent, speak, until

# Clients that go away


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_cancels(cluster: FakeCluster, stream: bool) -> None:
    cluster.head.say = silent
    body = json.dumps({"prompt": "A", "stream": stream}).encode()
    host, port = cluster.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
    await until(lambda: cluster.head.running == 1)
    writer.close()
    await writer.wait_closed()
    await asyncio.wait_for(cluster.head.cancelled.wait(), 5)
    async with http_of(cluster) as http:
        metrics = (await http.get("/metrics")).text
    assert "eldric_router_active_generations 0.0" in metrics


async def test_embeddings_of_a_client_that_goes_away_are_cancelled(cluster: FakeCluster) -> None:
    cluster.head.say = silent
    body = json.dumps({"input": ["A", "B", "C"]}).encode()
    host, port = split_address(cluster.url.removeprefix("http://"))
    _, writer = await asyncio.open_connection(host, port)
    writer.write(b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
    await until(lambda: cluster.head.running == 3)
    writer.close()
    await writer.wait_closed()
    await until(lambda: cluster.head.running == 0)
    async with http_of(cluster) as http:
        await until_idle(http)


async def until_idle(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(5):
        while "eldric_router_active_generations 0.0" not in (await http.get("/metrics")).text:
            await asyncio.sleep(0.01)


async def test_clients_that_say_nothing_or_half_of_a_request_are_hung_up_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "HEAD_TIMEOUT_S", 0.3)
    whole = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"
    async with fake_cluster(tmp_path) as cluster, http_of(cluster) as http:
        host, port = split_address(cluster.url.removeprefix("http://"))
        said = [b"", whole[:9], whole[:-2], whole]
        clients = [await asyncio.open_connection(host, port) for _ in range(5) for _ in said]
        for (reader, writer), words in zip(clients, said * 5, strict=True):
            writer.write(words)
            if words == whole:
                await reader.readuntil(b"}]}")  # the answer's end
                writer.write(whole[:9])
        for reader, writer in clients:
            await asyncio.wait_for(reader.read(), 5)  # to the end of the connection
            writer.close()
        cluster.head.say = speak([20] * 3)
        assert (await http.post("/v1/completions", json={"prompt": "A"})).status_code == 200


async def test_a_request_that_came_in_time_may_take_longer_than_its_head_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "HEAD_TIMEOUT_S", 0.1)

    async def slow(request: inference_pb2.GenerateRequest) -> AsyncIterator[inference_pb2.Delta]:
        await asyncio.sleep(0.4)
        yield inference_pb2.Delta(tokens=[inference_pb2.GeneratedToken(id=20)])

    async with fake_cluster(tmp_path) as cluster, http_of(cluster) as http:
        cluster.head.say = slow
        assert (await http.post("/v1/completions", json={"prompt": "A"})).status_code == 200


async def test_a_client_that_reads_nothing_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens are read from the head all the same, and joined to a few chunks when it reads at last."""

    def bind_small(host: str, port: int, option: str) -> socket.socket:
        bound = web.bind(host, port, option)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
        return bound

    monkeypatch.setattr(node, "bind", bind_small)
    count = 2000
    async with fake_cluster(tmp_path) as cluster:
        cluster.head.say = speak([20] * count)
        body = json.dumps({"prompt": "A", "stream": True}).encode()
        host, port = cluster.url.removeprefix("http://").split(":")
        small = socket.socket()
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        small.connect((host, int(port)))
        reader, writer = await asyncio.open_connection(sock=small, limit=2048)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
            % (len(body), body)
        )
        entries = cluster.router.pipelines._entries.values()
        await until(lambda: cluster.head.requests and not any(entry.own for entry in entries))  # all is at the router
        received = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        await writer.wait_closed()
    assert b"[DONE]" in received
    assert received.count(b"data: ") < count / 2


async def test_many_requests_some_cancelled_leave_nothing_behind(cluster: FakeCluster) -> None:
    async def one(number: int, client: openai.AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(model="storyteller", messages=HELLO, stream=True)
        async for _ in stream:
            if number % 3 == 0:
                await stream.close()
                return

    async with client_of(cluster) as client:
        await one(1, client)
        await asyncio.gather(*(one(number, client) for number in range(20)))
        before = len(asyncio.all_tasks())
        for _ in range(3):
            await asyncio.gather(*(one(number, client) for number in range(20)))
        await until(lambda: cluster.head.running == 0)
        await until(lambda: len(asyncio.all_tasks()) <= before + 2)
    async with http_of(cluster) as http:
        assert "eldric_router_active_generations 0.0" in (await http.get("/metrics")).text


# Replicas, and the way to the vocabulary


async def test_requests_go_to_the_replica_with_least_to_do(tmp_path: Path) -> None:
    async with fake_cluster(tmp_path, heads=("w1", "w2")) as cluster, http_of(cluster) as http:
        await cluster.put(cluster.info("second", "w2"))
        cluster.heads["w1"].say = cluster.heads["w2"].say = silent
        body = {"model": "storyteller", "prompt": "A"}
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(http.post("/v1/completions", json=body)) for _ in range(6)]
            await until(lambda: sum(head.running for head in cluster.heads.values()) == 6)
            assert {name: head.running for name, head in cluster.heads.items()} == {"w1": 3, "w2": 3}
            for task in tasks:
                task.cancel()
        await until(lambda: all(head.running == 0 for head in cluster.heads.values()))


async def test_a_replica_that_is_full_or_lost_is_passed_over(tmp_path: Path) -> None:
    async with fake_cluster(tmp_path, heads=("w1", "w2")) as cluster, http_of(cluster) as http:
        await cluster.put(cluster.info("second", "w2"))
        body = {"model": "storyteller", "prompt": "A"}
        cluster.heads["w1"].error = QueueIsFull("full")
        for _ in range(3):
            answer = await http.post("/v1/completions", json=body)
            assert (answer.status_code, answer.headers["x-eldric-pipeline"]) == (200, "second")
        cluster.heads["w2"].error = Unavailable("stage 1 is lost")
        assert (await http.post("/v1/completions", json=body)).status_code == 429
        await cluster.head_nodes["w1"].stop()
        assert (await http.post("/v1/completions", json=body)).status_code == 503


async def test_what_still_waited_at_a_replica_that_closes_goes_to_another(tmp_path: Path) -> None:
    """As long as no token of it was given out; then it ends with the error."""
    async with fake_cluster(tmp_path, heads=("w1", "w2")) as cluster, http_of(cluster) as http:
        await cluster.put(cluster.info("second", "w2"))
        told = cluster.heads["w2"].say = speak(cluster.words(STORY))
        given = 0

        async def close(request: inference_pb2.GenerateRequest) -> AsyncIterator[inference_pb2.Delta]:
            async for delta in told(request):
                if not given:
                    raise Unavailable("stage 1 of 3 on worker w9 is closing")
                yield delta
                raise Unavailable("stage 1 of 3 on worker w9 is gone")

        cluster.heads["w1"].say = close
        body = {"model": "storyteller", "prompt": "A", "stream": True}
        for _ in range(3):
            answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == 200 and "closing" not in answer.text
            texts = [json.loads(line[6:])["choices"] for line in answer.text.splitlines() if line.startswith("data: {")]
            assert "".join(choices[0]["text"] for choices in texts if choices) == STORY
        assert len(cluster.heads["w1"].requests) >= 1 and len(cluster.heads["w2"].requests) == 3
        given = 1
        cluster.pipelines.drop("id-second")
        await until(lambda: "second" not in cluster.router.pipelines.names())
        assert "stage 1 of 3 on worker w9 is gone" in (await http.post("/v1/completions", json=body)).text


async def test_a_pipeline_that_is_removed_is_forgotten(cluster: FakeCluster) -> None:
    cluster.pipelines.drop("id-storyteller")
    await until(lambda: not cluster.router.pipelines.names())
    async with http_of(cluster) as http:
        assert (await http.post("/v1/completions", json={"model": "storyteller", "prompt": "A"})).status_code == 404
        assert (await http.get("/health")).status_code == 200


async def test_the_vocabulary_comes_from_a_data_worker_when_the_file_is_not_here(tmp_path: Path) -> None:
    async with fake_cluster(tmp_path, store=True, deployed=False) as cluster, http_of(cluster) as http:
        assert cluster.store is not None
        cluster.store.path = cluster.store.path.with_name("storyteller-q8_0.gguf")
        await cluster.put(cluster.info())
        answers = await asyncio.gather(
            *(http.post("/v1/completions", json={"model": "storyteller", "prompt": "A"}) for _ in range(4))
        )
    assert [answer.status_code for answer in answers] == [200] * 4
    assert cluster.store.pulls == 1


async def test_another_file_than_the_deployed_one_is_not_used(tmp_path: Path) -> None:
    async with fake_cluster(tmp_path, store=True, deployed=False) as cluster, http_of(cluster) as http:
        info = cluster.info()
        info.source.header_sha256 = b"\0" * 32
        await cluster.put(info)
        answer = await http.post("/v1/completions", json={"model": "storyteller", "prompt": "A"})
    assert answer.status_code == 500
    assert "not the file that was deployed" in answer.json()["error"]["message"]


async def test_without_a_data_worker_text_waits_for_one(cluster: FakeCluster) -> None:
    info = cluster.info("far")
    info.source.folder = "/nowhere"
    info.source.header_sha256 = b"\1" * 32
    await cluster.put(info)
    async with http_of(cluster) as http:
        answer = await http.post("/v1/completions", json={"model": "far", "prompt": "A"})
    assert answer.status_code == 503
    assert "data worker" in answer.json()["error"]["message"]


# The node


async def test_metrics_count_tokens_and_requests(cluster: FakeCluster) -> None:
    async with http_of(cluster) as http:
        await http.post("/v1/completions", json={"prompt": "A"})
        await http.post("/v1/completions", json={"prompt": 5})
        metrics = (await http.get("/metrics")).text
    count = len(cluster.words(STORY))
    assert f'eldric_router_generated_tokens_total{{pipeline="storyteller"}} {count}.0' in metrics
    assert 'eldric_router_time_to_first_token_seconds_count{pipeline="storyteller"} 1.0' in metrics
    assert f'eldric_router_inter_token_seconds_count{{pipeline="storyteller"}} {count - 1}.0' in metrics
    assert 'eldric_router_requests_total{code="200",endpoint="/v1/completions"} 1.0' in metrics
    assert 'eldric_router_requests_total{code="400",endpoint="/v1/completions"} 1.0' in metrics
    assert 'eldric_router_generations_total{pipeline="storyteller",reason="length"} 1.0' in metrics


async def test_a_router_that_ends_lets_streams_end_first(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with fake_cluster(tmp_path) as cluster, client_of(cluster) as client, http_of(cluster) as http:
        (token, *_) = cluster.words("dog")

        async def say(request: inference_pb2.GenerateRequest) -> AsyncIterator[inference_pb2.Delta]:
            yield inference_pb2.Delta(tokens=[inference_pb2.GeneratedToken(id=token)])
            await gate.wait()
            yield inference_pb2.Delta(tokens=[inference_pb2.GeneratedToken(id=token)])

        cluster.head.say = say
        stream = await client.completions.create(model="storyteller", prompt="A", stream=True)
        assert (await anext(stream)).choices[0].text
        stopping = asyncio.create_task(cluster.router.node.stop())
        await until(lambda: cluster.router.node.draining)
        refused = await http.post("/v1/completions", json={"prompt": "A"})
        assert refused.status_code == 503
        gate.set()
        rest = [chunk.choices[0] async for chunk in stream]
        assert rest[-1].finish_reason == "length"
        await asyncio.wait_for(stopping, 5)


async def test_more_requests_than_the_router_takes_are_refused(tmp_path: Path) -> None:
    async with fake_cluster(tmp_path, max_requests=2) as cluster, http_of(cluster) as http:
        cluster.head.say = silent
        body = {"prompt": "A"}
        assert (await http.post("/v1/completions", json={**body, "n": 3})).status_code == 429
        running = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(2)]
        await until(lambda: cluster.head.running == 2)
        answer = await http.post("/v1/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
        for task in running:
            task.cancel()
        await until(lambda: cluster.head.running == 0)


async def test_requests_whose_bodies_do_not_come_keep_nobody_out(tmp_path: Path) -> None:
    async with fake_cluster(tmp_path, max_requests=2) as cluster, http_of(cluster) as http:
        host, port = split_address(cluster.url.removeprefix("http://"))
        writers = [(await asyncio.open_connection(host, port))[1] for _ in range(3)]
        for writer in writers:
            writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        await until(lambda: cluster.router.bodies.held_bytes == len(writers))
        assert (await http.post("/v1/completions", json={"prompt": "A"})).status_code == 200
        for writer in writers:
            writer.close()
        await until(lambda: cluster.router.bodies.held_bytes == 0)


async def test_a_body_over_the_limit_is_413(tmp_path: Path) -> None:
    async with fake_cluster(tmp_path, max_body_bytes=1000) as cluster, http_of(cluster) as http:
        answer = await http.post("/v1/completions", json={"prompt": "x" * 2000})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


async def test_bodies_that_are_too_much_together_are_429_until_there_is_room(tmp_path: Path) -> None:
    limits: dict[str, Any] = {"max_body_bytes": 100_000, "max_bodies_bytes": 150_000}
    async with fake_cluster(tmp_path, **limits) as cluster, http_of(cluster) as http:
        host, port = split_address(cluster.url.removeprefix("http://"))
        _, slow = await asyncio.open_connection(host, port)
        slow.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n" + b" " * 99_000)
        await until(lambda: cluster.router.bodies.held_bytes == 99_000)
        answer = await http.post("/v1/completions", json={"prompt": "x" * 60_000})
        assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(answer.headers["retry-after"]) >= 1
        small = await http.post("/v1/completions", json={"prompt": "A"})
        assert small.status_code == 200
        slow.close()
        await until(lambda: cluster.router.bodies.held_bytes == 0)
        assert (
            await http.post("/v1/completions", json={"prompt": "x" * 60_000})
        ).status_code == 400  # no context for it


async def test_the_http_port_serves_nothing_of_the_cluster(cluster: FakeCluster) -> None:
    async with http_of(cluster) as http:
        for path in ("/api/v1/nodes", "/api/v1/pipeline/status", "/api/v1/models/registry"):
            assert (await http.get(path)).status_code == 404
