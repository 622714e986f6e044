"""Where servers send a data worker, and what they answer it."""

import gzip

import httpx2
import pytest

from eldric.data.http_client import get_json, redirect_check
from eldric.errors import DataLoss, Unavailable


@pytest.mark.parametrize(
    "url",
    [
        "http://cdn.example/x",
        "https://127.0.0.1/x",
        "https://127.1/x",
        "https://localhost:8443/x",
        "https://[::1]/x",
        "https://[::ffff:127.0.0.1]/x",
        "https://169.254.169.254/latest/meta-data",
        "https://[fe80::1]/x",
        "https://0.0.0.0/x",
        "file:///etc/passwd",
    ],
)
def test_a_server_does_not_send_us_into_our_machine_or_away_from_https(url: str) -> None:
    check = redirect_check("https://192.0.2.1", "the hub")
    with pytest.raises(DataLoss, match="the hub sends us to"):
        check(httpx2.Request("GET", url))


def test_a_server_may_send_us_to_other_hosts() -> None:
    check = redirect_check("https://192.0.2.1", "the hub")
    for url in ("https://192.0.2.1/x", "https://198.51.100.7/x", "https://10.0.0.7/x"):
        check(httpx2.Request("GET", url))
    near = redirect_check("http://127.0.0.1:8080", "the hub of this machine")
    for url in ("http://localhost:8081/x", "https://198.51.100.7/x"):
        near(httpx2.Request("GET", url))


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://192.0.2.1/x"])
def test_other_schemes_are_not_followed(url: str) -> None:
    answer = httpx2.MockTransport(lambda request: httpx2.Response(302, headers={"location": url}))
    mounts = {"http://": answer}
    with httpx2.Client(mounts=mounts, follow_redirects=True, trust_env=False) as client, pytest.raises(Unavailable):
        get_json(client, "http://192.0.2.1/x", "the hub", {})


@pytest.mark.parametrize("status", [200, 500])
def test_a_packed_answer_is_not_unpacked(status: int) -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        packed = gzip.compress(b'{"error": "' + b"x" * 100 + b'"}')
        return httpx2.Response(status, headers={"content-encoding": "gzip"}, stream=httpx2.ByteStream(packed))

    client = httpx2.Client(transport=httpx2.MockTransport(answer))
    with client, pytest.raises((DataLoss, Unavailable)) as caught:
        get_json(client, "http://192.0.2.1/x", "the hub", {})
    assert "xxx" not in str(caught.value)
