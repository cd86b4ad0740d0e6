"""The shadow branch: the seed's gradient is that of the model with the seed in full, exactly."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.rig import WIDTH, Rig, TinyHost, make_task, per_sample_loss, same_bits, tiny_config
from tolaria.kasmina.shadow import make_twin, random_streams_kept
from tolaria.leyline.types import SeedStage
from tolaria.objective import Batch
from tolaria.tamiyo import policy as do
from tolaria.task import Task


def forward(host: TinyHost, x: Tensor, seeds: dict[str, nn.Module], blend: str) -> Tensor:
    """The tiny host written out by hand, without slots, with the seeds in full."""

    def grown(slot: str, h: Tensor) -> Tensor:
        if slot not in seeds:
            return h
        f: Tensor = seeds[slot](h)
        return h + f if blend == "residual" else f

    h = grown("early", torch.tanh(host.inlet(x)))
    h = host.norm(torch.relu(grown("late", host.middle(h))))
    logits: Tensor = host.head(host.dropout(h))
    return logits


def plain_host(rig: Rig) -> TinyHost:
    """A copy of the rig's host with empty slots."""
    host = TinyHost(batch_norm=any("norm" in name for name in rig.state.host_buffers))
    saved = rig.task.model.state_dict()
    host.load_state_dict({name: saved[name] for name in host.state_dict()})
    return host


def exact_gradients(rig: Rig, slot: str, batch: Batch, others: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The gradient of the plain model's loss by the parameters of the seed in ``slot``."""
    modules = {s: copy.deepcopy(rig.state.kasmina.seeds[s].module) for s in (slot, *others)}
    seeds = {s: m for s, m in modules.items() if m is not None}
    host = plain_host(rig)
    logits = forward(host, batch.inputs, seeds, rig.config.kasmina.blend)
    loss = (per_sample_loss(logits, batch.targets) * batch.weights).sum()
    names, parameters = zip(*seeds[slot].named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return dict(zip(names, gradients, strict=True))


def shadow_gradients(rig: Rig, slot: str, batch: Batch) -> dict[str, Tensor]:
    """What the shadow branch leaves in the seed's parameters."""
    module = rig.state.kasmina.seeds[slot].module
    assert module is not None
    module.zero_grad()
    rig.replica.shadow_backward(batch)
    found = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    unequal = [n for n in found if not same_bits(found[n], expected[n])]
    assert unequal == []


@pytest.mark.parametrize("blend", ["residual", "convex"])
@pytest.mark.parametrize("slot", ["early", "late"])
def test_the_gradient_is_that_of_the_model_at_alpha_1(tmp_path: Path, slot: str, blend: str) -> None:
    with Rig.build(tmp_path, config=tiny_config(blend=blend), batch_norm=True) as rig:
        rig.grow(slot, SeedStage.TRAINING, "residual_mlp")
        with torch.no_grad():
            for parameter in rig.state.kasmina.seeds[slot].named_parameters().values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        for _ in range(2):  # the twin must see what the optimizer did to the host meanwhile
            rig.train(2)
            batch = rig.batches()[0]
            found = shadow_gradients(rig, slot, batch)
            assert_same(found, exact_gradients(rig, slot, batch))
            assert all(g.abs().max() > 0 for g in found.values())


def test_it_is_not_the_gradient_of_the_host_alone(tmp_path: Path) -> None:
    with Rig.build(tmp_path, config=tiny_config(signal="straight_through", output_ratio=1e9)) as rig:
        rig.grow("early", SeedStage.TRAINING, "residual_mlp")
        rig.train(5)
        batch = rig.batches()[0]
        exact = exact_gradients(rig, "early", batch)
        rig.replica.loss(batch).backward()
        module = rig.state.kasmina.seeds["early"].module
        assert module is not None
        first_order = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        assert any(not torch.allclose(first_order[n], exact[n]) for n in exact)


def test_two_shadows_do_not_see_each_other(tmp_path: Path) -> None:
    with Rig.build(tmp_path) as rig:
        rig.train(2)
        rig.boundary(do.germinate("early", "low_rank"), do.germinate("late", "residual_mlp"))
        rig.boundary(do.start_training("early"), do.start_training("late"))
        rig.train(3)
        batch = rig.batches()[0]
        early, late = (exact_gradients(rig, slot, batch) for slot in ("early", "late"))
        rig.replica.shadow_backward(batch)
        for slot, expected in (("early", early), ("late", late)):
            parameters = rig.state.kasmina.seeds[slot].named_parameters()
            found = {n.removeprefix(f"seed/{slot}/"): p.grad for n, p in parameters.items() if p.grad is not None}
            assert_same(found, expected)


def test_a_fossil_is_part_of_what_the_shadow_sees(tmp_path: Path) -> None:
    with Rig.build(tmp_path) as rig:
        rig.grow("late", SeedStage.FOSSILIZED)
        rig.grow("early", SeedStage.TRAINING)
        batch = rig.batches()[0]
        assert_same(shadow_gradients(rig, "early", batch), exact_gradients(rig, "early", batch, ("late",)))


def test_the_twin_shares_the_hosts_storage_and_no_gradient(tmp_path: Path) -> None:
    with Rig.build(tmp_path, batch_norm=True) as rig:
        rig.grow("early", SeedStage.TRAINING)
        (_, twin) = rig.replica.shadows[0]
        shadow = dict(twin.model.named_parameters())
        for name, parameter in rig.task.model.named_parameters():
            assert shadow[name] is not parameter
            assert shadow[name].data_ptr() == parameter.data_ptr()
            assert not shadow[name].requires_grad
        rig.replica.shadow_backward(rig.batches()[0])
        assert all(p.grad is None for p in rig.task.model.parameters())


class Centre(nn.Module):
    """Takes away a running mean, which it uses while it learns it."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, h: Tensor) -> Tensor:
        """(batch, WIDTH) -> the same."""
        if self.training:
            self.mean.lerp_(h.detach().mean(0), 0.5)
        return h - self.mean


def make_centred_task() -> Task:
    """The tiny task with a buffer that acts on the loss."""
    task = make_task()
    assert isinstance(task.model, TinyHost)
    task.model.norm = Centre()
    return task


def test_a_shadow_remembers_nothing_that_a_resumed_run_would_not_have(tmp_path: Path) -> None:
    with Rig.build(tmp_path, make=make_centred_task) as rig:
        rig.grow("early", SeedStage.TRAINING)
        batch = rig.batches()[0]
        found = shadow_gradients(rig, "early", batch)
        rig.replica.rebuild()  # as after a resume: the twin is made anew from the saved state
        assert_same(found, shadow_gradients(rig, "early", batch))


def test_a_twin_needs_a_seed(tmp_path: Path) -> None:
    with Rig.build(tmp_path) as rig, pytest.raises(ValueError, match="'early' holds no seed"):
        make_twin(rig.state.objective, "slots", rig.state.kasmina.seeds["early"], "residual")


def test_the_random_stream_is_as_before_also_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), random_streams_kept(torch.device("cpu")):  # noqa: PT012
        torch.rand(3)
        math.floor(1 / 0)
    assert torch.equal(torch.get_rng_state(), before)
