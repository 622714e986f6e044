"""The process behind benchmarks/network.py: a switch with links of a set rate and delay, between network namespaces.

    python -m benchmarks.network_switch SPECIFICATION    (JSON; network.py writes it)

Kernels without netem cannot delay packets, so this does it: each host is a network namespace with one TAP device, and
all devices are held here. A frame leaves a host's link at the link's rate, crosses after the delay, and enters the
receiver's link at its rate. TAP devices carry TCP's large segments whole (virtio-net headers), so that a gigabit costs
a tenth of a core; the rate counts the frames and headers that a wire would have.

Namespaces and devices are nobody's but this process's: they are gone when it is. Whoever started it holds its standard
input. When that closes, because the other is done or was killed, every process in the namespaces is killed, and the
memory groups that it was told of are removed.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

DEVICE = "eth0"
MTU = 1500

_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0  # linux/if_tun.h
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6 = 1, 2, 4
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x8914, 0x8916, 0x891C  # linux/sockios.h
_IFF_UP = 1
_PR_SET_TIMERSLACK = 29

_VNET = struct.Struct("<BBHHHH")  # virtio_net_hdr: flags, segmentation, header length, segment size, checksum
_WIRE_BYTES = 24  # preamble, frame check sequence and gap of each frame
_MOST_BYTES = 1 << 17  # of a segment that the kernel has not cut
_BATCH = 32  # frames of one host before the next host's turn
_BACKLOG_S = 0.005  # a host whose link is busy for longer waits, as with a full network card
_DROP_S = 0.05  # frames that would wait longer than this for the receiver's link are lost


@dataclass(slots=True)
class Port:
    """One host's link."""

    name: str
    namespace: int  # file descriptor
    tap: int
    closed: bool  # nobody may open a connection to it
    cut: bool = False
    up_free: float = 0.0  # when the link to the switch has sent all that it was given
    down_free: float = 0.0
    waiting: deque[tuple[float, bytes]] = field(default_factory=deque)  # frames on their way to it, when they are due


class Switch:
    """Moves frames between the ports. rate: bytes per second; delay: seconds, one way."""

    def __init__(self, ports: list[Port], rate: float, delay: float) -> None:
        self._ports, self._rate, self._delay = {port.tap: port for port in ports}, rate, delay
        self._by_name = {port.name: port for port in ports}
        self._known: dict[bytes, Port] = {}  # by hardware address

    def run(self, commands: int) -> list[Path]:
        """Until `commands`, a file descriptor, ends. Returns the memory groups that were named."""
        groups: list[Path] = []
        pending = b""
        while True:
            now = time.monotonic()
            due = self._deliver(now)
            taps = [tap for tap, port in self._ports.items() if port.up_free - now < _BACKLOG_S]
            if len(taps) < len(self._ports):
                due = min(due, _BACKLOG_S / 2)
            readable, _, _ = select.select([*taps, commands], [], [], due)
            if commands in readable:
                got = os.read(commands, 1 << 16)
                if not got:
                    return groups
                *lines, pending = (pending + got).split(b"\n")
                groups += [group for line in lines if (group := self._obey(json.loads(line))) is not None]
            for tap in readable:
                if tap != commands:
                    self._take(self._ports[tap])

    def _obey(self, command: dict[str, str]) -> Path | None:
        """ "cut" or "mend" a host's link, or remember a memory "group"."""
        if "group" in command:
            return Path(command["group"])
        for name, cut in ((command.get("cut"), True), (command.get("mend"), False)):
            if name is not None:
                self._by_name[name].cut = cut
        return None

    def _take(self, source: Port) -> None:
        for _ in range(_BATCH):
            try:
                frame = os.read(source.tap, _MOST_BYTES)
            except BlockingIOError:
                return
            now = time.monotonic()
            if source.cut:
                continue
            self._known[frame[16:22]] = source
            target = self._known.get(frame[10:16])
            begin = max(now, source.up_free)
            seconds = _wire_bytes(frame) / self._rate
            source.up_free = begin + seconds
            for port in self._ports.values() if target is None else (target,):
                if port is not source:
                    self._queue(port, frame, begin, seconds)

    def _queue(self, port: Port, frame: bytes, begin: float, seconds: float) -> None:
        if port.cut or (port.closed and _opens_connection(frame)):
            return
        begin = max(begin + self._delay, port.down_free)
        if begin - time.monotonic() > self._delay + _DROP_S:
            return
        port.down_free = begin + seconds
        port.waiting.append((port.down_free, frame))

    def _deliver(self, now: float) -> float:
        """Hand over what is due. Returns the seconds until there is more."""
        next_due = now + 1.0
        for port in self._ports.values():
            waiting = port.waiting
            while waiting and waiting[0][0] <= now:
                _, frame = waiting.popleft()
                if not port.cut:
                    with contextlib.suppress(OSError):  # a full queue loses frames, as any does
                        os.write(port.tap, frame)
            if waiting:
                next_due = min(next_due, waiting[0][0])
        return max(0.0, next_due - time.monotonic())


def _wire_bytes(frame: bytes) -> int:
    """What a frame takes on a wire, when it is cut into segments."""
    header: int
    size: int
    _, kind, header, size, _, _ = _VNET.unpack_from(frame)
    length = len(frame) - _VNET.size
    segments = max(1, -(-(length - header) // size)) if kind and size else 1
    return length + (segments - 1) * header + segments * _WIRE_BYTES


def _opens_connection(frame: bytes) -> bool:
    """Whether a frame is the first of a TCP connection over IPv4 (SYN without ACK)."""
    packet = frame[_VNET.size + 14 :]
    if frame[_VNET.size + 12 : _VNET.size + 14] != b"\x08\x00" or len(packet) < 34 or packet[9] != socket.IPPROTO_TCP:
        return False
    flags = packet[(packet[0] & 15) * 4 + 13]
    return bool(flags & 0x02) and not flags & 0x10


def _make_port(name: str, address: str, closed: bool) -> Port:
    """A namespace with a device in it. Leaves this process in that namespace."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, f"no network namespace can be made: {os.strerror(code)}")
    namespace = os.open("/proc/self/ns/net", os.O_RDONLY)
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH22x", DEVICE.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR)
    fcntl.ioctl(tap, _TUNSETIFF, request)
    fcntl.ioctl(tap, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for number, value in ((_SIOCSIFADDR, address), (_SIOCSIFNETMASK, "255.255.255.0")):
            packed = struct.pack("16sHH4s16x", DEVICE.encode(), socket.AF_INET, 0, socket.inet_aton(value))
            fcntl.ioctl(control, number, packed)
        for device in (DEVICE, "lo"):
            fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", device.encode(), _IFF_UP))
    return Port(name, namespace, tap, closed)


def _be_prompt() -> None:
    """Ahead of computing processes, so that the delay is the delay also on a busy machine."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def _kill_inhabitants(namespaces: set[tuple[int, int]]) -> None:
    """Every process in the namespaces, until there is none: one that dies may just have started another."""
    for _ in range(200):
        found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        found = [pid for pid in found if pid != os.getpid() and _belongs(pid, namespaces)]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _belongs(pid: int, namespaces: set[tuple[int, int]]) -> bool:
    """Whether a process is in one of the namespaces, or on its way there: then its command names one."""
    try:
        status = os.stat(f"/proc/{pid}/ns/net")
        entering = f"--net=/proc/{os.getpid()}/fd/".encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False  # it is gone
    return entering or (status.st_dev, status.st_ino) in namespaces


def _remove(groups: list[Path]) -> None:
    for group in groups:
        for _ in range(100):
            try:
                group.rmdir()
            except OSError as error:
                if error.errno == errno.EBUSY:
                    time.sleep(0.05)
                    continue
            break


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # standard input says when to end
    wanted = json.loads(sys.argv[1])
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    ports = [_make_port(each["name"], each["address"], each["closed"]) for each in wanted["hosts"]]
    ctypes.CDLL(None).setns(home, _CLONE_NEWNET)
    identities = {(status.st_dev, status.st_ino) for status in (os.fstat(port.namespace) for port in ports)}
    _be_prompt()
    print(json.dumps({port.name: port.namespace for port in ports}), flush=True)
    groups: list[Path] = []
    try:
        groups = Switch(ports, wanted["rate"], wanted["delay"]).run(sys.stdin.fileno())
    finally:
        _kill_inhabitants(identities)
        _remove(groups)


if __name__ == "__main__":
    main()
