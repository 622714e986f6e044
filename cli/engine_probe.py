"""Loads the compute library as a worker would and says what came of it, as JSON: a process of its own, for `doctor`."""

import json
import sys

from eldric.engine.errors import EngineError
from eldric.engine.ggml.library import find_library
from eldric.worker.resources import machine_memory_bytes


def main() -> None:
    """One object: version, cpu_variant, devices and memory_bytes, or problem."""
    try:
        library = find_library()
        answer: dict[str, object] = {
            "version": library.version,
            "cpu_variant": library.cpu_variant,
            "devices": [f"{device.name} ({device.description})" for device in library.devices()],
            "memory_bytes": machine_memory_bytes(),
        }
    except EngineError as error:
        answer = {"problem": str(error)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
