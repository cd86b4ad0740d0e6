"""What of a benchmark's results has a budget, for the one table of `python -m benchmarks`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Results: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Headline:
    """One measured value beside its budget; None where it has none and is there to be compared with."""

    what: str
    value: float
    budget: float | None
    unit: str
    digits: int = 1

    @property
    def cells(self) -> list[str]:
        """As columns: what, measured, budget, verdict."""
        budget = "" if self.budget is None else f"{self.budget:.{self.digits}f} {self.unit}".rstrip()
        verdict = "" if self.budget is None else "kept" if self.value <= self.budget else "**missed**"
        return [self.what, f"{self.value:,.{self.digits}f} {self.unit}".rstrip(), budget, verdict]


def headlines(name: str, found: Results) -> list[Headline]:
    """Of the benchmark ``name``, from its JSON."""
    return list(_OF[name](found))


def _step_latency(found: Results) -> Iterator[Headline]:
    for cell in found["cells"]:
        ratio = cell["sides"]["tolaria"]["ratio"]["median"]
        yield Headline(f"a step, times the hand-written one: {cell['name']}", ratio, cell["target"], "", 3)


def _control_lane(found: Results) -> Iterator[Headline]:
    for name, of in found.items():
        if name != "machine":
            share = of["agreement_us"] / of["chosen"] / of["step_us"]
            yield Headline(f"agreeing, share of a step: {name}", share * 100, of["share_budget"] * 100, "%", 2)


def _boundary(found: Results) -> Iterator[Headline]:
    budgets, packet = found["budget_ms"], found["packet"]["2 seeds, no metrics"]
    for side, parts in found["two_ranks_ms"].items():
        yield Headline(f"a boundary, median: {side}", parts["BOUNDARY"]["median"], found["goal_ms"], "ms")
        yield Headline(f"a boundary, 99th percentile: {side}", parts["BOUNDARY"]["p99"], budgets["BOUNDARY"], "ms")
    yield Headline("a packet with two seeds", packet["bytes"], packet["budget_bytes"], "bytes", 0)
    yield Headline("building and encoding it", packet["us"], packet["budget_us"], "us", 0)
    yield Headline("each further rank, to rank 0 at a boundary", found["simulated"]["rank_us"], None, "us", 2)


def _growth_pause(found: Results) -> Iterator[Headline]:
    pauses: dict[tuple[str, int, str], float] = {}
    for row in found["rows"]:
        of = (row["host"], row["ranks"], row["side"])
        pauses[of] = max(pauses.get(of, 0.0), row["pause"])
    for (host, ranks, side), ms in pauses.items():
        what = f"longest pause to grow, {host} M, {ranks} rank{'s' * (ranks > 1)}: {side}"
        yield Headline(what, ms, found["budget_ms"] if side == "eager" else None, "ms")


def _startup(found: Results) -> Iterator[Headline]:
    totals = {(row["side"], row["code"], row["ranks"]): row["total"] for row in found["rows"]}
    for (side, code, ranks), seconds in totals.items():
        cold = totals.get(("restart", "cold", ranks))
        half = cold / 2 if cold is not None and (side, code) == ("restart", "warm") else None
        yield Headline(f"to the first step, {ranks} rank{'s' * (ranks > 1)}: {side}, {code}", seconds, half, "s")


def _gpu(found: Results) -> Iterator[Headline]:
    ratio = found["steps"]["tolaria"]["ratio"]["median"]
    yield Headline("a step on the GPU, times the hand-written one", ratio, found["target"], "", 3)


_OF: dict[str, Callable[[Results], Iterator[Headline]]] = {
    "step_latency": _step_latency,
    "control_lane": _control_lane,
    "boundary": _boundary,
    "growth_pause": _growth_pause,
    "startup": _startup,
    "gpu": _gpu,
}
