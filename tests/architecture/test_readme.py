"""Every command that README.md tells a person to type is one that a test runs."""

import re

from tests.architecture.source import ROOT

# Command as in a ```sh block of README.md -> (the test that runs it, text by which the test's source shows it).
TESTED_COMMANDS: dict[str, tuple[str, str]] = {}

SHELL_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def readme_commands() -> set[str]:
    """The commands of all ```sh blocks: without comments, continued lines joined."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    lines = "\n".join(SHELL_BLOCK.findall(text)).replace("\\\n", " ").splitlines()
    return {" ".join(line.split()) for line in lines if line.strip() and not line.lstrip().startswith("#")}


def test_every_command_of_the_readme_is_tested_and_no_other_is_listed() -> None:
    assert readme_commands() == set(TESTED_COMMANDS)


def test_the_tests_named_here_run_the_commands() -> None:
    for command, (test, shown_by) in TESTED_COMMANDS.items():
        assert shown_by in (ROOT / test).read_text(encoding="utf-8"), f"{test} does not run {command!r}"
