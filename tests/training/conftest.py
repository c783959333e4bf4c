"""What all tests of this folder share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _imported_objects_are_not_collected() -> Iterator[None]:
    """Every training collects garbage, which goes through all that was ever imported; that is most of a tiny run."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
