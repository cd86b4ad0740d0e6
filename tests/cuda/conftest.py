"""Tests that need a CUDA device: `pytest -m cuda` runs them all; without a device each is skipped and says so."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tolaria.dist import Peers, World

DEVICE = torch.device("cuda", 0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is marked and, without a device, skipped."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


@pytest.fixture
def gpu() -> Iterator[World]:
    """A world of one process on the first GPU."""
    torch.cuda.set_device(DEVICE)
    peers = Peers(None, 0, 1)
    yield World(
        global_rank=0, local_rank=0, world_size=1, device=DEVICE, generation=secrets.token_hex(8), peers=peers,
        background=peers, data_group=None,
    )  # fmt: skip
    torch.cuda.synchronize()
