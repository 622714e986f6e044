"""Who is who in a cluster: certificates, join tokens, and what each kind of caller may do.

Every cluster has a certificate authority of its own. A node proves its kind and name with a certificate whose
subject alternative names hold the URI "spiffe://eldric/CLUSTER/KIND/NAME"; both ends of every connection check it.
"""

from eldric.security.access import Caller, authorise, caller_of
from eldric.security.certificates import Authority, Identity, make_csr
from eldric.security.joining import fetch_authority, join, renew
from eldric.security.tokens import JoinToken, TokenRecord, new_token

__all__ = [
    "Authority",
    "Caller",
    "Identity",
    "JoinToken",
    "TokenRecord",
    "authorise",
    "caller_of",
    "fetch_authority",
    "join",
    "make_csr",
    "new_token",
    "renew",
]
