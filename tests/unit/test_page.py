"""The page: alarms between processes, and what the watchdog makes of the ranks' lines."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tolaria import emergency
from tolaria.recovery.no_page import NoPage
from tolaria.recovery.page import LINE_WORDS, OPERATOR, Page, Phase, RankLine
from tolaria.recovery.pulse import Pulse
from tolaria.recovery.watchdog import culprit, overdue, waits_for_others

LIMITS = {"heartbeat": 2.0, "step": 10.0, "boundary": 100.0}


@pytest.fixture
def page(tmp_path: Path):
    with_two = Page.create(tmp_path / "page", local_ranks=2)
    yield with_two
    with_two.close()


def other(page: Page, line: int) -> Page:
    return Page.attach(page.path, line=line)


def test_levels_only_rise_until_cleared_and_the_highest_is_seen_by_all(page: Page) -> None:
    second, operator = other(page, 3), other(page, OPERATOR)
    second.raise_level(3, "spike")
    page.raise_level(2, "drift")
    second.raise_level(1, "less")
    assert [p.level() for p in (page, second, operator)] == [3, 3, 3]
    assert page.reason() == "spike"
    operator.raise_level(4, "disk")
    second.clear(3)
    assert (page.level(), page.reason()) == (4, "disk")
    page.clear(3)
    assert page.level() == 4
    page.clear()
    assert (second.level(), second.reason()) == (0, "")
    second.close()
    operator.close()


@pytest.mark.parametrize("level", [0, 5, -1])
def test_there_is_no_such_level(page: Page, level: int) -> None:
    for either in (page, NoPage()):
        with pytest.raises(ValueError, match="expected 1 to 4"):
            either.raise_level(level, "")


def test_a_half_written_alarm_is_not_seen(page: Page) -> None:
    page.raise_level(3, "spike")
    at = 2 * LINE_WORDS + 12
    whole = list(page._words[at : at + 4])
    for word, value in ((0, whole[0] + 1), (1, 4), (2, 0), (3, 7)):
        page._words[at + word] = value
        assert page.level() == 0
        page._words[at + word] = whole[word]
    assert page.level() == 3
    page._words[at] = whole[0] + 1  # whose writer died in the middle
    page.raise_level(2, "again")
    assert (page.level(), page.reason()) == (2, "again")


def test_a_token_grows_with_every_alarm(page: Page) -> None:
    seen = [page.token()]
    for act in (lambda: page.raise_level(1, "a"), lambda: page.raise_level(2, "b"), page.clear):
        act()
        seen.append(page.token())
    assert seen == sorted(set(seen))


@pytest.mark.processes
def test_many_processes_raise_at_once_and_nothing_is_torn(page: Page) -> None:
    code = (
        "import sys, time; from pathlib import Path; from tolaria.recovery.page import Page\n"
        "p = Page.attach(Path(sys.argv[1]), line=int(sys.argv[2]))\n"
        "end, i = time.monotonic() + 1, 0\n"
        "while time.monotonic() < end or i < 3000:\n"
        "    i += 1; level = 1 + i % 4; p.raise_level(level, str(level) * 100); p.clear()\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(page.path), str(line)]) for line in (1, 3)]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        for line in (1, 3):
            seen.add(page._alarm(line))
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len(seen) > 3
    assert seen <= {(0, ""), *((level, str(level) * 100) for level in range(1, 5))}


def test_no_page_keeps_its_own_level() -> None:
    page = NoPage()
    page.enter(Phase.STEP, 1)
    page.raise_level(3, "a")
    page.raise_level(2, "b")
    assert (page.level(), page.reason()) == (3, "a")
    page.clear(2)
    assert page.level() == 3
    page.clear()
    assert page.level() == 0


@pytest.mark.parametrize("content", [b"", b"x" * 4096])
def test_another_file_is_not_a_page(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "page").write_bytes(content)
    with pytest.raises(ValueError, match=r"too short|not a page"):
        Page.attach(tmp_path / "page", line=2)


def test_a_pulse_beats_and_acknowledges(page: Page) -> None:
    page.sign_in(1)
    pulse = Pulse(page).start()
    before = page.rank_line(0).heartbeat_ns
    page.raise_level(3, "spike")
    token, end = page.token(), time.monotonic() + 5
    while page.rank_line(0).ack < token and time.monotonic() < end:
        time.sleep(0.005)
    pulse.stop()
    assert page.rank_line(0).ack == token
    assert page.rank_line(0).heartbeat_ns > before


def line(*, phase: Phase = Phase.STEP, silent_s: float = 0, spent_s: float = 0, step: int = 5) -> RankLine:
    now = 10**12
    return RankLine(1, 1, now - int(silent_s * 1e9), phase, now - int(spent_s * 1e9), step, 0, 0, False)


@pytest.mark.parametrize(("found", "says"), [
    (line(), None),
    (line(silent_s=1.9, spent_s=9.9), None),
    (line(silent_s=2.1), "no heartbeat for 2.1 s"),
    (line(spent_s=11), "in STEP at step 5 for 11.0 s, where 10 s are allowed"),
    (line(phase=Phase.BOUNDARY, spent_s=11), None),
    (line(phase=Phase.HALTED, spent_s=10**4), None),
])  # fmt: skip
def test_when_a_rank_is_overdue(found: RankLine, says: str | None) -> None:
    reason = overdue(found, 10**12, LIMITS)
    assert reason is None if says is None else reason is not None and says in reason


def stack(*frames: str) -> str:
    """A Python stack as faulthandler writes it, innermost frame first."""
    return "\n".join(["Current thread 0x1 (most recent call first):", *(f"  File {frame}" for frame in frames)]) + "\n"


LOOP = '"/y/tolaria/loop.py", line 3 in run'
WAITS = stack('"/x/torch/distributed/distributed_c10d.py", line 1 in all_reduce', LOOP)
COMPUTES = stack('"/u/my_data.py", line 9 in __getitem__', LOOP)


def test_who_is_to_blame() -> None:
    assert waits_for_others(WAITS) and not waits_for_others(COMPUTES)
    lines = {0: line(step=5), 1: line(step=5), 2: line(step=4)}
    late = dict.fromkeys(lines, "late")
    assert culprit(lines, late, {0: WAITS, 1: COMPUTES, 2: WAITS}, set()) == 1
    assert culprit(lines, late, {0: WAITS, 1: COMPUTES, 2: WAITS}, {0}) == 0
    assert culprit(lines, late, {0: WAITS, 1: WAITS, 2: WAITS}, set()) == 2


def test_the_operator_raises_looks_and_clears(page: Page, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page.sign_in(1)
    second = other(page, 3)
    second.sign_in(1)
    pulses = [Pulse(page).start(), Pulse(second).start()]
    (tmp_path / "PAGE").write_text(f"{page.path}\n")
    assert emergency.main([str(tmp_path), "halt", "--reason", "disk"]) == 0
    assert (page.level(), page.reason()) == (4, "operator: disk")
    assert "rank 1 of this machine: seen after" in capsys.readouterr().out
    assert emergency.main([str(tmp_path), "status"]) == 0
    assert capsys.readouterr().out == "level 4: operator: disk\n"
    assert emergency.main([str(tmp_path), "clear"]) == 0
    assert page.level() == 0
    for pulse in pulses:
        pulse.stop()
    second.close()
    assert emergency.main([str(tmp_path / "nowhere"), "halt"]) == 73
    assert "no run is running here" in capsys.readouterr().err
