"""Fixtures for the native kernels at every instruction set of this processor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from coprune.base.native.compilation import LEVELS, load_kernels


@pytest.fixture(params=range(len(LEVELS)), ids=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    library = load_kernels()
    assert library is not None
    best = library.coprune_level()
    if library.coprune_set_level(request.param) != request.param:
        library.coprune_set_level(best)
        pytest.skip("this processor lacks it")
    yield LEVELS[request.param]
    library.coprune_set_level(best)
