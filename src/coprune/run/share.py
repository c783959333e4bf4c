"""How the processes of a run share the work of a block, and follow the first one's output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coprune.base.devices import in_host_memory
from coprune.base.errors import LostProcess
from coprune.base.processes import Processes
from coprune.base.words import Setting
from coprune.model.blocks import Block
from coprune.model.checkpoint.shards import read_entries, read_tensor
from coprune.model.checkpoint.weights import Weights
from coprune.model.edit import AddLowRank
from coprune.model.edits import uncut_by
from coprune.model.low_rank_factors import factors_stored, give
from coprune.model.matrices import Matrix
from coprune.pruning.pruner import MatrixResult
from coprune.run.journal import BlockOutcome, Output

Sharing = Sequence[Matrix]
"""Matrices that are fed by the same tensor, and so share a statistic and what is derived from it."""


class SharedSolving:
    """Every matrix is pruned by one process, which sends its weights to the others; implements `pruning.Solving`.

    stages: groups that are known at the same time; their matrices are shared out together, the costly ones first.
    at_once: whether results are needed as soon as a group was pruned (`sequential`), or only at the block's end.
    gram: whether a matrix is solved by its Gram matrix, which costs more than in proportion to its size.
    """

    def __init__(self, processes: Processes, stages: Iterable[Sequence[Sharing]], at_once: bool, gram: bool) -> None:
        self._processes = processes
        self._at_once = at_once
        self._owners: dict[str, int] = {}
        for groups in stages:
            self._owners |= share_out(groups, processes.size, gram)
        self._pending: list[Matrix] = []
        self._own: dict[str, MatrixResult] = {}
        self._results: list[MatrixResult] = []

    def prune(self, matrices: Sequence[Matrix], prune_one: Callable[[Matrix], MatrixResult]) -> None:
        for matrix in matrices:
            if self._owners[matrix.name] == self._processes.rank:
                self._own[matrix.name] = prune_one(matrix)
        self._pending += matrices
        if self._at_once:
            self._exchange()

    def collect(self) -> list[MatrixResult]:
        self._exchange()
        results, self._results = self._results, []
        return results

    def _exchange(self) -> None:
        if not self._pending:
            return
        known = {name: result for own in self._processes.gather(self._own) for name, result in own.items()}
        self._processes.broadcast([(matrix.stored(), self._owners[matrix.name]) for matrix in self._pending])
        self._results += [known[matrix.name] for matrix in self._pending]
        self._pending, self._own = [], {}


def share_out(groups: Sequence[Sharing], processes: int, gram: bool) -> dict[str, int]:
    """Choose a process for every matrix, so that they end at about the same time: matrix name → rank.

    gram: count O·I² for an O × I matrix, and I³ once for each group that a process has a part of; else O·I.
    """
    loads = [0] * processes
    factored: set[tuple[int, int]] = set()
    owners: dict[str, int] = {}

    def cost(number: int, matrix: Matrix, rank: int) -> int:
        rows, width = matrix.shape
        if not gram:
            return rows * width
        return rows * width**2 + (0 if (number, rank) in factored else width**3)

    jobs = [(number, matrix) for number, group in enumerate(groups) for matrix in group]
    for number, matrix in sorted(jobs, key=lambda job: -job[1].shape[0] * job[1].shape[1] ** 2):
        rank = min(range(processes), key=lambda r: loads[r] + cost(number, matrix, r))
        loads[rank] += cost(number, matrix, rank)
        factored.add((number, rank))
        owners[matrix.name] = rank
    return owners


class SharedOutput:
    """The first process's output, from which the others learn what is finished and read what was written.

    output: None in every process but the first, or in all if nothing is written.
    """

    def __init__(self, processes: Processes, output: Output | None, weights: Weights) -> None:
        self._processes = processes
        self._output = output
        self._weights = weights
        self.outcomes: dict[str, BlockOutcome] = {}
        """What was done in every block so far, by this run or one before it."""

    @property
    def changes(self) -> list[str]:
        """As `Output.changes`, for the first process, which tells of them."""
        return [] if self._output is None else self._output.changes

    def finished(self) -> dict[str, BlockOutcome]:
        """As `Output.finished`, the first process's answer for all."""
        found = self._processes.from_first(lambda: {} if self._output is None else self._output.finished())
        self.outcomes |= found
        return found

    def settled_before(self) -> dict[str, Any] | None:
        """As `Output.settled_before`, the first process's answer for all."""
        return self._processes.from_first(lambda: None if self._output is None else self._output.settled_before())

    def keep_settled(self, settled: Mapping[str, Any]) -> None:
        """As `Output.keep_settled`, if anything is written."""
        if self._output is not None:
            self._output.keep_settled(settled)

    def restore(self, block: Block) -> None:
        """Let a block that an earlier run finished be what that made of it."""
        edits, file = self.outcomes[block.name].edits, self._file_of(block)
        self._weights.read_from(file, uncut_by(edits))
        self._weights.acquire(block.name)
        for edit in edits:
            edit.apply(block.module)
            if isinstance(edit, AddLowRank):
                tensors = {name: read_tensor(entry) for name, entry in read_entries(file).items() if ".lora_" in name}
                give(self._weights.model, factors_stored(tensors, edit.ranks))

    def write_block(self, block: Block, outcome: BlockOutcome) -> None:
        """Write a finished block in the first process; streamed models read it from there from now on."""
        self.outcomes[block.name] = outcome
        if self._output is not None:
            # What is on a device is copied from there anyway; in host memory one block more would have to be held.
            there = all(not in_host_memory(tensor.device) for tensor in block.module.parameters())
            self._output.write_block(block, outcome, beside=there and self._processes.size == 1)
        coded = self._weights.stored_as is not None
        if self._processes.size > 1 and (self._weights.streams or coded):
            self._weights.read_from(self._file_of(block), uncut_by(outcome.edits))
            if coded:
                self._weights.acquire(block.name)  # with what was rounded

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Let all that was written be there and be read when no block follows, whatever is the reason for that."""
        try:
            yield
        finally:
            if self._output is not None:
                self._output.settle()

    def _file_of(self, block: Block) -> Path:
        file = self._processes.from_first(lambda: None if self._output is None else self._output.file(block).resolve())
        assert file is not None
        if not file.is_file():
            raise LostProcess(
                f"process {self._processes.rank} cannot see {file}, which process 0 wrote: all processes need one file "
                "system in common",
                fix=("name folders there with ", Setting("save"), " and ", Setting("save_model")),
            )
        return file
