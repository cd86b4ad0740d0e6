"""An operator's command at a live job whose rank 0 is killed in the middle of it: the command holds."""

import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults.test_processes import HELD_STEPS, digest_of, let_go, wait_until_held
from tests.faults.test_restarts import start
from tests.torchrun import Job
from tolaria.errors import RunUnreachable
from tolaria.leyline.codec import encode_command
from tolaria.orders.client import RunClient
from tolaria.orders.words import COMMAND, HELLO, Order
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.wal import WalKind, read_log
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policy import with_identity

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: sockets are made in it."""
    path = Path(tempfile.mkdtemp(prefix="tl-"))
    yield path
    shutil.rmtree(path)


def ordered(job: Job, folder: Path) -> threading.Thread:
    """Halve the rate at the step at which the ranks are held; the thread waits for the outcome, which may not come."""
    command = encode_command(with_identity(do.scale_lr("*", 0.5), "op-1", issued_by="test", issued_at_ns=1))
    wait_until_held(job, folder)
    client = RunClient.of(folder / "run")

    def send() -> None:
        with suppress(RunUnreachable):
            client.send(Order(action=COMMAND, command=command, operator="somebody"), wait_s=20)

    sender = threading.Thread(target=send)
    sender.start()
    job.wait_until(lambda: client.send(Order(action=HELLO)).details["waiting"] or None, "the order waiting")
    let_go(folder)
    return sender


def test_a_command_holds_when_rank_0_dies_between_its_record_and_its_effect(folder: Path) -> None:
    hold = {"hold_dir": folder, "hold_at": HELD_STEPS + 1}
    with start(folder, **hold) as job:
        sender = ordered(job, folder)
        expected = digest_of(job.finish())
        [done] = job.events("act_applied", rank=0)
        sender.join()
    for place in ("asked", "acted"):
        shutil.rmtree(folder / "run")
        for name in ("go", "reached-0", "reached-1"):
            (folder / name).unlink()
        with start(folder, f"{place}:0:1:kill", restarts=1, **hold) as job:
            sender = ordered(job, folder)
            summary = job.finish()
            sender.join()
            assert (folder / f"struck-{place}-0").exists()
            assert digest_of(summary) == expected
            for rank in range(2):
                again = job.events("act_applied", rank)[-1]
                assert (again["again"], again["step"], again["digest"]) == (True, done["step"], done["digest"])
            assert job.left_behind() == []
        log = read_log(folder / "run" / "wal", FileOps()).records
        assert [record.kind for record in log if record.kind in (WalKind.ACT, WalKind.ACTED)] == [
            WalKind.ACT, WalKind.ACTED,
        ]  # fmt: skip
