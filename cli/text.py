"""eldric-cli run and chat: text out of a pipeline."""

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from eldric.cli import options
from eldric.cli.connect import client_of
from eldric.cli.output import err, out, print_json
from eldric.client import Client, Delta, Event, Finished
from eldric.errors import EldricError, Unavailable

app = typer.Typer()

Temperature = Annotated[float | None, typer.Option("--temperature", help="0: greedy. Default: 0.8.")]
TopK = Annotated[int | None, typer.Option("--top-k", help="Sample from the best K. Default: 40.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Sample from the best P of probability. Default: 0.95.")]
MinP = Annotated[float | None, typer.Option("--min-p", help="Least probability, of the best one's. Default: 0.05.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Same seed, same answer. Default: random.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help="0: until the model stops.")]


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="Name of a pipeline.")],
    prompt: Annotated[str, typer.Argument(help="What to answer; - reads it from stdin.")],
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without a chat template.")] = False,
    system: Annotated[str, typer.Option("--system", help="System message.")] = "",
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    max_tokens: MaxTokens = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this text; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Do not end at the model's end token.")] = False,
    folder: options.Dir = None,
    controller: options.Controller = None,
    as_json: options.Json = False,
) -> None:
    """Answer one prompt."""
    text = sys.stdin.read() if prompt == "-" else prompt
    sampling: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "max_tokens": max_tokens,
        "stop": stop or [],
    }
    with client_of(folder, controller) as client:
        if raw:
            events = client.generate(model, text, ignore_eos=ignore_eos, **sampling)
        else:
            events = client.chat(model, _messages(system, text), ignore_eos=ignore_eos, **sampling)
        if as_json:
            print_json(_whole(events))
            return
        finished = _stream(events)
    _show_speed(finished)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Name of a pipeline.")],
    system: Annotated[str, typer.Option("--system", help="System message.")] = "",
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    max_tokens: MaxTokens = 0,
    folder: options.Dir = None,
    controller: options.Controller = None,
) -> None:
    """Talk with a model. /new forgets the conversation, /bye or Ctrl-D ends it, Ctrl-C stops an answer."""
    sampling: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "max_tokens": max_tokens,
    }
    with client_of(folder, controller) as client:
        client.status(model)
        messages = _messages(system)
        while (line := _read_line()) is not None:
            if line == "/new":
                messages = _messages(system)
            elif line:
                messages.append({"role": "user", "content": line})
                messages.append({"role": "assistant", "content": _reply(client, model, messages, sampling)})


def _messages(system: str, *user: str) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *({"role": "user", "content": text} for text in user)]


def _read_line() -> str | None:
    """What the person says; None when they are done."""
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None
    return None if line in ("/bye", "/exit", "/quit") else line


def _reply(client: Client, model: str, messages: list[dict[str, str]], sampling: dict[str, Any]) -> str:
    """Stream one answer. An interrupt or an error ends the answer, not the conversation."""
    said: list[str] = []
    events = client.chat(model, messages, **sampling)
    try:
        _stream(events, said)
    except KeyboardInterrupt:
        out.print()
    except EldricError as error:
        err.print(f"\nerror: {error.message}", style="red")
    return "".join(said)


def _stream(events: Iterator[Event], said: list[str] | None = None) -> Finished:
    for event in events:
        match event:
            case Delta(text=text):
                sys.stdout.write(text)
                sys.stdout.flush()
                if said is not None:
                    said.append(text)
            case Finished():
                sys.stdout.write("\n")
                sys.stdout.flush()
                return event
    raise Unavailable("the generation ended without a word")


def _whole(events: Iterator[Event]) -> dict[str, Any]:
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
                        "total_tokens": event.prompt_tokens + event.completion_tokens,
                    },
                    "timings": {
                        "queue_ms": round(event.queue_ms, 3),
                        "prompt_ms": round(event.prompt_ms, 3),
                        "generation_ms": round(event.generation_ms, 3),
                        "tokens_per_second": round(_speed(event), 3),
                    },
                }
    raise Unavailable("the generation ended without a word")


def _speed(finished: Finished) -> float:
    """Tokens per second after the first one."""
    if finished.generation_ms <= 0:
        return 0.0
    return max(0, finished.completion_tokens - 1) / finished.generation_ms * 1000


def _show_speed(finished: Finished) -> None:
    if err.is_terminal:
        first = finished.queue_ms + finished.prompt_ms
        err.print(
            f"{finished.completion_tokens} tokens, first after {first:.0f} ms, then {_speed(finished):.1f} per second",
            style="dim",
        )
