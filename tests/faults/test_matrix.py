"""The fault matrix names tests that there are, and its smallest part runs with the whole suite."""

import re
from pathlib import Path

import pytest

from tests.faults.matrix import LONG, ROWS, SMOKE, Row, Seen, table

ROOT = Path(__file__).parents[2]


def found(prefix: str) -> list[str]:
    """The names of the tests in a file that begin so; parameters are not looked at."""
    path, _, name = prefix.partition("::")
    names: list[str] = re.findall(r"^def (test_\w+)", (ROOT / path).read_text(), re.MULTILINE)
    return [f"{path}::{test}" for test in names if test.startswith(name.partition("[")[0])]


def test_the_rows_are_complete_and_in_order() -> None:
    assert [row.number for row in ROWS] == [*range(1, 23), *range(36, 57)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row.number))
def test_every_row_is_shown_by_tests_that_there_are(row: Row) -> None:
    assert row.tests
    assert [prefix for prefix in row.tests if not found(prefix)] == []
    assert max(len(row.fault), len(row.expected)) <= 34


@pytest.mark.parametrize("number", SMOKE)
def test_the_smallest_part_runs_with_the_whole_suite(number: int) -> None:
    (row,) = [row for row in ROWS if row.number == number]
    assert [name for prefix in row.tests for name in found(prefix) if not name.startswith(LONG)]


def test_the_table_says_what_failed_and_what_was_not_run() -> None:
    lines = list(table({1: Seen(passed=2, seconds=3.0), 2: Seen(passed=1, failed=1)}))
    assert lines[1].split()[-4:] == ["in", "2", "3.0", "s"] and "FAILED 1" in lines[2] and "NOT RUN" in lines[3]
    assert lines[-1] == f"1 of {len(ROWS)} rows shown"
    assert max(map(len, lines)) <= 96
