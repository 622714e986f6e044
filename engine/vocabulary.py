"""A model's tokens as its GGUF file lists them: text, kind, score, and which of them begin and end a text.

The keys are GGUF's `tokenizer.ggml.*`. What the file leaves out follows llama.cpp (src/llama-vocab.cpp), so that a
generation ends at the same tokens there and here.
"""

# ruff: noqa: RUF001 (tokens are spelled as the models spell them)

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldric.engine.errors import InvalidModel, InvalidPrompt, UnsupportedModel
from eldric.engine.pretokenizers import PRE_TOKENIZERS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type

BYTE_LEVEL = "gpt2"  # byte-pair merges over bytes that are spelled as printable characters
SENTENCEPIECE = "llama"  # byte-pair merges by score over characters, with a token for each byte as the last resort

# Files seldom list all tokens that end a turn, so these texts do wherever they are tokens.
# fmt: off
_ENDS_OF_GENERATION = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<｜end▁of▁sentence｜>", "[e~[",
))
# fmt: on
# Tokens for code infilling: by the key, by its older name, else the first of these texts. The last three end a
# generation, too.
_INFILL: Mapping[str, tuple[str, str]] = {
    "fim_pre": (
        "prefix",
        "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>",
    ),
    "fim_suf": (
        "suffix",
        "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>",
    ),
    "fim_mid": (
        "middle",
        "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>",
    ),
    "fim_pad": ("", "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]"),
    "fim_rep": ("", "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>"),
    "fim_sep": ("", "<|file_sep|>"),
}
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")  # structure that readers of the text need


def _byte_of_character() -> dict[int, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the other bytes follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {256 + i: byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """texts, kinds, scores: one entry per token id. `kinds` are GGUF's token types after the rules above.
    `ids` is the way back from text to id. A special id that the model does not have is None.
    """

    model: str
    pre: str
    texts: Sequence[str]
    kinds: NDArray[np.int32]
    scores: NDArray[np.float32] | None
    ids: Mapping[str, int]
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    eog_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    space_prefix: bool

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "Vocabulary":
        """Raises UnsupportedModel for a tokenizer of another kind, InvalidModel for lists that do not fit together."""
        model, pre = _tokenizer_kind(metadata)
        texts = _texts(metadata)
        ids = {text: token for token, text in enumerate(texts)}
        if len(ids) != len(texts):
            twice = next(text for token, text in enumerate(texts) if ids[text] != token)
            raise InvalidModel(f"tokenizer.ggml.tokens has {twice!r} more than once")
        kinds = _numbers(metadata, "token_type", len(texts), "iu", np.int32)
        kinds = np.full(len(texts), NORMAL, np.int32) if kinds is None else kinds
        if not all(_BYTE_TOKEN.fullmatch(texts[token]) for token in np.flatnonzero(kinds == BYTE)):
            raise InvalidModel("tokenizer.ggml.tokens has a byte token that is not spelled <0xHH>")
        sentencepiece = model == SENTENCEPIECE
        special = _SpecialIds(metadata, len(texts))
        # llama.cpp takes token 11 where a byte-level file names none, which is right for Falcon alone: none is safer.
        bos_id = special.get("bos", 1 if sentencepiece else None)
        eos_id = special.get("eos", 2 if sentencepiece else None)
        eog_ids = _settle_kinds(ids, kinds, special, eos_id)
        return cls(
            model=model,
            pre=pre,
            texts=texts,
            kinds=kinds,
            scores=_numbers(metadata, "scores", len(texts), "fiu", np.float32),
            ids=ids,
            bos_id=bos_id,
            eos_id=eos_id,
            unknown_id=special.get("unknown", 0 if sentencepiece else None),
            eog_ids=eog_ids,
            add_bos=_flag(metadata, "add_bos_token", sentencepiece or PRE_TOKENIZERS[pre].add_bos),
            add_eos=_flag(metadata, "add_eos_token", False),
            space_prefix=sentencepiece and _flag(metadata, "add_space_prefix", True),
        )

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """What the token adds to a text. Control and unknown tokens add nothing, or with `special` their own text.
        Raises InvalidPrompt for an id that the vocabulary does not have.
        """
        if not 0 <= token < len(self.texts):
            raise InvalidPrompt(f"token {token} is not in the vocabulary of {len(self.texts)} tokens")
        text, kind = self.texts[token], self.kinds[token]
        if kind in (CONTROL, UNKNOWN):
            return text.encode() if special else b""
        if kind == USER_DEFINED:
            return text.encode()
        if kind == BYTE:
            return bytes((int(text[3:5], 16),))
        if kind != NORMAL:
            return b""
        if self.model == SENTENCEPIECE:
            return text.replace("▁", " ").encode()
        try:
            return text.translate(_BYTE_OF_CHARACTER).encode("latin-1")
        except UnicodeEncodeError:  # not spelled in bytes after all
            return text.encode()


class _SpecialIds:
    """The ids that the file names under `tokenizer.ggml.<name>_token_id`."""

    def __init__(self, metadata: Mapping[str, Any], size: int) -> None:
        self._metadata, self._size = metadata, size

    def get(self, name: str, default: int | None = None) -> int | None:
        """The named id; `default` if the file has none or one outside the vocabulary."""
        named = self._metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(named, int) and 0 <= named < self._size:
            return named
        return default if default is not None and default < self._size else None


def _settle_kinds(
    ids: Mapping[str, int], kinds: NDArray[np.int32], special: _SpecialIds, eos_id: int | None
) -> frozenset[int]:
    """Correct `kinds` in place where files are known to be wrong; the tokens that end a generation."""
    ends: set[int] = set()
    for name, (old_name, texts) in _INFILL.items():
        token = special.get(name, special.get(old_name))
        if token is None:
            token = next((ids[text] for text in texts.split() if text in ids), None)
            if token is not None:
                kinds[token] = CONTROL
        if token is not None and name in ("fim_pad", "fim_rep", "fim_sep"):
            ends.add(token)
    by_text = {ids[text] for text in _ENDS_OF_GENERATION if text in ids}
    kinds[list(by_text)] = CONTROL
    kinds[[ids[text] for text in _SHOWN if text in ids]] = USER_DEFINED
    ends |= by_text
    ends |= {token for token in (eos_id, special.get("eot"), special.get("eom")) if token is not None}

    def ended_by(texts: Iterable[str]) -> bool:
        return any(ids.get(text) in ends for text in texts)

    calls = ended_by(("<|call|>", "<|calls|>"))
    if calls and ended_by(("<|return|>", "<|flush|>")) and ended_by(("<|end|>",)):
        ends.remove(ids["<|end|>"])  # these models end a message with it, and a turn with the others
        kinds[ids["<|end|>"]] = USER_DEFINED
    if ended_by(("<|tool_response>", "<|plamo:eos|>")) and ended_by(("</s>",)):
        ends.remove(ids["</s>"])  # an HTML tag in these models
        kinds[ids["</s>"]] = NORMAL
    return frozenset(ends)


def _tokenizer_kind(metadata: Mapping[str, Any]) -> tuple[str, str]:
    """(tokenizer.ggml.model, name of the pre-tokenizer)."""
    model = _string(metadata, "model")
    if not model:
        raise UnsupportedModel("the file has no tokenizer (tokenizer.ggml.model is missing)")
    if model == SENTENCEPIECE:
        return SENTENCEPIECE, "default"
    if model != BYTE_LEVEL:
        raise UnsupportedModel(f"tokenizer {model!r} is not known; known are {BYTE_LEVEL!r} and {SENTENCEPIECE!r}")
    pre = _string(metadata, "pre") or "default"
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedModel(f"pre-tokenizer {pre!r} is not known; known are {known}")
    return BYTE_LEVEL, pre


def _texts(metadata: Mapping[str, Any]) -> list[str]:
    texts = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise InvalidModel("tokenizer.ggml.tokens is not a list of strings")
    return [text or f"[EMPTY_{token}]" for token, text in enumerate(texts)]


def _numbers(
    metadata: Mapping[str, Any], name: str, size: int, kinds: str, dtype: type[np.generic]
) -> NDArray[Any] | None:
    """A copy of one number per token; kinds: numpy's letters for the kinds of number that it may be."""
    values = metadata.get(f"tokenizer.ggml.{name}")
    if values is None:
        return None
    if not isinstance(values, np.ndarray) or values.dtype.kind not in kinds or values.ndim != 1:
        raise InvalidModel(f"tokenizer.ggml.{name} is not a list of numbers")
    if len(values) < size:
        raise InvalidModel(f"tokenizer.ggml.{name} has {len(values)} entries for {size} tokens")
    return values[:size].astype(dtype)


def _string(metadata: Mapping[str, Any], name: str) -> str:
    value = metadata.get(f"tokenizer.ggml.{name}", "")
    if not isinstance(value, str):
        raise InvalidModel(f"tokenizer.ggml.{name} is not a string")
    return value


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise InvalidModel(f"tokenizer.ggml.{name} is not a truth value")
    return value
