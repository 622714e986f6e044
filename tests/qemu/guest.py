"""What runs in the virtual machine: a worker that mounts the store with the kernel's NFS client and loads a shard.

Usage: python -m tests.qemu.guest SOURCE FIRST LAST. SOURCE: a file with a serialized ModelSource. Says what happened as
lines of JSON on stdout. After the line "loaded" the host stops the server.
"""

import asyncio
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from eldric.config import NodeConfig
from eldric.errors import NotReady
from eldric.nfs.mountinfo import mounts
from eldric.v1 import stage_pb2
from eldric.worker.config import WorkerConfig
from eldric.worker.loading import StageLoader
from eldric.worker.metrics import WorkerMetrics
from eldric.worker.mounted.watch import MountWatch
from eldric.worker.stages import StageTable
from tests.loads import middle_stage

FOLDER = Path("/run/worker")


def say(event: str, **facts: Any) -> None:
    print(json.dumps({"event": event, **facts}), flush=True)


def read_bytes() -> int:
    """Bytes that the NFS client read from its server, by its own count: the fifth number of mountstats' "bytes"."""
    (line,) = re.findall(r"^\s*bytes:\s*(.*)$", Path("/proc/self/mountstats").read_text(), re.MULTILINE)
    return int(line.split()[4])


async def main(source: stage_pb2.ModelSource, first: int, last: int) -> None:
    config = WorkerConfig(NodeConfig("worker", "guest", FOLDER, controllers=("127.0.0.1:1",)), threads=1)
    loader = StageLoader(config, WorkerMetrics(CollectorRegistry()), lambda: None)
    table, changed = StageTable(config, loader), asyncio.Event()
    watch = MountWatch(loader.mounts, table, changed.set, CollectorRegistry())
    began = time.monotonic()
    loaded = await table.load(middle_stage(source, first, last, "one"), lambda _: None)
    (mount,) = [each for each in mounts() if each.kind == "nfs4"]
    say(
        "loaded",
        seconds=round(time.monotonic() - began, 2),
        mount=f"{mount.kind} {mount.source}",
        read_bytes=read_bytes(),
        mapped_bytes=loaded.memory.mapped_bytes,
        locked_bytes=loaded.memory.locked_bytes,
    )
    sys.stdin.readline()  # the host has stopped the server
    began = time.monotonic()
    await watch.start()
    async with asyncio.timeout(30):
        await changed.wait()
    (held,) = table
    say("noticed", seconds=round(time.monotonic() - began, 2), status=held.status().message)
    began = time.monotonic()
    try:
        await table.load(middle_stage(source, first, last, "two"), lambda _: None)
    except NotReady as error:
        say("refused", seconds=round(time.monotonic() - began, 2), error=error.message)
    sys.stdin.readline()  # the server goes on
    async with asyncio.timeout(60):
        while held.status().message:
            changed.clear()
            await changed.wait()
    await table.load(middle_stage(source, first, last, "three"), lambda _: None)
    say("answers again", read_bytes=read_bytes())
    await watch.stop()
    await table.close()
    await watch.unmount()
    say("done", mounted=[each.point for each in mounts() if each.kind == "nfs4"])


if __name__ == "__main__":
    told = stage_pb2.ModelSource.FromString(Path(sys.argv[1]).read_bytes())
    asyncio.run(main(told, int(sys.argv[2]), int(sys.argv[3])))
