"""Texts of somebody else's, a model's or another machine's, on a terminal."""

import re
from typing import TextIO

#: What a terminal obeys instead of showing it; not tabs and line ends.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def shown(text: str, stream: TextIO) -> str:
    """The text as a terminal may have it: it moves no cursor, hides no words and writes no clipboard. Files and pipes
    get it as it is."""
    if not stream.isatty():
        return text
    return _CONTROLS.sub(lambda found: "" if found[0] == "\r" else "\ufffd", text)
