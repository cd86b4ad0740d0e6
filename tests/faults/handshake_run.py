"""A whole run in miniature against any policy, and what a test compares of it; also as a job for a pool of ranks."""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.rig import same_bits, tiny_config
from tolaria.build import train
from tolaria.config import CheckpointConfig, Config, DistConfig, LogConfig, RunConfig, TamiyoConfig, TaskConfig
from tolaria.dist import Peers
from tolaria.recovery.checkpoint import load_newest
from tolaria.recovery.fsops import FileOps
from tolaria.telemetry.events import read_events

EPOCHS = 9
DEADLINE_MS = 600
PROBE_DEADLINE_MS = 400


def run_config(folder: Path, *, epochs: int = EPOCHS, kasmina: dict[str, Any] | None = None, **tamiyo: Any) -> Config:
    """One boundary per epoch of 6 steps, eager, a slot inside the model and one attached by path, dropout on."""
    base = tiny_config(batch_size=8, **(kasmina or {}))
    waits = {"deadline_ms": DEADLINE_MS, "resend_ms": 200, "probe_deadline_ms": PROBE_DEADLINE_MS}
    return replace(
        base,
        run=RunConfig(name="handshake", dir=str(folder), seed=3),
        task=TaskConfig(factory="tests.rig:make_task", args={"dropout": 0.2}),
        train=replace(base.train, epochs=epochs),
        tamiyo=TamiyoConfig(**{**waits, **tamiyo}),
        checkpoint=CheckpointConfig(every=0),
        dist=DistConfig(device="cpu", threads=1, timeout_s=60, control_timeout_s=60),
        log=LogConfig(progress="off", interval_steps=1),
    )


@dataclass(frozen=True)
class Ran:
    """A run that came to its end."""

    folder: Path
    seconds: float

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return found

    def events(self, kind: str) -> list[dict[str, Any]]:
        return list(read_events(self.folder / "events.jsonl", kind))

    def failures(self) -> dict[int, str]:
        """Boundary -> code of each failed answer."""
        reasons = {e["boundary"]: e["reason"] for e in self.events("decision") if e["source"] == "fallback"}
        return {boundary: code for boundary, code in reasons.items() if code != "breaker_open"}

    def refused(self) -> list[str]:
        return [event["code"] for event in self.events("command_refused")]

    def tamiyo_ms(self) -> list[float]:
        """What each boundary waited for the policy."""
        parts = [e["latency_ms"] for e in self.events("boundary") if e["rank"] == 0]
        return [ms.get("encode", 0.0) + ms.get("round_trip", 0.0) for ms in parts]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The replicated state of the last checkpoint, the mode left out: tensors, and the rest."""
        loaded = load_newest(self.folder / "ckpt", Peers(None, 0, 1), FileOps(), report=_no_damage)
        assert loaded is not None
        return loaded.tensors, {key: value for key, value in loaded.meta.items() if key != "mode"}


def _no_damage(kind: str, details: dict[str, Any]) -> None:
    raise AssertionError(f"{kind}: {details}")


def trained_alike(one: Ran, other: Ran) -> bool:
    """Whether two runs ended with the same parameters, optimizer state, data position, rates and seeds, bit for bit.

    The mode is left out: that a policy failed is remembered, and must not be more than that.
    """
    (tensors, rest), (other_tensors, other_rest) = one.state(), other.state()
    assert len(tensors) > 10
    same = tensors.keys() == other_tensors.keys() and rest == other_rest
    return same and all(same_bits(tensors[name], other_tensors[name]) for name in tensors)


def run(config: Config) -> Ran:
    """Train in this process."""
    start = time.monotonic()
    train(config)
    return Ran(Path(config.run.dir), time.monotonic() - start)


def job(folder: str, **tamiyo: Any) -> float:
    """The same run as one of several ranks; how long it took this rank, in seconds."""
    return run(run_config(Path(folder), **tamiyo)).seconds
