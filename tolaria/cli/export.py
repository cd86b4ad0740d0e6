"""`tolaria export PATH`: the trained model, grown parts and all, for use without Tolaria."""

import os
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tolaria.cli.printing import console, print_json, safe
from tolaria.errors import RunDirError
from tolaria.telemetry.words import counted, large

if TYPE_CHECKING:
    from tolaria.export.grown import Grown

FORMATS = ("safetensors", "torch")


def export(
    path: Annotated[str, typer.Argument(help="A run's directory, or one checkpoint: RUN/ckpt/NAME.")],
    form: Annotated[str, typer.Option("--format", "-f", help="safetensors or torch.")] = "safetensors",
    out: Annotated[str, typer.Option("--out", "-o", help="A new folder; without it RUN/export-NAME.")] = "",
    task: Annotated[str, typer.Option("--task", help="MODULE:FUNCTION, where config.toml names another.")] = "",
    config: Annotated[str, typer.Option("--config", help="config.toml of a checkpoint that was moved.")] = "",
    json: Annotated[bool, typer.Option("--json", help="Print what was written, as JSON.")] = False,
) -> int:
    """Write the model as it was trained and grown, so that it can be loaded without Tolaria.

    safetensors: weights, structure.json, README.md and a model.py of torch alone, which puts the seeds into your own
    model at their places. torch: a torch.export program, model.pt2, which needs nothing of yours.

    Either is read again before it counts, and must give the trained model's outputs on validation samples, bit for
    bit. Of a run that ended in order the newest checkpoint is taken, else the newest good one. The task's function is
    run, as at the start of training.

    Examples: tolaria export runs/RUN | tolaria export runs/RUN/ckpt/c8-s792 --format torch --out model
    """
    if form not in FORMATS:
        raise typer.BadParameter(f"--format {form!r}: expected {' or '.join(FORMATS)}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # where the task's module lies, as under python -m
    from tolaria.export.grown import choose_checkpoint, load_grown  # noqa: PLC0415 - torch takes seconds to import

    chosen = choose_checkpoint(Path(path))
    target = Path(out) if out else chosen.resolve().parent.parent / f"export-{chosen.name}-{form}"
    if os.path.lexists(target):
        raise RunDirError(f"{target}: is there already; remove it, or choose another folder with --out")
    grown = load_grown(chosen, task=task, config_file=Path(config) if config else None)
    files, note = _write_whole(grown, target, form)
    sizes = {name: (target / name).stat().st_size for name in files}
    seeds = [seed.slot for seed in grown.acting]
    if json:
        print_json({"folder": str(target), "checkpoint": chosen.name, "step": grown.loaded.step, "files": sizes,
                    "seeds": seeds, "note": note, "proven": True})  # fmt: skip
        return 0
    out_ = console()
    out_.print(f"{safe(str(target))}", soft_wrap=True)
    for name, size in sizes.items():
        out_.print(f"  {name:<20} {large(size)}B")
    grown_in = f"{counted(len(seeds), 'seed')} in it ({safe(', '.join(seeds))})" if seeds else "nothing grew in it"
    out_.print(f"step {grown.loaded.step:,} of {safe(chosen.name)}, {grown_in}{note}")
    out_.print("read again: the outputs are the trained model's, bit for bit")
    return 0


def _write_whole(grown: "Grown", target: Path, form: str) -> tuple[list[str], str]:
    """Write into a folder beside, which gets its name when all is proven."""
    from tolaria.export.plain import rebuilt, write_plain  # noqa: PLC0415 - torch
    from tolaria.export.program import write_program  # noqa: PLC0415 - torch

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        working = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise RunDirError(f"{target}: cannot be written ({error.strerror})") from error
    try:
        files, note = write_plain(grown, working), ""
        if form == "torch":
            model = rebuilt(grown, working)
            for name in files:
                (working / name).unlink()
            name, any_size = write_program(grown, model, working)
            files = [name]
            note = "" if any_size else f"; for batches of {len(grown.inputs())} samples only"
        shutil.rmtree(working / "__pycache__", ignore_errors=True)
        working.chmod(0o755)
        os.rename(working, target)
    finally:
        with suppress(FileNotFoundError):
            shutil.rmtree(working)
    return files, note
