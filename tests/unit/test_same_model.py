"""Which data workers count as holding the files that were planned."""

from eldric.replicas import is_same
from eldric.v1 import stage_pb2


def source(header: bytes = b"h", *files: stage_pb2.ModelFile) -> stage_pb2.ModelSource:
    return stage_pb2.ModelSource(header_sha256=header, files=files or [file()])


def file(size_bytes: int = 7, sha256: bytes = b"s") -> stage_pb2.ModelFile:
    return stage_pb2.ModelFile(path="a/b.gguf", size_bytes=size_bytes, sha256=sha256)


def test_files_are_the_same_by_header_sizes_and_what_sums_are_known() -> None:
    assert is_same(source(), source())
    assert is_same(source(), source(b"h", file(sha256=b"")))
    assert not is_same(source(), source(b"i"))
    assert not is_same(source(), source(b"h", file(8)))
    assert not is_same(source(), source(b"h", file(sha256=b"t"))), "the same header, other weights"
    assert not is_same(source(), source(b"h", file(), file()))
