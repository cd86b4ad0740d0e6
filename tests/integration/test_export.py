"""An exported model, loaded where there is no Tolaria, says bit for bit what the trained one says.

The run grows twice: at its end one seed is part of the host, the other is still being blended in.
"""

import ast
import inspect
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.integration.afterwards import tolaria_here
from tests.torchrun import Job, launch
from tolaria.export.blueprints import built_in_sources, definitions
from tolaria.export.grown import Grown, choose_checkpoint, load_grown
from tolaria.export.plain import equal
from tolaria.kasmina.blueprints import BUILT_IN
from tolaria.leyline.types import SeedStage
from tolaria.tasks import digits

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

WIDTH, EPOCHS = 2, 8
SCRIPT = """
command = [
    { boundary = 1, op = "germinate", slot = "early", blueprint = "conv_residual" },
    { boundary = 2, op = "start_training", slot = "early" },
    { boundary = 3, op = "start_grafting", slot = "early", blend_steps = 30 },
    { boundary = 5, op = "stabilize", slot = "early" },
    { boundary = 5, op = "germinate", slot = "late", blueprint = "bottleneck_attention" },
    { boundary = 6, op = "evaluate", slot = "early" },
    { boundary = 6, op = "start_training", slot = "late" },
    { boundary = 7, op = "fossilize", slot = "early" },
    { boundary = 7, op = "start_grafting", slot = "late", blend_steps = 60 },
]
"""
HOST = "import torch\nfrom torch import Tensor, nn\n\n\n" + inspect.getsource(digits.SmallConvNet)
WITHOUT_TOLARIA = """
import sys
sys.modules["tolaria"] = None  # installed or not, it cannot be imported here
sys.path[:0] = [{folder!r}, {mine!r}]
import torch
from safetensors.torch import load_file, save_file
inputs = load_file({inputs!r})["x"]
{load}
with torch.no_grad():
    save_file({{"y": model(inputs)}}, {outputs!r})
print([name for name in sys.modules if name.startswith("tolaria") and sys.modules[name] is not None])
"""


@pytest.fixture(scope="module")
def trained() -> Iterator[Job]:
    folder = Path(tempfile.mkdtemp(prefix="tl-"))
    (folder / "script.toml").write_text(SCRIPT)
    options = {
        "task": "tolaria.tasks.digits:make_task", "task.args.width": 2, "optim.lr": 0.02,
        "train.epochs": EPOCHS, "train.batch_size": 64,
        "compile.enabled": "false",
        "precision.amp": "off", "dist.device": "cpu", "tamiyo.policy": f"script:{folder / 'script.toml'}",
        "kasmina.min_contribution": -100, "kasmina.max_loss_ratio": 100, "checkpoint.every": 1, "checkpoint.keep": 20,
        "kasmina.measure_signal": "false",
    }  # fmt: skip
    with launch(folder, [f"--{name}={value}" for name, value in options.items()], ranks=0) as job:
        job.finish()
        yield job
    shutil.rmtree(folder)


def stages(grown: Grown) -> dict[str, SeedStage]:
    return {name: seed.stage for name, seed in grown.kasmina.seeds.items()}


def at_step(job: Job, step: int) -> Path:
    return next(path for path in (job.run_dir / "ckpt").iterdir() if path.name.endswith(f"-s{step}"))


def outputs_elsewhere(folder: Path, work: Path, load: str, inputs: Tensor) -> Tensor:
    """What a process without Tolaria says with the export in ``folder``; the user's own model lies beside."""
    mine = work / "mine"
    mine.mkdir(exist_ok=True)
    (mine / "host.py").write_text(HOST)
    save_file({"x": inputs}, work / "x.safetensors")
    program = WITHOUT_TOLARIA.format(
        folder=str(folder), mine=str(mine), load=load, inputs=str(work / "x.safetensors"),
        outputs=str(work / "y.safetensors"),
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=work, capture_output=True, text=True, timeout=100,
        env={"PATH": "", "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
    return load_file(work / "y.safetensors")["y"]


BUILD = f"from host import SmallConvNet\nfrom model import build\nmodel = build(lambda: SmallConvNet({WIDTH}))"


def test_the_end_of_the_run_and_its_middle_have_the_seeds_they_should(trained: Job) -> None:
    assert stages(load_grown(choose_checkpoint(trained.run_dir))) == {
        "early": SeedStage.FOSSILIZED, "late": SeedStage.BLENDING,
    }  # fmt: skip
    assert choose_checkpoint(trained.run_dir) == at_step(trained, trained.summary()["steps"])
    middle = load_grown(at_step(trained, 88))
    assert stages(middle)["early"] == SeedStage.BLENDING and 0 < middle.acting[0].alpha_value < 1


def test_the_reference_is_the_model_that_the_run_validated(trained: Job) -> None:
    grown = load_grown(choose_checkpoint(trained.run_dir))
    data: Any = grown.task.validation
    logits = grown.outputs(data.images)
    final = trained.summary()["final"]
    assert digits.accuracy(logits, data.labels).mean().item() == pytest.approx(final["accuracy"], abs=1e-7)
    assert digits.loss(logits, data.labels).double().mean().item() == pytest.approx(final["loss"], rel=1e-5)


@pytest.mark.parametrize("step", [88, 176], ids=["blending", "fossilized and blending"])
def test_weights_and_model_py_give_the_trained_models_bits_without_tolaria(
    trained: Job, tmp_path: Path, step: int
) -> None:
    checkpoint, out = at_step(trained, step), tmp_path / "out"
    told = json.loads(tolaria_here("export", str(checkpoint), "--out", str(out), "--json"))
    assert set(told["files"]) == {"weights.safetensors", "structure.json", "model.py", "README.md"} and told["proven"]
    assert {path.name for path in out.iterdir()} == set(told["files"])
    grown = load_grown(checkpoint)
    inputs = grown.inputs(100)
    found = outputs_elsewhere(out, tmp_path, BUILD, inputs)
    assert equal([grown.outputs(inputs)], [found])
    # What it is held against is not the host alone, nor the seeds in full.
    for alpha in (0.0, 1.0):
        for seed in grown.kasmina.seeds.values():
            seed.alpha.fill_(alpha)
        assert not torch.equal(grown.outputs(inputs), found)
    readme = (out / "README.md").read_text()
    assert "conv_residual" in readme and "h + 0." in readme


def test_a_program_gives_the_trained_models_bits_with_torch_alone(trained: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = tolaria_here("export", str(trained.run_dir), "--format", "torch", "--out", str(out))
    assert "bit for bit" in said and "batches of" not in said  # any number of samples
    assert [path.name for path in out.iterdir()] == ["model.pt2"]
    grown = load_grown(choose_checkpoint(trained.run_dir))
    inputs = grown.inputs(33)
    load = f"model = torch.export.load({str(out / 'model.pt2')!r}).module()"
    assert equal([grown.outputs(inputs)], [outputs_elsewhere(out, tmp_path, load, inputs)])


def test_a_convex_blend_is_exported_as_one(trained: Job, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    text = (trained.run_dir / "config.toml").read_text()
    assert 'blend = "residual"' in text
    config.write_text(text.replace('blend = "residual"', 'blend = "convex"'))
    out = tmp_path / "out"
    checkpoint = at_step(trained, 176)
    tolaria_here("export", str(checkpoint), "--config", str(config), "--out", str(out))
    grown = load_grown(checkpoint, config_file=config)
    inputs = grown.inputs()
    assert equal([grown.outputs(inputs)], [outputs_elsewhere(out, tmp_path, BUILD, inputs)])


def test_a_host_that_is_another_is_named(trained: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tolaria_here("export", str(trained.run_dir), "--out", str(out))
    with pytest.raises(AssertionError, match=r"ValueError: host/stem\.0\.weight: \(3, 1, 3, 3\)"):
        outputs_elsewhere(out, tmp_path, BUILD.replace(f"({WIDTH})", "(3)"), torch.zeros(1, 1, 8, 8))
    assert "is there already" in tolaria_here("export", str(trained.run_dir), "--out", str(out), code=73)


def test_what_cannot_be_exported_is_said_and_leaves_nothing(trained: Job, tmp_path: Path) -> None:
    run, out = str(trained.run_dir), str(tmp_path / "out")
    assert "expected safetensors or torch" in tolaria_here("export", run, "--format", "onnx", code=2)
    assert "another shape" in tolaria_here(
        "export", run, "--task", "tests.integration.test_export:wider", "--out", out, code=74
    )
    untraceable = ("--format", "torch", "--task", "tests.integration.test_export:untraceable", "--out", out)
    assert "torch.export cannot follow this model" in tolaria_here("export", run, *untraceable, code=2)
    noisy = ("--task", "tests.integration.test_export:noisy", "--out", out)
    assert "other outputs each time" in tolaria_here("export", run, *noisy, code=2)
    assert list(tmp_path.iterdir()) == []
    assert "neither a run directory nor a checkpoint" in tolaria_here("export", str(tmp_path), code=73)


def wider(width: int) -> Any:
    return digits.make_task(width + 1)


class Untraceable(digits.SmallConvNet):
    def forward(self, images: Tensor) -> Tensor:
        """Asks for a number that no tracer has."""
        return super().forward(images) * (1.0 if images.sum().item() < 1e9 else 2.0)


class Noisy(digits.SmallConvNet):
    def forward(self, images: Tensor) -> Tensor:
        """Another answer each time."""
        return super().forward(images) + torch.rand(())


def untraceable(width: int) -> Any:
    return _with(Untraceable(width))


def noisy(width: int) -> Any:
    return _with(Noisy(width))


def _with(model: torch.nn.Module) -> Any:
    from dataclasses import replace  # noqa: PLC0415 - what this one needs

    return replace(digits.make_task(WIDTH), model=model)


def test_every_built_in_blueprint_stands_by_itself() -> None:
    for name in sorted(BUILT_IN):
        source, classes = built_in_sources([name])
        known: dict[str, Any] = {}
        exec(  # noqa: S102 - the text is this project's own, cut out a line above
            "from typing import TypeVar\nimport torch\nfrom torch import Tensor, nn\nfrom torch.nn import functional\n"
            f"{source}", known,
        )  # fmt: skip
        shape = (4, 6, 6) if name == "conv_residual" else (8, 16) if name == "residual_mlp" else (16, 4, 4)
        made = known[classes[name]](shape)
        assert made(torch.zeros(2, *shape)).shape == (2, *shape)


def test_a_definition_takes_along_what_it_names_and_nothing_else() -> None:
    source = "A = 1\nB = 2\n\ndef f():\n    return A\n\nclass C:\n    x = f()\n\ndef g():\n    return B\n"
    cut = definitions(source, ["C"])
    assert [type(node).__name__ for node in ast.parse(cut).body] == ["Assign", "FunctionDef", "ClassDef"]
    assert "B" not in cut
