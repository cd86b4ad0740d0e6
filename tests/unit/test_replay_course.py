"""What a run's log says of where it ended, what is taken from it for a replay, and where two runs differ."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.run_on_disk import Unsynced
from tolaria.errors import RunDirError, WalError
from tolaria.leyline.codec import decode_decision, encode_command, encode_decision
from tolaria.leyline.types import Command, Decision
from tolaria.recovery.timeline import Return, Timeline
from tolaria.recovery.wal import Wal, WalKind, WalRecord
from tolaria.replay.course import read_course
from tolaria.replay.trace import Place, differences, trace_of, unknown_place
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policy import with_identity
from tolaria.view.files import RunFiles

FS = Unsynced()


def signed(command: Command, name: str) -> bytes:
    return encode_command(with_identity(command, name, issued_by="test", issued_at_ns=1))


def decision(boundary: int, *commands: bytes) -> bytes:
    return encode_decision(
        Decision(
            boundary=boundary, step_effective=10 * boundary, source="policy", reason="answered", conservative=False,
            commands=commands,
        )
    )  # fmt: skip


def returned(branch: int, to_boundary: int, from_step: int, to_acts: int = 0) -> dict[str, Any]:
    return Return(
        branch=branch, to_step=10 * to_boundary, to_boundary=to_boundary, from_step=from_step, at_boundary=1, level=3,
        cause="loss_spike", reason="spike", to_acts=to_acts,
    ).to_json()  # fmt: skip


def act(number: int, step: int, action: str, command: bytes = b"") -> dict[str, Any]:
    return {"act": number, "step": step, "action": action, "order_id": f"o{number}", "command": command.hex()}


def run_of(folder: Path, *records: tuple[WalKind, Any], ranks: tuple[int, ...] = (2,), begins: int = 0) -> RunFiles:
    """A run directory with this log, one start for each number of ranks, and no word of how it ended."""
    for at, count in enumerate(ranks):
        wal, _ = Wal.open(
            folder / "wal", run_id="run", generation="g", facts={"ranks": count}, fs=FS, check_owner=lambda: None
        )
        if at == 0:
            wal.append(WalKind.START, {"step": begins, "branch": 0, "agent": None})
            for kind, body in records:
                wal.append(kind, body)
        wal.close()
    return RunFiles(folder)


def test_a_run_that_ended_in_order_is_compared_with_its_summary(tmp_path: Path) -> None:
    files = run_of(tmp_path, (WalKind.DECISION, decision(1)), (WalKind.CLOSE, {}))
    summary = {"outcome": "stopped", "steps": 14, "state_digest": {"0": "aa", "1": "aa"}, "seconds": 2.5}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    course = read_course(files, FS)
    assert (course.outcome, course.step, course.until) == ("stopped", 14, 14)
    assert (course.digests, course.source, course.world_size) == ({0: "aa", 1: "aa"}, "summary.json", 2)
    (tmp_path / "summary.json").write_text(json.dumps({**summary, "outcome": "finished"}))
    assert read_course(files, FS).until == 0  # it comes to its own end


def test_the_summary_of_an_earlier_start_is_not_taken_for_the_end(tmp_path: Path) -> None:
    files = run_of(
        tmp_path, (WalKind.DECISION, decision(1)), (WalKind.CLOSE, {}),
        (WalKind.START, {"step": 10, "branch": 0, "agent": None}), (WalKind.DECISION, decision(2)),
    )  # fmt: skip
    (tmp_path / "summary.json").write_text(
        json.dumps({"outcome": "stopped", "steps": 10, "state_digest": {"0": "aa"}, "seconds": 1.0})
    )
    course = read_course(files, FS)
    assert (course.outcome, course.step, course.digests, course.starts) == ("cut off", 20, {}, 2)


def test_nothing_that_a_start_would_load_is_taken_from_the_log(tmp_path: Path) -> None:
    course = read_course(
        run_of(
            tmp_path, (WalKind.DECISION, decision(1)), (WalKind.SIGNAL, {"mark": 3}), (WalKind.HALT, {"reason": "x"}),
            (WalKind.CHECKPOINT, {"seq": 0, "step": 10, "branch": 0, "manifest_sha256": "00"}),
            (WalKind.GOOD, {"seq": 0, "step": 10}), (WalKind.VOID, returned(1, 1, 15)),
            (WalKind.DECISION, decision(2)),
        ),
        FS,
    )  # fmt: skip
    assert [record.kind.name for record in course.records] == ["DECISION", "VOID", "DECISION"]
    assert [back.from_step for back in course.returns] == [15]


def test_a_replay_does_not_stand_still_where_the_run_did(tmp_path: Path) -> None:
    records = [(WalKind.DECISION, decision(1)), (WalKind.ACT, act(1, 12, "pause")), (WalKind.ACT, act(2, 12, "resume"))]
    course = read_course(run_of(tmp_path, *records, (WalKind.DECISION, decision(2))), FS)
    acts = Timeline.of(course.records).acts
    assert [(a.number, (a.body or {})["action"]) for a in acts.values()] == [(1, "resume"), (2, "resume")]


def test_a_return_that_failed_is_not_asked_for_again_and_one_that_was_made_stands(tmp_path: Path) -> None:
    back = signed(do.rollback(), "b")
    failed = run_of(
        tmp_path / "failed", (WalKind.DECISION, decision(1, back)), (WalKind.ACT, act(1, 12, "command", back)),
        (WalKind.DECISION, decision(2)),
    )  # fmt: skip
    standing = Timeline.of(read_course(failed, FS).records)
    assert decode_decision(standing.decisions[1]).commands == ()
    assert (standing.acts[1].body or {})["action"] == "resume"
    made = run_of(
        tmp_path / "made", (WalKind.DECISION, decision(1)), (WalKind.DECISION, decision(2, back)),
        (WalKind.VOID, returned(1, 1, 20)), (WalKind.DECISION, decision(2)),
    )  # fmt: skip
    records = read_course(made, FS).records
    assert [decode_decision(r.body).commands for r in records if r.kind == WalKind.DECISION] == [(), (back,), ()]


@pytest.mark.parametrize(
    ("ranks", "begins", "why"),
    [((2, 4), 0, "on 2 and 4 ranks in turns"), ((2,), 30, "began at step 30, from a checkpoint of another run")],
)
def test_a_run_that_no_replay_could_follow_is_refused(
    tmp_path: Path, ranks: tuple[int, ...], begins: int, why: str
) -> None:
    files = run_of(tmp_path, (WalKind.DECISION, decision(1)), ranks=ranks, begins=begins)
    with pytest.raises(RunDirError, match=why):
        read_course(files, FS)


def test_a_run_without_a_log_or_with_a_damaged_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="no log of decisions"):
        read_course(RunFiles(tmp_path), FS)
    files = run_of(tmp_path, (WalKind.DECISION, decision(1)))
    segment = next((tmp_path / "wal").glob("*.log"))
    segment.write_bytes(segment.read_bytes()[:90])
    with pytest.raises(WalError, match="damaged or missing"):
        read_course(files, FS)


# Traces


def write(folder: Path, name: str, *lines: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def boundary(number: int, loss: float, rank: int = 0) -> dict[str, Any]:
    return {
        "kind": "boundary", "rank": rank, "step": 10 * number, "boundary": number, "train_loss": loss, "val_loss": loss,
        "val_accuracy": 0.5, "metrics": {}, "mode": "normal", "seeds": {},
    }  # fmt: skip


def log(*records: tuple[WalKind, Any]) -> list[WalRecord]:
    plain = ((kind, body if isinstance(body, bytes) else json.dumps(body).encode()) for kind, body in records)
    return [WalRecord(at, 1, kind, body) for at, (kind, body) in enumerate(plain, 1)]


def applied(number: int, digest: str) -> dict[str, Any]:
    return {"boundary": number, "applied": ["c"], "refused": {}, "digest": digest}


def test_what_a_return_made_void_is_not_compared(tmp_path: Path) -> None:
    back = {"kind": "went_back", "rank": 0, "step": 10, "to_step": 10}
    write(
        tmp_path, "events.jsonl", boundary(1, 1.0), boundary(2, 9.0), back, boundary(2, 2.0), boundary(3, 9.0, rank=1)
    )
    records = log(
        (WalKind.DECISION, decision(1)), (WalKind.APPLIED, applied(1, "aa")), (WalKind.DECISION, decision(2)),
        (WalKind.APPLIED, applied(2, "bb")), (WalKind.VOID, returned(1, 1, 20)), (WalKind.DECISION, decision(2)),
    )  # fmt: skip
    found = trace_of(RunFiles(tmp_path), records, 30)
    assert found[Place(20, 1, 2, "validation loss")] == 2.0
    assert [p.number for p in found if p.kind == "command"] == [1]
    assert {p.step for p in trace_of(RunFiles(tmp_path), records, 10)} == {10}


def test_differences_come_in_the_order_of_the_run_with_what_was_decided_there(tmp_path: Path) -> None:
    changed = signed(do.scale_lr("host", 0.5), "c")
    records = log((WalKind.DECISION, decision(1, changed)), (WalKind.APPLIED, applied(1, "aa")))
    other = [*records[:1], *log((WalKind.APPLIED, applied(1, "bb")))]
    write(tmp_path / "a", "metrics.jsonl", {"step": 5, "loss_rank0": 1.0}, {"step": 15, "loss_rank0": 1.0})
    write(tmp_path / "b", "metrics.jsonl", {"step": 5, "loss_rank0": 1.0}, {"step": 15, "loss_rank0": 1.5})
    one = trace_of(RunFiles(tmp_path / "a"), records, 20)
    two = trace_of(RunFiles(tmp_path / "b"), other, 20) | {unknown_place(12, 0, "an incident"): "spike"}
    found = differences(one, two, records)
    assert [d.place.in_words() for d in found] == [
        "boundary 1 (step 10): structure after its commands",
        "step 12: an incident",
        "step 15: loss of rank 0's samples",
    ]
    assert found[0].commands == ("host: lr x0.5",) and (found[2].recorded, found[2].replayed) == (1.0, 1.5)
    assert differences(one, one, records) == []
