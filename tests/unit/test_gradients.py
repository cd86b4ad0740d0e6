"""What each mode makes of a step's gradients, in one process, against finite differences and the algorithm's text."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.owned import (
    SLOTS,
    Gradients,
    distance,
    gradients,
    losses,
    of_host,
    owned_config,
    owned_rig,
    plant,
    vector,
)
from tests.rig import Rig, same_bits
from tests.unit.test_aggregate import literal_pcgrad
from tolaria.config import PrecisionConfig
from tolaria.kasmina.slot import Active, Blend, Frozen
from tolaria.leyline.types import SeedStage
from tolaria.measure import TRAIN_METERS
from tolaria.objective import Batch
from tolaria.optim.aggregate import projection_order, relative_weights
from tolaria.telemetry.meters import Meters

MODES = ("sum", "weighted", "pcgrad")
OWN_SYNC = ("weighted", "pcgrad")
ISOLATED = (SeedStage.GERMINATED, SeedStage.TRAINING, SeedStage.SHADOWING)
MIXED = {
    "a": SeedStage.TRAINING, "b": SeedStage.BLENDING, "c": SeedStage.PROBATIONARY, "d": SeedStage.SHADOWING,
}  # fmt: skip


def owner(index: int) -> int:
    """Host and four seeds in turn."""
    return index % 5 - 1


def unequal(one: Gradients, other: Gradients) -> list[str]:
    """Names of gradients that are not equal bit for bit."""
    assert one.keys() == other.keys() and one
    return [name for name in one if not same_bits(one[name], other[name])]


# Idle and equal seeds


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_of_a_slot_without_a_seed_are_the_hosts_bit_for_bit(
    tmp_path: Path, mode: str, dtype: torch.dtype
) -> None:
    found = []
    for name, whose in (("hosts", lambda _: -1), ("idle", owner)):
        with owned_rig(tmp_path / name, owned_config(mode), owner=whose, dtype=dtype) as rig:
            found.append(gradients(rig, 3))
    assert unequal(*found) == []


@pytest.mark.parametrize("mode", OWN_SYNC)
def test_without_a_seed_every_mode_is_the_plain_sum_bit_for_bit(tmp_path: Path, mode: str) -> None:
    found = []
    for each in ("sum", mode):
        with owned_rig(tmp_path / each, owned_config(each, "kasmina", accumulation=2)) as rig:
            found.append(gradients(rig, 3))
    assert unequal(*found) == []


@pytest.mark.parametrize("stage", [*ISOLATED, SeedStage.PROBATIONARY, SeedStage.FOSSILIZED, SeedStage.BLENDING])
@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_equal_seeds_however_many_do_not_scale_the_hosts_gradient(tmp_path: Path, stage: SeedStage, seeds: int) -> None:
    found = []
    for mode in ("sum", "weighted"):
        with owned_rig(tmp_path / mode, owned_config(mode, "kasmina"), dict.fromkeys(SLOTS[:seeds], stage)) as rig:
            found.append(gradients(rig, 2))
    assert unequal(*found) == []


def test_a_seed_lowers_the_weight_of_its_samples_and_raises_that_of_the_others(tmp_path: Path) -> None:
    found = {}
    for name, seeds in (("without", {}), ("with", {"a": SeedStage.TRAINING})):
        config = owned_config("weighted", batch_size=6)
        with owned_rig(tmp_path / name, config, seeds, owner=lambda i: 0 if i % 3 == 0 else -1) as rig:
            (batch,) = rig.batches()
            found[name] = vector(of_host(gradients(rig)))
    assert batch.seed_ids is not None
    number = int((batch.seed_ids == 0).sum())
    assert 0 < number < 6
    scale = 6 / ((6 - number) + 0.1 * number)
    factors = torch.where(batch.seed_ids == 0, 0.1 * scale, scale)
    assert float(factors.mean()) == pytest.approx(1.0)
    with owned_rig(tmp_path / "by hand", owned_config("sum", batch_size=6), owner=owner) as rig:
        host = rig.state.host_parameters
        grads = torch.autograd.grad((losses(rig, batch) * factors).mean(), list(host.values()))
    by_hand = vector(dict(zip(host, grads, strict=True)))
    torch.testing.assert_close(found["with"], by_hand, rtol=1e-5, atol=1e-8)
    assert (found["with"] - found["without"]).norm() > 0.1 * found["without"].norm()


# Weighted: against finite differences, and against the weighted loss without seams


def factors_of(rig: Rig, batch: Batch) -> Tensor:
    """c of each sample's owner, by the formula, float64."""
    seeds = list(rig.state.kasmina.seeds.values())
    assert batch.seed_ids is not None
    weights = relative_weights([1.0, *(seed.gradient_weight for seed in seeds)], 2.0**-24)
    of_sample = torch.tensor(weights, dtype=torch.float64)[batch.seed_ids + 1]
    counts = batch.weights.double()
    return of_sample * counts.sum() / (of_sample * counts).sum()


def loss_at(rig: Rig, batch: Batch, factors: Tensor, moved: Sequence[tuple[Tensor, Tensor]], by: float) -> float:
    """sum_i c_i weight_i loss_i with parameters moved along directions."""
    with torch.no_grad():
        for parameter, direction in moved:
            parameter.add_(direction, alpha=by)
        value = float((losses(rig, batch) * factors * batch.weights).sum())
        for parameter, direction in moved:
            parameter.add_(direction, alpha=-by)
    return value


def slope(rig: Rig, batch: Batch, factors: Tensor, moved: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Central difference along the directions, fourth order."""
    step = 1e-3
    at = {by: loss_at(rig, batch, factors, moved, by * step) for by in (-2, -1, 1, 2)}
    return (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)


def test_weighted_gradients_are_finite_differences_of_the_weighted_loss_for_the_host_and_of_the_plain_one_for_seeds(
    tmp_path: Path,
) -> None:
    # BLENDING is left out: its seed reads a detached input, which a finite difference does not know.
    seeds = {"a": SeedStage.FOSSILIZED, "b": SeedStage.TRAINING, "c": SeedStage.PROBATIONARY, "d": SeedStage.SHADOWING}
    with owned_rig(tmp_path, owned_config("weighted", batch_size=16), seeds, owner=owner) as rig:
        (batch,) = rig.batches()
        assert len(batch.seeds_present) == 5
        factors = factors_of(rig, batch)
        assert float((factors * batch.weights).sum()) == pytest.approx(1.0)
        before = {n: t.clone() for n, t in rig.state.tensors().items()}
        found = gradients(rig)
        with torch.no_grad():
            for name, tensor in rig.state.tensors().items():
                if name in before and not name.startswith("optim/"):
                    tensor.copy_(before[name])
        kasmina = rig.state.kasmina
        groups = {"host": (rig.state.host_parameters, factors)}
        for slot in ("a", "c"):
            groups[slot] = (kasmina.seeds[slot].named_parameters(), torch.ones_like(factors))
        generator = torch.Generator().manual_seed(11)
        for parameters, of_group in groups.values():
            for _ in range(3):
                moved = [(p, torch.randn(p.shape, generator=generator, dtype=p.dtype)) for p in parameters.values()]
                expected = slope(rig, batch, of_group, moved)
                along = sum(float((found[n] * d).sum()) for n, (_, d) in zip(parameters, moved, strict=True))
                assert abs(expected) > 1e-3
                assert along == pytest.approx(expected, rel=2e-6)


def without_seams(rig: Rig) -> None:
    """Replace every form by the same one without a seam."""
    for slot in rig.state.kasmina.slots.values():
        form = slot.form
        if isinstance(form, Blend):
            slot.form = Blend(form.seed, form.alpha, "residual" if form.residual else "convex")
        elif isinstance(form, Active) and not isinstance(form, Frozen):
            slot.form = Active(form.seed, "residual" if form.residual else "convex")


@pytest.mark.parametrize("blend", ["residual", "convex"])
@pytest.mark.parametrize("signal", ["shadow", "straight_through"])
@pytest.mark.parametrize("fine_tuning", [True, False])
def test_weighted_gradients_are_those_of_the_weighted_loss_for_the_host_and_of_the_plain_one_for_seeds(
    tmp_path: Path, blend: str, signal: str, fine_tuning: bool
) -> None:
    config = owned_config("weighted", batch_size=16, blend=blend, signal=signal)
    with (
        owned_rig(tmp_path / "run", config, owner=owner) as rig,
        owned_rig(tmp_path / "hand", config, owner=owner) as hand,
    ):
        for each in (rig, hand):
            for slot, stage in MIXED.items():
                plant(each, slot, stage, fine_tuning=fine_tuning)
        without_seams(hand)
        (batch,) = rig.batches()
        found = gradients(rig)
        factors = factors_of(hand, batch)
        assert (float(factors.min()) < 1e-6) == (not fine_tuning)  # a seed that is not fine-tuned weighs nothing
        host = hand.state.host_parameters
        weighted = (losses(hand, batch) * factors * batch.weights).sum()
        shared = dict(zip(host, torch.autograd.grad(weighted, list(host.values())), strict=True))
        assert distance(of_host(found), shared) < 1e-6
        own = {n: p for s in "bc" for n, p in hand.state.kasmina.seeds[s].named_parameters().items() if p.requires_grad}
        plain = (losses(hand, batch) * batch.weights).sum()
        of_seeds = dict(zip(own, torch.autograd.grad(plain, list(own.values())), strict=True))
        assert len(of_seeds) == (4 if fine_tuning else 2)
        assert distance({n: found[n] for n in of_seeds}, of_seeds) < 1e-6


@pytest.mark.parametrize("mode", OWN_SYNC)
@pytest.mark.parametrize("signal", ["shadow", "straight_through"])
def test_seeds_learn_as_without_the_mode(tmp_path: Path, mode: str, signal: str) -> None:
    found = []
    for each in ("sum", mode):
        config = owned_config(each, "data", batch_size=16, signal=signal)
        with owned_rig(tmp_path / each, config, MIXED, owner=owner) as rig:
            all_of_them = gradients(rig)
            found.append({n: g for n, g in all_of_them.items() if n not in of_host(all_of_them)})
    assert len(found[0]) == 6
    assert distance(found[1], found[0]) < 1e-6


# PCGrad


def of_owners(rig: Rig, batches: Sequence[Batch], rows: Sequence[int]) -> list[Tensor]:
    """The host's gradient of each owner's samples, taken by itself."""
    host = list(rig.state.host_parameters.values())
    found = []
    for row in rows:
        total = torch.zeros(sum(p.numel() for p in host), dtype=torch.float64)
        for batch in batches:
            assert batch.seed_ids is not None
            mask = (batch.seed_ids + 1 == row) * batch.weights
            grads = torch.autograd.grad((losses(rig, batch) * mask).sum(), host)
            total += vector(dict(zip(rig.state.host_parameters, grads, strict=True)))
        found.append(total)
    return found


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("opposed", [True, False])
def test_pcgrad_is_the_papers_algorithm_on_each_owners_gradient(
    tmp_path: Path, accumulation: int, opposed: bool
) -> None:
    config = owned_config("pcgrad", batch_size=12 // accumulation, accumulation=accumulation)
    with owned_rig(tmp_path, config, MIXED, owner=owner, opposed=opposed) as rig:
        for step in range(3):
            each = of_owners(rig, rig.batches(), range(5))
            order = projection_order(5, rig.config.run.seed, step).tolist()
            projected, counts = literal_pcgrad(each, order)
            found = vector(of_host(gradients(rig)))
            expected = torch.stack(projected).sum(0)
            assert float((found - expected).norm() / expected.norm()) < 1e-6
            told = rig.replica.owner_metrics()
            assert [told[slot]["conflicts"] for slot in SLOTS] == counts[1:]
            assert sum(counts) > 0 or not opposed
            for slot, gradient in zip(SLOTS, each[1:], strict=True):
                assert told[slot]["shared_norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)


def test_two_seeds_that_want_opposite_things_are_reconciled(tmp_path: Path) -> None:
    seeds = {"a": SeedStage.FOSSILIZED, "b": SeedStage.FOSSILIZED}
    config = owned_config("pcgrad", batch_size=48)
    # The same points twice, of other classes: what one seed's samples ask of the host, the other's do not want.
    with owned_rig(tmp_path, config, seeds, owner=lambda i: i % 2, opposed=True) as rig:
        first, second = of_owners(rig, rig.batches(), (1, 2))
        assert first @ second < 0
        found = vector(of_host(gradients(rig)))
        assert found @ first > -1e-9 and found @ second > -1e-9
        assert float((found - first - second).norm()) > 0.1 * float(found.norm())
        told = rig.replica.owner_metrics()
        assert (told["a"]["conflicts"], told["b"]["conflicts"]) == (1, 1)
        rig.train(3)
        assert 1 <= rig.replica.owner_metrics()["a"]["conflicts"] <= 3  # counted anew


def test_an_owner_whose_gradient_is_not_finite_makes_the_step_none(tmp_path: Path) -> None:
    with owned_rig(tmp_path, owned_config("pcgrad"), MIXED, owner=owner) as rig:
        (batch,) = rig.batches()
        inputs = batch.inputs.clone()
        inputs[2] = float("nan")
        before = {n: t.clone() for n, t in rig.state.tensors().items()}
        assert not rig.take_step([replace(batch, inputs=inputs)]).taken
        assert [n for n, t in rig.state.tensors().items() if not same_bits(t, before[n])] == []


@pytest.mark.parametrize("mode", OWN_SYNC)
def test_a_parameter_that_a_step_did_not_use_has_a_gradient_of_zero(tmp_path: Path, mode: str) -> None:
    def unused(h: Tensor) -> Tensor:
        return torch.zeros_like(h)

    with owned_rig(tmp_path, owned_config(mode), MIXED, owner=owner) as rig:
        assert all(g.any() for g in of_host(gradients(rig)).values())
        rig.state.objective.model.get_submodule("layers.3").forward = unused
        found = of_host(gradients(rig))
        assert [n for n, g in found.items() if not g.any()] == ["layers.3.weight", "layers.3.bias"]


@pytest.mark.parametrize("mode", OWN_SYNC)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_another_type_get_gradients_of_it(tmp_path: Path, mode: str, dtype: torch.dtype) -> None:
    found = []
    for each in ("sum", mode):
        with owned_rig(tmp_path / each, owned_config(each, "kasmina"), {"a": SeedStage.BLENDING}, dtype=dtype) as rig:
            found.append(gradients(rig))
    assert {name: g.dtype for name, g in found[1].items()} == {name: g.dtype for name, g in found[0].items()}
    assert {g.dtype for g in of_host(found[1]).values()} == {dtype}
    assert distance(found[1], found[0]) < 1e-2


# Accumulation, scaling, isolation, telemetry


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attribution", ["data", "kasmina"])
def test_one_big_batch_is_several_small_ones(tmp_path: Path, mode: str, attribution: str) -> None:
    found = []
    for batch_size, accumulation in ((12, 1), (6, 2), (3, 4)):
        config = owned_config(mode, attribution, batch_size=batch_size, accumulation=accumulation)
        with owned_rig(tmp_path / str(accumulation), config, MIXED, owner=owner, opposed=True) as rig:
            found.append(gradients(rig, 3))
    assert distance(found[1], found[0]) < 1e-6
    assert distance(found[2], found[0]) < 1e-6


@pytest.mark.parametrize("mode", OWN_SYNC)
def test_a_scaled_loss_gives_the_same_gradients(tmp_path: Path, mode: str) -> None:
    found, norms = [], []
    for enabled in (False, True):
        with owned_rig(tmp_path / str(enabled), owned_config(mode), MIXED, owner=owner, opposed=True) as rig:
            rig.state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
            found.append(gradients(rig, 2))
            norms.append({s: t.get("shared_norm") for s, t in rig.replica.owner_metrics().items()})
    assert unequal(*found) == []
    assert norms[0] == norms[1]


@pytest.mark.parametrize("mode", OWN_SYNC)
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_under_autocast_the_modes_come_close_to_full_precision(tmp_path: Path, mode: str, amp: str) -> None:
    found = []
    for each in ("off", amp):
        config = replace(owned_config(mode, batch_size=16), precision=PrecisionConfig(amp=each))  # type: ignore[arg-type]
        with owned_rig(tmp_path / each, config, MIXED, owner=owner, dtype=torch.float32) as rig:
            assert rig.state.scaler.is_enabled() == (each == "fp16")
            found.append(gradients(rig))
    assert distance(found[1], found[0]) < 0.05


@pytest.mark.parametrize("mode", OWN_SYNC)
@pytest.mark.parametrize("signal", ["shadow", "straight_through"])
def test_what_a_training_seed_computes_does_not_reach_the_host(tmp_path: Path, mode: str, signal: str) -> None:
    def keep(parameter: Tensor) -> None:
        pass

    fills: dict[str, Callable[[Tensor], object]] = {
        "as built": keep, "large": lambda p: p.fill_(7.0), "broken": lambda p: p.fill_(float("nan")),
    }  # fmt: skip
    found = []
    for name, fill in fills.items():
        config = owned_config(mode, signal=signal)
        with owned_rig(tmp_path / name, config, {"b": SeedStage.TRAINING}, owner=owner) as rig:
            with torch.no_grad():
                for parameter in rig.state.kasmina.seeds["b"].named_parameters().values():
                    fill(parameter)
            found.append(of_host(gradients(rig, 3)))
    assert unequal(found[1], found[0]) == unequal(found[2], found[0]) == []


@pytest.mark.parametrize("mode", OWN_SYNC)
@pytest.mark.parametrize("signal", ["shadow", "straight_through"])
def test_a_training_seed_that_owns_no_sample_is_not_felt_by_the_host(tmp_path: Path, mode: str, signal: str) -> None:
    found = []
    for name, seeds in (("without", {}), ("with", {"b": SeedStage.TRAINING})):
        config = owned_config(mode, signal=signal)
        with owned_rig(tmp_path / name, config, seeds, owner=lambda _: -1, dtype=torch.float32) as rig:
            found.append(of_host(gradients(rig, 3)))
    assert unequal(*found) == []


def test_a_boundary_tells_how_the_samples_of_each_seed_counted(tmp_path: Path) -> None:
    for mode in MODES:
        with owned_rig(tmp_path / mode, owned_config(mode, batch_size=16), MIXED, owner=owner) as rig:
            rig.train(3)  # the whole of the data
            report = rig.evaluator.measure(Meters(TRAIN_METERS))
            if mode == "sum":
                assert report.owners == {}
                continue
            assert set(report.owners) == set(SLOTS)
            numbers = {slot: len([i for i in range(48) if owner(i) == n]) for n, slot in enumerate(SLOTS)}
            weights = {"a": 0.1, "b": 0.25, "c": 1.0, "d": 0.5} if mode == "weighted" else dict.fromkeys(SLOTS, 1.0)
            for slot, told in report.owners.items():
                assert told["share"] == pytest.approx(numbers[slot] / 48)
                assert told["weight"] == pytest.approx(weights[slot], abs=1e-3)
                assert (told.keys() >= {"shared_norm", "conflicts"}) == (mode == "pcgrad")


def test_a_tally_is_saved_and_taken_up(tmp_path: Path) -> None:
    with owned_rig(tmp_path, owned_config("pcgrad"), MIXED, owner=owner) as rig:
        rig.train(2)
        saved = rig.replica.tally.state_dict()
        whole = rig.replica.owner_metrics()
        assert all("share" not in told for told in rig.replica.owner_metrics().values())
        rig.replica.tally.load_state_dict(saved)
        assert rig.replica.owner_metrics() == whole
        with pytest.raises(ValueError, match="a tally of slots"):
            rig.replica.tally.load_state_dict({**saved, "slots": ["other"]})
