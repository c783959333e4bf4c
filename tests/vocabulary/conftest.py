"""Less code to count than a user gets, for all tests of this room."""

import pytest

from coprune.vocabulary import counts


@pytest.fixture(autouse=True)
def less_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "_CODE", {("stdlib", ".py"): 200_000})
