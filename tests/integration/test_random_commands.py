"""Two hundred commands in random order, legal and illegal, on two ranks: what is accepted is all that has an effect."""

import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.random_commands import PER_BOUNDARY
from tests.torchrun import Job, launch
from tolaria.leyline.codec import decode_command

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

BOUNDARIES, STEPS_BETWEEN = 30, 4
FLAGS = (
    "--train.epochs", "36", "--train.boundary_steps", str(STEPS_BETWEEN),
    "--train.max_steps", str(BOUNDARIES * STEPS_BETWEEN), "--optim.lr", "0.02",
    "--compile.enabled", "false", "--dist.device", "cpu", "--checkpoint.every", "0", "--log.progress", "off",
    "--kasmina.blend_steps", "6", "--kasmina.gradient_window", "2", "--kasmina.min_contribution", "-10",
    "--kasmina.max_loss_ratio", "100", "--kasmina.output_ratio", "100", "--kasmina.embargo_boundaries", "1",
    "--lr.seed_policy", "morpho_adaptive", "--tamiyo.deadline_ms", "60000",
)  # fmt: skip


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: sockets are made in it."""
    path = Path(tempfile.mkdtemp(prefix="tl-"))
    yield path
    shutil.rmtree(path)


def accepted_commands(job: Job) -> dict[int, list[str]]:
    """By boundary, the exact bytes of what was applied, in their order."""
    applied = {event["command_id"] for event in job.events("command_applied", rank=0)}
    found: dict[int, list[str]] = defaultdict(list)
    for decision in job.events("decision", rank=0):
        seen = set[str]()
        for raw in decision["commands"]:
            command_id = decode_command(bytes.fromhex(raw)).command_id
            # Of two with one id the first is meant.
            if command_id in applied and command_id not in seen:
                found[decision["boundary"]].append(raw)
            seen.add(command_id)
    return found


def digest_of(summary: dict[str, Any]) -> str:
    """The state that both ranks ended with."""
    assert len(summary["state_digest"]) == 2
    (digest,) = set(summary["state_digest"].values())
    return str(digest)


def test_what_is_accepted_of_two_hundred_random_commands_is_all_that_has_an_effect(folder: Path) -> None:
    policy = "tests.integration.random_commands"
    with launch(folder, (*FLAGS, "--tamiyo.policy", f"{policy}:RandomCommands")) as job:
        summary = job.finish()
        refused, accepted = job.events("command_refused", rank=0), accepted_commands(job)
        assert job.events("policy_failed") == [] and summary["incidents"] == []
        assert job.left_behind() == []
    done = [decode_command(bytes.fromhex(raw)) for commands in accepted.values() for raw in commands]
    assert len(refused) + len(done) == BOUNDARIES * PER_BOUNDARY > 200
    assert len(done) > 40 and len(refused) > 60
    assert all(event["code"] and len(event["reason"]) > 10 for event in refused)
    # As many kinds of refusals, and of what took effect, as make the test worth its name.
    assert len({event["code"] for event in refused}) >= 12, sorted({event["code"] for event in refused})
    operations = {getattr(c.payload, "operation", None) for c in done} - {None}
    keys = {key for c in done for key in getattr(c.payload, "hyperparameters", {})}
    assert len(operations) >= 6, operations
    assert len(keys) >= 7, keys
    shutil.rmtree(folder / "run")
    (folder / "accepted.json").write_text(json.dumps(accepted))
    flags = (*FLAGS, "--tamiyo.policy", f"{policy}:Repeat", "--tamiyo.args.file", str(folder / "accepted.json"))
    with launch(folder, flags) as job:
        repeated = job.finish()
        assert job.events("command_refused") == []
    assert digest_of(repeated) == digest_of(summary)
