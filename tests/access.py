"""Who may call what: the decisions, written down beside the code that makes them, and every method that there is."""

import importlib
import pkgutil

from google.protobuf.descriptor import ServiceDescriptor

import eldric.v1

NODES = frozenset({"controller", "worker", "data", "router", "edge"})
MEMBERS = NODES - {"controller"}
READERS = NODES - {"edge"}
CONTROLLERS = frozenset({"controller"})
ROUTERS = frozenset({"router"})
OPERATORS: frozenset[str] = frozenset()

#: Kinds of nodes that may call a method. Operators may call all.
DECISIONS = {
    "Registry/Register": MEMBERS,
    "Registry/Deregister": MEMBERS,
    "Registry/List": NODES,
    "Registry/Watch": NODES,
    "Heartbeat/Beat": MEMBERS,
    "Pipeline/Plan": OPERATORS,
    "Pipeline/Deploy": OPERATORS,
    "Pipeline/Undeploy": OPERATORS,
    "Pipeline/Rebalance": OPERATORS,
    "Pipeline/Status": NODES,
    "Pipeline/List": NODES,
    "Pipeline/Watch": NODES,
    "Replication/Set": OPERATORS,
    "Replication/List": NODES,
    "Replication/Release": frozenset({"data"}),
    "Stage/Load": CONTROLLERS,
    "Stage/Unload": CONTROLLERS,
    "Stage/OpenLinks": CONTROLLERS,
    "Stage/Connect": CONTROLLERS,
    "Stage/Status": CONTROLLERS,
    "Stage/Trace": CONTROLLERS,
    "Inference/Generate": ROUTERS,
    "Inference/Tokenize": ROUTERS,
    "Inference/Detokenize": ROUTERS,
    "Inference/Embed": ROUTERS,
    "Inference/Cancel": ROUTERS,
    "ModelStore/List": READERS,
    "ModelStore/Metadata": READERS,
    "ModelStore/Tensors": READERS,
    "ModelStore/Blocks": READERS,
    "ModelStore/Pull": READERS,
    "ModelStore/Import": CONTROLLERS,
    "ModelStore/Remove": OPERATORS,
    "ModelStore/Verify": OPERATORS,
    "Membership/Join": NODES,  # and strangers
    "Membership/Renew": NODES,
    "Membership/CreateToken": OPERATORS,
    "Membership/Expel": OPERATORS,
    "Tunnel/Open": MEMBERS,
    "Tunnel/Tunnels": NODES,
}
STRANGERS = frozenset({"Membership/Join"})

#: Routes that are no method's: those that anybody may ask who has a connection, and those whose callers are a method's.
#: A router's own are its API, which is for everybody.
OPEN_ROUTES = frozenset({"/health", "/metrics", "/openapi.json", "/docs"})
ROUTES_LIKE = {"/api/v1/models/{id}/content": "ModelStore/Pull"}


def services() -> list[ServiceDescriptor]:
    """All that the protos declare."""
    found = []
    for module in pkgutil.iter_modules(eldric.v1.__path__, "eldric.v1."):
        if module.name.endswith("_pb2"):
            found += list(importlib.import_module(module.name).DESCRIPTOR.services_by_name.values())
    return found


def methods() -> list[str]:
    """ "Service/Method" of all."""
    return [f"{service.name}/{method.name}" for service in services() for method in service.methods]
