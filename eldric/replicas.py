"""When two data workers hold the same model."""

from eldric.v1 import stage_pb2


def is_same(one: stage_pb2.ModelSource, other: stage_pb2.ModelSource) -> bool:
    """Whether two sources are the same files: header and sizes, and the sums of the files where both are known."""
    return (
        one.header_sha256 == other.header_sha256
        and len(one.files) == len(other.files)
        and all(
            a.size_bytes == b.size_bytes and (a.sha256 == b.sha256 or not a.sha256 or not b.sha256)
            for a, b in zip(one.files, other.files, strict=True)
        )
    )
