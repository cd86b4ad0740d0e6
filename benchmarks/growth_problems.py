"""What growth.py trains: two problems, each with a report split that neither training nor the policy nor tuning sees.

The digits' report split is cut out of the training images and leaves the task's validation set to the policy; the
GPT's is one source file in ten, beside the one in ten that the policy sees.
"""

import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import Subset

from tolaria.config import Config
from tolaria.kasmina.blueprints import get_blueprint
from tolaria.kasmina.slot import Active, attach, probe_shapes
from tolaria.options import resolve
from tolaria.task import Task
from tolaria.tasks import digits, stdlib_gpt

CONFIGS = Path(__file__).resolve().parent.parent / "launch" / "configs"
REPORT_IMAGES = 447
TRAIN, POLICY, REPORT = 0, 1, 2
"""Parts of the standard library's files: their number modulo ten is 0 for the policy, 7 for the report."""
MAX_WINDOWS = (1_000_000, 512, 512)
COMMON = ("--compile.enabled", "false", "--precision.amp", "off", "--dist.device", "cpu", "--dist.threads", "1",
          "--log.progress", "off", "--checkpoint.every", "0")  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A task to train in several ways.

    ``make`` builds a new task, its weights from torch's generator; ``report`` is the split to report on; ``config`` is
    that of the grown side; ``digits`` places of accuracy are worth telling.
    """

    name: str
    config: Config
    make: Callable[[], Task]
    report: Any


def digits_problem(flags: Sequence[str]) -> Problem:
    """Handwritten digits on a host of two channels: 900 images to train, 450 for the policy, 447 to report."""
    settings = ["--train.batch_size", "64", "--tamiyo.args.min_delta", "0.1", "--tamiyo.args.seeds_at_once", "2",
                "--tamiyo.args.train_boundaries", "2", "--tamiyo.args.payoff_boundaries", "2"]  # fmt: skip
    config = resolve(["--config", str(CONFIGS / "digits.toml"), *COMMON, *settings, *flags], {})
    train, validation = digits.load_split()
    # What the first draw leaves out was looked at while settings were chosen, so it is trained on; the report is on
    # images that nobody had looked at.
    unseen, seen = _draw(range(len(train)), train.labels)
    kept, apart = _draw(unseen, train.labels)
    smaller, report = (digits.Digits(train.images[rows], train.labels[rows]) for rows in (kept + seen, apart))
    width = int(config.task.args["width"])
    return Problem(
        "digits", config, lambda: replace(digits.make_task(width), train=smaller, validation=validation), report
    )


def _draw(rows: Sequence[int], labels: Tensor) -> tuple[list[int], list[int]]:
    """The rows without `REPORT_IMAGES` of them, and those; every class in the same shares."""
    rest, drawn = train_test_split(
        rows, test_size=REPORT_IMAGES, stratify=labels[list(rows)], random_state=digits.SPLIT_SEED
    )
    return list(rest), list(drawn)


def gpt_problem(flags: Sequence[str]) -> Problem:
    """A byte-level GPT of two thin layers on the standard library's source: 31,168 parameters, 2.5 million bytes."""
    sizes = ["--task.args.layers", "2", "--task.args.features", "32", "--task.args.heads", "2",
             "--task.args.expansion", "1", "--task.args.context", "64", "--train.batch_size", "16",
             "--train.epochs", "1000", "--train.max_steps", "2400", "--train.boundary_steps", "60",
             "--optim.lr", "0.004", "--lr.warmup_steps", "50", "--lr.seed_warmup_steps", "30",
             "--kasmina.blend_steps", "120", "--tamiyo.args.patience", "4", "--tamiyo.args.min_delta", "0.1",
             "--tamiyo.args.train_boundaries", "1", "--tamiyo.args.blend_boundaries", "2"]  # fmt: skip
    config = resolve(["--config", str(CONFIGS / "stdlib_gpt.toml"), *COMMON, *sizes, *flags], {})
    args = {name: int(config.task.args[name]) for name in ("layers", "features", "heads", "context", "expansion")}
    train, validation, report = _windows(Path(sysconfig.get_path("stdlib")), args["context"])

    def make() -> Task:
        return replace(stdlib_gpt.make_task(**args, max_train_bytes=10_000, max_validation_bytes=1_000),
                       train=train, validation=validation)  # fmt: skip

    return Problem("gpt", config, make, report)


def _windows(root: Path, context: int) -> list[Any]:
    """Each part's windows, evenly thinned out to `MAX_WINDOWS`: all of a part's files are in it."""
    texts = [bytearray() for _ in MAX_WINDOWS]
    for index, path in enumerate(stdlib_gpt.source_files(root)):
        texts[{0: POLICY, 7: REPORT}.get(index % 10, TRAIN)].extend(path.read_bytes() + b"\n")
    found = []
    for text, most in zip(texts, MAX_WINDOWS, strict=True):
        windows = stdlib_gpt.Windows(bytes(text), context)
        found.append(Subset(windows, range(0, len(windows), max(1, -(-len(windows) // most)))))
    return found


PROBLEMS: dict[str, Callable[[Sequence[str]], Problem]] = {"digits": digits_problem, "gpt": gpt_problem}


class _Grown(nn.Module):
    """A host with seeds built into its slots from the start."""

    def __init__(self, host: nn.Module, seeds: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.host = host
        self.seeds = nn.ModuleDict(dict(seeds))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.host(inputs)
        return outputs


def with_seeds(task: Task, kept: Mapping[str, str]) -> Task:
    """The task with the blueprints of ``kept`` (slot -> blueprint) active in the host, and nothing else to grow."""
    slots = {name: attach(task.model, name, task.slots[name])[0] for name in kept}
    inputs, _ = task.train.__getitems__([0, 1])  # type: ignore[attr-defined]
    shapes = probe_shapes(slots, lambda: task.model(inputs))
    seeds = {name: get_blueprint(blueprint).build(shapes[name]) for name, blueprint in kept.items()}
    for name, slot in slots.items():
        slot.form = Active(seeds[name], "residual")
    return replace(task, model=_Grown(task.model, seeds), slots={})


def score(task: Task, report: Any, batch: int = 256) -> tuple[float, float]:
    """Mean loss and accuracy of the task's model on the report split, in evaluation mode; its mode is put back."""
    modes = [(module, module.training) for module in task.model.modules()]
    task.model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, len(report), batch):
            inputs, targets = report.__getitems__(list(range(start, min(start + batch, len(report)))))
            outputs = task.model(inputs)
            values = (f(outputs, targets).flatten(1).mean(1) if f(outputs, targets).dim() > 1 else f(outputs, targets)
                      for f in (task.loss, task.accuracy))  # fmt: skip
            sums += torch.stack([value.double().sum() for value in values])
    for module, training in modes:
        module.training = training
    loss, accuracy = (sums / len(report)).tolist()
    return loss, accuracy
