"""Momentum by name on real ranks: 50 random operations, steps between them, a save and a load in the middle."""

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
