"""A small model hub that speaks what huggingface_hub asks for, and can be told to misbehave."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(slots=True)
class Seen:
    """One request."""

    path: str
    range: str
    token: str
    host: str


@dataclass(slots=True)
class FakeHub:
    """Repositories as {"owner/name": {"file": bytes}}. The rest says how it misbehaves.

    silent: nobody is answered until `go_on` is set. cut_at: the connection ends when a file has been sent up to this
    byte; each entry serves once. stall_at: nothing comes after this byte until `go_on` is set. `reached` says that it
    came so far. more: bytes that are sent beyond the end, for ever. ranges: whether Range is understood. statuses:
    answers to the next requests for files. change: what the bytes of a file become on their way. describe: what a
    repository's description becomes.
    """

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    token: str = ""
    silent: bool = False
    cut_at: list[int] = field(default_factory=list)
    stall_at: int = -1
    more: bytes = b""
    ranges: bool = True
    statuses: list[int] = field(default_factory=list)
    change: Callable[[bytes], bytes] = bytes
    describe: Callable[[dict[str, Any]], Any] = dict
    seen: list[Seen] = field(default_factory=list)
    reached: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def add(self, repository: str, files: Mapping[str, Path | bytes]) -> None:
        """Puts files up."""
        kept = self.repositories.setdefault(repository, {})
        for name, file in files.items():
            kept[name] = file if isinstance(file, bytes) else file.read_bytes()

    @property
    def downloads(self) -> list[Seen]:
        return [seen for seen in self.seen if seen.path.startswith("/cdn/")]


@contextlib.contextmanager
def serving_hub() -> Iterator[FakeHub]:
    """A hub on a free port of this machine."""
    hub = FakeHub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path)
        headers = self.headers
        self.hub.seen.append(
            Seen(path, headers.get("range", ""), headers.get("authorization", ""), headers.get("host", ""))
        )
        with contextlib.suppress(ConnectionError):
            if self.hub.silent:
                self.hub.reached.set()
                self.hub.go_on.wait(20)
            if path.startswith("/cdn/"):
                self._file(path.removeprefix("/cdn/"))
            elif self.hub.token and headers.get("authorization") != f"Bearer {self.hub.token}":
                self._json(401, {"error": "Invalid username or password."})
            elif path.startswith("/api/models/"):
                self._describe(path.removeprefix("/api/models/"), parse_qs(address.query))
            elif "/resolve/" in path:
                self._resolve(path.removeprefix("/"))
            else:
                self._json(404, {"error": "Sorry, we can't find the page you are looking for."})

    def _describe(self, path: str, query: dict[str, list[str]]) -> None:
        repository, _, revision = path.partition("/revision/")
        files = self.hub.repositories.get(repository)
        if files is None or revision not in ("", "main", COMMIT):
            self._json(404, {"error": "Repository not found"})
            return
        siblings: list[dict[str, Any]] = []
        for name, data in files.items():
            entry: dict[str, Any] = {"rfilename": name}
            if query.get("blobs"):
                sha256 = hashlib.sha256(data).hexdigest()
                entry |= {"size": len(data), "blobId": sha256[:40]}
                entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        self._json(200, self.hub.describe({"id": repository, "sha": COMMIT, "siblings": siblings, "private": False}))

    def _resolve(self, path: str) -> None:
        repository, _, rest = path.partition("/resolve/")
        data = self.hub.repositories.get(repository, {}).get(rest.partition("/")[2])
        if data is None:
            self._json(404, {"error": "Entry not found"})
            return
        self.send_response(302)
        host = self.hub.url.replace("127.0.0.1", "localhost")  # another host: no token for it
        self.send_header("location", f"{host}/cdn/{path}")
        self.send_header("x-repo-commit", COMMIT)
        self.send_header("x-linked-size", str(len(data)))
        self.send_header("x-linked-etag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("content-length", "0")
        self.end_headers()

    def _file(self, path: str) -> None:
        repository, _, rest = path.partition("/resolve/")
        hub, data = self.hub, self.hub.repositories[repository][rest.partition("/")[2]]
        if hub.statuses:
            self._json(hub.statuses.pop(0), {"error": "try again"})
            return
        size, begin = len(data), 0
        data = hub.change(data)
        if hub.ranges and (field := self.headers.get("range")):
            begin = int(field.removeprefix("bytes=").partition("-")[0])
            self.send_response(206)
            self.send_header("content-range", f"bytes {begin}-{size - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("etag", f'"{hashlib.sha256(data).hexdigest()}"')
        if hub.more:
            self.send_header("connection", "close")  # its length is told by its end
        else:
            self.send_header("content-length", str(len(data) - begin))
        self.end_headers()
        if self.command == "GET":
            self._send(data, begin)

    def _send(self, data: bytes, begin: int) -> None:
        hub = self.hub
        end = hub.cut_at.pop(0) if hub.cut_at else len(data)
        for at in range(begin, end, 1 << 16):
            if 0 <= hub.stall_at <= at:
                self.wfile.flush()
                hub.reached.set()
                hub.go_on.wait(20)
            self.wfile.write(data[at : min(at + (1 << 16), end)])
        if end < len(data):
            self.close_connection = True
        elif hub.more:
            while not hub.go_on.is_set():
                self.wfile.write(hub.more)
            self.close_connection = True

    def _json(self, status: int, document: object) -> None:
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
