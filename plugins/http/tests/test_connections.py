"""Who is connected to, by which way, and what is shown there: the guard, TLS, proxies, credentials."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Authority, Page, Program, Proxy, Site


@pytest.fixture
def target(tmp_path: Path) -> Path:
    directory = tmp_path / "build"
    directory.mkdir()
    return directory


@pytest.fixture
def secure_site(authority: Authority) -> Iterator[Site]:
    made = Site(tls=authority.server)
    yield made
    made.close()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    made = Proxy("Basic bWU6cDRzc3dvcmQ=")  # me:p4ssword
    yield made
    made.close()


PROXY_ENV = {"HTTP_PROXY_USER": "me", "HTTP_PROXY_PASSWORD": "p4ssword"}
NOTHING_ALLOWED = {"OUTRIDER_NETWORK_ALLOW": ""}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "[::ffff:127.0.0.1]"])
def test_this_machine_is_not_reached_unless_the_class_allows_it(
    site: Site, program: Program, target: Path, host: str
) -> None:
    site.put("/k", b"secret of the node")
    url = f"http://{host}:{site.port}/k"
    ended = program.run("download", {"url": url, "to": f"{target}/k"}, NOTHING_ALLOWED)
    assert (ended.code, ended.cause) == (1, "address_refused")
    assert "network class 'egress' does not allow it" in ended.error
    assert site.requests == []
    assert list(target.iterdir()) == []


def test_upload_is_guarded_as_well(site: Site, program: Program, target: Path) -> None:
    (target / "k").write_bytes(b"x")
    for method in ("PUT", "POST"):
        params = {"url": f"{site.url}/k", "from": f"{target}/k", "method": method}
        ended = program.run("upload", params, NOTHING_ALLOWED)
        assert (ended.code, ended.cause) == (1, "address_refused")
    assert site.requests == []


@pytest.mark.parametrize("near", ["127.0.0.2", "169.254.169.254", "10.0.0.1", "[fd00:ec2::254]"])
def test_redirect_is_judged_again(site: Site, program: Program, target: Path, near: str) -> None:
    site.pages["/k"] = Page(status=302, headers={"Location": f"http://{near}:{site.port}/latest/meta-data"})
    params = {"url": f"{site.url}/k", "to": f"{target}/k"}
    ended = program.run("download", params, {"OUTRIDER_NETWORK_ALLOW": "127.0.0.1/32"})
    assert (ended.code, ended.cause) == (1, "address_refused")
    assert near.strip("[]") in ended.error


def test_authority_of_ones_own_is_trusted_only_if_it_is_given(
    secure_site: Site, program: Program, target: Path, authority: Authority
) -> None:
    digest = secure_site.put("/k", b"x" * 100_000)
    params = {"url": f"{secure_site.url}/k", "to": f"{target}/k", "sha256": digest}
    ended = program.run("download", params)
    assert (ended.code, ended.cause) == (1, "tls")
    assert "HTTP_CA" in ended.error
    assert program.run("download", params, {"HTTP_CA": authority.pem}).code == 0
    (target / "ca.pem").write_text(authority.pem)
    assert program.run("download", params | {"ca": f"{target}/ca.pem"}).code == 0
    elsewhere = params | {"url": f"https://localhost:{secure_site.port}/k"}
    ended = program.run("download", elsewhere, {"HTTP_CA": authority.pem})
    assert (ended.code, ended.cause) == (1, "tls"), "the certificate is for another name"
    ended = program.run("download", params, {"HTTP_CA": "no certificate"})
    assert (ended.code, ended.cause) == (1, "bad_ca")
    assert "no certificate" not in ended.error


def test_large_content_over_tls(secure_site: Site, program: Program, target: Path, authority: Authority) -> None:
    body = bytes(range(256)) * 20_000
    digest = secure_site.put("/k", body, faults=["cut", "cut"])
    params = {"url": f"{secure_site.url}/k", "to": f"{target}/k", "sha256": digest}
    ended = program.run("download", params, {"HTTP_CA": authority.pem})
    assert ended.code == 0, ended.text
    assert [request.headers.get("range", "")[:7] for request in secure_site.requests] == ["", "bytes=2", "bytes=3"]
    secure_site.pages["/r"] = Page(status=201)
    params = {"url": f"{secure_site.url}/r", "from": f"{target}/k"}
    assert program.run("upload", params, {"HTTP_CA": authority.pem}).code == 0
    assert secure_site.uploads["/r"] == body


@pytest.mark.parametrize("secure", [False, True])
def test_proxy_is_used_if_the_step_says_so(
    site: Site, secure_site: Site, proxy: Proxy, program: Program, target: Path, authority: Authority, secure: bool
) -> None:
    far = secure_site if secure else site
    digest = far.put("/k", b"x" * 100_000)
    env = {"HTTP_CA": authority.pem, "HTTP_TOKEN": "t0ken-0123456789"}
    params = {"url": f"{far.url}/k", "to": f"{target}/k", "sha256": digest, "proxy": proxy.url}
    ended = program.run("download", params, env | PROXY_ENV)
    assert ended.code == 0, ended.text
    assert proxy.asked == [f"CONNECT 127.0.0.1:{far.port}" if secure else f"GET {far.url}/k"]
    assert all("proxy-authorization" not in request.headers for request in far.requests)
    ended = program.run("download", params, env)
    assert (ended.code, ended.cause) == (1, "proxy")
    assert "HTTP_PROXY_USER" in ended.error
    assert "p4ssword" not in ended.text + ended.error


def test_proxies_of_the_environment_are_not_used(site: Site, proxy: Proxy, program: Program, target: Path) -> None:
    site.put("/k", b"x")
    env = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"), proxy.url)
    assert program.run("download", {"url": f"{site.url}/k", "to": f"{target}/k"}, env).code == 0
    assert proxy.asked == []


def test_proxy_is_no_way_around_the_guard(site: Site, proxy: Proxy, program: Program, target: Path) -> None:
    params = {"url": f"{site.url}/k", "to": f"{target}/k", "proxy": proxy.url}
    ended = program.run("download", params, PROXY_ENV | NOTHING_ALLOWED)
    assert (ended.code, ended.cause) == (1, "address_refused"), "the proxy itself is on the node's network"
    for url in ("http://169.254.169.254/latest", "http://0xa9fea9fe/latest", "http://[::ffff:10.0.0.1]/x"):
        env = PROXY_ENV | {"OUTRIDER_NETWORK_ALLOW": "127.0.0.1/32"}
        ended = program.run("download", params | {"url": url}, env)
        assert (ended.code, ended.cause) == (1, "address_refused"), url
    assert proxy.asked == []


def test_header_of_ones_own_carries_the_credential(
    site: Site, other_site: Site, program: Program, target: Path
) -> None:
    site.pages["/k"] = Page(status=302, headers={"Location": f"{other_site.url}/there"})
    other_site.put("/there", b"x")
    params = {"url": f"{site.url}/k", "to": f"{target}/k", "auth_header": "X-Api-Key"}
    ended = program.run("download", params, {"HTTP_AUTH_VALUE": "k3y-0123456789"})
    assert ended.code == 0, ended.text
    assert site.requests[0].headers["x-api-key"] == "k3y-0123456789"
    assert "x-api-key" not in other_site.requests[0].headers
    assert "k3y" not in ended.text
    for more, env in (
        (params, {}),
        ({**params, "auth_header": None}, {"HTTP_AUTH_VALUE": "k3y-0123456789"}),
        (params, {"HTTP_AUTH_VALUE": "k3y-0123456789", "HTTP_TOKEN": "t0ken-0123456789"}),
        (params, {"HTTP_AUTH_VALUE": "k3y\nHost: evil"}),
    ):
        ended = program.run("download", more, env)
        assert (ended.code, ended.cause) == (1, "bad_credentials"), (more, env)
        assert "k3y" not in ended.error


def test_something_that_is_not_http_is_said(program: Program, target: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as near:
                near.recv(1000)
                near.sendall(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/k"
        ended = program.run("download", {"url": url, "to": f"{target}/k"})
        thread.join()
    assert (ended.code, ended.cause) == (1, "invalid_answer")


def test_early_refusal_of_an_upload_is_what_is_said(program: Program, target: Path) -> None:
    """A server that answers before it has read everything, and hangs up."""
    (target / "k").write_bytes(bytes(50_000_000))
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as near:
                near.recv(1000)
                near.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                near.shutdown(socket.SHUT_WR)
                near.settimeout(1)
                near.recv(1000)

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/k"
        ended = program.run("upload", {"url": url, "from": f"{target}/k"})
        thread.join()
    assert (ended.code, ended.cause) == (1, "refused"), ended.text
    assert "413" in ended.error
