"""What is read off a trace: exclusive times of phases and operators, the device, a page of text."""

from typing import Any

import pytest

from tolaria.telemetry.trace import Span, covered, page, times_of, without_inner


def event(kind: str, name: str, start: float, length: float, thread: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": length, "pid": 1, "tid": thread}


def phase(name: str, start: float, length: float) -> dict[str, Any]:
    return event("user_annotation", f"tolaria/{name}", start, length)


TWO_STEPS = [
    phase("step 7", 1000, 1000),
    phase("forward", 1100, 300),
    phase("clip", 1500, 400),
    phase("fence", 1600, 100),
    phase("step 8", 2000, 1000),
    phase("forward", 2100, 500),
    event("user_annotation", "ProfilerStep#1", 2000, 1000),
    event("cpu_op", "aten::linear", 1100, 200),
    event("cpu_op", "aten::addmm", 1120, 150),
    event("cpu_op", "aten::addmm", 2100, 50, thread=2),
    {"ph": "M", "name": "process_name"},
]


def test_a_phase_inside_another_is_not_counted_twice() -> None:
    times = times_of(TWO_STEPS)
    assert (times.steps, times.total) == (2, 2.0)
    assert times.phases == pytest.approx({"forward": 0.8, "clip": 0.3, "fence": 0.1})
    assert times.between == pytest.approx(0.8)
    assert sum(times.phases.values()) + times.between == pytest.approx(times.total)


def test_operators_count_without_those_that_they_call_and_for_each_thread() -> None:
    operators = [(o.name, o.calls, round(o.ms, 6)) for o in times_of(TWO_STEPS).operators]
    assert operators == [("aten::addmm", 2, 0.2), ("aten::linear", 1, 0.05)]


def test_the_device_is_busy_while_anything_runs_on_it_in_the_steps() -> None:
    kernels = [
        event("kernel", "gemm", 900, 300, thread=7),  # began before the first step
        event("kernel", "gemm", 1300, 200, thread=7),
        event("gpu_memcpy", "copy", 1400, 200, thread=8),  # beside the other
    ]
    times = times_of(TWO_STEPS + kernels)
    assert times.device_busy == pytest.approx(0.5)
    assert [(k.name, k.calls) for k in times.kernels] == [("gemm", 2), ("copy", 1)]
    assert "idle" in page("rank 0", times, [])


def test_a_trace_without_steps_is_one_of_the_phases_in_it() -> None:
    times = times_of([phase("boundary", 500, 2000)])
    assert (times.steps, times.total, times.phases) == (1, 2.0, {"boundary": 2.0})
    assert times_of([]).total == 0.0


def test_spans_are_taken_apart_by_what_contains_what() -> None:
    spans = [Span("inner", 2, 3), Span("outer", 0, 10), Span("second", 5, 9), Span("in second", 5, 9)]
    assert {s.name: own for s, own in without_inner(spans)} == {"outer": 5, "inner": 1, "second": 0, "in second": 4}
    assert covered([Span("", 0, 2), Span("", 1, 3), Span("", 5, 6), Span("", 5, 4)]) == 4


def test_the_page_has_at_most_eighty_columns_and_shares_that_add_up() -> None:
    long = event("cpu_op", "aten::" + "x" * 100, 1500, 5)
    text = page("rank 0, step 7 to 8", times_of([*TWO_STEPS, long]), [0.5, 0.7, 0.9])
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "rank 0, step 7 to 8"
    assert any("untraced" in line and "0.700 ms" in line for line in lines)
    rows = lines[lines.index(next(line for line in lines if line.startswith("host time"))) + 1 :]
    shares = [float(row.split()[-1].rstrip("%")) for row in rows[: rows.index("")]]
    assert sum(shares) == pytest.approx(100, abs=0.5)
