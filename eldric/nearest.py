"""What to say beside a name that is not known."""

from collections.abc import Iterable
from difflib import get_close_matches

#: Names that are listed, and that are taken for what was meant.
_MOST, _MOST_MEANT = 20, 3


def known_names(name: str, known: Iterable[str]) -> str:
    """ "there are: a, b", and before it what may have been meant: "did you mean 'b'? There are: a, b"."""
    names = list(known)
    listed = ", ".join(names[:_MOST]) + (", ..." if len(names) > _MOST else "")
    question = meant(name, names)
    return f"{question} There are: {listed}" if question else f"there are: {listed or 'none'}"


def meant(name: str, known: Iterable[str]) -> str:
    """ "did you mean 'b'?"; empty where no name is like it."""
    by_lower = {each.lower(): each for each in known}
    close = [by_lower[each] for each in get_close_matches(name[:200].lower(), by_lower, _MOST_MEANT)]
    return f"did you mean {' or '.join(map(repr, close))}?" if close else ""
