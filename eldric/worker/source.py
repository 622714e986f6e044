"""Finds the model file that a stage was planned for, and makes sure that it is that file."""

from pathlib import Path, PurePosixPath

from eldric.engine.gguf import ModelFile
from eldric.errors import InvalidRequest, NotFound, NotReady
from eldric.v1 import stage_pb2


def open_model(source: stage_pb2.ModelSource, mount: Path | None) -> ModelFile:
    """Open a model's file (all of a split set) below the mount, or below the store's own folder.

    Raises NotFound when it is not visible here, NotReady when it is another file than the one that was planned,
    InvalidModel when it is damaged.
    """
    folder = mount or Path(source.folder)
    if not folder.is_absolute():
        raise InvalidRequest(f"the model store's folder {source.folder!r} is no absolute path")
    paths = [path_in(folder, file.path) for file in source.files]
    if not paths:
        raise InvalidRequest("the load request names no model file")
    for path, file in zip(paths, source.files, strict=True):
        _check_size(path, file.size_bytes, mount)
    try:
        model = ModelFile.open(paths[0])
    except OSError as error:
        raise NotReady(f"{paths[0]} cannot be read on this worker: {error.strerror}") from error
    if source.header_sha256 and bytes.fromhex(model.header_sha256()) != source.header_sha256:
        model.close()
        raise NotReady(f"{paths[0]} is not the file that the model store has: its header differs")
    return model


def path_in(folder: Path, relative: str) -> Path:
    """Where a file of the model store is, below its folder. Raises InvalidRequest for a way out of it."""
    pure = PurePosixPath(relative)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\0" in relative:
        raise InvalidRequest(f"{relative!r} does not lie in the model store")
    return folder.joinpath(*pure.parts)


def _check_size(path: Path, size_bytes: int, mount: Path | None) -> None:
    try:
        seen = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = "" if mount else "; mount the model store here and start the worker with --models-dir FOLDER"
        raise NotFound(f"no file {path} on this worker{hint}") from error
    except OSError as error:
        raise NotReady(f"{path} cannot be read on this worker: {error.strerror}") from error
    if seen != size_bytes:
        raise NotReady(f"{path} has {seen} bytes here and {size_bytes} in the model store")
