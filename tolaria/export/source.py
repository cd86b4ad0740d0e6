"""The text of an exported model.py; ``{source}`` and ``{table}`` are filled with what grew."""

MODEL_SOURCE = '''\
"""A model as it was trained and grown. Needs torch and safetensors, nothing else.

    from model import build
    model = build(make_host)        # make_host(): your own model, as it was before it grew
    outputs = model(inputs)

See README.md beside this file.
"""

import json
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).resolve().parent


{source}


BLUEPRINTS = {{{table}}}


class Slot(nn.Identity):
    """Stands where your model had a tolaria.Slot: Slot("name"), which does nothing by itself."""


class Grafted(nn.Module):
    """A seed at the output h of a module of the host: h + a f(h), or (1 - a) h + a f(h), where a is 1 if it is None."""

    def __init__(self, seed: nn.Module, residual: bool, alpha: "Tensor | None") -> None:
        super().__init__()
        self.seed = seed
        self.residual = residual
        self.register_buffer("alpha", alpha)

    def forward(self, h: Tensor) -> Tensor:
        f = self.seed(h).to(h.dtype)
        if self.alpha is None:
            return h + f if self.residual else f
        return h + self.alpha * f if self.residual else (1 - self.alpha) * h + self.alpha * f


class Grown(nn.Module):
    """The host with its seeds: called as the host is."""

    def __init__(self, host: nn.Module, seeds: "list[tuple[str, Grafted]]") -> None:
        super().__init__()
        self.host = host
        self.seeds = nn.ModuleList([seed for _, seed in seeds])
        for path, seed in seeds:
            host.get_submodule(path).register_forward_hook(lambda module, args, output, seed=seed: seed(output))

    def forward(self, *args, **kwargs):
        return self.host(*args, **kwargs)


def build(make_host, folder=HERE, blueprints=None) -> Grown:
    """The trained model, on the CPU, in evaluation mode.

    make_host: a function without arguments that returns your model as it was before it grew; its weights are
    overwritten. blueprints: name -> function of the shape, for those of your own. Raises ValueError that names what
    does not fit.
    """
    structure = json.loads((Path(folder) / "structure.json").read_text())
    weights = load_file(Path(folder) / "weights.safetensors")
    known = {{**BLUEPRINTS, **(blueprints or {{}})}}
    host = make_host()
    _fill("host/", dict(host.named_parameters()) | dict(host.named_buffers()), weights)
    seeds = []
    for entry in structure["seeds"]:
        if entry["blueprint"] not in known:
            raise ValueError(f"blueprint {{entry['blueprint']!r}} is your own ({{entry['yours']}}); give its function: "
                             "build(make_host, blueprints={{name: function}})")
        seed = known[entry["blueprint"]](tuple(entry["shape"]))
        _fill(f"seed/{{entry['slot']}}/", dict(seed.named_parameters()) | dict(seed.named_buffers()), weights)
        alpha = weights.pop(f"alpha/{{entry['slot']}}") if entry["blending"] else None
        seeds.append((entry["path"], Grafted(seed, structure["blend"] == "residual", alpha)))
    if weights:
        raise ValueError(f"{{len(weights)}} weights have no place in this model, such as {{min(weights)!r}}")
    return Grown(host, seeds).eval()


def _fill(prefix: str, tensors: "dict[str, Tensor]", weights: "dict[str, Tensor]") -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            found = weights.pop(prefix + name, None)
            if found is None or (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
                told = "missing" if found is None else f"{{tuple(found.shape)}} {{found.dtype}}"
                here = f"{{tuple(tensor.shape)}} {{tensor.dtype}}"
                raise ValueError(f"{{prefix}}{{name}}: {{here}} in this model, {{told}} in the weights")
            tensor.copy_(found)
'''
