"""Edits: the changes that pruning made to a model, as values, one or more per block.

A run keeps them in its journal. From them the writer gets the new name of every source tensor and the configuration,
verification the masks, a resumed run the state of finished blocks, the report its text, and fine-tuning the zeros to keep. A
new way to make a model smaller is a class here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from coprune.model.checkpoint.companions import put_into
from coprune.model.kept_slices import KeptSlices
from coprune.model.removed import AnyRemoval, CarriedExperts, MappedBlocks, Tokens
from coprune.model.routing import NeverChosen


class Edit(BaseModel):
    """A change of one block. The base class changes nothing; subclasses override what they change."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def apply(self, module: nn.Module) -> None:
        """Make a block of the source model act as edited. Its tensors already hold their new values."""

    def place(self, name: str) -> str | None:
        """Return the name of a source tensor or module in the edited model, or None if it is removed.

        Names are the source's. Later blocks' edits are applied first, so that an edit that renames all later blocks need not
        know the others.
        """
        return name

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """Cut a source tensor of the block. name: in the source."""
        kept = self.slices(name)
        return tensor if kept is None else kept.cut(tensor)

    def slices(self, name: str) -> KeptSlices | None:
        """Return the kept slices of a source tensor of the block, or None if it is not cut."""
        return None

    def uncut(self, name: str, tensor: Tensor) -> Tensor:
        """Return the source tensor with zeros in place of removed parts."""
        kept = self.slices(name)
        return tensor if kept is None else kept.uncut(tensor)

    def leaves_out(self, name: str) -> bool:
        """Return whether the journal need not store a source tensor of the block."""
        return False

    def complete(self, tensors: dict[str, Tensor]) -> None:
        """Add zeros for tensors that the journal left out, in place. tensors: the block's, uncut."""

    def configure(self, config: dict[str, Any]) -> None:
        """Change the content of `config.json`, in place."""

    def checksums(self) -> Mapping[str, str]:
        """Return masks of the saved model to verify: `Matrix.mask_checksum` by the matrix's name in the source."""
        return {}

    def removal(self) -> AnyRemoval | None:
        """Return a record of what was removed; None if the matrices' figures suffice."""
        return None


class FillZeros(Edit):
    """Weights set to zero; the tensors hold the zeros, the edit their masks."""

    masks: dict[str, str]
    """`Matrix.mask_checksum` by the name of the matrix."""

    def checksums(self) -> Mapping[str, str]:
        return self.masks


class KeepSlices(Edit):
    """Removed channels or heads of a block. In memory they are zeros; the saved tensors are smaller."""

    kept: dict[str, KeptSlices]
    """Kept slices by the name of the source tensor."""

    def slices(self, name: str) -> KeptSlices | None:
        return self.kept.get(name)


class KeepNumbered(KeepSlices):
    """Removed experts: stacked tensors and router rows are cut, and experts with tensors of their own are renumbered."""

    count: int
    """Original number of experts."""
    experts: list[int]
    """Numbers of the kept experts."""
    numbered: list[str]
    """Prefixes of names that are followed by an expert's number: `….experts.` for tensors, `….down_proj[` for matrices."""

    def place(self, name: str) -> str | None:
        number, beginning, rest = self._number(name)
        if number is None:
            return name
        return f"{beginning}{self.experts.index(number)}{rest}" if number in self.experts else None

    def leaves_out(self, name: str) -> bool:
        return self.place(name) is None

    def _number(self, name: str) -> tuple[int | None, str, str]:
        """Return the expert's number in a name, and the parts before and after it."""
        for beginning in self.numbered:
            if name.startswith(beginning) and (digits := re.match(r"\d+", name[len(beginning) :])):
                return int(digits[0]), beginning, name[len(beginning) + digits.end() :]
        return None, name, ""


class KeepExperts(KeepNumbered):
    """Removed experts of a block. In memory the router never chooses them; they are not saved."""

    router: str
    """Path of the router in the block."""
    added: list[str]
    """Paths of the tensors added to the experts' logits or scores."""

    def apply(self, module: nn.Module) -> None:
        keep = torch.zeros(self.count, dtype=torch.bool)
        keep[self.experts] = True
        vectors = [(module.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in self.added]
        router = module.get_submodule(self.router)
        router.forward = NeverChosen(router, keep, vectors)

    def complete(self, tensors: dict[str, Tensor]) -> None:
        first = {name: self._number(name) for name in tensors}
        for name, (number, beginning, rest) in first.items():
            for other in range(self.count) if number == self.experts[0] else ():
                tensors.setdefault(f"{beginning}{other}{rest}", torch.zeros_like(tensors[name]))


class KeepCarried(KeepNumbered):
    """Removed experts of a mixture that the model's class does not load."""

    mixture: str
    """Path of the mixture in the checkpoint."""

    def removal(self) -> AnyRemoval:
        return CarriedExperts(mixture=self.mixture, before=self.count, after=len(self.experts))


class CutVocabulary(Edit):
    """Removed tokens, with their rows in every table."""

    size: int
    """Original number of rows."""
    left: int
    ranges: list[tuple[int, int]]
    """First and last + 1 of every run of kept ids."""
    tables: dict[str, tuple[int, int]]
    """The axis and its original length, by the name of the source tensor."""

    def slices(self, name: str) -> KeptSlices | None:
        if name not in self.tables:
            return None
        axis, size = self.tables[name]
        below = [(start, min(end, size)) for start, end in self.ranges if start < size]
        return KeptSlices(dim=axis, size=size, ranges=[below])

    @property
    def old_ids(self) -> list[int]:
        """The original id of every new id, in order."""
        return [number for start, end in self.ranges for number in range(start, end)]

    def removal(self) -> AnyRemoval:
        return Tokens(tokens=self.size, left=self.left)


class DropBlock(Edit):
    """A removed block; the later ones move up."""

    block: str
    """Name of the block: the path of the list and its number."""
    entries: int
    """Length of the block's output tuple; 0 if it returns the hidden states themselves."""
    saved: str | None = None
    """Its name in the checkpoint, if that differs."""
    passes: dict[int, int | str] = {}
    """Places of arguments that it passes on to later blocks (position biases), by the position in its output."""

    def apply(self, module: nn.Module) -> None:
        module.forward = self.idle

    def idle(self, *args: Any, **kwargs: Any) -> Any:
        """Return the hidden states, in the form of the block's output."""
        first = bool(args) and isinstance(args[0], Tensor)
        hidden = args[0] if first else kwargs["hidden_states"]
        if not self.entries:
            return hidden
        answer = [hidden, *[None] * (self.entries - 1)]
        for entry, place in self.passes.items():
            answer[entry] = kwargs.get(place) if isinstance(place, str) else args[place + first]
        return tuple(answer)

    def place(self, name: str) -> str | None:
        number = self.block.rpartition(".")[2]
        paths = [block.rpartition(".")[0] for block in (self.block, self.saved) if block is not None]
        path = next((path for path in paths if name.startswith(f"{path}.")), None)
        if path is None:
            return name
        index, dot, rest = name.removeprefix(f"{path}.").partition(".")
        if not index.isdecimal():
            return name
        if int(index) == int(number):
            return None
        return f"{path}.{int(index) - (int(index) > int(number))}{dot}{rest}"


class MergeMap(Edit):
    """A linear map that replaces the following, removed blocks was merged into this block's weights."""

    blocks: list[str]
    """Names of the removed blocks."""

    def removal(self) -> AnyRemoval:
        return MappedBlocks(blocks=tuple(self.blocks))


class PadUnits(Edit):
    """Zero units saved in a block because other blocks keep more and the configuration has a single number."""

    part: str
    """channels, or heads (key-value heads with their query heads)."""
    units: int
    """Number of saved units."""
    real: list[list[tuple[int, int]]]
    """First and last + 1 of every run of saved units that are not padding, by consumer (expert)."""


class Configure(Edit):
    """Changes of a smaller model's configuration, and a record of what was removed."""

    changes: dict[str, Any]
    """New values by dotted path in the model's configuration."""
    written: dict[str, Any] | None = None
    """The same for `config.json`, if that differs."""
    removed: AnyRemoval
    parameters: int | None = None
    """Number of remaining parameters in the whole model."""
    padding: int = 0
    """Number of padding zeros saved in addition."""

    def configure(self, config: dict[str, Any]) -> None:
        put_into(config, self.changes if self.written is None else self.written)

    def removal(self) -> AnyRemoval:
        return self.removed
