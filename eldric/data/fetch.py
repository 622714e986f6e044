"""Fetches one file over HTTP into a file of the store: goes on after interruptions, and believes no length or byte."""

import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import httpx2

from eldric.data.checksums import BLOCK_BYTES, FileSums, Hasher, write_all
from eldric.data.http_client import RETRYABLE, error_of, is_encoded, reason
from eldric.data.remote import RemoteFile
from eldric.errors import DataLoss, Unavailable

#: Pauses before a transfer that broke off is taken up again, in seconds. It starts anew whenever bytes come.
PAUSES_S: tuple[float, ...] = (0.2, 1.0, 3.0, 8.0)
#: How often a block that came wrong is fetched again.
BLOCK_TRIES = 3

_PIECE_BYTES = 1 << 20
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})", re.ASCII)

#: Called with what is done ("checking" or "downloading") and bytes since the last call, negative for bytes that are
#: given up. May raise, which ends the work.
Progress = Callable[[str, int], None]


class Fetch:
    """One file on its way. What has come stays in `path` whatever happens, unless it turned out wrong."""

    def __init__(self, client: httpx2.Client, extensions: Mapping[str, Any], progress: Progress) -> None:
        self._client, self._extensions, self._progress = client, extensions, progress
        self._hasher, self._have = Hasher(), 0
        self._bad_blocks: dict[int, int] = {}

    def run(self, file: RemoteFile, path: Path) -> FileSums:
        """Brings all of a file to `path`, which may hold its beginning; it is on the disk on return.

        Raises DataLoss for other bytes or lengths than were announced, NotFound, PermissionDenied, Unavailable when
        the source goes silent, OSError when the disk does not take it.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with open(descriptor, "r+b", buffering=0) as target:
            self._check_kept(file, target)
            failures = 0
            while self._have < file.size_bytes:
                before = self._have
                problem = self._try(file, target)
                failures = failures + 1 if self._have <= before else 0
                if self._have < file.size_bytes:
                    self._pause(file, failures, problem)
            sums = self._hasher.sums()
            if sums.sha256 != file.sums.sha256:
                target.truncate(0)
                raise DataLoss(
                    f"{file.name} came with the SHA-256 {sums.sha256}, its source says {file.sums.sha256}: "
                    "what came is thrown away"
                )
            os.fsync(target.fileno())
        return sums

    def _check_kept(self, file: RemoteFile, target: BinaryIO) -> None:
        """Hashes what an earlier try brought; what is more than the file, or wrong, goes."""
        if os.fstat(target.fileno()).st_size > file.size_bytes:
            target.truncate(0)
        target.seek(0)
        while data := target.read(min(_PIECE_BYTES, BLOCK_BYTES - self._have % BLOCK_BYTES)):
            self._progress("checking", len(data))
            self._hash(data)
            if self._is_block_end(file) and not self._is_block_right(file):
                self._back_to_block(target)
                return

    def _try(self, file: RemoteFile, target: BinaryIO) -> str:
        """Fetches until the end, or until the connection breaks, and says why."""
        headers = {"range": f"bytes={self._have}-"} if self._have else {}
        try:
            with self._client.stream("GET", file.url, headers=headers, extensions=dict(self._extensions)) as response:
                if response.status_code in RETRYABLE:
                    return f"it answers {response.status_code}"
                self._check_answer(file, target, response)
                for data in response.iter_raw():
                    self._take(file, target, memoryview(data))
        except (httpx2.TransportError, httpx2.TooManyRedirects, httpx2.InvalidURL) as error:
            return reason(error)
        return "the connection ended early"

    def _check_answer(self, file: RemoteFile, target: BinaryIO, response: httpx2.Response) -> None:
        """Raises unless the answer is what was asked for; without ranges it starts from the beginning."""
        host = response.url.host
        if response.status_code not in (200, 206):
            raise error_of(response, host)
        if is_encoded(response):
            raise DataLoss(f"{host} sends {file.name} encoded, though it was asked not to")
        if response.status_code == 206:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
            if match is None or int(match[1]) != self._have or int(match[3]) != file.size_bytes:
                raise DataLoss(f"{host} sends another range of {file.name} than was asked for, or of another file")
            return
        length = response.headers.get("content-length")
        if length is not None and length != str(file.size_bytes):
            raise DataLoss(f"{host} has {length[:20]} bytes of {file.name}, {file.size_bytes} were announced")
        if self._have:
            self._progress("downloading", -self._have)
            self._hasher, self._have = Hasher(), 0
            target.truncate(0)
            target.seek(0)

    def _take(self, file: RemoteFile, target: BinaryIO, data: memoryview) -> None:
        if self._have + len(data) > file.size_bytes:
            raise DataLoss(f"more bytes of {file.name} come than the {file.size_bytes} that were announced")
        while data:
            part = data[: BLOCK_BYTES - self._have % BLOCK_BYTES]
            write_all(target, part)
            self._hash(part)
            self._progress("downloading", len(part))
            data = data[len(part) :]
            if self._is_block_end(file) and not self._is_block_right(file):
                self._refuse_block(file, target)
                return

    def _refuse_block(self, file: RemoteFile, target: BinaryIO) -> None:
        block = (self._have - 1) // BLOCK_BYTES
        self._back_to_block(target)
        self._bad_blocks[block] = self._bad_blocks.get(block, 0) + 1
        if self._bad_blocks[block] >= BLOCK_TRIES:
            first = block * BLOCK_BYTES
            raise DataLoss(
                f"block {block} of {file.name} (from byte {first}) came wrong {BLOCK_TRIES} times: its SHA-256 is not "
                "the one that its source says; what came before is kept"
            )
        raise httpx2.ReadError(f"block {block} came wrong")

    def _hash(self, data: bytes | memoryview) -> None:
        self._hasher.update(data)
        self._have += len(data)

    def _is_block_end(self, file: RemoteFile) -> bool:
        return self._have % BLOCK_BYTES == 0 or self._have == file.size_bytes

    def _is_block_right(self, file: RemoteFile) -> bool:
        if not file.sums.blocks:
            return True
        block = (self._have - 1) // BLOCK_BYTES
        return self._hasher.newest_block() == file.sums.blocks[block]

    def _back_to_block(self, target: BinaryIO) -> None:
        """Gives up the block that ends here."""
        begin = (self._have - 1) // BLOCK_BYTES * BLOCK_BYTES
        self._progress("downloading", begin - self._have)
        self._hasher.forget_block()
        self._have = begin
        target.truncate(begin)
        target.seek(begin)

    def _pause(self, file: RemoteFile, failures: int, problem: str) -> None:
        """Waits a little. Raises Unavailable after too many failures without a byte between them."""
        self._progress("downloading", 0)
        if failures > len(PAUSES_S):
            raise Unavailable(f"{file.name} does not come: {problem}; what came is kept, ask again to go on")
        until = time.monotonic() + PAUSES_S[max(failures, 1) - 1]
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
            self._progress("downloading", 0)
