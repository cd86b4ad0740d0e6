"""A small HTTP server for one page, which costs the run little however often and by whomever it is asked for."""

import http.server
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from tolaria.errors import ConfigError

KEPT_S = 1.0
"""The page is made once in so many seconds at most: making it takes the interpreter from the training thread."""
MOST_CONNECTIONS = 8
PATIENCE_S = 5.0
POLL_S = 0.25
BIND_S = 5.0


class ScrapeServer:
    """Serves ``page`` at /metrics of ``address`` (host, port; port 0: any) until it is closed, with threads of its own.

    At most MOST_CONNECTIONS are served at once, each for PATIENCE_S; others are turned away. Raises ConfigError when
    the address can not be bound, which is tried for BIND_S: the start before may only be ending.
    """

    def __init__(self, address: tuple[str, int], page: Callable[[], bytes], content_type: str) -> None:
        self._server = _bind(address, _Page(page), content_type)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(POLL_S,), name="scrape-server", daemon=True
        )  # fmt: skip
        self._thread.start()

    @property
    def url(self) -> str:
        """Where the page is, with the port that 0 became."""
        host, port = self._server.server_address[:2]
        return f"http://{f'[{host!s}]' if ':' in str(host) else str(host)}:{port}/metrics"

    def close(self) -> None:
        """Stop serving. Waits for the threads, POLL_S or so; for a client that does not read PATIENCE_S at most."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Page:
    """The page, made anew when it is older than KEPT_S."""

    def __init__(self, make: Callable[[], bytes]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made = -KEPT_S
        self._bytes = b""

    def get(self) -> bytes:
        with self._lock:
            now = time.monotonic()
            if now - self._made >= KEPT_S:
                self._bytes, self._made = self._make(), now
            return self._bytes


class _Handler(http.server.BaseHTTPRequestHandler):
    server: "_Server"
    timeout = PATIENCE_S

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(HTTPStatus.NOT_FOUND, explain="the metrics are at /metrics")
            return
        body = self.server.page.get()
        head = f"HTTP/1.0 200 OK\r\nContent-Type: {self.server.content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
        self.wfile.write(head.encode() + body)

    def log_message(self, *_: Any) -> None:
        """A scrape is nothing to tell anybody."""


class _Server(http.server.ThreadingHTTPServer):
    def __init__(self, address: tuple[str, int], family: socket.AddressFamily, page: _Page, content_type: str) -> None:
        self.address_family = family
        self.page = page
        self.content_type = content_type
        self._room = threading.BoundedSemaphore(MOST_CONNECTIONS)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # Its parent looks the host's name up, which may take seconds and is used for nothing.
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or does not read, is its own trouble; anything else is told."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def _bind(address: tuple[str, int], page: _Page, content_type: str) -> _Server:
    shown, deadline = f"telemetry.prometheus={address[0]}:{address[1]}", time.monotonic() + BIND_S
    try:
        family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        raise ConfigError(f"{shown}: no such address here ({error.strerror})") from error
    while True:
        try:
            return _Server(address, family, page, content_type)
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(f"{shown}: cannot be served there ({error.strerror}); choose another port") from error
        time.sleep(POLL_S)
