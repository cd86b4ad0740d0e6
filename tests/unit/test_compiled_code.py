"""Compiled code is kept between starts, and nothing of it is used that is not whole and this user's own."""

import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from tests.rig import alone
from tolaria.compiled_code import CompiledCode, compiled_code
from tolaria.config import CompileConfig, Config
from tolaria.telemetry.events import EventLog, read_events


def config_of(cache: str, *, enabled: bool = True) -> Config:
    return Config(compile=CompileConfig(enabled=enabled, cache=cache))


WHOLE = {"ab/code.so": b"\x7fELF" * 100, "fxgraph/entry": b"graph", "ab/code.lock": b""}


@pytest.fixture
def events(tmp_path: Path) -> Iterator[EventLog]:
    log = EventLog(tmp_path / "events.jsonl", 0, run_id="test")
    yield log
    log.close()


def code_of(tmp_path: Path, events: EventLog, *, name: str = "work", writes: bool = True) -> CompiledCode:
    return CompiledCode(tmp_path / "cache" / "machine.pack", tmp_path / name, writes, events)


def kept(tmp_path: Path, events: EventLog) -> CompiledCode:
    """A start that compiled and kept what `WHOLE` says."""
    code = code_of(tmp_path, events)
    code.take_up()
    for name, data in WHOLE.items():
        path = code.work / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    code.keep()
    return code


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def told(tmp_path: Path, kind: str) -> list[str]:
    return [event["reason"] for event in read_events(tmp_path / "events.jsonl", kind)]


def test_the_next_start_has_what_was_compiled_but_no_locks(tmp_path: Path, events: EventLog) -> None:
    kept(tmp_path, events)
    again = code_of(tmp_path, events, name="again")
    again.take_up()
    assert contents(again.work) == {name: data for name, data in WHOLE.items() if not name.endswith(".lock")}
    assert stat.S_IMODE(again.work.stat().st_mode) == stat.S_IMODE(again.pack.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(again.pack.stat().st_mode) == 0o600


def test_the_file_is_written_for_new_code_only_and_by_the_first_rank_only(tmp_path: Path, events: EventLog) -> None:
    code = kept(tmp_path, events)
    code.pack.unlink()
    code.keep()
    assert not code.pack.exists()
    (code.work / "new").write_bytes(b"more")
    other = code_of(tmp_path, events, writes=False)
    other.keep()
    assert not code.pack.exists()
    code.keep()
    assert code.pack.exists()


def truncate(pack: Path) -> None:
    pack.write_bytes(pack.read_bytes()[:-7])


def flip(pack: Path) -> None:
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.write_bytes(data)


def empty(pack: Path) -> None:
    pack.write_bytes(b"")


def open_file(pack: Path) -> None:
    pack.chmod(0o622)


def open_folder(pack: Path) -> None:
    pack.parent.chmod(0o777)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(truncate, "damaged"), (flip, "damaged"), (empty, "damaged"), (open_file, "others"), (open_folder, "others")],
)
def test_of_a_file_that_is_damaged_or_anybodys_nothing_is_used(
    damage: Callable[[Path], None], reason: str, tmp_path: Path, events: EventLog
) -> None:
    damage(kept(tmp_path, events).pack)
    again = code_of(tmp_path, events, name="again")
    again.take_up()
    assert contents(again.work) == {}
    (refused,) = told(tmp_path, "compile_cache_refused")
    assert reason in refused


def test_a_file_that_can_not_be_written_costs_an_event(tmp_path: Path, events: EventLog) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    kept(tmp_path, events)
    assert len(told(tmp_path, "compile_cache_not_kept")) == 1


def test_a_full_disk_leaves_the_former_file(tmp_path: Path, events: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    code = kept(tmp_path, events)
    before = code.pack.read_bytes()

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    (code.work / "new").write_bytes(b"more")
    code.keep()
    assert code.pack.read_bytes() == before and list(code.pack.parent.iterdir()) == [code.pack]
    assert "No space left" in told(tmp_path, "compile_cache_not_kept")[0]


def test_two_runs_that_write_at_once_leave_the_file_of_one_of_them(tmp_path: Path, events: EventLog) -> None:
    codes = []
    for number in range(2):
        code = code_of(tmp_path, events, name=f"run{number}")
        code.take_up()
        codes.append(code)

    def write(code: CompiledCode) -> None:
        for number in range(30):
            (code.work / f"{code.work.name}-{number}").write_bytes(os.urandom(2000))
            code.keep()

    writers = [threading.Thread(target=write, args=(code,)) for code in codes]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    again = code_of(tmp_path, events, name="again")
    again.take_up()
    assert contents(again.work) in [contents(code.work) for code in codes]
    assert told(tmp_path, "compile_cache_refused") == []


@pytest.mark.parametrize("before", [None, default_cache_dir()])  # torch sets the variable, too
def test_torch_compiles_into_it_and_elsewhere_afterwards(
    before: str | None, tmp_path: Path, events: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    if before is not None:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before)
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    with compiled_code(config_of("run"), run, "a" * 32, alone(), events) as code:
        assert code is not None and os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(code.work)
        assert code.pack.parent == tmp_path / "runs" / ".compile_cache"
        work = code.work
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before and not work.exists()
    with compiled_code(config_of(str(tmp_path / "own")), run, "a" * 32, alone(), events) as code:
        assert code is not None and code.pack.parent == tmp_path / "own"


@pytest.mark.parametrize("setting", ["run", "torch"])
def test_a_users_own_place_is_left_alone(
    setting: str, tmp_path: Path, events: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "theirs"))
    with compiled_code(config_of(setting), tmp_path / "run", "a" * 32, alone(), events) as code:
        assert code is None
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "theirs")


def test_an_eager_run_keeps_nothing(tmp_path: Path, events: EventLog) -> None:
    with compiled_code(config_of("run", enabled=False), tmp_path / "run", "a" * 32, alone(), events) as code:
        assert code is None
    assert not (tmp_path / ".compile_cache").exists()
