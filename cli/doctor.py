"""eldric-cli doctor: what is wrong with this machine or cluster, and what to do."""

import asyncio
import datetime
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import psutil
import typer
from platformdirs import user_cache_path
from rich.table import Table
from rich.text import Text

from eldric.cli import cluster_checks, cluster_facts, machine_checks, machine_facts, options, processes
from eldric.cli.cluster_checks import StoreView
from eldric.cli.connect import check_operator, cluster_of
from eldric.cli.findings import Finding, Level, ok, problem
from eldric.cli.local import LocalCluster
from eldric.cli.membership import HOME
from eldric.cli.output import out, print_json
from eldric.client import Cluster
from eldric.errors import EldricError, NotFound

app = options.new_app()

#: Columns of a terminal where the check stands beside what is said of it.
_WIDE_ENOUGH = 72

_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "red"}


@app.command()
def doctor(
    node: Annotated[
        Path | None, typer.Option("--folder", help="Also look at the certificate of the node in this folder.")
    ] = None,
    folder: options.Dir = None,
    controller: options.Controller = None,
    as_json: options.Json = False,
) -> None:
    """Say what is wrong with this machine or the cluster, and what to do.

    Exit code 1 when there is a problem; warnings are none.
    """
    findings: list[Finding] = []
    for found in _examine(folder, controller, node):
        findings.append(found)
        if not as_json:
            _show(found)
    counts = {level: sum(found.level is level for found in findings) for level in Level}
    if as_json:
        print_json({"checks": findings, "problems": counts[Level.PROBLEM], "warnings": counts[Level.WARNING]})
    else:
        out.print(f"\n{_count(counts[Level.PROBLEM], 'problem')}, {_count(counts[Level.WARNING], 'warning')}")
    if counts[Level.PROBLEM]:
        raise typer.Exit(1)


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def _show(found: Finding) -> None:
    """One line and one of advice; on a terminal they wrap within their column."""
    level, check = (f"{found.level:<8}", _STYLES[found.level]), f"{found.check:<18} "
    if not out.is_terminal:
        out.print(Text.assemble(level, f" {check}", found.message))
        if found.advice:
            out.print(Text(f"{'':<28}{found.advice}", "dim"))
        return
    beside = out.width >= _WIDE_ENOUGH
    message = Text.assemble("" if beside else f"{found.check}: ", found.message)
    if found.advice:
        message.append(f"\n{found.advice}", "dim")
    grid = Table.grid(padding=(0, 1, 0, 0))
    for _ in range(2 if beside else 1):
        grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text.assemble(level), *([Text(check)] if beside else []), message)
    out.print(grid)


def _examine(folder: Path | None, controller: str | None, node: Path | None) -> Iterator[Finding]:
    try:
        cluster = cluster_of(folder, controller)
    except NotFound as error:
        cluster = None
        named = folder is not None or controller is not None
        missing = problem("cluster", error.message, "name another") if named else ok("cluster", "none is named")
    yield from _machine(cluster)
    if cluster is None:
        yield missing
    else:
        yield from _cluster(cluster)
    folders = [node] if node is not None else []
    folders += sorted(path.parent for path in HOME.glob("*/node.pem"))
    if cluster is not None:
        folders.append(cluster.operator)
        if cluster.folder is not None:
            folders += sorted(path.parent for path in cluster.folder.glob("*/node.pem") if path.parent not in folders)
    now = datetime.datetime.now(datetime.UTC)
    yield from cluster_checks.check_certificates(cluster_facts.certificates(folders), now)


def _machine(cluster: Cluster | None) -> Iterator[Finding]:
    yield machine_checks.check_python(sys.version_info[:3])
    yield machine_checks.check_packages(machine_facts.packages())
    engine = machine_facts.engine()
    yield machine_checks.check_engine(engine)
    memory = psutil.virtual_memory()
    total = memory.total if isinstance(engine, str) else min(memory.total, engine.memory_bytes)
    yield machine_checks.check_memory(total, min(total, memory.available))
    place = cluster.folder if cluster is not None and cluster.folder is not None else user_cache_path("eldric")
    yield machine_checks.check_disk(machine_facts.disk(place))
    yield machine_checks.check_open_files(machine_facts.limit(resource.RLIMIT_NOFILE))
    yield machine_checks.check_locked_memory(machine_facts.limit(resource.RLIMIT_MEMLOCK))
    yield machine_checks.check_ports(machine_facts.listeners(), processes.node_pids())


def _cluster(cluster: Cluster) -> Iterator[Finding]:
    if cluster.folder is not None:
        local = LocalCluster.load(cluster.folder)
        stopped = cluster_facts.stopped_nodes(local)
        yield cluster_checks.check_local_nodes(stopped, len(local.nodes), cluster.folder)
        yield machine_checks.check_promises(*cluster_facts.promises(local))
        if len(stopped) == len(local.nodes):
            return
    try:
        check_operator(cluster)
    except NotFound as error:
        told, _, advice = error.message.partition(": ")
        yield problem("operator", told, advice)
        return
    facts = asyncio.run(_look(cluster))
    if isinstance(facts, str):
        yield problem("controller", facts, "`eldric-cli join --kind client` with a token makes you an operator")
        return
    yield from cluster_checks.check_controllers(facts.controllers)
    if all(facts.controllers.values()):
        return
    yield from cluster_checks.check_nodes(facts.nodes)
    yield cluster_checks.check_versions(facts.nodes)
    yield from cluster_checks.check_health(facts.health)
    yield from machine_checks.check_clock(facts.skews_s)
    yield from cluster_checks.check_memory_of(facts.workers)
    yield from cluster_checks.check_pipelines(facts.pipelines)
    yield from cluster_checks.check_engines(facts.workers, facts.pipelines)
    yield from cluster_checks.check_plans(facts.plans)
    yield from cluster_checks.check_models(facts.unusable)
    views = {
        each.info.name: StoreView(each.folder, each.files, cluster_facts.store_sizes(each)) for each in facts.models
    }
    yield from cluster_checks.check_stores(views)


async def _look(cluster: Cluster) -> cluster_facts.ClusterFacts | str:
    try:
        return await cluster_facts.look_at(cluster)
    except EldricError as error:
        return error.message
