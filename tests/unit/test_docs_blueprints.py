"""docs/blueprints.md says what the code does: every row of its tables, and its examples run."""

import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tolaria
from tests.rig import Rig
from tolaria.config import KasminaConfig
from tolaria.errors import CommandRefused
from tolaria.kasmina import blueprints
from tolaria.kasmina.blueprints import blueprint_names, get_blueprint
from tolaria.kasmina.candidates import MAX_CANDIDATES
from tolaria.leyline.types import SeedStage
from tolaria.telemetry import report
from tolaria.telemetry.summary import NOISE_ERRORS, SeedRecord

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "blueprints.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def registry_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blueprints, "_BLUEPRINTS", dict(blueprints._BLUEPRINTS))


def rows(*headings: str) -> list[list[str]]:
    """The cells of the table with these headings."""
    head = "| " + " | ".join(headings) + " |\n"
    assert PAGE.count(head) == 1
    body = PAGE.partition(head)[2].partition("\n\n")[0]
    return [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in body.splitlines()[1:]]


def test_the_built_in_blueprints_are_all_there_and_as_they_are() -> None:
    table = rows("name", "ranks", "what it computes", "starts from", "when to grow it")
    assert tuple(row[0] for row in table) == blueprint_names()
    for name, ranks, summary, init, use in table:
        found = get_blueprint(name)
        assert {int(rank) for rank in ranks.split(", ")} == found.ranks
        assert (summary, init, use) == (found.summary, found.init, found.use)


def test_the_costs_are_what_describe_blueprint_says() -> None:
    table = rows("name", "shape", "parameters", "FLOPs")
    for name, text, parameters, flops in table:
        shape = tuple(int(size) for size in re.findall(r"\d+", text))
        told = tolaria.describe_blueprint(name, shape)
        assert (f"{told.parameters:,}", f"{told.flops:,}") == (parameters, flops), (name, shape)
        assert (told.name, told.shape) == (name, shape)
        assert (told.summary, told.init, told.use) == tuple(
            getattr(get_blueprint(name), text) for text in ("summary", "init", "use")
        )
    assert {(row[0], len(re.findall(r"\d+", row[1]))) for row in table} == {
        (name, rank) for name in blueprint_names() for rank in get_blueprint(name).ranks
    }


@pytest.mark.parametrize("name", blueprint_names())
def test_what_a_blueprint_says_it_starts_from_is_so(name: str) -> None:
    """ "up: 0" names a layer whose parameters are all zero, and only the last one is."""
    seed = get_blueprint(name).build({1: (64,), 2: (8, 64), 3: (16, 4, 4)}[max(get_blueprint(name).ranks)])
    zero = {part.rpartition(".")[0] for part, p in seed.named_parameters() if not p.any() and "norm" not in part}
    told = re.findall(r"(\w+): 0", get_blueprint(name).init)
    assert zero == (set(told) if told else {""})


def test_the_names_and_limits_in_the_text_are_the_codes() -> None:
    keys = set(re.findall(r"kasmina\.(\w+)", PAGE))
    assert keys <= set(vars(KasminaConfig()))
    assert {"candidates", "measure_signal", "max_seed_mb", "max_grown_mb"} <= keys
    assert f"At most {MAX_CANDIDATES} are listed" in " ".join(PAGE.split())


def test_the_example_of_a_summary_looks_as_the_report_does() -> None:
    seed = SeedRecord(
        slot="early", blueprint="conv_residual", stage="FOSSILIZED", parameters=1250, alpha=1.0, contribution=0.1142,
        contribution_noise=0.0159, flops=36_864, train_flops=4_001_000_000, forward_ms=[1.3, 0.9],
    )  # fmt: skip
    for label, text in report.seed_lines(seed):
        assert f"{label.ljust(10)}  {text}\n" in PAGE or f"  {label.ljust(10)}  {text}\n" in PAGE
    verdicts = [replace(seed, contribution=gain).verdict for gain in (0.1, -0.1, 0.03, None)]
    assert [row[0] for row in rows("verdict", "when")] == verdicts
    assert NOISE_ERRORS == 2.0


def run_example(folder: Path, word: str) -> None:
    """Run the page's one example that has this word."""
    (code,) = [block for block in BLOCKS if word in block]
    (folder / "example.py").write_text(code, encoding="utf-8")
    runpy.run_path(str(folder / "example.py"))


def test_the_example_shows_a_description(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run_example(tmp_path, "describe_blueprint")
    assert "parameters=33216" in capsys.readouterr().out


def test_the_example_blueprint_can_be_registered_measured_and_grown(tmp_path: Path) -> None:
    run_example(tmp_path, "register_blueprint")
    told = tolaria.describe_blueprint("gate", (8,))
    assert (told.parameters, told.init, told.use) == (16, "v: 1, w: 0", "to tame features that grow too large")
    with Rig.build(tmp_path) as rig:
        rig.train(2)
        assert rig.evaluator.signal.measure()["early"]["signal/gate"] > 0
        rig.grow("early", SeedStage.FOSSILIZED, "gate")
        assert rig.state.kasmina.seeds["early"].stage == SeedStage.FOSSILIZED
        assert any(p.any() for n, p in rig.state.kasmina.seeds["early"].named_parameters().items() if n.endswith("/w"))


def test_describing_refuses_as_a_command_would_and_moves_no_random_stream() -> None:
    stream = torch.get_rng_state()
    tolaria.describe_blueprint("bottleneck_attention", [16, 8, 8])
    for name, shape, code in (("nonsense", (4,), "unknown_blueprint"), ("conv_residual", (4,), "shape")):
        with pytest.raises(CommandRefused) as refused:
            tolaria.describe_blueprint(name, shape)
        assert refused.value.code == code
    assert torch.equal(torch.get_rng_state(), stream)
