"""The shared secrets behind frame authentication: key files, key ids, rotation, derivation by HKDF-SHA256."""

import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from tolaria.errors import ConfigError, MessageRejected

MIN_KEY_BYTES = 32
MAX_KEY_FILE_BYTES = 16 * 1024

_SALT = b"tolaria leyline v1"
_KEY_LINE = re.compile(r"(?:[0-9a-fA-F]{2}){32,}")
_REVOKE_LINE = re.compile(r"revoke\s+([0-9a-fA-F]{8})")


class KeyRing:
    """Master keys by id. The first signs; all that are not revoked verify.

    To rotate: append the new key on both sides, move it to the front on both sides, then revoke the old one.
    A key's id is the start of its hash, so both sides name it alike without configuration. Immutable.
    """

    def __init__(self, keys: Sequence[bytes], revoked: Iterable[int] = ()) -> None:
        """Raises ValueError for a weak key, and when no key is left to sign with."""
        for key in keys:
            # 32 random bytes have about 30 different values; zeros or typed text are no key.
            if len(key) < MIN_KEY_BYTES or len(set(key)) < MIN_KEY_BYTES // 2:
                raise ValueError(f"a key needs {MIN_KEY_BYTES} or more random bytes")
        self._revoked = frozenset(revoked)
        self._pseudorandom = {
            key_id(k): hmac.digest(_SALT, k, "sha256") for k in keys if key_id(k) not in self._revoked
        }
        if not self._pseudorandom:
            raise ValueError("no key that is not revoked")
        self.signing_key_id = next(iter(self._pseudorandom))

    @property
    def key_ids(self) -> tuple[int, ...]:
        """Ids of the accepted keys, the signing one first."""
        return tuple(self._pseudorandom)

    def derive(self, direction: str, run_id: bytes, *, with_key: int | None = None) -> bytes:
        """The 32-byte MAC key of one direction of one run, from the signing key or the one named.

        Raises MessageRejected("revoked_key" or "unknown_key").
        """
        wanted = self.signing_key_id if with_key is None else with_key
        pseudorandom = self._pseudorandom.get(wanted)
        if pseudorandom is None:
            code = "revoked_key" if wanted in self._revoked else "unknown_key"
            raise MessageRejected(
                code, f"key {wanted:08x} is {'revoked' if code == 'revoked_key' else 'not known here'}"
            )
        return _expand(pseudorandom, b"\0".join((b"frame", direction.encode(), run_id)))

    def __repr__(self) -> str:
        return f"KeyRing({', '.join(f'{k:08x}' for k in self._pseudorandom)})"


def _expand(pseudorandom: bytes, info: bytes) -> bytes:
    # HKDF-Expand for one block: exactly the 32 bytes that an HMAC key needs.
    return hmac.digest(pseudorandom, info + b"\x01", "sha256")


def hkdf_sha256(master: bytes, salt: bytes, info: bytes) -> bytes:
    """The first 32 bytes of HKDF-SHA256 (RFC 5869)."""
    return _expand(hmac.digest(salt, master, "sha256"), info)


def key_id(key: bytes) -> int:
    """The public 32-bit name of a master key."""
    return int.from_bytes(hashlib.sha256(b"tolaria key id" + key).digest()[:4], "big")


def new_key_file_text() -> str:
    """The content of a key file with one fresh random key."""
    return secrets.token_hex(MIN_KEY_BYTES) + "\n"


def load_key_file(path: str | Path) -> KeyRing:
    """Read master keys from a file that nobody but its owner can read.

    The file is either one raw key of 32 or more random bytes, or text: one key per line in hex (64 or more
    digits), the signing key first, ``revoke <8-digit key id>`` lines, ``#`` comments.
    Raises ConfigError naming the file and what is wrong with it, never its content.
    """
    content = _read_private(Path(path))
    try:
        text = content.decode("ascii")
    except UnicodeDecodeError:
        return _ring(path, [content], [])
    keys: list[bytes] = []
    revoked: list[int] = []
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.partition("#")[0].strip()
        if _KEY_LINE.fullmatch(entry):
            keys.append(bytes.fromhex(entry))
        elif match := _REVOKE_LINE.fullmatch(entry):
            revoked.append(int(match[1], 16))
        elif entry:
            raise ConfigError(f"{path}, line {number}: expected 64 or more hex digits, or 'revoke <key id>'")
    return _ring(path, keys, revoked)


def _ring(path: str | Path, keys: Sequence[bytes], revoked: Sequence[int]) -> KeyRing:
    try:
        return KeyRing(keys, revoked)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; make one with: (umask 077; openssl rand -hex 32 > FILE)") from None


def _read_private(path: Path) -> bytes:
    try:
        # Non-blocking, so that a FIFO in the key's place cannot hang the start.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the key file ({error.strerror})") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path}: a key file must be a regular file")
        if status.st_mode & 0o077 or status.st_uid != os.geteuid():
            raise ConfigError(f"{path}: only its owner may read a key file; chown it to yourself and chmod 600 it")
        content = os.read(descriptor, MAX_KEY_FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(content) > MAX_KEY_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_KEY_FILE_BYTES} bytes, not a key file")
    return content
