"""Parametrised cases, of which the quick tests run a few."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import pytest

TEN = ("llama", "opt", "gpt2", "gemma3_text", "phi3", "bloom", "falcon", "mixtral", "gpt_oss", "deepseek_v3")
"""Families of every kind: tied or not, transposed weights, fused matrices, experts in every layout."""


def sampled(cases: Iterable[Any], quick: Iterable[Any]) -> list[Any]:
    """Return all cases, marking all but the quick ones as slow; every quick one has to be a case."""
    cases, chosen = list(cases), list(quick)
    assert all(one in cases for one in chosen)
    return [case if case in chosen else _slow(case) for case in cases]


def crossed(*axes: Sequence[Any]) -> list[Any]:
    """Return all combinations of the axes' values; a few quick ones cover every value."""
    longest = max(map(len, axes))
    diagonal = [tuple(axis[number % len(axis)] for axis in axes) for number in range(longest)]
    return sampled(product(*axes), quick=diagonal)


def of_ten(families: Iterable[str]) -> list[Any]:
    """Return all families, marking all but the ten as slow."""
    families = list(families)
    return sampled(families, quick=[family for family in families if family in TEN])


def _slow(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
