"""Noise of what validation measures: the standard error of the loss, and of the paired difference with and without."""

import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from tests.rig import VALIDATION_SAMPLES, Rig, per_sample_loss, tiny_config
from tolaria.config import DataConfig
from tolaria.leyline.types import SeedStage
from tolaria.measure import TRAIN_METERS, standard_error
from tolaria.replica import evaluating
from tolaria.tamiyo import policy as do
from tolaria.telemetry.meters import Meters


def losses(rig: Rig) -> list[float]:
    """The validation loss of every sample."""
    points, classes = rig.task.validation.tensors  # type: ignore[attr-defined]
    with evaluating(rig.state.objective):
        found: list[float] = per_sample_loss(rig.state.objective.model(points), classes).tolist()
    return found


def test_the_noise_of_validation_is_the_standard_error_of_its_mean(tmp_path: Path) -> None:
    with Rig.build(tmp_path) as rig:
        rig.train(3)
        report = rig.evaluator.measure(Meters(TRAIN_METERS))
        assert report.val_noise == pytest.approx(
            statistics.stdev(losses(rig)) / math.sqrt(VALIDATION_SAMPLES), rel=1e-5
        )


@pytest.mark.parametrize("stage", [SeedStage.SHADOWING, SeedStage.PROBATIONARY])
def test_the_noise_of_a_contribution_is_that_of_paired_differences(tmp_path: Path, stage: SeedStage) -> None:
    with Rig.build(tmp_path, config=tiny_config(output_ratio=1e6)) as rig:
        rig.grow("early", stage)
        rig.evaluator.measure(Meters(TRAIN_METERS))
        kasmina, evidence = rig.state.kasmina, rig.state.kasmina.seeds["early"].evidence
        with kasmina.probing("early", active=True):
            with_seed = losses(rig)
        with kasmina.probing("early", active=False):
            without = losses(rig)
        gains = [b - a for a, b in zip(with_seed, without, strict=True)]
        assert evidence.contribution == pytest.approx(statistics.mean(gains), rel=1e-4)
        expected = statistics.stdev(gains) / math.sqrt(VALIDATION_SAMPLES)
        assert expected > 0
        assert evidence.contribution_noise == pytest.approx(expected, rel=1e-4)
        unpaired = math.hypot(*(statistics.stdev(x) / math.sqrt(VALIDATION_SAMPLES) for x in (with_seed, without)))
        assert not math.isclose(evidence.contribution_noise, unpaired, rel_tol=0.2)


def test_evaluation_begins_without_the_noise_of_the_probe(tmp_path: Path) -> None:
    with Rig.build(tmp_path, config=tiny_config(output_ratio=1e6)) as rig:
        rig.grow("early", SeedStage.SHADOWING)
        applied = rig.boundary(do.evaluate("early"))
        assert applied.outcomes[0].applied
        evidence = rig.state.kasmina.seeds["early"].evidence
        assert math.isnan(evidence.contribution_noise) and math.isnan(evidence.contribution)
        rig.boundary()
        assert math.isfinite(evidence.contribution_noise) and math.isfinite(evidence.contribution)


@pytest.mark.parametrize("values", [[1.0, 2.0, 4.0], [3.0, 3.0, 3.0], [1e-8, -1e-8], [1e9, 1e9 + 1]])
def test_standard_error_from_sums(values: list[float]) -> None:
    total, squares = sum(values), sum(v * v for v in values)
    expected = statistics.stdev(values) / math.sqrt(len(values))
    assert standard_error(total, squares, len(values)) == pytest.approx(
        expected, rel=1e-6, abs=30.0 if max(values) > 1e8 else 0.0
    )


def test_no_standard_error_of_one_value_or_of_what_is_not_finite() -> None:
    assert math.isnan(standard_error(1.0, 1.0, 1))
    for bad in (math.nan, math.inf):
        assert math.isnan(standard_error(bad, bad, 5))


def test_samples_that_only_fill_up_do_not_count(tmp_path: Path) -> None:
    noises = []
    for batch in (4, VALIDATION_SAMPLES):
        folder = tmp_path / str(batch)
        folder.mkdir()
        config = replace(tiny_config(), data=DataConfig(validation_batch_size=batch))
        with Rig.build(folder, config=config) as rig:
            noises.append(rig.evaluator.measure(Meters(TRAIN_METERS)).val_noise)
    assert math.isfinite(noises[0]) and noises[0] == pytest.approx(noises[1], rel=1e-6)
