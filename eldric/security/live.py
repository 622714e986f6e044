"""A node's certificate while it runs: servers show the newest one, and it is renewed before it ends."""

import asyncio
import datetime
import logging
import ssl
from collections.abc import Awaitable, Callable
from typing import cast

import grpc

from eldric.errors import Unauthenticated
from eldric.security.certificates import Identity

log = logging.getLogger(__name__)

#: Longest sleep in one piece: a machine that was suspended wakes up to the right time.
MAX_SLEEP_S = 3600.0
#: Shortest time between two tries to renew, and the time between them when the certificate has ended.
LEAST_PAUSE_S, LATE_PAUSE_S = 0.2, 30.0


class LiveIdentity:
    """The identity of now. Servers made from it show a replaced certificate to the next connection."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self._contexts: list[ssl.SSLContext] = []

    def replace(self, identity: Identity) -> None:
        self.identity = identity
        for context in self._contexts:
            identity.put_into(context)

    def http_context(self, client_certificates: ssl.VerifyMode) -> ssl.SSLContext:
        context = self.identity.server_context(client_certificates)
        self._contexts.append(context)
        return context

    def grpc_credentials(self, *, require_client: bool) -> grpc.ServerCredentials:
        """With `require_client`, whoever shows no certificate of this cluster is refused while shaking hands."""
        shown = self.identity

        def fetch() -> grpc.ServerCertificateConfiguration | None:  # called at each handshake, by grpc's threads
            nonlocal shown
            if self.identity is shown:
                return None
            shown = self.identity
            return _configuration(shown)

        fetcher = cast(Callable[[], grpc.ServerCertificateConfiguration], fetch)  # None, "as before", is fine
        return grpc.dynamic_ssl_server_credentials(_configuration(shown), fetcher, require_client)

    def check(self) -> None:
        """Raises Unauthenticated when the certificate has ended."""
        _, end = self.identity.validity()
        if end <= _now():
            raise Unauthenticated(
                f"the certificate of {self.identity.node_id} ended on {end:%Y-%m-%d %H:%M} UTC: "
                "let the node join the cluster again"
            )

    async def keep_fresh(
        self,
        renew: Callable[[Identity], Awaitable[Identity]],
        renewed: Callable[[Identity], None],
    ) -> None:
        """Renews at two thirds of each certificate's lifetime, for ever; failures are logged and tried again.

        `renewed` keeps a new certificate. One that it could not keep is shown already, and soon renewed once more.
        """
        kept = self.identity
        while True:
            begin, end = kept.validity()
            await _sleep_until(begin + (end - begin) * 2 / 3)
            try:
                self.replace(await renew(self.identity))
                renewed(self.identity)
            except Exception as error:
                begin, end = self.identity.validity()
                log.warning("event=renewal_failed certificate_end=%s error=%r", end.isoformat(), str(error))
                await asyncio.sleep(_pause_s(begin, end))
            else:
                kept = self.identity
                log.info("event=certificate_renewed end=%s", kept.validity()[1].isoformat())


def _configuration(identity: Identity) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(identity.key_pem, identity.chain_pem)], identity.authority_pem)


def _pause_s(begin: datetime.datetime, end: datetime.datetime) -> float:
    """Until the next try to renew: ever sooner towards the end. After it, or once the clock is wrong, there is no hurry
    any more."""
    left_s, lifetime_s = (end - _now()).total_seconds(), (end - begin).total_seconds()
    pause_s = left_s / 10 if left_s > 0 else min(lifetime_s / 100, LATE_PAUSE_S)
    return min(max(pause_s, LEAST_PAUSE_S), MAX_SLEEP_S)


async def _sleep_until(moment: datetime.datetime) -> None:
    while (left := (moment - _now()).total_seconds()) > 0:
        await asyncio.sleep(min(left, MAX_SLEEP_S))


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
