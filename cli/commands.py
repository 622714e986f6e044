"""The table of commands. A command's module is imported when the command is chosen, so that help comes at once."""

import importlib
from collections.abc import Iterator, MutableMapping
from typing import Any, cast

import typer
from typer.core import TyperGroup

#: Module and first line of help of each command, by the heading under which it is listed.
SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "A cluster on this machine": {
        "up": ("clusters", "Start a cluster on this machine, in the background, and wait until it is ready."),
        "down": ("clusters", "End a local cluster. Its models and certificates stay in the folder."),
        "logs": ("logs", "Show the logs of a local cluster's nodes."),
    },
    "Models and pipelines": {
        "models": ("models", "The model store: list, show, pull, add, remove, verify and replicate."),
        "deploy": ("deployments", "Deploy a model over the cluster's workers and wait until it is ready."),
        "undeploy": ("deployments", "End a pipeline: its sequences end, its workers give their memory back."),
        "rebalance": ("deployments", "Plan a pipeline again over the workers there are now, and move to the new plan."),
    },
    "Text": {
        "run": ("text", "Answer one prompt."),
        "chat": ("text", "Talk with a model."),
        "embed": ("text", "Print a text as a vector."),
    },
    "Looking": {
        "status": ("looking", "Show the pipelines with their stages: layers, memory, step time, state."),
        "workers": ("looking", "List the workers: state, devices, memory."),
        "ps": ("looking", "List all nodes of the cluster, and the pipelines that run."),
        "doctor": ("doctor", "Say what is wrong with this machine or the cluster, and what to do."),
    },
    "A cluster of several machines": {
        "init": ("membership", "Make a new cluster, whose controller runs on this machine."),
        "token": ("membership", "Make a join token, which admits a new node to the cluster."),
        "join": ("membership", "Make this machine a node of a cluster."),
        "expel": ("membership", "End a membership for good, when a machine was lost or stolen."),
        "controller": ("nodes", "Run a controller: the registry, the planner and the deployments of a cluster."),
        "worker": ("nodes", "Run a worker: it holds stages of pipelines and computes them."),
        "data": ("nodes", "Run a data worker: the model store. Or export its folder over NFS."),
        "router": ("nodes", "Run a router: the OpenAI-compatible API."),
        "edge": ("nodes", "Run an edge: nodes that others cannot connect to are members through it."),
        "mount": ("export", "Mount a model store through FUSE, where the kernel has no NFS client."),
    },
}

#: What people who come from elsewhere type first, and where it is here.
ELSEWHERE = {
    **dict.fromkeys(("ls", "list", "images"), "models ls"),
    **{name: f"models {name}" for name in ("show", "add", "pull", "rm", "verify", "replicate")},
    **dict.fromkeys(("serve", "start"), "up"),
    "stop": "down",
    "nodes": "ps",
    "generate": "run",
    "embeddings": "embed",
    "export": "data export",
}

COMMANDS = {name: entry for section in SECTIONS.values() for name, entry in section.items()}


def load(name: str) -> Any:
    """The command of that name. Raises KeyError."""
    module, _ = COMMANDS[name]
    app: typer.Typer = importlib.import_module(f"eldric.cli.{module}").app
    group = typer.main.get_group(app)
    return group if module == name and app.info.name == name else group.commands[name]


class _Loader(MutableMapping[str, Any]):
    """Commands by name, loaded when they are looked at."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = load(name)
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in COMMANDS

    def __setitem__(self, name: str, command: Any) -> None:
        self._loaded[name] = command

    def __delitem__(self, name: str) -> None:
        del self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class Commands(TyperGroup):
    """All commands, in sections."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = cast(Any, _Loader())

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in ELSEWHERE:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {ELSEWHERE[args[0]]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        widest = max(map(len, COMMANDS))
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(widest), line) for name, (_, line) in commands.items()])
