"""What a receiver wants a link's hello to say."""

from eldric.transport.frame import MAX_INDEX, PROTOCOL_VERSION
from eldric.v1 import frame_pb2


def hello_problem(hello: frame_pb2.LinkHello, pipeline_id: str) -> str | None:
    """Why a stage of that pipeline does not want the link; None when it does."""
    if hello.protocol_version != PROTOCOL_VERSION:
        return f"protocol version {hello.protocol_version}, this stage speaks {PROTOCOL_VERSION}"
    if hello.pipeline_id != pipeline_id:
        return f"pipeline {hello.pipeline_id!r}, this is a stage of {pipeline_id!r}"
    if hello.from_stage > MAX_INDEX:
        return f"stage {hello.from_stage} is out of range"
    return None
