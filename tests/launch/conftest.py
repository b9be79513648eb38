"""A fake world of two nodes."""

from pathlib import Path

import pytest
from fake_nodes import Fake


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)
