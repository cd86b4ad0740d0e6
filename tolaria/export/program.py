"""One file that computes what the trained model does, with no source of it: a torch.export program (.pt2)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from tolaria.errors import RunDirError, TaskError
from tolaria.export.grown import NUM_SAMPLES, Grown
from tolaria.export.plain import equal, leaves, prove
from tolaria.task import in_words, users_code
from tolaria.trial import MODEL_ERRORS

PROGRAM = "model.pt2"


class _Called(nn.Module):
    """The model with one argument, ``inputs``: a program's signature is that of what was traced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Any:
        """As the model."""
        return self.model(inputs)


def write_program(grown: Grown, model: nn.Module, folder: Path) -> tuple[str, bool]:
    """Write the program, and prove it: read again, it gives the trained model's outputs, bit for bit.

    ``model``: the grown model, of torch alone. (name, whether it takes batches of any size). Raises TaskError for a
    model that torch.export cannot follow, RunDirError when the file cannot be written.
    """
    inputs = grown.inputs()
    program, any_size = _traced(model, inputs)
    path = folder / PROGRAM
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.export.save(program, path)
    except OSError as error:
        raise RunDirError(f"{path}: cannot be written ({error.strerror or error})") from error
    with users_code(f"reading {path} again"):
        again = torch.export.load(path).module()
    prove(grown, again, "the program written")
    if any_size:
        _prove_other_size(grown, again)
    return PROGRAM, any_size


def _traced(model: nn.Module, inputs: Any) -> tuple[torch.export.ExportedProgram, bool]:
    """The program, for any number of samples where the model allows it."""
    reason = ""
    for shapes in (_batch_dimension(inputs), None):
        try:
            with torch.no_grad():
                return torch.export.export(_Called(model), (inputs,), dynamic_shapes=shapes), shapes is not None
        except MODEL_ERRORS as error:
            # What torch.export raises for a model it cannot follow, its own errors are RuntimeErrors.
            reason = in_words(error)[:400]
    raise TaskError(f"torch.export cannot follow this model ({reason}); use --format safetensors")


def _batch_dimension(inputs: Any) -> tuple[Any]:
    batch = torch.export.Dim("batch", min=1)
    return (_pytree.tree_map(lambda leaf: {0: batch} if isinstance(leaf, Tensor) else None, inputs),)


def _prove_other_size(grown: Grown, program: Any) -> None:
    other = grown.inputs(NUM_SAMPLES // 2 + 1)
    with torch.no_grad(), users_code("the program written"):
        found = list(leaves(program(other)))
    if not equal(list(leaves(grown.outputs(other))), found):
        raise TaskError("the program written gives other outputs for another number of samples")
