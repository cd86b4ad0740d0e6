"""`tolaria policy test` finds each mistake by the check that is meant for it, and passes policies that make none."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit import bad_policies
from tolaria.cli.app import main
from tolaria.kit.conformance import CHECKS, FAIL, NOT_RUN, SKIPPED, Result, check_policy
from tolaria.kit.course import BOUNDARIES, CONSERVATIVE_AT, NOT_FINITE_AT, SimulatedRun
from tolaria.kit.judge import BOUNDS, CONSERVATIVE, LEGAL, MESSAGES, judge
from tolaria.kit.odd import odd_questions
from tolaria.leyline.codec import decode_request, encode_command, encode_request
from tolaria.leyline.framing import KeyRing, load_key_file, new_key_file_text
from tolaria.leyline.limits import MAX_MEASUREMENT
from tolaria.leyline.types import Command, SeedOp, SeedStage
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.desk import Desk
from tolaria.tamiyo.endpoint import parse_endpoint
from tolaria.tamiyo.policies import load_policy
from tolaria.tamiyo.policy import with_identity
from tolaria.tamiyo.server import serve
from tolaria.tamiyo.transport import RouterTransport

HERE = "tests.unit.bad_policies"

SCRIPT = """
command = [
    { boundary = 8, op = "germinate", slot = "early", blueprint = "low_rank" },
    { boundary = 9, op = "start_training", slot = "early" },
    { boundary = 10, op = "scale_lr", group = "*", factor = 0.5 },
]
"""


def examined(spec: str, **args: Any) -> Result:
    return check_policy(spec, args, deadline_ms=1500)


def failed(result: Result) -> dict[str, str]:
    """Check -> where and why, of those that failed."""
    return {c.name: f"{c.where}: {c.text}" for c in result.checks if c.status == FAIL}


@pytest.mark.processes
@pytest.mark.parametrize("spec", ["heuristic", "noop", "script", f"{HERE}:Sound"])
def test_every_built_in_policy_passes(spec: str, tmp_path: Path) -> None:
    if spec == "script":
        (tmp_path / "s.toml").write_text(SCRIPT)
        spec = f"script:{tmp_path / 's.toml'}"
    result = check_policy(spec, {}, deadline_ms=12_000)
    assert failed(result) == {}
    assert [check.name for check in result.checks] == [*CHECKS]
    assert result.passed


MISTAKES = {
    "Broken": ("loads", "no such model file"),
    "Nameless": ("version", "1 to 128 printable characters"),
    "Numbered": ("version", "1 to 128 printable characters"),
    "Slow": ("answers", "boundary 3: no answer within 1,500 ms"),
    "Deadly": ("answers", "boundary 3: its process ended with code 3"),
    "Raising": ("decides", "boundary 12: ZeroDivisionError: of all things (bad_policies.py:"),
    "Careless": ("odd states", "no metrics at all: KeyError: 'boundaries_left' (bad_policies.py:"),
    "Mumbling": ("messages", "boundary 8: optimizer.hyperparameters[lr]=nan"),
    "Silly": ("messages", "boundary 8: str 'germinate' is no Command"),
    "Lawless": ("legal", "FOSSILIZE is not legal in GERMINATED; legal: START_TRAINING, CANCEL, CULL"),
    "Nowhere": ("legal", "boundary 8: germinate attic with low_rank: no slot 'attic'; slots: early, late"),
    "Wild": ("bounds", "boundary 8: host: lr x10000: total factor of the lr of 'host' 1 -> 10000: allowed at most"),
    "Reckless": ("conservative", "boundary 19: host: lr x2: nothing learns faster in conservative mode"),
    "Sleepy": ("emergency", "at most 50 ms are there for it"),
    "Stuck": ("emergency", "boundary 1: no answer within 1,500 ms"),
    "Panicking": ("emergency", "boundary 1: RuntimeError: help (bad_policies.py:"),
    "Moody": ("deterministic", "boundary 8: first host: lr x"),
    "Remembering": ("restart", "boundary 8 alone: first host: lr x0.5, then nothing"),
}
ENDS_IT = {"Broken", "Slow", "Deadly", "Stuck", "Moody", "Sleepy"}
"""Mistakes after which something can not be tested any more; many sleepy instances in one process miss the deadline."""


@pytest.mark.processes
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_fails_the_check_that_is_meant_for_it_and_no_other(name: str) -> None:
    check, told = MISTAKES[name]
    result = examined(f"{HERE}:{name}")
    assert [*failed(result)] == [check]
    assert told in failed(result)[check]
    assert not result.passed
    assert any(c.status == NOT_RUN for c in result.checks) is (name in ENDS_IT)


def test_every_check_has_a_mistake_that_it_finds() -> None:
    services = {"idempotent", "junk"}
    assert {check for check, _ in MISTAKES.values()} | services == set(CHECKS)
    assert all(hasattr(bad_policies, name) for name in MISTAKES)


# Services


@contextmanager
def service(folder: Path, make: Callable[[KeyRing], Desk]) -> Iterator[list[str]]:
    """The flags that name a service with this desk."""
    key = folder / "key"
    key.touch(0o600)
    key.write_text(new_key_file_text())
    endpoint = f"ipc://{folder / 's'}"
    router = RouterTransport(parse_endpoint(endpoint, "--bind"))
    stop = threading.Event()
    thread = threading.Thread(target=serve, args=(router, make(load_key_file(key)), stop.is_set))
    thread.start()
    try:
        yield ["--endpoint", endpoint, "--key-file", str(key)]
    finally:
        stop.set()
        thread.join(5)
        router.close()


class Forgetful(Desk):
    """Answers a question anew each time."""

    def answer(self, raw: bytes | None, sender: bytes = b"") -> bytes | None:
        self._generations.clear()
        return super().answer(raw, sender)


class Fragile(Desk):
    """Falls silent at the first frame that is no question."""

    def answer(self, raw: bytes | None, sender: bytes = b"") -> bytes | None:
        return super().answer(raw, sender) if not self.rejected else None


@pytest.mark.processes
@pytest.mark.parametrize(("desk", "check"), [(Desk, None), (Forgetful, "idempotent"), (Fragile, "junk")])
def test_a_service_is_tested_at_its_endpoint(
    desk: type[Desk], check: str | None, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    with service(tmp_path_factory.mktemp("s"), lambda keys: desk(keys, lambda: load_policy("heuristic", {}))) as flags:
        code = main(["policy", "test", *flags, "--json", "--deadline-ms", "2000"])
    found = json.loads(capsys.readouterr().out)
    status = {c["name"]: c["status"] for c in found["checks"]}
    assert [name for name, told in status.items() if told == FAIL] == ([] if check is None else [check])
    assert {status[name] for name in ("emergency", "deterministic", "restart")} == {SKIPPED}
    assert code == (0 if check is None else 1)


# What a person sees


@pytest.mark.processes
def test_the_command_prints_a_line_for_each_check(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["policy", "test", f"{HERE}:Wild", "--deadline-ms", "5000"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Policy {HERE}:Wild"
    (at,) = [number for number, line in enumerate(lines) if "FAIL" in line]
    assert lines[at].startswith("  FAIL     bounds         boundary 8: host: lr x10000: ")
    assert lines[-1] == "13 passed, 1 failed"
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "expected a policy, or --endpoint, and not both"),
        (["noop", "--endpoint", "ipc:///x"], "and not both"),
        (["--endpoint", "ipc:///x"], "--key-file"),
        (["noop", "--arg", "x"], "expected NAME=VALUE"),
        (["--endpoint", "http://x", "--key-file", "none"], "none: cannot read the key file"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "test", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


# The simulated run, the odd states and the judge


def sent(command: Command, number: int = 0) -> bytes:
    return encode_command(with_identity(command, f"c{number}", issued_by="test", issued_at_ns=1))


def test_the_simulated_run_takes_a_policy_through_every_stage_and_is_always_the_same() -> None:
    def played() -> list[Any]:
        run, policy, seen = SimulatedRun(), load_policy("heuristic", {}), []
        for _ in range(BOUNDARIES):
            asked = decode_request(encode_request(run.question()))
            seen.append(asked)
            commands = policy.decide(asked.state, asked.field_reports)
            run.answer(asked.state, [sent(c, 100 * run.boundary + i) for i, c in enumerate(commands)])
            assert run.faults == []
        return seen

    first = played()
    assert first == played()
    stages = {seed.stage for asked in first for seed in asked.state.seeds}
    assert stages >= {SeedStage(number) for number in range(1, 8)}
    modes = [asked.state.training_metrics["conservative"] for asked in first]
    assert [number for number, mode in enumerate(modes, 1) if mode] == [*CONSERVATIVE_AT]
    assert first[NOT_FINITE_AT - 1].state.validation_loss == MAX_MEASUREMENT
    assert any(asked.field_reports for asked in first)


def test_the_simulated_run_refuses_what_a_gate_does_not_let_through_and_removes_what_is_culled() -> None:
    run = SimulatedRun()
    stages = []
    for command in (do.germinate("early", "low_rank"), do.start_training("early"), do.start_grafting("early"),
                    do.stabilize("early"), do.cull("early"), None, None, None, None):  # fmt: skip
        asked = run.question()
        stages.append(asked.state.seeds[0].stage.name)
        run.answer(asked.state, [] if command is None else [sent(command, run.boundary)])
    assert stages == ["DORMANT", "GERMINATED", "TRAINING", "BLENDING", "BLENDING", "EMBARGOED", "EMBARGOED",
                      "RESETTING", "DORMANT"]  # fmt: skip


def test_every_odd_state_can_be_sent() -> None:
    odd = odd_questions()
    assert {len(asked.state.seeds) for asked in odd.values()} >= {0, 64, 256}
    assert any(not asked.state.training_metrics for asked in odd.values())
    for name, asked in odd.items():
        again = encode_request(decode_request(encode_request(asked)))
        assert again == encode_request(asked), name


STATE = replace(
    SimulatedRun().question().state, training_metrics={"learning_rate": 0.02, "conservative": 0.0}
)  # fmt: skip
CAREFUL = replace(STATE, training_metrics={"learning_rate": 0.02, "conservative": 1.0})


@pytest.mark.parametrize(
    ("command", "normal", "careful"),
    [
        (do.germinate("early", "low_rank"), None, CONSERVATIVE),
        (do.cull("early"), LEGAL, LEGAL),
        (do.seed_command(SeedOp.EVALUATE, "nowhere"), LEGAL, LEGAL),
        (do.set_lr("host", 0.01), None, None),
        (do.set_lr("host", 0.04), None, CONSERVATIVE),
        (do.set_lr("host", 5.0), BOUNDS, BOUNDS),
        (do.scale_lr("*", 0.5), None, None),
        (do.scale_lr("*", 0.0), BOUNDS, BOUNDS),
        (do.scale_lr("seed/*", 0.5), LEGAL, LEGAL),
        (do.thaw("host"), None, CONSERVATIVE),
        (do.freeze("host"), None, None),
        (do.set_optimizer("host", weight_decay=0.9), BOUNDS, BOUNDS),
        (do.set_optimizer("host", beta1=0.95), None, CONSERVATIVE),
        (do.set_optimizer("host", lr=0.1, lr_scale=2.0), LEGAL, LEGAL),
        (do.undo(), None, None),
        (do.change_optimizer("sgd", lr=0.1), None, CONSERVATIVE),
        (do.change_optimizer("magic", lr=0.1), LEGAL, LEGAL),
        (do.change_optimizer("sgd", lr=1000.0), BOUNDS, BOUNDS),
        (do.rollback(), None, None),
        (do.rollback(step=10**6), LEGAL, LEGAL),
        (do.conservative(True), None, None),
        (do.pause(), None, None),
    ],
)
def test_the_judge_says_what_a_trainer_would_refuse(command: Command, normal: str | None, careful: str | None) -> None:
    for state, check in ((STATE, normal), (CAREFUL, careful)):
        ((_, fault),) = judge(state, [sent(command)])
        assert (fault.check if fault else None) == check


def test_the_judge_sees_what_does_not_go_together_in_one_reply() -> None:
    faults = [fault for _, fault in judge(STATE, [sent(do.germinate("early", "low_rank"), n) for n in (1, 2)])]
    assert faults[0] is None
    assert faults[1] is not None and "commanded in this reply already" in faults[1].reason
    same = [fault for _, fault in judge(STATE, [sent(do.undo(), 1), sent(do.freeze("host"), 1), b"\xff"])]
    assert [fault.check if fault else None for fault in same] == [None, LEGAL, MESSAGES]
