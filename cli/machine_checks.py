"""What `doctor` says of a machine: pure functions of facts that machine_facts gathers."""

import re
from collections.abc import Iterator, Mapping, Sequence

from eldric.cli.findings import Finding, ok, problem, warning
from eldric.cli.machine_facts import Disk, Engine, Listener
from eldric.cli.output import human_bytes

OLDEST_PYTHON = (3, 11)
_GIB = 1024**3
#: Variants of ggml's CPU library that use none of a modern processor's instructions.
_BASELINES = ("x64", "sse42", "armv8.0_1")


def check_python(version: tuple[int, int, int]) -> Finding:
    text = ".".join(map(str, version))
    if version[:2] < OLDEST_PYTHON:
        return problem("python", f"Python {text}", f"install Python {'.'.join(map(str, OLDEST_PYTHON))} or newer")
    return ok("python", text)


def check_packages(packages: Mapping[str, tuple[str | None, str]]) -> Finding:
    """packages: the installed version, None if it is missing, and the oldest that is wanted, by name."""
    wrong = []
    for name, (installed, wanted) in sorted(packages.items()):
        if installed is None:
            wrong.append(f"{name} is missing")
        elif version_key(installed) < version_key(wanted):
            wrong.append(f"{name} is {installed}, {wanted} or newer is wanted")
    if wrong:
        return problem("packages", "; ".join(wrong), "run `pip install --upgrade eldric`")
    return ok("packages", f"{len(packages)} libraries, all new enough")


def version_key(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: "1.80.0rc1" -> (1, 80, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def check_engine(engine: Engine | str) -> Finding:
    """engine: what was found, or why nothing was."""
    if isinstance(engine, str):
        return problem("ggml", engine, "run `pip install transcribe-cpp-native`, or name a folder in ELDRIC_GGML_DIR")
    text = f"ggml {engine.version}, {engine.cpu_variant or 'one CPU variant'}, {', '.join(engine.devices)}"
    if engine.cpu_variant in _BASELINES:
        return warning(
            "ggml", f"{text}: no faster CPU variant runs here", "use a processor with AVX2 or newer, or a GPU"
        )
    return ok("ggml", text)


def check_memory(total_bytes: int, available_bytes: int) -> Finding:
    text = f"{human_bytes(available_bytes)} of {human_bytes(total_bytes)} free"
    if available_bytes < _GIB // 4:
        return problem("memory", text, "end other programs, or run stages elsewhere")
    if available_bytes < max(_GIB, total_bytes // 20):
        return warning("memory", text, "end other programs, or give workers less with --memory")
    return ok("memory", text)


def check_promises(promised_bytes: int, total_bytes: int) -> Finding:
    """promised_bytes: what the workers of this machine offer for stages, in all."""
    text = f"workers here offer {human_bytes(promised_bytes)} of {human_bytes(total_bytes)}"
    if promised_bytes > total_bytes:
        return warning("memory of workers", text, "give them less with --memory, or plans will not hold")
    return ok("memory of workers", text)


def check_disk(disk: Disk) -> Finding:
    text = f"{human_bytes(disk.free_bytes)} of {human_bytes(disk.total_bytes)} free at {disk.path}"
    if disk.free_bytes < _GIB // 4:
        return problem("disk", text, "make room: logs, state and imports need it")
    if disk.free_bytes < 5 * _GIB:
        return warning("disk", text, "make room before you add models")
    return ok("disk", text)


def check_open_files(limit: int | None) -> Finding:
    """limit: of files and sockets of a process; None: no limit."""
    if limit is None or limit >= 4096:
        return ok("open files", "no limit" if limit is None else f"up to {limit}")
    advice = "raise it: `ulimit -n 65536`, or LimitNOFILE= of a systemd unit"
    if limit < 256:
        return problem("open files", f"up to {limit}", advice)
    return warning("open files", f"up to {limit}, which many clients exhaust", advice)


def check_locked_memory(limit_bytes: int | None) -> Finding:
    """limit_bytes: of memory that a process may lock; None: no limit. Keys are kept in locked memory."""
    if limit_bytes is None:
        return ok("locked memory", "no limit")
    if limit_bytes < 64 * 1024:
        advice = "raise it: `ulimit -l unlimited`, or LimitMEMLOCK= of a systemd unit"
        return warning("locked memory", f"up to {human_bytes(limit_bytes)}", advice)
    return ok("locked memory", f"up to {human_bytes(limit_bytes)}; RDMA needs more")


def check_ports(taken: Sequence[Listener], ours: Sequence[int]) -> Finding:
    """taken: who listens on the default ports; ours: processes of nodes, which may."""
    foreign = [listener for listener in taken if listener.pid not in ours]
    if foreign:
        text = ", ".join(f"{each.port} ({each.use}) by {each.program or 'another program'}" for each in foreign)
        return warning("ports", f"taken: {text}", "start that kind of node with another --http-port")
    return ok("ports", "no other program has a default port" if taken else "all default ports are free")


def check_clock(skews_s: Mapping[str, float]) -> Iterator[Finding]:
    """skews_s: how far this clock is ahead of another machine's, in seconds, known to about a second."""
    if not skews_s:
        return
    name, worst = max(skews_s.items(), key=lambda each: abs(each[1]))
    text = f"this clock is {abs(worst):.0f} s {'ahead of' if worst > 0 else 'behind'} that of {name}"
    advice = "let both machines keep time with NTP"
    if abs(worst) > 60:
        yield problem("clock", f"{text}: certificates and tokens may be refused", advice)
    elif abs(worst) > 3:
        yield warning("clock", text, advice)
    else:
        yield ok("clock", "agrees with the other machines'")
