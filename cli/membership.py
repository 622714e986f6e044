"""eldric-cli init, token and join: a cluster of several machines, and who belongs to it."""

import asyncio
import re
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from platformdirs import user_data_path

from eldric import node_file
from eldric.cli import options
from eldric.cli.connect import client_of
from eldric.cli.options import option
from eldric.cli.output import err, out, print_json
from eldric.cli.units import parse_seconds
from eldric.client.cluster import OPERATOR, Cluster, context_path
from eldric.config import HTTP_PORTS
from eldric.controller.main import AUTHORITY_FOLDER, STATE_FILE
from eldric.controller.state import Store
from eldric.errors import AlreadyExists, InvalidRequest, NotFound
from eldric.names import check_name, join_address, machine_address, split_address
from eldric.security import Authority, Identity, JoinToken, join, new_token
from eldric.security.tokens import MAX_LIFETIME_S

app = options.new_app()

#: Where nodes of this machine have their folders, unless it is said.
HOME = user_data_path("eldric")

#: Kinds that `join` takes.
_JOINERS = ("worker", "data", "router", "edge", "client")

Lifetime = Annotated[
    str,
    option("--lifetime", metavar="TIME", help="How long it may be used: 30m, 2h, 7d; at most 30d.", default="1h"),
]


@app.command()
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the cluster.")] = "eldric",
    folder: Annotated[
        Path,
        option("--folder", metavar="FOLDER", help="The controller's folder: authority, certificate, state and log."),
    ] = HOME / "controller",
    host: Annotated[
        str,
        option("--host", metavar="HOST", help="Host by which other machines reach this one.", default="its address"),
    ] = "",
    http_port: Annotated[
        int,
        option("--http-port", metavar="PORT", help="gRPC: + 1000, joining: + 2000.", default="8880", min=1, max=63535),
    ] = HTTP_PORTS["controller"],
    lifetime: Lifetime = "1h",
    as_json: options.Json = False,
) -> None:
    """Make a new cluster, whose controller runs on this machine.

    Writes the cluster's authority and the controller's certificate into the folder, makes you its operator (certificate
    and context in your own configuration), and prints what to run next and a join token.
    """
    seconds = _lifetime(lifetime)
    place, reach = folder.expanduser().resolve(), host or machine_address()
    context = context_path()
    if (place / AUTHORITY_FOLDER).exists():
        raise AlreadyExists(f"{place} holds a cluster already: `eldric-cli token` makes tokens for it")
    if context.exists():
        raise AlreadyExists(
            f"you are an operator of the cluster at {', '.join(Cluster.load(context).controllers)}: "
            f"remove {context} and {context.parent / OPERATOR} if it is gone"
        )
    authority = Authority.create(name)
    address = join_address(reach, http_port + 1000)
    authority.save(place / AUTHORITY_FOLDER)
    authority.issue_identity("controller", _host_name()).save(place)
    authority.issue_identity("client", "operator").save(context.parent / OPERATOR)
    Cluster((address,), context.parent / OPERATOR).save(context)
    token = asyncio.run(_first_token(place, authority, seconds))
    join_at = join_address(reach, http_port + 2000)
    port = "" if http_port == HTTP_PORTS["controller"] else f" --http-port {http_port}"
    command = f"eldric-cli controller --folder {shlex.quote(str(place))} --host 0.0.0.0 --advertise {reach}{port}"
    if as_json:
        print_json(
            {
                "cluster": name,
                "folder": str(place),
                "context": str(context),
                "controller": address,
                "join_address": join_at,
                "token": token,
                "command": command,
            }
        )
        return
    out.print(f"cluster {name} is made; its authority, which no other machine needs, is in {place / AUTHORITY_FOLDER}")
    out.print(f"\n1. start its controller here:\n   {command}")
    out.print(f"\n2. on every other machine, within {lifetime}:", soft_wrap=True)
    for kind in ("data", "worker", "router"):
        out.print(f"   eldric-cli join {token} {join_at} --kind {kind}", soft_wrap=True)
    out.print("   and then the command that it prints")
    out.print("\nThe token admits any number of nodes. `eldric-cli token` makes another.")


async def _first_token(folder: Path, authority: Authority, lifetime_s: int) -> str:
    """A token in the state of a controller that does not run yet."""
    now = time.time()
    token, record = new_token(authority.sha256, now=now, lifetime_s=lifetime_s, uses=None)
    store = await Store.open(folder / STATE_FILE)
    try:
        await store.add_token(record, now)
    finally:
        await store.close()
    return token.format()


@app.command()
def token(
    lifetime: Lifetime = "1h",
    uses: Annotated[
        int, option("--uses", metavar="N", help="How many nodes may use it. 0: any number.", default="1", min=0)
    ] = 1,
    kind: Annotated[
        str,
        option("--kind", metavar="KIND", help="The only kind that it admits.", default="any but client and controller"),
    ] = "",
    folder: options.Dir = None,
    controller: options.Controller = None,
    as_json: options.Json = False,
) -> None:
    """Make a join token, which admits a new node to the cluster.

    With --kind client it admits another operator.
    """
    seconds = _lifetime(lifetime)
    with client_of(folder, controller) as client:
        text = client.create_token(lifetime_s=seconds, uses=uses, kind=kind)
        join_at = _join_address(client.cluster)
    if as_json:
        print_json({"token": text, "lifetime_s": seconds, "uses": uses, "kind": kind, "join_address": join_at})
        return
    out.print(text, soft_wrap=True)
    if err.is_terminal:
        err.print(f"\neldric-cli join {text} {join_at} --kind {kind or 'worker'}", style="dim", soft_wrap=True)


@app.command()
def expel(
    node: Annotated[
        str,
        typer.Argument(metavar="KIND/NAME", help="As `ps` lists it, or client/NAME. Left out: list who was expelled."),
    ] = "",
    folder: options.Dir = None,
    controller: options.Controller = None,
    as_json: options.Json = False,
) -> None:
    """End a membership for good, when a machine was lost or stolen.

    No node takes its calls any more, and its name stays closed: it may join again under another one, with a new token.
    """
    with client_of(folder, controller) as client:
        expelled = client.expel(node)
    if as_json:
        print_json({"expelled": expelled})
        return
    for each in expelled:
        out.print(each)


def _lifetime(text: str) -> int:
    """Seconds. Raises InvalidRequest."""
    seconds = parse_seconds(text)
    if seconds > MAX_LIFETIME_S:
        raise InvalidRequest(f"a join token lives for at most {MAX_LIFETIME_S // 86400} days, not {text}")
    return seconds


def _join_address(cluster: Cluster) -> str:
    """Where strangers join: as a local controller says, or the gRPC port + 1000, as it is by default."""
    if cluster.folder is not None:
        return str((node_file.read(cluster.folder / "controller") or {}).get("join_address", ""))
    host, port = split_address(cluster.controllers[0])
    return join_address(host, port + 1000)


@app.command("join")
def join_cluster(
    token: Annotated[
        str,
        typer.Argument(
            metavar="TOKEN",
            help="The join token, from `eldric-cli init` or `eldric-cli token`. -: a line of the standard input, where "
            "other users of this machine do not see it.",
        ),
    ],
    address: Annotated[
        str, typer.Argument(metavar="HOST:PORT", help="The join address of the controller, or of an edge.")
    ],
    kind: Annotated[
        str,
        option("--kind", metavar="KIND", help="worker, data, router, edge, or client: an operator.", default="worker"),
    ] = "worker",
    name: Annotated[str, option("--name", metavar="NAME", help="Name of the node.", default="the machine's")] = "",
    folder: Annotated[
        Path | None,
        option("--folder", metavar="FOLDER", help="The node's own folder.", default=f"{HOME}/KIND-NAME"),
    ] = None,
    grpc_address: Annotated[
        str,
        option(
            "--controller",
            metavar="HOST:PORT",
            help="The controller's gRPC address.",
            default="port - 1000",
        ),
    ] = "",
    edge: Annotated[
        str,
        option(
            "--edge",
            metavar="HOST:PORT",
            help="An edge's gRPC address, for a machine that others cannot connect to; it joins at the edge as well.",
        ),
    ] = "",
    as_json: options.Json = False,
) -> None:
    """Make this machine a node of a cluster.

    Checks that the controller is the one that made the token, gets a certificate, and prints how to start the node.
    A folder that is this node's already gets a new certificate.
    """
    if kind not in _JOINERS:
        raise InvalidRequest(f"{kind!r} is no kind of node that joins; kinds are {', '.join(_JOINERS)}")
    parsed = JoinToken.parse(sys.stdin.readline() if token == "-" else token)
    node = check_name(name or _host_name())
    if edge:
        split_address(edge)
        if kind in ("edge", "client"):
            raise InvalidRequest(f"a node of kind {kind} cannot be behind an edge")
    controller = _controller_address(address, grpc_address)
    place = (folder or HOME / f"{kind}-{node}").expanduser().resolve()
    if kind == "client":
        place = context_path().parent / OPERATOR
    _check_free(place, kind, node)
    identity = asyncio.run(join(address, parsed, kind, node))
    identity.save(place)
    if kind == "client":
        Cluster((controller,), place).save(context_path())
        command = "eldric-cli status"
    else:
        store = " --models MODEL-FOLDER" if kind == "data" else ""
        known = f" --controller {controller}" if grpc_address or not edge else ""
        way = f"{known} --edge {edge}" if edge else f"{known} --host 0.0.0.0"
        command = f"eldric-cli {kind} --folder {shlex.quote(str(place))}{way}{store}"
    if as_json:
        print_json({"kind": kind, "name": node, "folder": str(place), "cluster": identity.cluster, "command": command})
        return
    out.print(f"{kind} {node} is a member of cluster {identity.cluster}; its certificate is in {place}", soft_wrap=True)
    out.print(f"next: {command}", soft_wrap=True)


def _controller_address(join_at: str, given: str) -> str:
    host, port = split_address(join_at)
    if given:
        split_address(given)
        return given
    return join_address(host, max(1, port - 1000))


def _check_free(folder: Path, kind: str, name: str) -> None:
    """Raises AlreadyExists when the folder is another node's."""
    try:
        there = Identity.load(folder)
    except NotFound:
        return
    if kind == "client" and there.name != name:
        raise AlreadyExists(f"you are operator {there.name} of cluster {there.cluster} already: remove {folder} first")
    if (there.kind, there.name) != (kind, name):
        raise AlreadyExists(f"{folder} is the folder of {there.kind} {there.name}: choose another with --folder")


def _host_name() -> str:
    """The machine's name, as far as it can be a node's."""
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", socket.gethostname().partition(".")[0]).strip("-.")[:63].rstrip("-.")
    return name or "node"
