"""The benchmarks of growth and of the start run, and what they write is whole. Their times are nobody's verdict."""

from pathlib import Path

import pytest

from benchmarks.headlines import headlines
from tests.benchmark import quick


@pytest.mark.processes
@pytest.mark.timeout(200)
def test_the_growth_pause_is_told_for_every_command_and_number_of_ranks(tmp_path: Path) -> None:
    printed, found = quick("growth_pause", tmp_path)
    rows = found["rows"]
    assert [(r["ranks"], r["command"]) for r in rows] == [
        (ranks, command) for ranks in (1, 2) for command in ("germinate", "train", "graft")
    ]
    for row in rows:
        parts = sum(row[part] for part in ("plan", "change", "digest", "trial"))
        assert row["pause"] > 0 and parts < 2 * row["pause"]  # of medians
        assert row["first"] > 0 and row["step"] > 0
        assert row["graphs"] == 0
    longest = {h.what: (h.value, h.budget) for h in headlines("growth_pause", found)}
    assert longest["longest pause to grow, 0.3 M, 2 ranks: eager"] == (max(r["pause"] for r in rows[3:]), 100)
    assert found["budget_ms"] == 100 and "torch" in found["machine"] and "germinate" in printed


@pytest.mark.processes
@pytest.mark.timeout(200)
def test_the_start_is_split_into_parts_that_make_up_its_total(tmp_path: Path) -> None:
    printed, found = quick("startup", tmp_path)
    assert [(r["side"], r["code"], r["ranks"]) for r in found["rows"]] == [
        ("first", "eager", 1),
        ("restart", "eager", 1),
    ]
    for row in found["rows"]:
        parts = [row[part] for part in ("import", "group", "build", "compile", "step")]
        assert all(part > 0 for part in parts)
        assert sum(parts) == pytest.approx(row["total"])
    assert "restart" in printed
    assert [h.value for h in headlines("startup", found)] == [row["total"] for row in found["rows"]]
