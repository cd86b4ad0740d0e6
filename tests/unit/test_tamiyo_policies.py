"""The built-in policies, and how a policy is named, loaded and refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.packets import operations, slot, state
from tolaria.errors import ConfigError
from tolaria.leyline.codec import decode_command, encode_command
from tolaria.leyline.types import (
    BreakerCommand,
    CircuitState,
    CommandType,
    OptimizerCommand,
    RollbackCommand,
    SeedCommand,
    SeedOp,
    SeedStage,
)
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policies import check_policy, load_policy
from tolaria.tamiyo.policy import Policy, with_identity

FREE = slot("mid", SeedStage.DORMANT)

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
