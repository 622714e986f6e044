"""A graphics device for tests: Vulkan on Mesa's software renderer, which is real but for the hardware."""

import functools
import os
import subprocess
import sys

import pytest

NAME = "Vulkan0"
#: ggml leaves software renderers out unless they are named.
ENVIRONMENT = {"GGML_VK_VISIBLE_DEVICES": "0"}
_PROBE = "from eldric.engine.ggml.library import find_library; print(*(each.name for each in find_library().devices()))"


def graphics_device() -> str:
    """The name that the engine knows it by, in a process with ENVIRONMENT. Skips the test where there is none."""
    if NAME not in _found():
        pytest.skip(f"no {NAME} here: `make programs` installs Mesa's software renderer")
    return NAME


@functools.cache
def _found() -> list[str]:
    command = [sys.executable, "-c", _PROBE]
    told = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=60, check=True)
    return told.stdout.split()
