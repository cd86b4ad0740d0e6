"""The example policies steer real runs: one in Python, one in JavaScript in a node process of its own."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.handshake_run import Ran, run, run_config
from tolaria.cli.app import main
from tolaria.leyline.framing import new_key_file_text
from tolaria.view.frames import read_exchanges, read_keys

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "launch" / "examples"
LIFE = ["germinate early with", "start training early", "start grafting early", "stabilize early", "evaluate early"]

pytestmark = pytest.mark.processes
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


@contextmanager
def serving(*command: str, says: str) -> Iterator[tuple[str, str]]:
    """Endpoint and key file of a service that this command, with both filled in, starts; waits until it ``says`` so."""
    with tempfile.TemporaryDirectory(prefix="example-") as folder:
        key = Path(folder, "key")
        key.touch(0o600)
        key.write_text(new_key_file_text())
        endpoint = f"ipc://{folder}/s"
        words = [word.format(endpoint=endpoint, key=key) for word in command]
        with subprocess.Popen(
            words, cwd=EXAMPLES, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as server:
            assert server.stdout is not None
            try:
                assert says in server.stdout.readline()
                yield endpoint, str(key)
            finally:
                server.terminate()
                server.stdout.read()
        assert server.returncode == 0
        assert not Path(folder, "s").exists() or "node" not in words[0]


def steered(folder: Path, endpoint: str, key: str) -> Ran:
    return run(run_config(folder / "run", endpoint=endpoint, key_file=key, deadline_ms=5000))


def assert_grown(ran: Ran, key: str, version: str) -> None:
    assert ran.failures() == {}
    assert ran.refused() == []
    done = [command["what"] for command in ran.summary["commands"]]
    assert all(what.startswith(begin) for what, begin in zip(done, LIFE, strict=False))
    assert len(done) >= 3
    assert all(command["reason"] for command in ran.summary["commands"][:1])
    exchanges = list(read_exchanges(ran.folder, read_keys(ran.folder, Path(key))))
    assert all(e.question.verified and e.reply is not None and e.reply.verified for e in exchanges)
    assert {e.answer.policy_version for e in exchanges if e.answer} == {version}


@needs_node
def test_a_policy_in_javascript_grows_a_seed(tmp_path: Path) -> None:
    with serving("node", "policy.mjs", "{endpoint}", "{key}", says="javascript-1 answers") as (endpoint, key):
        assert_grown(steered(tmp_path, endpoint, key), key, "javascript-1")


@needs_node
def test_the_policy_in_javascript_passes_the_test_of_services(capsys: pytest.CaptureFixture[str]) -> None:
    with serving("node", "policy.mjs", "{endpoint}", "{key}", says="javascript-1 answers") as (endpoint, key):
        code = main(["policy", "test", "--endpoint", endpoint, "--key-file", key, "--deadline-ms", "5000"])
    assert (code, "FAIL" in (shown := capsys.readouterr().out)) == (0, False), shown


def test_a_policy_in_python_grows_a_seed_as_a_service(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "tolaria.tamiyo.server", "--policy", "policy_python:FirstFree",
               "--bind", "{endpoint}", "--key-file", "{key}")  # fmt: skip
    with serving(*command, says="policy_python:FirstFree answers at") as (endpoint, key):
        assert_grown(steered(tmp_path, endpoint, key), key, "first-free-1")


def test_the_policy_in_python_passes_and_is_as_short_as_it_is_said_to_be(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    assert main(["policy", "test", "policy_python:FirstFree", "--deadline-ms", "5000"]) == 0, capsys.readouterr().out
    assert len((EXAMPLES / "policy_python.py").read_text().splitlines()) <= 20


@needs_node
@pytest.mark.parametrize(
    ("arguments", "told"),
    [([], "usage: node policy.mjs"), (["ipc:///tmp/x", "/dev/null"], "only its owner may read"),
     (["http://x", "{key}"], "expected ipc://PATH or tcp://HOST:PORT")],
)  # fmt: skip
def test_the_policy_in_javascript_says_what_is_wrong(arguments: list[str], told: str, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.touch(0o600)
    key.write_text(new_key_file_text())
    words = ["node", str(EXAMPLES / "policy.mjs"), *(word.format(key=key) for word in arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode != 0
    assert told in done.stderr
