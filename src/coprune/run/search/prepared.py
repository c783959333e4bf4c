"""Matrices pruned once at every level and kept in files, so that a search only has to read what it tries.

A matrix has a file of its own: its dense weights, and of every level which weights are kept (a bit each) and their values.
What a killed run left whole is taken over.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coprune.base.devices import memory_within
from coprune.base.durable import write_durably
from coprune.base.errors import BadInput, LostProcess
from coprune.base.words import Setting
from coprune.model.matrices import Matrix, mask_bits
from coprune.model.walk.activations import GIB
from coprune.model.walk.inputs import Inputs
from coprune.model.walk.moves import Dense
from coprune.model.walk.shown import MatricesReady, Past
from coprune.model.walk.statistics import Gram
from coprune.model.walk.walk import Walk
from coprune.pruning.allocation.base import Unit
from coprune.pruning.pruner import prune_matrix
from coprune.recipe.pattern import Target
from coprune.run.calibrating import record_calibration
from coprune.run.session import Session
from coprune.run.share import share_out


@dataclass(frozen=True)
class Prepared:
    """The chosen matrices at every level; implements `Forms`."""

    session: Session
    folder: Path
    identity: str
    """Of the search; files of another are none."""
    units: Sequence[Unit]
    grid: Sequence[Target]
    """Of the levels from 1 on; level 0 is dense."""
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    """By how much each matrix's outputs count, by its name; those of others all alike."""

    @cached_property
    def places(self) -> list[int]:
        """Number of the block that every unit is in; the number of blocks for what comes after them."""
        names = self.session.model.names
        return [names.index(unit.place) if unit.place in names else len(names) for unit in self.units]

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        """The matrices that are prepared, by name."""
        return {matrix.name: matrix for matrix in self.session.model.chosen.all()}

    @property
    def nbytes(self) -> int:
        """What the files take, about."""
        kept = sum(1 / 8 + (1 - target.sparsity) * self._item for target in self.grid)
        return int(sum(unit.weights for unit in self.units) * (self._item + kept))

    @property
    def _item(self) -> int:
        return next(iter(self.matrices.values())).stored().element_size()

    def require_room(self) -> None:
        """Raise BadInput where the disk has none for the files."""
        missing = self.nbytes - sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        free = shutil.disk_usage(self.folder).free
        if missing > free:
            raise BadInput(
                f"the search's levels take {missing / GIB:.1f} GiB more in {self.folder}, and {free / GIB:.1f} are free",
                field="allocation",
                value="search",
                fix=("name a run folder on a larger disk with ", Setting("save"), ", or take fewer levels"),
            )

    def write(self, part: int, level: int) -> None:
        """Give a unit its weights at a level."""
        for name in self.units[part].members:
            self._put(self.matrices[name], level)

    def _put(self, matrix: Matrix, level: int) -> None:
        stored = matrix.stored()
        with safe_open(self._file(matrix.name), "pt") as file:
            if level == 0:
                stored.copy_(file.get_tensor("dense"))
                return
            bits, values = file.get_tensor(f"kept {level}"), file.get_tensor(f"values {level}")
        keep = torch.from_numpy(np.unpackbits(bits.numpy(), count=stored.numel())).bool().view(stored.shape)
        stored.copy_(torch.zeros(stored.shape, dtype=stored.dtype).masked_scatter_(keep, values))

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _is_there(self, matrix: Matrix) -> bool:
        try:
            with safe_open(self._file(matrix.name), "pt") as file:
                return bool((file.metadata() or {}).get("search") == self.identity)
        except (OSError, SafetensorError):
            return False

    def prepare(self) -> None:
        """Prune every matrix at every level, on its inputs in the dense model, which stays as it is.

        Raises:
            LostProcess: a process does not see what another one wrote.
        """
        opened, model = self.session.opened, self.session.model
        finished = set(opened.around.processes.from_first(self._finished))
        if len(finished) == len(model.blocks) and all(map(self._is_there, model.chosen.outside)):
            return
        # What is aimed at in the dense model are its own outputs anyway.
        statistic = opened.solver.statistic
        recording = None if statistic is None else record_calibration(self.session)
        with opened.around.reporter.bar(f"Pruning at {len(self.grid)} levels", len(model.blocks)) as advance:
            walk = Walk(model, recording, statistic, Dense(), Past(finished), opened.around.processes, advance)
            with memory_within(lambda: walk.at):
                for event in walk:
                    if isinstance(event, MatricesReady):
                        self._prune(event)
        opened.around.processes.gather(None)
        if not all(map(self._is_there, self.matrices.values())):
            raise LostProcess(
                f"process {opened.around.processes.rank} cannot see what others wrote into {self.folder}: all processes "
                "need one file system in common",
                fix=("name a folder there with ", Setting("save")),
            )

    def _finished(self) -> list[str]:
        """Names of the blocks before the first of which a file is missing."""
        model, found = self.session.model, list[str]()
        for block, matrices in zip(model.blocks, model.chosen.blocks, strict=True):
            if not all(map(self._is_there, matrices)):
                break
            found.append(block.name)
        return found

    @cached_property
    def _own(self) -> set[str]:
        """Names of the matrices that this process prunes."""
        processes, model = self.session.opened.around.processes, self.session.model
        gram = self.session.opened.solver.statistic is Gram
        stages = [*model.structure.groups, [[matrix] for matrix in model.chosen.outside]]
        owners = {name: rank for groups in stages for name, rank in share_out(groups, processes.size, gram).items()}
        return {name for name, rank in owners.items() if rank == processes.rank}

    def _prune(self, event: MatricesReady) -> None:
        """Prune this process's matrices among some at every level, and write that down."""
        for matrix in event.matrices:
            if matrix.name in self._own and not self._is_there(matrix):
                tensors, metadata = self._at_levels(matrix, event.inputs), {"search": self.identity}
                write_durably(self._file(matrix.name), partial(save_file, tensors, metadata=metadata))

    def _at_levels(self, matrix: Matrix, inputs: Inputs | None) -> dict[str, Tensor]:
        """A matrix at every level; it is dense as before in the end."""
        stored, solver = matrix.stored(), self.session.opened.solver
        dense = stored.clone()
        tensors = {"dense": dense.cpu().contiguous()}
        try:
            for level, target in enumerate(self.grid, start=1):
                wanted = replace(target, outputs=self.outputs.get(matrix.name))
                prune_matrix(matrix, inputs, solver, wanted, layer_error=False)
                tensors |= _packed(level, stored)
                stored.copy_(dense)
        finally:
            stored.copy_(dense)
        return tensors


def _packed(level: int, stored: Tensor) -> dict[str, Tensor]:
    """A pruned matrix as the bits of what is kept, and its values."""
    return {f"kept {level}": mask_bits(stored).cpu(), f"values {level}": stored[stored != 0].cpu()}
