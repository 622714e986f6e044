"""Finds a ready-built ggml, checks that it is one that this engine can call, and lists its devices.

Searched in this order: the folder that ELDRIC_GGML_DIR names; an installed llama-cpp-python, which its user may have
built for CUDA, Metal, ROCm or Vulkan; the package transcribe-cpp-native, a dependency. A ggml that is built with
loadable backends carries one library per CPU variant, of which the best that runs here is taken, or the one that
ELDRIC_GGML_VARIANT names: workers of unlike processors then compute the same bits.
"""

import ctypes
import functools
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eldric.engine.errors import LibraryError
from eldric.engine.ggml.api import Api
from eldric.engine.ggml.structs import DEVICE_KINDS, DeviceProps, check_device, check_layout

log = logging.getLogger(__name__)

OLDEST, NEWEST = (0, 25), (0, 99)  # ggml versions that are accepted, the layout check permitting

_PREFIX, _SUFFIX = {"darwin": ("lib", ".dylib"), "win32": ("", ".dll")}.get(sys.platform, ("lib", ".so"))
_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


@dataclass(frozen=True, slots=True)
class Device:
    """One device that the loaded library can compute on."""

    name: str  # as ggml names it: CPU, CUDA0, Vulkan0, Metal
    description: str
    kind: str  # cpu, gpu, igpu, accel or meta
    memory_bytes: int
    memory_free_bytes: int
    host_pointers: bool  # can use memory that the process has mapped, without a copy
    handle: int


class Library:
    """A ggml that is loaded into the process, with its functions bound in `api`. One per folder; never unloaded."""

    def __init__(self, folder: Path, variant: str = "") -> None:
        """`variant`: of the CPU, such as "haswell"; empty for the best.

        Raises LibraryError if the folder holds no ggml or not that variant, or one of another version or struct layout.
        """
        self.folder = folder
        try:
            base = ctypes.CDLL(str(self._file("ggml-base")))
            core = ctypes.CDLL(str(self._file("ggml")))
        except OSError as error:
            raise LibraryError(f"cannot load ggml from {folder}: {error}") from error
        self._libraries = (core, base)
        self.api = Api(self._libraries, str(folder))
        self._log_callback = _LOG_CALLBACK(_log)  # ggml keeps the pointer, so the object must live
        self.api.ggml_log_set(ctypes.cast(self._log_callback, ctypes.c_void_p), None)
        self.version: str = self.api.ggml_version().decode()
        _check_version(self.version, str(folder))
        check_layout(self.api, f"ggml {self.version} in {folder}")
        self._load_cpu(variant)
        self._accelerators_loaded = False

    def devices(self, accelerators: bool = True) -> tuple[Device, ...]:
        """The CPU first. With `accelerators`, backends for GPUs that the folder has are loaded at the first call."""
        if accelerators and not self._accelerators_loaded:
            self._accelerators_loaded = True
            for path in self._backends():
                if not path.name.startswith(f"{_PREFIX}ggml-cpu"):
                    self.api.ggml_backend_load(str(path).encode())  # NULL where its driver is missing
        api = self.api
        handles = [api.ggml_backend_dev_get(index) for index in range(api.ggml_backend_dev_count())]
        found = [self._device(handle) for handle in handles]
        return tuple(sorted(found, key=lambda device: device.kind != "cpu"))

    def device(self, name: str) -> Device:
        """A device by its name, in any case. Raises LibraryError that lists the devices there are."""
        known = self.devices(accelerators=name.lower() != "cpu")
        for device in known:
            if device.name.lower() == name.lower():
                return device
        raise LibraryError(f"ggml has no device {name!r}, only {', '.join(device.name for device in known)}")

    def proc_address(self, device: int, name: str) -> int | None:
        """A function that only the device's backend exports."""
        registry = self.api.ggml_backend_dev_backend_reg(device)
        address: int | None = self.api.ggml_backend_reg_get_proc_address(registry, name.encode())
        return address

    def function(self, name: str, result: Any, *arguments: Any) -> Callable[..., Any] | None:
        """A function beside those of `api`, or None if this ggml does not have it."""
        for library in self._libraries:
            if found := getattr(library, name, None):
                found.restype, found.argtypes = result, arguments
                return found  # type: ignore[no-any-return]
        return None

    def _file(self, name: str) -> Path:
        path = self.folder / f"{_PREFIX}{name}{_SUFFIX}"
        if not path.is_file():
            raise LibraryError(f"{self.folder} holds no {path.name}")
        return path

    def _backends(self) -> list[Path]:
        """Libraries of loadable backends."""
        base = self._file("ggml-base")
        return sorted(path for path in self.folder.glob(f"{_PREFIX}ggml-*{_SUFFIX}") if path != base)

    def _load_cpu(self, wanted: str) -> None:
        """Register the wanted CPU variant, or else the one that scores best here; none if the backend is built in."""
        scores: list[tuple[int, Path]] = []
        for path in self._backends():
            if path.name.startswith(f"{_PREFIX}ggml-cpu"):
                variant = ctypes.CDLL(str(path))
                if function := getattr(variant, "ggml_backend_score", None):
                    scores.append((function(), path))
        if wanted:
            known = {_variant(path): score for score, path in scores if score > 0}
            if wanted not in known:
                listed = ", ".join(sorted(known)) or "none"
                raise LibraryError(f"ELDRIC_GGML_VARIANT is {wanted!r}; of {self.folder} run here: {listed}")
            scores = [each for each in scores if _variant(each[1]) == wanted]
        best, path = max(scores, default=(0, self.folder))
        self.cpu_variant = ""  # as its file is named, such as "zen4"; empty when the library has only one
        if best > 0:
            self.cpu_variant = _variant(path)
            log.debug("cpu_variant=%s score=%d", path.name, best)
            self.api.ggml_backend_load(str(path).encode())
        if not any(device.kind == "cpu" for device in self.devices(accelerators=False)):
            raise LibraryError(f"no CPU variant of ggml in {self.folder} runs on this processor")

    def _device(self, handle: int) -> Device:
        check_device(self.api, handle, f"ggml {self.version} in {self.folder}")
        props = DeviceProps()
        self.api.ggml_backend_dev_get_props(handle, ctypes.byref(props))
        return Device(
            name=props.name.decode(),
            description=(props.description or b"").decode(errors="replace"),
            kind=DEVICE_KINDS[props.type] if props.type < len(DEVICE_KINDS) else "other",
            memory_bytes=props.memory_total,
            memory_free_bytes=props.memory_free,
            host_pointers=props.buffer_from_host_ptr,
            handle=handle,
        )


def find_library(environment: Mapping[str, str] = os.environ) -> Library:
    """The first usable ggml. Raises LibraryError that says where was looked and what was wrong there.

    A folder named by ELDRIC_GGML_DIR is taken or refused; nothing else is tried then. A variant named by
    ELDRIC_GGML_VARIANT must be in the folder and run on this processor.
    """
    variant = environment.get("ELDRIC_GGML_VARIANT", "")
    if chosen := environment.get("ELDRIC_GGML_DIR"):
        return load_library(Path(chosen).resolve(), variant)
    problems = []
    for folder in _installed():
        try:
            return load_library(folder, variant)
        except LibraryError as error:
            log.warning("unusable_ggml=%s reason=%s", folder, error)
            problems.append(str(error))
    tried = "; ".join(problems) or "neither llama-cpp-python nor transcribe-cpp-native is installed"
    raise LibraryError(f"no usable ggml: {tried}. Install transcribe-cpp-native, or name a folder in ELDRIC_GGML_DIR")


@functools.cache
def load_library(folder: Path, variant: str) -> Library:
    """The ggml in a folder, loaded once in the life of the process."""
    return Library(folder, variant)


def _variant(path: Path) -> str:
    """ "zen4" for libggml-cpu-zen4.so."""
    return path.stem.rpartition("cpu-")[2]


def _installed() -> Iterator[Path]:
    """Folders of installed packages that carry a ggml, best first."""
    for package, subfolder in (("llama_cpp", "lib"), ("transcribe_cpp_native", "_native")):
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations or ()) if spec else ():
            folder = Path(location, subfolder)
            if any(folder.glob(f"{_PREFIX}ggml-base*")):
                yield folder


def _check_version(version: str, where: str) -> None:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not OLDEST <= tuple(map(int, numbers.groups())) <= NEWEST:
        wanted = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
        raise LibraryError(f"ggml {version} in {where} is not among the versions that are known to work: {wanted}")


def _log(level: int, text: bytes | None, _: int | None) -> None:
    """ggml's own log lines, as ours. Repacking alone writes one per tensor."""
    if text and (line := text.decode(errors="replace").strip()):
        log.debug("ggml level=%d: %s", level, line)
