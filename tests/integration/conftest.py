"""What several modules of these tests look at."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.afterwards import Steered, steered_run


@pytest.fixture(scope="session")
def steered() -> Iterator[Steered]:
    """A run that a policy and a person have steered, ended; whoever changes it takes a copy."""
    folder = Path(tempfile.mkdtemp(prefix="tl-"))
    yield steered_run(folder)
    shutil.rmtree(folder)
