"""Whose a sample is: what the data says, or dealt by its place in the step; and what is refused."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from tests.owned import SAMPLES, SLOTS, make_task, owned_config, owned_rig, plant
from tests.rig import Rig, tiny_config
from tolaria.config import DataConfig
from tolaria.config_aggregate import AggregateConfig
from tolaria.data import EpochSampler, Loader
from tolaria.errors import ConfigError, TaskError
from tolaria.gradients.owners import HOST_ROW, Owners
from tolaria.kasmina.lifecycle import gradient_weight
from tolaria.leyline.types import SeedStage
from tolaria.objective import Batch

CPU = torch.device("cpu")
TRAINING = SeedStage.TRAINING


def owners_of(rig: Rig, attribution: str) -> Owners:
    """Owners over the rig's seeds, planned."""
    config = AggregateConfig(attribution=attribution)  # type: ignore[arg-type]
    owners = Owners(rig.state.kasmina.seeds, rig.state.sampler, config, CPU)
    owners.plan()
    return owners


def test_samples_are_whose_the_data_says_they_are(tmp_path: Path) -> None:
    with owned_rig(tmp_path, owned_config("pcgrad"), {"a": TRAINING, "c": TRAINING}, owner=lambda i: i % 5 - 1) as rig:
        (batch,) = rig.batches()
        rows, present = owners_of(rig, "data").of(batch, 0)
        assert batch.seed_ids is not None
        # -1 is the host's; slots b and d hold no seed, so theirs are the host's too.
        expected = {-1: HOST_ROW, 0: 1, 1: HOST_ROW, 2: 3, 3: HOST_ROW}
        assert rows.tolist() == [expected[i] for i in batch.seed_ids.tolist()]
        assert present == tuple(sorted(set(rows.tolist())))
        assert batch.seeds_present == tuple(sorted(set(batch.seed_ids.tolist())))


def test_samples_that_only_fill_up_are_nobodys_reason_to_run_backward(tmp_path: Path) -> None:
    with owned_rig(tmp_path, owned_config("pcgrad"), {"a": TRAINING}, owner=lambda i: 0 if i == 3 else -1) as rig:
        (batch,) = rig.loader.batches(rig.task.train, [([1, 2, 3], [0.5, 0.5, 0.0])])
        assert owners_of(rig, "data").of(batch, 0)[1] == (HOST_ROW,)


@pytest.mark.parametrize("seeds", [0, 1, 2, 3])
def test_dealt_samples_have_the_same_owner_on_any_number_of_ranks(tmp_path: Path, seeds: int) -> None:
    with owned_rig(tmp_path, owned_config("pcgrad", "kasmina"), dict.fromkeys(SLOTS[:seeds], TRAINING)) as rig:
        dealt = []
        for world_size, batch_size, accumulation in ((1, 12, 1), (1, 4, 3), (2, 6, 1), (3, 2, 2), (4, 3, 1)):
            of_position: dict[int, int] = {}
            for rank in range(world_size):
                sampler = EpochSampler(
                    SAMPLES, seed=0, rank=rank, world_size=world_size, batch_size=batch_size, accumulation=accumulation
                )
                order = sampler.order()
                owners = Owners(rig.state.kasmina.seeds, sampler, AggregateConfig(attribution="kasmina"), CPU)
                owners.plan()
                for position, (indices, weights) in enumerate(sampler.remaining()[:accumulation]):
                    rows, present = owners.of(Batch(None, None, torch.tensor(weights)), position)
                    assert present == tuple(sorted(set(rows.tolist())))
                    of_position.update({order.index(i): row for i, row in zip(indices, rows.tolist(), strict=True)})
            dealt.append(of_position)
        assert len(dealt[0]) == 12
        assert all(d == dealt[0] for d in dealt)
        expected = range(1, seeds + 1) if seeds else (HOST_ROW,)
        assert [dealt[0][i] for i in range(12)] == [expected[i % len(expected)] for i in range(12)]


def test_owners_follow_the_seeds(tmp_path: Path) -> None:
    with owned_rig(tmp_path, owned_config("pcgrad"), owner=lambda _: -1) as rig:
        owners = owners_of(rig, "data")
        assert owners.rows == (HOST_ROW,) and not owners.plan()
        plant(rig, "b", SeedStage.SHADOWING)
        assert owners.plan() and owners.rows == (HOST_ROW, 2)
        assert owners.weights() == [1.0, 0.5]
        assert owners_of(rig, "kasmina").rows == (2,)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("DORMANT", 0.0), ("GERMINATED", 0.01), ("TRAINING", 0.1), ("BLENDING", 0.3), ("SHADOWING", 0.5),
        ("PROBATIONARY", 0.0), ("FOSSILIZED", 1.0), ("CULLED", 0.0), ("EMBARGOED", 0.0),
    ],
)  # fmt: skip
def test_a_seed_weighs_as_its_stage_says(stage: str, expected: float) -> None:
    assert gradient_weight(SeedStage[stage], alpha=0.3, fine_tuning=False) == expected
    assert gradient_weight(SeedStage.PROBATIONARY, alpha=1.0, fine_tuning=True) == 1.0


@pytest.mark.parametrize("mode", ["sum", "weighted", "pcgrad"])
@pytest.mark.parametrize("wrong", [-2, 4, 2**40])
def test_a_seed_id_that_is_none_is_refused_with_what_is_accepted(tmp_path: Path, mode: str, wrong: int) -> None:
    with (
        owned_rig(tmp_path, owned_config(mode), owner=lambda i: wrong if i == 7 else 0) as rig,
        pytest.raises(TaskError, match=rf"seed ids \[{wrong}\] in a batch: expected -1 .nobody's. to 3; .* 4 slots"),
    ):
        list(rig.loader.batches(rig.task.train, [([7], [1.0])]))


@pytest.mark.parametrize(
    "ids", [torch.zeros(1), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)]
)
def test_seed_ids_of_another_form_are_refused(ids: torch.Tensor) -> None:
    task = make_task()
    loader = Loader(task, DataConfig(), CPU, emit=lambda *_, **__: None)
    with pytest.raises(TaskError, match=r"expected an int64 tensor of shape \(1,\)"):
        list(loader.batches(TensorDataset(torch.zeros(1, 5), torch.zeros(1), ids), [([0], [1.0])]))


@pytest.mark.parametrize("mode", ["weighted", "pcgrad"])
def test_a_mode_that_could_do_nothing_says_so_at_the_start(tmp_path: Path, mode: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"aggregate.mode='{mode}': the task's items are pairs.*attribution='kasmina'"
    ):
        Rig.build(tmp_path, config=owned_config(mode), make=make_task)
    with pytest.raises(ConfigError, match=r"no slot to grow a seed in"):
        Rig.build(tmp_path, config=owned_config(mode, "kasmina"), make=_without_slots)
    with Rig.build(tmp_path, config=tiny_config()) as rig:
        assert rig.batches()[0].seed_ids is None


def _without_slots() -> object:
    task = make_task()
    task.model.slots = torch.nn.ModuleList(torch.nn.Identity() for _ in SLOTS)
    return task
