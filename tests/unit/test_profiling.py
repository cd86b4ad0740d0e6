"""The profiler beside a loop: which steps it traces, what it writes, and that it never stops anybody."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rig import alone
from tolaria.config_profile import ProfileConfig
from tolaria.phases import unseen
from tolaria.profiling import Profiler, Unprofiled, join_pages, make_profiler
from tolaria.telemetry.events import EventLog, read_events


@pytest.fixture
def events(tmp_path: Path) -> Iterator[EventLog]:
    log = EventLog(tmp_path / "events.jsonl", 0, run_id="r")
    yield log
    log.close()


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")


def profiler(run: Path, events: EventLog, **settings: Any) -> Profiler:
    made = make_profiler(ProfileConfig(enabled=True, **settings), events, run, alone())
    assert isinstance(made, Profiler)
    return made


def train(traced: Unprofiled, steps: int, *, boundary_steps: int = 0) -> None:
    """A loop in miniature."""
    for step in range(steps):
        traced.step(step)
        with traced.phases("forward"):
            torch.ones(10).sum()
        if boundary_steps and (step + 1) % boundary_steps == 0:
            with traced.phases("boundary"):
                torch.zeros(10).cumsum(0)


def ranges(path: Path) -> list[str]:
    found = [e for e in json.loads(path.read_text())["traceEvents"] if str(e.get("name")).startswith("tolaria/")]
    return [e["name"].removeprefix("tolaria/") for e in sorted(found, key=lambda e: e["ts"])]


def test_the_chosen_steps_are_traced_and_no_others(tmp_path: Path, events: EventLog) -> None:
    traced = profiler(tmp_path, events, after_steps=3, steps=2)
    train(traced, 8)
    folder = tmp_path / "profile"
    assert ranges(folder / "rank0.json") == ["step 3", "forward", "step 4", "forward"]
    assert sorted(p.name for p in folder.iterdir()) == ["rank0.json", "rank0.txt"]
    (told,) = read_events(tmp_path / "events.jsonl")
    assert (told["kind"], told["path"]) == ("profile_written", str(folder / "rank0.json"))
    traced.close()


def test_a_boundary_that_came_in_no_traced_step_is_traced_by_itself_once(tmp_path: Path, events: EventLog) -> None:
    traced = profiler(tmp_path, events, after_steps=2, steps=2)
    train(traced, 15, boundary_steps=6)
    assert ranges(tmp_path / "profile" / "rank0-boundary.json") == ["boundary"]
    assert len(list(read_events(tmp_path / "events.jsonl", "profile_written"))) == 2
    text = (tmp_path / "profile" / "rank0.txt").read_text()
    assert re.search(r"^rank 0, step 2 to 3$", text, re.MULTILINE)
    assert re.search(r"^rank 0, one boundary$", text, re.MULTILINE)
    assert re.search(r"^  boundary +[\d.]+ +100\.0%$", text, re.MULTILINE)


def test_a_boundary_in_the_traced_steps_is_not_traced_again(tmp_path: Path, events: EventLog) -> None:
    train(profiler(tmp_path, events, after_steps=2, steps=4), 12, boundary_steps=4)
    assert ranges(tmp_path / "profile" / "rank0.json").count("boundary") == 1
    assert not (tmp_path / "profile" / "rank0-boundary.json").exists()


def test_what_a_boundary_raises_is_passed_on_and_its_trace_is_whole(tmp_path: Path, events: EventLog) -> None:
    traced = profiler(tmp_path, events, after_steps=1, steps=1)
    train(traced, 3)
    with pytest.raises(KeyError, match="from within"), traced.phases("boundary"):
        raise KeyError("from within")
    assert ranges(tmp_path / "profile" / "rank0-boundary.json") == ["boundary"]


def test_a_run_that_ends_early_leaves_what_was_traced(tmp_path: Path, events: EventLog) -> None:
    traced = profiler(tmp_path, events, after_steps=2, steps=10)
    train(traced, 4)
    traced.close()
    traced.close()
    assert ranges(tmp_path / "profile" / "rank0.json") == ["step 2", "forward", "step 3", "forward"]
    short = profiler(tmp_path / "short", events, after_steps=5, steps=10)
    train(short, 4)
    short.close()
    assert not (tmp_path / "short").exists()


def test_a_profiler_that_cannot_write_is_an_event_and_training_goes_on(tmp_path: Path, events: EventLog) -> None:
    (tmp_path / "profile").write_text("a file where the folder is to be")
    train(profiler(tmp_path, events, after_steps=2, steps=2), 8, boundary_steps=3)
    (failed,) = read_events(tmp_path / "events.jsonl")
    assert (failed["kind"], failed["level"]) == ("profile_failed", "warning")
    assert failed["reason"].startswith("FileExistsError")


def test_a_trace_that_the_disk_cut_off_is_none(
    tmp_path: Path, events: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.profiler.profile.export_chrome_trace

    def cut_off(traced: torch.profiler.profile, path: str) -> None:
        whole(traced, path)
        Path(path).write_text(Path(path).read_text()[:2000])

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", cut_off)
    train(profiler(tmp_path, events, after_steps=2, steps=2), 8)
    (failed,) = read_events(tmp_path / "events.jsonl")
    assert failed["kind"] == "profile_failed"
    assert list((tmp_path / "profile").iterdir()) == []
    with torch.profiler.profile():  # nothing is left running
        pass


def test_a_rank_that_is_not_traced_pays_one_look_up(tmp_path: Path, events: EventLog) -> None:
    for config in (ProfileConfig(), ProfileConfig(enabled=True, ranks="1,2")):
        untraced = make_profiler(config, events, tmp_path, alone())
        assert type(untraced) is Unprofiled
        assert untraced.phases is unseen
        train(untraced, 30)
        untraced.close()
    assert join_pages(tmp_path) is None
    assert not (tmp_path / "profile").exists()


def test_the_pages_of_all_ranks_are_joined_in_the_order_of_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "profile"
    folder.mkdir()
    for rank in (10, 2, 0):
        (folder / f"rank{rank}.txt").write_text(f"rank {rank}\n")
    summary = join_pages(tmp_path)
    assert summary == folder / "summary.txt"
    assert summary.read_text().split("\n\n\n") == ["rank 0", "rank 2", "rank 10\n"]


@pytest.mark.parametrize("ranks", ["", "one", "0,,1", "-1", "ALL"])
def test_ranks_that_are_none_are_refused(ranks: str) -> None:
    with pytest.raises(ValueError, match=r"profile\.ranks"):
        ProfileConfig(ranks=ranks)
