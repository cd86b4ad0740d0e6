"""Which rank sees which sample: each exactly once per epoch, whatever the ranks, the accumulation and the cursor."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, get_worker_info

from tests.rig import make_task
from tolaria.config import DataConfig
from tolaria.data import EpochSampler, Loader, Plan, dataset_size, validation_plan
from tolaria.errors import TaskError
from tolaria.task import Task

CPU = torch.device("cpu")
sizes = st.integers(1, 70)
small = st.integers(1, 5)


class Crew(Dataset[tuple[Tensor, Tensor]]):
    """Every sample is the number of loader processes."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        info = get_worker_info()
        return torch.tensor([info.num_workers if info is not None else 0]), torch.zeros(())


@pytest.mark.parametrize(("batches", "processes"), [(1, 1), (2, 2), (4, 2)])
def test_no_loader_process_is_started_that_would_have_no_batch(batches: int, processes: int) -> None:
    data = Crew()
    task = replace(make_task(), train=data)
    loader = Loader(task, DataConfig(num_workers=2), CPU, lambda *_, **__: None)
    plan = [([index], [1.0]) for index in range(batches)]
    assert [int(batch.inputs) for batch in loader.batches(data, plan)] == [processes] * batches


def samplers(size: int, world_size: int, batch_size: int, accumulation: int, seed: int = 0) -> list[EpochSampler]:
    """One sampler per rank."""
    return [
        EpochSampler(
            size, seed=seed, rank=rank, world_size=world_size, batch_size=batch_size, accumulation=accumulation
        )
        for rank in range(world_size)
    ]


def counted(plans: Sequence[Plan]) -> Counter[int]:
    """How often each sample counts, over ranks and microbatches (those of weight 0 only fill up)."""
    return Counter(
        index
        for plan in plans
        for indices, weights in plan
        for index, weight in zip(indices, weights, strict=True)
        if weight
    )


@settings(deadline=None, max_examples=150)
@given(size=sizes, world_size=small, batch_size=small, accumulation=small, epoch=st.integers(0, 3))
def test_every_sample_counts_once_per_epoch(
    size: int, world_size: int, batch_size: int, accumulation: int, epoch: int
) -> None:
    ranks = samplers(size, world_size, batch_size, accumulation)
    for rank in ranks:
        rank.epoch = epoch
    plans = [rank.remaining() for rank in ranks]
    assert counted(plans) == Counter(range(size))
    steps = ranks[0].steps_per_epoch
    for plan in plans:
        assert len(plan) == steps * accumulation  # every rank takes part in every collective
        assert {(len(indices), len(weights)) for indices, weights in plan} == {(batch_size, batch_size)}
        assert all(0 <= index < size for indices, _ in plan for index in indices)


@settings(deadline=None, max_examples=100)
@given(size=sizes, world_size=small, batch_size=small, accumulation=small)
def test_each_step_weighs_its_samples_alike(size: int, world_size: int, batch_size: int, accumulation: int) -> None:
    plans = [rank.remaining() for rank in samplers(size, world_size, batch_size, accumulation)]
    for start in range(0, len(plans[0]), accumulation):
        microbatches = [plan[start + m] for plan in plans for m in range(accumulation)]
        weights = [w for _, ws in microbatches for w in ws if w]
        # DDP averages over ranks: with n samples in the step each must weigh ranks / n, so that their mean remains.
        assert weights == [world_size / len(weights)] * len(weights)
        assert float(sum(map(Fraction, weights)) / world_size) == pytest.approx(1.0)


@settings(deadline=None, max_examples=150)
@given(
    size=sizes,
    before=st.tuples(small, small, small),
    after=st.tuples(small, small, small),
    steps=st.integers(0, 30),
    seed=st.integers(0, 2**63 - 1),
)
def test_an_interrupted_epoch_is_ended_by_any_other_number_of_ranks(
    size: int, before: tuple[int, int, int], after: tuple[int, int, int], steps: int, seed: int
) -> None:
    first = samplers(size, *before, seed=seed)
    steps = min(steps, first[0].steps_per_epoch - 1)
    seen = counted([rank.remaining()[: steps * before[2]] for rank in first])
    for _ in range(steps):
        assert [rank.advance() for rank in first] == [False] * len(first)
    saved = json.loads(json.dumps(first[0].state_dict()))
    assert all(rank.state_dict() == saved for rank in first)

    second = samplers(size, *after, seed=seed)
    for rank in second:
        rank.load_state_dict(saved)
    rest = [rank.remaining() for rank in second]
    assert seen + counted(rest) == Counter(range(size))
    assert len({len(plan) for plan in rest}) == 1


@settings(deadline=None, max_examples=50)
@given(size=sizes, world_size=small, batch_size=small, accumulation=small)
def test_an_epoch_ends_after_its_steps_and_the_next_has_another_order(
    size: int, world_size: int, batch_size: int, accumulation: int
) -> None:
    (rank, *_) = samplers(size, world_size, batch_size, accumulation)
    ended = [rank.advance() for _ in range(2 * rank.steps_per_epoch)]
    one = [False] * (rank.steps_per_epoch - 1) + [True]
    assert ended == one + one
    assert (rank.epoch, rank.cursor) == (2, 0)


def test_epochs_of_which_everything_is_left_out_are_passed_over_at_once() -> None:
    (rank,) = samplers(10, 1, 2, 1)
    rank.skip([(0, 4, 10), (1, 0, 10), (2, 0, 6), (2, 6, 10)])
    assert [rank.advance() for _ in range(2)] == [False, True]
    assert (rank.epoch, rank.cursor, rank.window) == (3, 0, (3, 0, 2))
    rank.skip([(3, 0, 10)])
    assert rank.turn_over() and rank.epoch == 4 and not rank.turn_over()


def test_order_depends_on_seed_and_epoch_alone() -> None:
    (one,), (other,), (reseeded,) = samplers(40, 1, 3, 1), samplers(40, 1, 7, 2), samplers(40, 1, 3, 1, seed=1)
    stream = torch.get_rng_state()
    assert one.order() == other.order() != reseeded.order()
    assert torch.equal(torch.get_rng_state(), stream)
    first = one.order()
    one.epoch = 1
    assert sorted(one.order()) == sorted(first) and one.order() != first


def test_two_ranks_take_the_halves_of_one_larger_batch() -> None:
    together, (alone,) = samplers(11, 2, 3, 1), samplers(11, 1, 6, 1)
    first, second, whole = (rank.remaining() for rank in (*together, alone))
    for (a, of_a), (b, of_b), (both, weights) in zip(first, second, whole, strict=True):
        assert [*a, *b] == both
        assert [w / 2 for w in (*of_a, *of_b)] == pytest.approx(weights)


@pytest.mark.parametrize("key", ["seed", "num_samples"])
def test_the_position_in_other_data_is_refused(key: str) -> None:
    (rank,) = samplers(10, 1, 2, 1)
    saved = {**rank.state_dict(), "cursor": 4, key: 99}
    with pytest.raises(TaskError, match=f"{key}=99"):
        rank.load_state_dict(saved)
    assert rank.cursor == 0


@settings(deadline=None, max_examples=150)
@given(size=sizes, world_size=small, batch_size=st.integers(1, 80))
def test_validation_sees_every_sample_once(size: int, world_size: int, batch_size: int) -> None:
    plans = [validation_plan(size, rank, world_size, batch_size) for rank in range(world_size)]
    assert counted(plans) == Counter(range(size))
    assert {weight for plan in plans for _, weights in plan for weight in weights} <= {0.0, 1.0}
    assert len({len(plan) for plan in plans}) == 1
    assert len({len(indices) for plan in plans for indices, _ in plan}) == 1
    # No rank computes more than one batch of filler beyond its share.
    share = -(-size // world_size)
    assert all(sum(len(indices) for indices, _ in plan) < share + min(batch_size, share) for plan in plans)


# The loader


class Unsized(Dataset[int]):
    """Has no length."""

    def __getitem__(self, index: int) -> int:
        return index


def test_data_without_a_length_or_without_samples_is_refused() -> None:
    with pytest.raises(TaskError, match="training data has no len"):
        dataset_size(Unsized(), "training")
    with pytest.raises(TaskError, match="validation data is empty"):
        dataset_size(TensorDataset(torch.zeros(0, 3)), "validation")


def test_the_loader_brings_what_was_planned_and_draws_no_random_number() -> None:
    task = make_task()
    plan: Plan = [([3, 1], [0.5, 0.5]), ([7, 7], [1.0, 0.0])]
    stream = torch.get_rng_state()
    batches = list(Loader(task, DataConfig(), CPU, emit=lambda *_, **__: None).batches(task.train, plan))
    assert torch.equal(torch.get_rng_state(), stream)
    for batch, (indices, weights) in zip(batches, plan, strict=True):
        wanted = [task.train[i] for i in indices]
        assert torch.equal(batch.inputs, torch.stack([x for x, _ in wanted]))
        assert torch.equal(batch.targets, torch.stack([y for _, y in wanted]))
        assert batch.weights.tolist() == weights


def test_a_collate_that_makes_no_pair_is_named() -> None:
    task = make_task()
    wrong = Task(
        model=task.model, loss=task.loss, train=task.train, validation=task.validation, accuracy=task.accuracy,
        collate=lambda items: items[0][0],
    )  # fmt: skip
    with pytest.raises(TaskError, match=r"collate returned Tensor; expected a pair"):
        list(Loader(wrong, DataConfig(), CPU, emit=lambda *_, **__: None).batches(wrong.train, [([0], [1.0])]))
