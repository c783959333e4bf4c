"""Histograms of a matrix against counting by hand, and the report's files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from coprune.pruning.distributions import BINS, distributions_of, histogram
from coprune.report.schema import Report
from support.commands import run_command
from support.pico_folder import save_pico, write_words


def test_histogram_counts_match_numpy() -> None:
    values = torch.rand(50, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keep = values > 0.3
    found = histogram(values, keep)
    assert found is not None
    logarithms = values.to(torch.float32).log10().numpy()
    expected, edges = np.histogram(logarithms, bins=BINS)
    assert [found.low, found.high] == pytest.approx([edges[0], edges[-1]])
    kept = np.histogram(logarithms[keep.numpy()], bins=edges)[0]
    # Values on the edge of two bins may be counted in either.
    assert np.abs(np.array(found.kept) - kept).max() <= 2
    assert np.abs(np.array(found.kept) + np.array(found.pruned) - expected).max() <= 2
    assert sum(found.kept) == int(keep.sum())


def test_zeros_are_left_out() -> None:
    assert histogram(torch.zeros(3, 3), None) is None
    found = histogram(torch.tensor([0.0, 2.0, 2.0]), torch.tensor([False, True, False]))
    assert found is not None
    assert (sum(found.kept), sum(found.pruned)) == (1, 1)


def test_large_matrices_are_sampled() -> None:
    weight = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    norm = torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.5
    found = distributions_of(weight, weight.abs() > 0.5, norm)
    assert found.magnitude is not None
    assert found.score is not None
    assert found.norm is not None
    assert sum(found.magnitude.kept) + sum(found.magnitude.pruned) == 2**16
    assert sum(found.norm.kept) == 64
    assert found.norm.pruned == ()
    highest = (weight[::4].abs() * norm).max().log10()
    assert found.score.high == pytest.approx(float(highest))


def test_histograms_are_stored_beside_the_report_and_optional(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, run = str(write_words(tmp_path / "text.txt")), tmp_path / "run"
    command = ["prune", str(save_pico(tmp_path / "model")), "--dataset", text, "--no-eval", "--seqlen", "32", "-q"]
    assert run_command([*command, "--nsamples", "4", "--save", str(run)], monkeypatch, capsys).code == 0
    assert "magnitude" not in (run / "report.json").read_text(encoding="utf-8")
    report = Report.read(run / "report.json")
    for matrix in report.matrices:
        found = matrix.distributions
        assert found is not None
        assert found.magnitude is not None
        assert found.score is not None
        kept, pruned = sum(found.magnitude.kept), sum(found.magnitude.pruned)
        assert pruned / (kept + pruned) == pytest.approx(matrix.sparsity)
    (run / "distributions.json").unlink()
    alone = Report.read(run / "report.json")
    assert all(matrix.distributions is None for matrix in alone.matrices)
    assert [matrix.name for matrix in alone.matrices] == [matrix.name for matrix in report.matrices]
