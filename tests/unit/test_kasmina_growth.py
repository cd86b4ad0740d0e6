"""How a seed is made: alike on every rank, without moving a random stream; what a blueprint does wrong is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.rig import same_bits
from tolaria.errors import CommandRefused
from tolaria.kasmina import blueprints
from tolaria.kasmina.blueprints import Blueprint
from tolaria.kasmina.growth import build_seed

SHAPE = (4,)
CPU = torch.device("cpu")


def built(blueprint: str, run_seed: int = 1, command_id: str = "c1") -> nn.Module:
    return build_seed(blueprint, "early", SHAPE, run_seed=run_seed, command_id=command_id, device=CPU)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(same_bits(a, b) for a, b in pairs)


def test_weights_depend_on_run_seed_and_command_alone_and_no_stream_moves() -> None:
    stream = torch.get_rng_state()
    first = built("residual_mlp")
    assert torch.equal(torch.get_rng_state(), stream)
    torch.rand(5)
    assert same_weights(first, built("residual_mlp"))
    assert not same_weights(first, built("residual_mlp", run_seed=2))
    assert not same_weights(first, built("residual_mlp", command_id="c2"))


def test_a_seed_is_made_on_its_device() -> None:
    seed = build_seed("low_rank", "early", SHAPE, run_seed=1, command_id="c1", device=torch.device("meta"))
    assert {p.device.type for p in seed.parameters()} == {"meta"}


class Odd(nn.Module):
    """Does what it is told wrong."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        raise torch.OutOfMemoryError("no room on the device")

    def forward(self, h: Tensor) -> Any:
        """(batch, n) -> what the fault makes of it."""
        match self.fault:
            case "pair":
                return h, h
            case "division":
                return h * (1 // 0)
            case _:
                return h


def raising(shape: tuple[int, ...]) -> nn.Module:
    raise AssertionError(f"four heads do not divide {shape}")


ODD = {
    "narrow": lambda shape: nn.Linear(4, 2),
    "pair": lambda shape: Odd("pair"),
    "division": lambda shape: Odd("division"),
    "raising": raising,
    "no_room": lambda shape: Odd("no_room"),
}


@pytest.mark.parametrize(
    ("blueprint", "code", "word"),
    [
        ("no_such", "unknown_blueprint", "low_rank"),
        ("conv_residual", "shape", "rank 3"),
        ("narrow", "shape", r"maps \(4,\) to \(2,\)"),
        ("pair", "blueprint_failed", "shape"),
        ("division", "blueprint_failed", "division"),
        ("raising", "blueprint_failed", "four heads"),
        ("no_room", "blueprint_failed", "no room on the device"),
    ],
)
def test_a_blueprint_that_does_not_fit_or_fails_refuses_the_command(
    monkeypatch: pytest.MonkeyPatch, blueprint: str, code: str, word: str
) -> None:
    for name, build in ODD.items():
        monkeypatch.setitem(blueprints._BLUEPRINTS, name, Blueprint(name, frozenset({1}), build, ""))
    stream = torch.get_rng_state()
    with pytest.raises(CommandRefused, match=word) as refused:
        built(blueprint)
    assert refused.value.code == code
    assert torch.equal(torch.get_rng_state(), stream)
