"""What all tests of this folder share."""

import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def _imported_objects_are_not_collected():
    """Every training collects garbage, which goes through all that was ever imported; that is most of a tiny run."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
