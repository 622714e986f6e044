"""eldric-cli data export: the model store's folder over NFS. eldric-cli mount: such a folder, without the kernel."""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Annotated

import typer

from eldric.cli import options
from eldric.cli.options import option
from eldric.cli.output import print_json
from eldric.errors import InvalidRequest, NotReady

app = options.new_app()

_PORT = 2049
_PATH = "/models"


def export(
    store: Annotated[
        Path | None,
        option("--store", metavar="FOLDER", help="The model store's folder.", default="that of the cluster in --dir"),
    ] = None,
    folder: options.Dir = None,
    host: Annotated[
        str, option("--host", metavar="HOST", help="Address to listen on; 0.0.0.0: all.", default="127.0.0.1")
    ] = "127.0.0.1",
    advertise: Annotated[
        str | None, option("--advertise", metavar="HOST", help="Host by which workers reach this machine.")
    ] = None,
    port: Annotated[
        int, option("--port", metavar="PORT", help="Port to listen on.", default=str(_PORT), min=1, max=65535)
    ] = _PORT,
    path: Annotated[str, option("--path", metavar="PATH", help="Path that clients mount.", default=_PATH)] = _PATH,
    clients: Annotated[
        list[str] | None,
        option("--client", metavar="NETWORK", help="Who may read, such as 10.0.0.0/8; may be repeated.", default="all"),
    ] = None,
    print_lines: Annotated[
        bool, typer.Option("--print", help="Print lines for /etc/exports of the kernel's own server, and do nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout when the server is ready.")
    ] = False,
) -> None:
    """Export the model store's folder over NFS, until Ctrl-C.

    Read-only, as NFS 4, in user space.

    Workers find or make the mount by themselves: the data worker of that folder tells them where it is. Needs
    nfs-ganesha, and root.
    """
    from eldric.data.export import ExportConfig, announced, kernel_lines
    from eldric.data.ganesha import serving
    from eldric.names import machine_address
    from eldric.nfs.address import NfsAddress

    reached = advertise or (machine_address() if host in ("0.0.0.0", "::") else host)
    config = ExportConfig(_store(store, folder), NfsAddress(reached, path, port), host, tuple(clients or ()))
    if print_lines:
        lines = kernel_lines(config)
        print_json({"exports": lines}) if as_json else print(lines, end="")
        return
    with serving(config) as server, announced(config):
        if as_json:
            print_json({"export": str(config.address), "folder": str(config.folder), "log": str(server.log)})
        elif sys.stdout.isatty():
            print(f"{config.folder} is exported as {config.address}; log: {server.log}")
        sys.stdout.flush()
        server.wait()


@app.command()
def mount(
    export: Annotated[str, typer.Argument(metavar="nfs://HOST[:PORT]/PATH", help="What `data export` says.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An empty folder to mount it on.")],
    allow_other: Annotated[
        bool, typer.Option("--allow-other", help="Let other users of this machine read too.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout when the mount is there.")
    ] = False,
) -> None:
    """Mount a model store through FUSE, where the kernel has no NFS client. Until Ctrl-C.

    Workers do this by themselves; where the kernel can, `mount -t nfs4` is as good. Needs `pip install eldric[fuse]`
    and libfuse.
    """
    from eldric.nfs.address import NfsAddress
    from eldric.nfs.mounting import fuse_problem

    address = NfsAddress.parse(export)
    if not folder.is_dir():
        raise InvalidRequest(f"{folder} is no folder")
    if problem := fuse_problem():
        raise NotReady(problem)
    from eldric.nfs.fuse import serve

    place = folder.absolute()
    told = {"export": str(address), "folder": str(place)}
    said = json.dumps(told) if as_json else f"{address} is mounted on {place}" if sys.stdout.isatty() else ""
    threading.Thread(target=_announce, args=(place, said), daemon=True).start()
    serve(address, place, others=allow_other)


def _announce(place: Path, said: str) -> None:
    """Say it once the mount is there."""
    from eldric.nfs.mountinfo import mounts

    while not any(each.point == str(place) for each in mounts()):
        time.sleep(0.05)
    if said:
        print(said, flush=True)


def _store(store: Path | None, folder: Path | None) -> Path:
    """The store's folder. Raises InvalidRequest, NotFound."""
    if store is not None:
        return store.expanduser().resolve()
    from eldric.cli.connect import local_folder
    from eldric.cli.local import LocalCluster

    place = local_folder(folder)
    data = [node for node in LocalCluster.load(place).nodes if node.kind == "data"]
    if not data:
        raise InvalidRequest(f"the cluster in {place} has no data worker: name the folder with --store")
    return Path(data[0].option("--models") or place / "models").resolve()
