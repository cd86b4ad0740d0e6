"""The trained model of a checkpoint, with its seeds in place: what an export is made from and held against."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tolaria.config import Config
from tolaria.dist import Peers
from tolaria.errors import CheckpointError, CheckpointMismatch, RunDirError, TaskError
from tolaria.kasmina.host import Kasmina
from tolaria.kasmina.seed import Seed
from tolaria.kasmina.slot import Slot, attach, find_slots
from tolaria.leyline.types import SeedStage
from tolaria.options import resolve
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.manifest import MANIFEST_NAME, parse_checkpoint_name
from tolaria.recovery.reader import Loaded, load_path
from tolaria.recovery.timeline import Timeline, on_timeline
from tolaria.recovery.wal import read_log
from tolaria.task import Task, load_task, users_code

ACTING = (SeedStage.BLENDING, SeedStage.PROBATIONARY, SeedStage.FOSSILIZED)
"""Stages in which a seed is part of what the model computes."""
NUM_SAMPLES = 8


@dataclass(frozen=True)
class Grown:
    """A trained model on the CPU, in evaluation mode; ``paths``: slot -> path of the module at whose output it is."""

    loaded: Loaded
    config: Config
    task: Task
    model: nn.Module
    kasmina: Kasmina
    paths: Mapping[str, str]

    @property
    def acting(self) -> list[Seed]:
        """The seeds that act on the output."""
        return [seed for seed in self.kasmina.seeds.values() if seed.stage in ACTING and seed.module is not None]

    @property
    def idle(self) -> list[Seed]:
        """The seeds that do not: they are no part of an export."""
        return [seed for seed in self.kasmina.seeds.values() if seed.stage not in ACTING and seed.module is not None]

    def inputs(self, samples: int = NUM_SAMPLES) -> Any:
        """What the model takes, of the first validation samples."""
        with users_code("reading validation samples"):
            data: Any = self.task.validation
            rows = list(range(min(samples, len(data))))
            many = getattr(data, "__getitems__", None)
            return self.task.collate(many(rows) if many is not None else [data[row] for row in rows])[0]

    def outputs(self, inputs: Any) -> Any:
        """What the trained model says."""
        with torch.no_grad(), users_code("the model"):
            return self.model(inputs)


def choose_checkpoint(path: Path) -> Path:
    """The checkpoint at ``path``, or of the run there: the newest one if the run ended in order, else the newest good.

    Raises RunDirError, CheckpointError.
    """
    if (path / MANIFEST_NAME).exists() or parse_checkpoint_name(path.name):
        return path
    root = path / "ckpt"
    if not (path / "wal").is_dir() or not root.is_dir():
        raise RunDirError(f"{path}: neither a run directory nor a checkpoint")
    timeline = Timeline.of(read_log(path / "wal", FileOps()).records)
    names = FileOps().list_dir(root)
    found = sorted(seq for name in names if (parsed := parse_checkpoint_name(name)) for seq in (parsed[0],))
    known = [timeline.checkpoints[seq] for seq in found if seq in timeline.checkpoints]
    usable = [c for c in known if on_timeline(timeline.returns, c.branch, c.step)]
    chosen = usable if timeline.closed else [c for c in usable if c.seq in timeline.good] or usable
    if not chosen:
        raise CheckpointError(f"{root}: the run has no checkpoint that can be exported")
    return root / f"c{chosen[-1].seq}-s{chosen[-1].step}"


def load_grown(checkpoint: Path, *, task: str = "", config_file: Path | None = None) -> Grown:
    """Build the model as it was saved. Every byte is verified first; runs the user's task function.

    ``task``: MODULE:FUNCTION where config.toml names none. Raises CheckpointError, ConfigError, TaskError.
    """
    loaded = load_path(checkpoint, Peers(None, 0, 1), FileOps())
    file = config_file or checkpoint.resolve().parent.parent / "config.toml"
    config = resolve(["--config", str(file)])
    if task:
        config = replace(config, task=replace(config.task, factory=task))
    made = make_task(config)
    model = made.model.to("cpu")
    slots, paths = _slots(model, {**made.slots, **config.kasmina.slots})
    host = dict(model.named_parameters()) | dict(model.named_buffers())
    kasmina = _kasmina(config, slots, loaded)
    _copy(host, loaded.tensors, "model/")
    for seed in kasmina.seeds.values():
        _copy(seed.named_parameters() | seed.named_buffers(), loaded.tensors, "")
        slots[seed.slot].eval()
    return Grown(loaded, config, made, model.eval(), kasmina, paths)


def make_task(config: Config) -> Task:
    """The run's task, anew. Raises TaskError."""
    if not config.task.factory:
        raise TaskError("config.toml names no task: the run was started from a script; give --task MODULE:FUNCTION")
    return load_task(config.task.factory, config.task.args, config.run.seed)


def _slots(model: nn.Module, wanted: Mapping[str, str]) -> tuple[dict[str, Slot], dict[str, str]]:
    slots = find_slots(model)
    paths = {module.name: path for path, module in model.named_modules() if isinstance(module, Slot)}
    for name, path in wanted.items():
        slots[name], _ = attach(model, name, path)
        paths[name] = path
    return slots, paths


def _kasmina(config: Config, slots: Mapping[str, Slot], loaded: Loaded) -> Kasmina:
    saved = loaded.meta.get("kasmina")
    if not isinstance(saved, dict) or set(saved.get("seeds", {})) != set(slots):
        known = sorted(saved.get("seeds", {})) if isinstance(saved, dict) else []
        raise CheckpointMismatch(
            f"the checkpoint has slots {known}, the task's model has {sorted(slots)}; is it this task's? "
            "(--task MODULE:FUNCTION)"
        )
    shapes = {name: tuple(seed["shape"]) for name, seed in saved["seeds"].items()}
    kasmina = Kasmina(
        slots, shapes, config.kasmina, config.run.seed, torch.device("cpu"), bytes_per_parameter=lambda: 0
    )
    kasmina.load_state_dict(saved)
    return kasmina


def _copy(live: Mapping[str, Tensor], saved: Mapping[str, Tensor], prefix: str) -> None:
    """Overwrite tensors by those saved under their names."""
    with torch.no_grad():
        for name, tensor in live.items():
            found = saved.get(prefix + name)
            if found is None or (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
                what = "has no" if found is None else f"has another shape or type ({tuple(found.shape)}) of"
                raise CheckpointMismatch(
                    f"the checkpoint {what} tensor {prefix + name!r}; is it this task's? (--task MODULE:FUNCTION)"
                )
            tensor.copy_(found)
