"""A second policy beside the acting one changes nothing, whatever it does, and what it would have done is told.

All runs here are of the same task and acting policy; the acting policy plays a script that grows a seed.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import zmq

from tests.faults.handshake_run import EPOCHS, Ran, run, run_config, trained_alike
from tests.faults.own_policies import DIES_AT
from tests.packets import state
from tests.ranks import RankPool
from tolaria.errors import ConfigError
from tolaria.leyline.framing import FrameKind, KeyRing, open_frame, reply_header, seal
from tolaria.leyline.types import PolicyRequest
from tolaria.tamiyo.endpoint import parse_endpoint
from tolaria.tamiyo.shadow import Shadow
from tolaria.tamiyo.transport import DealerTransport
from tolaria.telemetry.events import EventLog, read_events
from tolaria.view.telling import tell

SCRIPT = """
command = [
    { boundary = 2, op = "germinate", slot = "early", blueprint = "low_rank" },
    { boundary = 3, op = "start_training", slot = "early" },
]
"""
PATIENT: dict[str, Any] = {"deadline_ms": 5000}


@pytest.fixture(scope="module")
def acting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    script = tmp_path_factory.mktemp("acting") / "script.toml"
    script.write_text(SCRIPT)
    return {"policy": f"script:{script}", **PATIENT}


@pytest.fixture(scope="module")
def alone(acting: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The run without a shadow."""
    ran = run(run_config(tmp_path_factory.mktemp("alone") / "run", **acting))
    assert ran.summary["seeds"][0]["stage"] == "TRAINING"
    return ran


def counts(ran: Ran) -> dict[str, float]:
    return {n.removeprefix("shadow_"): c for n, c in ran.summary["counters"].items() if n.startswith("shadow_")}


def assert_nothing_changed(ran: Ran, alone: Ran) -> None:
    assert ran.summary["outcome"] == "finished"
    assert trained_alike(ran, alone)
    assert ran.summary["state_digest"] == alone.summary["state_digest"]
    assert [c["what"] for c in ran.summary["commands"]] == [c["what"] for c in alone.summary["commands"]]
    assert not [p for p in psutil.Process().children(recursive=True) if "tolaria" in " ".join(p.cmdline())]


@pytest.mark.processes
def test_what_a_shadow_would_have_done_is_told_and_not_done(acting: dict[str, Any], alone: Ran, tmp_path: Path) -> None:
    ran = run(run_config(tmp_path / "run", shadow="tests.faults.own_policies:Eager", **acting))
    assert_nothing_changed(ran, alone)
    answers = ran.events("shadow_answered")
    assert [a["boundary"] for a in answers] == [*range(1, EPOCHS + 1)][: len(answers)]
    assert len(answers) >= EPOCHS - 1  # the last one may come after the end
    assert {tuple(a["would_command"]) for a in answers} == {("germinate early with low_rank",)}
    assert {a["version"] for a in answers} == {"eager-1"}
    # The acting policy asked for just that at one boundary.
    assert [a["boundary"] for a in answers if a["agrees"]] == [2]
    assert answers[1]["commanded"] == ["germinate early with low_rank"]
    would = "the shadow would have decided germinate early with low_rank"
    assert [tell(a) for a in answers[:2]] == [
        f"boundary 1: {would}, other than the policy",
        f"boundary 2: {would}, as the policy did",
    ]
    told = counts(ran)
    assert told == {"asked": EPOCHS, "answered": len(answers), "compared": len(answers), "agreed": 1}
    assert ran.events("emergency") == []


@pytest.mark.processes
@pytest.mark.parametrize(
    ("shadow", "last_answered", "why"),
    [("Hanging", 1, "no answer to boundary 2"), ("Falling", DIES_AT - 1, "it has ended: code 3")],
)
def test_a_shadow_that_hangs_or_dies_changes_nothing_and_is_told_once(
    shadow: str, last_answered: int, why: str, acting: dict[str, Any], alone: Ran, tmp_path: Path
) -> None:
    ran = run(run_config(tmp_path / "run", shadow=f"tests.faults.own_policies:{shadow}", **acting))
    assert_nothing_changed(ran, alone)
    assert [a["boundary"] for a in ran.events("shadow_answered")] == [*range(1, last_answered + 1)]
    (silent,) = ran.events("shadow_silent")
    assert why in silent["reason"]
    assert counts(ran)["late"] >= EPOCHS - last_answered - 1
    assert max(ran.tamiyo_ms()) < PATIENT["deadline_ms"] / 2


@pytest.mark.processes
def test_a_shadow_that_cannot_be_loaded_is_a_mistake_in_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no 'Nobody'"):
        run(run_config(tmp_path / "run", shadow="tests.faults.own_policies:Nobody", policy="noop"))


@pytest.mark.processes
def test_two_ranks_with_a_shadow_end_as_without(acting: dict[str, Any], tmp_path: Path) -> None:
    with RankPool(2) as pool:
        for name, shadow in (("alone", ""), ("with", "heuristic")):
            settings = {**acting, **({"shadow": shadow} if shadow else {})}
            pool.run("tests.faults.handshake_run:job", folder=str(tmp_path / name), **settings)
    alone, beside = Ran(tmp_path / "alone", 0.0), Ran(tmp_path / "with", 0.0)
    assert trained_alike(beside, alone)
    assert counts(beside)["answered"] >= EPOCHS - 1
    assert counts(alone) == {}


# A shadow process that is not ours any more


@contextmanager
def hostile(folder: Path, answer: Callable[[zmq.Socket[bytes], bytes, bytes], None]) -> Iterator[Any]:
    """A Shadow connected to a ROUTER of this test; `rig.serve()` answers one question with ``answer``."""
    keys = KeyRing([bytes(range(32))])
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 0)
    router.setsockopt(zmq.SNDHWM, 0)
    endpoint = f"ipc://{folder / 's'}"
    router.bind(endpoint)
    events = EventLog(folder / "events.jsonl", 0, run_id="run")
    process: Any = SimpleNamespace(ended=None)
    shadow = Shadow(process, DealerTransport(parse_endpoint(endpoint, "shadow")), keys, events,
                    run_id="run", generation="g")  # fmt: skip

    def serve() -> None:
        sender, frame = router.recv_multipart()
        answer(router, sender, frame)
        time.sleep(0.1)

    try:
        yield SimpleNamespace(
            shadow=shadow, serve=serve, keys=keys,
            events=lambda kind: (events.close(), list(read_events(folder / "events.jsonl", kind)))[1],
        )  # fmt: skip
    finally:
        shadow.close()
        router.close()
        context.term()
        events.close()


def ask(shadow: Shadow, boundary: int) -> float:
    """One boundary; the seconds that it took."""
    start = time.perf_counter()
    shadow.hold(boundary, PolicyRequest(state=state(boundary)), b"", ())
    shadow.ask()
    return time.perf_counter() - start


def test_a_flood_of_frames_is_read_up_to_a_limit_once_and_never_again(tmp_path_factory: pytest.TempPathFactory) -> None:
    def flood(router: zmq.Socket[bytes], sender: bytes, frame: bytes) -> None:
        for _ in range(5000):
            router.send_multipart([sender, frame])

    with hostile(tmp_path_factory.mktemp("f"), flood) as rig:
        time.sleep(0.1)
        ask(rig.shadow, 1)
        rig.serve()
        spent = [ask(rig.shadow, boundary) for boundary in range(2, 8)]
        assert max(spent) < 0.25
        assert max(spent[-3:]) < 0.05
        asked = rig.shadow.counts["asked"]
        ask(rig.shadow, 8)
        reasons = [event["reason"] for event in rig.events("shadow_silent")]
    assert "it is not heard any more" in reasons[-1]
    assert rig.shadow.counts["asked"] == asked <= 3
    assert rig.shadow.counts["answered"] == 0


def test_a_forged_or_late_answer_is_none(tmp_path_factory: pytest.TempPathFactory) -> None:
    def forge(router: zmq.Socket[bytes], sender: bytes, frame: bytes) -> None:
        asked = open_frame(frame, rig.keys, FrameKind.REQUEST).header
        foreign = KeyRing([bytes(range(1, 33))])
        router.send_multipart([sender, seal(reply_header(asked, seq=1, wall_ns=1), b"\x08\x01", foreign)])
        other = reply_header(asked, seq=1, wall_ns=1)
        router.send_multipart([sender, seal(other, b"\xff", rig.keys)])

    with hostile(tmp_path_factory.mktemp("f"), forge) as rig:
        time.sleep(0.1)
        ask(rig.shadow, 1)
        rig.serve()
        ask(rig.shadow, 2)
    assert rig.shadow.counts == {"asked": 2, "late": 1}
