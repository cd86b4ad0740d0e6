"""Jobs for test_growth.py: what the host feels of a TRAINING seed, over ranks, eager and compiled."""

from typing import Any

import torch
import torch._dynamo.utils

from tests.dist.jobs_growth import joined, must
from tests.isolation import Leaky, differences, trace
from tests.rig import Rig, tiny_config
from tolaria.streams import load_rng_tensors, rng_tensors
from tolaria.tamiyo import policy as do


def isolation(signal: str, compiled: bool = False) -> list[str]:
    """Where the host of a run with a TRAINING seed differs from that of a run without one, over all ranks."""
    traces = []
    for grown in (True, False):
        with joined(tiny_config(signal=signal, compiled=compiled), dropout=0.3) as rig:
            rig.train(2)
            for command in (do.germinate("early", "residual_mlp"), do.start_training("early")):
                must(rig, *([command] if grown else []))
                rig.train(1)
            traces.append(trace(rig, 3, logits=not compiled))
            assert rig.replica.compiled == compiled
    return differences(*traces)


def compiled_isolation(signal: str, leaky: bool) -> dict[str, Any]:
    """One compiled structure run with several seeds in turn, from one and the same state of the host.

    ``leaky``: afterwards the same with a form that is not tight.
    """
    with joined(tiny_config(signal=signal, compiled=True), dropout=0.3) as rig:
        rig.train(2)
        must(rig, do.germinate("early", "residual_mlp"))
        must(rig, do.start_training("early"))
        rig.train(1)
        start = _Start(rig)
        compiled = _graphs()
        traces = []
        for fill in ("as built", "normal", "nan"):
            start.again(rig, fill)
            traces.append(trace(rig, 2, logits=False))
        found: dict[str, Any] = {
            "differences": [differences(other, traces[0]) for other in traces[1:]],
            "changing": len(differences(traces[0][1:], traces[0][:1])) > 0,
            "new_graphs": _graphs() - compiled,
            "compiled": rig.replica.compiled and compiled > 0,
            "dropped": len(rig.told("seed_gradient_not_finite")),
        }
        if leaky:
            seed = rig.state.kasmina.seeds["early"].module
            assert seed is not None
            rig.state.kasmina.slots["early"].form = Leaky(seed)
            traces = []
            for fill in ("as built", "normal"):
                start.again(rig, fill)
                traces.append(trace(rig, 1, logits=False))
            found["leaks"] = differences(*traces)
        return found


class _Start:
    """A copy of what training changes, to begin again with."""

    def __init__(self, rig: Rig) -> None:
        self.tensors = {name: tensor.clone() for name, tensor in rig.state.tensors().items()}
        self.streams = {name: tensor.clone() for name, tensor in rng_tensors(rig.world.device).items()}
        self.position = rig.state.sampler.state_dict()
        self.step = rig.state.step

    def again(self, rig: Rig, fill: str) -> None:
        """Put it back, and give the seed other weights."""
        with torch.no_grad():
            for name, tensor in rig.state.tensors().items():
                tensor.copy_(self.tensors[name])
        load_rng_tensors(self.streams, rig.world.device)
        rig.state.sampler.load_state_dict(self.position)
        rig.state.step = self.step
        _fill(rig, fill)


def _fill(rig: Rig, fill: str) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in rig.state.kasmina.seeds["early"].named_parameters().values():
            if fill == "normal":
                parameter.normal_(std=3.0, generator=generator)
            elif fill == "nan":
                parameter.fill_(float("nan"))


def _graphs() -> int:
    """Graphs that dynamo has compiled in this process so far."""
    count: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return count
