"""Fails when the committed stubs in eldric/v1 differ from what protos/ generates now."""

import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(ROOT / "protos" / "generate.py"), folder], check=True)
        fresh = Path(folder) / "eldric" / "v1"
        names = {path.name for path in fresh.iterdir()}
        committed = {path.name for path in (ROOT / "eldric" / "v1").glob("*_pb2*")}
        _, differ, missing = filecmp.cmpfiles(fresh, ROOT / "eldric" / "v1", sorted(names), shallow=False)
        stale = sorted({*differ, *missing, *(committed - names)})
    if stale:
        print(f"stubs out of date, run `make protos`: {', '.join(stale)}")
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
