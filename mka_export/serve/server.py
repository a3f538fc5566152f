"""The server: known files only, GET and HEAD only, to browsers that keep the page to itself."""

from __future__ import annotations

import io
import ipaddress
import os
import re
import socket
import sys
from collections.abc import Collection, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from mka_export.serve.artifacts import identity
from mka_export.serve.site import Resource

PATIENCE = 60.0  # seconds for a client to send a request, or to take a part of the answer
BLOCK = 1 << 18  # bytes sent at a time
HEADERS = {
    # Together they give the page shared memory, and so threads.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Nothing from elsewhere. wllama's worker is a blob, and WebAssembly is compiled.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self' blob:; connect-src 'self'; "
        "style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)


class Server(ThreadingHTTPServer):
    """Serves a site.

    Args:
        address: where to listen.
        site: path in the URL -> what it stands for.
        names: host names that stand for this machine. Another, in a request, is a foreign page whose name was
            pointed here (DNS rebinding); numeric addresses cannot be.

    Raises:
        OSError: the address cannot be listened on.
    """

    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], site: Mapping[str, Resource], names: Collection[str], family: int = 0
    ) -> None:
        self.address_family = family or socket.AF_INET
        self.site, self.names = site, {name.lower() for name in names}
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        """Bind, without asking a name server who we are, as the base class does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Let clients go that left, or spoke another protocol."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers one client."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = PATIENCE

    def version_string(self) -> str:
        """Return what the header Server says."""
        return "mka-export"

    def do_GET(self) -> None:
        """Send a resource, or the part of it that is asked for."""
        if not self._is_for_us():
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
            return
        resource = self.server.site.get(unquote(urlsplit(self.path).path, errors="surrogateescape"))
        try:
            source = None if resource is None else _open(resource)
        except OSError:
            source = None
        if resource is None or source is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        with source:
            self._send(resource, source)

    do_HEAD = do_GET

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with a status and its name, as plain text."""
        if code == HTTPStatus.NOT_IMPLEMENTED:  # any other method than those above
            code, message = HTTPStatus.METHOD_NOT_ALLOWED, None
        self.close_connection = True
        body = f"{message or HTTPStatus(code).phrase}\n".encode("ascii", "replace")
        self.send_response(code, message)
        if code == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self._finish_headers("text/plain; charset=utf-8", len(body), "no-store")
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: requests are no news."""

    def _is_for_us(self) -> bool:
        try:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        except ValueError:
            return False
        if host in self.server.names:
            return True
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True

    def _send(self, resource: Resource, source: BinaryIO) -> None:
        size = source.seek(0, os.SEEK_END)
        asked = RANGE.fullmatch(self.headers.get("Range", ""))
        if asked is None or asked.group() == "bytes=-":  # several ranges at once may be answered by the whole
            first, end = 0, size
            self.send_response(HTTPStatus.OK)
        else:
            first, end = _part(asked[1], asked[2], size)
            if first >= end:
                self.send_error(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
                return
            self.send_response(HTTPStatus.PARTIAL_CONTENT)
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{size}")
        self.send_header("Accept-Ranges", "bytes")
        self._finish_headers(resource.kind, end - first, resource.keep)
        if self.command != "HEAD":
            source.seek(first)
            while first < end and (block := source.read(min(BLOCK, end - first))):
                self.wfile.write(block)
                first += len(block)

    def _finish_headers(self, kind: str, length: int, keep: str) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.send_header("Cache-Control", keep)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()


def _part(first: str, last: str, size: int) -> tuple[int, int]:
    """Return the bytes of ``bytes=first-last``, or of ``bytes=-last`` the last ones, as a half-open range (RFC 9110)."""
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(int(last) + 1, size) if last else size


def _open(resource: Resource) -> BinaryIO | None:
    """Open a resource, unless its file is no longer the one that was listed."""
    if isinstance(resource.source, bytes):
        return io.BytesIO(resource.source)
    file = os.fdopen(os.open(resource.source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
    if identity(os.fstat(file.fileno())) == resource.state:
        return file
    file.close()
    return None
