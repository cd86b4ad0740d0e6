"""What a boundary measures is equal on every rank, and what one process measures on the whole batch."""

from typing import Any

import pytest

from tests.ranks import RankPool

JOBS = "tests.dist.jobs_measure"


def flat(told: dict[str, Any]) -> dict[str, float]:
    """Every number by name."""
    signals = {f"{slot}/{name}": value for slot, metrics in told["signals"].items() for name, value in metrics.items()}
    contribution, noise = told["contribution"]
    return signals | {"noise": told["noise"], "flops": told["flops"], "contribution": contribution, "paired": noise}


@pytest.mark.parametrize("stage", ["DORMANT", "SHADOWING", "PROBATIONARY"])
def test_ranks_measure_the_same_as_one_process(two_ranks: RankPool, stage: str) -> None:
    first, second = two_ranks.run(f"{JOBS}:against_one_process", stage=stage)
    assert flat(first["ranks"]) == pytest.approx(flat(second["ranks"]), rel=0, abs=0, nan_ok=True)
    assert flat(first["ranks"]) == pytest.approx(flat(first["single"]), rel=1e-4, nan_ok=True)
    slots = {"late"} if stage != "DORMANT" else {"early", "late"}
    assert set(first["ranks"]["signals"]) == slots
    for slot in slots:
        assert first["ranks"]["signals"][slot]["signal/residual_mlp"] > 0
    assert first["ranks"]["noise"] > 0
    if stage != "DORMANT":
        assert first["ranks"]["contribution"][1] > 0


@pytest.mark.parametrize(
    ("what", "left", "events"), [("seed", True, 0), ("host", False, 1), ("other_blueprints", False, 2)]
)
def test_what_fails_on_one_rank_is_left_out_on_all(two_ranks: RankPool, what: str, left: bool, events: int) -> None:
    ranks = two_ranks.run(f"{JOBS}:one_rank_fails", what=what)
    first, second = ranks
    assert first["measured"] == second["measured"]
    if left:
        assert "signal/low_rank" in first["measured"]["early"]
        assert "signal/picky" not in first["measured"]["early"]
    else:
        assert first["measured"] == {}
    assert [rank["told"] for rank in ranks] == [events] * 2
    assert first["again"] == second["again"]
    if what != "other_blueprints":
        assert first["again"]["early"]["signal/picky"] > 0
    assert len({digest for rank in ranks for digest in rank["digests"]}) == 1
