"""Does the kernel's own NFS client bring only a shard's pages, and does nobody hang when its server stops?

    python -m tests.qemu.kernel_nfs

Starts an NFS server here and a virtual machine whose kernel has an NFS client. In it a worker mounts the store, loads a
few layers, sees the server stop, and go on. Prints a table, and JSON on the last line; exit code 1 when it is not so.
Needs root, and `apt-get install nfs-ganesha nfs-ganesha-vfs qemu-system-x86 kmod iproute2`. Takes two or three minutes.
"""

import json
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eldric.engine.gguf import ModelFile
from eldric.engine.shard import LayerRange, shard_of
from eldric.engine.spec import spec_of
from tests.models import write_small_llama
from tests.nfs import Server, exporting
from tests.qemu.machine import Image
from tests.replicas import MODEL, SHAPE, filled_store

LAYERS = LayerRange(2, 5)
#: This machine, as a guest on QEMU's user network sees it.
HOST = "10.0.2.2"
MOST = 1.02
_TIMEOUT_S = 300.0


def events(console: "subprocess.Popen[str]") -> Iterator[dict[str, Any]]:
    """What the guest says. Everything else on its console goes to stderr."""
    deadline = time.monotonic() + _TIMEOUT_S
    assert console.stdout is not None
    for line in console.stdout:
        if line.startswith('{"event"'):
            yield json.loads(line)
        else:
            print(line, end="", file=sys.stderr)
        if time.monotonic() > deadline:
            raise TimeoutError(f"the guest is not done after {_TIMEOUT_S:.0f} s")


def follow(console: "subprocess.Popen[str]", server: Server) -> dict[str, dict[str, Any]]:
    """Stops the server when the stage is loaded, and lets it go on when a second load was refused."""
    assert console.stdin is not None
    seen: dict[str, dict[str, Any]] = {}
    for event in events(console):
        name = event.pop("event")
        seen[name] = event
        if name == "loaded":
            event["sent_bytes"] = server.sent_bytes()
            server.signal(signal.SIGSTOP)
        elif name == "refused":
            server.signal(signal.SIGCONT)
        if name in ("loaded", "refused"):
            console.stdin.write("\n")
            console.stdin.flush()
    return seen


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="eldric-qemu-") as name:
        folder = Path(name)
        source = filled_store(folder, write_small_llama(folder / "model.gguf", SHAPE))
        path = folder / "models" / MODEL / f"{MODEL}.gguf"
        with ModelFile.open(path) as model:
            shard = sum(part.length for part in shard_of(model, spec_of(model), LAYERS).ranges)
        with exporting(folder / "models") as server:
            source.folder = "/nowhere"
            export = source.exports.add()
            export.CopyFrom(server.export)
            export.host = HOST
            (folder / "source").write_bytes(source.SerializeToString())
            image = Image(folder / "image")
            here = Path(__file__).resolve().parents[2]
            guest = f"{shlex.quote(sys.executable)} -m tests.qemu.guest /run/given/source {LAYERS.start} {LAYERS.stop}"
            command = f"cd {shlex.quote(str(here))} && exec env PATH=/usr/sbin:/usr/bin:/sbin:/bin {guest}"
            with image.start(image.initrd(command, [folder / "source"])) as console:
                try:
                    seen = follow(console, server)
                finally:
                    console.kill()
            version = image.version
    return report(version, shard, path.name, seen)


def report(version: str, shard: int, model: str, seen: dict[str, dict[str, Any]]) -> int:
    loaded, noticed, refused = (seen.get(name, {}) for name in ("loaded", "noticed", "refused"))
    ratio = loaded.get("sent_bytes", 0) / shard
    good = bool(0 < ratio <= MOST and refused and seen.get("done") == {"mounted": []})
    for name, facts in seen.items():
        print(f"{name:14}", ", ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"the shard has {shard} bytes; the server sent {ratio:.4f} of them")
    document = {
        "kernel": version,
        "shard_bytes": shard,
        "sent_bytes": loaded.get("sent_bytes"),
        "read_bytes": loaded.get("read_bytes"),
        "sent_ratio": round(ratio, 4),
        "noticed_s": noticed.get("seconds"),
        "refused_s": refused.get("seconds"),
        "ok": good,
    }
    print(json.dumps(document))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
