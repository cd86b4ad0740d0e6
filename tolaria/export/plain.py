"""Weights, structure, and a model.py of torch alone: what another program needs to run the trained model.

weights.safetensors    host/<name>, seed/<slot>/<name>, alpha/<slot>
structure.json         which seed acts where, and how
model.py               build(make_host) -> the grown model
README.md              the same in words
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tolaria.errors import RunDirError, TaskError
from tolaria.export.blueprints import built_in_sources
from tolaria.export.grown import Grown, make_task
from tolaria.export.source import MODEL_SOURCE
from tolaria.export.words import readme
from tolaria.kasmina.blueprints import BUILT_IN, get_blueprint
from tolaria.kasmina.seed import Seed
from tolaria.leyline.types import SeedStage
from tolaria.task import users_code

WEIGHTS, STRUCTURE, MODEL, README = "weights.safetensors", "structure.json", "model.py", "README.md"


def write_plain(grown: Grown, folder: Path) -> list[str]:
    """Write the four files into a folder, and prove them: the rebuilt model gives the trained one's outputs, all bits.

    The names of the files. Raises TaskError when the outputs differ, RunDirError when it cannot be written.
    """
    source, classes = built_in_sources(seed.blueprint for seed in grown.acting)
    table = ", ".join(f'"{name}": {found}' for name, found in classes.items())
    structure = describe(grown)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors_of(grown)), folder / WEIGHTS, metadata={"step": str(grown.loaded.step)})
        (folder / STRUCTURE).write_text(json.dumps(structure, indent=2) + "\n", encoding="utf-8")
        (folder / MODEL).write_text(MODEL_SOURCE.format(source=source, table=table), encoding="utf-8")
        (folder / README).write_text(readme(grown, structure), encoding="utf-8")
    except OSError as error:
        raise RunDirError(f"{folder}: cannot be written ({error.strerror or error})") from error
    prove(grown, rebuilt(grown, folder), "the files written")
    return [WEIGHTS, STRUCTURE, MODEL, README]


def rebuilt(grown: Grown, folder: Path) -> nn.Module:
    """The model as the written files give it, with a host that the task makes anew."""
    module = _import(folder / MODEL)
    own = {seed.blueprint: get_blueprint(seed.blueprint).build for seed in grown.acting}
    with users_code(f"{folder / MODEL}"):
        model: nn.Module = module.build(lambda: make_task(grown.config).model, folder, blueprints=own)
    return model


def prove(grown: Grown, model: Any, what: str) -> None:
    """Raise TaskError unless ``model`` gives the same bits as the trained one on validation samples."""
    inputs = grown.inputs()
    expected = list(leaves(grown.outputs(inputs)))
    if not equal(expected, list(leaves(grown.outputs(inputs)))):
        raise TaskError("the model gives other outputs each time, in evaluation mode too: an export cannot be proven")
    with torch.no_grad(), users_code(what):
        found = list(leaves(model(inputs)))
    if not equal(expected, found):
        raise TaskError(
            f"{what} do not give the outputs of the trained model; nothing was exported that could be trusted"
        )


def describe(grown: Grown) -> dict[str, Any]:
    """structure.json: the seeds that act, in the order in which they were attached."""
    return {
        "format": 1,
        "run_id": grown.loaded.run_id,
        "step": grown.loaded.step,
        "checkpoint": grown.loaded.path.name,
        "state_digest": grown.loaded.state_digest,
        "versions": grown.loaded.versions,
        "blend": grown.config.kasmina.blend,
        "seeds": [_seed(grown, seed) for seed in grown.acting],
        "left_out": [{"slot": seed.slot, "stage": seed.stage.name, "blueprint": seed.blueprint} for seed in grown.idle],
    }


def _seed(grown: Grown, seed: Seed) -> dict[str, Any]:
    build = get_blueprint(seed.blueprint).build
    own = seed.blueprint not in BUILT_IN
    return {
        "slot": seed.slot, "path": grown.paths[seed.slot], "blueprint": seed.blueprint, "shape": list(seed.shape),
        "stage": seed.stage.name, "blending": seed.stage == SeedStage.BLENDING, "alpha": seed.alpha_value,
        "parameters": seed.parameter_count,
        "yours": f"{build.__module__}:{getattr(build, '__qualname__', repr(build))}" if own else "",
    }  # fmt: skip


def tensors_of(grown: Grown) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its name in the export; copies, since parts of one memory cannot be stored twice."""
    for name, tensor in (*grown.model.named_parameters(), *grown.model.named_buffers()):
        yield f"host/{name}", tensor.detach().clone().contiguous()
    for seed in grown.acting:
        for name, tensor in (*seed.named_parameters().items(), *seed.named_buffers().items()):
            yield name, tensor.detach().clone().contiguous()
        if seed.stage == SeedStage.BLENDING:
            yield f"alpha/{seed.slot}", seed.alpha.detach().clone()


def leaves(value: Any) -> Iterator[Tensor]:
    """The tensors of a nested output, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for key in value:
            yield from leaves(value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two outputs have the same bits."""
    if [(t.shape, t.dtype) for t in one] != [(t.shape, t.dtype) for t in other]:
        return False
    return all(
        torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("exported_model", path)
    if spec is None or spec.loader is None:
        raise TaskError(f"{path}: cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
