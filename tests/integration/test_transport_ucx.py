"""UCX passes the suite of all transports, and a hostile one, in a process of its own: see tests/transports.py."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.transports import UCX_ALONE

FOLDER = Path(__file__).parent
INSIDERS = "ucx_insiders"


@pytest.mark.skipif(not find_spec("ucxx"), reason="UCX is not installed: eldric[ucx]")
@pytest.mark.timeout(400)
@pytest.mark.slow
@pytest.mark.parametrize(
    "part", ["test_transport_frames", "test_transport_peers", "test_transport_deaths", "test_transport_door", INSIDERS]
)
def test_ucx_passes_the_suite_of_all_transports(part: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{FOLDER}/{part}.py"]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command, env=outside | {UCX_ALONE: "1"}, cwd=FOLDER.parents[1], capture_output=True, text=True, timeout=380
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
