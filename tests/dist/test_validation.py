"""Compiled validation on two ranks: the same numbers on both, and eager on both when one cannot compile."""

import pytest

from tests.ranks import RankPool

JOB = "tests.dist.jobs_validation:measure"


def test_ranks_validate_the_same_compiled_as_eager(two_ranks: RankPool) -> None:
    compiled = two_ranks.run(JOB, choice="on", bad_rank=-1, good=0)
    eager = two_ranks.run(JOB, choice="off", bad_rank=-1, good=0)
    assert [rank["validation compiled"] for rank in (*compiled, *eager)] == [True, True, False, False]
    assert compiled[0]["numbers"] == compiled[1]["numbers"]
    assert compiled[0]["numbers"][0] == compiled[0]["numbers"][1]
    assert compiled[0]["numbers"][0] == pytest.approx(eager[0]["numbers"][0], rel=1e-5)
    assert len({rank["digest"] for rank in (*compiled, *eager)}) == 1


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_one_rank_that_cannot_compile_it_puts_it_on_eager_on_both(two_ranks: RankPool, bad_rank: int) -> None:
    ranks = two_ranks.run(JOB, choice="on", bad_rank=bad_rank, good=1)
    eager = two_ranks.run(JOB, choice="off", bad_rank=-1, good=0)
    assert [(rank["training compiled"], rank["validation compiled"]) for rank in ranks] == [(True, False)] * 2
    assert ranks[0]["numbers"] == ranks[1]["numbers"] == eager[0]["numbers"]
    assert "compiler is broken" in ranks[bad_rank]["reasons"][0]
    assert ranks[1 - bad_rank]["reasons"] == ["another rank could not compile"]
