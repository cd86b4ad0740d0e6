"""The collectives of tolaria/dist.py on real ranks."""

import hashlib

from tests.ranks import RankPool


def test_every_rank_sees_the_same(two_ranks: RankPool) -> None:
    first, second = two_ranks.run("tests.dist.jobs_basic:collectives")
    assert (first.pop("rank"), second.pop("rank")) == (0, 1)
    assert first == second
    assert first["sum"] == [3.0]
    assert first["started_sum"] == [1, 14]
    assert first["agree_all"] is True
    assert first["agree_some"] is False
    assert first["gathered"] == [[0, -1], [1, -1]]
    assert first["digests"] == [hashlib.sha256(str(r).encode()).hexdigest() for r in range(2)]
    assert first["frame"] == hashlib.sha256(b"decision" * 100).hexdigest()
    assert first["long"] == hashlib.sha256(b"decision" * 100_000).hexdigest()
    assert "rank 0" in first["mismatch"]
    assert "rank 1" in first["mismatch"]


def test_each_start_has_its_own_generation(two_ranks: RankPool) -> None:
    generations = [two_ranks.run("tests.dist.jobs_basic:collectives")[0]["generation"] for _ in range(2)]
    assert len(set(generations)) == 2


def test_a_frame_that_arrives_damaged_on_one_rank_is_sent_again_to_all(two_ranks: RankPool) -> None:
    found = two_ranks.run("tests.dist.jobs_basic:damaged_frame", times=2)
    assert found == [{"seen": "decision", "arrivals": 3}] * 2


def test_a_line_that_damages_every_frame_ends_all_ranks_alike(two_ranks: RankPool) -> None:
    first, second = two_ranks.run("tests.dist.jobs_basic:damaged_frame", times=99)
    assert first == second
    assert first["arrivals"] == 3 and "arrived damaged" in first["seen"]
