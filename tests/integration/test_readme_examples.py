"""The README's examples: each file is taken from the README as it stands and run by the command that stands there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHON_BLOCK = re.compile(r"^```python\n# (\S+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Compiling is not the subject here.
EAGER = ["--compile.enabled", "false"]

pytestmark = [pytest.mark.processes, pytest.mark.timeout(90)]


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """A folder with the README's Python files."""
    blocks = dict(PYTHON_BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8")))
    assert set(blocks) == {"my_model.py", "my_script.py", "my_policy.py"}
    for name, text in blocks.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "PET_STANDALONE": "1"}


def run(folder: Path, command: str, *further: str) -> str:
    """Run a README command in ``folder`` and return its output; it must end with exit code 0."""
    program, *words = command.split()
    # The environment's own programs; torchrun with a port of the kernel's choice, since tests may run side by side.
    words = [str(Path(sys.executable).with_name(program)), *words, *further]
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=80, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def summary(folder: Path) -> dict[str, Any]:
    [path] = folder.glob("runs/*/summary.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_own_model_and_own_policy(examples: Path) -> None:
    command = "python -m tolaria.launch --task my_model:make_task --tamiyo.policy my_policy:OneSeed --optim.lr 0.01"
    shown = run(examples, command, *EAGER)
    assert "fossilized" in shown
    [seed] = summary(examples)["seeds"]
    assert (seed["stage"], seed["blueprint"]) == ("FOSSILIZED", "residual_mlp")


def test_own_model(examples: Path) -> None:
    shown = run(examples, "python -m tolaria.launch --task my_model:make_task --optim.lr 0.01", *EAGER)
    assert "Finished" in shown
    assert summary(examples)["outcome"] == "finished"


def test_script(examples: Path) -> None:
    text = (examples / "my_script.py").read_text()
    eager = text.replace(
        "train=TrainConfig(epochs=4)", "train=TrainConfig(epochs=4), compile=CompileConfig(enabled=False)"
    )
    assert eager != text
    imports = "from tolaria.config import CompileConfig, RunConfig, TrainConfig"
    (examples / "my_script.py").write_text(eager.replace("from tolaria.config import RunConfig, TrainConfig", imports))
    accuracy = float(run(examples, "python my_script.py").splitlines()[-1])
    assert 0.3 <= accuracy <= 1


def test_policy_as_a_service(examples: Path, short_socket: str) -> None:
    run(examples, "python -m tolaria.tamiyo.keys keys")
    serve = (
        "-m tolaria.tamiyo.server --policy my_policy:OneSeed --bind ipc:///tmp/policy.sock --key-file keys/shared.key"
    )
    command = (
        "python -m tolaria.launch --task my_model:make_task --tamiyo.endpoint ipc:///tmp/policy.sock "
        "--tamiyo.key_file keys/shared.key"
    )
    words = [sys.executable, *serve.replace("ipc:///tmp/policy.sock", short_socket).split()]
    log = examples / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(words, cwd=examples, env=environment(), stdout=output, stderr=output)
        try:
            run(examples, command.replace("ipc:///tmp/policy.sock", short_socket), *EAGER, "--train.epochs", "4")
        finally:
            server.terminate()
            assert server.wait(10) == 0, log.read_text()
    commands = summary(examples)["commands"]
    assert [c["what"] for c in commands] == [
        "germinate hidden with residual_mlp",
        "start training hidden",
        "start grafting hidden",
    ]


@pytest.fixture
def short_socket(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An ipc endpoint of this test alone; a socket's path may have 107 bytes at most."""
    return f"ipc://{tmp_path_factory.mktemp('s')}/p"


@pytest.mark.parametrize(
    "command",
    [
        "python -m tolaria.launch --config launch/configs/digits.toml",
        "python -m tolaria.launch --config launch/configs/digits.toml --debug",
    ],
)
def test_one_process(command: str, tmp_path: Path) -> None:
    eager = [] if command.endswith("--debug") else EAGER
    shown = run(ROOT, command, *eager, "--train.epochs", "1", "--run.root", str(tmp_path))
    assert "1 rank on cpu" in shown
    assert "Finished" in shown


def test_two_ranks_and_going_on(tmp_path: Path) -> None:
    there = [*EAGER, "--run.root", str(tmp_path), "--dist.device", "cpu"]
    first = "torchrun --nproc_per_node=2 -m tolaria.launch --config launch/configs/digits.toml"
    again = "torchrun --nproc_per_node=2 -m tolaria.launch --config launch/configs/digits.toml --resume auto"
    assert "equal on 2 ranks" in run(ROOT, first, *there, "--train.epochs", "1")
    assert "resumed" in run(ROOT, again, *there, "--train.epochs", "2")
    [only] = tmp_path.iterdir()
    assert json.loads((only / "summary.json").read_text())["epochs"] == 2


def test_help_lists_every_section() -> None:
    shown = run(ROOT, "python -m tolaria.launch --help")
    for section in ("run", "task", "train", "kasmina", "tamiyo", "checkpoint"):
        assert f"\n{section}:" in shown
    assert max(len(line) for line in shown.splitlines()) <= 80
