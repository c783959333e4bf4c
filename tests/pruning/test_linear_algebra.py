"""Factorisations: correct if possible, repaired with an event, or refused with an error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from coprune.base.errors import NumericalError
from coprune.pruning.linear_algebra import damped_cholesky, factor_inverse, invert_upper
from coprune.pruning.solver_events import Event
from support.problems import correlated_layer


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    _, _, statistic = correlated_layer(width=48)
    gram = statistic.gram
    factor = factor_inverse(gram, 0.01)
    upper = factor.pivots[:, None] * factor.unit
    damped = gram.double() + 0.01 * gram.diagonal().mean() * torch.eye(48)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(upper.double(), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(factor.unit.diagonal(), torch.ones(48))
    assert factor.events == ()


@pytest.mark.parametrize("size", [1, 128, 129, 300])
def test_a_triangular_matrix_is_inverted_by_halves(size: int) -> None:
    upper = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).triu() / size + torch.eye(size)
    inverse = upper.clone()
    invert_upper(inverse)
    torch.testing.assert_close(inverse.double(), torch.linalg.inv(upper.double()), rtol=1e-4, atol=1e-6)
    assert torch.equal(inverse, inverse.triu())


def test_damping_escalates_and_is_reported() -> None:
    matrix = torch.eye(8)
    matrix[0, 0] = -0.05
    lower, events = damped_cholesky(matrix, 0.01)
    assert events == (Event(kind="damping raised", figures={"damping": 0.1}),)
    damped = matrix + 0.1 * matrix.diagonal().mean() * torch.eye(8)
    torch.testing.assert_close(lower @ lower.T, damped)


def test_eigenvalues_are_clipped_when_damping_is_not_enough() -> None:
    matrix = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.9]))
    lower, events = damped_cholesky(matrix, 1e-4)
    assert len(events) == 4
    assert events[-1].kind == "eigenvalues clipped"
    spectrum = torch.linalg.eigvalsh(lower @ lower.T)
    assert float(spectrum[0]) > 0
    torch.testing.assert_close(spectrum[1:], torch.ones(3))


@pytest.mark.parametrize("matrix", [-torch.eye(4), torch.full((4, 4), float("nan")), torch.full((4, 4), float("inf"))])
def test_an_irreparable_matrix_raises_a_numerical_error(matrix: Tensor) -> None:
    with pytest.raises(NumericalError):
        damped_cholesky(matrix, 0.01)


def test_dead_inputs_cause_no_division_by_zero() -> None:
    factor = factor_inverse(torch.zeros(4, 4), 0.01)
    assert not bool(factor.dead.any())
    assert bool(torch.isfinite(factor.unit).all())
