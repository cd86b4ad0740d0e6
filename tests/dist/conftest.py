"""Ranks shared by the tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.ranks import RankPool


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    """Two real ranks (gloo) that stay alive for the session."""
    with RankPool(2) as pool:
        yield pool
