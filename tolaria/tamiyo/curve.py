"""CURVE keys and the ZAP allow-list: who may talk to a policy service over a network.

A CURVE key is 40 characters of Z85, one per line in its file, ``#`` starts a comment. `tolaria.tamiyo.keys` makes
them. A CURVE socket without a ZAP handler accepts every client key, so the server always runs one and tells
libzmq to refuse all connections should it be missing.
"""

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from tolaria.errors import ConfigError

ZAP_DOMAIN = "tolaria"
MAX_FILE_BYTES = 64 * 1024

_Z85 = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


@dataclass(frozen=True)
class ClientCurve:
    """A client's own key pair and the public key of the one server that it talks to."""

    server_public: bytes
    public: bytes
    secret: bytes = field(repr=False)

    def apply(self, socket: "zmq.Socket[bytes]") -> None:
        """Set on a socket before it connects."""
        socket.curve_serverkey = self.server_public
        socket.curve_publickey = self.public
        socket.curve_secretkey = self.secret


@dataclass(frozen=True)
class ServerCurve:
    """A server's own key pair and the public keys of the clients that it lets in."""

    clients: frozenset[bytes]
    public: bytes
    secret: bytes = field(repr=False)

    def apply(self, socket: "zmq.Socket[bytes]") -> None:
        """Set on a socket before it binds; start a `Doorkeeper` on its context first."""
        socket.curve_server = True
        socket.curve_publickey = self.public
        socket.curve_secretkey = self.secret
        socket.zap_domain = ZAP_DOMAIN.encode()
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


class Doorkeeper:
    """Answers libzmq's question whether a client key may connect, in a thread of its own until `close`."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", curve: ServerCurve) -> None:
        # Imported here because it brings asyncio, which most servers never need.
        from zmq.auth.thread import ThreadAuthenticator  # noqa: PLC0415

        self._clients = curve.clients
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(domain=ZAP_DOMAIN, credentials_provider=self)

    def callback(self, domain: str, key: bytes) -> bool:
        """Called by the authenticator with a client's public key in Z85."""
        return domain == ZAP_DOMAIN and key in self._clients

    def close(self) -> None:
        """Stop the thread. Closed sockets of the context must come first."""
        self._authenticator.stop()


def new_key_pair() -> tuple[str, str]:
    """A fresh (public, secret) pair."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def load_client_curve(server_key_file: str, secret_file: str) -> ClientCurve | None:
    """The client side from its two files; None when neither is named. Raises ConfigError."""
    if not server_key_file and not secret_file:
        return None
    if not (server_key_file and secret_file):
        raise ConfigError("tamiyo.curve_server_key_file and tamiyo.curve_secret_file: CURVE needs both")
    secret = _one_key(secret_file, private=True)
    server_public = _one_key(server_key_file, private=False)
    return ClientCurve(server_public=server_public, public=zmq.curve_public(secret), secret=secret)


def load_server_curve(secret_file: str, clients_file: str) -> ServerCurve | None:
    """The server side from its two files; None when neither is named. Raises ConfigError."""
    if not secret_file and not clients_file:
        return None
    if not (secret_file and clients_file):
        raise ConfigError("--curve-secret-file and --curve-clients-file: CURVE needs both")
    clients = _read_keys(clients_file, private=False)
    if not clients:
        raise ConfigError(f"{clients_file}: no client key in it, so nobody could connect")
    secret = _one_key(secret_file, private=True)
    return ServerCurve(clients=frozenset(clients), public=zmq.curve_public(secret), secret=secret)


def _one_key(path: str, *, private: bool) -> bytes:
    keys = _read_keys(path, private=private)
    if len(keys) != 1:
        raise ConfigError(f"{path}: expected one CURVE key of 40 Z85 characters, found {len(keys)}")
    return keys[0]


def _read_keys(path: str, *, private: bool) -> list[bytes]:
    keys: list[bytes] = []
    for number, line in enumerate(_read(Path(path), private=private).splitlines(), start=1):
        # '#' is a Z85 character too, so a comment is a line of its own.
        entry = line.strip()
        if _Z85.fullmatch(entry):
            keys.append(entry.encode())
        elif entry and not entry.startswith("#"):
            raise ConfigError(f"{path}, line {number}: expected a CURVE key of 40 Z85 characters, or a # comment")
    return keys


def _read(path: Path, *, private: bool) -> str:
    try:
        # Non-blocking, so that a FIFO in the file's place cannot hang the start.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the CURVE key file ({error.strerror})") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path}: a key file must be a regular file")
        if private and (status.st_mode & 0o077 or status.st_uid != os.geteuid()):
            raise ConfigError(f"{path}: only its owner may read a secret key; chown it to yourself and chmod 600 it")
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes, not a key file")
    try:
        return content.decode("ascii")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not text; expected CURVE keys of 40 Z85 characters") from None
