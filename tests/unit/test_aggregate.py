"""The algebra of several gradients: weights, inner products, PCGrad against its definition."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.rig import same_bits
from tolaria.optim.aggregate import (
    combine,
    inner_products,
    projection,
    projection_order,
    relative_weights,
    rescaling,
)


def literal_pcgrad(gradients: list[Tensor], order: list[list[int]]) -> tuple[list[Tensor], list[int]]:
    """Algorithm 1 of Yu et al. 2020, word for word, in float64: the projected gradients, and how often each was."""
    projected, counts = [], []
    for i, own in enumerate(gradients):
        changed, count = own.double().clone(), 0
        for j in order[i]:
            if j == i:
                continue
            other = gradients[j].double()
            along = float(changed @ other)
            if along < 0:
                changed -= along / float(other @ other) * other
                count += 1
        projected.append(changed)
        counts.append(count)
    return projected, counts


def pcgrad(rows: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the projected rows, and the conflicts of each."""
    rows = rows.clone()
    coefficients, conflicts = projection(inner_products(rows), order)
    combine(rows, coefficients)
    return rows[0], conflicts


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("size", [16, 1024, 40_000])
def test_the_projection_is_that_of_the_paper(count: int, size: int) -> None:
    generator = torch.Generator().manual_seed(count * size)
    common = torch.randn(size, generator=generator)
    # Around a common direction and its opposite, so that about half of all pairs are in conflict.
    signs = torch.tensor([(-1.0) ** i for i in range(count)])
    rows = torch.randn(count, size, generator=generator, dtype=torch.float64) + signs[:, None] * common
    order = projection_order(count, run_seed=3, step=size)
    projected, counts = literal_pcgrad(list(rows), order.tolist())
    found, conflicts = pcgrad(rows, order)
    torch.testing.assert_close(found, sum(projected), rtol=1e-9, atol=1e-9)
    assert conflicts.tolist() == counts
    assert count == 1 or sum(counts) > 0


def test_gradients_that_agree_are_added_up() -> None:
    rows = torch.rand(4, 300, dtype=torch.float64)
    found, conflicts = pcgrad(rows, projection_order(4, 0, 0))
    torch.testing.assert_close(found, rows.sum(0))
    assert conflicts.tolist() == [0] * 4


def test_of_two_gradients_neither_is_worked_against_by_the_result() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        first = torch.randn(20, generator=generator, dtype=torch.float64)
        second = torch.randn(20, generator=generator, dtype=torch.float64) - first
        assert first @ second < 0
        found, conflicts = pcgrad(torch.stack([first, second]), projection_order(2, 0, 0))
        assert conflicts.tolist() == [1, 1]
        assert found @ first > -1e-12 and found @ second > -1e-12


def test_opposite_gradients_cancel_and_what_rounding_leaves_of_them_is_no_conflict() -> None:
    direction = torch.randn(100, generator=torch.Generator().manual_seed(4))
    rows = torch.stack([factor * direction for factor in (0.3, -1.7, 2.9, -0.1)])
    found, conflicts = pcgrad(rows, projection_order(4, 0, 1))
    assert found.abs().max() < 1e-6
    assert conflicts.tolist() == [1] * 4


def test_an_owner_without_samples_changes_nothing() -> None:
    rows = torch.randn(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rows[1] = 0
    found, conflicts = pcgrad(rows, projection_order(3, 0, 5))
    two = torch.stack([rows[0], rows[2]])
    assert conflicts[1] == 0
    torch.testing.assert_close(found, pcgrad(two, projection_order(2, 0, 5))[0])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_shows_in_the_result(wrong: float) -> None:
    rows = torch.randn(3, 50)
    rows[1, 4] = wrong
    found, _ = pcgrad(rows, projection_order(3, 0, 0))
    assert not found.isfinite().all()


def test_the_order_is_random_but_the_same_for_a_step() -> None:
    before = torch.get_rng_state()
    orders = [projection_order(6, run_seed=1, step=step).tolist() for step in range(40)]
    assert torch.equal(torch.get_rng_state(), before)
    assert projection_order(6, run_seed=1, step=7).tolist() == orders[7]
    assert projection_order(6, run_seed=2, step=7).tolist() != orders[7]
    assert all(sorted(row) == list(range(6)) for order in orders for row in order)
    firsts = [order[0][0] for order in orders]
    assert set(firsts) == set(range(6))


def test_inner_products_have_the_same_bits_for_any_number_of_threads() -> None:
    rows = torch.randn(5, 300_001, generator=torch.Generator().manual_seed(1))
    found = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(inner_products(rows))
    finally:
        torch.set_num_threads(1)
    assert all(same_bits(f, found[0]) for f in found)
    torch.testing.assert_close(found[0], rows.double() @ rows.double().T)


weights = st.lists(st.floats(0, 1), min_size=1, max_size=6)


@settings(deadline=None)
@given(weights=weights, seed=st.integers(0, 1000))
def test_weights_never_change_what_all_samples_weigh_together(weights: list[float], seed: int) -> None:
    generator = random.Random(seed)
    counts = torch.tensor([generator.random() + 0.01 for _ in weights], dtype=torch.float64)
    relative = torch.tensor(relative_weights(weights, 2.0**-24), dtype=torch.float64)
    factors = relative * rescaling(relative, counts)
    assert float((factors * counts).sum()) == pytest.approx(float(counts.sum()))


@pytest.mark.parametrize("weight", [0.0, 0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("owners", [1, 2, 4])
def test_equal_weights_are_exactly_no_weights(weight: float, owners: int) -> None:
    relative = relative_weights([weight] * owners, 2.0**-24)
    assert relative == [1.0] * owners
    assert float(rescaling(torch.tensor(relative), torch.full((owners,), 1 / 3))) == 1.0


def test_a_weight_of_0_next_to_others_becomes_the_floor() -> None:
    assert relative_weights([1.0, 0.0, 0.5], 2.0**-24) == [1.0, 2.0**-24, 0.5]
    assert relative_weights([0.1, 0.05], 2.0**-24) == [1.0, 0.5]
