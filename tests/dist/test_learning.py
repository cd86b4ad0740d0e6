"""Commands to the optimizer on two ranks: equal everywhere, and a run that is stopped in the middle goes on the same."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.dist import jobs_resume as jobs
from tests.ranks import RankPool
from tolaria.step import LR_TAMPERED
from tolaria.telemetry.events import read_events

SCRIPT: list[tuple[int, str, dict[str, Any]]] = [
    (1, "germinate", {"slot": "first", "blueprint": "noisy"}),
    (1, "set_lr", {"group": "host", "lr": 0.007}),
    (2, "start_training", {"slot": "first"}),
    (2, "set_optimizer", {"group": "*", "weight_decay": 0.05, "beta2": 0.99, "clip_norm": 0.3}),
    (3, "freeze", {"group": "host"}),
    (3, "start_grafting", {"slot": "first"}),
    (4, "scale_lr", {"group": "seed/*", "factor": 0.5}),
    (5, "undo", {"group": "host"}),
    (5, "freeze", {"group": "seed/first"}),
    (6, "undo", {"group": "*"}),
    (7, "thaw", {"group": "*"}),
    (8, "undo", {"group": "host"}),
]
REFUSED = [(2, "set_lr", {"group": "host", "lr": 90.0}), (6, "set_optimizer", {"group": "host", "momentum": 0.5})]
FROZEN_AT = 11
"""A step with the host frozen, between two boundaries."""


def write_script(path: Path) -> str:
    entries = []
    for boundary, op, keys in [*SCRIPT, *REFUSED]:
        lines = [f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value}" for key, value in keys.items()]
        entries.append("\n".join(["[[command]]", f"boundary = {boundary}", f'op = "{op}"', *lines]))
    path.write_text("\n\n".join(entries))
    return str(path)


def test_freeze_set_and_undo_are_equal_on_both_ranks_and_through_a_stop(two_ranks: RankPool, tmp_path: Path) -> None:
    train = partial(two_ranks.run, "tests.dist.jobs_resume:train", script=write_script(tmp_path / "script.toml"))
    whole = train(folder=str(tmp_path / "whole"))
    assert [r["outcome"] for r in whole] == ["finished"] * 2
    assert len({r["digest"] for r in whole}) == 1
    applied = list(read_events(tmp_path / "whole" / "events.jsonl", "command_applied"))
    assert len(applied) == len(SCRIPT), list(read_events(tmp_path / "whole" / "events.jsonl", "command_refused"))
    refused = read_events(tmp_path / "whole" / "events.jsonl", "command_refused")
    assert sorted(event["code"] for event in refused) == ["lr_out_of_bounds", "unknown_parameter"]
    words = {event["what"] for event in applied}
    assert {"host: lr 0.007", "host: freeze", "*: undo", "*: weight_decay 0.05, beta2 0.99, clip_norm 0.3"} <= words

    stopped = train(folder=str(tmp_path / "run"), stop_step=FROZEN_AT, stop_rank=1)
    assert [(r["outcome"], r["steps"]) for r in stopped] == [("stopped", FROZEN_AT)] * 2
    resumed = train(folder=str(tmp_path / "run"), resume=True)
    assert [r["outcome"] for r in resumed] == ["finished"] * 2
    assert {r["digest"] for r in resumed} == {r["digest"] for r in whole}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_foreign_hand_on_one_rank_makes_both_conservative_and_changes_no_weight(
    two_ranks: RankPool, rank: int, tmp_path: Path
) -> None:
    train = partial(two_ranks.run, "tests.dist.jobs_learning:train_disturbed")
    quiet = train(folder=str(tmp_path / "quiet"), rank=-1, steps=[])
    disturbed = train(folder=str(tmp_path / "disturbed"), rank=rank, steps=[4, 5, 13])
    for ranks in (quiet, disturbed):
        assert [(r["outcome"], r["incidents"]) for r in ranks] == [("finished", 0)] * 2
        assert len({r["digest"] for r in ranks}) == 1
    assert {r["weights"] for r in disturbed} == {r["weights"] for r in quiet}

    def told(kind: str, *fields: str) -> list[tuple[Any, ...]]:
        events = read_events(tmp_path / "disturbed" / "events.jsonl", kind)
        return [tuple(event[field] for field in fields) for event in events]

    assert told("lr_violation", "rank", "step", "found") == [(rank, step, 0.5) for step in (4, 5, 13)]
    # Found at step 13, known to all ranks one step later; two healthy boundaries, three steps each, end it.
    assert told("lr_breaker_opened", "rank", "step", "reason") == [(0, 14, LR_TAMPERED)]
    modes = told("mode_changed", "step", "mode", "reason")
    assert modes == [(14, "conservative", LR_TAMPERED), (18, "normal", "healthy again")]
    assert jobs.BOUNDARY_STEPS == 3
