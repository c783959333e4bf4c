"""A few of the changed packed folders of `make torture`, in the tests' own process and without a sanitiser."""

from __future__ import annotations

import pytest

from coprune.base.native.build import load_kernels
from torture.mutations import attack


@pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler")
def test_changed_folders_are_refused_or_harmless() -> None:
    ends = attack(1000, 30)
    assert sum(ends.values()) == 30
    assert ends["refused"] > 20
