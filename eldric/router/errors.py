"""What can go wrong in a router besides the services' own errors; each says what a client can do.

EldricError
├── InvalidRequest
│   ├── InvalidParameter    a field of an HTTP request; `param` names it, `code` is OpenAI's word for the reason
│   └── PromptTooLong       the prompt does not fit the context; both numbers are named
├── NotFound
│   └── ModelNotFound       nothing of that name is deployed; what is, is named
├── QueueIsFull
│   └── RouterIsFull        as many generations run, or bytes of requests come, as this router takes
└── Unavailable
    ├── PipelineLoading     `progress` (0 to 1) of the load
    ├── PipelineLost        a stage is lost, or the head cannot be reached
    └── RouterDraining      this router is about to end
"""

from eldric.errors import InvalidRequest, NotFound, QueueIsFull, Unavailable

#: Longest name or value that a message quotes, in characters.
MAX_QUOTED = 80


class InvalidParameter(InvalidRequest):
    def __init__(self, message: str, param: str | None, code: str = "invalid_value", http_code: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.http_code = param, code, http_code


class PromptTooLong(InvalidRequest):
    def __init__(self, tokens: int, context: int, *, at_least: bool = False) -> None:
        """`at_least`: the prompt was not tokenized, because it has this many tokens whatever they are."""
        count = f"at least {tokens}" if at_least else str(tokens)
        super().__init__(
            f"the prompt has {count} tokens, and this model's context of {context} tokens must hold prompt and answer"
        )
        self.tokens, self.context = tokens, context
        self.param: str | None = None  # the field of an HTTP request


class ModelNotFound(NotFound):
    def __init__(self, name: str, known: list[str]) -> None:
        there_is = f"deployed are: {', '.join(known)}" if known else "no model is deployed"
        super().__init__(f"the model {name[:MAX_QUOTED]!r} is not deployed; {there_is}")


class RouterIsFull(QueueIsFull):
    pass


class PipelineLoading(Unavailable):
    retry_after_s = 2.0

    def __init__(self, name: str, progress: float, message: str = "") -> None:
        detail = f" ({message})" if message else ""
        super().__init__(f"the model {name!r} is loading, {progress:.0%} done{detail}; try again soon")
        self.progress = progress


class PipelineLost(Unavailable):
    retry_after_s = 5.0


class RouterDraining(Unavailable):
    retry_after_s = 1.0

    def __init__(self) -> None:
        super().__init__("this router is about to end and takes no new requests")
