"""Prompts to token ids, off the event loop, for a model that was found by its name."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from eldric.engine.chat import ChatTemplate
from eldric.errors import InvalidRequest
from eldric.router.errors import PromptTooLong
from eldric.router.pipelines import Pipelines, Route
from eldric.router.vocabularies import Vocabularies, Vocabulary

Result = TypeVar("Result")

#: Text up to this size is encoded on the event loop: it takes less time than a thread needs to wake up.
SHORT_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of a chat, and what is to come after them."""

    messages: Sequence[Mapping[str, str]]
    continues: bool = False  # more of the last message, instead of a new one
    opens: bool = True  # a new one of the assistant, instead of whatever the model likes
    variables: Mapping[str, Any] = field(default_factory=dict)  # further ones of the template

    def rendered_by(self, template: ChatTemplate) -> str:
        """Raises InvalidPrompt."""
        if self.continues:
            return template.render_open(self.messages, **self.variables)
        return template.render(self.messages, add_generation_prompt=self.opens, **self.variables)


@dataclass(frozen=True, slots=True)
class Target:
    """A model that was asked for: its ready pipelines and its vocabulary."""

    name: str
    routes: tuple[Route, ...]
    vocabulary: Vocabulary
    executor: Executor

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have. 0: only the head knows."""
        contexts = [route.context for route in self.routes]
        return 0 if 0 in contexts else max(contexts)

    async def render(self, conversation: Conversation) -> list[int]:
        """A conversation by the model's chat template. Raises InvalidPrompt, PromptTooLong."""
        self._check_size(sum(len(message["content"]) for message in conversation.messages))
        vocabulary = self.vocabulary

        def work() -> list[int]:
            return vocabulary.tokenizer.encode(conversation.rendered_by(vocabulary.template), special=True)

        return self.checked(await self._in_thread(work))

    async def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """A prompt that is continued as it is, with the begin token if the model wants it, or as `add_bos` says. Raises
        PromptTooLong."""
        return self.checked(await self.tokenize(text, special=True, add_bos=add_bos))

    async def tokenize(self, text: str, *, special: bool, add_bos: bool | None = None) -> list[int]:
        """Token ids of a text, see Tokenizer.encode. Raises PromptTooLong for one that is far too long to try."""
        self._check_size(len(text))
        encode = self.vocabulary.tokenizer.encode
        if len(text) <= SHORT_CHARACTERS:
            return encode(text, special=special, add_bos=add_bos)
        return await self._in_thread(lambda: encode(text, special=special, add_bos=add_bos))

    async def detokenize(self, ids: Sequence[int]) -> str:
        """Raises InvalidPrompt for an id outside the vocabulary."""
        decode = self.vocabulary.tokenizer.decode
        return await self._in_thread(lambda: decode(ids, special=True))

    def checked(self, tokens: list[int]) -> list[int]:
        """The tokens of a prompt. Raises PromptTooLong when they leave no room for an answer, InvalidRequest when there
        are none or one is not in the vocabulary."""
        size = self.vocabulary.tokenizer.vocab_size
        if not tokens:
            raise InvalidRequest("the prompt is empty")
        if 0 < self.context <= len(tokens):  # before each of them is looked at: there may be millions
            raise PromptTooLong(len(tokens), self.context)
        if min(tokens) < 0 or max(tokens) >= size:
            raise InvalidRequest(f"a token id lies outside the vocabulary, [0, {size})")
        return tokens

    def _check_size(self, characters: int) -> None:
        """Refuses what cannot fit before any time is spent on it."""
        least = characters // self.vocabulary.longest_token_bytes
        if 0 < self.context <= least:
            raise PromptTooLong(least, self.context, at_least=True)

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self.executor, work)


class Prompts:
    """Finds models by name."""

    def __init__(self, pipelines: Pipelines, vocabularies: Vocabularies, executor: Executor) -> None:
        self._pipelines = pipelines
        self._vocabularies = vocabularies
        self._executor = executor

    async def find(self, name: str) -> Target:
        """Raises ModelNotFound, PipelineLoading, PipelineLost, and what Vocabularies.get raises."""
        first, *others = await self._pipelines.settled_routes(name)
        # Replicas of the very same file only: a model may have been replaced in the store under its name.
        same = (first, *(each for each in others if each.source.header_sha256 == first.source.header_sha256))
        return Target(name, same, await self._vocabularies.get(first.source), self._executor)
