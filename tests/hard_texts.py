"""Texts that tokenizers get wrong: scripts, emoji, odd spaces, line ends, digits, contractions, code, control
characters, what looks like special tokens, long runs.
"""

# ruff: noqa: E501, RUF001 (the characters are the point, and some are wide)

import random
from collections.abc import Iterator, Sequence

# fmt: off
HARD_TEXTS: Sequence[str] = (
    "", " ", "  ", "   ", "\n", "\n\n", " \n", "\n ", "\t", "\r\n", "\r\n\r\n  x", " \t\n", "a  b", "a   b", "   a",
    "a   ", "a\n\n\nb", "a \n \n b", "\xa0a\xa0\xa0b", "\u3000日本\u3000語", "\u2028x\u2029y", "\x85x\x85 y",
    "\x1cx\x1dy\x1ez\x1f", "\x00", "a\x00b", "\x7f\x80\x9f", "\ufeffbom", "\u200bzero\u200b width\u200d",
    "e\u0301e\u0301 café cafe\u0301", "a\u0300\u0301\u0302\u0303",
    "I'm you're we've he'll she'd it's don't I'M YOU'RE 'S'T'RE 'ſ '’s ’t", "''s'''t", "'", "' '", "x'",
    "'ll'LL'Ll", "1", "12", "123", "1234", "12345", "1234567890", "1.234,56", "3.14159e-10", "0x1F",
    "1 2 3 12 123 1234", "١٢٣٤٥٦", "१२३४", "１２３４", "½⅓ⅷ²³", "1a2b3c", "a1", "v1.2.3-rc4", "2024-01-02T03:04:05Z",
    "$1,000,000.00", "100%", "#1", "№5", "Hello, World!",
    "hello WORLD HelloWorld helloWORLD HTTPServer iOS eBay McDonald", "ÀÉÎõü ÄÖÜ straße STRASSE ŒUVRE ǅ",
    "ΑΒΓ αβγ Ωmega", "Привет, мир! ПРИВЕТ", "שלום עולם", "مرحبا بالعالم", "नमस\u094dते दुनिया",
    "ภาษาไทยไม\u0e48มีช\u0e48องว\u0e48าง", "你好，世界！", "こんにちは世界カタカナ", "안녕하세요 세계", "ქართული", "Հայերեն", "አማርኛ",
    "ខ\u17d2មែរ", "မြန\u103aမာ", "සිංහල", "தமிழ\u0bcd", "తెలుగు", "ಕನ\u0ccdನಡ", "മലയാളം", "ગુજરાતી", "ਪੰਜਾਬੀ",
    "বাংলা", "ᏣᎳᎩ", "ᐃᓄᒃᑎᑐᑦ", "ⴰⵎⴰⵣⵉⵖ", "𐎀𐎁𐎂", "𓀀𓀁", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛", "ꙮ", "ﷺ", "ﬁﬂ", "ＦＵＬＬ ｗｉｄｔｈ", "𠀀𠀁", "〇一二三",
    "㈠㊀㍿", "😀", "👍🏽", "👨\u200d👩\u200d👧\u200d👦", "🏳\ufe0f\u200d🌈", "🇩🇪🇫🇷", "1\ufe0f⃣", "❤\ufe0f\u200d🔥", " 😀 😀",
    "a😀b", "😀😀😀", "☃☀\ufe0f", "🫠🥹\U0001fabf", "©®™", "→⇒∀∃∑√∞", "░▒▓█", "┌─┐", "﷽", "🧑🏿\u200d🚀ok", "!?!?!?", "...",
    "…", "---", "___", "***", "a_b__c", "foo(bar)[baz]{qux}", "<a href=\"x\">y</a>",
    "if (a && b || !c) { return x->y; }", "def f(x):\n    return x\n\n\nclass A:\n\tpass\n", "\\n\\t",
    "C:\\path\\to", "https://example.com/a?b=c&d=e#f", "user@example.com", "~`^|<>=+$", "€£¥₹",
    "“quotes” ‘single’ «guillemets»", "«»‹›„", "—–-‐‑‒", "•·‣", "a/b//c", "/\n/\n", "//\r\n", ";\n\n;", "x.\n\ny",
    " .\n", "\n.", "(\n)", "\r", "\r\r", "a\rb", "\n\r", "\t\t\ta", "    indented\n        more\n", "<s>", "</s>",
    "<unk>", "<s>hello</s>", "<|endoftext|>", "a<|endoftext|>b", "<|im_start|>user\nhi<|im_end|>\n",
    "<|im_start|>  x", "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
    "[INST] hi [/INST]", "<0x0A>", "<0x41>", "▁", "▁▁a", "a▁b", "Ġ", "Ġa", "Ċ",
    "<|user|>\nhi<|end|>\n<|assistant|>", "<|end|>   x <|end|>\n\ny", "<|", "|>", "<|im_end", "<<|im_end|>>",
    "<|im_start|><|im_start|>", "<｜end▁of▁sentence｜>", "<PAD>", "<mask>", "\ue000\uf8ff", "\U0010ffff", "�",
    "\ufffe\uffff", "\u0378\u0379", "\U000e0001\U000e0041", "\u202eRTL\u202c", "\u061c\u200e\u200f", "\u180e\u2060",
    "\ud7ff\ue000",
    "\n" * 50,
    "\t " * 20,
    "1" * 50,
    "!" * 60,
    "A" * 60, "🙂" * 30,
    "é" * 70, "\n\n       x",
    "foo                               bar", "foo                 ", "a\n   \n b",
    "In 1984, 12 O'Brien's cats' tails weren't 3.5cm—they're 10'6\" & \"odd\"…",
    "The quick brown fox jumps over the lazy dog.  Then, it sleeps.\n\n\tEnd of story.  ",
    "a" * 300, "ab" * 200, " " * 100, "日本" * 100, "x " * 100, " x" * 100,
)
# fmt: on

_POOLS = (
    " \n\t\r", "abcXYZ", "0123456789", "'’stdmrevl", "!?.,;:-_/()[]{}<>|", "éüßñçØ", "日本語한국", "абвГДЕ", "عربي",
    "अआइ\u0902\u093e", "😀👍\u200d\ufe0f🏽", "\xa0\u3000\u2009\x85\x0b\x0c", "\u0301\u0300\u20e3", "½²Ⅷ١",
    "\x00\x01\x1f\x7f\xad\u200b\ufeff", "▁ĠĊ<s>",
)  # fmt: skip


def random_texts(count: int, seed: int = 7) -> Iterator[str]:
    """The same texts for the same seed: half of them mixtures of what HARD_TEXTS has, half any characters."""
    chance = random.Random(seed)
    for number in range(count):
        length = chance.randint(1, 40)
        if number % 2:
            pools = chance.sample(_POOLS, chance.randint(1, 6))
            yield "".join(chance.choice(chance.choice(pools)) for _ in range(length))
        else:
            yield "".join(chr(_any_character(chance)) for _ in range(length))


def _any_character(chance: random.Random) -> int:
    ranges = ((0x20, 0x21), (0x0A, 0x0B), (0x20, 0x2000), (0x2000, 0xD800), (0xE000, 0x10000), (0x10000, 0x20000))
    return chance.randrange(*chance.choice(ranges))
