"""What `doctor` says of a cluster: pure functions of facts that cluster_facts gathers."""

import datetime
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from eldric import PROTOCOL, __version__
from eldric.cli.findings import Finding, ok, problem, warning
from eldric.cli.output import human_bytes
from eldric.client import ModelInfo, NodeInfo, PipelineInfo, Plan, StageInfo, Worker

#: Certificates live for 30 days and are renewed at two thirds: one that has less time left was not renewed.
_RENEWAL_IS_LATE = datetime.timedelta(days=8)
#: The planner's word for a worker that could be used, but need not be.
_SPARE = "not needed"
_NEEDED = {
    "controller": "`eldric-cli controller`",
    "data": "`eldric-cli data`: without it there are no models",
    "router": "`eldric-cli router`: without it there is no API",
    "worker": "`eldric-cli worker`: without one nothing can be deployed",
}


@dataclass(frozen=True, slots=True)
class StoreView:
    """A model's files, with their sizes in bytes, in the data worker's folder; and their sizes as this machine sees
    them, None if it is missing, or why none is seen."""

    folder: str
    files: tuple[tuple[str, int], ...]
    sizes: Mapping[str, int | None] | str


def check_controllers(answers: Mapping[str, str]) -> Iterator[Finding]:
    """answers: what was wrong with each controller's answer; empty: nothing."""
    for address, wrong in answers.items():
        if wrong:
            advice = (
                "does it run there (`eldric-cli controller`, or `eldric-cli up` for a cluster on one machine), is this "
                "its gRPC address (port 9880 by default), and does a firewall let it through?"
            )
            yield problem("controller", wrong if address in wrong else f"{address}: {wrong}", advice)
        else:
            yield ok("controller", f"{address} answers")


def check_local_nodes(stopped: Mapping[str, str], count: int, folder: Path) -> Finding:
    """stopped: the nodes of a local cluster that do not run, and their last words; count: all its nodes."""
    if not stopped:
        return ok("processes", "every node of this cluster runs")
    up = f"`eldric-cli up --dir {shlex.quote(str(folder))}`"
    if len(stopped) == count and not any(stopped.values()):
        return problem("processes", f"the cluster in {folder} does not run", f"{up} starts it")
    text = ", ".join(f"{name} ({line})" if line else name for name, line in stopped.items())
    return problem("processes", f"not running: {text}", f"{up} starts what does not run")


def check_nodes(nodes: Sequence[NodeInfo]) -> Iterator[Finding]:
    """Which nodes are not up, and which kinds are missing."""
    for node in nodes:
        name = f"{node.kind} {node.name}"
        if node.state == "lost":
            advice = f"look at its log and start it again; it was at {node.grpc_address}"
            yield problem("nodes", f"{name} is lost", advice)
        elif node.state != "up":
            yield warning("nodes", f"{name} is {node.state}", "wait, then look at its log")
    up = {node.kind for node in nodes if node.state == "up"}
    for kind, advice in _NEEDED.items():
        if kind not in up:
            title = "data worker" if kind == "data" else kind
            yield problem("nodes", f"no {title} is up", f"start one with {advice}")
    if up >= _NEEDED.keys() and all(node.state == "up" for node in nodes):
        yield ok("nodes", f"{len(nodes)} nodes, all up")


def check_versions(nodes: Sequence[NodeInfo]) -> Finding:
    """Nodes of different protocols do not work together; different programs of one protocol do."""
    others = {f"{node.kind} {node.name}": node.protocol for node in nodes if node.protocol != PROTOCOL}
    if others:
        text = ", ".join(f"{name} speaks {protocol}" for name, protocol in sorted(others.items()))
        return problem("protocol", f"this program speaks {PROTOCOL}, {text}", "install the same version everywhere")
    versions = {node.version for node in nodes} | {__version__}
    if len(versions) > 1:
        return warning("protocol", f"{PROTOCOL}, programs {', '.join(sorted(versions))}", "finish the update")
    return ok("protocol", f"{PROTOCOL} everywhere, version {__version__}")


def check_engines(workers: Sequence[Worker], pipelines: Sequence[PipelineInfo]) -> Iterator[Finding]:
    """A pipeline over different compute libraries gives tokens that depend on the split."""
    engines = {worker.name: worker.engine for worker in workers}
    for info in pipelines:
        used = {engines.get(stage.worker, "") for stage in info.stages} - {""}
        if len(used) > 1:
            text = f"{info.name} runs on {', '.join(sorted(used))}: its tokens depend on where its layers are"
            yield warning("engines", text, "choose workers of one kind with --workers if that matters")


def check_memory_of(workers: Sequence[Worker]) -> Iterator[Finding]:
    for worker in workers:
        if worker.memory_used_bytes > worker.memory_bytes > 0:
            used, offered = human_bytes(worker.memory_used_bytes), human_bytes(worker.memory_bytes)
            yield warning("memory", f"{worker.name} holds {used} of {offered}", "undeploy something")


def check_pipelines(pipelines: Sequence[PipelineInfo]) -> Iterator[Finding]:
    for info in pipelines:
        if info.state == "degraded":
            advice = f"`eldric-cli rebalance {info.name}` moves it to the workers that are left"
            yield problem("pipelines", f"{info.name} is degraded: {info.message or 'a stage is lost'}", advice)
        plain = [stage.worker for stage in info.stages if _sends_plainly(stage)]
        if plain and len(info.stages) > 1:
            text = f"{info.name} sends its hidden states unencrypted ({', '.join(plain)})"
            advice = "deploy it with --transport zmq and without --insecure-tensors unless the network is your own"
            yield warning("pipelines", text, advice)
        yield from _check_links(info)
        for stage in info.stages:
            if stage.message and stage.state == "serving":
                text = f"stage {stage.index} of {info.name} on {stage.worker}: {stage.message}"
                yield warning("pipelines", text, "see to that before the stage has to be loaded again")
    if pipelines and all(info.state != "degraded" for info in pipelines):
        yield ok("pipelines", ", ".join(f"{info.name} {info.state}" for info in pipelines))


def _sends_plainly(stage: StageInfo) -> bool:
    return stage.link.encryption == "none" if stage.link else bool(stage.transport) and not stage.encrypted


def _check_links(info: PipelineInfo) -> Iterator[Finding]:
    for stage in info.stages:
        if stage.link is not None and stage.link.fallback:
            link = f"the link from stage {stage.index} to {stage.link.to_stage} of {info.name} goes by"
            advice = "see to that and deploy it again, or live with it"
            yield warning("links", f"{link} {stage.link.transport}: {stage.link.fallback}", advice)


def check_plans(plans: Mapping[str, Plan | str]) -> Iterator[Finding]:
    """plans: what deploying each model would do, or why it cannot be."""
    left_out: dict[str, str] = {}
    for model, plan in plans.items():
        if isinstance(plan, str):
            yield warning("plans", f"{model} cannot be deployed: {plan}", "see `eldric-cli deploy --dry-run`")
        else:
            left_out |= {name: reason for name, reason in plan.excluded.items() if reason != _SPARE}
    for worker, reason in sorted(left_out.items()):
        yield warning("plans", f"{worker} is left out: {reason}", "see to that, or live with it")


def check_health(answers: Mapping[str, str]) -> Iterator[Finding]:
    """answers: what was wrong with each node's /health; empty: nothing."""
    for name, wrong in answers.items():
        if wrong:
            yield warning("health", f"{name}: {wrong}", "look at its log, and whether a firewall is between")
    if answers and not any(answers.values()):
        yield ok("health", f"{len(answers)} nodes say that they are ready")


def check_models(unusable: Iterable[ModelInfo]) -> Iterator[Finding]:
    """unusable: the models of the store that cannot be deployed. Of a damaged one no architecture is known."""
    for info in unusable:
        why = info.problem.removeprefix(f"{info.name}: ")
        if info.architecture:
            yield warning("models", f"{info.name} cannot be deployed: {why}", f"`eldric-cli models rm {info.name}`")
        else:
            advice = f"`eldric-cli models rm {info.name}`, and add or pull it again"
            yield problem("models", f"{info.name} cannot be used: {why}", advice)


def check_stores(views: Mapping[str, StoreView]) -> Iterator[Finding]:
    """Whether this machine sees the models, by name, where the data worker has them. What is true of several is said
    once."""
    found: dict[Finding, list[str]] = {}
    for model, view in views.items():
        if view.files:
            found.setdefault(_check_store(view), []).append(model)
    for finding, models in found.items():
        yield replace(finding, message=f"{', '.join(models)}: {finding.message}")


def _check_store(view: StoreView) -> Finding:
    sizes, wanted = view.sizes, dict(view.files)
    if isinstance(sizes, str):
        advice = "see to its file server; until then workers here fetch over HTTP, or do not load"
        return problem("model store", sizes, advice)
    missing = [path for path in wanted if sizes.get(path) is None]
    wrong = [path for path in wanted if path not in missing and sizes[path] != wanted[path]]
    if wrong:
        text = f"{', '.join(wrong)} in {view.folder} has another size here than on the data worker"
        return problem("model store", text, "is the right export mounted there?")
    if missing:
        text = f"{', '.join(missing)} is not in {view.folder} on this machine"
        return warning("model store", text, "a worker here needs the store mounted, and --models where it is")
    return ok("model store", f"in {view.folder}, seen from here")


def check_certificates(
    ends: Mapping[str, tuple[datetime.datetime, datetime.datetime]], now: datetime.datetime
) -> Iterator[Finding]:
    """ends: first and last moment of each certificate, by whose it is."""
    for name, (begin, end) in ends.items():
        again = "`eldric-cli join` with a new token, into the same folder"
        if now < begin:
            yield problem("certificates", f"that of {name} holds from {begin:%Y-%m-%d %H:%M} UTC on", "set the clock")
        elif end <= now:
            yield problem("certificates", f"that of {name} ended on {end:%Y-%m-%d %H:%M} UTC", again)
        elif end - now < _RENEWAL_IS_LATE:
            text = f"that of {name} ends on {end:%Y-%m-%d %H:%M} UTC"
            yield warning("certificates", text, f"a node that runs renews it; else {again}")
    if ends and all(begin <= now and end - now >= _RENEWAL_IS_LATE for begin, end in ends.values()):
        first = min(end for _, end in ends.values())
        yield ok("certificates", f"{len(ends)}, the first ends on {first:%Y-%m-%d}")
