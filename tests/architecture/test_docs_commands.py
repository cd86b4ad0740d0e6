"""Every command that a page of docs/ tells a person to type is one that a test runs."""

import re

from tests.architecture.source import ROOT

SHELL_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)

POLICY = "tests/integration/test_docs_policy.py"
LAUNCH = "python -m tolaria.launch"
# (page, how its command begins) -> (the test that runs it, text by which the test's source shows it).
TESTED_COMMANDS: dict[tuple[str, str], tuple[str, str]] = {
    ("policy.md", "tolaria policy test my_policy"): (POLICY, 'command("tolaria policy test my_policy")'),
    ("policy.md", f"{LAUNCH} --tamiyo.policy"): (POLICY, f'command("{LAUNCH} --tamiyo.policy")'),
    ("policy.md", "tolaria policy replay"): (POLICY, 'command("tolaria policy replay")'),
    ("policy.md", f"{LAUNCH} --tamiyo.shadow"): (POLICY, f'command("{LAUNCH} --tamiyo.shadow")'),
    ("policy.md", "python -m tolaria.tamiyo.keys keys"): (POLICY, 'command("python -m tolaria.tamiyo.keys keys")'),
    ("policy.md", "node launch/examples"): (POLICY, 'command("node launch/examples")'),
    ("policy.md", "tolaria policy test --endpoint"): (POLICY, 'command("tolaria policy test --endpoint")'),
    ("policy.md", f"{LAUNCH} --tamiyo.endpoint"): (POLICY, f'command("{LAUNCH} --tamiyo.endpoint")'),
}
PAGES = {page for page, _ in TESTED_COMMANDS}


def commands(page: str) -> list[str]:
    """The commands of a page's ```sh blocks."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    lines = "\n".join(SHELL_BLOCK.findall(text)).splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def test_every_command_of_these_pages_is_tested_and_no_other_is_listed() -> None:
    for page in PAGES:
        begins = [begin for listed, begin in TESTED_COMMANDS if listed == page]
        found = [[begin for begin in begins if line.startswith(begin)] for line in commands(page)]
        assert sorted(found) == sorted([begin] for begin in begins), page


def test_the_tests_named_here_run_the_commands() -> None:
    for (page, begin), (test, shown_by) in TESTED_COMMANDS.items():
        assert shown_by in (ROOT / test).read_text(encoding="utf-8"), f"{test} does not run {begin!r} of {page}"
