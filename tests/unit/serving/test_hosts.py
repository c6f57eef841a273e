"""By which names a server may be asked: those that no page of another site can have."""

import socket
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flow_parts import refused
from serving_parts import Served, served
from tunesmith.errors import ConfigError
from tunesmith.serving.faults import Refusal
from tunesmith.serving.hosts import Hosts, allowed_name, hosts_of
from tunesmith.serving.security import Keys

TEXT = {"model": "tiny", "prompt": "red", "max_tokens": 2}
LOCAL = Hosts()
labels = st.from_regex(r"[a-z]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
names = st.lists(labels, min_size=2, max_size=4).map(".".join).filter(lambda name: "localhost" not in name)


def is_taken(hosts: Hosts, host: str | None, method: str = "GET", **headers: str) -> bool:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    status = None
    try:
        hosts.check(method, given if host is None else {"host": host, **given})
    except Refusal as refusal:
        status = refusal.status
    assert status in (None, 403)
    return status is None


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8000", "LocalHost:80", "localhost.", "app.localhost:8000", "127.0.0.1", "127.9.9.9:1",
     "[::1]:8000", "192.168.1.7:8000", "8.8.8.8", "[fe80::1]", "0.0.0.0:8000", None],
)  # fmt: skip
def test_localhost_and_addresses_need_no_permission(host: str | None) -> None:
    assert is_taken(LOCAL, host)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "notlocalhost", "",
     "a b", "me@localhost", "localhost/evil", "[::1", "localhost:x", "xn--e1afmkfd", "1.2.3"],
)  # fmt: skip
def test_every_other_name_is_refused(host: str) -> None:
    assert not is_taken(LOCAL, host)
    assert not is_taken(hosts_of("0.0.0.0", [], has_key=False), host)


@settings(deadline=None)
@given(names, labels, st.integers(0, 65_535))
def test_an_allowed_name_is_taken_and_no_other(name: str, below: str, port: int) -> None:
    assert not is_taken(LOCAL, name)
    alone, wild = hosts_of("127.0.0.1", [name], has_key=False), hosts_of("::1", [f"*.{name}"], has_key=False)
    for written in (name, name.upper(), f"{name}:{port}", f"{name}."):
        assert is_taken(alone, written)
        assert not is_taken(wild, written)
        assert is_taken(wild, f"{below}.{written}")
        assert is_taken(wild, f"{below}.{below}.{written}")
        assert not is_taken(alone, f"{below}.{written}")
        assert not is_taken(wild, f"{below}{written}")


def test_the_names_of_the_machine_and_what_it_listens_on_are_its_own() -> None:
    hosts = hosts_of("Models.Lan", [], has_key=False)
    assert is_taken(hosts, "models.lan:8000")
    assert is_taken(hosts, socket.gethostname())


@pytest.mark.parametrize(
    "hosts", [hosts_of("0.0.0.0", ["*"], has_key=False), hosts_of("::", [], has_key=True)]
)
def test_any_name_will_do_where_the_operator_says_so_or_a_key_is_needed(hosts: Hosts) -> None:
    assert is_taken(hosts, "evil.example")
    assert is_taken(hosts, "evil.example", "POST", origin="https://other.example")


@pytest.mark.parametrize(
    ("host", "origin", "site", "taken"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000", None, True),  # the page itself
        ("192.168.1.7:8000", "http://192.168.1.7:8000", None, True),
        ("127.0.0.1:8000", "http://localhost:5173", None, True),  # behind a proxy on this machine
        ("127.0.0.1:8000", "https://models.example.org", None, True),  # allowed
        ("127.0.0.1:8000", "https://[::1]:8443", None, True),
        ("127.0.0.1:8000", "https://evil.example", None, False),
        ("127.0.0.1:8000", "https://evil.example", "cross-site", False),
        ("127.0.0.1:8000", "http://6.6.6.6", None, False),  # an address, but another machine's
        ("127.0.0.1:8000", "http://localhost.evil.example", None, False),
        ("127.0.0.1:8000", "null", None, False),
        ("127.0.0.1:8000", "", None, False),
        (
            "127.0.0.1:8000",
            "https://any.example",
            "same-origin",
            True,
        ),  # a proxy that puts its own name into Host
        ("evil.example", "http://evil.example", "same-origin", False),
    ],
)
def test_a_post_of_a_page_needs_a_page_that_is_known(
    host: str, origin: str, site: str | None, taken: bool
) -> None:
    hosts = hosts_of("127.0.0.1", ["models.example.org"], has_key=False)
    more = {"sec_fetch_site": site} if site else {}
    assert is_taken(hosts, host, "POST", origin=origin, **more) is taken


def test_what_reads_only_needs_no_known_page() -> None:
    # Without permission of ours a browser shows another site's page nothing of the answer.
    assert is_taken(LOCAL, "localhost", "GET", origin="https://evil.example")


@pytest.mark.parametrize(
    ("written", "name"),
    [("Models.Example.org", "models.example.org"), ("*.lan", "*.lan"), ("gpu_box", "gpu_box"), ("*", "*"),
     ("bücher.example", "xn--bcher-kva.example"), ("[::1]", "::1"), ("10.0.0.5", "10.0.0.5"), ("a.", "a")],
)  # fmt: skip
def test_allowed_names_are_taken_as_browsers_send_them(written: str, name: str) -> None:
    assert allowed_name(written) == name


@pytest.mark.parametrize(
    "written", ["", "a b", "a:80", "http://a", "a/b", "*a", "a.*", "-a", "a..b", "*.", "ä" * 64]
)
def test_what_is_no_name_is_refused_with_its_option(written: str) -> None:
    with pytest.raises(ConfigError) as caught:
        hosts_of("127.0.0.1", ["good.example", written], has_key=False)
    told = f"--allowed-host: {written!r} is no name of a machine; give a name as in models.example.org, "
    assert str(caught.value) == f"{told}without a port"


def test_the_command_refuses_it_too(base_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--ray"]):
        arguments = ["serve", "--base", str(base_folder), "--port", "0", "--allowed-host", "a b", *more]
        assert refused(capfd, arguments).startswith("Error: --allowed-host: 'a b' is no name")
    arguments = ["serve", "--base", str(base_folder), "--engine", "vllm", "--allowed-host", "a"]
    assert refused(capfd, arguments).startswith("Error: --engine vllm: is vLLM's own server, which takes any")


# Of a server


def test_a_page_that_rebinds_its_name_reads_and_does_nothing(server: Served) -> None:
    said = "This server is not known as 'evil.example:80'; --allowed-host NAME at its start allows a name"
    with server.client(headers={"Host": "evil.example:80"}) as http:
        replies = [http.get(path) for path in ("/", "/page.js", "/v1/models", "/v1/models/tiny", "/metrics")]
        replies += [http.post(f"/v1/{route}", json=TEXT) for route in ("completions", "chat/completions")]
        for reply in replies:
            assert reply.status_code == 403
            assert reply.json()["error"] == {
                "message": said, "type": "permission_error", "param": None, "code": "host_not_allowed",
            }  # fmt: skip
            assert reply.headers["x-request-id"]
        assert http.get("/health").json() == {"status": "ok"}  # for whoever looks after it, by any name
    samples = server.client().get("/metrics").text
    assert f'tunesmith:http_errors_total{{status="403"}} {len(replies)}' in samples


@pytest.mark.parametrize("host", ["[::1", "a b", "\xff", "//"])
def test_a_host_that_is_none_is_refused_like_a_wrong_one(server: Served, host: str) -> None:
    headers = [(b"Host", host.encode("latin-1"))]
    with server.client() as http:
        assert http.get("/v1/models", headers=headers).status_code in (400, 403)
        assert http.get("/nothing", headers=headers).status_code in (400, 404)
        assert http.get("/health", headers=headers).status_code in (200, 400)


def test_a_page_of_another_site_sends_in_vain(server: Served) -> None:
    with server.client(headers={"Origin": "https://evil.example"}) as http:
        reply = http.post("/v1/completions", json=TEXT)
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "origin_not_allowed")
        assert "https://evil.example" in reply.json()["error"]["message"]
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        allowed = http.options("/v1/completions", headers=asked)
        assert "access-control-allow-origin" not in allowed.headers
    with server.client(headers={"Origin": server.url}) as http:
        assert http.post("/v1/completions", json=TEXT).status_code == 200


def test_the_official_client_is_told_why(server: Served) -> None:
    with (
        openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", default_headers={"Host": "gpu.lan"}, max_retries=0
        ) as client,
        pytest.raises(openai.PermissionDeniedError, match="--allowed-host NAME"),
    ):
        client.completions.create(model="tiny", prompt="red", max_tokens=1)


@pytest.fixture(scope="module")
def behind_a_proxy(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    hosts = hosts_of("127.0.0.1", ["models.example.org"], has_key=False)
    with served(base_folder, tmp_path_factory.mktemp("proxied"), hosts=hosts) as running:
        yield running


def test_a_proxy_by_a_name_that_is_allowed(behind_a_proxy: Served) -> None:
    headers = {"Host": "models.example.org", "Origin": "https://models.example.org"}
    with behind_a_proxy.client(headers=headers) as http:
        assert http.post("/v1/completions", json=TEXT).status_code == 200
        assert http.get("/").status_code == 200


def test_a_proxy_by_any_name_where_there_is_a_key(base_folder: Path, tmp_path: Path) -> None:
    hosts = hosts_of("127.0.0.1", [], has_key=True)
    with served(base_folder, tmp_path, keys=Keys(api="secret"), hosts=hosts) as running:
        key = {"Authorization": "Bearer secret", "Host": "any.example", "Origin": "https://any.example"}
        assert running.client(headers=key).post("/v1/completions", json=TEXT).status_code == 200
        without = running.client(headers={"Host": "any.example"})
        assert without.get("/v1/models").status_code == 401
