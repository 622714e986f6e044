"""What can go wrong in the engine.

EngineError                 .status names a gRPC code, so that services map it without knowing the class
├── InvalidModel            a model file that is damaged, hostile or truncated
├── UnsupportedModel        a sound file of a kind that this engine does not run
├── ModelUnreadable         the file's storage failed, or the file shrank, while it was read
├── LoadCancelled           loading was cancelled by its caller
├── InvalidLayers           a layer range that is empty or not in the model
├── InvalidPrompt           a chat that its template refuses, or a token id that the vocabulary does not have
├── InvalidSampling         a sampling parameter out of its range
├── InvalidStep             a step that the stage cannot take: bad slot, position, shape or token id
├── OutOfMemory             weights, KV cache or compute buffers do not fit
└── LibraryError            ggml is missing, of the wrong version or lays out its structs differently
"""

from pathlib import Path


class EngineError(Exception):
    """Base of everything that the engine raises on purpose."""

    status = "INTERNAL"


class InvalidModel(EngineError):
    """A model file breaks its format. Says what is wrong, in which file, at which byte."""

    status = "INVALID_ARGUMENT"

    def __init__(self, problem: str, path: Path | str | None = None, offset: int | None = None) -> None:
        self.problem, self.path, self.offset = problem, path, offset
        where = "" if path is None else f"{path}: "
        at = "" if offset is None else f" (at byte {offset})"
        super().__init__(f"{where}{problem}{at}")


class UnsupportedModel(EngineError):
    """The file is sound, but no family, tensor type or tokenizer of this engine fits it. Names the known ones."""

    status = "INVALID_ARGUMENT"


class InvalidLayers(EngineError):
    """A layer range is empty, negative or reaches outside the model. Says which."""

    status = "INVALID_ARGUMENT"


class InvalidPrompt(EngineError):
    """A prompt that cannot be made: the chat template refuses the messages, or a token id is not in the vocabulary."""

    status = "INVALID_ARGUMENT"


class InvalidSampling(EngineError):
    """A sampling parameter out of its range. Names the field, what it may be and what it was."""

    status = "INVALID_ARGUMENT"

    def __init__(self, field: str, allowed: str, value: object) -> None:
        self.field, self.allowed, self.value = field, allowed, value
        super().__init__(f"{field} must be {allowed}, not {value!r}")


class ModelUnreadable(EngineError):
    """The storage under a model file failed, or the file shrank since its header was read. Worth another try."""

    status = "UNAVAILABLE"


class LoadCancelled(EngineError):
    """The caller asked to stop loading; everything that was loaded is given back."""

    status = "CANCELLED"


class InvalidStep(EngineError):
    """A step breaks the stage's bounds; nothing was computed and the KV cache is unchanged."""

    status = "INVALID_ARGUMENT"


class OutOfMemory(EngineError):
    """The device cannot hold what was asked. Says how many bytes were asked and what for."""

    status = "RESOURCE_EXHAUSTED"


class LibraryError(EngineError):
    """The ggml library cannot be used. Says which library, which version and what was expected."""

    status = "FAILED_PRECONDITION"
