"""The server as browsers, and others, talk to it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import pytest
from page import fake_out, fake_setup

from mka_export.serve.artifacts import find_artifacts
from mka_export.serve.certificate import secure
from mka_export.serve.running import listen
from mka_export.serve.server import Server


@contextlib.contextmanager
def answering(out: Path, cache: Path, *, tls: bool = False) -> Iterator[Server]:
    with listen(find_artifacts(out), fake_setup(cache), "127.0.0.1", 0, {"localhost", "me.local"}) as server:
        if tls:
            secure(server, ["localhost", "my_host", "-x", "", "127.0.0.1", "::1"])
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_out(tmp_path_factory.mktemp("served") / "out")


@pytest.fixture(scope="module")
def server(out: Path) -> Iterator[Server]:
    with answering(out, out.parent / "cache") as answers:
        yield answers


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[HTTPResponse, bytes]:
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    with contextlib.closing(connection):
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer, answer.read()


def artifacts(server: Server) -> dict[str, dict[str, str]]:
    listing = json.loads(ask(server, "/artifacts.json")[1])
    return {artifact["kind"]: artifact for artifact in listing["artifacts"]}


def test_the_page_and_all_it_names(server):
    answer, page = ask(server, "/")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    for name in ("page.css", "page.js", "icon.svg"):
        assert name.encode() in page
        assert ask(server, f"/{name}")[0].status == 200
    assert b"<script>" not in page
    assert b"://" not in page
    listing = json.loads(ask(server, "/artifacts.json")[1])
    assert ask(server, f"{listing['library']}ort-wasm-simd-threaded.wasm")[0].headers["Content-Type"] == (
        "application/wasm"
    )


def test_files_of_artifacts(server, out):
    found = artifacts(server)
    assert found["gguf"]["nbytes"] == 100
    for path, file in {
        found["gguf"]["url"]: "gguf-q4/a b.gguf",
        f"{found['onnx']['url']}config.json": "onnx-int4/a-int4/config.json",
        f"{found['onnx']['url']}onnx/model_q4.onnx_data": "onnx-int4/a-int4/onnx/model_q4.onnx_data",
    }.items():
        answer, body = ask(server, path)
        assert (answer.status, body) == (200, (out / file).read_bytes())
        assert answer.headers["Content-Length"] == str(len(body))


@pytest.mark.parametrize("path", ["/", "/artifacts.json", "/nothing"])
def test_headers_of_every_answer(server, path):
    headers = ask(server, path)[0].headers
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["X-Content-Type-Options"] == "nosniff"
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == "'self' 'wasm-unsafe-eval'"
    assert policy["connect-src"] == "'self'"
    assert not any("http" in where or "*" in where or "unsafe-inline" in where for where in policy.values())


@pytest.mark.parametrize(
    "path",
    [
        "/../manifest.json",
        "/%2e%2e/manifest.json",
        "/..%2fmanifest.json",
        "/models/{tag}/../../../../etc/passwd",
        "/models/{tag}/%2e%2e%2f%2e%2e%2fmanifest.json",
        "/models/{tag}/..%5c..%5cmanifest.json",
        "/models/{tag}//etc/passwd",
        "/models/{tag}/",
        "/models/",
        "//etc/passwd",
        "/manifest.json",
        "/.secret",
        "/merged/model.safetensors",
        "/models/{tag}/stage.json",
        "/lib/scripts.json",
        "/page.js%00",
        "/index.html",
        "/server.py",
        "page.js",
        "/%ff",
    ],
)
def test_nothing_else_can_be_had(server, path):
    answer, body = ask(server, path.format(tag=artifacts(server)["onnx"]["id"]))
    assert (answer.status, body) == (404, b"Not Found\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "BREW"])
def test_nothing_can_be_changed(server, method):
    answer, _ = ask(server, "/", method)
    assert answer.status == 405
    assert answer.headers["Allow"] == "GET, HEAD"


def test_head(server):
    answer, body = ask(server, artifacts(server)["gguf"]["url"], "HEAD")
    assert (answer.status, answer.headers["Content-Length"], body) == (200, "100", b"")
    answer, body = ask(server, "/nothing", "HEAD")
    assert (answer.status, body) == (404, b"")


@pytest.mark.parametrize(
    ("asked", "first", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=4-9", 4, 10),
        ("bytes=90-", 90, 100),
        ("bytes=-7", 93, 100),
        ("bytes=95-999", 95, 100),
    ],
)
def test_parts_of_a_file(server, out, asked, first, end):
    answer, body = ask(server, artifacts(server)["gguf"]["url"], Range=asked)
    assert answer.status == 206
    assert body == (out / "gguf-q4" / "a b.gguf").read_bytes()[first:end]
    assert answer.headers["Content-Range"] == f"bytes {first}-{end - 1}/100"


@pytest.mark.parametrize("asked", ["bytes=100-", "bytes=200-300", "bytes=9-4", "bytes=-0"])
def test_parts_that_are_not_there(server, asked):
    answer, body = ask(server, artifacts(server)["gguf"]["url"], Range=asked)
    assert (answer.status, len(body) < 100) == (416, True)


@pytest.mark.parametrize("asked", ["bytes=-", "bytes=0-1,5-6", "lines=1-2", "bytes=x-y", "bytes=0-" + "9" * 5000])
def test_other_ranges_are_answered_by_the_whole_or_refused(server, asked):
    answer, _ = ask(server, artifacts(server)["gguf"]["url"], Range=asked)
    assert answer.status in (200, 206, 416)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "me.local", "127.0.0.1:80", "192.168.0.7", "[::1]:5"])
def test_hosts_that_are_this_machine(server, host):
    assert ask(server, "/", Host=host)[0].status == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "[", "a@b"])
def test_a_foreign_name_that_points_here_is_refused(server, host):
    answer, body = ask(server, "/artifacts.json", Host=host)
    assert (answer.status, b"artifacts" in body) == (421, False)


def test_a_name_that_is_no_text(tmp_path):
    out = fake_out(tmp_path / "out")
    (out / "gguf-q4" / "a b.gguf").rename(out / "gguf-q4" / os.fsdecode(b"bad\xff\x1b#?%41.gguf"))
    with answering(out, tmp_path / "cache") as server:
        answer, body = ask(server, artifacts(server)["gguf"]["url"])
        assert (answer.status, len(body)) == (200, 100)


def test_a_file_that_changed_since_is_not_served(tmp_path):
    out = fake_out(tmp_path / "out")
    (tmp_path / "secret").write_bytes(b"secret")
    with answering(out, tmp_path / "cache") as server:
        found = artifacts(server)
        (out / "gguf-q4" / "a b.gguf").unlink()
        (out / "gguf-q4" / "a b.gguf").symlink_to(tmp_path / "secret")
        (out / "onnx-int4" / "a-int4" / "config.json").write_text("{}")
        (out / "onnx-int4" / "a-int4" / "tokenizer.json").unlink()
        for path in (
            found["gguf"]["url"],
            *(found["onnx"]["url"] + name for name in ("config.json", "tokenizer.json")),
        ):
            assert ask(server, path)[0].status == 404


def test_clients_that_speak_no_http_harm_nobody(server, capsys):
    for sent in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x00" * 70000):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as client:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while client.recv(1 << 16):
                    pass
    assert ask(server, "/")[0].status == 200
    assert capsys.readouterr().err == ""


def test_tls(tmp_path):
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with answering(fake_out(tmp_path / "out"), tmp_path / "cache", tls=True) as server:
        address = ("127.0.0.1", server.server_port)
        with (
            socket.create_connection(address, timeout=10),  # says nothing, and is in no one's way
            socket.create_connection(address, timeout=10) as plain,
            context.wrap_socket(plain) as client,
        ):
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 OK\r\n")
