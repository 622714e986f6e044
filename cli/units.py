"""Amounts as a person writes them: memory, time, lists of cores and of numbers."""

from eldric.errors import InvalidRequest

_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_MOST_CORES = 4096


def parse_bytes(text: str) -> int:
    """ "24GB", "16GiB", "500M" or a plain number. Raises InvalidRequest."""
    compact = text.strip().lower().removesuffix("b")
    digits = compact.rstrip("kmgti")
    try:
        size = int(float(digits) * _BYTES[compact[len(digits) :]])
    except (ValueError, KeyError, OverflowError):
        raise InvalidRequest(f"{text!r} is no amount of memory; write for example 24GB or 16GiB") from None
    if size <= 0:
        raise InvalidRequest(f"{text!r} is no amount of memory: it must be more than 0")
    return size


def parse_memory(text: str) -> tuple[int, float]:
    """Bytes, or a share of what there is: "24GB" is (24000000000, 1.0), "50%" is (0, 0.5). Raises InvalidRequest."""
    compact = text.strip()
    if not compact.endswith("%"):
        return parse_bytes(text), 1.0
    try:
        percent = float(compact[:-1])
    except ValueError:
        percent = 0.0
    if not 0 < percent <= 100:
        raise InvalidRequest(f"{text!r} is no share of the memory; write for example 50%")
    return 0, percent / 100


def parse_seconds(text: str) -> int:
    """ "90", "45s", "30m", "2h" or "7d". Raises InvalidRequest."""
    compact = text.strip().lower()
    digits = compact.rstrip("smhd")
    try:
        seconds = int(float(digits) * _SECONDS[compact[len(digits) :]])
    except (ValueError, KeyError, OverflowError):
        raise InvalidRequest(f"{text!r} is no length of time; write for example 30m, 2h or 7d") from None
    if seconds <= 0:
        raise InvalidRequest(f"{text!r} is no length of time: it must be at least a second")
    return seconds


def parse_cpus(text: str) -> tuple[int, ...]:
    """ "0,2-5" as numbers, each once. Raises InvalidRequest."""
    cpus: dict[int, None] = {}
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            begin, end = int(first), int(last if dash else first)
            if not 0 <= begin <= end < _MOST_CORES:
                raise ValueError
            cpus.update(dict.fromkeys(range(begin, end + 1)))
    except ValueError:
        raise InvalidRequest(f"{text!r} is no list of cores; write for example 0,2-5") from None
    return tuple(cpus)


def parse_numbers(text: str) -> list[int]:
    """ "10,10,12" as numbers. Raises InvalidRequest."""
    try:
        numbers = [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        numbers = [-1]
    if any(number < 1 for number in numbers):
        raise InvalidRequest(f"{text!r} is no list of numbers from 1 on; write for example 10,10,12")
    return numbers
