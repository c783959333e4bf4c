"""The heat map of a run's page: every matrix by block and kind, in colours of its sparsity or its error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coprune.base.words import per_cent
from coprune.pruning.pruner import MatrixResult
from coprune.report.html import panel, text

Row = dict[str, Any]
# Viridis at eight even steps: readable without colours, and on both papers.
_SCALE = ("440154", "46327e", "365c8d", "277f8e", "1fa187", "4ac16d", "a0da39", "fde725")
_LABELLED = 10  # blocks that bear their number


def place_of(name: str, blocks: Sequence[str] = ()) -> tuple[str, str]:
    """Split a matrix's name into its block's number ('–' outside of the blocks) and its kind, experts together.

    `model.layers.3.self_attn.q_proj` → ('3', 'self_attn.q_proj'); `…mlp.experts.up_proj[2]` → '….up_proj[*]'; with the blocks'
    names `stages.1.blocks.2.mlp.fc1` → ('1.2', 'mlp.fc1'). Without them a block's number is the first in the name.
    """
    path, bracket, _ = name.partition("[")
    parts = path.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    depth = max((block.count(".") + 1 for block in blocks if f"{path}.".startswith(f"{block}.")), default=0)
    within = [index for index in numbers if index < depth] or ([] if blocks else numbers[:1])
    kind = parts[within[-1] + 1 :] if within else parts
    shown = ".".join("*" if part.isdigit() else part for part in kind) + ("[*]" if bracket else "")
    return ".".join(parts[index] for index in within) or "–", shown


def matrix_rows(matrices: Sequence[MatrixResult], blocks: Sequence[str] = ()) -> list[Row]:
    """Return one row per block and kind; experts of a layer are averaged by size. blocks: their names."""
    groups: dict[tuple[str, str], list[MatrixResult]] = {}
    for matrix in matrices:
        groups.setdefault(place_of(matrix.name, blocks), []).append(matrix)
    rows = []
    for (block, kind), group in groups.items():
        size = sum(matrix.shape[0] * matrix.shape[1] for matrix in group)
        zeros = sum(matrix.sparsity * matrix.shape[0] * matrix.shape[1] for matrix in group)
        errors = [matrix.relative_layer_error for matrix in group if matrix.relative_layer_error is not None]
        rows.append(
            {
                "block": block,
                "kind": kind,
                "matrices": len(group),
                "sparsity": zeros / size,
                "error": sum(errors) / len(errors) if errors else None,
            }
        )
    return rows


def heat_map(rows: Sequence[Row], field: str) -> str:
    """Return the chart of `sparsity` or `error`, from the minimum to the maximum."""
    known = [row for row in rows if row[field] is not None]
    low, high = min(row[field] for row in known), max(row[field] for row in known)
    blocks = list(dict.fromkeys(row["block"] for row in known))
    cells: dict[str, dict[str, Row]] = {}
    for row in known:
        cells.setdefault(row["kind"], {})[row["block"]] = row
    lines = "".join(
        f"<span>{text(kind)}</span><div>{''.join(_cell(found.get(block), field, low, high) for block in blocks)}</div>"
        for kind, found in cells.items()
    )
    scale = f'<p class="scale">{per_cent(low)}<i></i>{per_cent(high)}</p>'
    return panel(scale, f'<div class="heat" style="--blocks:{len(blocks)}">{lines}{_numbers(blocks)}</div>')


def _cell(row: Row | None, field: str, low: float, high: float) -> str:
    if row is None:
        return "<b></b>"
    several = f", mean of {row['matrices']}" if row["matrices"] > 1 else ""
    tip = f"block {row['block']}, {row['kind']}: {per_cent(row[field])}{several}"
    return f'<i style=background:#{colour((row[field] - low) / ((high - low) or 1.0))} title="{text(tip)}"></i>'


def _numbers(blocks: Sequence[str]) -> str:
    """Return the blocks' numbers below the cells; of many blocks only some."""
    every = -(-len(blocks) // _LABELLED)
    names = "".join(
        f'<span style="grid-column:{place + 1}">{text(block)}</span>'
        for place, block in enumerate(blocks)
        if place % every == 0
    )
    return f'<span>block</span><div class="numbers">{names}</div>'


def colour(share: float) -> str:
    """Return the colour of a share between 0 and 1 as six hex digits."""
    place = min(max(share, 0.0), 1.0) * (len(_SCALE) - 1)
    left = min(int(place), len(_SCALE) - 2)
    ends = [[int(_SCALE[index][at : at + 2], 16) for at in (0, 2, 4)] for index in (left, left + 1)]
    mixed = (round(a + (place - left) * (b - a)) for a, b in zip(*ends, strict=True))
    return "".join(f"{one:02x}" for one in mixed)
