"""The heat map of a run's page: every matrix by block and kind, coloured by sparsity or error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coprune.base.words import per_cent

if TYPE_CHECKING:
    from coprune.pruning.pruner import MatrixResult

Row = dict[str, Any]
# Viridis in eight even steps: readable in greyscale, and in light and dark mode.
_SCALE = ("440154", "46327e", "365c8d", "277f8e", "1fa187", "4ac16d", "a0da39", "fde725")
_LABELLED = 10  # blocks labelled with their number


def place_of(name: str, blocks: Sequence[str] = ()) -> tuple[str, str]:
    """Split a matrix's name into its block's number ('–' outside the blocks) and its kind, with experts merged.

    `model.layers.3.self_attn.q_proj` → ('3', 'self_attn.q_proj'); `…mlp.experts.up_proj[2]` → '….up_proj[*]'; with the blocks'
    names `stages.1.blocks.2.mlp.fc1` → ('1.2', 'mlp.fc1'). Without them the block's number is the first number in the name.
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
    """Return one row per block and kind; average a layer's experts by size. blocks: names of the blocks."""
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


@dataclass(frozen=True)
class HeatCell:
    """A matrix, or the matrices of one kind in a block. tip: the tooltip."""

    colour: str
    tip: str


@dataclass(frozen=True)
class HeatMap:
    """Cells by kind, one per block (None if a block has no such matrix); low and high: ends of the scale."""

    low: str
    high: str
    blocks: Sequence[str]
    rows: Mapping[str, Sequence[HeatCell | None]]

    @classmethod
    def of(cls, rows: Sequence[Row], field: str) -> HeatMap:
        """Return the chart of `sparsity` or `error`, from the minimum to the maximum."""
        known = [row for row in rows if row[field] is not None]
        low, high = min(row[field] for row in known), max(row[field] for row in known)
        blocks = list(dict.fromkeys(row["block"] for row in known))
        found: dict[str, dict[str, HeatCell]] = {}
        for row in known:
            several = f", mean of {row['matrices']}" if row["matrices"] > 1 else ""
            tip = f"block {row['block']}, {row['kind']}: {per_cent(row[field])}{several}"
            cell = HeatCell(colour((row[field] - low) / ((high - low) or 1.0)), tip)
            found.setdefault(row["kind"], {})[row["block"]] = cell
        cells = {kind: [of.get(block) for block in blocks] for kind, of in found.items()}
        return cls(per_cent(low), per_cent(high), blocks, cells)

    def numbers(self) -> list[tuple[int, str]]:
        """Return the blocks to label, by column; only some of many."""
        return list(enumerate(self.blocks, 1))[:: -(-len(self.blocks) // _LABELLED)]


def colour(share: float) -> str:
    """Return the colour of a share between 0 and 1 as six hex digits."""
    place = min(max(share, 0.0), 1.0) * (len(_SCALE) - 1)
    left = min(int(place), len(_SCALE) - 2)
    ends = [[int(_SCALE[index][at : at + 2], 16) for at in (0, 2, 4)] for index in (left, left + 1)]
    mixed = (round(a + (place - left) * (b - a)) for a, b in zip(*ends, strict=True))
    return "".join(f"{one:02x}" for one in mixed)
