"""Frames: nothing is accepted that the holder of the key did not send, this way, in this run, to this question."""

import dataclasses
import hashlib
import hmac
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tolaria.errors import ConfigError, MessageRejected
from tolaria.leyline import framing, keys
from tolaria.leyline.framing import Frame, FrameHeader, FrameKind, KeyRing
from tolaria.leyline.limits import MAX_REPLY_BYTES

KEY = hashlib.sha256(b"one").digest()
OTHER_KEY = hashlib.sha256(b"two").digest()
RING = KeyRing([KEY])


def header(payload: bytes = b"question", **changes: Any) -> FrameHeader:
    made = framing.request_header(
        run_id="run", generation="0a1b", boundary=7, seq=9, payload=payload, wall_ns=1_790_000_000_000_000_000
    )
    return dataclasses.replace(made, **changes)


def rejection(act: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(MessageRejected) as caught:
        act(*arguments)
    return caught.value.code


def write_key(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_header_has_the_agreed_size_and_begins_with_the_magic() -> None:
    frame = framing.seal(header(), b"question", RING)
    assert framing.HEADER_BYTES == 104
    assert len(frame) == 104 + len(b"question") + 32
    assert frame[:6] == b"TLY1\x01\x00"


@settings(max_examples=60, deadline=None)
@given(
    payload=st.binary(max_size=200), boundary=st.integers(0, 2**32 - 1), seq=st.integers(0, 2**64 - 1),
    wall_ns=st.integers(0, 2**64 - 1), generation=st.integers(0, 2**32 - 1),
    ids=st.tuples(st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16)),
    kind=st.sampled_from(FrameKind),
)  # fmt: skip
def test_round_trip(
    payload: bytes, boundary: int, seq: int, wall_ns: int, generation: int, ids: tuple[bytes, bytes], kind: FrameKind
) -> None:
    sent = FrameHeader(
        kind=kind, run_id=ids[0], generation=generation, boundary=boundary, seq=seq, corr_id=ids[1],
        request_sha256=hashlib.sha256(payload).digest(), wall_ns=wall_ns,
    )  # fmt: skip
    opened = framing.open_frame(framing.seal(sent, payload, RING), RING, kind)
    assert opened == Frame(header=dataclasses.replace(sent, key_id=RING.signing_key_id), payload=payload)


def test_every_change_of_a_single_byte_is_rejected() -> None:
    frame = framing.seal(header(b"payload"), b"payload", RING)
    framing.open_frame(frame, RING, FrameKind.REQUEST)
    accepted = []
    for position in range(len(frame)):
        for change in range(1, 256):
            altered = bytearray(frame)
            altered[position] ^= change
            try:
                framing.open_frame(bytes(altered), RING, FrameKind.REQUEST)
            except MessageRejected:
                continue
            accepted.append((position, change))
    assert accepted == []


def test_every_cut_and_every_extension_is_rejected() -> None:
    frame = framing.seal(header(b"payload"), b"payload", RING)
    for length in range(len(frame)):
        assert rejection(framing.open_frame, frame[:length], RING, FrameKind.REQUEST) in ("size", "mac")
    assert rejection(framing.open_frame, frame + b"\0", RING, FrameKind.REQUEST) == "mac"


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400) | st.binary(max_size=400).map(lambda raw: b"TLY1\x01\x00" + raw))
def test_random_bytes_raise_nothing_but_message_rejected(raw: bytes) -> None:
    for kind in FrameKind:
        assert rejection(framing.open_frame, raw, RING, kind)


def test_frame_of_another_key_is_rejected_by_name() -> None:
    frame = framing.seal(header(), b"question", KeyRing([OTHER_KEY]))
    assert rejection(framing.open_frame, frame, RING, FrameKind.REQUEST) == "unknown_key"


def test_forger_who_names_our_key_is_rejected() -> None:
    frame = bytearray(framing.seal(header(), b"question", KeyRing([OTHER_KEY])))
    frame[8:12] = RING.signing_key_id.to_bytes(4, "big")
    assert rejection(framing.open_frame, bytes(frame), RING, FrameKind.REQUEST) == "mac"


def test_frame_cannot_be_reflected_to_its_sender() -> None:
    frame = framing.seal(header(), b"question", RING)
    assert rejection(framing.open_frame, frame, RING, FrameKind.REPLY) == "mac"


def test_frame_cannot_be_moved_to_another_run() -> None:
    frame = bytearray(framing.seal(header(), b"question", RING))
    frame[12:28] = framing.run_id_bytes("another run")
    assert rejection(framing.open_frame, bytes(frame), RING, FrameKind.REQUEST) == "mac"


@pytest.mark.parametrize(
    ("position", "value", "code"), [(0, b"TLY2", "magic"), (4, b"\x02", "major"), (6, b"\0\x02", "kind"),
                                    (100, b"\0\0\0\x09", "length")],
)  # fmt: skip
def test_signed_frame_with_a_wrong_header_is_rejected(position: int, value: bytes, code: str) -> None:
    frame = bytearray(framing.seal(header(), b"question", RING)[:-32])
    frame[position : position + len(value)] = value
    signature = hmac.digest(RING.derive(FrameKind.REQUEST.direction, framing.run_id_bytes("run")), frame, "sha256")
    assert rejection(framing.open_frame, bytes(frame) + signature, RING, FrameKind.REQUEST) == code


def test_frame_of_a_later_minor_version_is_accepted() -> None:
    frame = bytearray(framing.seal(header(), b"question", RING)[:-32])
    frame[5] = 3
    signature = hmac.digest(RING.derive(FrameKind.REQUEST.direction, framing.run_id_bytes("run")), frame, "sha256")
    assert framing.open_frame(bytes(frame) + signature, RING, FrameKind.REQUEST).payload == b"question"


def test_oversized_payload_is_neither_sent_nor_opened() -> None:
    big = b"x" * (MAX_REPLY_BYTES + 1)
    with pytest.raises(ValueError, match="payload"):
        framing.seal(header(kind=FrameKind.REPLY), big, RING)
    assert rejection(framing.open_frame, big + bytes(136), RING, FrameKind.REPLY) == "size"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"run_id": b"short"}, "run_id must have 16"),
        ({"boundary": -1}, "frame header"),
        ({"seq": 2**64}, "frame header"),
        ({"corr_id": b""}, "corr_id must have 16"),
    ],
)
def test_header_that_does_not_fit_is_refused_by_the_sender(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        framing.seal(header(**change), b"question", RING)


def test_reply_is_accepted_only_for_the_open_request() -> None:
    asked = header()
    reply = framing.reply_header(asked, seq=1, wall_ns=2)
    framing.check_reply(asked, reply)
    for code, change in {
        "run": {"run_id": framing.run_id_bytes("other")},
        "generation": {"generation": framing.generation_number("other")},
        "boundary": {"boundary": 6},
        "correlation": {"corr_id": os.urandom(16)},
        "request_digest": {"request_sha256": bytes(32)},
    }.items():
        changed = dataclasses.replace(reply, **change)  # type: ignore[arg-type]
        assert rejection(framing.check_reply, asked, changed) == code


def test_two_questions_with_one_payload_have_different_correlation_ids() -> None:
    first, second = header(), header()
    assert rejection(framing.check_reply, second, framing.reply_header(first, seq=0, wall_ns=0)) == "correlation"


def test_hkdf_gives_the_published_result() -> None:
    # RFC 5869, test case 1, first 32 bytes.
    made = keys.hkdf_sha256(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)))
    assert made.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"


def test_each_direction_run_and_master_key_has_its_own_key() -> None:
    run, other = framing.run_id_bytes("run"), framing.run_id_bytes("other")
    derived = {
        RING.derive("to-policy", run),
        RING.derive("to-trainer", run),
        RING.derive("to-policy", other),
        KeyRing([OTHER_KEY]).derive("to-policy", run),
    }
    assert len(derived) == 4
    assert KEY not in derived


def test_rotation_loses_no_frame_and_revocation_ends_the_old_key() -> None:
    old, both, new = RING, KeyRing([OTHER_KEY, KEY]), KeyRing([OTHER_KEY])
    from_old = framing.seal(header(), b"question", old)
    assert framing.open_frame(from_old, both, FrameKind.REQUEST).header.key_id == keys.key_id(KEY)
    from_both = framing.seal(header(), b"question", both)
    assert framing.open_frame(from_both, new, FrameKind.REQUEST).header.key_id == keys.key_id(OTHER_KEY)
    revoking = KeyRing([OTHER_KEY, KEY], revoked=[keys.key_id(KEY)])
    assert rejection(framing.open_frame, from_old, revoking, FrameKind.REQUEST) == "revoked_key"


def test_key_ring_never_shows_a_key() -> None:
    assert KEY.hex() not in repr(RING)
    assert f"{keys.key_id(KEY):08x}" in repr(RING)


@pytest.mark.parametrize(
    "content", [os.urandom(32), KEY.hex().encode(), b"# ours\n\n" + KEY.hex().encode() + b"  # now\n"]
)
def test_key_file_is_read(tmp_path: Path, content: bytes) -> None:
    ring = framing.load_key_file(write_key(tmp_path / "key", content))
    assert len(ring.key_ids) == 1
    framing.open_frame(framing.seal(header(), b"question", ring), ring, FrameKind.REQUEST)


def test_key_file_with_rotation_and_revocation(tmp_path: Path) -> None:
    third = hashlib.sha256(b"three").digest()
    lines = [KEY.hex(), OTHER_KEY.hex(), third.hex(), f"revoke {keys.key_id(OTHER_KEY):08x}"]
    ring = framing.load_key_file(write_key(tmp_path / "key", "\n".join(lines).encode()))
    assert ring.key_ids == (keys.key_id(KEY), keys.key_id(third))


def test_fresh_key_file_text_is_accepted_and_fresh(tmp_path: Path) -> None:
    rings = [
        framing.load_key_file(write_key(tmp_path / str(i), framing.new_key_file_text().encode())) for i in range(2)
    ]
    assert rings[0].key_ids != rings[1].key_ids


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no key"),
        (b"\xff" * 31, "32 or more random bytes"),
        (bytes(64), "line 1"),
        (b"\xff" * 64, "32 or more random bytes"),
        (b"00" * 32, "32 or more random bytes"),
        (b"correct horse battery staple correct horse", "line 1"),
        (KEY.hex().encode() + b"\nrevoke xyz\n", "line 2"),
        (KEY.hex().encode() + f"\nrevoke {keys.key_id(KEY):08x}".encode(), "not revoked"),
        (os.urandom(20_000), "larger"),
    ],
)
def test_bad_key_file_is_refused_without_showing_it(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        framing.load_key_file(write_key(tmp_path / "key", content))
    assert str(tmp_path / "key") in str(caught.value)
    assert KEY.hex() not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_key_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match="chmod 600"):
        framing.load_key_file(write_key(tmp_path / "key", KEY.hex().encode(), mode))


def test_key_file_must_be_a_plain_file_that_is_there(tmp_path: Path) -> None:
    real = write_key(tmp_path / "real", KEY.hex().encode())
    (tmp_path / "link").symlink_to(real)
    os.mkfifo(tmp_path / "fifo", 0o600)
    for name in ("link", "fifo", "missing", "."):
        with pytest.raises(ConfigError):
            framing.load_key_file(tmp_path / name)
