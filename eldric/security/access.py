"""Who calls, and what each kind of caller may do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from eldric.errors import PermissionDenied, Unauthenticated
from eldric.security.certificates import parse_spiffe

NODES = frozenset({"controller", "worker", "data", "router", "edge"})
MEMBERS = frozenset({"worker", "data", "router", "edge"})
#: Nodes that need models' files. Not edges: they stand where everybody reaches them.
READERS = frozenset({"controller", "worker", "data", "router"})


@dataclass(frozen=True, slots=True)
class Caller:
    """The certificate at the other end of a connection: a node, or an operator (kind "client")."""

    kind: str
    name: str

    @property
    def node_id(self) -> str:
        return f"{self.kind}/{self.name}"

    def must_be(self, node_id: str) -> None:
        """Raises PermissionDenied unless this caller is the node that it speaks of. Operators may speak of any."""
        if self.kind != "client" and self.node_id != node_id:
            raise PermissionDenied(f"{self.node_id} may not speak for {node_id or 'a node without a name'}")


@dataclass(frozen=True, slots=True)
class Rule:
    """Who may call a method. `subject` names the node that a request speaks of: only that node may send it."""

    kinds: frozenset[str]
    subject: Callable[[Any], str] | None = None
    strangers: bool = False


def _kinds(*kinds: str) -> Rule:
    return Rule(frozenset(kinds))


#: Methods by "Service/Method" or "Service/*", in package eldric.v1. Operators may call everything, so they are not
#: named; what is not listed is theirs alone.
RULES: dict[str, Rule] = {
    "Registry/Register": Rule(MEMBERS, lambda request: str(request.node.id)),
    "Registry/Deregister": Rule(MEMBERS, lambda request: str(request.node_id)),
    "Registry/List": Rule(NODES),
    "Registry/Watch": Rule(NODES),
    "Heartbeat/Beat": Rule(MEMBERS, lambda request: str(request.node_id)),
    "Pipeline/Status": Rule(NODES),
    "Pipeline/List": Rule(NODES),
    "Pipeline/Watch": Rule(NODES),
    "Stage/*": _kinds("controller"),
    "Inference/*": _kinds("router"),
    "ModelStore/List": Rule(READERS),
    "ModelStore/Metadata": Rule(READERS),
    "ModelStore/Tensors": Rule(READERS),
    "ModelStore/Blocks": Rule(READERS),
    "ModelStore/Pull": Rule(READERS),
    "ModelStore/Import": _kinds("controller"),
    "Replication/List": Rule(NODES),
    "Replication/Release": Rule(frozenset({"data"}), lambda request: str(request.node_id)),
    "Tunnel/Open": Rule(MEMBERS),
    "Tunnel/Tunnels": Rule(NODES),
    "Membership/Join": Rule(NODES, strangers=True),
    "Membership/Renew": Rule(NODES),
}

#: Health and reflection: whoever may connect.
_OPEN_PACKAGES = ("grpc.health.v1.", "grpc.reflection.")
_PACKAGE = "eldric.v1."
_OPERATORS = Rule(frozenset())


def rule_of(method: str) -> Rule:
    """The rule of "/eldric.v1.Service/Method"."""
    path = method.removeprefix("/")
    if path.startswith(_OPEN_PACKAGES):
        return Rule(NODES, strangers=True)
    if not path.startswith(_PACKAGE):
        return _OPERATORS
    path = path.removeprefix(_PACKAGE)
    return RULES.get(path) or RULES.get(path.partition("/")[0] + "/*") or _OPERATORS


def authorise(method: str, caller: Caller | None) -> Rule:
    """The rule that lets `caller` call `method`. Raises Unauthenticated for strangers, PermissionDenied for others."""
    rule = rule_of(method)
    if rule.strangers:
        return rule
    if caller is None:
        raise Unauthenticated("this call needs a certificate of this cluster")
    if caller.kind != "client" and caller.kind not in rule.kinds:
        raise PermissionDenied(f"{caller.node_id} may not call {method.removeprefix('/')}")
    return rule


def caller_of(context: Any) -> Caller:
    """The caller of a servicer's call, over gRPC or REST. Raises Unauthenticated when it showed no certificate."""
    caller = find_caller(context)
    if caller is None:
        raise Unauthenticated("this call needs a certificate of this cluster")
    return caller


def find_caller(context: Any) -> Caller | None:
    """Like caller_of; None for a stranger."""
    if hasattr(context, "caller"):  # a REST call, whose HTTP connection was looked at
        caller: Caller | None = context.caller
        return caller
    names = context.auth_context().get("x509_subject_alternative_name", ())
    return caller_from_names(name.decode(errors="replace") for name in names)


def caller_from_names(names: Iterable[str]) -> Caller | None:
    """The caller whose SPIFFE URI is among the subject alternative names of a certificate that was verified."""
    for name in names:
        if subject := parse_spiffe(name):
            return Caller(subject[1], subject[2])
    return None
