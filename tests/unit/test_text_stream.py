"""Text of a generation, piece by piece: whole characters, no stop strings, the same whatever the tokens were."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldric.engine.errors import InvalidPrompt, InvalidSampling
from eldric.engine.text_stream import TextStream
from eldric.engine.tokenizer import Tokenizer
from eldric.engine.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN

WORDS = ["▁", "▁a", "▁ab", "a", "b", "ab", "ba", "abc", "c", "é", "日本", "😀", "aé", "▁▁"]


def make_tokenizer() -> Tokenizer:
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    return Tokenizer.from_metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": texts,
            "tokenizer.ggml.token_type": np.array([UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(WORDS)]),
            "tokenizer.ggml.scores": np.array([0.0] * 259 + [-float(rank) for rank in range(len(WORDS))]),
        }
    )


TOKENIZER = make_tokenizer()
FIRST_WORD = 259


def word(text: str) -> int:
    return FIRST_WORD + WORDS.index(text)


def byte(value: int) -> int:
    return 3 + value


def collect(stream: TextStream, tokens: Sequence[int]) -> str:
    return "".join([*(stream.push(token) for token in tokens), stream.flush()])


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first, character by character; and that string."""
    for end in range(1, len(text) + 1):
        complete = [string for string in stop if text[:end].endswith(string)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


tokens_of_all_kinds = st.lists(
    st.one_of(
        st.integers(0, TOKENIZER.vocab_size - 1),
        st.integers(FIRST_WORD, TOKENIZER.vocab_size - 1),
        st.sampled_from([byte(value) for value in "é日😀ab".encode()]),
    ),
    max_size=30,
)
stop_strings = st.lists(st.text("ab c日é", min_size=1, max_size=4), max_size=4)


@settings(deadline=None)
@given(tokens_of_all_kinds, stop_strings, st.booleans())
def test_pieces_add_up_to_the_decoded_text_before_the_first_stop(
    tokens: list[int], stop: list[str], at_start: bool
) -> None:
    stream = TextStream(TOKENIZER, stop, at_start=at_start)
    expected, stopped = cut_at_stop(TOKENIZER.decode(tokens, at_start=at_start), stop)
    assert collect(stream, tokens) == expected
    assert stream.stopped == stopped


@settings(deadline=None)
@given(st.text("abc é日😀", max_size=30), stop_strings, st.data())
def test_the_cut_does_not_depend_on_how_the_text_was_split(text: str, stop: list[str], data: st.DataObject) -> None:
    split: list[int] = []
    rest = text.replace(" ", "▁")
    while rest:
        fitting = [piece for piece in WORDS if rest.startswith(piece)]
        piece = data.draw(st.sampled_from([*fitting, rest[0]]))
        is_word = piece in WORDS and data.draw(st.booleans())
        split += [word(piece)] if is_word else map(byte, piece.replace("▁", " ").encode())
        rest = rest[len(piece) :]
    assert collect(TextStream(TOKENIZER, stop), split) == cut_at_stop(text, stop)[0]


@settings(deadline=None)
@given(tokens_of_all_kinds, stop_strings)
def test_nothing_delivered_has_to_be_taken_back(tokens: list[int], stop: list[str]) -> None:
    stream = TextStream(TOKENIZER, stop)
    delivered = ""
    for count, token in enumerate(tokens, 1):
        delivered += stream.push(token)
        continued = collect(TextStream(TOKENIZER, stop), tokens[:count])
        assert continued.startswith(delivered)
        held = len(continued) - len(delivered)
        assert held <= max((len(string) - 1 for string in stop), default=0) + 1


def test_a_character_comes_out_when_its_last_byte_has_come() -> None:
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(byte(value)) for value in "😀é".encode()]
    assert pieces == ["", "", "", "😀", "", "é"]


def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    stream = TextStream(TOKENIZER)
    assert stream.push(byte(0xF0)) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_a_stop_string_across_tokens_is_not_delivered() -> None:
    stream = TextStream(TOKENIZER, ["abcab"])
    assert [stream.push(word(text)) for text in ("c", "ab", "c", "a")] == ["c", "", "", ""]
    assert stream.stopped is None
    assert stream.push(word("ba")) == ""
    assert stream.stopped == "abcab"
    assert stream.push(word("c")) == "" == stream.flush()


def test_what_only_looked_like_a_stop_string_is_delivered() -> None:
    stream = TextStream(TOKENIZER, ["abcab"])
    assert [stream.push(word(text)) for text in ("ab", "c", "c")] == ["", "", "abcc"]
    stream.push(word("ab"))
    assert stream.flush() == "ab"
    assert stream.stopped is None


def test_the_stop_string_that_is_complete_first_counts() -> None:
    stream = TextStream(TOKENIZER, ["abcab", "bc"])
    assert stream.push(word("abc")) == "a"
    assert stream.stopped == "bc"
    longer = TextStream(TOKENIZER, ["c", "abc"])
    assert longer.push(word("abc")) == ""
    assert longer.stopped == "abc"


def test_a_stop_string_may_hold_a_character_of_several_tokens() -> None:
    stream = TextStream(TOKENIZER, ["é日"])
    pieces = [stream.push(byte(value)) for value in "aé日b".encode()]
    assert "".join(pieces) == "a"
    assert stream.stopped == "é日"


def test_a_continuation_keeps_the_space_that_a_text_begins_without() -> None:
    prompt, generated = [1, word("▁a")], [word("▁ab"), word("▁a")]
    whole = TOKENIZER.decode(prompt + generated)
    assert TOKENIZER.decode(prompt) + collect(TextStream(TOKENIZER), generated) == whole == "a ab a"
    assert collect(TextStream(TOKENIZER, at_start=True), generated) == TOKENIZER.decode([1, *generated]) == "ab a"


def test_control_tokens_are_left_out_unless_asked_for() -> None:
    tokens = [word("a"), 2, word("b")]
    assert collect(TextStream(TOKENIZER), tokens) == "ab"
    assert collect(TextStream(TOKENIZER, special=True), tokens) == "a</s>b"
    assert collect(TextStream(TOKENIZER, ["</s>"], special=True), tokens) == "a"


def test_bad_input_is_refused() -> None:
    with pytest.raises(InvalidSampling, match="stop must be strings that are not empty"):
        TextStream(TOKENIZER, ["a", ""])
    with pytest.raises(InvalidPrompt, match="token 99999 is not in the vocabulary"):
        TextStream(TOKENIZER).push(99999)
