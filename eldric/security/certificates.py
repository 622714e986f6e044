"""The cluster's authority and the certificates that it issues.

Format: X.509 v3 (RFC 5280) with P-256 keys; a node's identity is the SPIFFE URI among its subject alternative names.
"""

import contextlib
import datetime
import hashlib
import ipaddress
import os
import re
import socket
import ssl
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from eldric import whole_files
from eldric.errors import InvalidRequest, NotFound
from eldric.names import IDENTITY_KINDS, check_name, server_name

LIFETIME = datetime.timedelta(days=30)
AUTHORITY_LIFETIME = datetime.timedelta(days=3650)

_AUTHORITY, _AUTHORITY_KEY = "ca.pem", "ca-key.pem"
_CERTIFICATE, _KEY = "node.pem", "node-key.pem"
#: Of TLS 1.2, as RFC 9325 wants them: forward secrecy and authenticated encryption. TLS 1.3 has no others.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
_HOST = re.compile(r"(?!.*\beldric$)[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")
_CLUSTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class Identity:
    """A node's certificate and key, and the authority that it trusts; all PEM."""

    kind: str
    name: str
    authority_pem: bytes
    certificate_pem: bytes
    key_pem: bytes

    @classmethod
    def load(cls, folder: Path) -> "Identity":
        """From ca.pem, node.pem and node-key.pem. Raises NotFound when the folder holds none, InvalidRequest when it
        is damaged."""
        try:
            authority, certificate, key = ((folder / name).read_bytes() for name in (_AUTHORITY, _CERTIFICATE, _KEY))
        except FileNotFoundError as error:
            raise NotFound(
                f"{folder} holds no node certificate ({error.filename}): join the cluster first (`eldric-cli join`; a "
                "controller's comes from `eldric-cli init`)"
            ) from None
        if not _belong_together(certificate, key):
            certificate = _drafted(folder / _CERTIFICATE, key)
        _, kind, name = subject_of(_certificate(certificate))
        return cls(kind, name, authority, certificate, key)

    def save(self, folder: Path) -> None:
        """Writes the three files; the key can be read by its owner only."""
        folder.mkdir(parents=True, exist_ok=True)
        key, certificate = folder / _KEY, folder / _CERTIFICATE
        pems = {folder / _AUTHORITY: self.authority_pem, key: self.key_pem, certificate: self.certificate_pem}
        whole_files.replace(pems, secret=[key])

    @property
    def node_id(self) -> str:
        return f"{self.kind}/{self.name}"

    @property
    def cluster(self) -> str:
        return subject_of(_certificate(self.certificate_pem))[0]

    @property
    def chain_pem(self) -> bytes:
        """What a server shows: its certificate, then the authority's, which a joiner compares with its token."""
        return self.certificate_pem + self.authority_pem

    def validity(self) -> tuple[datetime.datetime, datetime.datetime]:
        """First and last moment (UTC) at which the certificate holds."""
        certificate = _certificate(self.certificate_pem)
        return certificate.not_valid_before_utc, certificate.not_valid_after_utc

    def server_context(self, client_certificates: ssl.VerifyMode) -> ssl.SSLContext:
        """TLS for the HTTP face. CERT_REQUIRED refuses whoever shows no certificate of this cluster."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(_CIPHERS)
        self.put_into(context)
        context.load_verify_locations(cadata=self.authority_pem.decode())
        context.verify_mode = client_certificates
        return context

    def client_context(self) -> ssl.SSLContext:
        """TLS of an HTTP client that shows this certificate and trusts this cluster's authority alone."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(cadata=self.authority_pem.decode())
        self.put_into(context)
        return context

    def put_into(self, context: ssl.SSLContext) -> None:
        """Makes connections of `context` from now on show this certificate."""
        with _as_file(self.key_pem + self.chain_pem) as path:  # the ssl module reads chains from files only
            context.load_cert_chain(path)


@dataclass(frozen=True, slots=True)
class Authority:
    """The certificate authority of a cluster. Whoever holds its key can admit nodes."""

    cluster: str
    certificate_pem: bytes
    key_pem: bytes

    @classmethod
    def create(cls, cluster: str) -> "Authority":
        """A new authority. Raises InvalidRequest when `cluster` is no name."""
        if not _CLUSTER.fullmatch(cluster):
            raise InvalidRequest(f"{cluster!r} is no name for a cluster: use letters, digits, '.', '_' and '-'")
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Eldric"),
                x509.NameAttribute(NameOID.COMMON_NAME, cluster),
            ]
        )
        builder = _builder(name, name, key.public_key(), AUTHORITY_LIFETIME)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_key_usage(sign_certificates=True), critical=True)
        certificate = builder.sign(key, hashes.SHA256())
        return cls(cluster, _pem(certificate), _key_pem(key))

    @classmethod
    def load(cls, folder: Path) -> "Authority":
        """From ca.pem and ca-key.pem. Raises NotFound when this folder holds no authority."""
        try:
            certificate, key = (folder / _AUTHORITY).read_bytes(), (folder / _AUTHORITY_KEY).read_bytes()
        except FileNotFoundError as error:
            raise NotFound(f"{folder} holds no cluster authority ({error.filename})") from None
        names = _certificate(certificate).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return cls(str(names[0].value), certificate, key)

    def save(self, folder: Path) -> None:
        """Writes both files; a folder that is made for them is its owner's alone."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = folder / _AUTHORITY_KEY
        whole_files.replace({folder / _AUTHORITY: self.certificate_pem, key: self.key_pem}, secret=[key])

    @property
    def sha256(self) -> str:
        """What a join token pins: SHA-256 of the certificate (DER), lower-case hex."""
        return fingerprint(self.certificate_pem)

    def issue(self, csr_pem: bytes, kind: str, name: str, lifetime: datetime.timedelta = LIFETIME) -> bytes:
        """A certificate (PEM) for the key in `csr_pem`, with the identity KIND/NAME whatever the request says.

        Of the request's names only hosts and addresses outside ".eldric" are taken over, for HTTPS clients: between
        nodes only the names that are made here count. Raises InvalidRequest when the request is not sound.
        """
        if kind not in IDENTITY_KINDS:
            raise InvalidRequest(f"{kind!r} is no kind of node; kinds are {', '.join(IDENTITY_KINDS)}")
        check_name(name)
        request, public_key = read_csr(csr_pem)
        authority = _certificate(self.certificate_pem)
        key = serialization.load_pem_private_key(self.key_pem, password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise InvalidRequest("the cluster authority's key is not an elliptic curve key")
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{kind}/{name}"[:64])])
        builder = _builder(subject, authority.subject, public_key, lifetime)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_key_usage(sign_certificates=False), critical=True)
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        names = x509.SubjectAlternativeName(self._names(kind, name, request))
        builder = builder.add_extension(names, critical=False)
        return _pem(builder.sign(key, hashes.SHA256()))

    def issue_identity(self, kind: str, name: str, lifetime: datetime.timedelta = LIFETIME) -> Identity:
        """A key, made here, and its certificate: for nodes on the authority's own machine."""
        csr, key = make_csr(kind, name)
        return Identity(kind, name, self.certificate_pem, self.issue(csr, kind, name, lifetime), key)

    def _names(self, kind: str, name: str, request: x509.CertificateSigningRequest) -> list[x509.GeneralName]:
        uri = x509.UniformResourceIdentifier(f"spiffe://eldric/{self.cluster}/{kind}/{name}")
        if kind == "client":  # operators serve nothing
            return [uri]
        own = (x509.DNSName(server_name(kind)), x509.DNSName(server_name(kind, name)))
        return [uri, *own, *_hosts(request)]


def make_csr(kind: str, name: str) -> tuple[bytes, bytes]:
    """A certificate signing request with this machine's names and addresses, and its new key; both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{kind}/{name}"[:64])])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    builder = builder.add_extension(x509.SubjectAlternativeName(list(_own_hosts())), critical=False)
    request = builder.sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM), _key_pem(key)


def read_csr(csr_pem: bytes) -> tuple[x509.CertificateSigningRequest, ec.EllipticCurvePublicKey]:
    """A request and its key. Raises InvalidRequest when it is no request, or its signature does not fit its key."""
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        key, sound = request.public_key(), request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InvalidRequest("this is no sound certificate request") from None
    if not sound or not isinstance(key, ec.EllipticCurvePublicKey):
        raise InvalidRequest("the certificate request is not signed by an elliptic curve key of its own")
    return request, key


def fingerprint(certificate_pem: bytes) -> str:
    """SHA-256 of a certificate (DER), lower-case hex."""
    return hashlib.sha256(_certificate(certificate_pem).public_bytes(serialization.Encoding.DER)).hexdigest()


def subject_of(certificate: x509.Certificate) -> tuple[str, str, str]:
    """Cluster, kind and name of a node's certificate. Raises InvalidRequest when it names none."""
    with contextlib.suppress(x509.ExtensionNotFound):
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        for uri in names.get_values_for_type(x509.UniformResourceIdentifier):
            if subject := parse_spiffe(uri):
                return subject
    raise InvalidRequest("the certificate names no node of a cluster")


def parse_spiffe(uri: str) -> tuple[str, str, str] | None:
    """Cluster, kind and name of "spiffe://eldric/CLUSTER/KIND/NAME"; None for any other URI."""
    parts = uri.removeprefix("spiffe://eldric/").split("/")
    if not uri.startswith("spiffe://eldric/") or len(parts) != 3 or parts[1] not in IDENTITY_KINDS:
        return None
    return parts[0], parts[1], parts[2]


def _belong_together(certificate_pem: bytes, key_pem: bytes) -> bool:
    try:
        key = serialization.load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InvalidRequest("this is no sound private key") from None
    return _certificate(certificate_pem).public_key() == key.public_key()


def _drafted(path: Path, key_pem: bytes) -> bytes:
    """The certificate of a key whose process was killed when it had replaced the key, and not yet the certificate."""
    with contextlib.suppress(FileNotFoundError, InvalidRequest):
        certificate = whole_files.draft_of(path).read_bytes()
        if _belong_together(certificate, key_pem):
            return certificate
    raise InvalidRequest(
        f"the certificate and the key in {path.parent} do not belong together: let the node join again"
    )


def _certificate(pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise InvalidRequest("this is no sound certificate") from None


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, lifetime: datetime.timedelta
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    early = min(datetime.timedelta(minutes=5), lifetime / 10)  # clocks of a cluster differ a little
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - early)
        .not_valid_after(now + lifetime)
    )


def _key_usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _hosts(request: x509.CertificateSigningRequest) -> Iterator[x509.GeneralName]:
    with contextlib.suppress(x509.ExtensionNotFound, ValueError):
        names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        for name in list(names)[:64]:
            if isinstance(name, x509.IPAddress) or (
                isinstance(name, x509.DNSName) and _HOST.fullmatch(name.value.lower())
            ):
                yield name


def _own_hosts() -> Iterator[x509.GeneralName]:
    host = socket.gethostname()
    addresses = {"127.0.0.1", "::1"}
    with contextlib.suppress(OSError):
        addresses |= {str(info[4][0]).split("%")[0] for info in socket.getaddrinfo(host, None)}
    yield x509.DNSName("localhost")
    with contextlib.suppress(ValueError):
        yield x509.DNSName(host)
    for address in sorted(addresses):
        yield x509.IPAddress(ipaddress.ip_address(address))


@contextlib.contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """A path to read these bytes from: in memory where the system can, so that no full disk stops a handshake."""
    if sys.platform == "linux":
        with open(os.memfd_create("certificate"), "wb", buffering=0) as memory:
            memory.write(content)
            yield f"/proc/self/fd/{memory.fileno()}"
        return
    with tempfile.NamedTemporaryFile(suffix=".pem") as file:
        file.write(content)
        file.flush()
        yield file.name


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
