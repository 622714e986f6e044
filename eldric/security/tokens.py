"""Join tokens: what an operator hands to a new node, and what the controller keeps of it."""

import base64
import binascii
import hashlib
import re
import secrets
from dataclasses import dataclass, replace
from hmac import compare_digest

from eldric.errors import InvalidRequest, PermissionDenied, Unauthenticated

SCHEME = "eldric"
MAX_LIFETIME_S = 30 * 24 * 3600
DEFAULT_LIFETIME_S = 3600
#: Kinds that only a token made for them admits: they may change the cluster.
PRIVILEGED_KINDS = ("client", "controller")

_ID = re.compile(r"[0-9a-f]{16}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class JoinToken:
    """ "eldric.SHA256-OF-CA.ID.SECRET": names the cluster's authority by the SHA-256 of its certificate (DER, hex),
    so that the joiner knows whom it talks to before it shows the secret (256 random bits, base64url)."""

    authority_sha256: str
    id: str
    secret: bytes

    @classmethod
    def parse(cls, text: str) -> "JoinToken":
        """Raises InvalidRequest when `text` is no token."""
        parts = text.strip().split(".")
        if len(parts) != 4 or parts[0] != SCHEME:
            raise InvalidRequest(f"this is no join token: it reads {SCHEME}.DIGEST.ID.SECRET")
        _, digest, identifier, secret = parts
        if not _DIGEST.fullmatch(digest) or not _ID.fullmatch(identifier):
            raise InvalidRequest("this join token is damaged: was it copied in full?")
        try:
            raw = base64.b64decode(secret + "=", altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        if len(raw) != 32:
            raise InvalidRequest("this join token is damaged: was it copied in full?")
        return cls(digest, identifier, raw)

    def format(self) -> str:
        secret = base64.urlsafe_b64encode(self.secret).decode().rstrip("=")
        return f"{SCHEME}.{self.authority_sha256}.{self.id}.{secret}"


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """What the controller keeps of a token: never the secret, only its SHA-256.

    `kind`: the kind of node that it admits; empty: any but "client" and "controller".
    `expires_at`: Unix time in seconds. `uses_left`: None for any number.
    """

    id: str
    secret_sha256: bytes
    kind: str
    expires_at: float
    uses_left: int | None

    def use(self, token: JoinToken, kind: str, now: float) -> "TokenRecord":
        """The record after one use of `token` by a node of `kind`; the caller keeps it in place of this one.

        Raises Unauthenticated when the secret is wrong or the token is used up or expired, PermissionDenied when it
        admits another kind.
        """
        if token.id != self.id or not compare_digest(hashlib.sha256(token.secret).digest(), self.secret_sha256):
            raise Unauthenticated("unknown join token")
        if now >= self.expires_at:
            raise Unauthenticated("this join token has expired: ask for a new one")
        if self.uses_left is not None and self.uses_left < 1:
            raise Unauthenticated("this join token is used up: ask for a new one")
        if self.kind and kind != self.kind:
            raise PermissionDenied(f"this join token admits a {self.kind}, not a {kind}")
        if not self.kind and kind in PRIVILEGED_KINDS:
            raise PermissionDenied(f"this join token admits no {kind}: ask for one made for it")
        return self if self.uses_left is None else replace(self, uses_left=self.uses_left - 1)


def new_token(
    authority_sha256: str,
    *,
    now: float,
    lifetime_s: float = DEFAULT_LIFETIME_S,
    uses: int | None = 1,
    kind: str = "",
) -> tuple[JoinToken, TokenRecord]:
    """A token to hand out and the record to keep. `uses` None: any number. Raises InvalidRequest."""
    if not 0 < lifetime_s <= MAX_LIFETIME_S:
        raise InvalidRequest(f"a join token lives up to {MAX_LIFETIME_S} s, not {lifetime_s:g} s")
    if uses is not None and uses < 1:
        raise InvalidRequest("a join token has at least one use")
    token = JoinToken(authority_sha256, secrets.token_hex(8), secrets.token_bytes(32))
    digest = hashlib.sha256(token.secret).digest()
    return token, TokenRecord(token.id, digest, kind, now + lifetime_s, uses)
