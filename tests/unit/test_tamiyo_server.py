"""The policy service: one decision per question, its process, the embedded child, CURVE."""

import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from tolaria.config import TamiyoConfig
from tolaria.errors import ConfigError, PolicyUnavailable, RunDirError
from tolaria.leyline.codec import decode_command, decode_reply, encode_request
from tolaria.leyline.framing import (
    FrameKind,
    KeyRing,
    check_reply,
    load_key_file,
    open_frame,
    request_header,
    seal,
)
from tolaria.leyline.types import (
    Command,
    FieldOutcome,
    FieldReport,
    HardwareContext,
    PolicyRequest,
    SystemState,
)
from tolaria.tamiyo import server
from tolaria.tamiyo.client import PolicyClient, open_client
from tolaria.tamiyo.curve import ServerCurve, load_client_curve, load_server_curve
from tolaria.tamiyo.desk import MAX_RUNS, Desk
from tolaria.tamiyo.embedded import EmbeddedPolicy
from tolaria.tamiyo.endpoint import parse_endpoint
from tolaria.tamiyo.keys import main as make_keys
from tolaria.tamiyo.policies.heuristic import HeuristicPolicy
from tolaria.tamiyo.policies.noop import NoopPolicy
from tolaria.tamiyo.policy import Policy, cull, scale_lr
from tolaria.tamiyo.socketdir import DEAD_PREFIX, PREFIX, SocketDir, remove_stale
from tolaria.tamiyo.transport import DealerTransport, RouterTransport

KEYS = KeyRing([bytes(range(32))])
ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 15.0


def request(boundary: int = 1, run_id: str = "run", loss: float = 0.5) -> PolicyRequest:
    state = SystemState(
        packet_id=f"packet-{boundary}", current_epoch=70 + boundary, global_step=10 * boundary,
        validation_accuracy=0.5, validation_loss=loss, training_loss=0.6, timestamp_ns=1, training_run_id=run_id,
        experiment_name="test", hardware=HardwareContext(device_type="cpu"),
    )  # fmt: skip
    report = FieldReport(report_id="r", command_id="c", training_run_id=run_id, outcome=FieldOutcome.SUCCESS)
    return PolicyRequest(state=state, field_reports=(report,))


def question(
    boundary: int = 1,
    seq: int = 1,
    *,
    run_id: str = "run",
    generation: str = "g",
    keys: KeyRing = KEYS,
    loss: float = 0.5,
) -> bytes:
    payload = encode_request(request(boundary, run_id, loss))
    header = request_header(
        run_id=run_id, generation=generation, boundary=boundary, seq=seq, payload=payload, wall_ns=1
    )
    return seal(header, payload, keys)


class Counting(Policy):
    """Culls the slot named by how often it was asked."""

    version = "counting-1"

    def __init__(self) -> None:
        self.asked: list[tuple[float, int]] = []

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        self.asked.append((state.training_metrics["boundary"], len(reports)))
        return [cull(f"slot-{len(self.asked)}"), replace(scale_lr("host", 0.5), command_id="mine")]


def commands_in(reply: bytes | None) -> list[Command]:
    assert reply is not None
    received = decode_reply(open_frame(reply, KEYS, FrameKind.REPLY).payload)
    return [decode_command(raw) for raw in received.commands]


def version_in(reply: bytes | None) -> str:
    assert reply is not None
    return decode_reply(open_frame(reply, KEYS, FrameKind.REPLY).payload).policy_version


def test_a_question_is_answered_by_the_policy_with_complete_commands() -> None:
    policy = Counting()
    desk = Desk(KEYS, lambda: policy, wall_ns=lambda: 123)
    asked = question(boundary=4)
    reply = desk.answer(asked)
    assert reply is not None
    check_reply(open_frame(asked, KEYS, FrameKind.REQUEST).header, open_frame(reply, KEYS, FrameKind.REPLY).header)
    assert policy.asked == [(4.0, 1)]
    first, second = commands_in(reply)
    assert first.command_id == "b4-0"
    assert second.command_id == "mine"
    assert {c.issued_by for c in (first, second)} == {"counting-1"}
    assert {c.issued_at_ns for c in (first, second)} == {123}
    assert version_in(reply) == "counting-1"


def test_the_same_question_gets_the_same_bytes_without_asking_the_policy_again() -> None:
    policy = Counting()
    desk = Desk(KEYS, lambda: policy)
    first, second = question(1, seq=1), question(2, seq=2)
    replies = [desk.answer(first), desk.answer(second)]
    assert [desk.answer(first), desk.answer(second), desk.answer(second)] == [*replies, replies[1]]
    assert replies[0] != replies[1]
    assert len(policy.asked) == 2


def test_command_ids_depend_on_boundary_and_position_only() -> None:
    def ids(**changes: object) -> list[str]:
        reply = Desk(KEYS, Counting).answer(question(**{"boundary": 3, **changes}))  # type: ignore[arg-type]
        return [c.command_id for c in commands_in(reply)]

    # A run that is resumed, or started anew with its seed, must grow the same weights from the same commands.
    assert ids() == ids(generation="other", seq=9, loss=0.1) == ids(run_id="run-2")
    assert ids() == ids(run_id="run-2")
    assert ids() != ids(boundary=4)


def test_a_new_question_about_the_same_boundary_is_decided_anew() -> None:
    desk = Desk(KEYS, Counting)
    before = desk.answer(question(5, seq=1))
    after = desk.answer(question(5, seq=2, loss=9.0))
    assert commands_in(before)[0].target_seed_id == "slot-1"
    assert commands_in(after)[0].target_seed_id == "slot-2"


def test_an_old_question_never_reaches_the_policy() -> None:
    policy = Counting()
    desk = Desk(KEYS, lambda: policy)
    desk.answer(question(2, seq=2))
    assert desk.answer(question(1, seq=1)) is None
    assert desk.answer(question(2, seq=2, loss=0.7)) is None
    assert len(policy.asked) == 1
    assert desk.rejected == {"stale": 2}
    # Another start of the run counts anew.
    assert desk.answer(question(1, seq=1, generation="h")) is not None


def test_each_run_has_a_policy_of_its_own_and_only_so_many_are_kept() -> None:
    made: list[Counting] = []

    def make() -> Policy:
        made.append(Counting())
        return made[-1]

    desk = Desk(KEYS, make)
    for number in range(MAX_RUNS + 1):
        assert commands_in(desk.answer(question(run_id=f"run-{number}")))[0].target_seed_id == "slot-1"
    assert commands_in(desk.answer(question(2, seq=2, run_id="run-5")))[0].target_seed_id == "slot-2"
    assert len(made) == MAX_RUNS + 1
    assert commands_in(desk.answer(question(2, seq=2, run_id="run-0")))[0].target_seed_id == "slot-1"


class Raising(Policy):
    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        raise KeyError("no such slot")


class Wild(Policy):
    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        return [scale_lr("host", float("nan"))]


class Nothing(Policy):
    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        return None  # type: ignore[return-value]


@pytest.mark.parametrize(("kind", "error"), [(Raising, "KeyError"), (Wild, "MessageRejected"), (Nothing, "TypeError")])
def test_a_failing_policy_is_logged_and_answered_without_commands(
    kind: type[Policy], error: str, caplog: pytest.LogCaptureFixture
) -> None:
    desk = Desk(KEYS, kind)
    asked = question(boundary=6)
    with caplog.at_level(logging.ERROR):
        reply = desk.answer(asked)
    assert commands_in(reply) == []
    assert version_in(reply) == f"error:{error}"
    assert "boundary 6: the policy failed" in caplog.text
    assert error in caplog.text
    assert desk.answer(asked) == reply


def test_foreign_questions_get_no_answer_and_do_not_reach_the_policy() -> None:
    policy = Counting()
    desk = Desk(KEYS, lambda: policy)
    frame = question()
    payload = b"\xff\xff"
    header = request_header(run_id="run", generation="g", boundary=1, seq=1, payload=payload, wall_ns=1)
    opened = open_frame(frame, KEYS, FrameKind.REQUEST)
    wrong_digest = replace(opened.header, request_sha256=b"0" * 32)
    reply = Desk(KEYS, NoopPolicy).answer(frame)
    assert reply is not None
    for foreign in (
        None, b"", b"junk", frame[:-1], frame + b"x", question(keys=KeyRing([bytes(range(50, 82))])), reply,
        seal(header, payload, KEYS), seal(wrong_digest, opened.payload, KEYS),
    ):  # fmt: skip
        assert desk.answer(foreign) is None
    assert policy.asked == []
    assert sum(desk.rejected.values()) == 9
    assert desk.answer(frame) is not None


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_nothing_that_comes_in_raises_at_the_desk(raw: bytes) -> None:
    assert Desk(KEYS, Counting).answer(raw) is None


# Over real sockets


@contextmanager
def serving(url: str, policy: Callable[[], Policy] = NoopPolicy, curve: ServerCurve | None = None) -> Iterator[str]:
    """A server in a thread; gives the endpoint as bound."""
    stopped = threading.Event()
    router = RouterTransport(parse_endpoint(url, "--bind"), curve)
    desk = Desk(KEYS, policy)
    thread = threading.Thread(target=server.serve, args=(router, desk, stopped.is_set))
    thread.start()
    try:
        yield router.url
    finally:
        stopped.set()
        thread.join()
        router.close()


def ask(client: PolicyClient, boundary: int = 1, deadline_ms: int = 5000) -> str:
    return client.ask(request(boundary), boundary=boundary, deadline_ms=deadline_ms).policy_version


def client_of(url: str, **options: object) -> PolicyClient:
    transport = DealerTransport(parse_endpoint(url, "tamiyo.endpoint"), **options)  # type: ignore[arg-type]
    return PolicyClient(transport, KEYS, run_id="run", generation="g", resend_ms=200)


def test_several_clients_are_served_beside_junk_from_others(tmp_path: Path) -> None:
    context = zmq.Context()
    with serving(f"ipc://{tmp_path}/s", Counting) as url:
        raw = context.socket(zmq.DEALER)
        raw.connect(url)
        for parts in ([b"junk"], [b""], [b"a", b"b"], [question(), question()], [bytes(40_000)] * 300):
            raw.send_multipart(parts)
        first, second = client_of(url), client_of(url)
        second._run_id = "run-2"
        assert [ask(first), ask(second), ask(first, 2)] == ["counting-1"] * 3
        raw.close(linger=0)
        first.close()
        second.close()
    context.term()


def test_a_question_lost_on_its_way_is_decided_once(tmp_path: Path) -> None:
    made = []

    class Slow(Counting):
        def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
            made.append(self)
            time.sleep(0.5)
            return super().decide(state, reports)

    with serving(f"ipc://{tmp_path}/s", Slow) as url:
        client = client_of(url)
        # Sent again after 0.2 s, while the first is being decided: both get the same answer, the second is left over.
        assert ask(client, 1) == "counting-1"
        assert ask(client, 2) == "counting-1"
        assert client.rejected == {"boundary": 1}
        client.close()
    assert len(made) == 2


def test_an_answer_for_a_trainer_that_is_gone_is_dropped(tmp_path: Path) -> None:
    router = RouterTransport(parse_endpoint(f"ipc://{tmp_path}/s", "--bind"))
    assert router.send(b"nobody", b"answer") is False
    router.close()


def test_a_path_in_use_is_not_taken_over(tmp_path: Path) -> None:
    url = f"ipc://{tmp_path}/s"
    with serving(url):
        with pytest.raises(ConfigError, match="another server answers there"):
            RouterTransport(parse_endpoint(url, "--bind"))
        client = client_of(url)
        assert ask(client) == "noop-1"
        client.close()
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ConfigError, match="not a socket"):
        RouterTransport(parse_endpoint(f"ipc://{tmp_path}/notes", "--bind"))
    assert (tmp_path / "notes").read_text() == "mine"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    assert make_keys([str(tmp_path / "keys")]) == 0
    assert make_keys([str(tmp_path / "other")]) == 0
    return tmp_path / "keys"


def test_keys_are_private_and_never_overwritten(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file.name: file.read_text() for file in keys.iterdir()}
    assert sorted(before) == ["client.public", "client.secret", "server.public", "server.secret", "shared.key"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in keys.iterdir()} == {0o600}
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    load_key_file(keys / "shared.key")
    assert make_keys([str(keys)]) == 2
    said = capsys.readouterr()
    assert "exists already" in said.err
    assert not any(content.strip() in said.out + said.err for content in before.values())
    assert {file.name: file.read_text() for file in keys.iterdir()} == before


def test_curve_lets_in_the_listed_client_only(keys: Path) -> None:
    other = keys.parent / "other"
    server_curve = load_server_curve(str(keys / "server.secret"), str(keys / "client.public"))
    allowed = load_client_curve(str(keys / "server.public"), str(keys / "client.secret"))
    stranger = load_client_curve(str(keys / "server.public"), str(other / "client.secret"))
    misled = load_client_curve(str(other / "server.public"), str(keys / "client.secret"))
    with serving("tcp://127.0.0.1:*", curve=server_curve) as url:
        for curve in (stranger, misled, None):
            client = client_of(url, curve=curve)
            with pytest.raises(PolicyUnavailable) as caught:
                ask(client, deadline_ms=500)
            assert caught.value.code == "timeout"
            client.close()
        client = client_of(url, curve=allowed)
        assert ask(client) == "noop-1"
        client.close()


def test_curve_without_a_doorkeeper_lets_nobody_in(keys: Path) -> None:
    curve = load_server_curve(str(keys / "server.secret"), str(keys / "client.public"))
    allowed = load_client_curve(str(keys / "server.public"), str(keys / "client.secret"))
    assert curve is not None
    assert allowed is not None
    context = zmq.Context()
    bound, connecting = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    curve.apply(bound)
    port = bound.bind_to_random_port("tcp://127.0.0.1")
    allowed.apply(connecting)
    connecting.connect(f"tcp://127.0.0.1:{port}")
    connecting.send(b"let me in")
    assert not bound.poll(500)
    bound.close(linger=0)
    connecting.close(linger=0)
    context.term()


@pytest.mark.parametrize("address", ["[::]", "*", "10.255.255.1"])
def test_a_server_off_the_loopback_without_curve_is_refused_at_start(
    address: str, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bind = f"tcp://{address}:*"
    assert server.main(["--policy", "noop", "--bind", bind, "--key-file", str(keys / "shared.key")]) == 2
    assert "needs CURVE keys" in capsys.readouterr().err


def test_a_client_off_the_loopback_needs_curve_and_takes_it(keys: Path) -> None:
    config = TamiyoConfig(endpoint="tcp://10.255.255.1:5000", key_file=str(keys / "shared.key"))
    with pytest.raises(ConfigError, match=r"tamiyo\.endpoint.*needs CURVE keys"):
        open_client(config, run_id="run", generation="g")
    with_curve = replace(
        config,
        curve_server_key_file=str(keys / "server.public"),
        curve_secret_file=str(keys / "client.secret"),
    )
    open_client(with_curve, run_id="run", generation="g").close()
    with pytest.raises(ConfigError, match="CURVE needs both"):
        open_client(replace(with_curve, curve_secret_file=""), run_id="run", generation="g")


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        ("too short", 0o600, "line 1: expected a CURVE key"),
        ("", 0o600, "found 0"),
        (f"{'a' * 40}\n{'b' * 40}", 0o600, "found 2"),
        ("a" * 40, 0o640, "chmod 600"),
    ],
)
def test_a_bad_curve_key_file_is_named(content: str, mode: int, said: str, tmp_path: Path, keys: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(content)
    file.chmod(mode)
    with pytest.raises(ConfigError, match=said) as caught:
        load_client_curve(str(keys / "server.public"), str(file))
    assert str(file) in str(caught.value)


# Processes


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a path short enough for sockets in it."""
    return tmp_path_factory.mktemp("b")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {WAIT_S} s"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.processes
def test_the_server_imports_no_torch() -> None:
    code = "import sys, tolaria.tamiyo.server; print('torch' in sys.modules, 'asyncio' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.processes
def test_a_service_answers_and_leaves_at_sigterm(tmp_path: Path, keys: Path) -> None:
    command = [sys.executable, "-m", "tolaria.tamiyo.server", "--policy", "noop", "--bind", f"ipc://{tmp_path}/s",
               "--key-file", str(keys / "shared.key")]  # fmt: skip
    config = TamiyoConfig(endpoint=f"ipc://{tmp_path}/s", key_file=str(keys / "shared.key"))
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as child:
        client = open_client(config, run_id="run", generation="g")
        assert ask(client, deadline_ms=15_000) == "noop-1"
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) & 0o077 == 0
        child.send_signal(signal.SIGTERM)
        said = child.communicate(timeout=WAIT_S)[1]
        assert child.returncode == 0
        client.close()
    assert "policy noop answers at" in said
    assert (keys / "shared.key").read_text().strip() not in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--policy", "nonsense"], "expected heuristic, noop"),
        (["--arg", "patience=0"], "patience=0"),
        (["--arg", "patience"], "expected NAME=VALUE"),
        (["--key-file", "/nonexistent"], "/nonexistent: cannot read"),
        (["--bind", "udp://x:1"], "--bind='udp://x:1'"),
        (["--bind", "ipc:///nonexistent/s"], "cannot bind"),
        (["--curve-secret-file", "x"], "CURVE needs both"),
    ],
)
def test_a_bad_command_line_ends_with_one_line_and_code_2(
    change: list[str], said: str, base: Path, tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--policy", "heuristic", "--bind", f"ipc://{tmp_path}/s", "--key-file", str(keys / "shared.key")]
    assert server.main([*base, *change]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len([line for line in error.splitlines() if line.startswith("tolaria.tamiyo.server:")]) == 1


def embedded_client(policy: EmbeddedPolicy) -> PolicyClient:
    config = TamiyoConfig(resend_ms=200)
    return open_client(config, run_id="run", generation="g", endpoint=policy.endpoint, key_file=policy.key_file)


@pytest.mark.processes
def test_the_embedded_policy_answers_and_leaves_nothing_behind(base: Path, tmp_path: Path) -> None:
    log = tmp_path / "tamiyo.log"
    with EmbeddedPolicy("heuristic", {"blueprint": "low_rank", "patience": 4}, base_dir=base, log_path=log) as policy:
        policy.wait_ready()
        policy.wait_ready()
        directory = policy.key_file.parent
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert {stat.S_IMODE(f.stat().st_mode) & 0o077 for f in directory.iterdir()} == {0}
        # Ctrl-C and a signal to the trainer's process group do not reach it.
        assert os.getsid(policy.pid) != os.getsid(0)
        assert os.getpgid(policy.pid) != os.getpgid(0)
        secret = policy.key_file.read_text().strip()
        command_line = (
            Path(f"/proc/{policy.pid}/cmdline").read_bytes() + Path(f"/proc/{policy.pid}/environ").read_bytes()
        )
        client = embedded_client(policy)
        assert ask(client) == HeuristicPolicy.version
        client.close()
    assert not alive(policy.pid)
    assert not directory.exists()
    assert "answers at" in log.read_text()
    assert secret not in log.read_text()
    assert secret.encode() not in command_line
    policy.close()


@pytest.mark.processes
def test_an_embedded_policy_that_cannot_work_is_told_in_its_own_words(base: Path) -> None:
    with (
        EmbeddedPolicy("no_such_package:Mine", base_dir=base) as policy,
        pytest.raises(ConfigError, match="cannot import no_such_package"),
    ):
        policy.wait_ready()


def test_a_log_that_cannot_be_written_is_named_and_leaves_nothing(base: Path) -> None:
    with pytest.raises(RunDirError, match=r"missing/tamiyo\.log"):
        EmbeddedPolicy("noop", base_dir=base, log_path=base / "missing" / "tamiyo.log")
    assert list(base.iterdir()) == []


SLEEPER = """
import time
from tolaria.tamiyo.policy import Policy

class Sleeper(Policy):
    def __init__(self, naps):
        self.naps = naps
    def decide(self, state, reports):
        if state.training_metrics["boundary"] in (1, 3):
            time.sleep(self.naps)
        return []
"""


@pytest.mark.processes
def test_a_server_killed_or_stopped_in_the_middle_of_a_question_costs_the_deadline(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    monkeypatch.syspath_prepend(tmp_path)
    with EmbeddedPolicy("sleeper:Sleeper", {"naps": 60}, base_dir=base) as policy:
        policy.wait_ready()
        client = embedded_client(policy)
        first = policy.pid
        killer = threading.Timer(0.2, os.kill, (first, signal.SIGKILL))
        killer.start()
        started = time.monotonic()
        with pytest.raises(PolicyUnavailable) as caught:
            ask(client, 1, deadline_ms=600)
        assert 0.6 <= time.monotonic() - started < 2
        assert caught.value.code == "timeout"
        killer.join()
        assert policy.revive()
        assert not policy.revive()
        assert policy.pid != first
        assert ask(client, 2, deadline_ms=15_000) == "sleeper:Sleeper"

        os.kill(policy.pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(PolicyUnavailable):
            ask(client, 4, deadline_ms=600)
        assert time.monotonic() - started < 2
        os.kill(policy.pid, signal.SIGCONT)
        assert ask(client, 5) == "sleeper:Sleeper"
        client.close()
    assert not alive(policy.pid)


@pytest.mark.processes
def test_closing_does_not_wait_for_a_policy_that_computes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("tolaria.tamiyo.embedded.STOP_GRACE_S", 0.3)
    with EmbeddedPolicy("sleeper:Sleeper", {"naps": 60}, base_dir=base) as policy:
        policy.wait_ready()
        client = embedded_client(policy)
        with pytest.raises(PolicyUnavailable):
            ask(client, 1, deadline_ms=300)
        client.close()
        started = time.monotonic()
    assert time.monotonic() - started < 5
    assert not alive(policy.pid)


TRAINER = """
import sys, time
from pathlib import Path
from tolaria.tamiyo.embedded import EmbeddedPolicy
policy = EmbeddedPolicy("noop", base_dir=Path(sys.argv[1]))
if sys.argv[2] == "ready":
    policy.wait_ready()
print(policy.pid, policy.key_file.parent, flush=True)
time.sleep(60)
"""


@pytest.mark.processes
@pytest.mark.parametrize("when", ["ready", "starting"])
def test_sigkill_of_the_trainer_kills_the_server_and_hinders_no_next_start(when: str, base: Path) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(base), when], stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert trainer.stdout is not None
    pid, directory = trainer.stdout.readline().split()
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    wait_until(lambda: not alive(int(pid)), "the death of the server")
    assert Path(directory).exists()
    with EmbeddedPolicy("noop", base_dir=base) as policy:
        policy.wait_ready()
        assert not Path(directory).exists()
        client = embedded_client(policy)
        assert ask(client) == "noop-1"
        client.close()
    assert [path for path in base.iterdir() if path.name.startswith(PREFIX)] == []


@pytest.mark.processes
def test_a_server_whose_parent_is_dead_already_does_not_stay(tmp_path: Path, keys: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    command = [sys.executable, "-m", "tolaria.tamiyo.child", str(gone.pid), "--policy", "noop",
               "--bind", f"ipc://{tmp_path}/s", "--key-file", str(keys / "shared.key")]  # fmt: skip
    done = subprocess.run(command, env=environment(), timeout=WAIT_S, check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.processes
def test_only_what_a_dead_owner_left_is_removed(base: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(base), "starting"], stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert holder.stdout is not None
    live = Path(holder.stdout.readline().split()[1])
    own = SocketDir(base)
    stale = base / f"{PREFIX}1-stale"
    young, old = base / f"{PREFIX}1-young", base / f"{PREFIX}1-old"
    half_removed = base / f"{DEAD_PREFIX}2-x"
    target = base / "precious"
    for directory in (stale, young, old, half_removed, target):
        directory.mkdir()
        (directory / "file").touch()
    (stale / "owner.lock").touch()
    os.utime(old, (1, 1))
    link = base / f"{PREFIX}1-link"
    link.symlink_to(target)
    (stale / "link").symlink_to(target)

    assert sorted(remove_stale(base)) == sorted([stale, old, half_removed])
    assert own.key_file.exists()
    assert live.exists()
    assert young.exists()
    assert link.is_symlink()
    assert (target / "file").exists()
    own.close()
    own.close()
    assert not own.path.exists()
    holder.kill()
    holder.wait()
    holder.stdout.close()
    wait_until(lambda: remove_stale(base) == [live], "the removal of the killed holder's directory")


def test_a_base_too_deep_for_a_socket_path_gives_way_to_tmp(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 90)
    deep.mkdir()
    directory = SocketDir(deep)
    assert directory.path.parent == Path("/tmp")
    assert len(os.fsencode(directory.socket_path)) <= 107
    directory.close()


def test_a_base_that_does_not_exist_is_named() -> None:
    with pytest.raises(RunDirError, match="/nonexistent: cannot make a directory"):
        SocketDir(Path("/nonexistent"))
