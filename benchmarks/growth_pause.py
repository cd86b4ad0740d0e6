"""How long does growth hold a run up: from the command to the end of the first grown step?

A byte-level GPT of 0.3, 3.4 or 25 M parameters, bfloat16, one thread per rank, gets a residual_mlp seed in its middle
slot. Each row is one command (medians over cycles of growing and culling; eager sides have several cycles, compiled
ones the first, in which the structure is new). All times in milliseconds, of rank 0.

    params   millions of parameters of the host
    ranks    processes that train together
    side     eager; cold: compiled, nothing kept from before; warm: compiled by an earlier process
    command  germinate: module built, in the optimizer; train: shadow branch; graft: into the host's graph
    plan     every rank checks the command against its state, and the ranks compare what they plan
    change   module attached, optimizer groups, learning rates, DDP wrapper
    digest   names, shapes, new weights and settings hashed and compared over ranks
    trial    the new structure compiled and tried (gradients for every seed)
    pause    all of it, with what is not in a column; budget for eager sides up to 25 M: 100 ms
    graphs   forward graphs that were compiled
    first    the first step after it
    step     later steps, for comparison

    python -m benchmarks.growth_pause            all sizes, 1 and 2 ranks: 15 minutes
    python -m benchmarks.growth_pause --quick    0.3 M, eager: 20 seconds
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch._dynamo.utils import counters

from benchmarks.figures import machine_line, make_parser, markdown, save, say, spread, table
from benchmarks.real_ranks import run_ranks
from tolaria.config import CompileConfig, Config, DistConfig, KasminaConfig, RunConfig, TrainConfig
from tolaria.coordinator.delivery import obey
from tolaria.data import Loader
from tolaria.dist import World, init_world
from tolaria.fence import Verdict
from tolaria.kasmina.blueprints import get_blueprint, register_blueprint
from tolaria.leyline.codec import encode_command, encode_decision
from tolaria.leyline.types import Command, Decision
from tolaria.objective import Batch
from tolaria.replica import Replica
from tolaria.setup import build_state
from tolaria.state import TrainState
from tolaria.step import TrainStep
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policy import with_identity
from tolaria.task import load_task
from tolaria.tasks import stdlib_gpt
from tolaria.telemetry.events import EventLog
from tolaria.telemetry.split import Split

HOSTS: dict[str, dict[str, int]] = {
    "0.3": {"layers": 2, "features": 96, "heads": 4, "context": 64},
    "3.4": {"layers": 4, "features": 256, "heads": 4, "context": 128},
    "25": {"layers": 8, "features": 512, "heads": 8, "context": 128},
}
SIDES = ("eager", "cold", "warm")
SLOT = "middle"
BUDGET_MS = 100.0
PARTS = {"plan": "check", "change": "apply", "digest": "digest", "trial": "warm_up"}
CYCLES = 5
HEADER = ("params", "ranks", "side", "command", *PARTS, "pause", "budget", "graphs", "first", "step")


def main() -> int:
    """Measure and print; 0."""
    parser = make_parser(__doc__, quick="the smallest host, eager")
    parser.add_argument("--host", choices=HOSTS, help="this host only")
    parser.add_argument("--side", choices=SIDES, help="this side only")
    parser.add_argument("--ranks", type=int, choices=(1, 2), help="so many ranks only")
    parser.add_argument("--rank-of", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of is not None:
        return measure(**options.rank_of)
    say(machine_line())
    rows: list[dict[str, Any]] = []
    hosts = [options.host] if options.host else list(HOSTS)[: 1 if options.quick else None]
    sides = [options.side] if options.side else list(SIDES)[: 1 if options.quick else None]
    for host in hosts:
        for ranks in [options.ranks] if options.ranks else [1, 2]:
            with tempfile.TemporaryDirectory() as cache:
                for side in sides:
                    rows += _start(host, ranks, side, cache)
    cells = [_cells(row) for row in rows]
    say("\n" + table(HEADER, cells))
    save("growth_pause", {"budget_ms": BUDGET_MS, "rows": rows, "markdown": markdown(HEADER, cells)}, options.out)
    return 0


def _start(host: str, ranks: int, side: str, cache: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        told = {"host": host, "side": side, "folder": folder}
        run_ranks(ranks, "growth_pause", "--rank-of", json.dumps(told), TORCHINDUCTOR_CACHE_DIR=cache)
        found: list[dict[str, Any]] = json.loads((Path(folder) / "rows.json").read_text())
    return [{"host": host, "ranks": ranks, "side": side, **row} for row in found]


def _cells(row: dict[str, Any]) -> list[str]:
    budget = f"{BUDGET_MS:g}" if row["side"] == "eager" else ""
    parts = [f"{row[part]:.1f}" for part in PARTS]
    return [
        row["host"], str(row["ranks"]), row["side"], row["command"], *parts, f"{row['pause']:.1f}", budget,
        str(row["graphs"]), f"{row['first']:.0f}", f"{row['step']:.0f}",
    ]  # fmt: skip


# In each rank


def measure(host: str, side: str, folder: str) -> int:
    """Grow and cull, and write what each command took to ``folder``; 0."""
    torch.set_num_threads(1)
    with _run(host, side != "eager", Path(folder)) as run:
        cycles = [run.cycle() for _ in range(CYCLES if side == "eager" else 1)]
        if run.world.is_coordinator:
            rows = [_medians([cycle[at] for cycle in cycles]) for at in range(len(cycles[0]))]
            (Path(folder) / "rows.json").write_text(json.dumps(rows))
    return 0


def _medians(rows: list[dict[str, Any]]) -> dict[str, Any]:
    numbers = {key: spread([row[key] for row in rows]).median for key in (*PARTS, "pause", "first", "step")}
    return {"command": rows[0]["command"], "graphs": rows[0]["graphs"], **numbers}


@dataclass
class _Run:
    state: TrainState
    replica: Replica
    loader: Loader
    step: TrainStep
    world: World
    commands: int = field(default=0)

    def sample(self, batch_size: int) -> Batch:
        plan = [(list(range(batch_size)), [1.0 / batch_size] * batch_size)]
        return next(iter(self.loader.batches(self.loader.task.train, plan)))

    def train(self) -> float:
        """Milliseconds of one step."""
        plan = self.state.sampler.remaining()[:1]
        batches = list(self.loader.batches(self.loader.task.train, plan))
        start = perf_counter()
        taken = self.step(batches, Verdict).taken
        spent = (perf_counter() - start) * 1e3
        self.state.after_step(taken=taken)
        return spent

    def cycle(self) -> list[dict[str, Any]]:
        """A seed up to its place in the host, and away again."""
        # Under a new name each time: a structure that was there before is not tried again.
        usual, name = get_blueprint("residual_mlp"), f"residual_mlp-{self.commands}"
        register_blueprint(name, usual.build, ranks=sorted(usual.ranks))
        found = [
            self.command("germinate", do.germinate(SLOT, name)),
            self.command("train", do.start_training(SLOT)),
            self.command("graft", do.start_grafting(SLOT)),
        ]
        self.command("cull", do.cull(SLOT))
        while self.state.kasmina.seeds[SLOT].occupied or self.state.kasmina.seeds[SLOT].stage.name != "DORMANT":
            self.state.kasmina.tick(self.state.left_overs)
        return found

    def command(self, name: str, command: Command) -> dict[str, Any]:
        """Carry it out, and take steps until the next one is allowed."""
        self.commands += 1
        self.state.boundary += 1
        self.state.kasmina.read_norms()
        signed = encode_command(with_identity(command, f"c{self.commands}", issued_by="benchmark", issued_at_ns=1))
        decision = Decision(
            boundary=self.state.boundary, step_effective=self.state.step, source="policy", reason="answered",
            conservative=False, commands=(signed,),
        )  # fmt: skip
        frame = encode_decision(decision) if self.world.is_coordinator else None
        graphs = counters["stats"]["unique_graphs"]
        self.world.peers.agree(True)  # so that no rank's own lateness is in the others' pause
        start = perf_counter()
        applied = obey(
            frame, self.state, self.replica, self.world.peers, healthy_boundaries=2, sample=self.sample, split=Split()
        )
        pause = (perf_counter() - start) * 1e3
        if applied is None or not applied.outcomes[0].applied:
            raise SystemExit(f"{name}: {applied.outcomes[0].reason if applied else 'no decision'}")
        first = self.train()
        parts = {part: applied.latency_ms.get(key, 0.0) for part, key in PARTS.items()}
        grown = counters["stats"]["unique_graphs"] - graphs
        later = spread([self.train() for _ in range(4)]).median
        return {"command": name, **parts, "pause": pause, "graphs": grown, "first": first, "step": later}


@contextmanager
def _run(host: str, compiled: bool, folder: Path) -> Iterator[_Run]:
    config = Config(
        run=RunConfig(seed=1),
        train=TrainConfig(batch_size=8, epochs=1000),
        compile=CompileConfig(enabled=compiled),
        dist=DistConfig(device="cpu"),
        kasmina=KasminaConfig(
            gradient_window=2, blend_steps=1000, embargo_boundaries=0, max_seed_parameters=10_000_000
        ),
    )
    world = init_world(device="cpu", timeout_s=300, control_timeout_s=300)
    make = partial(stdlib_gpt.make_task, max_train_bytes=200_000, max_validation_bytes=20_000, **HOSTS[host])
    task = load_task(make, {}, config.run.seed)
    loader = Loader(task, config.data, world.device, emit=lambda *_, **__: None)
    state, _ = build_state(config, task, world, loader)
    events = EventLog(folder / "events.jsonl", world.global_rank, run_id="benchmark")
    replica = Replica(state, world, config, events)
    try:
        replica.rebuild(first=True)
        run = _Run(state, replica, loader, TrainStep(state, replica, events, debug=False), world)
        replica.warm_up(run.sample)
        for _ in range(4):
            run.train()
        yield run
    finally:
        replica.close()
        events.close()
        world.close()


if __name__ == "__main__":
    sys.exit(main())
