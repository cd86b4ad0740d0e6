"""Every command that README.md and docs/ tell a person to type is one that a test runs."""

import re
from pathlib import Path

from tests.architecture.source import ROOT

# Command as in a ```sh block of these pages -> (the test that runs it, text by which the test's source shows it).
EXAMPLES = "tests/integration/test_readme_examples.py"
OPERATOR = "tests/faults/test_operator.py"
DIGITS = "-m tolaria.launch --config launch/configs/digits.toml"
SPIKE = "-m tolaria.launch --config launch/configs/spike.toml"
MINE = "python -m tolaria.launch --task my_model:make_task"
SERVICE = "--tamiyo.endpoint ipc:///tmp/policy.sock --tamiyo.key_file keys/shared.key"
SERVE = "-m tolaria.tamiyo.server --policy my_policy:OneSeed --bind ipc:///tmp/policy.sock --key-file keys/shared.key"
TASK_PAGE = "tests/integration/test_docs_task.py"
POLICY_PAGE = "tests/integration/test_docs_policy.py"
GROW_ONCE = "my_policy:GrowOnce"
TUMOURS = "-m tolaria.launch --task tumours:make_task"
TESTED_COMMANDS: dict[str, tuple[str, str]] = {
    "make demo": ("tests/integration/test_demo.py", '"demo"'),
    f"torchrun --nproc_per_node=2 {SPIKE}": ("tests/integration/test_spike.py", "launch/configs/spike.toml"),
    "make test": ("Makefile", "for stage in lint types architecture test"),
    f"torchrun --nproc_per_node=2 {DIGITS}": (EXAMPLES, f"torchrun --nproc_per_node=2 {DIGITS}"),
    f"torchrun --nproc_per_node=2 {DIGITS} --resume auto": (EXAMPLES, f"{DIGITS} --resume auto"),
    f"python {DIGITS}": (EXAMPLES, f'"python {DIGITS}"'),
    f"python {DIGITS} --debug": (EXAMPLES, f'"python {DIGITS} --debug"'),
    "python -m tolaria.launch --help": (EXAMPLES, '"python -m tolaria.launch --help"'),
    f"{MINE} --optim.lr 0.01": (EXAMPLES, f'"{MINE} --optim.lr 0.01"'),
    f"{MINE} --tamiyo.policy my_policy:OneSeed --optim.lr 0.01": (EXAMPLES, "--tamiyo.policy my_policy:OneSeed"),
    "python -m tolaria.tamiyo.keys keys": (EXAMPLES, '"python -m tolaria.tamiyo.keys keys"'),
    f"python {SERVE}": (EXAMPLES, SERVE),
    'python -m tolaria.emergency RUN halt --reason "disk is being replaced"': (OPERATOR, 'COMMANDS["halt"]'),
    "python -m tolaria.emergency RUN status": (OPERATOR, 'COMMANDS["status"]'),
    "python -m tolaria.emergency RUN clear": (OPERATOR, 'COMMANDS["clear"]'),
    "make faults": ("Makefile", "--faults"),
    f"python {TUMOURS} --task.args.width 8 --train.epochs 20 --debug": (TASK_PAGE, f'"python {TUMOURS}'),
    f"torchrun --nproc_per_node=2 {TUMOURS} --train.epochs 20": (TASK_PAGE, f'"torchrun --nproc_per_node=2 {TUMOURS}'),
    f"tolaria policy test {GROW_ONCE} --arg patience=2": (POLICY_PAGE, 'command("tolaria policy test my_policy")'),
    f"tolaria policy replay runs/mine {GROW_ONCE} --arg patience=4": (POLICY_PAGE, 'command("tolaria policy replay")'),
    "tolaria policy test --endpoint ipc:///tmp/policy.sock --key-file keys/shared.key": (
        POLICY_PAGE, 'command("tolaria policy test --endpoint")',
    ),
    "node launch/examples/policy.mjs ipc:///tmp/policy.sock keys/shared.key": (
        POLICY_PAGE, 'command("node launch/examples")',
    ),
    f"python -m tolaria.launch --tamiyo.policy {GROW_ONCE} --tamiyo.args.patience 2": (
        POLICY_PAGE, 'command("python -m tolaria.launch --tamiyo.policy")',
    ),
    f"python -m tolaria.launch --tamiyo.shadow {GROW_ONCE}": (
        POLICY_PAGE, 'command("python -m tolaria.launch --tamiyo.shadow")',
    ),
    f"python -m tolaria.launch {SERVICE}": (POLICY_PAGE, 'command("python -m tolaria.launch --tamiyo.endpoint")'),
    f"{MINE} {SERVICE}": (EXAMPLES, "--tamiyo.endpoint ipc:///tmp/policy.sock"),
}  # fmt: skip

SHELL_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands_of(*pages: Path) -> set[str]:
    """The commands of all ```sh blocks: without comments, continued lines joined."""
    blocks = "".join(block for page in pages for block in SHELL_BLOCK.findall(page.read_text(encoding="utf-8")))
    lines = blocks.replace("\\\n", " ").splitlines()
    return {" ".join(line.split()) for line in lines if line.strip() and not line.lstrip().startswith("#")}


OPERATING = ROOT / "docs" / "operating.md"
# Its test takes the commands from the page itself, so every one is run.
TESTED_COMMANDS |= dict.fromkeys(commands_of(OPERATING), ("tests/integration/test_docs_operating.py", "in AFTERWARDS"))


def test_every_command_to_type_is_tested_and_no_other_is_listed() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    assert commands_of(*pages) == set(TESTED_COMMANDS)


def test_the_tests_named_here_run_the_commands() -> None:
    for command, (test, shown_by) in TESTED_COMMANDS.items():
        assert shown_by in (ROOT / test).read_text(encoding="utf-8"), f"{test} does not run {command!r}"
