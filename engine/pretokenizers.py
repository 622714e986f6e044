"""How a byte-level vocabulary cuts text into words, by the name that a GGUF file gives in `tokenizer.ggml.pre`.

A byte-pair vocabulary is trained on words that a regular expression cut out, and must be used with the same one:
with another, most text still comes out the same and some does not. Names and meanings are llama.cpp's
(src/llama-vocab.cpp), the expressions those of the models' own tokenizer.json files, written for Oniguruma.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """splits: regular expressions, each applied to the pieces that the one before it left; what matches becomes a
    piece, and so does what lies between two matches.
    ignore_merges: a word that is a token as a whole is taken as such, whatever its merges would make of it.
    add_bos: whether a text begins with the BOS token where the file does not say.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


def _either(*alternatives: str) -> str:
    return "|".join(alternatives)


def _cased(suffix: str, number: str, letter: str = r"\p{L}") -> str:
    """Words that break where the case changes. Case tells only ASCII letters apart: any other letter is both."""
    upper, lower = f"(?:(?={letter})[^a-z])", f"(?:(?={letter})[^A-Z])"
    prefix = r"[^\r\n\p{L}\p{N}]?"
    return _either(
        f"{prefix}{upper}*{lower}+{suffix}",
        f"{prefix}{upper}+{lower}*{suffix}",
        number,
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        _LINES,
        _SPACES,
    )


# Spelled out, because (?i:'s) would also take the long s.
_CONTRACTION = "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LINES = r"\s*[\r\n]+"
_SPACES = r"\s+(?!\S)|\s+"

_GPT2 = _either(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+", _SPACES)
_LLAMA3 = _either(_CONTRACTION, _WORD, r"\p{N}{1,3}", _SYMBOLS, _LINES, _SPACES)
_QWEN2 = _either(_CONTRACTION, _WORD, r"\p{N}", _SYMBOLS, _LINES, _SPACES)
_QWEN35 = _either(
    _CONTRACTION,
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
    r"\p{N}",
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
    _LINES,
    _SPACES,
)
_HAN_KANA = r"[\u4e00-\u9fa5\u3040-\u30ff]+"
_DEEPSEEK3_WORD = _either(
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    _HAN_KANA,
    _either(_DEEPSEEK3_WORD, r" ?[\p{P}\p{S}]+[\r\n]*", _LINES, _SPACES),
)
_DEEPSEEK_HAN = r"[[\u0800-\u9fa5\uac00-\ud7ff]&&\S]+"
# The letters that have case, as an older Unicode knew them.
_DEEPSEEK_CASED = (
    r"[[\p{Lu}\p{Ll}\p{Lt}]&&[^\u0560-\u0588\u10c7-\u10ff\u1c80-\u1c8f\u2d00-\u2d2f\ua790-\ua7ff\uab30-\uab6f"
    r"\x{10570}-\x{105ff}\x{10d50}-\x{10d8f}\x{16e40}-\x{16e7f}\x{1d400}-\x{1d7ff}\x{1df00}-\x{1dfff}]]"
)
_SCRIPT_FREE = r" ?[^(\s|.,!?…。，、।۔،)]+"  # noqa: RUF001

_FAMILIES: tuple[tuple[str, PreTokenizer], ...] = (
    ("default", PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
    (
        "gpt-2 phi-2 mpt olmo jais gigachat a.x-4.0 mellum exaone4 trillion granite-docling",
        PreTokenizer((_GPT2,)),
    ),
    (
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
        PreTokenizer((r"\p{N}", _GPT2)),
    ),
    (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    ("dbrx smaug-bpe chatglm-bpe", PreTokenizer((_LLAMA3,))),
    ("glm4 glm5", PreTokenizer((_LLAMA3,), ignore_merges=True)),
    (
        "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
        PreTokenizer((_QWEN2,)),
    ),
    ("qwen35", PreTokenizer((_QWEN35,))),
    ("ufakzeka", PreTokenizer((_either(_WORD, r"\p{N}", _SYMBOLS, _LINES, _SPACES),))),
    ("laguna", PreTokenizer((r"[^\n]+|[\n]+", _QWEN2))),
    ("minicpm5", PreTokenizer((r"\p{N}{1,3}", _LLAMA3), ignore_merges=True)),
    ("tekken", PreTokenizer((_cased("", r"\p{N}"),), ignore_merges=True, add_bos=True)),
    (
        "gpt-4o llama4 kanana2 talkie minimax-m2",
        PreTokenizer((_cased(f"(?:{_CONTRACTION})?", r"\p{N}{1,3}"),)),
    ),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", PreTokenizer(_DEEPSEEK3)),
    (
        "deepseek-llm",
        PreTokenizer(
            (
                r"[\r\n]",
                rf"\s?{_DEEPSEEK_CASED}+",
                r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001-\u3002]+",
                r"\s+$",
                _DEEPSEEK_HAN,
                r"\p{N}+",
            )
        ),
    ),
    ("deepseek-coder", PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_HAN, r"\p{N}"))),
    ("falcon", PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))),
    ("poro-chat bloom gpt3-finnish", PreTokenizer((_SCRIPT_FREE,))),
    ("viking", PreTokenizer((_SCRIPT_FREE, r"\p{N}"))),
    (
        "bailingmoe bailingmoe2 llada-moe",
        PreTokenizer((_either(_CONTRACTION, _WORD, r"\p{N}", _SYMBOLS, r"\s*[\r\n]", _SPACES),)),
    ),
    (
        "seed-coder",
        PreTokenizer(
            (_either(_CONTRACTION, _WORD, r"\p{N}", r" ?[^\s\p{L}\p{N}\r\n]+", _LINES, _SPACES),),
        ),
    ),
    (
        "exaone-moe",
        PreTokenizer(
            (
                _either(
                    _CONTRACTION,
                    r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
                    r"\p{N}",
                    r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
                    r"\s*[\r\n]",
                    _SPACES,
                ),
            )
        ),
    ),
    (
        "jais-2",
        PreTokenizer(
            (
                _either(
                    _CONTRACTION,
                    _WORD,
                    r"\p{N}{1,3}",
                    _SYMBOLS,
                    _LINES,
                    *(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4)),
                    r"\s{1,2}(?!\S)|\s",
                ),
            )
        ),
    ),
)

# Assigned in Unicode 16. llama.cpp's tables end before; Oniguruma's move on with each release.
_NEWER = (
    r"\u0897\u1b4e\u1b4f\u1b7f\u1c89\u1c8a\u2427-\u2429\u31e4\u31e5\ua7cb-\ua7cd\ua7da-\ua7dc\x{105c0}-\x{105ff}"
    r"\x{10d40}-\x{10d8f}\x{10ec2}-\x{10ec4}\x{10efc}\x{11380}-\x{113ff}\x{116d0}-\x{116ff}\x{11bc0}-\x{11bff}"
    r"\x{11f5a}\x{13460}-\x{143ff}\x{16100}-\x{1613f}\x{16d40}-\x{16d7f}\x{18cff}\x{1cc00}-\x{1ceb3}"
    r"\x{1e5d0}-\x{1e5ff}\x{1f8b2}-\x{1f8c1}\x{1fa89}\x{1fa8f}\x{1fabe}\x{1fac6}\x{1fadc}\x{1fadf}\x{1fae9}"
    r"\x{1fbcb}-\x{1fbef}"
)


def _as_of_unicode_15(pre: PreTokenizer) -> PreTokenizer:
    splits = (re.sub(r"\\p\{[LNPSM]\}", lambda name: f"[{name[0]}&&[^{_NEWER}]]", split) for split in pre.splits)
    return replace(pre, splits=tuple(splits))


PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(
    {name: pre for names, family in _FAMILIES for pre in (_as_of_unicode_15(family),) for name in names.split()}
)
