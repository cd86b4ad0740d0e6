"""What a person sees while a run trains: one calm line per boundary, on rank 0's terminal."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TextIO, TypeAlias

from rich.text import Text

from tolaria.telemetry import report
from tolaria.telemetry.summary import RunSummary
from tolaria.telemetry.terminal import Line, Mode, Terminal
from tolaria.telemetry.words import number, percent, short_duration, short_path

Detail: TypeAlias = Literal["quiet", "normal", "verbose"]
Level: TypeAlias = Literal["info", "warning", "error", "critical"]

HEADER = f"{'epoch':>5} {'step':>6}  {'train':>6}  {'val':>6}  {'acc':>6}  {'lr':>7}  {'time':>6}  {'ckpt':<4}  seeds"
SEEDS_COLUMN = HEADER.index("seeds")
HEADER_EVERY_ROWS = 40
TRANSIENT_INTERVAL_S = 0.1

LEVEL_STYLES = {"info": "", "warning": "yellow", "error": "bold red", "critical": "bold red"}
STAGE_STYLES = {"FOSSILIZED": "green", "CULLED": "red", "EMBARGOED": "dim", "RESETTING": "dim", "TERMINATED": "dim"}


@dataclass(frozen=True, kw_only=True)
class StartInfo:
    """The head: a title and (label, text) lines in the order shown, for example ("model", "1,234 parameters")."""

    title: str
    lines: Sequence[Line] = ()


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """The position inside an epoch. ``loss`` is a host number; ``rate`` samples per second over all ranks."""

    epoch: int
    epochs: int
    epoch_step: int
    epoch_steps: int
    loss: float | None = None
    lr: float | None = None
    rate: float | None = None


@dataclass(frozen=True, kw_only=True)
class SeedCell:
    """One slot at a boundary; ``stage`` is the name of its SeedStage."""

    slot: str
    stage: str
    alpha: float = 0.0


@dataclass(frozen=True, kw_only=True)
class BoundaryRow:
    """One boundary: losses are means per sample, accuracy in [0, 1], seconds since the boundary before.

    ``checkpoint`` is a short name of what was committed since the row before ("c12"), empty for none; ``mode`` is
    "normal" or "conservative". Values that were not measured are None.
    """

    epoch: int
    step: int
    train_loss: float | None
    val_loss: float | None
    val_accuracy: float | None
    lr: float
    seconds: float
    seeds: Sequence[SeedCell] = ()
    mode: str = "normal"
    checkpoint: str = ""


class Progress(Terminal):
    """Writes the progress of a run as a `Terminal` does; every rank but 0 has one that is "off".

    ``detail``: "quiet" shows the head, warnings and errors, and the end; "verbose" also what boundaries are told with
    `details`. All methods are local and draw at once.
    """

    def __init__(
        self,
        mode: Mode = "auto",
        *,
        detail: Detail = "normal",
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        environ: Mapping[str, str] = os.environ,
        width: int | None = None,
    ) -> None:
        super().__init__(mode, file=file, environ=environ, width=width)
        self.detail: Detail = detail
        self._steps = self._live and detail != "quiet"
        self._clock = clock
        self._drawn_at = -TRANSIENT_INTERVAL_S
        self._rows = 0
        self._mode = "normal"
        self._best_accuracy = 0.0

    def start(self, info: StartInfo) -> None:
        """The head: what is about to run, and where."""
        self._block(info.title, info.lines)
        self._print(Text())

    def status(self, text: str) -> None:
        """A word about something that takes long ("compiling"), overwritten by whatever comes next; terminals only."""
        if self._live and self.detail != "quiet":
            self._draw(text)

    def step_due(self) -> bool:
        """True when `step` would draw now: only then is it worth reading the loss from the device."""
        return self._on and self._steps and self._clock() - self._drawn_at >= TRANSIENT_INTERVAL_S

    def step(self, info: StepInfo) -> None:
        """The position inside an epoch, on the overwritten line; at most ten times a second, terminals only."""
        if not self.step_due():
            return
        parts = [f"epoch {info.epoch}/{info.epochs}", f"step {info.epoch_step}/{info.epoch_steps}"]
        if info.loss is not None:
            parts.append(f"loss {number(info.loss)}")
        if info.lr is not None:
            parts.append(f"lr {info.lr:.1e}")
        if info.rate is not None:
            parts.append(f"{info.rate:,.0f} samples/s")
        self._draw("  ".join([*parts, self._mode]))

    def boundary(self, row: BoundaryRow) -> None:
        """One line of the table; a change of mode is told on a line before it."""
        if row.mode != self._mode:
            self._mode = row.mode
            self.note(f"{row.mode} from here on", label="mode", level="info" if row.mode == "normal" else "warning")
        if self.detail == "quiet":
            return
        if self._rows % HEADER_EVERY_ROWS == 0:
            self._print(Text(HEADER, style="dim"))
        self._rows += 1
        for line in self._row_lines(row):
            self._print(line)

    def note(self, text: str, *, label: str = "", level: Level = "info") -> None:
        """Something worth knowing between two boundaries; ``label`` says from whom or about what ("tamiyo")."""
        if self.detail == "quiet" and level == "info":
            return
        self._labelled(label, text, indent=6, style=LEVEL_STYLES[level])

    def details(self, lines: Sequence[Line]) -> None:
        """More about the boundary that has just been shown, for those who want to know."""
        if self.detail == "verbose":
            for label, text in lines:
                self._labelled(label, text, indent=6, style="dim")

    def summary(self, summary: RunSummary) -> None:
        """The end of the run: results, seeds, commands with reason and effect, and how to go on."""
        results = list(report.result_lines(summary))
        if summary.mode != "normal":
            results.append(("mode", summary.mode))
        if summary.state_digest:
            results.append(("state", report.digest_line(summary.state_digest)))
        styles = {"mode": "yellow", "accuracy": "green" if summary.before_growth else ""}
        paths = [("run", summary.run_dir), ("checkpoint", summary.checkpoint), ("profile", summary.profile)]
        places = [*((label, short_path(path)) for label, path in paths), ("resume", summary.resume)]
        self._print(Text())
        self._block(report.headline(summary), results, styles=styles)
        for title, lines in report.sections(summary):
            if lines:
                self._print(Text())
                self._block(title, lines)
        self._print(Text())
        # Paths and commands stay on one line whatever their length: they are there to be copied.
        self._block("Files", [place for place in places if place[1]], wrap=False)

    def _draw(self, text: str) -> None:
        super()._draw(text)
        self._drawn_at = self._clock()

    def _row_lines(self, row: BoundaryRow) -> list[Text]:
        accuracy_style = ""
        if row.val_accuracy is not None and row.val_accuracy > self._best_accuracy:
            self._best_accuracy, accuracy_style = row.val_accuracy, "bold"
        line = Text(f"{row.epoch:>5} {row.step:>6}  {number(row.train_loss):>6}  {number(row.val_loss):>6}  ")
        line.append(f"{percent(row.val_accuracy):>6}", style=accuracy_style)
        line.append(f"  {row.lr:>7.1e}  {short_duration(row.seconds):>6}  ")
        line.append(f"{self._clean(row.checkpoint):<4}  ", style="dim")
        lines, room = [line], max(20, self._width - SEEDS_COLUMN)
        cells, used = self._seed_cells(row), 0
        for index, (text, style) in enumerate(cells):
            shown = text if index + 1 == len(cells) or len(text) >= room - 1 else f"{text},"
            if used and used + 1 + len(shown) > room:
                lines.append(Text(" " * SEEDS_COLUMN))
                used = 0
            lines[-1].append((" " if used else "") + shown, style=style)
            used += len(shown) + (1 if used else 0)
        for finished in lines:
            finished.rstrip()
        return lines

    def _seed_cells(self, row: BoundaryRow) -> list[tuple[str, str]]:
        # What is going on; when nothing is, what has been grown for good. Sleeping slots are not worth a word.
        cells = [] if row.mode == "normal" else [(self._clean(row.mode), "yellow")]
        active = [seed for seed in row.seeds if seed.stage not in ("DORMANT", "FOSSILIZED")]
        settled = [seed for seed in row.seeds if seed.stage == "FOSSILIZED"]
        if not active and len(settled) > 1:
            return [*cells, (f"{len(settled)} fossilized", STAGE_STYLES["FOSSILIZED"])]
        for seed in active or settled:
            text = f"{seed.slot} {seed.stage.lower()}"
            if seed.stage == "BLENDING":
                text += f" {seed.alpha:.2f}"
            cells.append((self._clean(text), STAGE_STYLES.get(seed.stage, "cyan")))
        return cells
