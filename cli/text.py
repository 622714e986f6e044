"""eldric-cli run, chat and embed: text, or a vector, out of a pipeline."""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from eldric.cli import interrupts, options
from eldric.cli.connect import client_of
from eldric.cli.failures import failure_of
from eldric.cli.generating import speed_line, stream, whole
from eldric.cli.options import option
from eldric.cli.output import err, print_json
from eldric.client import Event
from eldric.errors import EldricError, InvalidRequest

app = options.new_app()

System = Annotated[str, option("--system", metavar="TEXT", help="System message.")]
Temperature = Annotated[float | None, option("--temperature", metavar="T", help="0: greedy. Default: 0.8.")]
TopK = Annotated[int | None, option("--top-k", metavar="K", help="Sample from the best K. Default: 40.")]
TopP = Annotated[
    float | None,
    option("--top-p", metavar="P", help="Sample from the best P of probability. Default: 0.95."),
]
MinP = Annotated[
    float | None,
    option("--min-p", metavar="P", help="Least probability, of the best one's. Default: 0.05."),
]
Seed = Annotated[
    int | None,
    option("--seed", metavar="N", help="Same seed, same answer. Default: random."),
]
MaxTokens = Annotated[
    int,
    option("--max-tokens", "-n", metavar="N", help="0, -1 or left out: until the model stops."),
]
Stop = Annotated[
    list[str] | None,
    option("--stop", metavar="TEXT", help="End before this text; may be repeated."),
]

#: What a person gets who says nothing: llama.cpp's settings.
_DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}

#: As llama.cpp and Ollama spell a --max-tokens that limits nothing; 0 says the same.
_NO_LIMIT = -1


@app.command()
def run(
    model: options.Pipeline,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to answer; - reads it from stdin.")],
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without a chat template.")] = False,
    system: System = "",
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    max_tokens: MaxTokens = 0,
    stop: Stop = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Do not end at the model's end token.")] = False,
    folder: options.Dir = None,
    controller: options.Controller = None,
    as_json: options.Json = False,
) -> None:
    """Answer one prompt. Ctrl-C cancels it."""
    if raw and system:
        raise InvalidRequest("--system needs the chat template that --raw leaves out")
    text = sys.stdin.read() if prompt == "-" else prompt
    settings = _settings(temperature, top_k, top_p, min_p, seed, max_tokens)
    settings |= {"stop": stop or [], "ignore_eos": ignore_eos}
    with client_of(folder, controller) as client:
        if raw:
            events = client.generate(model, text, **settings)
        else:
            events = client.chat(model, _messages(system, text), **settings)
        with contextlib.closing(events):
            if as_json:
                print_json(whole(events))
                return
            finished = stream(events)
    if err.is_terminal:
        err.print(speed_line(finished), style="dim")


@app.command()
def chat(
    model: options.Pipeline,
    system: System = "",
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    max_tokens: MaxTokens = 0,
    folder: options.Dir = None,
    controller: options.Controller = None,
    as_json: options.JsonLines = False,
) -> None:
    """Talk with a model.

    /new forgets the conversation, /bye or Ctrl-D ends it, Ctrl-C stops an answer. Where stdin is no terminal, each of
    its lines is a message. With --json each answer is one object a line, as `run --json` prints it, or
    {"error": {"code", "message"}}.
    """
    settings = _settings(temperature, top_k, top_p, min_p, seed, max_tokens)
    with client_of(folder, controller) as client:
        client.status(model)  # a wrong name is said before anybody types
        conversation = _messages(system)
        for line in _lines():
            if line == "/new":
                conversation = _messages(system)
            elif line.startswith("/") and " " not in line:
                err.print(f"{line} is no command; there are /new and /bye", style="yellow")
            else:
                question = {"role": "user", "content": line}
                events = client.chat(model, [*conversation, question], **settings)
                with contextlib.closing(events):
                    answer = _answer_json(events) if as_json else _answer(events)
                if answer:
                    conversation += [question, {"role": "assistant", "content": answer}]


@app.command()
def embed(
    model: options.Pipeline,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to embed; - reads it from stdin.")],
    folder: options.Dir = None,
    controller: options.Controller = None,
    as_json: options.Json = False,
) -> None:
    """Print a text as a vector.

    It is what the model makes of the last token, scaled to length 1: a JSON array, or with --json an object with
    embedding, dimensions and usage. The cosine of two texts' vectors is their product.
    """
    with client_of(folder, controller) as client:
        found = client.embed(model, sys.stdin.read() if text == "-" else text)
    if as_json:
        usage = {"prompt_tokens": found.prompt_tokens, "total_tokens": found.prompt_tokens}
        print_json({"embedding": found.vector, "dimensions": len(found.vector), "usage": usage})
    else:
        sys.stdout.write(json.dumps(found.vector) + "\n")


def _settings(
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int | None,
    max_tokens: int,
) -> dict[str, Any]:
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    chosen = {name: value for name, value in given.items() if value is not None}
    return {**_DEFAULTS, **chosen, "max_tokens": 0 if max_tokens == _NO_LIMIT else max_tokens}


def _messages(system: str, *user: str) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *({"role": "user", "content": text} for text in user)]


def _lines() -> Iterator[str]:
    """What the person says, until they are done. Ctrl-C at the prompt ends the command."""
    asking = sys.stdin.isatty()
    if asking:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (gives input() editing and a history)
    while True:
        try:
            with interrupts.heard():
                line = input("> " if asking else "").strip()
        except EOFError:
            if asking:
                print()
            return
        if line in ("/bye", "/exit", "/quit"):
            return
        if line:
            yield line


def _answer(events: Iterator[Event]) -> str:
    """Stream one answer. An interrupt or an error ends the answer, not the conversation."""
    said: list[str] = []
    try:
        finished = stream(events, said)
        if err.is_terminal:
            err.print(speed_line(finished), style="dim")
    except KeyboardInterrupt:
        err.print("stopped", style="dim")
    except EldricError as error:
        err.print(f"error: {error.message}", style="red")
    return "".join(said)


def _answer_json(events: Iterator[Event]) -> str:
    try:
        answer = whole(events)
    except EldricError as error:
        failure = failure_of(error)
        answer = {"error": {"code": failure.code, "message": failure.message}}
    print_json(answer)
    return str(answer.get("text", ""))
