"""Hashes of tensors: what they notice, and that they are the same wherever and however a tensor lies."""

import random

import pytest
import torch
from torch import Tensor

from tolaria.compare import tensor_hash, tensor_hashes

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)
SIZES = (1, 7, 8192, 8193, 65536, 65537, 200_000)


def random_tensor(dtype: torch.dtype, size: int) -> Tensor:
    return (torch.randn(size, generator=torch.Generator().manual_seed(size)) * 3).to(dtype)


def flipped(tensor: Tensor, *places: tuple[int, int]) -> Tensor:
    """A copy with these bits flipped: (byte, bit) each."""
    copy = tensor.clone()
    raw = copy.view(-1).view(torch.uint8)
    for byte, bit in places:
        raw[byte] ^= 1 << bit
    return copy


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_flipped_bit_changes_the_hash(dtype: torch.dtype, size: int) -> None:
    tensor = random_tensor(dtype, size)
    value, chance = tensor_hash(tensor), random.Random(size)
    bits = 1 if dtype == torch.bool else 8
    places = [(chance.randrange(tensor.nbytes), chance.randrange(bits)) for _ in range(40)]
    places += [(0, 0), (tensor.nbytes - 1, bits - 1)]
    assert [place for place in places if tensor_hash(flipped(tensor, place)) == value] == []


@pytest.mark.parametrize("bit", range(8))
def test_the_same_bit_flipped_in_two_elements_is_noticed(bit: int) -> None:
    # An exclusive or over the elements takes the two for none; the last byte of a float holds its sign.
    tensor = random_tensor(torch.float32, 100_000)
    value, chance = tensor_hash(tensor), random.Random(bit)
    for byte in range(4):
        for _ in range(10):
            one, two = chance.sample(range(100_000), 2)
            assert tensor_hash(flipped(tensor, (4 * one + byte, bit), (4 * two + byte, bit))) != value


@pytest.mark.parametrize("size", [64, 70_000])
def test_elements_in_another_order_are_noticed(size: int) -> None:
    tensor = torch.arange(size, dtype=torch.float32)
    seen = {tensor_hash(t) for t in (tensor, tensor.flip(0), tensor.roll(1), tensor.roll(size // 2), -tensor)}
    assert len(seen) == 5
    half = size // 2
    assert tensor_hash(torch.cat([tensor[half:], tensor[:half]])) != tensor_hash(tensor)


def test_rows_of_the_sums_in_another_order_are_noticed() -> None:
    rows = random_tensor(torch.float32, 4 * 65536).view(4, -1)
    assert tensor_hash(rows[[1, 0, 2, 3]]) != tensor_hash(rows)


def test_one_nan_is_told_from_another() -> None:
    quiet = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert tensor_hash(quiet[:1]) != tensor_hash(quiet[1:])
    assert tensor_hash(torch.tensor(0.0)) != tensor_hash(torch.tensor(-0.0))


def test_the_hash_of_a_tensor_depends_neither_on_the_others_nor_on_how_it_lies_in_memory() -> None:
    tensors = {str(at): random_tensor(dtype, size) for at, dtype in enumerate(TYPES) for size in SIZES}
    tensors |= {f"n{size}": random_tensor(torch.float32, size) for size in SIZES} | {"none": torch.empty(0, 3)}
    together = tensor_hashes(tensors)
    assert list(together) == list(tensors)
    assert together == {name: tensor_hash(tensor) for name, tensor in reversed(tensors.items())}
    picture = torch.randn(4, 3, 5, 7)
    assert tensor_hash(picture.to(memory_format=torch.channels_last)) == tensor_hash(picture)
    assert tensor_hash(picture.transpose(0, 1)) != tensor_hash(picture)


def test_no_tensors_have_no_hashes() -> None:
    assert tensor_hashes({}) == {}
    assert tensor_hash(torch.empty(0)) == 0
