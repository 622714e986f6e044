"""Compiles the kernels of a format for the processor at hand, once: the machine code is kept in the user's cache.

A kept file is taken only if it lies in a folder that nobody but the user can write to, and begins with the digest of
what follows. Its name tells the processor, the compiler and the sources, so anything new makes a new file.
"""

import contextlib
import hashlib
import logging
import os
import stat
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from llvmlite import __version__ as compiler_version
from llvmlite import binding

from eldric.engine.kernels.attention import write_module as write_attention
from eldric.engine.kernels.formats import FORMATS
from eldric.engine.kernels.isa import Isa, host_features, isa_of
from eldric.engine.kernels.largest import write_module as write_largest
from eldric.engine.kernels.layout import Layout
from eldric.engine.kernels.product import write_module as write_product
from eldric.engine.tensor_types import TensorType

log = logging.getLogger(__name__)

_LARGEST, _ATTENTION = "largest", "attention"
_KV_TYPES = (TensorType.F16, TensorType.F32)
_MOST_HEAD_DIM = 256
_USUAL_HEAD_DIMS = (64, 128)
_COMPILE_S = 60.0  # some 20 times of what the largest module takes
_DIGEST_BYTES = hashlib.sha256().digest_size
_lock = threading.Lock()  # llvmlite's compiler is used by one thread at a time
_engines: dict[tuple[str, Isa], binding.ExecutionEngine] = {}  # they own the machine code


@dataclass(frozen=True, slots=True)
class Kernels:
    """A format's compiled functions, as addresses. They stay for the life of the process."""

    layout: Layout
    pack: int
    product: int


def kernels_for(kind: TensorType, isa: Isa | None = None) -> Kernels | None:
    """The kernels of a type, or None if there are none for it or for this processor. isa: instead of the best one."""
    chosen = isa or isa_of(host_features())
    if chosen is None or kind not in FORMATS:
        return None
    layout = FORMATS[kind](chosen.lanes)
    pack, product = _functions(kind.name, chosen, ("pack", "product"))
    return Kernels(layout, pack, product)


def largest_kernel(isa: Isa | None = None) -> tuple[int, int] | None:
    """The address of `largest`, and how many values a row must have; None if there is no kernel for this processor."""
    chosen = isa or isa_of(host_features())
    if chosen is None:
        return None
    (address,) = _functions(_LARGEST, chosen, ("largest",))
    return address, chosen.lanes


def prepare(everything: bool = False) -> str | None:
    """Have the compiler take its memory now, and not with the first stage. everything: compile all kernels that are not
    yet kept. Returns the name of the processor's extension; None if it has none that kernels were written for."""
    isa = isa_of(host_features())
    largest_kernel()
    for kind in FORMATS if everything else ():
        kernels_for(kind)
    for head_dim in _USUAL_HEAD_DIMS if everything else ():
        attention_kernel(head_dim, TensorType.F16)
    return None if isa is None else isa.name


def attention_kernel(head_dim: int, kind: TensorType, isa: Isa | None = None) -> int | None:
    """The address of `attend` for keys and values of a type; None if it is not written for them or this processor."""
    chosen = isa or isa_of(host_features())
    if chosen is None or kind not in _KV_TYPES or head_dim % 16 or not 16 <= head_dim <= _MOST_HEAD_DIM:
        return None
    (address,) = _functions(f"{_ATTENTION}-{kind.name}-{head_dim}", chosen, ("attend",))
    return address


def compile_module(module: str, isa: Isa) -> bytes:
    """The machine code of a module: `largest`, `attention-F16-64` and the like, or a format's by its type's name."""
    parsed = binding.parse_assembly(_write(module, isa))
    parsed.verify()
    # The IR is in its final form: passes over it would change nothing but the wait.
    code: bytes = _machine().emit_object(parsed)
    return code


def _functions(module: str, isa: Isa, names: tuple[str, ...]) -> list[int]:
    """Addresses of functions of a module, which is compiled at its first use in the process."""
    with _lock:
        engine = _engines.get((module, isa))
        if engine is None:
            engine = _engines[module, isa] = _load(module, isa)
        return [engine.get_function_address(name) for name in names]


def _load(module: str, isa: Isa) -> binding.ExecutionEngine:
    path = _folder() / _file_name(module, isa)
    code = _kept(path)
    if code is None:
        code = _compile_apart(module, isa)
        _keep(path, code)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine


def _machine() -> binding.TargetMachine:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features().flatten()
    target = binding.Target.from_default_triple()
    return target.create_target_machine(cpu=binding.get_host_cpu_name(), features=features, opt=3)


def _compile_apart(module: str, isa: Isa) -> bytes:
    """Compile in a process of its own: the compiler would keep some 10 MB for each module in this one."""
    command = [sys.executable, "-m", "eldric.engine.kernels", module, isa.name]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_COMPILE_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("kernels_not_compiled_apart=%s reason=%s", module, error)
        return compile_module(module, isa)
    return done.stdout


def _write(module: str, isa: Isa) -> str:
    name, *options = module.split("-")
    if name == _ATTENTION:
        kind, head_dim = options
        return write_attention(int(head_dim), TensorType[kind] is TensorType.F16, isa)
    if name == _LARGEST:
        return write_largest(isa.lanes)
    return write_product(FORMATS[TensorType[name]](isa.lanes), isa)


def _kept(path: Path) -> bytes | None:
    try:
        if not _is_private(path.parent):
            return None
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(code).digest() != digest:
        log.warning("kernel_cache_damaged=%s", path)
        return None
    return code


def _keep(path: Path, code: bytes) -> None:
    """Other processes see nothing or all of it."""
    partial = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial.write_bytes(hashlib.sha256(code).digest() + code)
        partial.replace(path)
    except OSError as error:
        log.info("kernels_not_kept=%s reason=%s", path, error)
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _folder() -> Path:
    return platformdirs.user_cache_path("eldric") / "kernels"


def _is_private(folder: Path) -> bool:
    """Whether only this user can put files there: machine code in it is run."""
    if not hasattr(os, "getuid"):
        return True
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _file_name(module: str, isa: Isa) -> str:
    compiler = (compiler_version, *map(str, binding.llvm_version_info), binding.get_host_cpu_name())
    features = sorted(name for name, there in host_features().items() if there)
    return f"{module.lower()}-{isa.name}-{_digest((*compiler, *features, _SOURCES))[:32]}"


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


# Read when they are imported: later, an upgrade may have put others in their place.
_SOURCES = _digest(path.read_text() for path in sorted(Path(__file__).parent.glob("*.py")))
