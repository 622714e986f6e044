"""Certificates, join tokens and what callers may do."""

import asyncio
import datetime
import errno
import hashlib
import os
import ssl
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from eldric.errors import InvalidRequest, NotFound, PermissionDenied, Unauthenticated
from eldric.security import Authority, Caller, Identity, JoinToken, authorise, caller_of, make_csr, new_token
from eldric.security.access import RULES, find_caller, rule_of
from eldric.security.certificates import parse_spiffe
from eldric.security.live import LiveIdentity
from eldric.v1 import registry_pb2
from tests.access import DECISIONS, NODES, STRANGERS, methods

MONTH_S = 30 * 24 * 3600


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create("demo")


def names_of(pem: bytes) -> x509.SubjectAlternativeName:
    certificate = x509.load_pem_x509_certificate(pem)
    return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def test_certificate_names_its_node(authority: Authority) -> None:
    identity = authority.issue_identity("worker", "w1")
    names = names_of(identity.certificate_pem)
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://eldric/demo/worker/w1"]
    assert {"worker.eldric", "w1.worker.eldric", "localhost"} <= set(names.get_values_for_type(x509.DNSName))
    addresses = {str(address) for address in names.get_values_for_type(x509.IPAddress)}
    assert {"127.0.0.1", "::1"} <= addresses
    assert identity.cluster == "demo"
    assert identity.node_id == "worker/w1"


def test_certificate_lasts_thirty_days_and_begins_a_little_early(authority: Authority) -> None:
    begin, end = authority.issue_identity("worker", "w1").validity()
    now = datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(minutes=4) < now - begin < datetime.timedelta(minutes=6)
    assert abs((end - now).total_seconds() - MONTH_S) < 60


def test_certificate_is_signed_by_the_authority_alone(authority: Authority) -> None:
    certificate = x509.load_pem_x509_certificate(authority.issue_identity("data", "d").certificate_pem)
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.certificate_pem))
    other = x509.load_pem_x509_certificate(Authority.create("demo").certificate_pem)
    with pytest.raises(InvalidSignature):
        certificate.verify_directly_issued_by(other)


def test_operator_certificate_serves_nothing(authority: Authority) -> None:
    names = names_of(authority.issue_identity("client", "admin").certificate_pem)
    assert names.get_values_for_type(x509.DNSName) == []
    assert names.get_values_for_type(x509.IPAddress) == []


def csr_for(*names: x509.GeneralName, key: Any = None) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "controller/boss")])
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    signed = builder.sign(key or ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM)


def test_request_cannot_claim_another_identity(authority: Authority) -> None:
    csr = csr_for(
        x509.UniformResourceIdentifier("spiffe://eldric/demo/controller/boss"),
        x509.DNSName("controller.eldric"),
        x509.DNSName("boss.CONTROLLER.eldric"),
        x509.DNSName("eldric"),
        x509.DNSName("*.example.org"),
        x509.DNSName("gpu7.example.org"),
    )
    names = names_of(authority.issue(csr, "worker", "w1"))
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://eldric/demo/worker/w1"]
    dns = names.get_values_for_type(x509.DNSName)
    assert dns == ["worker.eldric", "w1.worker.eldric", "gpu7.example.org"]


@pytest.mark.parametrize(
    "csr", [b"", b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"]
)
def test_damaged_request_is_refused(authority: Authority, csr: bytes) -> None:
    with pytest.raises(InvalidRequest, match="no sound certificate request"):
        authority.issue(csr, "worker", "w1")


def test_request_with_a_broken_signature_is_refused(authority: Authority) -> None:
    der = bytearray(x509.load_pem_x509_csr(make_csr("worker", "w1")[0]).public_bytes(serialization.Encoding.DER))
    at = der.index(b"worker/w1")
    der[at : at + 9] = b"worker/w2"
    pem = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(InvalidRequest, match="not signed"):
        authority.issue(pem, "worker", "w1")


def test_request_with_another_kind_of_key_is_refused(authority: Authority) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    with pytest.raises(InvalidRequest, match="elliptic curve"):
        authority.issue(csr_for(key=key), "worker", "w1")


@pytest.mark.parametrize("name", ["", ".", "-a", "a-", "a..b", "a/b", "a b", "ä", "a" * 64, "a\n"])
def test_odd_names_get_no_certificate(authority: Authority, name: str) -> None:
    with pytest.raises(InvalidRequest, match="no name for a node"):
        authority.issue(make_csr("worker", "w1")[0], "worker", name)


def test_unknown_kind_gets_no_certificate(authority: Authority) -> None:
    with pytest.raises(InvalidRequest, match="kinds are controller, worker"):
        authority.issue(make_csr("worker", "w1")[0], "boss", "w1")


def test_names_at_the_bounds_get_a_certificate(authority: Authority) -> None:
    for name in ("a", "7", "a" * 63, "gpu-7.rack.example"):
        assert authority.issue_identity("worker", name).cluster == "demo"


def test_identity_survives_its_folder_and_its_key_is_private(authority: Authority, tmp_path: Path) -> None:
    identity = authority.issue_identity("worker", "w1")
    identity.save(tmp_path / "node")
    assert Identity.load(tmp_path / "node") == identity
    assert stat.S_IMODE((tmp_path / "node" / "node-key.pem").stat().st_mode) == 0o600
    assert sorted(path.name for path in (tmp_path / "node").iterdir()) == ["ca.pem", "node-key.pem", "node.pem"]


def test_an_identity_that_does_not_fit_on_the_disk_leaves_the_one_before(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = authority.issue_identity("worker", "w1")
    before.save(tmp_path)
    synced: list[int] = []

    def full_for_the_third(fd: int) -> None:
        synced.append(fd)
        if len(synced) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_for_the_third)
    with pytest.raises(OSError, match=r"No space left on device: '.*node\.pem'"):
        authority.issue_identity("worker", "w1").save(tmp_path)
    assert Identity.load(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ca.pem", "node-key.pem", "node.pem"]


def test_an_identity_is_whole_when_its_process_was_killed_between_key_and_certificate(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed_at_the_certificate(draft: Path, path: Path) -> None:
        if path.name == "node.pem":
            raise Killed
        draft.rename(path)

    authority.issue_identity("worker", "w1").save(tmp_path)
    after = authority.issue_identity("worker", "w1")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", killed_at_the_certificate)
        after.save(tmp_path)
    assert Identity.load(tmp_path) == after
    (tmp_path / ".node.pem.part").unlink()
    with pytest.raises(InvalidRequest, match="do not belong together: let the node join again"):
        Identity.load(tmp_path)


async def test_a_clock_that_jumped_beyond_the_certificate_brings_few_tries_until_it_is_right_again(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def renew(identity: Identity) -> Identity:
        tried.append(now())
        raise Unauthenticated("certificate has expired")

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if sum(slept) > 3600:
            raise asyncio.CancelledError

    def now() -> datetime.datetime:
        return began + datetime.timedelta(seconds=sum(slept))

    tried: list[datetime.datetime] = []
    slept: list[float] = []
    identity = authority.issue_identity("worker", "w1")
    began = identity.validity()[1] + datetime.timedelta(days=400)
    monkeypatch.setattr("eldric.security.live._now", now)
    monkeypatch.setattr("eldric.security.live.asyncio.sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        await LiveIdentity(identity).keep_fresh(renew, lambda _: None)
    assert 60 < len(tried) < 130


async def test_a_certificate_that_could_not_be_kept_is_shown_and_soon_renewed_again(authority: Authority) -> None:
    def keep(identity: Identity) -> None:
        tried.append(identity)
        if len(tried) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        kept.set()

    async def renew(identity: Identity) -> Identity:
        lifetime = datetime.timedelta(seconds=1 if not tried else 3600)
        return authority.issue_identity("worker", "w1", lifetime)

    tried: list[Identity] = []
    kept = asyncio.Event()
    live = LiveIdentity(authority.issue_identity("worker", "w1", datetime.timedelta(seconds=1)))
    renewing = asyncio.create_task(live.keep_fresh(renew, keep))
    async with asyncio.timeout(10):
        while not tried:
            await asyncio.sleep(0.01)
        assert live.identity is tried[0]
        await kept.wait()
    assert live.identity is tried[1] and not renewing.done()
    renewing.cancel()


def test_authority_survives_its_folder(authority: Authority, tmp_path: Path) -> None:
    authority.save(tmp_path)
    again = Authority.load(tmp_path)
    assert again == authority
    assert stat.S_IMODE((tmp_path / "ca-key.pem").stat().st_mode) == 0o600


def test_empty_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="join the cluster first"):
        Identity.load(tmp_path)
    with pytest.raises(NotFound, match="no cluster authority"):
        Authority.load(tmp_path)


def test_damaged_certificate_is_an_error_of_its_own(authority: Authority, tmp_path: Path) -> None:
    authority.issue_identity("worker", "w1").save(tmp_path)
    (tmp_path / "node.pem").write_bytes(b"nonsense")
    with pytest.raises(InvalidRequest, match="no sound certificate"):
        Identity.load(tmp_path)


def handshake(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> None:
    """TLS in memory, both directions."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(10):
        for end in list(ends):
            try:
                end.do_handshake()
                ends.remove(end)
            except ssl.SSLWantReadError:
                continue
    assert not ends


def test_contexts_of_one_cluster_trust_each_other(authority: Authority) -> None:
    client = authority.issue_identity("client", "admin").client_context()
    server = authority.issue_identity("worker", "w1").server_context(ssl.CERT_REQUIRED)
    handshake(client, server, "w1.worker.eldric")


def test_contexts_refuse_another_node_and_another_cluster(authority: Authority) -> None:
    worker = authority.issue_identity("worker", "w1")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(worker.client_context(), worker.server_context(ssl.CERT_REQUIRED), "controller.eldric")
    stranger = Authority.create("demo").issue_identity("worker", "w1")
    with pytest.raises(ssl.SSLError):
        handshake(stranger.client_context(), worker.server_context(ssl.CERT_REQUIRED), "worker.eldric")


def test_token_survives_its_text(authority: Authority) -> None:
    token, record = new_token(authority.sha256, now=1000.0)
    text = token.format()
    assert JoinToken.parse(f" {text}\n") == token
    assert text.startswith(f"eldric.{authority.sha256}.")
    assert record.secret_sha256 == hashlib.sha256(token.secret).digest()
    assert record.expires_at == 4600.0


@pytest.mark.parametrize(
    "text",
    ["", "eldric", "eldric.a.b.c", "other.{d}.{i}.{s}", "eldric.{d}.{i}", "eldric.{d}.{i}.AAAA", "eldric.{d}.{i}.*{s}"],
)
def test_text_that_is_no_token_is_refused(authority: Authority, text: str) -> None:
    token, _ = new_token(authority.sha256, now=0.0)
    _, digest, identifier, secret = token.format().split(".")
    with pytest.raises(InvalidRequest, match="join token"):
        JoinToken.parse(text.format(d=digest, i=identifier, s=secret))


def test_token_is_used_up(authority: Authority) -> None:
    token, record = new_token(authority.sha256, now=0.0, uses=2)
    record = record.use(token, "worker", 1.0).use(token, "router", 2.0)
    with pytest.raises(Unauthenticated, match="used up"):
        record.use(token, "worker", 3.0)


def test_token_without_limit_is_never_used_up(authority: Authority) -> None:
    token, record = new_token(authority.sha256, now=0.0, uses=None)
    for _ in range(5):
        record = record.use(token, "worker", 1.0)
    assert record.uses_left is None


def test_token_expires(authority: Authority) -> None:
    token, record = new_token(authority.sha256, now=0.0, lifetime_s=10)
    record.use(token, "worker", 9.9)
    with pytest.raises(Unauthenticated, match="expired"):
        record.use(token, "worker", 10.0)


def test_token_with_another_secret_is_unknown(authority: Authority) -> None:
    _, record = new_token(authority.sha256, now=0.0)
    forged = JoinToken(authority.sha256, record.id, b"x" * 32)
    with pytest.raises(Unauthenticated, match="unknown"):
        record.use(forged, "worker", 1.0)


def test_token_admits_its_kind(authority: Authority) -> None:
    token, record = new_token(authority.sha256, now=0.0, kind="worker")
    record.use(token, "worker", 1.0)
    with pytest.raises(PermissionDenied, match="admits a worker, not a data"):
        record.use(token, "data", 1.0)


def test_token_of_any_kind_admits_no_operator_and_no_controller(authority: Authority) -> None:
    token, record = new_token(authority.sha256, now=0.0)
    record.use(token, "router", 1.0)
    for kind in ("client", "controller"):
        with pytest.raises(PermissionDenied, match=f"admits no {kind}"):
            record.use(token, kind, 1.0)
    token, record = new_token(authority.sha256, now=0.0, kind="client")
    record.use(token, "client", 1.0)


@pytest.mark.parametrize(("lifetime_s", "uses"), [(0, 1), (-1, 1), (MONTH_S + 1, 1), (60, 0), (60, -2)])
def test_token_bounds(authority: Authority, lifetime_s: float, uses: int) -> None:
    with pytest.raises(InvalidRequest):
        new_token(authority.sha256, now=0.0, lifetime_s=lifetime_s, uses=uses)


METHODS = [f"/eldric.v1.{method}" for method in methods()]


def test_every_method_has_a_decision() -> None:
    assert set(DECISIONS) == set(methods())


@pytest.mark.parametrize("kind", sorted(NODES))
@pytest.mark.parametrize("method", methods())
def test_nodes_may_call_what_was_decided(method: str, kind: str) -> None:
    if kind in DECISIONS[method]:
        authorise(f"/eldric.v1.{method}", Caller(kind, "x"))
        return
    with pytest.raises(PermissionDenied, match=f"{kind}/x may not call"):
        authorise(f"/eldric.v1.{method}", Caller(kind, "x"))


@pytest.mark.parametrize("method", ["/eldric.v1.Unheard/Of", "/other.Service/Call", "/grpc.health.v2.Health/Check", ""])
def test_what_nobody_decided_is_for_operators(method: str) -> None:
    for kind in NODES:
        with pytest.raises(PermissionDenied, match=f"{kind}/x may not call"):
            authorise(method, Caller(kind, "x"))
    authorise(method, Caller("client", "admin"))


@pytest.mark.parametrize("method", METHODS)
def test_operators_may_call_everything_and_strangers_only_join(method: str) -> None:
    authorise(method, Caller("client", "admin"))
    if method.removeprefix("/eldric.v1.") in STRANGERS:
        authorise(method, None)
    else:
        with pytest.raises(Unauthenticated):
            authorise(method, None)


def test_every_rule_is_about_a_method_that_exists() -> None:
    known = set(methods())
    known |= {name.partition("/")[0] + "/*" for name in known}
    assert set(RULES) <= known


def test_nodes_speak_for_themselves() -> None:
    subject = rule_of("/eldric.v1.Registry/Register").subject
    assert subject is not None
    request = registry_pb2.RegisterRequest(node=registry_pb2.Node(id="worker/w2"))
    with pytest.raises(PermissionDenied, match="worker/w1 may not speak for worker/w2"):
        Caller("worker", "w1").must_be(subject(request))
    Caller("worker", "w2").must_be(subject(request))
    Caller("client", "admin").must_be(subject(request))


def grpc_context(*names: bytes) -> Any:
    return SimpleNamespace(auth_context=lambda: {"x509_subject_alternative_name": names} if names else {})


def test_caller_is_who_the_certificate_names() -> None:
    context = grpc_context(b"localhost", b"spiffe://eldric/demo/router/r1", b"router.eldric")
    assert caller_of(context) == Caller("router", "r1")


@pytest.mark.parametrize("names", [(), (b"localhost",), (b"\xff\xfe",), (b"spiffe://eldric/demo/boss/b",)])
def test_certificate_that_names_no_node_is_a_stranger(names: tuple[bytes, ...]) -> None:
    assert find_caller(grpc_context(*names)) is None
    with pytest.raises(Unauthenticated):
        caller_of(grpc_context(*names))


@pytest.mark.parametrize(
    "uri",
    [
        "spiffe://other/demo/worker/w",
        "spiffe://eldric/worker/w",
        "spiffe://eldric/demo/worker/w/x",
        "https://eldric/d/worker/w",
    ],
)
def test_other_uris_name_no_node(uri: str) -> None:
    assert parse_spiffe(uri) is None
