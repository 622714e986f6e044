"""The transports of a stage's two links: what it receives with and what it sends with, one where the schemes agree."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from eldric.transport.addresses import join_address, split_address
from eldric.transport.base import Relay, Transport, TransportOptions
from eldric.transport.errors import InvalidAddress, ListenFailed, TransportError, UnknownTransport
from eldric.transport.registry import create
from eldric.v1 import common_pb2, stage_pb2
from eldric.worker.config import WorkerConfig

log = logging.getLogger(__name__)

#: Every installation has it, and it reaches every machine that can be reached at all.
DEFAULT_TRANSPORT = "zmq"

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Wiring:
    """`receiver` listens at `endpoint`. `sender` is the same transport, or one that listens nowhere."""

    receiver: Transport
    sender: Transport
    endpoint: common_pb2.TensorEndpoint

    @property
    def transports(self) -> tuple[Transport, ...]:
        """Each once."""
        return (self.receiver,) if self.sender is self.receiver else (self.receiver, self.sender)


@dataclass(frozen=True, slots=True)
class Rewired:
    """What came of a wish for other transports: the problems are empty where it was met."""

    wiring: Wiring
    receive_problem: str = ""
    send_problem: str = ""


class Wirer:
    """Opens transports for the stages of one worker. May block; used by one thread at a time for each stage."""

    def __init__(self, config: WorkerConfig, relay: Relay | None = None) -> None:
        """`relay`: the tunnel of a worker behind an edge."""
        self._config = config
        self._relay = relay

    def first(self, request: stage_pb2.LoadRequest) -> Rewired:
        """One transport for both links, of the request's scheme or, where that cannot be opened, of the default's.

        Raises TransportError when not even that one can be opened.
        """
        scheme = request.transport or DEFAULT_TRANSPORT
        problem = ""
        if scheme != DEFAULT_TRANSPORT:
            try:
                return Rewired(self._listening(scheme, request))
            except TransportError as error:
                problem = str(error)
                log.warning("transport not opened scheme=%s pipeline=%s: %s", scheme, request.pipeline_id, problem)
        return Rewired(self._listening(DEFAULT_TRANSPORT, request), receive_problem=problem)

    def other(self, wiring: Wiring, request: stage_pb2.LoadRequest, receive: str, send: str) -> Rewired:
        """Transports of these schemes in place of those that there are: good ones are kept, none is closed.

        Never raises TransportError: an end that cannot be had stays as it is, and the problem says why.
        """
        receive_problem = send_problem = ""
        made = wiring
        if receive != wiring.receiver.scheme:
            try:
                opened = self._listening(receive, request)
            except TransportError as error:
                receive_problem = str(error)
            else:
                made = Wiring(opened.receiver, wiring.sender, opened.endpoint)
        if send == made.receiver.scheme:
            made = Wiring(made.receiver, made.receiver, made.endpoint)
        elif send != made.sender.scheme:
            try:
                made = Wiring(made.receiver, self._transport(send, request), made.endpoint)
            except TransportError as error:
                send_problem = str(error)
        return Rewired(made, receive_problem, send_problem)

    def _listening(self, scheme: str, request: stage_pb2.LoadRequest) -> Wiring:
        transport = self._transport(scheme, request)
        try:
            address = _attempt(scheme, ListenFailed, lambda: transport.listen(self._config.node.host))
        except BaseException:
            transport.close()
            raise
        endpoint = common_pb2.TensorEndpoint(
            scheme=scheme, address=self._reachable(scheme, address), public_key=transport.public_key
        )
        return Wiring(transport, transport, endpoint)

    def _transport(self, scheme: str, request: stage_pb2.LoadRequest) -> Transport:
        """Raises UnknownTransport, also for one without encryption where nobody said that it may go without."""
        options = TransportOptions(
            silence_s=self._config.silence_s, encrypt=not request.insecure_tensors, relay=self._relay
        )
        if request.far:
            options = replace(options, silence_s=max(options.silence_s, options.relay_silence_s))
        transport = _attempt(
            scheme, UnknownTransport, lambda: create(scheme, request.pipeline_id, request.index, options)
        )
        if transport.encryption == "none" and not (request.insecure_tensors or self._config.trust_fabric):
            transport.close()
            raise UnknownTransport(
                f"the transport {scheme!r} has no encryption: worker {self._config.node.name} takes it only if it was "
                "started with --trust-fabric"
            )
        return transport

    def _reachable(self, scheme: str, address: str) -> str:
        """The address with the host that other nodes know this one by, where it is one of a host and a port."""
        try:
            host, port = split_address(address, scheme)
        except InvalidAddress:
            return address
        node = self._config.node
        return join_address(scheme, node.advertised_host, port) if host == node.host.strip("[]") else address


def _attempt(scheme: str, failure: type[TransportError], work: Callable[[], Made]) -> Made:
    """What `work` gives. A third party's transport may fail in any way: whatever it raises becomes a TransportError."""
    try:
        return work()
    except TransportError:
        raise
    except Exception as error:
        raise failure(f"the transport {scheme!r} failed: {type(error).__name__}: {error}") from error
