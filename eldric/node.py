"""What every node shares: its servers, the cluster's certificates, health, metrics and an orderly end."""

import asyncio
import contextlib
import logging
import os
import resource
import secrets
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from google.protobuf.descriptor import ServiceDescriptor
from prometheus_client import CollectorRegistry
from starlette.routing import BaseRoute

from eldric.accepting import LoopErrors
from eldric.channels import ChannelPool
from eldric.config import NodeConfig
from eldric.errors import NotReady
from eldric.grpc_server import GrpcServer, Service
from eldric.interceptors import CallGuard
from eldric.metrics import CallMetrics, describe_node
from eldric.names import split_address
from eldric.node_file import NodeFile
from eldric.readiness import HealthCheck, Readiness
from eldric.security import Authority, Identity, renew
from eldric.security.expelled import Expelled
from eldric.security.live import LiveIdentity
from eldric.tunnel.client import CONTROLLER, TunnelClient
from eldric.web import WebServer, bind
from eldric.web_app import http_tls, make_app

log = logging.getLogger(__name__)

Callback = Callable[[], Awaitable[None]]

#: Time that each stop callback gets, and after them calls that still run, watchers for example, in seconds.
STOP_CALLBACK_S = 3.0
STOP_SERVERS_S = 0.2
#: Open files that a node asks for. Programs that it starts may close them one by one, so it is no higher.
MAX_FILES = 65536
#: What a node needs to start and to serve a few callers.
LEAST_FILES, LEAST_THREADS = 64, 16


class Node:
    """One node's servers. Register services, routes and callbacks, then `run`."""

    def __init__(self, config: NodeConfig, identity: Identity, authority: Authority | None = None) -> None:
        """`authority`: for a controller that issues certificates, its own included."""
        self.config = config
        #: A random number: a restarted node has another.
        self.incarnation = secrets.randbits(63)
        #: Where others reach this node, from `start` on: "host:port", "https://host:port", and for controllers and
        #: edges the "host:port" where a node without a certificate joins.
        self.grpc_address = ""
        self.http_url = ""
        self.join_address = ""
        #: Controllers to ask in turn: those that are configured, and then, from `start` on, by way of the edge.
        self.controllers: tuple[str, ...] = config.controllers
        #: For a node that others reach by way of an edge; its addresses are the edge's.
        self.tunnel = TunnelClient(config.edge, lambda: self.identity, on_moved=self._moved) if config.edge else None
        #: Whether the node was asked to end: no new work, please.
        self.draining = False
        self.metrics = CollectorRegistry()
        #: Connections to other nodes with this node's current certificate.
        self.channels = ChannelPool(lambda: self.identity)
        self._authority = authority
        self._live = LiveIdentity(identity)
        #: Whose certificates count no more.
        self.expelled = Expelled()
        self._guard = CallGuard(CallMetrics(self.metrics), self.expelled)
        self._certificate_end = describe_node(self.metrics, config.kind, config.name)
        self._readiness = Readiness(config.kind, config.name)
        self._file = NodeFile(config.folder)
        self._services: list[Service] = []
        self._routes: list[BaseRoute] = []
        self._on_start: list[Callback] = []
        self._on_drain: list[Callback] = []
        self._on_stop: list[Callback] = []
        self._ended = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._grpc: GrpcServer | None = None
        self._web: WebServer | None = None

    @property
    def identity(self) -> Identity:
        """The certificate of now; it is another after a renewal."""
        return self._live.identity

    @property
    def edge_id(self) -> str:
        """ "edge/NAME" of the edge that leads to this node; empty without one, and before the first connection."""
        return self.tunnel.edge_id if self.tunnel is not None else ""

    def service(
        self,
        servicer: Any,
        adder: Callable[[Any, Any], None],
        descriptor: ServiceDescriptor,
        *,
        strangers: bool = False,
    ) -> None:
        """Serves `servicer` over gRPC, and over REST what its google.api.http options say.

        `strangers`: also on the join port, where callers show no certificate.
        """
        self._services.append(Service(servicer, adder, descriptor, strangers))

    def routes(self, routes: Sequence[BaseRoute]) -> None:
        """Adds HTTP routes; they come before the REST faces. `eldric.web.http_caller(request)` says who calls."""
        self._routes.extend(routes)

    def health(self, check: HealthCheck) -> None:
        """`check` says whether the node is ready, and details for /health. All checks must be."""
        self._readiness.add(check)

    def on_start(self, callback: Callback) -> None:
        """`callback` runs when both servers listen, before `start` returns."""
        self._on_start.append(callback)

    def on_drain(self, callback: Callback) -> None:
        """`callback` runs when the node was asked to end, in order, while the servers still answer."""
        self._on_drain.append(callback)

    def on_stop(self, callback: Callback) -> None:
        """`callback` runs after all drain callbacks, the last one added first, before the servers stop."""
        self._on_stop.append(callback)

    async def start(self) -> None:
        """Binds the servers, connects to the edge if there is one, writes node.json, runs the start callbacks.

        Raises AddressInUse, AlreadyExists when a node runs in this folder, Unauthenticated when the certificate has
        ended, Unavailable when the edge is not reached.
        """
        if self._authority is not None:
            self._live.replace(await self._renew(self.identity))
        self._live.check()
        self._file.lock()
        try:
            await self._start_servers()
            if self.tunnel is not None:
                await self._start_tunnel(self.tunnel)
            self.write_down()
            self._certificate_changed(self.identity)
            renewal = self._live.keep_fresh(self._renew, self._certificate_changed)
            self._tasks.append(asyncio.create_task(renewal, name="renewal"))
            for callback in self._on_start:
                await callback()
        except BaseException:
            await self._stop_servers(0.0)
            raise
        log.info("event=started grpc=%s http=%s", self.grpc_address, self.http_url)

    def write_down(self) -> None:
        """Writes node.json, with the addresses of now."""
        self._file.write(
            kind=self.config.kind,
            name=self.config.name,
            pid=os.getpid(),
            grpc_address=self.grpc_address,
            http_url=self.http_url,
            join_address=self.join_address,
            incarnation=self.incarnation,
        )

    async def _start_servers(self) -> None:
        config, tls = self.config, http_tls(self.config, self._live)
        app = make_app(config, self.metrics, self._guard, self._readiness, self._services, self._routes)
        self._web = WebServer(app, bind(config.host, config.http_port, "--http-port"), tls)
        self.http_url = f"{'http' if tls is None else 'https'}://{config.advertised(self._web.port)}"
        self._grpc = GrpcServer(config, self._live, self._guard, self._readiness, self._services)
        self.grpc_address, self.join_address = await self._grpc.start()
        await self._web.start()
        self._tasks.append(asyncio.create_task(self._readiness.watch(), name="readiness"))

    async def _start_tunnel(self, tunnel: TunnelClient) -> None:
        """Others reach this node by the edge's addresses from here on, and it reaches the controllers through it."""
        host = self.config.host
        await tunnel.start()
        self.grpc_address = await tunnel.expose(host, split_address(self.grpc_address)[1])
        scheme, _, address = self.http_url.partition("://")
        self.http_url = f"{scheme}://{await tunnel.expose(host, split_address(address)[1])}"
        self.controllers = (*self.config.controllers, await tunnel.reach(CONTROLLER))

    def _moved(self, before: str, now: str) -> None:
        """The edge gave another address for one of this node's; the member registers again with it."""
        if not now:
            return
        if self.grpc_address == before:
            self.grpc_address = now
        self.http_url = self.http_url.replace(f"//{before}", f"//{now}")
        self.write_down()

    async def _renew(self, identity: Identity) -> Identity:
        if self._authority is not None:
            return self._authority.issue_identity(identity.kind, identity.name)
        problem: Exception | None = None
        for address in self.controllers:
            try:
                return await renew(address, identity)
            except Exception as error:
                problem = error
        raise problem or RuntimeError("no controller to renew with")

    def _certificate_changed(self, identity: Identity) -> None:
        identity.save(self.config.folder)
        self._certificate_end.set(identity.validity()[1].timestamp())

    async def stop(self) -> None:
        """Drains within `config.drain_s`, stops the servers, removes node.json."""
        self.draining = self._readiness.draining = True
        self._ended.set()
        deadline = time.monotonic() + self.config.drain_s
        log.info("event=draining limit_s=%g", self.config.drain_s)
        for callback in [*self._on_drain, self._guard.wait_idle]:
            await _bounded(callback, deadline - time.monotonic())
        if self._web is not None:  # requests that no guard knows of may end as well
            await self._web.stop(max(STOP_SERVERS_S, deadline - time.monotonic()))
        for callback in reversed(self._on_stop):
            await _bounded(callback, STOP_CALLBACK_S)
        await self._stop_servers(STOP_SERVERS_S)
        log.info("event=stopped")

    async def _stop_servers(self, grace_s: float) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        if self._web is not None:
            await self._web.stop(grace_s)
        if self._grpc is not None:
            await self._grpc.stop(grace_s)
        self._grpc = self._web = None
        await self.channels.close()
        if self.tunnel is not None:
            await self.tunnel.close()
        self._file.remove()

    async def run(self) -> None:
        """Starts, waits for SIGTERM, SIGINT or `end`, then stops. A second signal ends the process at once."""
        _allow_files()
        _check_threads()
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(LoopErrors())
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            await self.start()
            await self._ended.wait()
            await self.stop()
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def end(self) -> None:
        """Asks the node to end, as SIGTERM does."""
        self._ended.set()

    def _on_signal(self, number: int) -> None:
        if not self._ended.is_set():
            log.info("event=signal signal=%s", signal.Signals(number).name)
            self.end()
            return
        log.warning("event=second_signal signal=%s", signal.Signals(number).name)
        with contextlib.suppress(Exception):
            self._file.remove()
        logging.shutdown()
        os._exit(128 + number)


def _allow_files() -> None:
    """More open files than the usual 1024, where this process may: each connection is one, a stranger's too.

    Raises NotReady where there are too few to begin with: gRPC would end the process, or name a port as the culprit.
    """
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < LEAST_FILES:
        raise NotReady(f"a node needs {LEAST_FILES} open files, it may have {most}: raise the limit (ulimit -n)")
    wanted = MAX_FILES if most == resource.RLIM_INFINITY else min(most, MAX_FILES)
    if now != resource.RLIM_INFINITY and now < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _check_threads() -> None:
    """Raises NotReady where there are too few: gRPC would end the process, or wait for ever."""
    together = threading.Barrier(LEAST_THREADS)
    with ThreadPoolExecutor(LEAST_THREADS) as pool:
        try:
            for _ in range(LEAST_THREADS):
                pool.submit(together.wait)
        except RuntimeError as error:
            together.abort()
            raise NotReady(f"{error}: a node needs {LEAST_THREADS}; raise the limit (ulimit -u, TasksMax=)") from error


async def _bounded(callback: Callback, seconds: float) -> None:
    """Runs a callback for that long at most; whatever it does, the node goes on ending."""
    name = getattr(callback, "__qualname__", repr(callback))
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            await callback()
    except TimeoutError:
        log.warning("event=drain_timeout callback=%s", name)
    except Exception:
        log.exception("event=drain_failed callback=%s", name)
