"""A generation's events as text on stdout, or as what --json prints of it."""

import sys
from collections.abc import Iterator
from typing import Any

from eldric.cli.showing import shown
from eldric.client import Delta, Event, Finished
from eldric.errors import Unavailable


def stream(events: Iterator[Event], said: list[str] | None = None) -> Finished:
    """Write the text as it comes, and a line's end after it. `said` gets its pieces, also of an answer that breaks
    off."""
    column = 0
    try:
        for event in events:
            match event:
                case Delta(text=text):
                    sys.stdout.write(shown(text, sys.stdout))
                    sys.stdout.flush()
                    column = len((" " * column + text).rpartition("\n")[2])
                    if said is not None:
                        said.append(text)
                case Finished():
                    return event
        raise Unavailable("the generation ended without a word")
    finally:
        if column:
            sys.stdout.write("\n")
            sys.stdout.flush()


def whole(events: Iterator[Event]) -> dict[str, Any]:
    """A generation as one object: text, tokens (ids), finish_reason, usage and timings in milliseconds."""
    text: list[str] = []
    tokens: list[int] = []
    for event in events:
        match event:
            case Delta():
                text.append(event.text)
                tokens.extend(token.id for token in event.tokens)
            case Finished():
                return {
                    "text": "".join(text),
                    "tokens": tokens,
                    "finish_reason": event.reason,
                    "usage": {
                        "prompt_tokens": event.prompt_tokens,
                        "completion_tokens": event.completion_tokens,
                        "cached_tokens": event.cached_tokens,
                        "total_tokens": event.prompt_tokens + event.completion_tokens,
                    },
                    "timings": {
                        "queue_ms": round(event.queue_ms, 3),
                        "prompt_ms": round(event.prompt_ms, 3),
                        "generation_ms": round(event.generation_ms, 3),
                        "tokens_per_second": round(speed(event), 3),
                    },
                }
    raise Unavailable("the generation ended without a word")


def speed(finished: Finished) -> float:
    """Tokens per second after the first one."""
    if finished.generation_ms <= 0:
        return 0.0
    return max(0, finished.completion_tokens - 1) / finished.generation_ms * 1000


def speed_line(finished: Finished) -> str:
    """For people."""
    first = finished.queue_ms + finished.prompt_ms
    after = f", then {speed(finished):.1f} per second" if finished.completion_tokens > 1 else ""
    return f"{finished.completion_tokens} tokens, first after {first:.0f} ms{after}"
