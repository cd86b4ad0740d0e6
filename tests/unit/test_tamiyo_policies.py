"""The built-in policies, and how a policy is named, loaded and refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from tolaria.errors import ConfigError
from tolaria.leyline.codec import decode_command, encode_command
from tolaria.leyline.types import (
    BreakerCommand,
    CircuitState,
    Command,
    CommandType,
    HardwareContext,
    OptimizerCommand,
    RollbackCommand,
    SeedCommand,
    SeedOp,
    SeedStage,
    SeedState,
    SystemState,
)
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policies import check_policy, load_policy
from tolaria.tamiyo.policies.heuristic import HeuristicPolicy
from tolaria.tamiyo.policy import Policy, with_identity

STAGE_AFTER = {
    SeedOp.GERMINATE: SeedStage.GERMINATED,
    SeedOp.START_TRAINING: SeedStage.TRAINING,
    SeedOp.START_GRAFTING: SeedStage.BLENDING,
    SeedOp.STABILIZE: SeedStage.SHADOWING,
    SeedOp.EVALUATE: SeedStage.PROBATIONARY,
    SeedOp.FINE_TUNE: SeedStage.PROBATIONARY,
    SeedOp.FOSSILIZE: SeedStage.FOSSILIZED,
    SeedOp.CULL: SeedStage.CULLED,
}


def state(boundary: int = 1, loss: float = 1.0, seeds: tuple[SeedState, ...] = (), **metrics: float) -> SystemState:
    return SystemState(
        packet_id=f"p{boundary}", current_epoch=boundary, global_step=boundary * 10, validation_accuracy=0.5,
        validation_loss=loss, training_loss=loss, timestamp_ns=1, training_run_id="run", experiment_name="test",
        hardware=HardwareContext(device_type="cpu"), seeds=seeds,
        training_metrics={name.replace("__", "/"): value for name, value in metrics.items()},
    )  # fmt: skip


def slot(name: str, stage: SeedStage, *, norm: float = 0.0, **metrics: float) -> SeedState:
    return SeedState(seed_id=name, stage=stage, gradient_norm=norm, metrics=metrics)


def operations(commands: list[Command]) -> list[tuple[SeedOp, str]]:
    found = []
    for command in commands:
        assert isinstance(command.payload, SeedCommand)
        found.append((command.payload.operation, command.target_seed_id))
    return found


FREE = slot("mid", SeedStage.DORMANT)


def course(policy: HeuristicPolicy, losses: list[float], **metrics: float) -> list[list[Command]]:
    return [policy.decide(state(b, loss, (FREE,), **metrics), ()) for b, loss in enumerate(losses, start=1)]


def test_growth_waits_for_a_plateau() -> None:
    falling = course(HeuristicPolicy(patience=2, min_delta=0.01), [1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    assert falling == [[]] * 6
    stuck = course(HeuristicPolicy(patience=2, min_delta=0.01), [1.0, 0.9, 0.899, 0.898])
    assert [operations(commands) for commands in stuck] == [[], [], [], [(SeedOp.GERMINATE, "mid")]]
    assert stuck[-1][0].reason == "validation loss 0.898, 0.9 before: not 1.0% better in 2 boundaries"


def test_a_rising_loss_is_a_plateau_and_one_spike_of_a_falling_loss_is_none() -> None:
    assert operations(course(HeuristicPolicy(patience=2), [1.0, 1.1, 1.2])[-1]) == [(SeedOp.GERMINATE, "mid")]
    assert course(HeuristicPolicy(patience=2), [1.0, 0.9, 2.0, 0.8, 0.7])[-1] == []


def test_a_fresh_policy_decides_as_the_old_one_when_it_is_given_the_losses() -> None:
    losses = [1.0, 0.9, 0.899, 0.898]
    old = course(HeuristicPolicy(patience=2), losses)[-1]
    history = {f"loss_history__{back}": losses[-1 - back] for back in (1, 2, 3)}
    new = HeuristicPolicy(patience=2).decide(state(4, losses[-1], (FREE,), **history), ())
    assert old
    assert new == old
    assert HeuristicPolicy(patience=2).decide(state(4, losses[-1], (FREE,)), ()) == []


def test_a_low_loss_of_long_ago_does_not_make_a_plateau_of_a_falling_loss() -> None:
    assert course(HeuristicPolicy(patience=2), [0.1, 5.0, 4.0, 3.0, 2.0, 1.5])[-1] == []


def test_after_a_rollback_the_losses_of_the_new_course_count() -> None:
    policy = HeuristicPolicy(patience=2)
    course(policy, [1.0, 0.9, 0.5, 0.4])
    again = [policy.decide(state(b, loss, (FREE,)), ()) for b, loss in ((3, 0.9), (4, 0.9))]
    assert [operations(commands) for commands in again] == [[], [(SeedOp.GERMINATE, "mid")]]


@pytest.mark.parametrize(
    ("rank", "blueprint"), [(3.0, "conv_residual"), (2.0, "residual_mlp"), (1.0, "residual_mlp"), (4.0, "residual_mlp")]
)
def test_the_blueprint_fits_the_slot(rank: float, blueprint: str) -> None:
    [germination] = course(HeuristicPolicy(patience=1), [1.0, 1.0], slot_rank__mid=rank)[-1]
    assert isinstance(germination.payload, SeedCommand)
    assert germination.payload.blueprint_id == blueprint
    [chosen] = course(HeuristicPolicy(patience=1, blueprint="low_rank"), [1.0, 1.0], slot_rank__mid=rank)[-1]
    assert isinstance(chosen.payload, SeedCommand)
    assert chosen.payload.blueprint_id == "low_rank"


def test_nothing_grows_in_conservative_mode_or_too_late_to_be_judged() -> None:
    stuck = [1.0] * 6
    assert not any(course(HeuristicPolicy(), stuck, conservative=1.0))
    assert not any(course(HeuristicPolicy(), stuck, boundaries_left=4.0))
    assert any(course(HeuristicPolicy(), stuck, boundaries_left=40.0))


def test_a_kept_seed_is_given_time_before_the_next_one() -> None:
    def decide(boundaries: float) -> list[Command]:
        policy = HeuristicPolicy(patience=2)
        kept = slot("low", SeedStage.FOSSILIZED, boundaries_in_stage=boundaries)
        return [policy.decide(state(b, 1.0, (kept, FREE)), ()) for b in range(1, 6)][-1]

    assert decide(1) == []
    assert operations(decide(2)) == [(SeedOp.GERMINATE, "mid")]


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (slot("a", SeedStage.GERMINATED, gate_ok=0, boundaries_in_stage=1), None),
        (slot("a", SeedStage.GERMINATED, gate_ok=1, boundaries_in_stage=1), SeedOp.START_TRAINING),
        (slot("a", SeedStage.TRAINING, gate_ok=1, boundaries_in_stage=1), None),
        (slot("a", SeedStage.TRAINING, gate_ok=1, boundaries_in_stage=2), SeedOp.START_GRAFTING),
        (slot("a", SeedStage.TRAINING, gate_ok=0, boundaries_in_stage=5), None),
        (slot("a", SeedStage.TRAINING, gate_ok=0, boundaries_in_stage=8), SeedOp.CULL),
        (slot("a", SeedStage.BLENDING, gate_ok=0, alpha=0.99, boundaries_in_stage=50), None),
        (slot("a", SeedStage.BLENDING, gate_ok=1, alpha=1, boundaries_in_stage=3), SeedOp.STABILIZE),
        (slot("a", SeedStage.BLENDING, gate_ok=0, alpha=1, boundaries_in_stage=3), None),
        (slot("a", SeedStage.BLENDING, gate_ok=0, alpha=1, boundaries_in_stage=6), SeedOp.CULL),
        (slot("a", SeedStage.SHADOWING, gate_ok=1), SeedOp.EVALUATE),
        (slot("a", SeedStage.SHADOWING, gate_ok=0, boundaries_in_stage=6), SeedOp.CULL),
        (slot("a", SeedStage.PROBATIONARY, gate_ok=0), None),
        (slot("a", SeedStage.PROBATIONARY, gate_ok=1, contribution=0.02), SeedOp.FOSSILIZE),
        (slot("a", SeedStage.PROBATIONARY, gate_ok=0, contribution=0.02), None),
        (slot("a", SeedStage.PROBATIONARY, gate_ok=1, contribution=0.009), SeedOp.CULL),
        (slot("a", SeedStage.PROBATIONARY, gate_ok=0, contribution=-1), SeedOp.CULL),
        (slot("a", SeedStage.PROBATIONARY, gate_ok=0, boundaries_in_stage=6), SeedOp.CULL),
    ],
)
def test_each_stage_moves_on_when_its_gate_would_pass(seed: SeedState, expected: SeedOp | None) -> None:
    commands = HeuristicPolicy(min_contribution=0.01).decide(state(9, 1.0, (seed, FREE)), ())
    assert operations(commands) == ([] if expected is None else [(expected, "a")])
    assert all(any(c.isdigit() for c in command.reason) for command in commands)


def test_a_probationary_seed_is_fine_tuned_once_when_asked_for() -> None:
    policy = HeuristicPolicy(fine_tune_boundaries=2)

    def decide(boundaries: float, norm: float) -> list[tuple[SeedOp, str]]:
        seed = slot("a", SeedStage.PROBATIONARY, norm=norm, gate_ok=1, contribution=0.1, boundaries_in_stage=boundaries)
        return operations(policy.decide(state(9, 1.0, (seed,)), ()))

    assert decide(0, 0.0) == [(SeedOp.FINE_TUNE, "a")]
    assert decide(1, 0.5) == []
    assert decide(2, 0.5) == [(SeedOp.FOSSILIZE, "a")]


@pytest.mark.parametrize(("contribution", "end"), [(0.3, SeedStage.FOSSILIZED), (-0.3, SeedStage.CULLED)])
def test_one_seed_goes_all_the_way(contribution: float, end: SeedStage) -> None:
    policy = HeuristicPolicy(patience=2, train_boundaries=2)
    seed, stages = FREE, [SeedStage.DORMANT]
    for boundary in range(1, 20):
        commands = policy.decide(state(boundary, 1.0, (seed,)), ())
        assert len(commands) <= 1
        stage, waited = seed.stage, seed.metrics.get("boundaries_in_stage", 0) + 1
        for operation, name in operations(commands):
            assert name == "mid"
            stage, waited = STAGE_AFTER[operation], 0
            stages.append(stage)
        if stage in (SeedStage.FOSSILIZED, SeedStage.CULLED):
            break
        seed = slot("mid", stage, gate_ok=1, alpha=1, contribution=contribution, boundaries_in_stage=waited)
    assert stages == [*list(SeedStage)[:6], end]


@pytest.mark.parametrize("args", [{"patience": 0}, {"patience": 1.5}, {"min_delta": 1.0}, {"train_boundaries": True}])
def test_bad_settings_of_the_heuristic_are_named(args: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(args))):
        load_policy("heuristic", args)


SCRIPT = """
version = "rehearsal-1"

[[command]]
boundary = 3
op = "germinate"
slot = "mid"
blueprint = "residual_mlp"
reason = "third boundary"

[[command]]
boundary = 3
op = "scale_lr"
group = "host*"
factor = 0.5

[[command]]
boundary = 4
op = "cull"
slot = "mid"

[[command]]
boundary = 4
op = "start_grafting"
slot = "top"
blend_steps = 40

[[command]]
boundary = 5
op = "rollback"

[[command]]
boundary = 6
op = "rollback"
step = 40

[[command]]
boundary = 7
op = "conservative"
on = true

[[command]]
boundary = 8
op = "pause"
"""


def test_a_script_gives_each_command_at_its_boundary_and_only_then(tmp_path: Path) -> None:
    file = tmp_path / "script.toml"
    file.write_text(SCRIPT)
    policy = load_policy(f"script:{file}", {})
    assert policy.version == "rehearsal-1"
    # The number of the boundary, which the server adds, counts; the epoch does not.
    states = {b: replace(state(77), training_metrics={"boundary": float(b)}) for b in range(1, 10)}
    played = {b: policy.decide(at, ()) for b, at in states.items()}
    assert [b for b, commands in played.items() if commands] == [3, 4, 5, 6, 7, 8]
    germinate, scale = played[3]
    assert germinate.target_seed_id == "mid"
    assert germinate.reason == "third boundary"
    assert germinate.payload == SeedCommand(operation=SeedOp.GERMINATE, blueprint_id="residual_mlp")
    assert scale.payload == OptimizerCommand(optimizer_id="host*", hyperparameters={"lr_scale": 0.5})
    assert played[4][0].payload == SeedCommand(operation=SeedOp.CULL)
    assert played[4][1].payload == SeedCommand(operation=SeedOp.START_GRAFTING, parameters={"blend_steps": 40.0})
    assert played[5][0].payload == RollbackCommand(target="good", step=-1, reason="script")
    assert played[6][0].payload == RollbackCommand(target="step", step=40, reason="script")
    assert played[7][0].payload == BreakerCommand(desired_state=CircuitState.OPEN, rationale="script")
    assert played[8][0].command_type == CommandType.PAUSE
    for commands in played.values():
        for command in commands:
            sent = with_identity(command, "id", issued_by="x", issued_at_ns=1)
            assert decode_command(encode_command(sent)) == sent


@pytest.mark.parametrize(
    ("keys", "group", "hyperparameters"),
    [
        ('op = "set_lr"\ngroup = "host"\nlr = 0.25', "host", {"lr": 0.25}),
        ('op = "freeze"\ngroup = "seed/*"', "seed/*", {"freeze": 1.0}),
        ('op = "thaw"\ngroup = "seed/*"', "seed/*", {"freeze": 0.0}),
        ('op = "undo"\ngroup = "*"', "*", {"undo": 1.0}),
        ('op = "set_optimizer"\ngroup = "host"\nweight_decay = 0\nbeta1 = 0.5\nfreeze = 1', "host",
         {"weight_decay": 0.0, "beta1": 0.5, "freeze": 1.0}),
    ],
)  # fmt: skip
def test_a_script_tunes_the_optimizer(keys: str, group: str, hyperparameters: dict[str, float], tmp_path: Path) -> None:
    file = tmp_path / "script.toml"
    file.write_text(f"[[command]]\nboundary = 1\n{keys}\n")
    (command,) = load_policy(f"script:{file}", {}).decide(state(1), ())
    assert command.payload == OptimizerCommand(optimizer_id=group, hyperparameters=hyperparameters)


def test_a_hyperparameter_that_no_optimizer_has_is_named_to_the_policys_author() -> None:
    with pytest.raises(ValueError, match=r"\['colour'\]: expected one or more of lr, lr_scale"):
        do.set_optimizer("host", colour=1.0)
    with pytest.raises(ValueError, match="expected one or more"):
        do.set_optimizer("host")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not toml", "not TOML"),
        ("title = 1", "title"),
        ("command = 3", "only version and"),
        ("command = [3]", "command 1: op=None"),
        ('[[command]]\nboundary = 1\nop = "grow"', "op='grow'"),
        ('[[command]]\nboundary = 1\nop = "cull"', "slot missing"),
        ('[[command]]\nop = "pause"', "boundary missing"),
        ('[[command]]\nboundary = "1"\nop = "pause"', "boundary='1'"),
        ('[[command]]\nboundary = true\nop = "pause"', "boundary=True"),
        ('[[command]]\nboundary = 1\nop = "pause"\nslot = "a"', "unknown key 'slot'"),
        ('[[command]]\nboundary = 1\nop = "cull"\nslot = "a b"', "target_seed_id"),
        ('[[command]]\nboundary = 1\nop = "scale_lr"\ngroup = "host"\nfactor = nan', "lr_scale"),
        ('[[command]]\nboundary = 1\nop = "set_lr"\ngroup = "host"', "lr missing"),
        ('[[command]]\nboundary = 1\nop = "set_optimizer"\ngroup = "host"', "one or more of lr, lr_scale, freeze"),
        ('[[command]]\nboundary = 1\nop = "set_optimizer"\ngroup = "host"\nlr = "1"', "lr='1'"),
        ('[[command]]\nboundary = 1\nop = "set_optimizer"\ngroup = "host"\nundo = 1', "unknown key 'undo'"),
        ('[[command]]\nboundary = 1\nop = "freeze"', "group missing"),
        ('[[command]]\nboundary = 1\nop = "undo"\ngroup = "a b"', "optimizer_id"),
        ('[[command]]\nboundary = 1\nop = "start_grafting"\nslot = "a"\nblend_steps = "9"', "blend_steps='9'"),
        ('[[command]]\nboundary = 1\nop = "cull"\nslot = "a"\nblend_steps = 9', "unknown key 'blend_steps'"),
    ],
)
def test_a_bad_script_is_refused_at_once_with_file_and_fault(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "script.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        check_policy(f"script:{file}", {})
    assert str(file) in str(caught.value)


def test_a_missing_script_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.toml: cannot be read"):
        check_policy(f"script:{tmp_path}/missing.toml", {})


USER_CODE = """
from tolaria.tamiyo.policy import Policy, cull

class Mine(Policy):
    version = "mine-3"
    def __init__(self, slot, often=2):
        self.slot = slot
    def decide(self, state, reports):
        return [cull(self.slot)]

class Plain:
    def decide(self, state, reports):
        return []

class Broken:
    def __init__(self):
        raise RuntimeError("no weights")

class NotAPolicy:
    pass

number = 7
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"user_policies_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(USER_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_users_class_is_loaded_with_its_arguments(user_module: str) -> None:
    policy = load_policy(f"{user_module}:Mine", {"slot": "low"})
    assert policy.version == "mine-3"
    assert operations(policy.decide(state(), ())) == [(SeedOp.CULL, "low")]


def test_a_users_class_needs_no_base_class_and_no_version(user_module: str) -> None:
    policy = load_policy(f"{user_module}:Plain", {})
    assert isinstance(policy, Policy)
    assert policy.version == f"{user_module}:Plain"
    assert policy.decide(state(), ()) == []


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("Missing", {}, "has no 'Missing'"),
        ("Mine", {}, r"missing a required argument: 'slot'.*accepted: \(slot, often=2\)"),
        ("Mine", {"slot": "a", "speed": 1}, "unexpected keyword argument 'speed'"),
        ("Broken", {}, "raised RuntimeError: no weights"),
        ("NotAPolicy", {}, "no method decide"),
        ("number", {}, "expected a class, found int"),
    ],
)
def test_a_users_class_that_cannot_work_is_refused(
    name: str, args: dict[str, object], said: str, user_module: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        load_policy(f"{user_module}:{name}", args)


@pytest.mark.parametrize("spec", ["", "heuristics", "none", "a.b", ":C", "a:", "a b:C", "a..b:C", "a:C.d"])
def test_other_names_are_refused_with_what_is_accepted(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"expected heuristic, noop, script:FILE or package\.module:Class"):
        check_policy(spec, {})


def test_a_module_that_cannot_be_imported_is_named() -> None:
    check_policy("no_such_package.policies:Mine", {})
    with pytest.raises(ConfigError, match=r"cannot import no_such_package\.policies"):
        load_policy("no_such_package.policies:Mine", {})


def test_noop_asks_for_nothing() -> None:
    policy = load_policy("noop", {})
    assert policy.decide(state(seeds=(replace(FREE, stage=SeedStage.TRAINING),)), ()) == []
    with pytest.raises(ConfigError, match="unexpected keyword argument 'x'"):
        load_policy("noop", {"x": 1})
