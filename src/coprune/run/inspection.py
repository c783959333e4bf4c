"""What a model is made of, what would be pruned, and how sparse it is already: as data, and as lines for people."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from coprune.base.shown import Sheet, Shown, per_cent
from coprune.recipe.pattern import Target


@dataclass(frozen=True)
class InspectedMatrix:
    """One matrix of a model."""

    name: str
    block: str | None
    """The block that it is in; None outside of them."""
    shape: tuple[int, int]
    """(out, in)"""
    target: Target | None
    """What it would be pruned to; None where it would be left alone."""
    zeros: int | None
    """Weights that are zero already; None if they were not read."""

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def kind(self) -> str:
        """Its name without the numbers, which all matrices of its kind have in common."""
        name, expert, _ = self.name.partition("[")
        return ".".join("*" if part.isdigit() else part for part in name.split(".")) + ("[*]" if expert else "")


@dataclass(frozen=True, repr=False)
class Inspection(Shown):
    """A model before it is pruned."""

    model: str
    model_type: str
    parameters: int
    blocks: tuple[str, ...]
    """Names."""
    matrices: tuple[InspectedMatrix, ...]
    """Of all blocks in order, then what lies outside and would be pruned."""
    left_out: tuple[str, ...]
    """Layers that cannot be pruned as matrices, each with the reason."""
    target: Target
    """What is asked for of the model as a whole."""
    allocation: str

    @property
    def chosen(self) -> list[InspectedMatrix]:
        """The matrices that would be pruned."""
        return [matrix for matrix in self.matrices if matrix.target is not None]

    def headline(self) -> str:
        """Size and blocks."""
        return f"{self.model}: {self.model_type}, {self.parameters:,} parameters, {len(self.blocks)} blocks"

    def sheet(self) -> Sheet:
        """A line per kind of matrices, and what would be pruned in all."""
        rows = [
            ("prune" if group[0].target is not None else "leave", kind, _shape(group), str(len(group)), _present(group))
            for kind, group in self._kinds()
        ]
        return Sheet(f"{self.headline()}; {self._in_all()}", rows, ("", "matrices", "shape", "number", "zero already"))

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, every_matrix: bool = False) -> list[str]:
        """Everything, for people. every_matrix: a line per matrix instead of one per kind."""
        return [
            f"{self.headline()} ({self.blocks[0]} … {self.blocks[-1]})",
            *(self._matrix_lines() if every_matrix else self._kind_lines()),
            *([] if self.allocation == "uniform" else self._allocation_lines()),
            *(f"  leave  {layer}" for layer in self.left_out),
            self._in_all(),
        ]

    def _in_all(self) -> str:
        chosen, share = self.chosen, self.target.sparsity
        pruned = sum(matrix.size for matrix in chosen)
        return (
            f"would prune {len(chosen)} matrices with {pruned:,} weights ({per_cent(pruned / self.parameters)} of the model) to "
            f"{per_cent(share)} ({self.target.pattern}), {per_cent(pruned * share / self.parameters)} of the model"
        )

    def _kinds(self) -> Iterator[tuple[str, list[InspectedMatrix]]]:
        """Matrices that differ in the numbers in their names only, by what they have in common."""
        kinds: dict[tuple[str, tuple[int, int], bool], list[InspectedMatrix]] = defaultdict(list)
        for matrix in self.matrices:
            kinds[matrix.kind, matrix.shape, matrix.target is not None].append(matrix)
        return ((kind, group) for (kind, _, _), group in kinds.items())

    def _kind_lines(self) -> Iterator[str]:
        for kind, group in self._kinds():
            what = "prune" if group[0].target is not None else "leave"
            yield f"  {what}  {kind}  {_shape(group)}  ({len(group)}){_zero(group)}"

    def _matrix_lines(self) -> Iterator[str]:
        for matrix in self.matrices:
            what = "leave" if matrix.target is None else "prune"
            aim = "" if matrix.target is None else f"  to {matrix.target}"
            yield f"  {what}  {matrix.name}  {_shape([matrix])}{aim}{_zero([matrix])}"

    def _allocation_lines(self) -> Iterator[str]:
        """Every block's sparsity, and that of its least and most pruned matrix."""
        least, mean, most = _spread(self.chosen)
        span = f"from {per_cent(least)} to {per_cent(most)} sparse, {per_cent(mean)} in all"
        yield f"allocation {self.allocation}: matrices {span}."
        places: dict[str, list[InspectedMatrix]] = defaultdict(list)
        for matrix in self.chosen:
            places[matrix.block or matrix.name].append(matrix)
        for place, group in places.items():
            least, mean, most = _spread(group)
            yield f"  {place}  {per_cent(mean)}  ({per_cent(least)} … {per_cent(most)})"


def _spread(matrices: Sequence[InspectedMatrix]) -> tuple[float, float, float]:
    """The least, mean and largest sparsity that some matrices would be pruned to."""
    sparsities = [matrix.target.sparsity for matrix in matrices if matrix.target is not None]
    sizes = [matrix.size for matrix in matrices]
    mean = sum(sparsity * size for sparsity, size in zip(sparsities, sizes, strict=True)) / sum(sizes)
    return min(sparsities), mean, max(sparsities)


def _shape(matrices: Sequence[InspectedMatrix]) -> str:
    rows, columns = matrices[0].shape
    return f"{rows} × {columns}"


def _present(matrices: Sequence[InspectedMatrix]) -> str:
    """The fraction of zeros that some matrices have already; empty if they were not read."""
    zeros = [matrix.zeros for matrix in matrices if matrix.zeros is not None]
    return per_cent(sum(zeros) / sum(matrix.size for matrix in matrices)) if len(zeros) == len(matrices) else ""


def _zero(matrices: Sequence[InspectedMatrix]) -> str:
    present = _present(matrices)
    return f"  {present} zero" if present else ""
