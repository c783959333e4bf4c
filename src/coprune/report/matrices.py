"""One matrix of a run, picked from a list: the data from which the page's script draws its histograms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from coprune.pruning.distributions import Distributions, Histogram
from coprune.pruning.pruner import MatrixResult
from coprune.report.heat_map import place_of
from coprune.report.html import panel, section

_KINDS = {
    "magnitude": "log₁₀ |weight|",
    "norm": "log₁₀ input norm (RMS per channel)",
    "score": "log₁₀ |weight| · input norm",
}
_MOST = 600  # matrices whose histograms a page holds, at about 300 bytes each
# A bin is one character: its height in so many steps, which on the page is less than a pixel each.
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%()*+,-./:;=?@[]^_`{|}~"


def picker(matrices: Sequence[MatrixResult], blocks: Sequence[str]) -> str:
    """The section with the list and its charts; without distributions it tells the figures alone."""
    if not matrices:
        return ""
    charts = "".join(
        f'<div class="histogram" id="distribution-{kind}" data-title="{title}"></div>' for kind, title in _KINDS.items()
    )
    body = panel(
        '<div class="picker"><select id="matrix" aria-label="matrix"></select>'
        '<button type="button" id="previous" aria-label="previous matrix">←</button>'
        '<button type="button" id="next" aria-label="next matrix">→</button></div>'
        f'<p class="facts" id="matrix-facts"></p><div class="three">{charts}</div>'
    )
    note = "Before pruning, on a sample of its rows; input norms are over the calibration data."
    chosen = len(shown_matrices(matrices, blocks))
    if chosen < len(matrices):
        note += (
            f" {chosen:,} of the {len(matrices):,} matrices are here, of a block's experts the one that lost most; "
            "distributions.json holds all, and coprune inspect MODEL --plot NAME draws any."
        )
    return section("One matrix", body, note=note)


def picker_data(matrices: Sequence[MatrixResult], blocks: Sequence[str]) -> dict[str, Any]:
    """What the script reads: a short list per matrix, and the digits of its bins."""
    return {"digits": _DIGITS, "matrices": [_matrix(matrix) for matrix in shown_matrices(matrices, blocks)]}


def shown_matrices(matrices: Sequence[MatrixResult], blocks: Sequence[str]) -> list[MatrixResult]:
    """As many matrices as a page holds: all; or of a block's experts the worst; or those of every so many blocks."""
    if len(matrices) <= _MOST:
        return list(matrices)
    worst: dict[tuple[str, str], MatrixResult] = {}
    for matrix in matrices:
        place = place_of(matrix.name, blocks)
        if place not in worst or (matrix.relative_layer_error or 0) > (worst[place].relative_layer_error or 0):
            worst[place] = matrix
    numbers = list(dict.fromkeys(block for block, _ in worst))
    every = -(-len(worst) // _MOST)
    kept = set(numbers[::every])
    return [matrix for (block, _), matrix in worst.items() if block in kept][:_MOST]


def _matrix(matrix: MatrixResult) -> list[Any]:
    error, shape = matrix.relative_layer_error, matrix.shape
    error = None if error is None or not math.isfinite(error) else round(error, 6)
    figures = [matrix.name, f"{shape[0]} × {shape[1]}", round(matrix.sparsity, 6), error, matrix.tokens]
    return [*figures, " · ".join(matrix.events), _charts(matrix.distributions)]


def _charts(found: Distributions | None) -> dict[str, Any]:
    histograms = {} if found is None else {kind: getattr(found, kind) for kind in _KINDS}
    return {kind: _packed(histogram) for kind, histogram in histograms.items() if histogram is not None}


def _packed(histogram: Histogram) -> list[Any]:
    """Ends, the count of the fullest bin, and the bins of what is kept and of what is pruned as digits."""
    pruned = histogram.pruned or (0,) * len(histogram.kept)
    top = max(1, *(a + b for a, b in zip(histogram.kept, pruned, strict=True)))
    # Rounded up, so that what is in a bin is seen.
    bins = ["".join(_DIGITS[math.ceil(n / top * (len(_DIGITS) - 1))] for n in row) for row in (histogram.kept, pruned)]
    return [round(histogram.low, 3), round(histogram.high, 3), top, bins[0], bins[1] if any(pruned) else ""]
