"""Token ids in, text to deliver out: no character is cut in two, and nothing of a stop string gets through."""

import codecs
from collections.abc import Sequence

from eldric.engine.errors import InvalidSampling
from eldric.engine.tokenizer import Tokenizer


class TextStream:
    """Turns one generation's tokens into text, piece by piece.

    The pieces together are the decoded tokens, cut where a stop string begins. Of several stop strings the one that is
    complete first counts (of two that end together, the longer), so the cut does not depend on how tokens split the
    text. `stopped` is that stop string, or None. Held back are only the bytes of an unfinished character and text that
    a stop string may begin with.
    """

    __slots__ = ("_decoder", "_drop_space", "_held", "_special", "_stop", "_tokenizer", "stopped")

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, at_start: bool = False, special: bool = False
    ) -> None:
        """at_start: nothing but control tokens precede, so the space that SentencePiece puts before a text is dropped;
        after a prompt it belongs to the text. special: spell control tokens out.
        Raises InvalidSampling for an empty stop string.
        """
        if "" in stop:
            raise InvalidSampling("stop", "strings that are not empty", list(stop))
        self._tokenizer, self._stop, self._special = tokenizer, tuple(stop), special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = at_start and tokenizer.space_prefix
        self._held = ""
        self.stopped: str | None = None

    def push(self, token: int) -> str:
        """The text that this token releases, often none; always none once stopped.
        Raises InvalidPrompt for an id outside the vocabulary.
        """
        piece = self._tokenizer.token_bytes(token, special=self._special)
        if self._drop_space and piece:
            piece, self._drop_space = piece.removeprefix(b" "), False
        return self._release(self._decoder.decode(piece))

    def flush(self) -> str:
        """What was held back, at the end of the generation; an unfinished character becomes U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True))
        text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped is not None or not text:
            return ""
        text = self._held + text
        if (begin := self._find_stop(text)) is not None:
            self._held = ""
            return text[:begin]
        safe = len(text) - self._begun(text)
        self._held = text[safe:]
        return text[:safe]

    def _find_stop(self, text: str) -> int | None:
        """Where the first complete stop string begins; remembers which it is."""
        found = [(begin + len(stop), begin, stop) for stop in self._stop if (begin := text.find(stop)) >= 0]
        if not found:
            return None
        _, begin, self.stopped = min(found)
        return begin

    def _begun(self, text: str) -> int:
        """How many characters at the end of `text` may be the begin of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for count in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stop):
                return count
        return 0
