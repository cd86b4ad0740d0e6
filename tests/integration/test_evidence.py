"""`tolaria verify` and `tolaria audit` on a real run: it is sound, and whatever somebody does to it is found and named.

Every change is made to a copy; what is right is said by the run itself, untouched, in between.
"""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.integration.afterwards import EVIL, Steered, tolaria_here
from tests.integration.tampering import change_act, flip, place_of, records_of, rewrite
from tolaria.leyline.framing import new_key_file_text
from tolaria.orders.desk import KEY_NAME
from tolaria.recovery.wal import WalKind, WalRecord

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]


@pytest.fixture
def copy(steered: Steered, tmp_path: Path) -> Path:
    shutil.copytree(steered.run, tmp_path / "run")
    return tmp_path / "run"


def look(run: Path) -> dict[str, tuple[int, int, str]]:
    """Times, modes and bytes of everything in a folder."""
    found = {}
    for path in sorted(run.rglob("*")):
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(status.st_mode) else ""
        found[str(path)] = (status.st_mtime_ns, status.st_mode, content)
    return found


def verify(path: Path, *, code: int = 0) -> dict[str, list[str]]:
    """Faults by name."""
    told = json.loads(tolaria_here("verify", str(path), "--json", code=code))
    assert told["sound"] == (code == 0)
    return {each["name"]: each["faults"] for each in told["checked"]}


def audit(run: Path, *words: str, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tolaria_here("audit", str(run), *words, "--json", code=code))
    assert found["verdict"] == ("WRONG" if code else "verified") and bool(found["faults"]) == bool(code)
    return found


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "ckpt").iterdir(), key=lambda path: path.stat().st_mtime_ns)


# verify


def test_a_sound_run_is_sound_and_looking_changes_nothing(steered: Steered) -> None:
    before = look(steered.run)
    names = {path.name for path in checkpoints(steered.run)}
    assert verify(steered.run) == {name: [] for name in ("log", *names)}
    said = tolaria_here("verify", str(checkpoints(steered.run)[-1]))
    assert "sound" in said and "as the log says" in said and "all sound: 2 parts" in said
    audit(steered.run)
    assert look(steered.run) == before


def test_a_live_run_is_verified_without_disturbing_it(steered: Steered) -> None:
    assert steered.checked["sound"]
    assert len(steered.checked["checked"]) >= 2  # its log, and a checkpoint at least


TORCH_STREAM_BYTES = 5056
"""The last tensor of a shard: the rank's own random stream, which is no part of the replicated state."""


def flip_shard(path: Path) -> str:
    shard = path / "shard-00001.safetensors"
    flip(shard, shard.stat().st_size - TORCH_STREAM_BYTES - 5)
    return "shard-00001.safetensors: sha256 is not the one in the manifest"


def flip_header(path: Path) -> str:
    flip(path / "shard-00000.safetensors", 2)
    return "shard-00000.safetensors: sha256 is not the one in the manifest; header of"


def flip_state(path: Path) -> str:
    flip(path / "state-00000.json", 100)
    return "state-00000.json: sha256 is not the one in the manifest"


def cut_short(path: Path) -> str:
    file = path / "shard-00000.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    return "shard-00000.safetensors: "


def take_away(path: Path) -> str:
    (path / "state-00001.json").unlink()
    return "state-00001.json: No such file or directory"


def put_a_link(path: Path) -> str:
    file = path / "shard-00001.safetensors"
    os.replace(file, path.parent.parent / "elsewhere")
    file.symlink_to(path.parent.parent / "elsewhere")
    return "shard-00001.safetensors: "


def edit_manifest(path: Path) -> str:
    file = path / "MANIFEST.json"
    file.write_text(file.read_text().replace('"step": ', '"step":  '))
    return "MANIFEST.json: checksum: it is not as it was written"


def seal_it_again(path: Path) -> str:
    """Another shard, and a manifest that fits it: only the log, and the digest of the state, know better."""
    flip_shard(path)
    from tolaria.recovery.manifest import seal  # noqa: PLC0415 - what this one needs

    file = path / "MANIFEST.json"
    document = json.loads(file.read_text())
    document.pop("checksum")
    shard = path / "shard-00001.safetensors"
    document["files"][shard.name]["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
    file.write_bytes(seal(document))
    return "MANIFEST.json: not the one in the run's log"


@pytest.mark.parametrize(
    "harm", [flip_shard, flip_header, flip_state, cut_short, take_away, put_a_link, edit_manifest, seal_it_again]
)
def test_every_harm_to_a_checkpoint_is_named(copy: Path, harm: Callable[[Path], str]) -> None:
    victim = checkpoints(copy)[1]
    expected = harm(victim)
    found = verify(copy, code=74)
    assert any(fault.startswith(expected) for fault in found[victim.name]), found
    assert [name for name, faults in found.items() if faults] == [victim.name]
    alone = tolaria_here("verify", str(victim), code=74)
    assert "DAMAGED" in alone and expected.partition(":")[0] in alone


def test_without_a_log_the_digest_of_the_state_tells_a_checkpoint_that_was_sealed_again(copy: Path) -> None:
    victim = checkpoints(copy)[1]
    seal_it_again(victim)
    shutil.rmtree(copy / "wal")
    assert verify(victim, code=74)[victim.name] == ["the digest of the whole state is not the one in the manifest"]


def test_a_broken_log_and_leftovers_are_told_apart(copy: Path) -> None:
    path, at, size = place_of(copy, WalKind.DECISION)
    flip(path, at + size - 1)
    (copy / "ckpt" / "c900-s900.tmp").mkdir()
    os.rename(checkpoints(copy)[0], copy / "ckpt" / (checkpoints(copy)[0].name + ".bad"))
    said = tolaria_here("verify", str(copy), code=74)
    assert "are damaged, and sound records follow" in said
    assert "left by a crash; the next start removes it" in said and "set aside" in said
    assert "1 of " in said


def test_what_is_no_run_and_no_checkpoint_is_said(tmp_path: Path) -> None:
    assert "no such directory" in tolaria_here("verify", str(tmp_path / "nowhere"), code=73)
    assert "neither a run directory nor a checkpoint" in tolaria_here("verify", str(tmp_path), code=73)


# audit


def test_the_story_has_who_what_why_and_what_came_of_it(steered: Steered) -> None:
    found = audit(steered.run)
    told = {entry["what"]: entry for entry in found["entries"]}
    policy = told["germinate mid with residual_mlp"]
    assert (policy["who"], policy["why"]) == ("policy", EVIL) and policy["effect"].startswith("applied at step 10")
    halved = told["host*: lr x0.5"]
    assert (halved["why"], halved["proof"], halved["step"]) == (EVIL, "verified", steered.told["halved"].step)
    assert "lr_out_of_bounds" in told["*: lr x1e+09"]["effect"]
    assert told["pause"]["who"] == "somebody" and told["pause"]["why"] == "lunch"
    returns = [entry for entry in found["entries"] if entry["sort"] == "return"]
    assert ["non finite" in r["why"] for r in returns] == [True, False] and "it was better there" in returns[1]["why"]
    assert halved["void"] and "void since the return" in halved["effect"]
    assert found["orders"]["verified"] == 6 and found["orders"]["no_key"] == 0
    assert found["policy"]["verified"] >= 8
    said = tolaria_here("audit", str(steered.run))
    assert "signed orders: 6 verified" in said and "\x1b" not in said


def test_without_the_keys_it_says_that_nothing_can_be_verified(copy: Path, tmp_path: Path) -> None:
    key = tmp_path / "operator.key"
    os.rename(copy / KEY_NAME, key)
    (copy / "policy.keys").unlink()
    found = audit(copy)
    assert (found["orders"]["verified"], found["orders"]["no_key"]) == (0, 6)
    assert found["policy"]["verified"] == 0 and found["policy"]["no_key"] > 0
    assert "not verifiable" in tolaria_here("audit", str(copy))
    assert audit(copy, "--key-file", str(key))["orders"]["verified"] == 6
    foreign = tmp_path / "foreign.key"
    foreign.write_text(new_key_file_text())
    foreign.chmod(0o600)
    assert audit(copy, "--key-file", str(foreign))["orders"]["no_key"] == 6


def one_byte(run: Path) -> str:
    path, at, size = place_of(run, WalKind.ACT)
    flip(path, at + size // 2)
    return f"{path.name}: bytes {at} to {at + size} are damaged"


def the_end_is_cut_off(run: Path) -> str:
    last = records_of(run)[-1]
    path, at, _ = place_of(run, last.kind)
    with path.open("r+b") as file:
        file.truncate(at)
    return f"the log ends at record {last.lsn - 1}, but record {last.lsn} was durable"


def one_record_altered(run: Path) -> str:
    """With its own sum made right: the next record's link still is that of the one that was there."""
    path, at, size = place_of(run, WalKind.APPLIED)
    raw = path.read_bytes()
    from tolaria.recovery.wal.records import encode, record_at  # noqa: PLC0415 - what this one needs

    found = record_at(raw, at)
    assert found is not None
    record, prev, _ = found
    body = record.body.replace(b'"boundary":1', b'"boundary":2')
    new = encode(WalRecord(record.lsn, record.start, record.kind, body), prev)
    assert len(new) == size and new != raw[at : at + size]
    path.write_bytes(raw[:at] + new + raw[at + size :])
    return f"{path.name}: record {record.lsn + 1} "


def two_records_swapped(run: Path) -> str:
    def swapped(records: list[WalRecord]) -> list[WalRecord]:
        return [*records[:4], records[5], records[4], *records[6:]]

    rewrite(run, swapped, renumber=False)
    return f"{1:020d}.log: record 6 stands where 5 should"


def one_mac(run: Path) -> str:
    def altered(body: dict[str, Any]) -> None:
        body["frame"] = body["frame"][:-1] + ("0" if body["frame"][-1] != "0" else "1")

    change_act(run, altered)
    return "act 1 (record "


def another_operator(run: Path) -> str:
    change_act(run, lambda body: body.update(operator="nobody"))
    return "act 1 (record "


def another_command(run: Path) -> str:
    """The one who has the right to write makes the policy's command another, and the log whole again."""

    def changed(records: list[WalRecord]) -> list[WalRecord]:
        return [
            WalRecord(r.lsn, r.start, r.kind, r.body.replace(b"residual_mlp", b"residual_xyz"))
            if r.kind == WalKind.DECISION
            else r
            for r in records
        ]

    rewrite(run, changed)
    return "record "


def an_act_hidden(run: Path) -> str:
    """Its records taken out, and the log made whole again: the ranks' events still tell of it."""

    def changed(records: list[WalRecord]) -> list[WalRecord]:
        hidden = [r for r in records if r.kind in (WalKind.ACT, WalKind.ACTED) and r.document["act"] == 2][:2]
        return [r for r in records if r not in hidden]

    rewrite(run, changed)
    return "events.jsonl: step "


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (one_byte, "sound records follow"), (the_end_is_cut_off, "its end is missing"),
        (one_record_altered, "does not follow from record"), (two_records_swapped, "5 to 5 are lost"),
        (one_mac, "the signature of its order is wrong: mac"), (another_operator, "another operator than the order"),
        (another_command, "commands that no reply had"), (an_act_hidden, "the log does not know it"),
    ],
)  # fmt: skip
def test_every_change_to_the_log_is_found_and_named(copy: Path, harm: Callable[[Path], str], says: str) -> None:
    expected = harm(copy)
    faults = audit(copy, code=1)["faults"]
    assert any(fault.startswith(expected) and says in fault for fault in faults), faults
    said = tolaria_here("audit", str(copy), code=1)
    assert "WRONG" in said and says in said


def test_frames_of_the_policy_altered_swapped_and_cut_short(copy: Path) -> None:
    path = copy / "policy_frames.bin"
    raw = path.read_bytes()
    starts = [at for at in range(len(raw)) if raw[at : at + 4] == b"TLYR"]
    flip(path, starts[3] - 1)
    assert any("frame 3" in fault and "altered on the disk" in fault for fault in audit(copy, code=1)["faults"])
    first, second, third = (raw[a:b] for a, b in pairwise(starts[:4]))
    path.write_bytes(third + second + first + raw[starts[3] :])
    assert any("is less than that before" in fault for fault in audit(copy, code=1)["faults"])
    path.write_bytes(raw[: starts[2] - 9] + raw[starts[2] :])
    assert any("no frame: damaged, or cut short" in fault for fault in audit(copy, code=1)["faults"])


def test_a_run_without_a_log_is_said_to_have_none(copy: Path) -> None:
    shutil.rmtree(copy / "wal")
    assert "has no log" in tolaria_here("audit", str(copy), code=73)
