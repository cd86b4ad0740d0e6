"""What happens on one rank alone is decided alike on all of them."""

from pathlib import Path

import pytest

from tests.dist.test_resume import SCRIPT, by_rank, write_script
from tests.ranks import RankPool

STEPS = 14


@pytest.fixture
def script(tmp_path: Path) -> str:
    """A policy that grows a seed: TRAINING from step 6 on, BLENDING from step 9 on."""
    return write_script(tmp_path / "script.toml", [entry for entry in SCRIPT if entry[0] <= 3])


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_bad_batch_of_one_rank_skips_the_step_on_all(
    two_ranks: RankPool, script: str, bad_rank: int, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    first, second = two_ranks.run(
        "tests.dist.jobs_verdicts:train_with_bad_batches", folder=str(folder), script=script, steps=STEPS,
        bad_rank=bad_rank, bad_steps=[7, 11],
    )  # fmt: skip
    assert first == second
    assert (first["outcome"], first["skipped"], first["stages"]["first"]) == ("finished", 2, "BLENDING")
    assert first["loss"] < 10
    # The step counts when it is over.
    assert by_rank(folder, "step_skipped", "step") == [(0, 6), (0, 10), (1, 6), (1, 10)]
    dropped = by_rank(folder, "seed_gradient_not_finite", "step", "seed")
    assert dropped == [(rank, step, "first") for rank in (0, 1) for step in (6, 10)]


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_broken_compiler_of_one_rank_leaves_the_run_of_two_eager_ranks(
    two_ranks: RankPool, script: str, bad_rank: int, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    ranks = two_ranks.run(
        "tests.dist.jobs_verdicts:train_with_broken_compiler", folder=str(folder), script=script, steps=STEPS,
        bad_rank=bad_rank, good=0,
    )  # fmt: skip
    eager = two_ranks.run("tests.dist.jobs_resume:train", folder=str(tmp_path / "eager"), script=script, steps=STEPS)
    assert ranks[bad_rank]["asked"] == 1
    assert [r["outcome"] for r in ranks] == ["finished"] * 2
    assert {r["digest"] for r in ranks} == {r["digest"] for r in eager}
    reasons = dict(by_rank(folder, "compile_fallback", "reason"))
    assert "this rank's compiler is broken" in reasons[bad_rank]
    assert reasons[1 - bad_rank] == "another rank could not compile"


def test_a_compiler_that_breaks_at_a_growth_step_costs_no_growth(
    two_ranks: RankPool, script: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    first, second = two_ranks.run(
        "tests.dist.jobs_verdicts:train_with_broken_compiler", folder=str(folder), script=script, steps=STEPS,
        bad_rank=1, good=2,
    )  # fmt: skip
    assert second["asked"] == 3  # host, shadow, blend
    assert (first["outcome"], first["stages"]["first"]) == ("finished", "BLENDING")
    assert first["digest"] == second["digest"]
    assert [step for _, step in by_rank(folder, "compile_fallback", "step")] == [9, 9]


def test_gradients_are_reduced_once_for_all_microbatches(two_ranks: RankPool) -> None:
    assert two_ranks.run("tests.dist.jobs_verdicts:count_reductions", accumulation=1) == [1, 1]
    assert two_ranks.run("tests.dist.jobs_verdicts:count_reductions", accumulation=4) == [1, 1]
