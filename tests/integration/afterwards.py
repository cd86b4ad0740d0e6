"""One run for the tests of what can be shown and proven afterwards: two ranks, a policy, a person, an incident.

Its task holds the ranks until the person's first order waits. Rank 1 reads three bad batches before that, so that the
run has gone back once; the person sends it back a second time.
"""

import io
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.faults.test_processes import SCRIPT, flags, let_go
from tests.torchrun import launch
from tolaria.cli.app import main
from tolaria.leyline.codec import encode_command
from tolaria.leyline.types import Command
from tolaria.orders.client import RunClient
from tolaria.orders.words import COMMAND, PAUSE, RESUME, STOP, Order, Outcome
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policy import with_identity

WAIT_S = 90.0
EVIL = "<script>document.title='owned'</script><img src=x onerror=alert(1)> & more"
HELD_AT = 40


@dataclass(frozen=True)
class Steered:
    """``run``: its directory; ``live``: a copy of it from when it was at work; ``told``: what each order came to;
    ``checked``: what `tolaria verify --json` said while it was."""

    run: Path
    live: Path
    told: dict[str, Outcome]
    summary: dict[str, Any]
    checked: dict[str, Any]


def tolaria_here(*words: str, code: int = 0) -> str:
    """What the command says, run in this process: it must end with this exit code."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        found = main(words)
    assert found == code, out.getvalue() + err.getvalue()
    return out.getvalue() + err.getvalue()


def ordered(run: Path, action: str = COMMAND, command: Command | None = None, reason: str = "") -> Outcome:
    """What a person's order comes to."""
    order = Order(action=action, operator="somebody", reason=reason)
    if command is not None:
        named = with_identity(command, f"op-{order.order_id}", issued_by="somebody", issued_at_ns=time.time_ns())
        order = replace(order, command=encode_command(named))
    return RunClient.of(run).send(order, wait_s=WAIT_S)


def went_back(run: Path) -> Outcome | None:
    """The outcome of going back to a good checkpoint; None while there is none yet, which is refused."""
    outcome = ordered(run, command=do.rollback(step=None), reason="it was better there")
    return outcome if outcome.state == "applied" else None


def steered_run(folder: Path) -> Steered:
    """Train in ``folder / "run"``, with a person at it."""
    script = folder / "steered.toml"
    script.write_text(
        SCRIPT.replace('blueprint = "residual_mlp" }', f'blueprint = "residual_mlp", reason = "{EVIL}" }}')
    )
    task = {"hold_dir": folder, "hold_at": HELD_AT, "nan_from": 24, "nan_to": 27}
    options = [
        *flags(folder, hold=False, **task), f"--tamiyo.policy=script:{script}", "--recovery.snapshot_steps=5",
        "--checkpoint.every=1", "--checkpoint.keep=4", "--train.epochs=100000", "--run.name=steered",
    ]  # fmt: skip
    run = folder / "run"
    with launch(folder, options) as job:
        for rank in range(2):
            job.wait_file(folder / f"reached-{rank}")
        shutil.copytree(run, folder / "live")
        checked = json.loads(tolaria_here("verify", str(run), "--json"))
        with ThreadPoolExecutor(1) as thread:
            pausing = thread.submit(ordered, run, PAUSE, reason="lunch")
            let_go(folder)
            told = {"paused": pausing.result()}
        told["halved"] = ordered(run, command=do.scale_lr("host*", 0.5), reason=EVIL)
        told["far"] = ordered(run, command=do.scale_lr("*", 1e9))
        told["resumed"] = ordered(run, RESUME)
        told["back"] = job.wait_until(lambda: went_back(run), "a good checkpoint to go back to")
        told["stopped"] = ordered(run, STOP, reason="enough")
        summary = job.finish()
        assert job.left_behind() == []
    return Steered(run, folder / "live", told, summary, checked)
