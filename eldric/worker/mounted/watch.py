"""Notices within seconds that a mount hangs or is gone while stages map files from it, or that such a file was changed.

A thread that waits for a dead server cannot be taken back, so the waiting is done by a process: one per mount.

A file that has another in its place is still there for those who opened it, and their stages go on. One that is written
to, or cut, is not what was loaded any more: its stages end before they say anything wrong, and may be loaded again.
Between two looks a stage may touch what was cut off, which ends the worker's process, unless its weights were copied.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Gauge

from eldric.worker.commands import Degrade
from eldric.worker.held_stage import HeldStage
from eldric.worker.mounted.changes import Changes, FileStamp, changes, stamps_of
from eldric.worker.mounted.mounts import MountedFile, Mounts
from eldric.worker.mounted.process import Child, Silent
from eldric.worker.stages import StageTable

log = logging.getLogger(__name__)

#: Pause between two probes of a mount, and the longest wait for an answer, in seconds.
INTERVAL_S = 2.0
ANSWER_S = 1.0
#: How long a stage that has to end stands broken before, so that others hear why; the ring is not mended so soon.
_TELL_S = 0.3

_GOES_ON = "the stage goes on with what is in memory"


@dataclass(slots=True)
class Probe:
    """Probes one mount. `problem` is empty while it answers. found: what the probe saw of its file."""

    file: MountedFile
    problem: str = ""
    found: FileStamp | None = None
    _child: Child | None = None
    _stuck: Child | None = None

    def ask(self) -> str:
        """What is wrong with the mount now. Blocks for about ANSWER_S at most, when the process runs."""
        self.found = None
        if self._stuck is not None and not self._stuck.ended:
            return "does not answer"
        try:
            child = self._running()
            path = self.file.path
            child.say(str(path))
            device, inode, size_bytes, changed_ns = json.loads(child.line(ANSWER_S))
            self.found = FileStamp(path, device, inode, size_bytes, changed_ns)
        except Silent:
            self._stuck = self._child
            self.close()
            return "does not answer"
        except OSError as error:
            if self._child is not None and self._child.ended:
                self.close()
            return f"fails: {error.strerror}"
        return ""

    def _running(self) -> Child:
        if self._child is None:
            self._child = Child("probe", {})
        return self._child

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
        self._child = None


class MountWatch:
    """Watches the mounts that are in use, and tells `Mounts` which do not answer, so that new loads avoid them."""

    def __init__(
        self,
        mounts: Mounts,
        stages: StageTable,
        on_change: Callable[[], None],
        registry: CollectorRegistry,
    ) -> None:
        """stages: all of this worker, now and later; on_change: called in the loop when a mount's state changed."""
        self._mounts, self._stages, self._on_change = mounts, stages, on_change
        self._probes: dict[str, Probe] = {}
        self._task: asyncio.Task[None] | None = None
        self._answers = Gauge(
            "eldric_mount_answers",
            "1 while the file server of a mount that stages map files from answers, else 0",
            ["mount"],
            registry=registry,
        )

    async def start(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="mounts")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        for probe in self._probes.values():
            await asyncio.to_thread(probe.close)
        self._probes.clear()

    async def unmount(self) -> None:
        """Takes the worker's own mounts away. For when no stage maps files any more."""
        await asyncio.to_thread(self._mounts.close)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                await self._look()
            except Exception:
                log.exception("event=probe_failed")

    async def _look(self) -> None:
        files = [held.loaded.mounted for held in self._stages if held.loaded is not None]
        used = {file.mount.point: file for file in files if file is not None}
        for point in self._probes.keys() - used.keys():
            await asyncio.to_thread(self._probes.pop(point).close)
            self._mounts.problems.pop(point, None)
            self._answers.remove(point)
        for point, file in used.items():
            self._probes.setdefault(point, Probe(file)).file = file
        changed = await asyncio.gather(*(self._ask(point, probe) for point, probe in self._probes.items()))
        for held in list(self._stages):
            mapped = held.loaded.mounted if held.loaded is not None else None
            problem = self._mounts.problems.get(mapped.mount.point, "") if mapped is not None else ""
            told, held.mount_problem = held.mount_problem, f"{problem}; {_GOES_ON}" if problem else ""
            if not problem:
                await self._compare(held)
            changed.append(told != held.mount_problem)
        if any(changed):
            self._on_change()

    async def _compare(self, held: HeldStage) -> None:
        """Hold the files of a stage against what was loaded."""
        made = await self._changes(held)
        if made.replaced:
            held.mount_problem = f"{made.replaced}; {_GOES_ON}"
        if made.in_place and not held.unloading:
            log.error("event=file_changed pipeline=%s stage=%d reason=%r", *held.key[:2], made.in_place)
            reason = f"stage {held.key.stage} of {held.request.stage_count} had to end: {made.in_place}"
            if held.loaded is not None:
                held.loaded.thread.post(Degrade(made.in_place))
                await asyncio.sleep(_TELL_S)
            await self._stages.unload(held.key.pipeline_id, held.key.stage, held.key.epoch, reason)

    async def _changes(self, held: HeldStage) -> Changes:
        loaded = held.loaded
        if loaded is None or not loaded.stamps:
            return Changes()
        if loaded.mounted is None:
            now = await asyncio.to_thread(stamps_of, [each.path for each in loaded.stamps])
        else:  # as a process saw it that may hang
            probe = self._probes.get(loaded.mounted.mount.point)
            found = probe.found if probe is not None else None
            now = {found.path: found} if found is not None else {}
        return changes(loaded.stamps, now)

    async def _ask(self, point: str, probe: Probe) -> bool:
        """Probe a mount; whether it changed."""
        problem, source = await asyncio.to_thread(probe.ask), probe.file.mount.source
        self._answers.labels(point).set(0 if problem else 1)
        changed, probe.problem = problem != probe.problem, problem
        if problem:
            self._mounts.problems[point] = f"the mount {point} ({source}) {problem}"
        else:
            self._mounts.problems.pop(point, None)
        if changed and problem:
            log.warning("event=mount_silent mount=%s source=%s problem=%r", point, source, problem)
        elif changed:
            log.info("event=mount_answers mount=%s source=%s", point, source)
        return changed
