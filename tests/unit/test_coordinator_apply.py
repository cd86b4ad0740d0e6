"""A decision takes effect as a whole or not at all: what each command is refused for, and the way back."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from torch import nn

from tests.rig import Rig, tiny_config
from tolaria.coordinator.apply import Applied
from tolaria.coordinator.delivery import obey
from tolaria.coordinator.plan import Outcome
from tolaria.dist import Peers
from tolaria.errors import TaskError
from tolaria.kasmina import blueprints
from tolaria.leyline.codec import encode_command, encode_decision
from tolaria.leyline.generated import leyline_pb2 as pb
from tolaria.leyline.types import Command, CommandType, Decision, OptimizerCommand, SeedOp, SeedStage
from tolaria.mode import Mode
from tolaria.objective import Batch
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policy import with_identity
from tolaria.telemetry.split import Split

CONSERVATIVE = Mode(conservative=True, reason="policy: timeout")
HEALTHY_BOUNDARIES = 3


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig.build(tmp_path) as built:
        yield built


def signed(*commands: Command) -> list[bytes]:
    return [
        encode_command(with_identity(command, f"c{number}", issued_by="test", issued_at_ns=1))
        for number, command in enumerate(commands)
    ]


def carry_out(
    rig: Rig, raw: Sequence[bytes], *, source: str = "policy", peers: Peers | None = None, broken: bool = False
) -> Applied:
    """Apply a decision with these exact bytes; ``broken``: no batch can be had for the new structure's trial."""

    def sample(batch_size: int) -> Batch:
        if broken:
            raise TaskError("no batch to be had")
        return rig.sample(batch_size)

    decision = Decision(
        boundary=rig.state.boundary, step_effective=rig.state.step, source=source, reason="answered",
        conservative=rig.state.mode.conservative, commands=tuple(raw),
    )  # fmt: skip
    applied = obey(
        encode_decision(decision), rig.state, rig.replica, peers or rig.world.peers,
        healthy_boundaries=HEALTHY_BOUNDARIES, sample=sample, split=Split(),
    )  # fmt: skip
    assert applied is not None
    return applied


def only(applied: Applied) -> Outcome:
    (outcome,) = applied.outcomes
    return outcome


def codes(applied: Applied) -> dict[str, str]:
    return {outcome.command_id: outcome.code for outcome in applied.outcomes}


def nothing_changed(rig: Rig, before: bytes) -> bool:
    """Whether state and structure are those of ``before``, and training goes on."""
    same = rig.state.digest() == before
    rig.train(1)
    return same


def bare(kind: CommandType) -> Command:
    return Command(command_id="", command_type=kind)


def optimizer(group: str = "host", **values: float) -> Command:
    payload = OptimizerCommand(optimizer_id=group, hyperparameters=values)
    return Command(command_id="", command_type=CommandType.OPTIMIZER, payload=payload)


REFUSED: list[tuple[Command, str]] = [
    (bare(CommandType.EMERGENCY), "unsupported"),
    (bare(CommandType.STRUCTURAL_PRUNING), "unsupported"),
    (do.germinate("nowhere", "low_rank"), "unknown_seed"),
    (do.germinate("early", "skyscraper"), "unknown_blueprint"),
    (do.germinate("early", "conv_residual"), "shape"),
    *[
        (do.seed_command(op, "early", blueprint="low_rank"), "illegal_transition")
        for op in SeedOp
        if op != SeedOp.GERMINATE
    ],
    (do.scale_lr("seed/early", 0.5), "unknown_group"),
    (do.scale_lr("host", 1000.0), "lr_out_of_bounds"),
    (do.scale_lr("host", 0.0001), "lr_out_of_bounds"),
    (do.scale_lr("host", 0.0), "invalid_factor"),
    (do.scale_lr("host", -1.0), "invalid_factor"),
    (optimizer(colour=0.1), "unknown_parameter"),
    (optimizer(lr_scale=0.5, momentum=0.1), "unknown_parameter"),
    (optimizer(lr=1.0), "lr_out_of_bounds"),
    (optimizer(lr=0.1, lr_scale=2.0), "bad_parameter"),
    (optimizer(weight_decay=0.6), "out_of_bounds"),
    (optimizer(weight_decay=0.2), "rate_limited"),
    (optimizer(beta1=0.5), "rate_limited"),
    (optimizer(clip_norm=0.0), "out_of_bounds"),
    (optimizer(freeze=2.0), "bad_parameter"),
    (do.set_optimizer("seed/*", weight_decay=0.02), "unknown_group"),
    (do.undo("host"), "nothing_to_undo"),
    (optimizer(undo=1.0, freeze=1.0), "bad_parameter"),
]


@pytest.mark.parametrize(("command", "code"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_command_that_is_not_legal_is_refused_with_its_code_and_changes_nothing(
    rig: Rig, command: Command, code: str
) -> None:
    rig.train(1)
    before = rig.state.digest()
    outcome = only(carry_out(rig, signed(command)))
    assert (outcome.command_id, outcome.applied, outcome.code) == ("c0", False, code)
    assert outcome.command is not None
    assert outcome.reason
    assert nothing_changed(rig, before)


def damaged(**fields: int) -> bytes:
    wire = pb.AdaptationCommand.FromString(signed(do.germinate("early", "low_rank"))[0])
    for name, value in fields.items():
        setattr(wire, name, value)
    return wire.SerializeToString()


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (damaged(command_type=99), "enum"),
        (damaged(command_type=0), "enum"),
        (damaged(version=2), "version"),
        (damaged(command_type=int(CommandType.OPTIMIZER)), "payload"),
        (b"\xff\xff\xff", "parse"),
        (b"", "version"),
    ],
)
def test_an_unreadable_command_is_named_by_its_place_and_does_not_lose_the_others(
    rig: Rig, raw: bytes, code: str
) -> None:
    rig.state.boundary = 7
    applied = carry_out(rig, [raw, *signed(do.germinate("early", "low_rank"))])
    unreadable, good = applied.outcomes
    assert (unreadable.command_id, unreadable.command, unreadable.applied) == ("boundary-7-0", None, False)
    assert unreadable.code == code
    assert good.applied
    assert rig.state.kasmina.seeds["early"].stage == SeedStage.GERMINATED


def test_one_operation_on_a_slot_at_one_boundary(rig: Rig) -> None:
    rig.train(2)
    raw = signed(
        do.germinate("early", "low_rank"),
        do.start_training("early"),
        do.cull("early"),
        do.germinate("late", "low_rank"),
    )
    applied = carry_out(rig, raw)
    assert codes(applied) == {"c0": "applied", "c1": "one_per_boundary", "c2": "one_per_boundary", "c3": "applied"}
    assert {s.stage for s in rig.state.kasmina.seeds.values()} == {SeedStage.GERMINATED}


def test_a_refused_operation_leaves_its_slot_to_the_next(rig: Rig) -> None:
    applied = carry_out(rig, signed(do.cull("early"), do.germinate("early", "low_rank")))
    assert codes(applied) == {"c0": "illegal_transition", "c1": "applied"}


def test_the_parameters_of_one_boundary_count_together(tmp_path: Path) -> None:
    # A low_rank seed of 8 features has 56 parameters: one fits, two do not.
    with Rig.build(tmp_path, config=tiny_config(max_grown_parameters=60)) as rig:
        applied = carry_out(rig, signed(do.germinate("early", "low_rank"), do.germinate("late", "low_rank")))
        assert codes(applied) == {"c0": "applied", "c1": "g0_sanity"}
        assert rig.state.kasmina.grown_parameters == 56


def test_a_gate_that_does_not_pass_refuses_with_its_name_and_numbers(rig: Rig) -> None:
    rig.boundary(do.germinate("early", "low_rank"))
    outcome = only(rig.boundary(do.start_training("early")))
    assert (outcome.applied, outcome.code) == (False, "g1_gradient_health")
    assert "0 of 2 gradients of the host seen" in outcome.reason


@pytest.mark.parametrize("parameters", [{"blend_steps": 0.0}, {"blend_steps": 2.5}, {"blend_steps": 1e8}])
def test_the_length_of_a_graft_is_bounded(rig: Rig, parameters: dict[str, float]) -> None:
    rig.grow("early", SeedStage.TRAINING)
    command = do.seed_command(SeedOp.START_GRAFTING, "early", parameters=parameters)
    assert only(rig.boundary(command)).code == "bad_parameter"
    unknown = do.seed_command(SeedOp.START_GRAFTING, "early", parameters={"speed": 1.0})
    assert only(rig.boundary(unknown)).code == "unknown_parameter"


# Learning rate


def host_scale(rig: Rig) -> float:
    return rig.state.lr.lr_at("host", rig.state.step) / rig.config.optim.lr


def test_a_scale_is_bounded_over_all_commands_of_a_run(rig: Rig) -> None:
    for factor, code in [(5.0, "applied"), (2.0, "applied"), (1.1, "lr_out_of_bounds"), (0.1, "applied")]:
        assert only(rig.boundary(do.scale_lr("host", factor))).code == code
    assert host_scale(rig) == pytest.approx(1.0)
    for factor, code in [(0.1, "applied"), (0.1, "applied"), (0.5, "lr_out_of_bounds")]:
        assert only(rig.boundary(do.scale_lr("*", factor))).code == code
    assert host_scale(rig) == pytest.approx(0.01)


def test_one_scale_of_a_group_at_one_boundary(rig: Rig) -> None:
    raw = signed(do.germinate("early", "low_rank"), do.scale_lr("host", 5.0), do.scale_lr("host", 5.0))
    applied = carry_out(rig, raw)
    assert codes(applied) == {"c0": "applied", "c1": "applied", "c2": "one_per_boundary"}
    assert host_scale(rig) == pytest.approx(5.0)


def test_different_things_of_a_group_at_one_boundary_but_each_of_them_once(rig: Rig) -> None:
    raw = signed(
        do.set_lr("host", 0.01),
        do.set_optimizer("host", beta1=0.85),
        do.set_optimizer("*", beta2=0.99, weight_decay=0.02),
        do.scale_lr("host", 0.5),
        do.set_optimizer("host", clip_norm=0.5, beta1=0.95),
        do.freeze("host"),
        do.thaw("*"),
    )
    applied = carry_out(rig, raw)
    refused = {"c3": "one_per_boundary", "c4": "one_per_boundary", "c6": "one_per_boundary"}
    assert codes(applied) == {**dict.fromkeys(["c0", "c1", "c2", "c5"], "applied"), **refused}
    reasons = {outcome.command_id: outcome.reason for outcome in applied.outcomes}
    assert reasons["c3"] == "lr of host was commanded at this boundary already"
    (group,) = rig.state.optimizer.param_groups
    assert (group["betas"], group["weight_decay"], group["clip_norm"]) == ((0.85, 0.99), 0.02, 1.0)
    assert host_scale(rig) == 0.0  # frozen
    applied = carry_out(rig, signed(do.undo("host"), do.undo("host"), do.scale_lr("host", 0.5)))
    assert codes(applied) == {"c0": "applied", "c1": "one_per_boundary", "c2": "applied"}
    assert host_scale(rig) == pytest.approx(0.25)  # 0.01 of 0.02, halved; the freeze is taken back


@pytest.mark.parametrize("first", ["class", "settings"])
def test_another_optimizer_class_and_settings_of_the_present_one_are_not_for_one_boundary(rig: Rig, first: str) -> None:
    pair = [do.change_optimizer("sgd", lr=0.05), do.set_lr("host", 0.01)]
    applied = carry_out(rig, signed(*(pair if first == "class" else reversed(pair))))
    assert codes(applied) == {"c0": "applied", "c1": "one_per_boundary"}
    assert type(rig.state.optimizer).__name__ == ("SGD" if first == "class" else "AdamW")


def test_what_is_commanded_of_a_seed_that_is_culled_with_it_is_gone_with_it(rig: Rig) -> None:
    rig.grow("early", SeedStage.TRAINING)
    rig.boundary(do.scale_lr("seed/early", 0.5))
    applied = carry_out(rig, signed(do.cull("early"), do.set_optimizer("*", weight_decay=0.02), do.freeze("seed/*")))
    assert codes(applied) == {"c0": "applied", "c1": "applied", "c2": "applied"}
    assert [group["name"] for group in rig.state.optimizer.param_groups] == ["host"]
    rig.train(2)
    assert only(rig.boundary(do.undo())).applied
    assert rig.state.optimizer.param_groups[0]["weight_decay"] == rig.config.optim.weight_decay
    assert only(rig.boundary(do.undo())).code == "nothing_to_undo"


def test_a_tuning_that_another_rank_could_not_make_is_taken_back_everywhere(rig: Rig) -> None:
    rig.train(2)
    before = rig.state.digest()
    commands = signed(do.set_optimizer("host", lr=0.01, weight_decay=0.05, clip_norm=0.4), do.freeze("host"))
    applied = carry_out(rig, commands, peers=Dissenting(digest=2))
    assert codes(applied) == {"c0": "digest_mismatch", "c1": "digest_mismatch"}
    assert nothing_changed(rig, before)
    assert only(rig.boundary(do.undo())).code == "nothing_to_undo"


# Conservative mode


def test_conservative_mode_refuses_growth_and_faster_learning_but_not_slower(rig: Rig) -> None:
    rig.grow("late", SeedStage.TRAINING)
    rig.boundary(do.freeze("seed/late"))
    rig.state.mode = CONSERVATIVE
    commands = [do.germinate("early", "low_rank"), do.start_grafting("late"), do.cull("late"),
                do.scale_lr("host", 2.0), do.scale_lr("host", 0.5), do.thaw("*"), do.undo("seed/late"),
                do.set_lr("host", 0.03)]  # fmt: skip
    applied = carry_out(rig, signed(*commands))
    assert codes(applied) == {
        "c0": "conservative", "c1": "conservative", "c2": "conservative",
        "c3": "lr_increase_conservative", "c4": "applied", "c5": "thaw_conservative", "c6": "thaw_conservative",
        "c7": "lr_increase_conservative",
    }  # fmt: skip
    assert "policy: timeout" in applied.outcomes[0].reason
    assert {n: s.stage.name for n, s in rig.state.kasmina.seeds.items()} == {"early": "DORMANT", "late": "TRAINING"}
    assert host_scale(rig) == pytest.approx(0.5)


def test_conservative_mode_holds_alpha_while_training_goes_on(rig: Rig) -> None:
    rig.grow("early", SeedStage.TRAINING)
    assert only(rig.boundary(do.start_grafting("early"))).applied
    seed = rig.state.kasmina.seeds["early"]
    rig.train(1)
    held = float(seed.alpha)
    assert 0 < held < 1
    carry_out(rig, [], source="fallback")
    before = rig.state.tensors()["model/head.weight"].clone()
    rig.train(2)
    assert float(seed.alpha) == held
    assert not rig.state.tensors()["model/head.weight"].equal(before)
    carry_out(rig, signed(do.conservative(False)))
    rig.train(2)
    assert float(seed.alpha) == 1.0


def test_a_failed_answer_enters_conservative_mode_and_healthy_boundaries_leave_it(rig: Rig) -> None:
    applied = carry_out(rig, [], source="fallback")
    assert (applied.mode_before.name, rig.state.mode.name) == ("normal", "conservative")
    modes = []
    for _ in range(HEALTHY_BOUNDARIES):
        carry_out(rig, [])
        modes.append(rig.state.mode.name)
    assert modes == ["conservative"] * (HEALTHY_BOUNDARIES - 1) + ["normal"]


def test_a_breaker_command_opens_and_closes_conservative_mode(rig: Rig) -> None:
    outcome = only(carry_out(rig, signed(do.conservative(True, reason="a look at the data first"))))
    assert (outcome.applied, outcome.code) == (True, "applied")
    assert rig.state.mode == Mode(conservative=True, reason="command: a look at the data first", held=True)
    for _ in range(HEALTHY_BOUNDARIES + 1):
        assert only(carry_out(rig, signed(do.germinate("early", "low_rank")))).code == "conservative"
    assert only(carry_out(rig, signed(do.conservative(False)))).applied
    assert rig.state.mode == Mode()
    assert only(carry_out(rig, signed(do.germinate("early", "low_rank")))).applied


STRUCTURE_AND_SPEED = [
    do.scale_lr("host", 1.01), do.germinate("early", "low_rank"), do.set_optimizer("host", clip_norm=2.0),
    do.change_optimizer("sgd", lr=0.1),
]  # fmt: skip


@pytest.mark.parametrize("command", STRUCTURE_AND_SPEED, ids=["lr", "growth", "clip_norm", "class"])
@pytest.mark.parametrize("first", [True, False])
def test_a_reply_that_enters_conservative_mode_is_judged_by_it_in_any_order(
    rig: Rig, command: Command, first: bool
) -> None:
    pair = [do.conservative(True), command]
    found = codes(carry_out(rig, signed(*(pair if first else reversed(pair)))))
    assert found.pop("c0" if first else "c1") == "applied"
    (code,) = found.values()
    assert code.endswith("conservative")
    assert rig.state.mode.conservative


def test_a_reply_that_leaves_conservative_mode_is_still_judged_by_it(rig: Rig) -> None:
    rig.state.mode = CONSERVATIVE
    applied = carry_out(rig, signed(do.conservative(False), do.scale_lr("host", 2.0), do.cull("early")))
    assert codes(applied) == {"c0": "applied", "c1": "lr_increase_conservative", "c2": "conservative"}
    assert not rig.state.mode.conservative


def test_a_wish_for_conservative_mode_that_is_refused_judges_nothing(rig: Rig) -> None:
    wish = encode_command(with_identity(do.conservative(True), "c0", issued_by="test", issued_at_ns=1))
    applied = carry_out(rig, [*signed(do.scale_lr("host", 1.5)), wish])
    assert [outcome.code for outcome in applied.outcomes] == ["duplicate_id", "applied"]
    assert not rig.state.mode.conservative


# All ranks or none


OTHER, NONE = b"\1" * 32, bytes(32)


class Dissenting(Peers):
    """A world of one in which the n-th question to the others, from 1 on, is answered otherwise by some other rank."""

    def __init__(self, *, digest: int = 0, answer: bytes = OTHER, vote: int = 0) -> None:
        super().__init__(None, 0, 1)
        self.digest, self.answer, self.vote = digest, answer, vote
        self.digests = self.votes = 0

    def gather_digests(self, digest: bytes) -> list[bytes]:
        self.digests += 1
        return [digest, self.answer] if self.digests == self.digest else [digest]

    def agree(self, ok: bool) -> bool:
        self.votes += 1
        return ok and self.votes != self.vote


@pytest.mark.parametrize(
    ("peers", "code"),
    [
        (Dissenting(digest=1), "vote"),
        (Dissenting(digest=2, answer=NONE), "apply_failed"),
        (Dissenting(digest=2), "digest_mismatch"),
        (Dissenting(vote=1), "warm_up"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_when_one_rank_cannot_follow_every_rank_is_back_where_it_was(rig: Rig, peers: Dissenting, code: str) -> None:
    rig.grow("late", SeedStage.TRAINING)
    rig.boundary()
    optimizer_before, before = rig.state.optimizer, rig.state.digest()
    commands = [do.germinate("early", "low_rank"), do.start_grafting("late"), do.scale_lr("host", 0.5),
                do.conservative(False), bare(CommandType.EMERGENCY)]  # fmt: skip
    applied = carry_out(rig, signed(*commands), peers=peers)
    assert codes(applied) == {"c0": code, "c1": code, "c2": code, "c3": code, "c4": "unsupported"}
    assert not applied.structure_changed
    assert rig.state.optimizer is optimizer_before
    assert rig.state.mode == Mode()
    assert nothing_changed(rig, before)


def test_a_pause_is_taken_over_on_every_rank_and_not_when_the_decision_fails(rig: Rig) -> None:
    carry_out(rig, signed(do.pause(reason="look"), do.germinate("early", "low_rank")), broken=True)
    assert rig.state.hand.paused is None
    before = rig.state.digest()
    assert only(carry_out(rig, signed(do.pause(reason="look")))).applied
    assert rig.state.hand.paused == "look"
    assert rig.state.digest() == before  # standing still is no part of what is trained


def test_a_structure_that_does_not_run_is_taken_back(rig: Rig) -> None:
    before = rig.state.digest()
    applied = carry_out(rig, signed(do.germinate("early", "low_rank")), broken=True)
    assert only(applied).code == "warm_up"
    assert "no batch to be had" in only(applied).reason
    assert nothing_changed(rig, before)


def test_the_count_of_healthy_boundaries_goes_on_when_a_change_was_taken_back(rig: Rig) -> None:
    rig.state.mode = CONSERVATIVE
    carry_out(rig, signed(do.scale_lr("host", 0.5)), peers=Dissenting(vote=1))
    assert rig.state.mode == Mode(conservative=True, reason="policy: timeout", healthy=1)


class Moody(nn.Module):
    """A blueprint that is fine when it is looked at and fails when it is trained."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = nn.Linear(shape[-1], shape[-1])

    def forward(self, h: object) -> object:
        if self.layer.weight.requires_grad and getattr(h, "shape", (0,))[0] != 2:
            raise RuntimeError("not with this batch")
        return self.layer(h)


def test_a_blueprint_that_fails_in_training_is_refused_and_the_run_goes_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        blueprints._BLUEPRINTS, "moody", blueprints.Blueprint("moody", frozenset({1}), Moody, "for this test")
    )
    rig.train(2)
    assert only(rig.boundary(do.germinate("early", "moody"))).applied
    rig.train(2)
    before = rig.state.digest()
    outcome = only(carry_out(rig, signed(do.start_training("early"))))
    assert (outcome.applied, outcome.code) == (False, "warm_up")
    assert "not with this batch" in outcome.reason
    assert nothing_changed(rig, before)


def test_sixty_four_commands_are_each_answered(rig: Rig) -> None:
    applied = carry_out(rig, signed(*[bare(CommandType.EMERGENCY)] * 64))
    assert len(applied.outcomes) == 64
    assert {outcome.code for outcome in applied.outcomes} == {"unsupported"}


def test_a_second_command_of_one_id_is_refused_under_a_name_of_its_own(rig: Rig) -> None:
    twice = [*signed(do.scale_lr("host", 0.5)), *signed(do.scale_lr("host", 0.5))]
    applied = carry_out(rig, twice)
    assert codes(applied) == {"c0": "applied", f"boundary-{rig.state.boundary}-1": "duplicate_id"}
