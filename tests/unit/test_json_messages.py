"""Messages as JSON and back."""

import json

import pytest

from eldric import errors
from eldric.json_messages import from_json, set_text, to_json
from eldric.v1 import common_pb2, pipeline_pb2, stage_pb2


def test_text_becomes_each_kind_of_field() -> None:
    request = pipeline_pb2.DeployRequest()
    for path, values in {
        "model": ["m"],
        "stages": ["3"],
        "layers": ["1", "2"],
        "insecure_tensors": ["true"],
        "options.exact": ["0"],
        "options.kvType": ["f32"],
    }.items():
        set_text(request, path, values)
    assert request == pipeline_pb2.DeployRequest(
        model="m",
        stages=3,
        layers=[1, 2],
        insecure_tensors=True,
        options=common_pb2.StageOptions(exact=False, kv_type="f32"),
    )


@pytest.mark.parametrize("text", ["x", "-1", "1.5", "", " 1", "99999999999"])
def test_text_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="stages"):
        set_text(pipeline_pb2.DeployRequest(), "stages", [text])


def test_messages_survive_json() -> None:
    options = common_pb2.StageOptions(exact=False)
    status = stage_pb2.StageStatus(steps=2**63, dropped_frames={"stale": 7}, options=options, step_ms=0.5)
    again = stage_pb2.StageStatus()
    from_json(json.dumps(to_json(status)).encode(), again)
    assert again == status
    assert to_json(status)["dropped_frames"] == {"stale": 7}
    assert to_json(status)["steps"] == str(2**63)
