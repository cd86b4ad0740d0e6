"""Which checkpoints count as good."""

from tolaria.recovery.ladder import Ladder


def test_a_checkpoint_is_good_after_so_many_healthy_boundaries() -> None:
    ladder = Ladder(2)
    ladder.add(0, 10, 0)
    assert ladder.healthy_boundary() == [] and ladder.newest_good is None
    ladder.add(1, 20, 0)
    assert ladder.healthy_boundary() == [0]
    assert ladder.healthy_boundary() == [1]
    assert ladder.newest_good is not None and ladder.newest_good.seq == 1


def test_an_incident_makes_candidates_wait_anew_but_what_is_good_stays_good() -> None:
    ladder = Ladder(2)
    ladder.add(0, 10, 0)
    ladder.healthy_boundary()
    ladder.healthy_boundary()
    ladder.add(1, 20, 0)
    ladder.healthy_boundary()
    ladder.sick()
    assert ladder.healthy_boundary() == []
    assert ladder.newest_good is not None and ladder.newest_good.seq == 0
    assert ladder.healthy_boundary() == [1]


def test_what_is_off_the_course_is_taken_off_good_or_not() -> None:
    ladder = Ladder(1)
    for seq, step in enumerate((10, 20, 30)):
        ladder.add(seq, step, 0)
    ladder.healthy_boundary()
    assert ladder.take_off(lambda rung: rung.step > 10) == {1, 2}
    assert ladder.newest is not None and ladder.newest.seq == 0
    assert ladder.newest_good is not None and ladder.newest_good.seq == 0


def test_an_empty_ladder_has_nothing() -> None:
    ladder = Ladder(2)
    assert (ladder.newest, ladder.newest_good, ladder.healthy_boundary()) == (None, None, [])
