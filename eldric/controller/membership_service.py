"""Membership: join tokens and certificates."""

import asyncio
import logging
import time

from cryptography.x509.oid import NameOID

from eldric.controller.cluster import Cluster
from eldric.controller.state import Store
from eldric.errors import AlreadyExists, InvalidRequest, PermissionDenied
from eldric.names import IDENTITY_KINDS, check_name
from eldric.security import Authority, Caller, JoinToken, caller_of, new_token
from eldric.security.certificates import read_csr
from eldric.security.expelled import Expelled
from eldric.security.tokens import DEFAULT_LIFETIME_S
from eldric.v1 import membership_pb2, membership_pb2_grpc

log = logging.getLogger(__name__)


class MembershipService(membership_pb2_grpc.MembershipServicer):
    """Join is open to strangers, on the join port; the other calls need a certificate."""

    def __init__(self, authority: Authority, store: Store, cluster: Cluster, expelled: Expelled) -> None:
        self._expelled = expelled
        self._authority = authority
        self._store = store
        self._cluster = cluster

    async def Join(self, request: membership_pb2.JoinRequest, context: object) -> membership_pb2.Certificate:
        """The token is used up only once the certificate is made; a name that is in use now is refused, in
        upper or lower case: TLS takes "W1" for "w1"."""
        token = JoinToken.parse(request.token)
        now = time.time()
        await self._store.check_token(token, request.kind, now)
        check_name(request.name)
        self._expelled.check(Caller(request.kind, request.name))
        for node in self._cluster.nodes(request.kind):
            if node.is_alive and node.info.name.lower() == request.name.lower():
                raise AlreadyExists(f"{node.id} is a member that is running: choose another name")
        certificate = await self._issue(request.csr, request.kind, request.name)
        await self._store.use_token(token, request.kind, now)
        return certificate

    async def Renew(self, request: membership_pb2.RenewRequest, context: object) -> membership_pb2.Certificate:
        caller = caller_of(context)
        names = read_csr(request.csr)[0].subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        if names and names[0].value != caller.node_id[:64]:
            raise PermissionDenied(f"{caller.node_id} asks for a certificate of {names[0].value!r}")
        return await self._issue(request.csr, caller.kind, caller.name)

    async def CreateToken(
        self, request: membership_pb2.CreateTokenRequest, context: object
    ) -> membership_pb2.CreateTokenResponse:
        if request.kind and request.kind not in IDENTITY_KINDS:
            raise InvalidRequest(f"{request.kind!r} is no kind of node; kinds are {', '.join(IDENTITY_KINDS)}")
        now = time.time()
        token, record = new_token(
            self._authority.sha256,
            now=now,
            lifetime_s=request.lifetime_s or DEFAULT_LIFETIME_S,
            uses=None if request.unlimited else request.uses or 1,
            kind=request.kind,
        )
        await self._store.add_token(record, now)
        return membership_pb2.CreateTokenResponse(token=token.format())

    async def Expel(self, request: membership_pb2.ExpelRequest, context: object) -> membership_pb2.ExpelResponse:
        if request.node_id:
            await self._expel(request.node_id, caller_of(context))
        return membership_pb2.ExpelResponse(expelled=sorted(self._expelled.node_ids))

    async def _expel(self, node_id: str, by: Caller) -> None:
        kind, _, name = node_id.partition("/")
        if kind not in IDENTITY_KINDS or not name:
            raise InvalidRequest(f"{node_id[:200]!r} is no node's id: write KIND/NAME, such as worker/w1")
        check_name(name)
        if kind == "controller" or node_id == by.node_id:
            raise InvalidRequest(
                f"{node_id} cannot be expelled: " + ("it is you" if kind == "client" else "it decides")
            )
        await self._store.expel(node_id, time.time())
        self._expelled.replace(await self._store.expelled())
        self._cluster.deregister(node_id)
        log.warning("event=expelled node=%s by=%s", node_id, by.node_id)

    async def _issue(self, csr: bytes, kind: str, name: str) -> membership_pb2.Certificate:
        certificate = await asyncio.to_thread(self._authority.issue, csr, kind, name)
        return membership_pb2.Certificate(certificate=certificate, authority=self._authority.certificate_pem)
