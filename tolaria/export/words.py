"""The README of an export: what the model is, in words."""

from collections.abc import Mapping
from typing import Any

from tolaria.export.grown import Grown

AMP = {"bf16": "bfloat16", "fp16": "float16"}


def readme(grown: Grown, structure: Mapping[str, Any]) -> str:
    """README.md beside the weights."""
    loaded, seeds = grown.loaded, structure["seeds"]
    host = sum(p.numel() for p in grown.model.parameters())
    lines = [
        f"# {grown.config.run.name}, step {loaded.step:,}",
        "",
        f"Exported from checkpoint {loaded.path.name} of run {loaded.run_id}, whose every hash was verified.",
        f"The host has {host:,} parameters; {_count(len(seeds), 'seed')} grew into it and act on its output.",
        "",
        "| slot | grown at the output of | blueprint | stage | what it does | parameters |",
        "|---|---|---|---|---|---|",
        *(_row(seed, structure["blend"]) for seed in seeds),
    ]
    if structure["left_out"]:
        idle = ", ".join(f"{seed['slot']} ({seed['stage'].lower()})" for seed in structure["left_out"])
        lines += ["", f"Left out, since they did not act on the output: {idle}."]
    lines += ["", "## Use", "", *_use(seeds)]
    amp = AMP.get(grown.config.precision.amp)
    if amp is not None:
        lines += [
            "",
            f"The run validated under autocast in {amp}. For the numbers that it told, call the model so:",
            f"`with torch.autocast(inputs.device.type, torch.{amp}): outputs = model(inputs)`",
        ]
    return "\n".join(lines) + "\n"


def _row(seed: Mapping[str, Any], blend: str) -> str:
    if seed["blending"]:
        alpha = f"{seed['alpha']:.4f}"
        does = f"h + {alpha} f(h)" if blend == "residual" else f"{1 - seed['alpha']:.4f} h + {alpha} f(h)"
    else:
        does = "h + f(h)" if blend == "residual" else "f(h)"
    cells = (seed["slot"], f"`{seed['path']}`", seed["blueprint"], seed["stage"].lower(), f"`{does}`",
             f"{seed['parameters']:,}")  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _use(seeds: list[Mapping[str, Any]]) -> list[str]:
    own = sorted({seed["blueprint"]: seed["yours"] for seed in seeds if seed["yours"]}.items())
    given = f", blueprints={{{', '.join(f'{name!r}: ...' for name, _ in own)}}}" if own else ""
    lines = [
        "```python", "from model import build  # model.py of this folder; needs torch and safetensors", "",
        f"model = build(make_host{given})  # make_host(): your own model, as it was before it grew",
        "outputs = model(inputs)", "```", "",
        "Where your model contains a `tolaria.Slot`, put `model.Slot` (or `torch.nn.Identity()`) in its place.",
    ]  # fmt: skip
    if own:
        lines += [f"Blueprint `{name}` is your own (`{where}`): give its function." for name, where in own]
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
