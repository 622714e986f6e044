"""Loads that tests ask of workers. Needs no more than the worker itself: a virtual machine's guest imports it."""

from eldric.v1 import common_pb2, stage_pb2


def middle_stage(source: stage_pb2.ModelSource, first: int, last: int, pipeline: str = "p") -> stage_pb2.LoadRequest:
    """Layers [first, last) as a stage in the middle, with its weights mapped."""
    return stage_pb2.LoadRequest(
        pipeline_id=pipeline,
        name=pipeline,
        epoch=1,
        index=1,
        stage_count=3,
        layers=common_pb2.LayerRange(start=first, end=last),
        source=source,
        options=common_pb2.StageOptions(context=64, slots=1, threads=1, chunk=16, weights="mapped"),
    )
