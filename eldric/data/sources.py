"""Where a model comes from, as a URI says it.

hf://OWNER/REPOSITORY[@REVISION][:QUANTIZATION]    or    hf://OWNER/REPOSITORY[@REVISION]/FILE.gguf
ollama://[NAMESPACE/]NAME[:TAG]
eldric://HOST:PORT/NAME
"""

import re
from dataclasses import dataclass

from eldric.data.names import check_id
from eldric.errors import InvalidRequest
from eldric.names import split_address

_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB = re.compile(
    rf"(?P<repository>{_WORD}/{_WORD})(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{{0,99}}?))?"
    rf"(?::(?P<quantization>{_WORD})|/(?P<file>[^:@\\]{{1,400}}\.gguf))?"
)
_OLLAMA = re.compile(rf"(?:(?P<namespace>{_WORD})/)?(?P<name>{_WORD})(?::(?P<tag>{_WORD}))?")

_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45}")

#: What an address of each kind looks like, for messages.
FORMS = "hf://OWNER/REPOSITORY[:QUANTIZATION], ollama://NAME[:TAG] and eldric://HOST:PORT/NAME"


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository on Hugging Face. revision: a branch, tag or commit. At most one of quantization and file."""

    repository: str
    revision: str = "main"
    quantization: str = ""
    file: str = ""

    def uri(self, quantization: str) -> str:
        """The address, with the quantization that was chosen."""
        at = "" if self.revision == "main" else f"@{self.revision}"
        which = f"/{self.file}" if self.file else f":{quantization}" if quantization else ""
        return f"hf://{self.repository}{at}{which}"


@dataclass(frozen=True, slots=True)
class OllamaSource:
    """A model of an Ollama store on this machine."""

    name: str
    tag: str = "latest"
    namespace: str = "library"

    @property
    def uri(self) -> str:
        of = "" if self.namespace == "library" else f"{self.namespace}/"
        return f"ollama://{of}{self.name}:{self.tag}"

    @property
    def model(self) -> str:
        """What it is called in our store: as Ollama calls it, without what goes without saying."""
        of = "" if self.namespace == "library" else f"{self.namespace}-"
        return f"{of}{self.name}" + ("" if self.tag == "latest" else f":{self.tag}")


@dataclass(frozen=True, slots=True)
class PeerSource:
    """A model of another data worker. address: "host:port" of its HTTPS server."""

    address: str
    model: str

    @property
    def uri(self) -> str:
        return f"eldric://{self.address}/{self.model}"


Source = HubSource | OllamaSource | PeerSource


def parse_source(uri: str) -> Source:
    """The source that a URI names. Raises InvalidRequest."""
    scheme, separator, rest = uri.partition("://")
    if separator and scheme == "hf" and (match := _HUB.fullmatch(rest)) and _is_plain(match["file"] or ""):
        return HubSource(
            match["repository"], match["revision"] or "main", match["quantization"] or "", match["file"] or ""
        )
    if separator and scheme == "ollama" and (match := _OLLAMA.fullmatch(rest)):
        return OllamaSource(match["name"], match["tag"] or "latest", match["namespace"] or "library")
    if separator and scheme == "eldric" and "/" in rest:
        address, _, model = rest.partition("/")
        if not _HOST.fullmatch(split_address(address)[0]):
            raise InvalidRequest(f"{address[:300]!r} is no address: write host:port")
        return PeerSource(address, check_id(model))
    raise InvalidRequest(f"{uri[:300]!r} names no source of models: those are {FORMS}")


def _is_plain(file: str) -> bool:
    """Whether a file's path stays in its repository."""
    return file.isprintable() and not any(part in (".", "..") for part in file.split("/")) and "//" not in file
