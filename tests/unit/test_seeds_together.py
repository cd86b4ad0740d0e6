"""Two seeds in one model, in every pair of stages, and a slot that is used twice."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from tests.rig import Rig, TinyHost, per_sample_loss, same_bits, tiny_config, way
from tolaria.compare import digest_of
from tolaria.config import OptimConfig
from tolaria.coordinator.delivery import obey
from tolaria.kasmina.lifecycle import MOVES
from tolaria.kasmina.seed import Seed
from tolaria.leyline.codec import encode_command, encode_decision
from tolaria.leyline.types import Command, Decision, SeedOp, SeedStage
from tolaria.measure import TRAIN_METERS
from tolaria.objective import Batch
from tolaria.replica import evaluating
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policy import with_identity
from tolaria.telemetry.meters import Meters
from tolaria.telemetry.split import Split

S = SeedStage
STAGES = (S.DORMANT, S.GERMINATED, S.TRAINING, S.BLENDING, S.SHADOWING, S.PROBATIONARY, S.FOSSILIZED, S.CULLED)
PAIRS = list(itertools.product(STAGES, STAGES))
NAMES = [f"{a.name}-{b.name}" for a, b in PAIRS]
CONFIG = tiny_config(output_ratio=1e6, blend_steps=4, embargo_boundaries=50)
LEARNING = {S.TRAINING, S.BLENDING, S.FOSSILIZED}
Change = Callable[[Seed, Tensor], Tensor]


def bring(rig: Rig, slot: str, stage: SeedStage, blueprint: str) -> None:
    """Bring a free slot to a stage."""
    if stage == S.CULLED:
        rig.grow(slot, S.GERMINATED, blueprint)
        assert rig.boundary(do.cull(slot)).outcomes[0].applied
        if rig.state.kasmina.seeds[slot].stage == S.CULLED:
            rig.train(1)
    elif stage != S.DORMANT:
        rig.grow(slot, stage, blueprint)
    seed = rig.state.kasmina.seeds[slot]
    if seed.module is not None:
        generator = torch.Generator().manual_seed(len(slot))
        with torch.no_grad():
            for parameter in seed.module.parameters():
                # So that what a seed adds can be told from nothing.
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


@pytest.fixture(params=PAIRS, ids=NAMES, scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A rig with its two seeds in a pair of stages; a test may train it on, but moves no seed."""
    first, second = request.param
    with Rig.build(tmp_path_factory.mktemp("pair"), config=CONFIG) as rig:
        bring(rig, "early", first, "residual_mlp")
        bring(rig, "late", second, "low_rank")
        seeds = rig.state.kasmina.seeds
        if first != S.CULLED:
            assert seeds["early"].stage == first
        assert seeds["late"].stage == second
        for seed in seeds.values():
            if seed.stage == S.BLENDING:  # on its way again
                seed.blend_position = 1
                seed.advance()
        yield rig


def as_now(seed: Seed, h: Tensor) -> Tensor:
    """What the slot makes of h, written down once more."""
    if seed.module is None or seed.stage not in (S.BLENDING, S.PROBATIONARY, S.FOSSILIZED):
        return h
    if seed.stage == S.BLENDING:
        return h + seed.alpha * seed.module(h.detach())
    added: Tensor = h + seed.module(h)
    return added


def in_full(seed: Seed, h: Tensor) -> Tensor:
    """The slot with its seed at alpha 1."""
    assert seed.module is not None
    added: Tensor = h + seed.module(h)
    return added


def host_alone(seed: Seed, h: Tensor) -> Tensor:
    """The slot without its seed."""
    return h


def by_hand(rig: Rig, x: Tensor, early: Change = as_now, late: Change = as_now) -> Tensor:
    """The model's output without any slot."""
    host, seeds = rig.state.objective.model, rig.state.kasmina.seeds
    assert isinstance(host, TinyHost)
    h = early(seeds["early"], torch.tanh(host.inlet(x)))
    logits: Tensor = host.head(torch.relu(late(seeds["late"], linear(h, host.middle.weight, host.middle.bias))))
    return logits


def loss_by_hand(rig: Rig, batch: Batch, **changes: Change) -> Tensor:
    """The weighted loss of a batch without any slot."""
    return (per_sample_loss(by_hand(rig, batch.inputs, **changes), batch.targets) * batch.weights).sum()


def test_forward_is_what_the_stages_say(pair: Rig) -> None:
    batch = pair.batches()[0]
    with torch.no_grad():
        assert same_bits(pair.state.objective.model(batch.inputs), by_hand(pair, batch.inputs))


def test_every_gradient_is_the_one_of_the_stages(pair: Rig) -> None:
    batch, state = pair.batches()[0], pair.state
    pair.replica.loss(batch).backward()
    pair.replica.shadow_backward(batch)
    seeds = state.kasmina.seeds
    found = {n: p.grad for n, p in state.host_parameters.items()}
    found |= {n: p.grad for s in seeds.values() for n, p in s.named_parameters().items()}
    acting = {n: p for s in seeds.values() if s.stage in (S.BLENDING, S.FOSSILIZED)
              for n, p in s.named_parameters().items()}  # fmt: skip
    wanted = {**state.host_parameters, **acting}
    expected: dict[str, Any] = dict.fromkeys(found)
    expected |= dict(zip(wanted, torch.autograd.grad(loss_by_hand(pair, batch), list(wanted.values())), strict=True))
    for name, seed in seeds.items():
        if seed.stage == S.TRAINING:
            own = seed.named_parameters()
            loss = loss_by_hand(pair, batch, **{name: in_full})
            expected |= dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        if expected[name] is None:
            assert gradient is None, name
        else:
            assert gradient is not None, name
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-8, msg=name)
    state.optimizer.zero_grad(set_to_none=True)


def test_only_seeds_that_learn_change_and_evidence_is_that_of_each_alone(pair: Rig) -> None:
    seeds = pair.state.kasmina.seeds
    before = {n: p.detach().clone() for s in seeds.values() for n, p in s.named_parameters().items()}
    pair.train(2)
    for seed in seeds.values():
        moved = [not same_bits(p.detach(), before[n]) for n, p in seed.named_parameters().items()]
        assert set(moved) <= {seed.stage in LEARNING}, seed.slot
    pair.evaluator.measure(Meters(TRAIN_METERS))
    points, classes = pair.task.validation.tensors  # type: ignore[attr-defined]
    for name, seed in seeds.items():
        if seed.stage not in (S.SHADOWING, S.PROBATIONARY):
            continue
        with evaluating(pair.state.objective):
            # The other seed stays as it is in both passes.
            losses = [per_sample_loss(by_hand(pair, points, **{name: how}), classes) for how in (host_alone, in_full)]
        gain = float((losses[0] - losses[1]).double().mean())
        assert seed.evidence.contribution == pytest.approx(gain, rel=1e-4, abs=1e-7)


def test_a_saved_pair_goes_on_as_it_would_have(pair: Rig, tmp_path: Path) -> None:
    tensors = {n: t.clone() for n, t in pair.state.tensors().items()}
    meta = pair.state.meta()
    (tmp_path / "other").mkdir()
    with Rig.build(tmp_path / "other", config=CONFIG) as other:
        other.state.load(tensors, meta)
        other.replica.rebuild()
        assert other.state.digest() == pair.state.digest()
        for rig in (pair, other):
            rig.train(3)
        assert other.state.digest() == pair.state.digest()


# Both moved at one boundary

LEGAL = {stage: [op for (of, op) in MOVES if of == stage] for stage in STAGES}
MOVED = [(a, x, b, y) for a, b in PAIRS for x in LEGAL[a] for y in LEGAL[b]]
# Every stage with every operation once on each side, instead of all of the square.
SHORT = [m for number, m in enumerate(MOVED) if number % 5 == 0]


def moving(operation: SeedOp, slot: str) -> Command:
    blueprint = "low_rank" if operation == SeedOp.GERMINATE else ""
    return with_identity(
        do.seed_command(operation, slot, blueprint=blueprint), f"of-{slot}", issued_by="test", issued_at_ns=1
    )


def decide(rig: Rig, *commands: Command) -> list[str]:
    decision = Decision(
        boundary=rig.state.boundary, step_effective=rig.state.step, source="policy", reason="answered",
        conservative=False, commands=tuple(map(encode_command, commands)),
    )  # fmt: skip
    applied = obey(
        encode_decision(decision), rig.state, rig.replica, rig.world.peers,
        healthy_boundaries=2, sample=rig.sample, split=Split(),
    )  # fmt: skip
    assert applied is not None
    return [outcome.code for outcome in applied.outcomes]


def fingerprint(rig: Rig) -> bytes:
    """The digest of the state, in which changes of learning rates at one step have no order."""
    meta = rig.state.meta()
    meta["lr"]["history"] = sorted(map(str, meta["lr"]["history"]))
    return digest_of(rig.state.tensors(), meta)


@pytest.mark.parametrize(("a", "x", "b", "y"), SHORT, ids=["-".join(part.name for part in m) for m in SHORT])
def test_both_can_move_at_one_boundary_in_any_order(
    tmp_path: Path, a: SeedStage, x: SeedOp, b: SeedStage, y: SeedOp
) -> None:
    digests = []
    for order in (1, -1):
        (tmp_path / str(order)).mkdir()
        with Rig.build(tmp_path / str(order), config=CONFIG) as rig:
            bring(rig, "early", a, "residual_mlp")
            bring(rig, "late", b, "low_rank")
            rig.train(2)
            rig.boundary()
            before, kept = fingerprint(rig), rig.state.memento()
            assert decide(rig, *[moving(x, "early"), moving(y, "late")][::order]) == ["applied", "applied"]
            seeds = rig.state.kasmina.seeds
            assert (seeds["early"].stage, seeds["late"].stage) == (MOVES[a, x].to, MOVES[b, y].to)
            after = fingerprint(rig)
            rig.state.restore(kept)
            rig.replica.rebuild(afresh=True)
            assert fingerprint(rig) == before
            assert decide(rig, moving(x, "early"), moving(y, "late")) == ["applied", "applied"]
            assert fingerprint(rig) == after
            rig.train(2)
            digests.append(fingerprint(rig))
    assert digests[0] == digests[1]


# A slot used again


@pytest.mark.parametrize("until", [S.GERMINATED, S.TRAINING])
@pytest.mark.parametrize("blueprint", ["low_rank", "residual_mlp"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_second_seed_of_a_slot_lives_as_if_there_had_been_no_first(
    tmp_path: Path, until: SeedStage, blueprint: str, optimizer: Any
) -> None:
    """The first one never acted on the host, so that the two runs can be compared bit by bit."""
    ends = []
    for first in (True, False):
        (tmp_path / str(first)).mkdir()
        config = replace(
            tiny_config(embargo_boundaries=1, output_ratio=1e6), optim=OptimConfig(name=optimizer, lr=0.02)
        )
        with Rig.build(tmp_path / str(first), config=config) as rig:
            rig.train(2)
            for stage, command in way("early", "low_rank"):
                rig.boundary(*([command] if first else []))
                rig.train(3)
                if stage == until:
                    break
            rig.boundary(*([do.cull("early")] if first else []))
            for _ in range(4):
                rig.train(1)
                rig.boundary()
            seed = rig.state.kasmina.seeds["early"]
            assert (seed.stage, rig.state.left_overs(seed.group)) == (S.DORMANT, [])
            rig.commands = 10  # the seed's weights follow from its command's id
            for stage, command in way("early", blueprint):
                assert rig.boundary(command).outcomes[0].applied
                rig.train(4)
                if stage == S.PROBATIONARY:
                    break
            rig.boundary()
            meta = rig.state.meta()
            meta["lr"].pop("history", None)
            ends.append((rig.state.tensors(), meta))
    (tensors, meta), (plain_tensors, plain_meta) = ends
    assert tensors.keys() == plain_tensors.keys()
    assert [n for n, t in tensors.items() if not same_bits(t, plain_tensors[n])] == []
    assert meta == plain_meta
