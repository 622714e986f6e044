"""A controller with workers that compute nothing: deploys, failures, moves, over real sockets with mutual TLS."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from eldric.channels import call_errors, channel
from eldric.controller.main import Controller
from eldric.controller.state import Store
from eldric.errors import (
    AlreadyExists,
    EldricError,
    InvalidRequest,
    NotEnoughMemory,
    NotFound,
    NotReady,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    VersionMismatch,
)
from eldric.security import JoinToken, join, make_csr, renew
from eldric.v1 import common_pb2, membership_pb2, pipeline_pb2, registry_pb2, stage_pb2
from tests.controllers import MODEL, Calls, World, controller_here
from tests.workers import FakeWorker, Gate, until

READY, DEGRADED, DEPLOYING = pipeline_pb2.READY, pipeline_pb2.DEGRADED, pipeline_pb2.DEPLOYING


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[tuple[World, Controller]]:
    async with controller_here(tmp_path) as made:
        yield made


@pytest.fixture
async def world(here: tuple[World, Controller]) -> World:
    """Three workers and a store with one model."""
    made, _ = here
    await made.add_store()
    await made.add_workers("a", "b", "c")
    return made


async def test_a_deploy_plans_loads_connects_and_ends_with_the_pipeline(world: World) -> None:
    events = await world.calls.deploy(stages=3)
    assert [stage.worker for stage in events[0].plan.stages] == ["a", "b", "c"]
    assert [(stage.layers.start, stage.layers.end) for stage in events[0].plan.stages] == [(0, 2), (2, 4), (4, 6)]
    phases = [[event.stage.phase for event in events if event.stage.worker == worker] for worker in "abc"]
    assert phases == [["mapping", "building", "loaded", "connected"]] * 3
    info = events[-1].ready
    assert (info.name, info.model, info.state, info.epoch, info.progress) == (MODEL, MODEL, READY, 1, 1.0)
    assert info.head_node == "worker/a"
    assert info.head_address == world.workers["a"].node.grpc_address
    assert [(stage.index, stage.worker, stage.transport, stage.encrypted) for stage in info.stages] == [
        (index, worker, "zmq", True) for index, worker in enumerate("abc")
    ]
    assert all(stage.pid and stage.state == stage_pb2.SERVING and stage.memory.mapped_bytes for stage in info.stages)


async def test_stages_are_connected_in_a_ring_with_the_key_of_the_stage_before(world: World) -> None:
    await world.calls.deploy(stages=3)
    told = {name: connects(worker)[0] for name, worker in world.workers.items()}
    assert {name: (request.next.address, request.next_index) for name, request in told.items()} == {
        "a": ("zmq://b:1", 1),
        "b": ("zmq://c:2", 2),
        "c": ("zmq://a:0", 0),
    }
    assert [told[name].allowed_keys for name in "abc"] == [["key-c-2"], ["key-a-0"], ["key-b-1"]]
    assert {request.epoch for request in told.values()} == {1}


async def test_a_pipeline_of_one_stage_has_no_neighbours(world: World) -> None:
    await world.calls.deploy()
    (request,) = connects(world.workers["a"])
    assert not request.HasField("next") and not request.allowed_keys


async def test_more_stages_than_workers_share_them(world: World) -> None:
    events = await world.calls.deploy(stages=6)
    assert [stage.worker for stage in events[-1].ready.stages] == ["a", "a", "b", "b", "c", "c"]
    assert len(world.stages()) == 6


@pytest.mark.parametrize("method", ["Load", "Connect"])
async def test_a_failed_deploy_names_the_first_cause_and_leaves_nothing(world: World, method: str) -> None:
    world.workers["b"].failures[method] = NotEnoughMemory("needs 7 bytes more")
    with pytest.raises(NotEnoughMemory, match=r"^stage 1 on b: needs 7 bytes more$"):
        await world.calls.deploy(stages=3)
    assert world.stages() == []
    with pytest.raises(NotFound):
        await world.calls.status()
    del world.workers["b"].failures[method]
    assert (await world.calls.deploy(stages=3))[-1].ready.state == READY


@pytest.mark.parametrize("method", ["Load", "Connect"])
async def test_a_deploy_whose_caller_leaves_is_undone(world: World, method: str) -> None:
    gate = world.workers["c"].gates[method] = Gate()
    deploying = asyncio.create_task(world.calls.deploy(stages=3))
    await gate.arrived.wait()
    assert (await world.calls.status()).state == DEPLOYING
    deploying.cancel()
    await until_gone(world)
    assert world.stages() == []


async def test_undeploying_a_deploy_in_progress_ends_it(world: World) -> None:
    gate = world.workers["c"].gates["Load"] = Gate()
    deploying = asyncio.create_task(world.calls.deploy(stages=3))
    await gate.arrived.wait()
    await world.calls.undeploy()
    with pytest.raises(Unavailable):
        await deploying
    assert world.stages() == []


async def test_a_full_disk_of_the_controller_keeps_no_pipeline_and_no_name_from_going(
    world: World, here: tuple[World, Controller], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: object) -> None:
        raise NotReady("database or disk is full")

    await world.calls.deploy(stages=2)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "delete", full)
        await world.calls.undeploy()
        gate = world.workers["a"].gates["Connect"] = Gate()
        deploying = asyncio.create_task(world.calls.deploy(stages=3, name="late"))
        await gate.arrived.wait()
        patch.setattr(Store, "save", full)
        gate.open.set()
        with pytest.raises(NotReady, match="disk is full"):
            await deploying
    assert world.stages() == []
    for name in (MODEL, "late"):
        assert (await world.calls.deploy(stages=3, name=name))[-1].ready.state == READY


async def test_a_name_is_taken_from_the_start_of_its_deploy(world: World) -> None:
    gate = world.workers["a"].gates["Load"] = Gate()
    deploying = asyncio.create_task(world.calls.deploy(stages=3))
    await gate.arrived.wait()
    with pytest.raises(AlreadyExists, match="there is a pipeline 'tale' \\(deploying\\)"):
        await world.calls.deploy(stages=1)
    gate.open.set()
    await deploying
    assert (await world.calls.deploy(name="other"))[-1].ready.name == "other"


async def test_deploys_at_once_do_not_promise_the_same_memory(here: tuple[World, Controller]) -> None:
    world, _ = here
    await world.add_store()
    await world.add_workers("small", memory_bytes=30 << 20)
    fields: dict[str, Any] = dict(stages=1, options=common_pb2.StageOptions(weights="mapped", context=256, slots=1))
    ends = await asyncio.gather(
        *(world.calls.deploy(name=f"p{number}", **fields) for number in range(4)), return_exceptions=True
    )
    fitted = [end for end in ends if isinstance(end, list)]
    refused = [end for end in ends if isinstance(end, NotEnoughMemory)]
    assert 1 <= len(fitted) < 4 and len(fitted) + len(refused) == 4
    needed = fitted[0][0].plan.stages[0]
    size = needed.weights_bytes + needed.kv_bytes + needed.compute_bytes
    assert len(fitted) == int(0.8 * (30 << 20)) // size
    assert "bytes) are missing" in str(refused[0])
    await world.calls.undeploy("p0" if isinstance(ends[0], list) else fitted[0][-1].ready.name)
    assert (await world.calls.deploy(name="again", **fields))[-1].ready.state == READY


async def test_an_unknown_model_says_what_there_is_and_how_to_add_it(world: World) -> None:
    with pytest.raises(NotFound, match="no model 'nope' in the store; there are: tale; add it with `eldric-cli models"):
        await plan(world, model="nope")


async def test_without_a_model_store_a_deploy_says_so(here: tuple[World, Controller]) -> None:
    world, _ = here
    with pytest.raises(NotReady, match="there is no data worker"):
        await world.calls.deploy()


async def test_without_a_worker_a_deploy_says_how_to_start_one(here: tuple[World, Controller]) -> None:
    world, _ = here
    await world.add_store()
    with pytest.raises(NotReady, match="there is no worker: start one"):
        await world.calls.deploy()


async def test_a_plan_says_what_a_deploy_would_do_and_does_nothing(world: World) -> None:
    made = await plan(world, stages=2)
    assert [stage.worker for stage in made.stages] == ["a", "b"]
    assert [(each.worker, each.reason) for each in made.excluded] == [("c", "not needed")]
    assert all(stage.weights_bytes and stage.kv_bytes and stage.compute_bytes for stage in made.stages)
    assert (made.options.slots, made.options.lanes, made.options.HasField("exact")) == (4, 2, False)
    assert world.stages() == [] and not world.workers["a"].calls


async def test_wrong_requests_are_refused_with_the_field_named(world: World) -> None:
    for fields, said in (
        (dict(model=""), "names no model"),
        (dict(name="../x"), "no name for a pipeline"),
        (dict(stages=7), "6 layers: it cannot be cut into 7"),
        (dict(options=common_pb2.StageOptions(chunk=5000)), "chunk is 5000"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            await plan(world, **fields)


async def test_undeploying_unloads_everywhere_the_head_first(world: World) -> None:
    await world.calls.deploy(stages=3)
    gate = world.workers["a"].gates["Unload"] = Gate()
    undeploying = asyncio.create_task(world.calls.undeploy())
    await gate.arrived.wait()
    assert (await world.calls.status()).state == pipeline_pb2.UNDEPLOYING
    assert not world.workers["b"].called("Unload")
    gate.open.set()
    await undeploying
    assert world.stages() == []
    with pytest.raises(NotFound, match="no pipeline 'tale'"):
        await world.calls.undeploy()


async def test_a_stage_that_vanishes_or_breaks_degrades_the_pipeline_until_it_is_back(world: World) -> None:
    await world.calls.deploy(stages=3)
    world.workers["b"].change(stage_pb2.BROKEN, "lost its neighbour")
    await world.workers["a"].degraded.wait()  # long before the next beat's answer would come
    info = await world.calls.wait_for(DEGRADED)
    assert info.message == "stage 1 of 3 on worker b is broken: lost its neighbour"
    # All stages are there: the ring is connected again.
    info = await world.calls.wait_for(READY)
    assert info.message == "" and not world.workers["a"].degraded.is_set()
    again = connects(world.workers["b"])
    assert [request.round for request in again] == [0, 1] and list(again[1].workers) == ["a", "b", "c"]
    gate = world.workers["a"].gates["Load"] = Gate()
    world.workers["c"].forget()
    await gate.arrived.wait()
    assert "stage 2 of 3 on worker c is gone: its worker holds it no longer" in world.workers["a"].reasons
    gate.open.set()
    info = await world.calls.wait_for(READY)
    assert info.epoch == 2


async def test_a_worker_that_drains_keeps_its_pipeline_from_taking_anything_new(world: World) -> None:
    await world.calls.deploy(stages=3)
    worker = world.workers["b"]
    worker.node.draining = True
    worker.member.beat_now()
    info = await world.calls.wait_for(DEGRADED)
    assert info.message == "stage 1 of 3 on worker b is closing: its worker is about to end"
    await until(lambda: info.message in world.workers["a"].reasons)
    assert world.workers["a"].closing and not world.workers["a"].degraded.is_set()
    info = (await world.calls.rebalance())[-1].ready
    assert (info.state, [stage.worker for stage in info.stages]) == (READY, ["a", "a", "c"])
    assert [request.reason for request in unloads(world.workers["b"])] == [
        "the pipeline was rebalanced and its old stages are gone: send the request again"
    ]


async def test_stages_that_nobody_wants_are_unloaded(world: World) -> None:
    worker = world.workers["a"]
    worker.stages["stray", 4, 1] = stage_pb2.StageStatus(pipeline_id="stray", epoch=4, index=1, state=stage_pb2.SERVING)
    worker.member.beat_now()
    await until(lambda: not worker.stages)
    (request,) = worker.called("Unload")
    assert request == stage_pb2.UnloadRequest(pipeline_id="stray", index=1, epoch=4)


async def test_watching_pipelines_tells_each_change_and_the_end(world: World) -> None:
    await world.calls.deploy(name="first")
    watching = world.calls.pipeline.Watch(pipeline_pb2.WatchPipelinesRequest())
    seen = []
    done = asyncio.create_task(world.calls.deploy(stages=2, name="second"))
    async for event in watching:
        seen.append((event.pipeline.name, event.pipeline.state, event.removed))
        if seen[-1] == ("second", READY, False):
            await done
            await world.calls.undeploy("second")
        if event.removed:
            break
    watching.cancel()
    assert seen[0] == ("first", READY, False)
    states = list(dict.fromkeys(state for name, state, _ in seen if name == "second"))
    assert states[:3] == [DEPLOYING, READY, pipeline_pb2.UNDEPLOYING]
    assert seen[-1][0] == "second"


async def test_watching_nodes_tells_each_change(world: World) -> None:
    watching = world.calls.registry.Watch(registry_pb2.WatchNodesRequest(kind=registry_pb2.WORKER))
    events = aiter(watching)
    now = {(await anext(events)).node.name for _ in range(3)}
    assert now == {"a", "b", "c"}
    await world.workers["b"].node.stop()
    async for event in events:
        if event.removed:
            assert event.node.id == "worker/b"
            break
    watching.cancel()


async def test_the_controller_lists_itself_and_everybody(world: World) -> None:
    assert await world.calls.nodes(registry_pb2.NODE_KIND_UNSPECIFIED) == dict.fromkeys(
        ("main", "store", "a", "b", "c"), "UP"
    )
    assert await world.calls.nodes(registry_pb2.CONTROLLER) == {"main": "UP"}


async def test_a_rebalance_without_a_better_plan_says_so(world: World) -> None:
    await world.calls.deploy(stages=3)
    events = await world.calls.rebalance()
    assert (events[-1].ready.epoch, events[-1].ready.state) == (1, READY)
    assert events[-1].ready.message.startswith("nothing to change")
    assert len(world.workers["a"].called("Load")) == 1


async def test_a_rebalance_shares_layers_by_how_fast_the_stages_were(world: World) -> None:
    await world.calls.deploy(stages=3)
    before = [stage.layers.end - stage.layers.start for stage in (await world.calls.status()).stages]
    for name, step_ms in (("a", 1.0), ("b", 4.0), ("c", 1.0)):
        (status,) = world.workers[name].stages.values()
        status.step_ms, status.steps = step_ms, 100
        world.workers[name].member.beat_now()
    while [stage.step_ms for stage in (await world.calls.status()).stages] != [1.0, 4.0, 1.0]:
        await asyncio.sleep(0.01)
    info = (await world.calls.rebalance())[-1].ready
    after = [stage.layers.end - stage.layers.start for stage in info.stages]
    assert info.epoch == 2 and after[1] < before[1] and sum(after) == sum(before)


async def test_a_rebalance_loads_beside_switches_and_unloads_the_old_stages(world: World) -> None:
    await world.calls.deploy(stages=4)
    assert world.stages() == [("a", 1, 0), ("a", 1, 1), ("b", 1, 2), ("c", 1, 3)]
    await world.add_workers("d")
    gate = world.workers["d"].gates["Load"] = Gate()
    moving = asyncio.create_task(world.calls.rebalance())
    await gate.arrived.wait()
    info = await world.calls.status()
    assert (info.state, info.epoch, [stage.worker for stage in info.stages]) == (READY, 1, ["a", "a", "b", "c"])
    assert info.message.startswith("rebalancing")
    gate.open.set()
    info = (await moving)[-1].ready
    assert (info.state, info.epoch, [stage.worker for stage in info.stages]) == (READY, 2, ["a", "b", "c", "d"])
    assert world.stages() == [("a", 2, 0), ("b", 2, 1), ("c", 2, 2), ("d", 2, 3)]
    await asyncio.sleep(0.5)  # beats pass: nothing is taken for missing
    assert (await world.calls.status()).state == READY


async def test_a_rebalance_that_fails_leaves_the_pipeline_as_it_was(world: World) -> None:
    await world.calls.deploy(stages=4)
    before = world.stages()
    await world.add_workers("d")
    world.workers["d"].failures["Load"] = NotEnoughMemory("no")
    with pytest.raises(NotEnoughMemory, match="stage 3 on d: no"):
        await world.calls.rebalance()
    await until(lambda: world.stages() == before)
    info = await world.calls.status()
    assert (info.state, info.epoch, info.message, info.progress) == (READY, 1, "", 1.0)


async def test_a_degraded_pipeline_is_rebalanced_onto_the_workers_that_are_left(world: World) -> None:
    await world.calls.deploy(stages=3)
    await world.workers["b"].node.stop()
    assert (
        await world.calls.wait_for(DEGRADED)
    ).message == "stage 1 of 3 on worker b is gone: its worker left the cluster"
    info = (await world.calls.rebalance())[-1].ready
    assert (info.state, info.epoch, [stage.worker for stage in info.stages]) == (READY, 2, ["a", "a", "c"])
    assert [stage for stage in world.stages() if stage[0] != "b"] == [("a", 2, 0), ("a", 2, 1), ("c", 2, 2)]


async def test_a_pipeline_is_undeployed_although_a_worker_is_gone(world: World) -> None:
    await world.calls.deploy(stages=3)
    await world.workers["b"].node.stop()
    await world.calls.wait_for(DEGRADED)
    await world.calls.undeploy()
    assert [stage for stage in world.stages() if stage[0] != "b"] == []


async def test_status_is_fresher_than_the_last_beat_and_waits_for_no_silent_worker(world: World) -> None:
    await world.calls.deploy(stages=2)
    for worker in world.workers.values():
        for status in worker.stages.values():
            status.step_ms, status.steps = 1.5, 7  # and no beat
    info = await world.calls.status()
    assert [(stage.step_ms, stage.steps) for stage in info.stages] == [(1.5, 7)] * 2
    world.workers["a"].gates["Status"] = Gate()
    assert (await world.calls.status()).state == READY


async def test_the_rest_face_plans_deploys_and_tells(here: tuple[World, Controller], world: World) -> None:
    _, controller = here
    tls = world.authority.issue_identity("client", "tester").client_context()
    async with httpx.AsyncClient(base_url=controller.node.http_url, verify=tls, timeout=10) as http:
        plan = (await http.post("/api/v1/pipeline/plan", json={"model": MODEL, "stages": 2})).json()
        assert [stage["worker"] for stage in plan["stages"]] == ["a", "b"]
        events = await http.post("/api/v1/pipeline/deploy", json={"model": MODEL, "stages": 2})
        assert events.headers["content-type"].startswith("text/event-stream")
        assert '"READY"' in events.text.split("data: ")[-1]
        models = (await http.get("/api/v1/pipeline/models")).json()
        assert models["pipelines"] == [{"name": MODEL, "model": MODEL, "state": "READY"}]
        status = (await http.get("/api/v1/pipeline/status", params={"name": MODEL})).json()
        assert len(status["pipelines"][0]["stages"]) == 2
        missing = await http.post("/api/v1/pipeline/undeploy", json={"name": "nope"})
        assert (missing.status_code, missing.json()["error"]["status"]) == (404, "NOT_FOUND")
        assert (await http.post("/api/v1/pipeline/undeploy", json={"name": MODEL})).status_code == 200
        health = (await http.get("/health")).json()
        assert (health["ready"], health["pipelines"], health["ready_pipelines"]) == (True, 0, 0)
        metrics = (await http.get("/metrics")).text
    assert 'eldric_nodes{kind="worker",state="up"} 3.0' in metrics
    assert 'eldric_deploy_seconds_count{operation="deploy",result="OK"} 1.0' in metrics
    assert 'eldric_beats_total{kind="worker"}' in metrics
    assert 'eldric_pipelines{state="ready"} 0.0' in metrics


async def test_a_node_joins_with_a_token_once_and_renews(here: tuple[World, Controller]) -> None:
    world, controller = here
    made = await world.calls.membership.CreateToken(membership_pb2.CreateTokenRequest(kind="worker"))
    token = JoinToken.parse(made.token)
    with pytest.raises(PermissionDenied, match="admits a worker, not a data"):
        await join(controller.node.join_address, token, "data", "x")
    identity = await join(controller.node.join_address, token, "worker", "new")
    assert (identity.kind, identity.name, identity.cluster) == ("worker", "new", "test")
    with pytest.raises(Unauthenticated, match="used up"):
        await join(controller.node.join_address, token, "worker", "newer")
    renewed = await renew(controller.node.grpc_address, identity)
    assert renewed.certificate_pem != identity.certificate_pem


async def test_a_name_that_is_in_use_does_not_join_again(world: World, here: tuple[World, Controller]) -> None:
    _, controller = here
    made = await world.calls.membership.CreateToken(membership_pb2.CreateTokenRequest(unlimited=True))
    with pytest.raises(AlreadyExists, match="worker/a is a member that is running"):
        await join(controller.node.join_address, JoinToken.parse(made.token), "worker", "a")


async def test_a_certificate_of_somebody_else_is_not_issued(here: tuple[World, Controller]) -> None:
    world, controller = here
    csr, _ = make_csr("worker", "b")
    async with channel(
        controller.node.grpc_address, world.authority.issue_identity("worker", "a"), "controller"
    ) as own:
        calls = Calls(own)
        with pytest.raises(PermissionDenied, match="worker/a asks for a certificate of 'worker/b'"), call_errors():
            await calls.membership.Renew(membership_pb2.RenewRequest(csr=csr))
        with pytest.raises(PermissionDenied), call_errors():
            await calls.membership.CreateToken(membership_pb2.CreateTokenRequest())
        with pytest.raises(PermissionDenied), call_errors():
            await calls.undeploy("x")


async def test_another_protocol_version_is_refused_with_both_named(here: tuple[World, Controller]) -> None:
    world, _ = here
    node = registry_pb2.Node(
        id="worker/new", name="new", kind=registry_pb2.WORKER, grpc_address="x:1", incarnation=1, protocol=99
    )
    with pytest.raises(VersionMismatch, match="protocol version 99, this cluster speaks 2"), call_errors():
        await world.calls.registry.Register(registry_pb2.RegisterRequest(node=node))


async def test_a_controller_that_is_asked_to_end_undoes_what_is_half_done(tmp_path: Path) -> None:
    async with controller_here(tmp_path) as (world, controller):
        await world.add_store()
        await world.add_workers("a", "b")
        await world.calls.deploy(name="kept")
        gate = world.workers["b"].gates["Load"] = Gate()
        deploying = asyncio.create_task(world.calls.deploy(stages=2))
        await gate.arrived.wait()
        await controller.node.stop()
        with pytest.raises(EldricError):
            await deploying
        assert [epoch for _, epoch, _ in world.stages()] == [1]
        assert {status.name for worker in world.workers.values() for status in worker.stages.values()} == {"kept"}


def unloads(worker: FakeWorker) -> list[stage_pb2.UnloadRequest]:
    return [request for request in worker.called("Unload") if isinstance(request, stage_pb2.UnloadRequest)]


def connects(worker: FakeWorker) -> list[stage_pb2.ConnectRequest]:
    return [request for request in worker.called("Connect") if isinstance(request, stage_pb2.ConnectRequest)]


async def plan(world: World, **fields: Any) -> pipeline_pb2.DeploymentPlan:
    with call_errors():
        return await world.calls.pipeline.Plan(pipeline_pb2.DeployRequest(**({"model": MODEL} | fields)))


async def until_gone(world: World) -> None:
    """Returns once there is no pipeline any more."""
    async with asyncio.timeout(10):
        while (await world.calls.pipeline.List(pipeline_pb2.ListPipelinesRequest())).pipelines:
            await asyncio.sleep(0.01)
