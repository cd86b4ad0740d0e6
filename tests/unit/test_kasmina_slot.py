"""The forms of a slot: what each lets through, forward and backward, and how slots are found and attached."""

import math

import pytest
import torch
from torch import Tensor, nn

from tests.rig import TinyHost, same_bits
from tolaria.errors import TaskError
from tolaria.kasmina.slot import Active, Blend, Gauge, HostOnly, Slot, StraightThrough, attach, find_slots, probe_shapes

SHAPE = (4, 3)


class Scale(nn.Module):
    """f(h) = s * h with one learned s."""

    def __init__(self, s: float) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor(s))

    def forward(self, h: Tensor) -> Tensor:
        """(batch, ...) -> the same."""
        return self.s * h


def vector_jacobian(form: nn.Module, h: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output of a form, and v times its Jacobian by h."""
    h = h.clone().requires_grad_()
    out = form(h)
    (gradient,) = torch.autograd.grad(out, h, v)
    return out, gradient


def check_host_passes_untouched(form: nn.Module, seed: int) -> None:
    """The form's output is h and its vector-Jacobian product is v, both bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    h, v = torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)
    out, gradient = vector_jacobian(form, h, v)
    assert same_bits(out, h)
    assert same_bits(gradient, v)


@pytest.mark.parametrize("s", [0.0, 0.5, 100.0, math.nan, math.inf])
@pytest.mark.parametrize("seed", range(20))
def test_straight_through_gives_the_host_its_value_and_gradient_bit_for_bit(s: float, seed: int) -> None:
    check_host_passes_untouched(StraightThrough(Scale(s), ratio=2.0), seed)
    check_host_passes_untouched(HostOnly(), seed)


class Leaky(nn.Module):
    """A form that looks right: it adds nothing, but what the seed computes reaches the host all the same."""

    def __init__(self, seed: nn.Module) -> None:
        super().__init__()
        self.seed = seed

    def forward(self, h: Tensor) -> Tensor:
        """h + f(h) - f(h)."""
        f: Tensor = self.seed(h)
        return h + f - f


@pytest.mark.parametrize("s", [0.5, 100.0, math.nan])
def test_the_same_check_finds_a_leaky_form(s: float) -> None:
    with pytest.raises(AssertionError):
        check_host_passes_untouched(Leaky(Scale(s)), 0)


def test_a_straight_through_seed_learns_as_if_it_were_added() -> None:
    h, v = torch.randn(SHAPE), torch.randn(SHAPE)
    seed = Scale(0.5)
    StraightThrough(seed, ratio=2.0)(h.requires_grad_()).backward(v)
    assert seed.s.grad is not None
    assert torch.allclose(seed.s.grad, (v * h).sum())


def test_beyond_the_bound_a_straight_through_seed_is_not_driven_further_out() -> None:
    h, v = torch.randn(SHAPE), torch.randn(SHAPE)
    seed = Scale(50.0)
    StraightThrough(seed, ratio=2.0)(h.requires_grad_()).backward(v)
    assert seed.s.grad is not None
    assert abs(seed.s.grad.item()) < 1e-5 * (v * h).sum().abs().item()


@pytest.mark.parametrize(
    ("blend", "alpha", "factor"),
    [("residual", 0.0, 1.0), ("residual", 0.25, 1.75), ("convex", 0.25, 1.5), ("convex", 1.0, 3.0), ("convex", 0, 1.0)],
)
def test_blend_mixes_with_alpha(blend: str, alpha: float, factor: float) -> None:
    h = torch.randn(SHAPE)
    form = Blend(Scale(3.0), torch.tensor(alpha), blend)
    assert torch.allclose(form(h), factor * h)


@pytest.mark.parametrize(("blend", "share"), [("residual", 1.0), ("convex", 0.75)])
def test_while_blending_the_seed_reads_a_detached_host(blend: str, share: float) -> None:
    h, v = torch.randn(SHAPE), torch.randn(SHAPE)
    seed = Scale(3.0)
    form = Blend(seed, torch.tensor(0.25), blend)
    _, gradient = vector_jacobian(form, h, v)
    assert torch.allclose(gradient, share * v)  # not (share + 0.25 * 3) * v
    form(h).backward(v)
    assert seed.s.grad is not None
    assert torch.allclose(seed.s.grad, 0.25 * (v * h).sum())


def test_alpha_is_the_callers_tensor() -> None:
    h, alpha = torch.randn(SHAPE), torch.zeros(())
    form = Blend(Scale(3.0), alpha, "residual")
    assert same_bits(form(h), h)
    alpha.fill_(1.0)
    assert torch.allclose(form(h), 4 * h)
    assert "alpha" not in form.state_dict()


@pytest.mark.parametrize(("blend", "factor"), [("residual", 4.0), ("convex", 3.0)])
def test_active_is_the_seed_in_full(blend: str, factor: float) -> None:
    h, v = torch.randn(SHAPE), torch.randn(SHAPE)
    out, gradient = vector_jacobian(Active(Scale(3.0), blend), h, v)
    assert torch.allclose(out, factor * h)
    assert torch.allclose(gradient, factor * v)
    assert torch.allclose(Blend(Scale(3.0), torch.ones(()), blend)(h), out)


@pytest.mark.parametrize("form", [Active(Scale(1.0), "residual"), Blend(Scale(1.0), torch.ones(()), "convex"),
                                  StraightThrough(Scale(1.0), 2.0), Gauge(Scale(1.0), "residual")])  # fmt: skip
def test_every_form_keeps_the_hosts_type(form: nn.Module) -> None:
    assert form(torch.randn(SHAPE, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_gauge_measures_what_passes() -> None:
    h = torch.randn(SHAPE)
    gauge = Gauge(Scale(3.0), "residual")
    assert torch.allclose(gauge(h), 4 * h)
    gauge(h)
    squares = 2 * h.double().square().sum()
    assert torch.allclose(gauge.totals, torch.stack([squares, 9 * squares, torch.zeros((), dtype=torch.float64)]))
    broken = Gauge(Scale(math.nan), "residual")
    broken(h)
    assert broken.totals[2] == h.numel()


def test_the_gauge_notes_another_shape() -> None:
    gauge = Gauge(nn.Linear(3, 1), "residual")
    gauge(torch.randn(SHAPE))
    assert gauge.mismatch == "(4, 1) instead of (4, 3)"


# Finding and attaching


def test_an_attached_slot_sees_the_modules_output_and_changes_no_name() -> None:
    model = TinyHost()
    names = list(model.state_dict())
    x = torch.randn(2, 5)
    before = model(x)
    slot, handle = attach(model, "late", "middle")
    assert list(model.state_dict()) == names
    assert same_bits(model(x), before)
    slot.form = Active(Scale(1.0), "residual")
    assert not torch.equal(model(x), before)
    handle.remove()
    assert same_bits(model(x), before)


def test_slots_inside_the_model_are_found_by_name() -> None:
    model = TinyHost()
    assert find_slots(model) == {"early": model.early}


def test_two_slots_of_one_name_are_refused_with_the_place() -> None:
    model = nn.Sequential(Slot("a"), Slot("a"))
    with pytest.raises(TaskError, match=r"two slots are named 'a' .*'1'"):
        find_slots(model)


@pytest.mark.parametrize("path", ["nowhere", ""])
def test_a_path_that_does_not_exist_is_refused_with_those_that_do(path: str) -> None:
    with pytest.raises(TaskError, match=rf"no module '{path}'.*inlet"):
        attach(TinyHost(), "late", path)


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "a/b"])
def test_a_slot_name_that_could_not_travel_is_refused(name: str) -> None:
    with pytest.raises(TaskError, match="slot name"):
        Slot(name)


def test_probing_finds_the_shapes_and_leaves_the_slots_as_they_were() -> None:
    model = TinyHost()
    slot, _ = attach(model, "late", "middle")
    slots = {"early": model.early, "late": slot}
    forms = {name: s.form for name, s in slots.items()}
    assert probe_shapes(slots, lambda: model(torch.randn(2, 5))) == {"early": (8,), "late": (8,)}
    assert {name: s.form for name, s in slots.items()} == forms


def test_a_slot_that_is_not_reached_or_carries_no_float_is_refused() -> None:
    slot = Slot("lost")
    with pytest.raises(TaskError, match="'lost': nothing passed"):
        probe_shapes({"lost": slot}, lambda: None)
    with pytest.raises(TaskError, match=r"'lost': carries torch.int64"):
        probe_shapes({"lost": slot}, lambda: slot(torch.zeros(2, 3, dtype=torch.int64)))
