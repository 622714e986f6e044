"""What `make demo` shows: a local cluster, a real chat model over three workers, an answer, the stages behind it."""

import sys
import tempfile
import time
from pathlib import Path

from rich.text import Text

from eldric.cli import interrupts
from eldric.cli.demo_model import smollm2
from eldric.cli.failures import failure_of, report
from eldric.cli.generating import speed_line, stream
from eldric.cli.local import LocalCluster
from eldric.cli.output import err, out
from eldric.cli.progress import follow_deploy, follow_import
from eldric.cli.roster import Shape
from eldric.cli.tables import pipelines_view
from eldric.client import Client, PipelineInfo

WORKERS = 3
PROMPT = "Write one sentence about the sea."


def main() -> int:
    """Run the demonstration; whatever happens, the cluster is ended. Returns the exit code."""
    try:
        with interrupts.as_exceptions(), tempfile.TemporaryDirectory(prefix="eldric-demo-") as name:
            cluster = LocalCluster.create(Path(name).resolve(), Shape(workers=WORKERS))
            try:
                _show(cluster)
            finally:
                with interrupts.deferred():
                    cluster.down(_say)
    except KeyboardInterrupt:
        return interrupts.INTERRUPTED
    except Exception as error:
        return report(failure_of(error), as_json=False, verbose=False)
    out.print("\nthe cluster has ended; `eldric-cli up` starts one that stays")
    return 0


def _show(cluster: LocalCluster) -> None:
    """Start, deploy, ask, look."""
    _title(f"starting a controller, a data worker, a router and {WORKERS} workers")
    began = time.monotonic()
    cluster.up(_say)
    out.print(f"the cluster is ready after {time.monotonic() - began:.1f} s")
    with Client(folder=cluster.folder) as client:
        _title("adding SmolLM2-135M-Instruct to the model store")
        model = follow_import(client.models.add_events(smollm2(), "smollm2"), "smollm2", quiet=False)
        out.print(f"{model.name}: {model.architecture}, {model.layers} layers, {model.quantization}")
        _title(f"deploying it over {WORKERS} workers, each of which maps only its own layers")
        began = time.monotonic()
        info = follow_deploy(client.deploy_events("smollm2", stages=WORKERS, context=2048), quiet=False)
        out.print(f"{info.name} is ready after {time.monotonic() - began:.1f} s")
        _title(f"asking: {PROMPT}")
        messages = [{"role": "user", "content": PROMPT}]
        finished = stream(client.chat("smollm2", messages, temperature=0.0, max_tokens=80))
        out.print(speed_line(finished))
        _title("the stages that answered")
        out.print(pipelines_view(_settled(client)))
    _title("ending the cluster")


def _settled(client: Client) -> list[PipelineInfo]:
    """The pipelines, once the workers' own figures are in and nothing is under way any more."""
    deadline = time.monotonic() + 3
    while True:
        pipelines = client.status()
        stages = [stage for info in pipelines for stage in info.stages]
        rests = all(stage.steps and not (stage.link and stage.link.queue_frames) for stage in stages)
        if rests or time.monotonic() > deadline:
            return pipelines
        time.sleep(0.1)


def _say(line: str) -> None:
    err.print(line, style="dim")


def _title(text: str) -> None:
    out.print(Text(f"\n{text}", "bold"))


if __name__ == "__main__":
    sys.exit(main())
