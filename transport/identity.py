"""Who a transport is, where its connections do not say so themselves: an Ed25519 key, proven at each link's opening.

Both ends sign what the two have said (frame.proto, LinkAccept), which has a fresh random number of each in it, so no
proof is good for another link.
"""

import secrets

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from eldric.v1 import frame_pb2

NONCE_BYTES = 32
RECEIVER, SENDER = b"eldric link receiver", b"eldric link sender"


class Identity:
    """A fresh key pair; the private half stays in here."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()
        self.public_key = self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    def prove(self, role: bytes, opening: bytes, acceptance: bytes) -> bytes:
        """Signature of what was said: the serialized LinkOpen, and the LinkAccept without its proof."""
        return self._key.sign(_statement(role, opening, acceptance))


def is_proven(public_key: bytes, proof: bytes, role: bytes, opening: bytes, acceptance: bytes) -> bool:
    """Whether the holder of that key said so."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(proof, _statement(role, opening, acceptance))
    except (ValueError, InvalidSignature):
        return False
    return True


def nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def bare(acceptance: frame_pb2.LinkAccept) -> bytes:
    """A LinkAccept as both ends sign it: without its proof."""
    copy = frame_pb2.LinkAccept()
    copy.CopyFrom(acceptance)
    copy.ClearField("proof")
    return copy.SerializeToString(deterministic=True)


def _statement(role: bytes, opening: bytes, acceptance: bytes) -> bytes:
    return role + b"".join(len(part).to_bytes(4, "little") + part for part in (opening, acceptance))
