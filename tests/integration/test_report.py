"""The page of a real run in a real browser, and what foreign text and long runs can do to it: nothing."""

import json
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

from tests.browser import BROWSER, show
from tests.integration.afterwards import EVIL, Steered, tolaria_here
from tests.torchrun import ROOT

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

SECTIONS = ("loss", "accuracy", "seeds", "commands", "recoveries", "rates", "boundaries", "goodput", "ranks",
            "checkpoints", "configuration", "versions")  # fmt: skip
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here to open the page with")


@pytest.fixture(scope="module")
def page(steered: Steered) -> Path:
    told = json.loads(tolaria_here("report", str(steered.run), "--json"))
    found = Path(told["page"])
    assert found == steered.run / "report.html" and told["bytes"] == found.stat().st_size
    assert (found.stat().st_mode & 0o777) == 0o600
    return found


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_browser_shows_all_of_it_without_a_complaint_or_a_request(page: Path, width: int, dark: bool) -> None:
    shown = show(page, width=width, dark=dark)
    assert (shown.console, shown.asked) == ([], [])
    assert all(f'<section id="{name}">' in shown.dom for name in SECTIONS)
    assert "<title>steered: stopped</title>" in shown.dom  # what the policy's reason would have changed
    assert "&lt;script&gt;document.title='owned'&lt;/script&gt;" in shown.dom


@needs_browser
def test_the_browser_would_have_told(tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="https://example.org/x.png"><script>console.error("heard")</script>')
    shown = show(bad)
    assert shown.asked == ["https://example.org/x.png"] and "heard" in shown.console[0]


def test_foreign_text_is_text_and_nothing_comes_from_elsewhere(page: Path) -> None:
    html = page.read_text()
    assert EVIL not in html and "<script" not in html and "<img" not in html and "javascript:" not in html
    assert html.count("&lt;script&gt;") >= 2  # the policy's and the person's
    assert set(re.findall(r'(?:src|href)="([^#"][^"]*)"', html)) == {"data:,"}
    assert "url(" not in html and "@import" not in html
    assert "default-src 'none'" in unescape(html)


def test_every_command_and_return_has_a_row_that_its_mark_leads_to(page: Path, steered: Steered) -> None:
    html = page.read_text()
    summary = steered.summary
    assert len(summary["incidents"]) == 2
    rows = set(re.findall(r'<tr id="([^"]+)">', html))
    assert {f"c-{command['command_id']}" for command in summary["commands"]} <= rows
    assert {"r-0", "r-1"} <= rows
    assert set(re.findall(r'href="#([cr]-[^"]+)"', html)) <= rows
    assert "it was better there" in html and "left by a return" in html


def test_the_learning_rate_of_every_group_is_there(page: Path) -> None:
    rates = page.read_text().partition('id="rates"')[2].partition("<section")[0]
    assert "host" in rates and "seed/mid" in rates


def test_a_run_that_has_just_begun_has_a_page_too(steered: Steered, tmp_path: Path) -> None:
    young = tmp_path / "young"
    shutil.copytree(steered.live, young)
    for name in ("metrics.jsonl", "summary.json", "status.json"):
        (young / name).unlink(missing_ok=True)
    lines = (young / "events.jsonl").read_bytes().splitlines(keepends=True)
    (young / "events.jsonl").write_bytes(lines[0] + b'{"kind": "bound')  # cut short, as a crash does
    tolaria_here("report", str(young), "--out", str(tmp_path / "young.html"))
    html = (tmp_path / "young.html").read_text()
    assert all(f'id="{name}"' in html for name in SECTIONS)


def test_no_directory_no_run_and_no_room_are_one_line_each(page: Path, tmp_path: Path) -> None:
    run = str(page.parent)
    assert "no such directory" in tolaria_here("report", str(tmp_path / "nowhere"), code=73)
    assert "not a run directory" in tolaria_here("report", str(tmp_path), code=73)
    assert "choose another place with --out" in tolaria_here(
        "report", run, "--out", str(tmp_path / "no" / "x.html"), code=73
    )


def test_it_is_made_without_torch(page: Path) -> None:
    program = (
        "import sys; from tolaria.cli.app import main; main(sys.argv[1:]); "
        "sys.exit('torch' if 'torch' in sys.modules else 0)"
    )
    command = [sys.executable, "-c", program, "report", str(page.parent)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
