"""Attacks on a server that others can reach, and on one that only this machine can."""

import base64
import contextlib
import http.client
import os
import re
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, expect

from finetune.serving.page import FILES, TYPES
from tests.end_to_end import command
from tests.end_to_end.serving import Server, serving

ROUTES = [
    "/",
    "/healthz",
    "/readyz",
    "/metrics",
    "/v1/models",
    "/v1/models/base",
    "/openapi.json",
    "/chat",
    "/stream_chat",
    "/runs",
    "/machine",
    "/static/common.js",
    "/api/runs",
    "/api/runs/pirate_chat/curves",
    "/api/machine",
]
ROUTES += ["/v1/chat/completions", "/v1/completions", "/v1/images/generations", "/nowhere"]
CHAT = {"prompt": "Hello", "max_new_tokens": 2}
PAGE = "http://localhost:3000"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("safety") / "work"


@pytest.fixture(scope="module")
def own(work: Path) -> Iterator[Server]:
    """On loopback, without a key."""
    (work / "a").mkdir(parents=True)
    with serving(
        work / "a", "serve.max_body_kib=64", f"serve.origins=[{PAGE}]", "serve.names=[workstation.example]"
    ) as found:
        yield found


@pytest.fixture(scope="module")
def public(work: Path) -> Iterator[Server]:
    """On every address, with a key."""
    (work / "b").mkdir(parents=True)
    with serving(work / "b", "serve.host=0.0.0.0", f"serve.origins=[{PAGE}]") as found:
        found.key = key_of(found)
        found.url = found.url.replace("0.0.0.0", "127.0.0.1")
        yield found


def key_of(server: Server) -> str:
    found = re.search(r"^serve: the key, shown this once: (\S+)$", server.said, re.MULTILINE)
    assert found, server.said
    return found[1]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Bearer \xff",
        "Basic !!!",
        "Basic " + base64.b64encode(b"x:y").decode(),
    ],
)
def test_without_the_key_no_route_says_anything(public: Server, path: str, given: str | None) -> None:
    key, public.key = public.key, ""
    try:
        headers = {} if given is None else {"Authorization": given}
        status, answer, found = public.ask(path, **headers)
    finally:
        public.key = key
    assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
    assert answer["error"]["type"] == "authentication_error"
    assert found["www-authenticate"] == 'Basic realm="finetune"'


def test_with_the_key_they_answer(public: Server) -> None:
    assert public.ask("/chat", CHAT)[0] == 200
    basic = base64.b64encode(f"me:{public.key}".encode()).decode()
    key, public.key = public.key, ""
    assert public.ask("/healthz", Authorization=f"Basic {basic}")[0] == 200, "as a browser asks for it"
    assert public.ask("/healthz", Authorization=f"bearer {key}")[0] == 200
    assert public.ask("/healthz", Authorization=f"Bearer {key[:-1]}")[0] == 401
    public.key = key


@pytest.mark.exhaustive
def test_the_key_itself_is_kept_nowhere_and_stays_the_same(public: Server, work: Path) -> None:
    files = [path for path in (work / "b").rglob("*") if path.is_file()]
    assert [path.name for path in files] == ["serve_key.sha256"]
    assert public.key not in files[0].read_text()
    assert len(public.key) >= 43, "256 bits"
    assert stat.S_IMODE(files[0].stat().st_mode) == 0o600
    assert "Bearer KEY" in public.said, "examples don't repeat it"
    with serving(work / "b", "serve.host=0.0.0.0") as again:
        assert (
            "serve: the key is that of before; for a new one delete outputs/pirate_chat/serve_key.sha256" in again.said
        )
        again.url = again.url.replace("0.0.0.0", "127.0.0.1")
        again.key = public.key
        assert again.ask("/healthz")[0] == 200
        again.key = "x"
        assert again.ask("/healthz")[0] == 401


def test_a_name_that_was_made_to_point_here_is_refused(own: Server) -> None:
    """DNS rebinding: the page's own name resolves to this machine, and the browser thinks that we are the page."""
    port = urlsplit(own.url).port
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "127.0.0.1@evil.example",
        "",
    ):
        status, answer, _ = own.ask("/chat", CHAT, Host=host)
        assert (status, answer["error"]["code"]) == (403, "host_not_allowed"), host
    for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", "192.168.0.7:80", f"WORKSTATION.example:{port}"):
        assert own.ask("/healthz", Host=host)[0] == 200, host


def test_pages_of_other_sites_are_refused(own: Server) -> None:
    """Cross-site posts, with and without an Origin, and the few content types that need no permission."""
    for origin in (
        "http://evil.example",
        "null",
        "http://localhost:1",
        own.url.replace("http", "https") + ".evil.example",
    ):
        status, answer, found = own.ask("/chat", CHAT, Origin=origin)
        assert (status, answer["error"]["code"]) == (403, "origin_not_allowed"), origin
        assert "access-control-allow-origin" not in found
    for site in ("cross-site", "same-site"):
        assert own.ask("/stream_chat?prompt=x", Sec_Fetch_Site=site)[0] == 403
    assert own.ask("/healthz", Origin=own.url)[0] == 200
    assert own.ask("/healthz", Sec_Fetch_Site="same-origin")[0] == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert own.ask("/chat", CHAT, Content_Type=kind)[0] == 400


def test_a_page_that_was_allowed_may_ask(own: Server, public: Server) -> None:
    for server in (own, public):
        status, _, found = server.ask("/chat", CHAT, Origin=PAGE)
        assert (status, found["access-control-allow-origin"]) == (200, PAGE)
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
        for origin, expected in ((PAGE, 200), ("http://evil.example", 403)):
            connection.request("OPTIONS", "/chat", headers=asked | {"Origin": origin})
            answer = connection.getresponse()
            answer.read()
            assert answer.status == expected
        connection.request("OPTIONS", "/chat", headers={"Origin": PAGE})
        assert connection.getresponse().status == (401 if server.key else 405)
        connection.close()


def send(server: Server, *chunks: bytes, path: str = "/chat", **headers: str) -> tuple[int, bytes]:
    """A POST whose length isn't known."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    given = {"Content-Type": "application/json"} | headers
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before all was sent
        connection.request("POST", path, iter(chunks), given, encode_chunked=True)
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def test_a_request_that_is_too_large_is_refused(own: Server) -> None:
    status, answer, _ = own.ask("/chat", {"prompt": "x" * 70_000})
    assert (status, answer["error"]["code"]) == (413, "request_too_large")
    assert "a request may have 65,536 bytes (serve.max_body_kib)" in answer["error"]["message"]
    status, text = send(own, *[b"x" * 10_000] * 8, Transfer_Encoding="chunked")
    assert status == 413
    assert b"request_too_large" in text
    assert send(own, b"", **{"Content-Length": "-5"})[0] == 400


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/v1/models/..%2f..%2fetc%2fpasswd",
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/api/runs/../curves",
        "/api/runs/%2e%2e/captions",
        "/api/runs/..%2f..%2fetc/samples",
    ],
)
def test_no_path_of_a_request_reaches_a_file(own: Server, path: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(own.url).netloc)
    connection.putrequest("GET", path)
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 404
    said = answer.read()
    assert b"root:" not in said
    assert b"import " not in said
    connection.close()


def test_a_clients_words_in_a_header_stay_in_it(own: Server) -> None:
    status, _, found = own.ask("/chat", CHAT | {"x\x00\r\nSet-Cookie: a=b\x7f é": 1, "y" * 5000: 1})
    assert status == 200
    assert found["x-finetune-warning"].startswith("ignored: x   Set-Cookie: a=b  ?, yyy")
    assert "set-cookie" not in found


def test_answers_say_that_they_are_no_pages(own: Server) -> None:
    for path, body in (("/chat", CHAT), ("/nowhere", None), ("/v1/models", None)):
        _, _, found = own.ask(path, body)
        assert found["x-content-type-options"] == "nosniff"
        assert found["x-frame-options"] == "DENY"
        assert found["content-security-policy"].startswith("default-src 'none'")
        assert found["cache-control"] == "no-store"
        assert "server" not in found


@pytest.mark.parametrize(("path", "script"), [("/", "chat"), ("/runs", "runs"), ("/machine", "machine")])
def test_a_page_runs_scripts_of_this_package_alone(own: Server, path: str, script: str) -> None:
    status, text, found = own.ask(path, Sec_Fetch_Site="cross-site")
    assert status == 200, "a link may lead to it"
    rules = dict(rule.split(" ", 1) for rule in found["content-security-policy"].split("; "))
    assert rules["default-src"] == rules["frame-ancestors"] == rules["form-action"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert re.findall(r"<script(.*?)</script>", text) == [f' type="module" src="static/{script}.js">']
    assert not re.search(r"https?:| on\w+=| style=", text)


def test_scripts_take_no_text_as_markup(own: Server) -> None:
    """And a page of another site can't load them, nor what they ask for."""
    files = [file.name for file in FILES.iterdir() if file.suffix in TYPES]
    assert {"chat.js", "images.js", "runs.js", "machine.js", "style.css"} <= set(files)
    for name in files:
        status, text, found = own.ask(f"/static/{name}", Sec_Fetch_Site="same-origin")
        assert (status, found["content-type"]) == (200, TYPES[Path(name).suffix])
        assert not re.search(
            r"https?:(?!//www\.w3\.org/2000/svg)|innerHTML|insertAdjacent|document\.write|eval\(", text
        )
    for path in ("/static/chat.js", "/api/runs", "/api/machine", "/api/runs/pirate_chat/samples"):
        assert own.ask(path, Sec_Fetch_Site="cross-site")[0] == 403


def test_a_browser_that_has_the_key_runs_the_page(public: Server, browser: Browser) -> None:
    page = browser.new_page(http_credentials={"username": "me", "password": public.key})
    page.goto(public.url)
    expect(page.get_by_label("Model").locator("option")).to_have_text(["base"])


def test_nonsense_does_not_stop_it(own: Server) -> None:
    """Many broken requests at once, over raw connections; afterwards it answers as before."""
    address = urlsplit(own.url)
    before = own.ask("/chat", CHAT | {"temperature": 0})[1]["response"]
    texts = [
        b"\x00" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\nContent-Type: application/json\r\n\r\n{",
        b"POST /chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /stream_chat?prompt=%ff%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    ]

    def attack(text: bytes) -> None:
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(text)

    attackers = [threading.Thread(target=attack, args=(texts[index % len(texts)],)) for index in range(70)]
    for attacker in attackers:
        attacker.start()
    for attacker in attackers:
        attacker.join()
    assert own.ask("/chat", CHAT | {"temperature": 0})[1]["response"] == before
    assert own.running.process.poll() is None


def refused(*overrides: str, cwd: Path, **environment: str) -> Any:
    return command.run("serve", "conf=pirate_chat", "hardware.device=cpu", *overrides, cwd=cwd, **environment)


@pytest.mark.exhaustive
def test_what_can_not_be_served_is_one_line(own: Server, tmp_path: Path) -> None:
    port = urlsplit(own.url).port
    ended = refused(f"serve.port={port}", cwd=tmp_path)
    where = f"127.0.0.1, port {port} (Address already in use)"
    assert ended.errors == [f"error: can't listen on {where}; try serve.port=0, which takes a free one"]
    assert ended.code == 2
    ended = refused("serve.port=0", "serve.adapters={x:nowhere}", cwd=tmp_path)
    assert ended.errors == [
        "error: serve.adapters: there is no adapter at nowhere; name a run folder or an adapter's folder"
    ]


def test_without_its_packages_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/fastapi.py").write_text("raise ImportError")
    path = os.pathsep.join([str(tmp_path / "hidden"), os.environ.get("PYTHONPATH", "")])
    ended = refused(cwd=tmp_path, PYTHONPATH=path)
    assert ended.errors == ["error: `finetune serve` needs fastapi; type: pip install 'finetune[serve]'"]
