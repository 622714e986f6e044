"""Loads the compute library as a worker would and says what came of it, as JSON: a process of its own, for `doctor`."""

import json
import sys
from pathlib import Path

from eldric.config import NodeConfig
from eldric.engine.errors import EngineError
from eldric.engine.ggml.library import find_library
from eldric.worker.config import WorkerConfig
from eldric.worker.resources import memory_budget


def main() -> None:
    """One object: version, cpu_variant, devices and memory_bytes, or problem."""
    node = NodeConfig("worker", "probe", Path(), controllers=("127.0.0.1:1",))
    try:
        library = find_library()
        answer: dict[str, object] = {
            "version": library.version,
            "cpu_variant": library.cpu_variant,
            "devices": [device.description or device.name for device in library.devices()],
            "memory_bytes": memory_budget(WorkerConfig(node)),
        }
    except EngineError as error:
        answer = {"problem": str(error)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
