"""Surgery on real ranks: 50 random operations with a save and a load among them; a fault on one rank."""

import pytest

from tests.optimizers import OWN
from tests.ranks import RankPool

OPERATIONS = 50


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adagrad", OWN])
def test_state_keeps_every_bit_through_fifty_operations_and_a_load_among_them(
    two_ranks: RankPool, optimizer: str
) -> None:
    job = "tests.dist.jobs_surgery:many_operations"
    first, second = two_ranks.run(job, optimizer=optimizer, operations=OPERATIONS, seed=len(optimizer))
    assert first == second
    assert sum(first["kinds"].values()) == OPERATIONS
    assert min(first["kinds"][kind] for kind in ("germinate", "advance", "cull")) >= 5
    assert first["kinds"].get("class", 0) >= (3 if optimizer == "adamw" else 0)
    assert first["kept"] > 20 * OPERATIONS
    assert first["touched"] == []
    assert first["unequal_ranks"] == []
    assert first["unequal_runs"] == []


def test_a_fault_on_one_rank_takes_the_whole_decision_back_on_all(two_ranks: RankPool) -> None:
    first, second = two_ranks.run("tests.dist.jobs_surgery:fault_on_one_rank", ats=[0, 1, 5, 10, 20])
    assert first == second
    assert first[:-1] == [{"codes": ["apply_failed"], "same": True, "ranks": 1}] * 5
    assert first[-1] == {"codes": ["applied"], "same": True, "ranks": 1}
