"""Which ZeroMQ endpoints are acceptable, and which of them leave this machine.

ipc:///run/user/1000/tamiyo.sock    a socket file: only who may enter its directory can connect
tcp://127.0.0.1:5700                loopback: every user of this machine can connect
tcp://10.0.0.7:5700                 the network: needs CURVE on both sides
"""

import ipaddress
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from tolaria.errors import ConfigError

MAX_IPC_PATH_BYTES = 107
"""Longest socket path that Linux takes (sun_path has 108 bytes with its closing zero)."""


@dataclass(frozen=True)
class Endpoint:
    """A checked endpoint. ``leaves_host`` is True unless it is certain that only this machine can reach it."""

    url: str
    leaves_host: bool
    ipv6: bool = False


def parse_endpoint(url: str, key: str) -> Endpoint:
    """Check an ``ipc://`` or ``tcp://`` endpoint; ``key`` names the setting in the ConfigError.

    A host name other than ``localhost`` counts as off-host: what it resolves to can change after the check.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "ipc":
        return _ipc(url, rest, key)
    if scheme == "tcp":
        return _tcp(url, rest, key)
    raise ConfigError(f"{key}={url!r}: expected ipc://PATH or tcp://HOST:PORT")


def require_free(endpoint: Endpoint, key: str) -> None:
    """Raise ConfigError when binding an ``ipc://`` endpoint would take a file from somebody.

    libzmq removes whatever lies at the path before it binds, be it a live server's socket or a file of the user.
    """
    if not endpoint.url.startswith("ipc://"):
        return
    path = Path(endpoint.url.removeprefix("ipc://"))
    if not path.is_symlink() and not path.exists():
        return
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise ConfigError(f"{key}={endpoint.url!r}: {path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return  # left behind by a server that is dead
        except OSError as error:
            raise ConfigError(f"{key}={endpoint.url!r}: cannot tell whether it is in use ({error})") from error
    raise ConfigError(f"{key}={endpoint.url!r}: another server answers there; stop it or choose another path")


def _ipc(url: str, path: str, key: str) -> Endpoint:
    # An abstract socket (@name) or a wildcard (*) has no directory whose permissions would guard it.
    if not path or path[0] in "@*":
        raise ConfigError(f"{key}={url!r}: expected the path of a socket file after ipc://")
    size = len(path.encode())
    if size > MAX_IPC_PATH_BYTES:
        raise ConfigError(f"{key}={url!r}: the path has {size} bytes; a socket path holds {MAX_IPC_PATH_BYTES}")
    return Endpoint(url, leaves_host=False)


def _tcp(url: str, rest: str, key: str) -> Endpoint:
    host, colon, port = rest.rpartition(":")
    port_ok = port == "*" or (port.isascii() and port.isdigit() and int(port) <= 65535)
    if not (colon and host and port_ok) or any(c in host for c in ";/ "):
        raise ConfigError(f"{key}={url!r}: expected tcp://HOST:PORT, an IPv6 address in brackets")
    ipv6 = host.startswith("[") and host.endswith("]")
    bare = host[1:-1] if ipv6 else host
    if bare == "localhost":
        return Endpoint(url, leaves_host=False)
    try:
        loopback = ipaddress.ip_address(bare).is_loopback
    except ValueError:
        loopback = False
    return Endpoint(url, leaves_host=not loopback, ipv6=ipv6)
