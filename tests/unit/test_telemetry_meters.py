import json
import math

import pytest
import torch

from tolaria.telemetry.meters import Meters, Rate


def test_means_weigh_every_value_the_same() -> None:
    meters = Meters(["loss", "accuracy"])
    for value in (1.0, 2.0, 3.0, 8.0):
        meters.add("loss", value)
    meters.add("accuracy", 0.75)
    read = meters.read()
    assert (read["loss"].total, read["loss"].count, read["loss"].value) == (14.0, 4.0, 3.5)
    assert read["accuracy"].value == 0.75


def test_nothing_added_is_nan_and_reset_forgets() -> None:
    meters = Meters(["loss"])
    assert math.isnan(meters.read()["loss"].value)
    meters.add("loss", 1.0)
    meters.reset()
    assert meters.read()["loss"].count == 0


def test_sums_over_ranks_give_the_mean_over_all_values() -> None:
    ranks = [Meters(["loss"]), Meters(["loss"])]
    for value in (1.0, 1.0, 1.0):
        ranks[0].add("loss", value)
    ranks[1].add("loss", 5.0)
    packed = ranks[0].packed() + ranks[1].packed()
    assert ranks[0].unpack(packed)["loss"].value == 2.0
    assert ranks[0].read()["loss"].value == 1.0


def test_packed_is_a_copy() -> None:
    meters = Meters(["loss"])
    packed = meters.packed()
    meters.add("loss", 1.0)
    assert packed.tolist() == [0.0, 0.0]


def test_state_goes_through_json_exactly() -> None:
    meters = Meters(["loss", "accuracy"])
    for value in (0.1, 0.2, 0.3):
        meters.add("loss", value)
    other = Meters(["loss", "accuracy"])
    other.load_state_dict(json.loads(json.dumps(meters.state_dict())))
    for each in (meters, other):
        each.add("loss", 0.7)
    assert torch.equal(other.packed(), meters.packed())
    with pytest.raises(ValueError, match="accuracy"):
        Meters(["loss"]).load_state_dict(meters.state_dict())


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_names_must_differ(names: list[str]) -> None:
    with pytest.raises(ValueError, match="different names"):
        Meters(names)


def test_rate_counts_since_the_last_reading() -> None:
    now = [10.0]
    rate = Rate(clock=lambda: now[0])
    assert rate.read() == 0.0
    rate.add(64)
    rate.add(64)
    now[0] = 12.0
    assert rate.read() == 64.0
    now[0] = 13.0
    assert rate.read() == 0.0
