"""Write tests/data/tokenizer_ids.json, llama.cpp's ids of the hard texts: python -m tests.make_tokenizer_ids"""

import json
from pathlib import Path

from tests.hard_texts import HARD_TEXTS, random_texts
from tests.models import smollm2, storyteller
from tests.vocabulary_reference import VocabularyReference

PATH = Path(__file__).parent / "data" / "tokenizer_ids.json"


def main() -> None:
    texts = [*HARD_TEXTS, *random_texts(60)]
    entries: list[dict[str, object]] = [{"text": text} for text in texts]
    for name, path in (("smollm2", smollm2()), ("storyteller", storyteller())):
        with VocabularyReference(path) as reference:
            for entry, text in zip(entries, texts, strict=True):
                entry[name] = reference.encode(text, special=True, add_special=True)
    lines = (json.dumps(entry, separators=(",", ":")) for entry in entries)
    PATH.write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
