import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tolaria.errors import TaskError
from tolaria.kasmina.blueprints import get_blueprint
from tolaria.task import Task, load_task
from tolaria.tasks import digits, stdlib_gpt

SMALL_GPT = {"layers": 2, "features": 16, "heads": 2, "context": 16, "max_train_bytes": 20_000,
             "max_validation_bytes": 3_000}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits_task() -> Task:
    return load_task("tolaria.tasks.digits:make_task", {}, seed=0)


@pytest.fixture(scope="module")
def gpt_task() -> Task:
    return load_task("tolaria.tasks.stdlib_gpt:make_task", SMALL_GPT, seed=0)


@pytest.fixture(params=["digits_task", "gpt_task"])
def task(request: pytest.FixtureRequest) -> Task:
    found: Task = request.getfixturevalue(request.param)
    return found


def batch(dataset: Any, indices: list[int]) -> tuple[Tensor, Tensor]:
    inputs, targets = dataset.__getitems__(indices)
    return inputs, targets


def slot_shapes(task: Task) -> dict[str, tuple[int, ...]]:
    """Per-sample shape of the output of each slot's module."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Any:
        return lambda module, args, output: shapes.update({name: tuple(output.shape[1:])})

    handles = [task.model.get_submodule(path).register_forward_hook(note(name)) for name, path in task.slots.items()]
    task.model(batch(task.train, [0, 1])[0])
    for handle in handles:
        handle.remove()
    return shapes


def test_a_batch_is_the_stacked_items(task: Task) -> None:
    inputs, targets = task.collate(batch(task.train, [5, 0, 3]))
    items = [task.train[index] for index in (5, 0, 3)]
    assert torch.equal(inputs, torch.stack([item[0] for item in items]))
    assert torch.equal(targets, torch.stack([item[1] for item in items]))


def test_loss_and_metrics_are_per_sample_and_agree_with_the_model(task: Task) -> None:
    inputs, targets = batch(task.validation, [0, 1, 2])
    logits = task.model(inputs)
    loss = task.loss(logits, targets)
    assert loss.shape[0] == 3
    assert loss.dtype == torch.float32
    expected = -logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(loss, expected)
    perfect = nn.functional.one_hot(targets, logits.shape[-1]).float()
    assert task.accuracy(perfect, targets).min() == 1
    assert task.accuracy(-perfect, targets).max() == 0
    for metric in (task.accuracy, *task.metrics.values()):
        assert metric(logits, targets).shape == loss.shape
    assert task.loss(logits.bfloat16(), targets).dtype == torch.float32


def test_slots_are_places_where_blueprints_fit(task: Task) -> None:
    shapes = slot_shapes(task)
    assert set(shapes) == set(task.slots)
    assert len(shapes) >= 2
    for shape in shapes.values():
        name = "conv_residual" if len(shape) == 3 else "residual_mlp"
        blueprint = get_blueprint(name)
        assert len(shape) in blueprint.ranks
        assert blueprint.build(shape)(torch.zeros(2, *shape)).shape == (2, *shape)


def test_the_model_follows_from_the_seed_and_the_data_do_not() -> None:
    first, again, other = (load_task("tolaria.tasks.digits:make_task", {}, seed=s) for s in (1, 1, 2))
    weights = [torch.cat([p.flatten() for p in t.model.parameters()]) for t in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(batch(first.train, [0, 1])[0], batch(other.train, [0, 1])[0])


def test_a_few_steps_lower_the_loss(task: Task) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=0.02)
    inputs, targets = batch(task.train, list(range(64)))
    losses = []
    for _ in range(40):
        loss = task.loss(task.model(inputs), targets).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_digits_are_split_without_overlap_and_in_equal_shares(digits_task: Task) -> None:
    train, validation = digits.load_split()
    assert (len(train), len(validation)) == (1347, 450)
    seen = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in seen for image in validation.images)
    shares = [torch.bincount(part.labels, minlength=10) / len(part) for part in (train, validation)]
    torch.testing.assert_close(shares[0], shares[1], atol=0.005, rtol=0)
    assert abs(float(train.images.mean())) < 0.05
    assert float(train.images.std()) == pytest.approx(1.0, abs=0.05)


def test_digits_width_is_the_number_of_channels() -> None:
    assert slot_shapes(digits.make_task(width=5)) == {"early": (5, 4, 4), "late": (5, 4, 4)}
    with pytest.raises(TaskError, match="width=0"):
        digits.make_task(width=0)


def test_gpt_never_looks_ahead(gpt_task: Task) -> None:
    inputs, _ = batch(gpt_task.train, [0])
    changed = inputs.clone()
    changed[:, 8:] = 65
    assert not torch.equal(changed, inputs)
    torch.testing.assert_close(gpt_task.model(inputs)[:, :8], gpt_task.model(changed)[:, :8])


def test_gpt_starts_at_the_loss_of_a_guess(gpt_task: Task) -> None:
    task = load_task("tolaria.tasks.stdlib_gpt:make_task", SMALL_GPT, seed=3)
    inputs, targets = batch(task.train, list(range(8)))
    logits = task.model(inputs)
    assert task.loss(logits, targets).mean().item() == pytest.approx(math.log(256), abs=0.1)
    bits = task.metrics["bits_per_byte"](logits, targets)
    torch.testing.assert_close(bits, task.loss(logits, targets) / math.log(2))


def test_windows_cover_the_text_once_and_targets_are_the_next_bytes() -> None:
    windows = stdlib_gpt.Windows(b"abcdefghijk", context=3)
    assert len(windows) == 3
    inputs, targets = batch(windows, [0, 1, 2])
    assert bytes(inputs.flatten().tolist()) == b"abcdefghi"
    assert bytes(targets.flatten().tolist()) == b"bcdefghij"
    with pytest.raises(TaskError, match="context=11"):
        stdlib_gpt.Windows(b"abcdefghijk", context=11)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for number in range(40):
        folder = tmp_path / ("package" if number % 2 else ".")
        folder.mkdir(exist_ok=True)
        (folder / f"module{number}.py").write_text(f"<{number}>" * 10)
    for skipped in ("site-packages", "test", "__pycache__"):
        (tmp_path / skipped).mkdir()
        (tmp_path / skipped / "module.py").write_text("skipped")
    (tmp_path / "notes.txt").write_text("skipped")
    return tmp_path


def test_files_are_the_library_s_own_in_an_order_of_their_names_alone(library: Path) -> None:
    files = [path.relative_to(library).as_posix() for path in stdlib_gpt.source_files(library)]
    assert len(files) == 40
    assert files != sorted(files)
    assert not any("site-packages" in name or "test" in name for name in files)
    moved = library.rename(library.with_name("elsewhere"))
    assert [path.relative_to(moved).as_posix() for path in stdlib_gpt.source_files(moved)] == files


def test_validation_text_comes_from_files_of_its_own(library: Path) -> None:
    train, validation = stdlib_gpt.load_text(library, 10**6, 10**6)
    assert b"skipped" not in train + validation
    numbers = [set(text.replace(b"\n", b"").strip(b"<>").split(b"><")) for text in (train, validation)]
    assert (len(numbers[0]), len(numbers[1])) == (36, 4)
    assert not numbers[0] & numbers[1]


def test_text_is_cut_at_its_limits(library: Path) -> None:
    train, validation = stdlib_gpt.load_text(library, 100, 50)
    assert (len(train), len(validation)) == (100, 50)
    whole = stdlib_gpt.load_text(library, 10**6, 10**6)
    assert whole[0].startswith(train)
    assert whole[1].startswith(validation)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"layers": 1}, "layers=1"), ({"features": 10, "heads": 4}, "features=10"), ({"context": 0}, "context=0"),
        ({"heads": 0}, "heads=0"),
    ],
)  # fmt: skip
def test_gpt_sizes_that_do_not_fit_are_named(args: dict[str, int], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        stdlib_gpt.make_task(**{**SMALL_GPT, **args})
