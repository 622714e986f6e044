"""What `make demo` shows: a local cluster, a real chat model over three workers, an answer, the stages behind it."""

import sys
import tempfile
import time
from pathlib import Path

from eldric.cli.clusters import roster, wait_until_registered
from eldric.cli.demo_model import smollm2
from eldric.cli.deployments import follow_deploy, show_pipelines
from eldric.cli.imports import follow_import
from eldric.cli.local import LocalCluster
from eldric.cli.output import err, out
from eldric.client import Client, Delta, Finished
from eldric.errors import EldricError

WORKERS = 3
PROMPT = "Write one sentence about the sea."


def main() -> None:
    """Run the demonstration; whatever happens, the cluster is ended."""
    with tempfile.TemporaryDirectory(prefix="eldric-demo-") as name:
        folder = Path(name)
        cluster = LocalCluster.create(folder, roster(folder, WORKERS))
        try:
            show(cluster)
        finally:
            cluster.stop(lambda line: err.print(line, style="dim"))
    out.print("\nthe cluster has ended; `eldric-cli up` starts one that stays")


def show(cluster: LocalCluster) -> None:
    """Start, deploy, ask, look."""
    _title(f"starting a controller, a data worker, a router and {WORKERS} workers")
    cluster.start(lambda line: err.print(line, style="dim"))
    wait_until_registered(cluster)
    with Client(folder=cluster.folder) as client:
        _title("adding SmolLM2-135M-Instruct to the model store")
        follow_import(client.models.add_events(smollm2(), "smollm2"), quiet=False)
        _title(f"deploying it over {WORKERS} workers, each of which maps only its own layers")
        began = time.monotonic()
        info = follow_deploy(client.deploy_events("smollm2", stages=WORKERS, context=2048), quiet=False)
        out.print(f"{info.name} is ready after {time.monotonic() - began:.1f} s")
        _title(f"asking: {PROMPT}")
        _ask(client)
        _title("the stages that answered")
        time.sleep(1.2)  # one heartbeat, so that the workers' own figures are in
        show_pipelines(client.status())


def _ask(client: Client) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    for event in client.chat("smollm2", messages, temperature=0.0, max_tokens=80):
        match event:
            case Delta(text=text):
                sys.stdout.write(text)
                sys.stdout.flush()
            case Finished() as finished:
                speed = max(0, finished.completion_tokens - 1) / max(finished.generation_ms, 1e-9) * 1000
                out.print(
                    f"\n\n{finished.completion_tokens} tokens, first after "
                    f"{finished.queue_ms + finished.prompt_ms:.0f} ms, then {speed:.0f} per second"
                )


def _title(text: str) -> None:
    out.print(f"\n[bold]{text}[/]")


if __name__ == "__main__":
    try:
        main()
    except EldricError as error:
        sys.exit(f"error: {error.message}")
