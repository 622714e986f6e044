"""Which nodes there are: a state machine without clock or socket.

Every method takes what happened and the time, and returns what follows from it. Two speeds of noticing: a link that
closes makes a node suspect at once, and a probe decides; silence ends with the lease.

    register, beat --> UP / DRAINING
    link closed, beat late --> SUSPECT + Probe
    probe: refused --> LOST; answered --> UP; no answer twice after a closed link --> LOST
    lease over --> LOST; kept for some minutes, then removed
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from eldric.controller.nodes import NodeInfo, NodeState, StageKey, StageReport
from eldric.errors import AlreadyExists, NotFound, VersionMismatch

#: A beat is late after so many intervals; one that is missed changes nothing.
LATE_BEATS = 2.0
#: More of a lease for a node behind an edge, in seconds: its tunnel may break, come back, and have lost nothing.
EDGE_LEASE_S = 5.0
#: How long a lost node stays listed, in seconds.
LOST_KEPT_S = 300.0
#: Unanswered probes after a closed link that make a node lost.
UNANSWERED_PROBES = 2
#: Earlier processes of a node that are remembered, so that they do not come back beside the newer one.
_REPLACED_KEPT = 8


@dataclass(frozen=True, slots=True)
class NodeChanged:
    """The node registered, or its state is another."""

    node_id: str


@dataclass(frozen=True, slots=True)
class NodeRemoved:
    """The node left, or was lost long ago."""

    node: "Node"


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask this node's health, and say with `probed` what came of it."""

    node_id: str
    incarnation: int
    address: str


Event = NodeChanged | NodeRemoved | Probe


@dataclass(slots=True)
class Node:
    """One node. `reason` says why it is not up."""

    info: NodeInfo
    registered_at: float  # Unix time
    last_beat: float
    state: NodeState = NodeState.UP
    reason: str = ""
    permanent: bool = False
    draining: bool = False
    link: int = 0  # number of its Beat stream; 0: none is open
    sequence: int = 0
    unanswered: int = 0
    probed: bool = False  # since its last beat
    lost_at: float = 0.0
    stages: Mapping[StageKey, StageReport] = field(default_factory=dict)
    memory_used_bytes: int = 0
    replaced: tuple[int, ...] = ()  # incarnations before this one

    @property
    def id(self) -> str:
        return self.info.id

    @property
    def is_alive(self) -> bool:
        return self.state is not NodeState.LOST


class Registry:
    """All nodes of a cluster."""

    def __init__(self, protocol: int, beat_interval_s: float, lease_s: float) -> None:
        self._protocol = protocol
        self._interval_s = beat_interval_s
        self._lease_s = lease_s
        self._nodes: dict[str, Node] = {}
        self._links = 0
        self._last_tick: float | None = None

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def get(self, node_id: str) -> Node | None:
        return self._nodes.get(node_id)

    def register(self, info: NodeInfo, now: float, wall: float, *, permanent: bool = False) -> list[Event]:
        """Add a node, or replace what was known of it. `permanent`: it has no lease (the controller itself).

        Raises VersionMismatch, and AlreadyExists for a process that a newer one of the same name has replaced.
        """
        if info.protocol != self._protocol:
            raise VersionMismatch(
                f"{info.id} speaks protocol version {info.protocol}, this cluster speaks {self._protocol}: "
                "run the same version of Eldric on all nodes"
            )
        known = self._nodes.get(info.id)
        if known is None:
            self._nodes[info.id] = Node(info, wall, now, permanent=permanent)
        elif known.info.incarnation == info.incarnation:
            known.info, known.last_beat, known.probed = info, now, False
            self._recover(known)
        else:
            if info.incarnation in known.replaced and known.is_alive:
                raise AlreadyExists(f"another process (pid {known.info.pid}) has taken the name {info.id}")
            replaced = (*known.replaced, known.info.incarnation)[-_REPLACED_KEPT:]
            self._nodes[info.id] = Node(info, wall, now, permanent=permanent, replaced=replaced)
        return [NodeChanged(info.id)]

    def lease_s(self, info: NodeInfo) -> float:
        """Silence of a node that counts as lost."""
        return self._lease_s + (EDGE_LEASE_S if info.edge_id else 0.0)

    def link_opened(self, node_id: str, incarnation: int) -> int:
        """A Beat stream begins. Returns its number. Raises NotFound for a node that must register first."""
        node = self._known(node_id, incarnation)
        self._links += 1
        node.link = self._links
        return node.link

    def beat(
        self,
        node_id: str,
        incarnation: int,
        sequence: int,
        now: float,
        *,
        draining: bool = False,
        stages: Iterable[StageReport] = (),
        memory_used_bytes: int = 0,
    ) -> list[Event]:
        """A node's pulse. Raises NotFound for a node that must register first."""
        node = self._known(node_id, incarnation)
        node.last_beat, node.probed, node.unanswered = now, False, 0
        if sequence >= node.sequence:  # an older one may come late, over a link that was given up
            node.sequence, node.draining = sequence, draining
            node.stages = {report.key: report for report in stages}
            node.memory_used_bytes = memory_used_bytes
        return self._recover(node)

    def link_closed(self, node_id: str, link: int) -> list[Event]:
        """A Beat stream ended. Suspicious if it was the node's newest."""
        node = self._nodes.get(node_id)
        if node is None or node.link != link:
            return []
        node.link = 0
        if node.state is NodeState.LOST:
            return []
        return self._suspect(node, "its link closed")

    def probed(self, node_id: str, incarnation: int, alive: bool | None, now: float) -> list[Event]:
        """What a probe found: it answered, it was refused (False), or nothing came in time (None)."""
        node = self._nodes.get(node_id)
        if node is None or node.info.incarnation != incarnation or node.state is not NodeState.SUSPECT:
            return []
        if alive:
            return self._recover(node)
        node.unanswered += 1
        if alive is False:
            return self._lose(node, "its process has ended", now)
        if node.link:
            return []  # silent, but its link holds: the lease decides
        if node.unanswered >= UNANSWERED_PROBES:
            return self._lose(node, "its link closed and it does not answer", now)
        return [Probe(node.id, incarnation, node.info.grpc_address)]

    def tick(self, now: float) -> list[Event]:
        """Time passed. Call it several times per beat interval."""
        self._forgive(now)
        events: list[Event] = []
        for node in list(self._nodes.values()):
            silence = now - node.last_beat
            if node.permanent:
                continue
            if node.state is NodeState.LOST:
                if now - node.lost_at > LOST_KEPT_S:
                    events += self._remove(node)
            elif silence > self.lease_s(node.info):
                events += self._lose(node, f"no beat for {silence:.1f} s", now)
            elif silence > LATE_BEATS * self._interval_s and not node.probed:
                node.probed = True
                events += self._suspect(node, "its beat is late")
        return events

    def deregister(self, node_id: str) -> list[Event]:
        """The node says that it leaves."""
        node = self._nodes.get(node_id)
        return [] if node is None or node.permanent else self._remove(node)

    def drop_stages(self, node_id: str, keys: Iterable[StageKey]) -> None:
        """These stages are known to be unloaded: what the last beat said of them and their memory counts no more."""
        node = self._nodes.get(node_id)
        if node is not None:
            gone = set(keys)
            freed = sum(report.memory.total for key, report in node.stages.items() if key in gone)
            node.stages = {key: report for key, report in node.stages.items() if key not in gone}
            node.memory_used_bytes = max(0, node.memory_used_bytes - freed)

    def update_stage(self, node_id: str, report: StageReport) -> None:
        """A stage's report that came in answer to a call, newer than the last beat."""
        node = self._nodes.get(node_id)
        if node is not None:
            node.stages = {**node.stages, report.key: report}

    def _known(self, node_id: str, incarnation: int) -> Node:
        node = self._nodes.get(node_id)
        if node is None:
            raise NotFound(f"{node_id} is not registered: register first")
        if node.info.incarnation != incarnation:
            if incarnation in node.replaced and node.is_alive:
                raise AlreadyExists(f"another process (pid {node.info.pid}) has taken the name {node_id}")
            raise NotFound(f"this process of {node_id} is not registered: register first")
        return node

    def _suspect(self, node: Node, reason: str) -> list[Event]:
        node.state, node.reason, node.unanswered = NodeState.SUSPECT, reason, 0
        return [NodeChanged(node.id), Probe(node.id, node.info.incarnation, node.info.grpc_address)]

    def _recover(self, node: Node) -> list[Event]:
        state = NodeState.DRAINING if node.draining else NodeState.UP
        if node.state is state:
            return []
        node.state, node.reason = state, ""
        return [NodeChanged(node.id)]

    def _lose(self, node: Node, reason: str, now: float) -> list[Event]:
        node.state, node.reason, node.lost_at = NodeState.LOST, reason, now
        return [NodeChanged(node.id)]

    def _remove(self, node: Node) -> list[Event]:
        del self._nodes[node.id]
        return [NodeRemoved(node)]

    def _forgive(self, now: float) -> None:
        """The controller itself may have stood still (a suspended machine): that silence is not the nodes'."""
        if self._last_tick is not None:
            gap = now - self._last_tick
            if gap > self._interval_s:
                for node in self._nodes.values():
                    node.last_beat = min(now, node.last_beat + gap)
        self._last_tick = now
