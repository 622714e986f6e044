"""Messages to values and back: a real model's numbers, defaults, and what is refused."""

import shutil
from pathlib import Path

import pytest

from eldric.controller import convert
from eldric.controller.costs import DEFAULT_CHUNK, ModelShape, Options
from eldric.controller.planner import Order, plan
from eldric.controller.seating import WorkerView
from eldric.data.convert import model_metadata
from eldric.data.store import ModelStore
from eldric.engine.gguf import ModelFile
from eldric.engine.shard import LayerRange, memory_estimate, model_costs
from eldric.engine.spec import spec_of
from eldric.errors import InvalidRequest
from eldric.v1 import common_pb2, model_store_pb2, pipeline_pb2, registry_pb2, stage_pb2
from tests.models import storyteller


@pytest.fixture
def metadata(tmp_path: Path) -> model_store_pb2.ModelMetadata:
    """What a data worker says of a real model."""
    shutil.copy(storyteller(), tmp_path / "tale.gguf")
    return model_metadata(ModelStore(tmp_path).get("tale"))


def shape_of(layers: int = 2, context: int = 8192) -> ModelShape:
    costs = model_store_pb2.ModelCosts(layer_bytes=[10] * layers, kv_bytes_per_cell_per_layer=4)
    info = model_store_pb2.ModelInfo(id="m", context=context)
    return convert.model_shape(model_store_pb2.ModelMetadata(info=info, costs=costs))


def test_a_plan_counts_what_the_worker_will_count(metadata: model_store_pb2.ModelMetadata) -> None:
    """The planner knows a model by the data worker's message, a worker by the file: both come to the same bytes."""
    shape = convert.model_shape(metadata)
    made = plan([WorkerView(name, 1 << 30) for name in "abc"], shape, Order(Options(context=300, slots=2), stages=3))
    with ModelFile.open(storyteller()) as file:
        costs = model_costs(file, spec_of(file))
    for stage in made.stages:
        estimate = memory_estimate(costs, LayerRange(stage.start, stage.end), context=300, slots=2, chunk=DEFAULT_CHUNK)
        assert (stage.weights_bytes, stage.kv_bytes, stage.compute_bytes) == (
            estimate.weights,
            estimate.kv,
            estimate.compute,
        )


def test_options_that_are_left_out_take_the_defaults_of_the_contract() -> None:
    order = convert.order_of(pipeline_pb2.DeployRequest(), shape_of())
    assert order.options == Options(context=4096, slots=4, chunk=64, exact=None, weights="auto", kv_type="f16")
    assert convert.order_of(pipeline_pb2.DeployRequest(), shape_of(context=512)).options.context == 512
    given = common_pb2.StageOptions(context=9000, slots=1, chunk=7, lanes=2, threads=3, exact=False, trace=True)
    order = convert.order_of(pipeline_pb2.DeployRequest(options=given), shape_of())
    assert convert.options_message(order.options) == common_pb2.StageOptions(
        context=9000, slots=1, chunk=7, lanes=2, threads=3, exact=False, trace=True, weights="auto", kv_type="f16"
    )


def test_a_model_with_a_problem_is_refused_with_it() -> None:
    info = model_store_pb2.ModelInfo(id="m", problem="architecture 'mamba' is not known")
    with pytest.raises(InvalidRequest, match="m cannot be deployed: architecture 'mamba' is not known"):
        convert.model_shape(model_store_pb2.ModelMetadata(info=info))
    with pytest.raises(InvalidRequest, match="does not say what its layers weigh"):
        convert.model_shape(model_store_pb2.ModelMetadata(info=model_store_pb2.ModelInfo(id="m")))


@pytest.mark.parametrize(
    "wrong",
    [
        dict(id="worker/b"),
        dict(name="", id="worker/"),
        dict(kind=registry_pb2.NODE_KIND_UNSPECIFIED),
        dict(kind=99),
        dict(grpc_address=""),
        dict(incarnation=0),
    ],
)
def test_a_node_that_does_not_say_who_it_is_is_refused(wrong: dict[str, object]) -> None:
    fields = dict(id="worker/a", name="a", kind=registry_pb2.WORKER, grpc_address="a:1", incarnation=7, protocol=1)
    assert convert.node_info(registry_pb2.Node(**fields)).id == "worker/a"  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest):
        convert.node_info(registry_pb2.Node(**(fields | wrong)))  # type: ignore[arg-type]


def test_a_stage_state_of_a_newer_worker_does_no_harm() -> None:
    status = stage_pb2.StageStatus.FromString(b"\x0a\x01p\x18\x01\x38\x63")  # epoch 1, state 99
    assert (status.pipeline_id, status.state) == ("p", 99)
    assert convert.stage_report(status).key.epoch == 1
