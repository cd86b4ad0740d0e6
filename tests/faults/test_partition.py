"""Two machines whose network is cut, on one: each rank has a network, a /dev/shm and a page of its own.

What is simulated is the cable: a pair of virtual interfaces between two network namespaces, one of which goes down.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.test_processes import HELD_STEPS, STEPS, digest_of, finish_as, flags
from tests.torchrun import Job

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = 29713
TIMEOUT_S = 8
BOTH = """
set -e
for rank in 0 1; do
    ip netns exec {0}$rank unshare --mount sh -c '
        mount -t tmpfs none /dev/shm
        echo $$ > "{1}/pid-$RANK"
        exec {2}' &
done
code=0
wait -n || code=$?
wait -n || code=$?
exit $code
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: sockets are made in it."""
    path = Path(tempfile.mkdtemp(prefix="tl-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def networks() -> Iterator[str]:
    """Two network namespaces joined by a pair of interfaces; the beginning of their names."""
    name = f"tl{os.getpid() % 10_000}-"
    try:
        for rank in range(2):
            ip("netns", "add", f"{name}{rank}")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this process may not make network namespaces: {error}")
    try:
        ip("link", "add", f"{name}v0", "netns", f"{name}0", "type", "veth", "peer", f"{name}v1", "netns", f"{name}1")
        for rank in range(2):
            inside = ("-n", f"{name}{rank}")
            ip(*inside, "addr", "add", f"{ADDRESSES[rank]}/24", "dev", f"{name}v{rank}")
            ip(*inside, "link", "set", f"{name}v{rank}", "up")
            ip(*inside, "link", "set", "lo", "up")
        yield name
    finally:
        for rank in range(2):
            ip("netns", "del", f"{name}{rank}")


def launch_apart(folder: Path, networks: str) -> Job:
    """One rank in each network, held in the middle of an epoch."""
    limits = ["--dist.threads=1", f"--dist.timeout_s={TIMEOUT_S}", f"--dist.control_timeout_s={TIMEOUT_S}"]
    words = [sys.executable, "-m", "tolaria.launch", *flags(folder), *limits, "--run.dir", str(folder / "run")]
    script = BOTH.replace("ip netns exec", "RANK=$rank GLOO_SOCKET_IFNAME={0}v$rank ip netns exec")
    environment = {
        "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": ADDRESSES[0],
        "MASTER_PORT": str(PORT),
    }  # fmt: skip
    command = ["bash", "-c", script.format(networks, folder, " ".join(f'"{word}"' for word in words))]
    return Job(folder, command, folder / "run", environment=environment)


@pytest.fixture(scope="module")
def unharmed() -> Iterator[str]:
    """Digest of the run that nothing happens to."""
    with tempfile.TemporaryDirectory(prefix="tl-") as path:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                   "-m", "tolaria.launch", *flags(Path(path), hold=False), "--run.dir", f"{path}/run"]  # fmt: skip
        with Job(Path(path), command, Path(path) / "run") as job:
            yield digest_of(job.finish())


def test_a_cut_between_two_machines_ends_both_ranks_commits_nothing_and_the_next_start_goes_on(
    folder: Path, networks: str, unharmed: str
) -> None:
    with launch_apart(folder, networks) as job:
        for rank in range(2):
            job.wait_file(folder / f"reached-{rank}")
        assert job.last_step() == HELD_STEPS
        before = job.checkpoints()
        ip("-n", f"{networks}1", "link", "set", f"{networks}v1", "down")
        cut = time.monotonic()
        (folder / "go").touch()
        assert job.wait() != 0
        assert time.monotonic() - cut < 5 * TIMEOUT_S
        assert job.checkpoints() == before
        failed = {event["rank"]: event["error"] for event in job.events("run_failed")}
        assert failed == {0: "PeerLost", 1: "PeerLost"}, job.output
        assert max(event["saved_step"] for event in job.events("checkpoint_committed")) < HELD_STEPS < STEPS
    finish_as(unharmed, folder, ranks=2)


def test_a_cut_that_is_shorter_than_the_timeout_harms_nobody(folder: Path, networks: str, unharmed: str) -> None:
    with launch_apart(folder, networks) as job:
        for rank in range(2):
            job.wait_file(folder / f"reached-{rank}")
        ip("-n", f"{networks}1", "link", "set", f"{networks}v1", "down")
        (folder / "go").touch()
        time.sleep(2)
        assert job.last_step() <= HELD_STEPS + 1  # the cut was one
        ip("-n", f"{networks}1", "link", "set", f"{networks}v1", "up")
        assert digest_of(job.finish()) == unharmed
        assert job.events("run_failed") == []


def test_the_cut_rank_is_stopped_by_a_signal_all_the_same(folder: Path, networks: str) -> None:
    with launch_apart(folder, networks) as job:
        for rank in range(2):
            job.wait_file(folder / f"reached-{rank}")
        ip("-n", f"{networks}1", "link", "set", f"{networks}v1", "down")
        (folder / "go").touch()
        time.sleep(1)
        os.kill(int((folder / "pid-1").read_text()), signal.SIGTERM)
        assert job.wait() != 0
        assert {event["error"] for event in job.events("run_failed")} == {"PeerLost"}
