"""What `doctor` looks at in a cluster. Every look has a deadline; what fails is told as a fact, never raised."""

import asyncio
import contextlib
import datetime
import email.utils
import http.client
import ssl
import time
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import psutil

from eldric.cli.health_words import health_words
from eldric.cli.local import LocalCluster
from eldric.cli.log_files import last_lines
from eldric.cli.processes import OUTPUT
from eldric.cli.units import parse_memory
from eldric.client import AsyncClient, Cluster, ModelDetails, ModelInfo, NodeInfo, PipelineInfo, Plan, Worker
from eldric.errors import EldricError
from eldric.nfs.mountinfo import remote_mount
from eldric.security import Identity
from eldric.worker.mounted.process import Silent, look

T = TypeVar("T")

#: Deadline of one call, in seconds.
CALL_S = 4.0
#: Models whose plan is asked for.
_PLANS = 4


@dataclass(slots=True)
class ClusterFacts:
    """What could be found out; a part that could not be is empty."""

    controllers: dict[str, str] = field(default_factory=dict)
    nodes: list[NodeInfo] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)
    pipelines: list[PipelineInfo] = field(default_factory=list)
    models: list[ModelDetails] = field(default_factory=list)
    unusable: list[ModelInfo] = field(default_factory=list)
    plans: dict[str, Plan | str] = field(default_factory=dict)
    health: dict[str, str] = field(default_factory=dict)
    skews_s: dict[str, float] = field(default_factory=dict)


async def look_at(cluster: Cluster) -> ClusterFacts:
    """Ask the controllers, and then everybody they name."""
    facts = ClusterFacts()
    for address in cluster.controllers:
        facts.controllers[address] = await _ask_controller(cluster, address)
    reached = tuple(address for address, wrong in facts.controllers.items() if not wrong)
    if not reached:
        return facts
    async with AsyncClient(Cluster(reached, cluster.operator, cluster.folder), timeout_s=CALL_S) as client:
        facts.nodes = await _or(client.nodes(), [])
        facts.workers = await _or(client.workers(), [])
        facts.pipelines = await _or(client.status(), [])
        listed = await _or(client.models.list(), [])
        facts.unusable = [info for info in listed if info.problem]
        stored = [info for info in listed if not info.problem]
        facts.models = [found for info in stored if (found := await _or(client.models.show(info.name), None))]
        if any(worker.state == "up" for worker in facts.workers):
            for info in stored[:_PLANS]:
                facts.plans[info.name] = await _plan(client, info.name)
    looks = [_look_at_node(node, cluster.identity()) for node in facts.nodes if node.state == "up" and node.http_url]
    for name, wrong, skew in await asyncio.gather(*looks):
        facts.health[name] = wrong
        if skew is not None:
            facts.skews_s[name] = skew
    return facts


async def _ask_controller(cluster: Cluster, address: str) -> str:
    try:
        async with AsyncClient(Cluster((address,), cluster.operator), timeout_s=CALL_S) as client:
            await client.nodes()
    except EldricError as error:
        return error.message
    return ""


async def _plan(client: AsyncClient, model: str) -> Plan | str:
    try:
        return await client.plan(model, name=f"doctor-{time.time_ns()}")
    except EldricError as error:
        return error.message


async def _or(asked: Awaitable[T], otherwise: T) -> T:
    with contextlib.suppress(EldricError):
        return await asked
    return otherwise


async def _look_at_node(node: NodeInfo, identity: Identity) -> tuple[str, str, float | None]:
    """Its name, what is wrong with its /health, and how far our clock is ahead of its."""
    name = f"{node.kind} {node.name}"
    try:
        status, body, date = await asyncio.to_thread(_get_health, node.http_url, identity)
    except (OSError, http.client.HTTPException) as error:
        return name, f"{node.http_url} cannot be reached: {error}", None
    skew = None
    if moment := email.utils.parsedate_to_datetime(date) if date else None:
        skew = time.time() - moment.timestamp()
    if status == 200:
        return name, "", skew
    return name, f"not ready: {body}", skew


def _get_health(url: str, identity: Identity) -> tuple[int, str, str]:
    """Status, what the body says, and the date of an answer."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 443
    connection = http.client.HTTPConnection(host, port, timeout=CALL_S)
    if parts.scheme == "https":
        context: ssl.SSLContext = identity.client_context()
        connection = http.client.HTTPSConnection(host, port, timeout=CALL_S, context=context)
    with contextlib.closing(connection):
        connection.request("GET", "/health")
        answer = connection.getresponse()
        body = answer.read(64 * 1024).decode(errors="replace")
        return answer.status, health_words(body), answer.getheader("date", "")


def promises(local: LocalCluster) -> tuple[int, int]:
    """Bytes of this machine's memory that the workers of a local cluster offer for stages, and how much it has."""
    total = psutil.virtual_memory().total
    offers = [
        parse_memory(entry.option("--memory") or "100%")
        for entry in local.nodes
        if entry.kind == "worker" and (entry.option("--device") or "cpu").lower() == "cpu"
    ]
    return sum(size or int(total * share) for size, share in offers), total


def stopped_nodes(local: LocalCluster) -> dict[str, str]:
    """Nodes of a local cluster that do not run, and the last words of those that had any."""
    stopped = {}
    for process in local.processes():
        if not process.running:
            lines = last_lines(process.folder / OUTPUT, 1)
            stopped[process.entry.name] = lines[0].strip() if lines else ""
    return stopped


def certificates(folders: Iterable[Path]) -> dict[str, tuple[datetime.datetime, datetime.datetime]]:
    """First and last moment of the certificates in these folders; those that cannot be read are left out."""
    found = {}
    for folder in folders:
        with contextlib.suppress(EldricError, OSError, ValueError):
            identity = Identity.load(folder)
            found[f"{identity.kind} {identity.name}"] = identity.validity()
    return found


def store_sizes(details: ModelDetails) -> dict[str, int | None] | str:
    """Sizes of a model's files as this machine sees them, in bytes; None for what is not there. Or why none is seen."""
    if details.files and (mount := remote_mount(Path(details.folder))):
        where = f"{details.folder} is on the mount {mount.point} ({mount.source}), which"
        try:
            look([(Path(details.folder, details.files[0][0]), 0)], CALL_S)
        except Silent:
            return f"{where} does not answer"
        except FileNotFoundError:
            pass
        except OSError as error:
            return f"{where} fails: {error.strerror}"
    sizes: dict[str, int | None] = {}
    for path, _ in details.files:
        try:
            sizes[path] = (Path(details.folder) / path).stat().st_size
        except OSError:
            sizes[path] = None
    return sizes
