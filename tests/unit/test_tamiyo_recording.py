"""The record of what run and policy said: whole, bounded, readable after a crash, and never in the way."""

import os
import threading
import time
from pathlib import Path

import pytest

from tests.faults.handshake_run import EPOCHS, Ran, run, run_config, trained_alike
from tolaria.errors import ConfigError, RunDirError
from tolaria.leyline.codec import decode_command
from tolaria.leyline.framing import KeyRing, request_header, seal
from tolaria.tamiyo import recording
from tolaria.tamiyo.line import KEYS_NAME, MAX_KEYS, keep_key
from tolaria.tamiyo.recording import FILE_NAME, OLDER_NAME, FrameFile, What, entries
from tolaria.view.frames import read_exchanges, read_frames, read_keys

KEYS = KeyRing([bytes(range(32))])
SCRIPT = '[[command]]\nboundary = 2\nop = "germinate"\nslot = "early"\nblueprint = "low_rank"\n'


def frame(number: int, size: int = 100) -> bytes:
    payload = number.to_bytes(4, "big") * (size // 4)
    header = request_header(run_id="run", generation="g", boundary=number, seq=number, payload=payload, wall_ns=1)
    return seal(header, payload, KEYS)


def kept(folder: Path) -> list[int]:
    """Boundaries of the recorded questions, oldest first."""
    return [f.header.boundary for f in read_frames(folder, KEYS) if not f.fault]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "script.toml").write_text(SCRIPT)
    return run(run_config(folder / "run", policy=f"script:{folder / 'script.toml'}", deadline_ms=5000))


@pytest.mark.processes
def test_a_run_records_every_question_with_its_answer_and_the_key_to_verify_them(recorded: Ran) -> None:
    exchanges = list(read_exchanges(recorded.folder, read_keys(recorded.folder)))
    assert [e.boundary for e in exchanges] == [*range(1, EPOCHS + 1)]
    assert all(e.question.verified and e.reply is not None and e.reply.verified for e in exchanges)
    assert all(e.request.state.packet_id.endswith(f":{e.boundary}") for e in exchanges)
    assert all(e.answer_ms is not None and 0 < e.answer_ms < 5000 for e in exchanges)
    commands = {e.boundary: [decode_command(raw) for raw in e.answer.commands] for e in exchanges if e.answer}
    assert [b for b, given in commands.items() if given] == [2]
    decided = {e["boundary"]: e["commands"] for e in recorded.events("decision")}
    assert {e.boundary: [raw.hex() for raw in e.answer.commands] for e in exchanges if e.answer} == decided
    for name in (FILE_NAME, KEYS_NAME):
        assert (recorded.folder / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.processes
def test_an_altered_frame_does_not_verify_and_without_the_key_nothing_is_claimed(recorded: Ran, tmp_path: Path) -> None:
    entry = next(entries(recorded.folder / FILE_NAME))
    altered = bytearray(entry.frame)
    altered[120] ^= 1
    file = FrameFile(tmp_path, 2**20)
    file.keep(What.REQUEST, bytes(altered))
    file.close()
    (found,) = read_frames(tmp_path, read_keys(recorded.folder))
    assert (found.verified, found.fault) == (False, "mac")
    (unproven,) = read_frames(tmp_path, read_keys(tmp_path))
    assert unproven.verified is None
    with pytest.raises(ConfigError, match="cannot read the key file"):
        read_keys(tmp_path, tmp_path / "none")


@pytest.mark.processes
def test_a_run_that_is_to_record_nothing_records_nothing_and_is_the_same_run(recorded: Ran, tmp_path: Path) -> None:
    script = recorded.folder.parent / "script.toml"
    ran = run(run_config(tmp_path / "run", policy=f"script:{script}", record=False, deadline_ms=5000))
    assert trained_alike(ran, recorded)
    assert not {FILE_NAME, KEYS_NAME} & {path.name for path in ran.folder.iterdir()}


def test_the_newest_frames_stay_within_the_bound(tmp_path: Path) -> None:
    file = FrameFile(tmp_path, 8 * 1024)
    for number in range(1, 101):
        file.keep(What.REQUEST, frame(number))
    file.close()
    found = kept(tmp_path)
    assert found == [*range(found[0], 101)]
    assert 15 <= len(found) < 40
    sizes = [(tmp_path / name).stat().st_size for name in (FILE_NAME, OLDER_NAME)]
    assert max(sizes) <= 4 * 1024


def test_another_start_goes_on_behind_what_a_crash_cut_short(tmp_path: Path) -> None:
    for number in (1, 2):
        file = FrameFile(tmp_path, 2**20)
        file.keep(What.REQUEST, frame(number))
        file.close()
        with (tmp_path / FILE_NAME).open("ab") as torn:
            torn.write(b"TLYR" + frame(9)[:50])
    file = FrameFile(tmp_path, 2**20)
    file.keep(What.REQUEST, frame(3))
    file.close()
    assert kept(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("at", [0, 4, 20, 60])
def test_a_flipped_byte_costs_one_entry(at: int, tmp_path: Path) -> None:
    file = FrameFile(tmp_path, 2**20)
    for number in (1, 2, 3):
        file.keep(What.REQUEST, frame(number))
    file.close()
    raw = bytearray((tmp_path / FILE_NAME).read_bytes())
    raw[len(raw) // 3 + at] ^= 0xFF
    (tmp_path / FILE_NAME).write_bytes(raw)
    assert kept(tmp_path) == [1, 3]


def test_a_disk_that_fails_is_told_once_and_holds_nobody_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "SOON_S", 0.01)
    answers = iter([OSError(28, "No space left on device")] * 3)

    def write(descriptor: int, data: bytes) -> int:
        if (error := next(answers, None)) is not None:
            raise error
        return os.write(descriptor, data)

    file = FrameFile(tmp_path, 2**20, write=write)
    for number in range(1, 6):
        file.keep(What.REQUEST, frame(number))
    file.close()
    assert (kept(tmp_path), file.lost) == ([4, 5], 3)
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_a_disk_that_hangs_holds_nobody_up_and_the_queue_is_bounded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "QUEUE_BYTES", 10_000)
    free = threading.Event()
    file = FrameFile(tmp_path, 2**20, write=lambda fd, data: free.wait(20) and os.write(fd, data))
    start = time.monotonic()
    for number in range(1, 101):
        file.keep(What.REQUEST, frame(number))
    assert time.monotonic() - start < 1.0
    assert file.lost > 50
    assert "the disk does not keep up" in capsys.readouterr().err
    free.set()
    file.close()
    assert kept(tmp_path) == [*range(1, 101 - file.lost)]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(RunDirError, match=f"{FILE_NAME}: cannot be opened"):
        FrameFile(tmp_path, 2**20)


def test_each_start_adds_its_key_and_the_newest_are_kept(tmp_path: Path) -> None:
    own = tmp_path / "own.key"
    lines = []
    for number in range(MAX_KEYS + 2):
        lines.append(bytes((number + i) % 256 for i in range(32)).hex())
        own.write_text(lines[-1] + "\n")
        keep_key(tmp_path, own)
    assert (tmp_path / KEYS_NAME).read_text().split() == lines[-MAX_KEYS:]
    keys = read_keys(tmp_path)
    assert keys is not None and len(keys.key_ids) == MAX_KEYS


def test_a_key_that_cannot_be_kept_is_told_and_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own.key"
    own.write_text("00" * 32)
    (tmp_path / KEYS_NAME).mkdir()
    keep_key(tmp_path, own)
    assert "the policy's key is not kept" in capsys.readouterr().err
