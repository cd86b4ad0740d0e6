"""What a trace of torch.profiler says of some training steps, on one page of text. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple, get_args

from tolaria.phases import Phase

PREFIX = "tolaria/"
STEP = f"{PREFIX}step "
"""Ranges in the trace: ``tolaria/step 12``, and in it ``tolaria/forward`` and the other phases."""

TOP = 10
_NAME_WIDTH = 46
_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})


class Span(NamedTuple):
    """Something that lasted, in microseconds of the trace's clock."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Spent:
    """``calls`` and milliseconds ``ms`` of one name, in the whole trace."""

    name: str
    calls: int
    ms: float


@dataclass(frozen=True)
class Times:
    """One rank's traced steps. Milliseconds of the host's time, over all ``steps`` of them.

    ``phases``: by name, without the phases inside them; ``between``: in a step and in no phase. ``total``: from the
    beginning of the first step to the end of the last. ``operators``: without what they called, the longest first.
    ``kernels``: what ran on the device, the longest first, and ``device_busy``, when anything did; empty on the CPU.
    """

    steps: int
    total: float
    phases: Mapping[str, float]
    between: float
    operators: Sequence[Spent]
    kernels: Sequence[Spent]
    device_busy: float


def times_of(events: Iterable[Mapping[str, Any]]) -> Times:
    """Read off the ``traceEvents`` of a Chrome trace. A trace without a step is taken as one."""
    ranges: dict[Any, list[Span]] = defaultdict(list)
    operators: dict[Any, list[Span]] = defaultdict(list)
    device: list[Span] = []
    for event in events:
        if event.get("ph") != "X":
            continue
        span = Span(event["name"], float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        kind, thread = event.get("cat", ""), (event.get("pid"), event.get("tid"))
        if kind == "user_annotation" and span.name.startswith(PREFIX):
            ranges[thread].append(span)
        elif kind == "cpu_op":
            operators[thread].append(span)
        elif kind in _DEVICE:
            device.append(span)
    alone = [pair for spans in ranges.values() for pair in without_inner(spans)]
    steps = [span for spans in ranges.values() for span in spans if span.name.startswith(STEP)]
    whole = steps or [span for span, _ in alone]
    phases: dict[str, float] = defaultdict(float)
    for span, own in alone:
        if not span.name.startswith(STEP):
            phases[span.name.removeprefix(PREFIX)] += own / 1e3
    first, last = min((s.start for s in whole), default=0.0), max((s.end for s in whole), default=0.0)
    return Times(
        steps=max(1, len(steps)),
        total=(last - first) / 1e3,
        phases=phases,
        between=sum(own for span, own in alone if span.name.startswith(STEP)) / 1e3,
        operators=_longest(pair for spans in operators.values() for pair in without_inner(spans)),
        kernels=_longest((span, span.end - span.start) for span in device),
        device_busy=covered(Span(s.name, max(s.start, first), min(s.end, last)) for s in device) / 1e3,
    )


def without_inner(spans: Iterable[Span]) -> list[tuple[Span, float]]:
    """Each span of one thread with its length less that of the spans inside it, which begin and end within it."""
    found: list[tuple[Span, float]] = []
    open_: list[int] = []
    for span in sorted(spans, key=lambda s: (s.start, -s.end)):
        while open_ and found[open_[-1]][0].end <= span.start:
            open_.pop()
        if open_:
            outer, own = found[open_[-1]]
            found[open_[-1]] = (outer, own - (min(span.end, outer.end) - span.start))
        open_.append(len(found))
        found.append((span, span.end - span.start))
    return found


def covered(spans: Iterable[Span]) -> float:
    """Time in at least one of the spans."""
    total, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda s: s.start):
        total += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return total


def _longest(spans: Iterable[tuple[Span, float]]) -> list[Spent]:
    calls: dict[str, int] = defaultdict(int)
    spent: dict[str, float] = defaultdict(float)
    for span, own in spans:
        calls[span.name] += 1
        spent[span.name] += own / 1e3
    found = [Spent(name, calls[name], ms) for name, ms in spent.items()]
    return sorted(found, key=lambda s: -s.ms)[:TOP]


def page(title: str, times: Times, before_ms: Sequence[float], *, what: str = "step") -> str:
    """One page of at most 80 columns: means over the traced steps, or ``what`` was traced.

    ``before_ms``: milliseconds of the steps before tracing began, to compare with.
    """
    each = times.total / times.steps
    lines = [title, "", f"{f'a {what}, traced':<24}{each:10.3f} ms"]
    if before_ms:
        lines.append(f"{f'a {what}, untraced':<24}{median(before_ms):10.3f} ms  (median of {len(before_ms)} before)")
    lines += ["", f"{f'host time of a {what}':<24}{'ms':>10}{'share':>9}"]
    known = [str(phase) for phase in get_args(Phase)]
    for name in [*known, *sorted(times.phases.keys() - set(known))]:
        if name in times.phases:
            lines.append(_share(name, times.phases[name] / times.steps, each))
    lines.append(_share("between the phases", times.between / times.steps, each))
    if times.kernels:
        lines += ["", f"{'device':<24}{'ms':>10}{'share':>9}", _share("busy", times.device_busy / times.steps, each)]
        lines.append(_share("idle", (times.total - times.device_busy) / times.steps, each))
        lines += _table("on the device", times.kernels, times)
    lines += _table("operators, without what they call", times.operators, times)
    return "\n".join(lines) + "\n"


def _share(name: str, ms: float, whole: float) -> str:
    return f"  {name:<22}{ms:10.3f}{ms / whole if whole else 0.0:9.1%}"


def _table(title: str, rows: Sequence[Spent], times: Times) -> list[str]:
    lines = ["", f"{title:<{_NAME_WIDTH + 2}}{'calls':>9}{'ms':>10}{'share':>9}"]
    for row in rows:
        name = row.name if len(row.name) <= _NAME_WIDTH else row.name[: _NAME_WIDTH - 3] + "..."
        share = row.ms / times.total if times.total else 0.0
        lines.append(f"  {name:<{_NAME_WIDTH}}{row.calls / times.steps:9.1f}{row.ms / times.steps:10.3f}{share:9.1%}")
    return lines
