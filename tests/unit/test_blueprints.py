import pytest
import torch
from torch import Tensor, nn

from tolaria.errors import CommandRefused
from tolaria.kasmina import blueprints
from tolaria.kasmina.blueprints import blueprint_names, get_blueprint, register_blueprint

SHAPES = {1: (12,), 2: (7, 12), 3: (4, 5, 6)}
BUILT_IN = ("bottleneck_attention", "conv_residual", "identity", "low_rank", "residual_mlp")
CASES = [(name, SHAPES[rank]) for name in BUILT_IN for rank in sorted(get_blueprint(name).ranks)]


@pytest.fixture(autouse=True)
def registry_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blueprints, "_BLUEPRINTS", dict(blueprints._BLUEPRINTS))
    torch.manual_seed(0)


def batch_of(shape: tuple[int, ...], batch: int = 3) -> Tensor:
    return torch.randn(batch, *shape)


def wake(seed: nn.Module) -> None:
    """Give the zero-initialised layers weights, so that the output says something."""
    for parameter in seed.parameters():
        nn.init.normal_(parameter, std=0.5)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_a_new_seed_changes_nothing_and_can_learn(name: str, shape: tuple[int, ...]) -> None:
    seed = get_blueprint(name).build(shape)
    h = batch_of(shape)
    out = seed(h)
    assert out.shape == h.shape
    assert torch.count_nonzero(out) == 0
    (out * torch.randn_like(out)).sum().backward()
    gradients = [p.grad for p in seed.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert any(g is not None and g.norm() > 0 for g in gradients)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_after_one_step_every_parameter_learns(name: str, shape: tuple[int, ...]) -> None:
    seed = get_blueprint(name).build(shape)
    optimizer = torch.optim.SGD(seed.parameters(), lr=0.1)
    h, target = batch_of(shape), torch.randn(3, *shape)
    for _ in range(2):
        optimizer.zero_grad()
        (h + seed(h) - target).square().mean().backward()
        optimizer.step()
    still = [name for name, p in seed.named_parameters() if p.grad is None or p.grad.norm() == 0]
    assert still == []


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_samples_do_not_see_each_other_and_any_batch_size_fits(name: str, shape: tuple[int, ...]) -> None:
    seed = get_blueprint(name).build(shape)
    wake(seed)
    h = batch_of(shape, batch=4)
    whole = seed(h)
    assert torch.count_nonzero(whole) > 0
    for index in range(4):
        torch.testing.assert_close(seed(h[index : index + 1])[0], whole[index])


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_bf16_autocast_keeps_the_shape_and_is_finite(name: str, shape: tuple[int, ...]) -> None:
    seed = get_blueprint(name).build(shape)
    wake(seed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            out = seed(batch_of(shape).to(dtype))
            assert out.shape == (3, *shape)
            assert out.isfinite().all()


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_weights_follow_from_the_generator_alone(name: str, shape: tuple[int, ...]) -> None:
    built = []
    for _ in range(2):
        torch.manual_seed(7)
        built.append(get_blueprint(name).build(shape).state_dict())
    assert built[0].keys() == built[1].keys()
    assert all(torch.equal(built[0][key], built[1][key]) for key in built[0])


@pytest.mark.parametrize("name", ["bottleneck_attention", "low_rank", "residual_mlp", "identity"])
def test_over_sequences_no_seed_looks_ahead(name: str) -> None:
    seed = get_blueprint(name).build((7, 32))
    wake(seed)
    h = batch_of((7, 32))
    changed = h.clone()
    changed[:, 4:] += 1.0
    torch.testing.assert_close(seed(changed)[:, :4], seed(h)[:, :4])
    assert not torch.allclose(seed(changed)[:, 4:], seed(h)[:, 4:])


def test_attention_looks_back_over_sequences_and_everywhere_over_images() -> None:
    sequence = get_blueprint("bottleneck_attention").build((7, 32))
    wake(sequence)
    h = batch_of((7, 32))
    changed = h.clone()
    changed[:, 0] += torch.randn(32)
    assert not torch.allclose(sequence(changed)[:, 6], sequence(h)[:, 6])
    image = get_blueprint("bottleneck_attention").build((32, 3, 3))
    wake(image)
    h = batch_of((32, 3, 3))
    changed = h.clone()
    changed[:, :, 2, 2] += torch.randn(32)
    assert not torch.allclose(image(changed)[:, :, 0, 0], image(h)[:, :, 0, 0])


def test_identity_scales_channels_of_images_and_features_of_tokens() -> None:
    image = get_blueprint("identity").build((2, 3, 3))
    (scale,) = image.parameters()
    with torch.no_grad():
        scale.copy_(torch.tensor([2.0, -1.0]).view(2, 1, 1))
    h = batch_of((2, 3, 3))
    assert torch.equal(image(h)[:, 0], 2 * h[:, 0])
    assert torch.equal(image(h)[:, 1], -h[:, 1])
    assert sum(p.numel() for p in get_blueprint("identity").build((7, 12)).parameters()) == 12


@pytest.mark.parametrize(("shape", "kind"), [((1,), 1), ((5, 1), 2), ((1, 2, 2), 3), ((1, 1, 1), 3)])
def test_the_smallest_shapes_can_be_built(shape: tuple[int, ...], kind: int) -> None:
    for name in BUILT_IN:
        blueprint = get_blueprint(name)
        if kind in blueprint.ranks:
            assert blueprint.build(shape)(batch_of(shape)).shape == (3, *shape)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(CommandRefused, match=r"'nonsense'.*conv_residual.*residual_mlp") as refused:
        get_blueprint("nonsense")
    assert refused.value.code == "unknown_blueprint"


def test_own_blueprints_can_be_registered() -> None:
    def build(shape: tuple[int, ...]) -> nn.Module:
        return nn.Linear(shape[-1], shape[-1])

    register_blueprint("mine.v1", build, ranks={1, 2}, summary="one linear layer")
    register_blueprint("mine.v1", build, ranks={1, 2})
    found = get_blueprint("mine.v1")
    assert found.build is build
    assert found.ranks == {1, 2}
    assert "mine.v1" in blueprint_names()
    assert blueprint_names() == tuple(sorted(blueprint_names()))


@pytest.mark.parametrize("name", ["", "a b", "-x", "x" * 65, "é", "a\n"])
def test_malformed_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="1 to 64"):
        register_blueprint(name, nn.Linear, ranks={1})  # type: ignore[arg-type]


def test_a_name_that_is_taken_and_ranks_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"identity.*registered already"):
        register_blueprint("identity", lambda shape: nn.Identity())
    for ranks in ((), (0,), (-1, 2)):
        with pytest.raises(ValueError, match="from 1 on"):
            register_blueprint("fresh", lambda shape: nn.Identity(), ranks=ranks)
    assert get_blueprint("identity").build is blueprints.ChannelScale
