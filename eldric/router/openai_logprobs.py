"""Logprobs in OpenAI's two shapes. Tokens are shown when their text is: those of a stop string never are."""

from collections.abc import Sequence
from typing import Any

from eldric.router.generation import Token
from eldric.router.vocabularies import Vocabulary

#: What OpenAI reports for a token that is out of the question; JSON has no minus infinity.
LEAST = -9999.0


class _Held:
    """The tokens of one choice: those that wait for their text, and how many went out."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._waiting: list[Token] = []
        self._out = 0
        self._shown: list[Any] = []

    def _take(self, tokens: Sequence[Token], settled: int | None) -> list[Token]:
        """Adds `tokens`; takes those of the first `settled` of the generation, None for all, that are not out yet."""
        self._waiting += tokens
        count = len(self._waiting) if settled is None else max(0, settled - self._out)
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        self._out += len(taken)
        return taken

    def _text(self, token: int) -> tuple[str, bytes]:
        raw = self._vocabulary.token_bytes(token, special=True)
        return raw.decode("utf-8", "replace"), raw


class ChatLogprobs(_Held):
    """{"content": [{"token", "logprob", "bytes", "top_logprobs"}]}."""

    def release(self, tokens: Sequence[Token], settled: int | None) -> dict[str, Any] | None:
        """What can be shown now; None for nothing."""
        entries = [
            {**self._entry(each.id, each.logprob), "top_logprobs": [self._entry(*pair) for pair in each.top]}
            for each in self._take(tokens, settled)
        ]
        return {"content": entries, "refusal": None} if entries else None

    def keep(self, tokens: Sequence[Token], settled: int | None) -> None:
        """For an answer that is not streamed."""
        released = self.release(tokens, settled)
        self._shown += released["content"] if released else []

    def whole(self) -> dict[str, Any]:
        return {"content": self._shown, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, raw = self._text(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}


class CompletionLogprobs(_Held):
    """{"tokens", "token_logprobs", "top_logprobs", "text_offset"}: parallel lists."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self._offset = 0  # characters of the answer before the next token

    def release(self, tokens: Sequence[Token], settled: int | None) -> dict[str, Any] | None:
        """What can be shown now; None for nothing."""
        entries = [self._entry(each) for each in self._take(tokens, settled)]
        return _columns(entries) if entries else None

    def keep(self, tokens: Sequence[Token], settled: int | None) -> None:
        """For an answer that is not streamed."""
        self._shown += [self._entry(each) for each in self._take(tokens, settled)]

    def whole(self) -> dict[str, Any]:
        return _columns(self._shown)

    def _entry(self, token: Token) -> tuple[str, float, dict[str, float], int]:
        offset = self._offset
        self._offset += sum(byte & 0xC0 != 0x80 for byte in self._vocabulary.token_bytes(token.id))
        top: dict[str, float] = {}
        for id, logprob in token.top:
            top.setdefault(self._text(id)[0], _finite(logprob))
        return self._text(token.id)[0], _finite(token.logprob), top, offset


def _columns(entries: Sequence[tuple[str, float, dict[str, float], int]]) -> dict[str, Any]:
    return {
        "tokens": [entry[0] for entry in entries],
        "token_logprobs": [entry[1] for entry in entries],
        "top_logprobs": [entry[2] for entry in entries],
        "text_offset": [entry[3] for entry in entries],
    }


def _finite(logprob: float | None) -> float:
    """Six digits: it was computed in 32 bits."""
    return LEAST if logprob is None or not logprob > LEAST else round(logprob, 6)
