"""What pruning did to a model, as values: one or more edits per block.

A run keeps them in its journal. The writer asks them where every source tensor goes and what becomes of the
configuration; who reloads the model, which masks to find in it; a resumed run applies them to blocks that were finished
before; the report says them in words; fine-tuning learns from them what has to stay zero. A new way of making a model
smaller is a class here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from coprune.base.errors import BadInput
from coprune.base.files import write_text
from coprune.base.validation import reason
from coprune.model.checkpoint.companions import put_into
from coprune.model.slices import KeptSlices

EDITS_FILE = "coprune_edits.json"
"""What was done to the model of a folder, beside its weights."""


class Edit(BaseModel):
    """What was done to one block. By itself it changes nothing; a kind of edit overrides what it changes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def apply(self, module: nn.Module) -> None:
        """Let the block, in the model as it was, act as what becomes of it. Its tensors hold their new values already."""

    def place(self, name: str) -> str | None:
        """Where a source tensor or module goes: its name in the edited model, None if it is left out.

        Names are those of the source. A later block's edits are asked before an earlier one's, so that an edit which
        moves the names of all later blocks does not have to know of the others.
        """
        return name

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """What is left of a source tensor of the block, by its name in the source."""
        return tensor

    def uncut(self, name: str, tensor: Tensor) -> Tensor:
        """The source tensor again, with zeros in place of what was cut away."""
        return tensor

    def configure(self, config: dict[str, Any]) -> None:
        """Change the content of `config.json`, in place."""

    def checksums(self) -> Mapping[str, str]:
        """Masks to be found in the saved model: `Matrix.mask_checksum` by the matrix's name in the source."""
        return {}

    def describe(self) -> str | None:
        """One line for people; None where the matrices' own figures tell it."""
        return None


class FillZeros(Edit):
    """Weights were set to zero; the tensors hold the zeros, and this their masks."""

    masks: dict[str, str]
    """`Matrix.mask_checksum` by the name of the matrix."""

    def checksums(self) -> Mapping[str, str]:
        return self.masks


class KeepSlices(Edit):
    """Channels or heads of a block were removed: its tensors are smaller. In memory they are zeros until it is saved."""

    kept: dict[str, KeptSlices]
    """By the name of the source tensor."""

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        kept = self.kept.get(name)
        return tensor if kept is None else kept.cut(tensor)

    def uncut(self, name: str, tensor: Tensor) -> Tensor:
        kept = self.kept.get(name)
        return tensor if kept is None else kept.uncut(tensor)


class DropBlock(Edit):
    """A block is left out, and the later ones move up."""

    block: str
    """Its name: the path of the list of blocks, and its number."""
    entries: int
    """Length of the tuple that a block answers with; 0 if it answers with the hidden states themselves."""

    def apply(self, module: nn.Module) -> None:
        module.forward = self.idle

    def idle(self, *args: Any, **kwargs: Any) -> Any:
        """Pass the hidden states on, as the block answers."""
        hidden = args[0] if args and isinstance(args[0], Tensor) else kwargs["hidden_states"]
        return (hidden, *[None] * (self.entries - 1)) if self.entries else hidden

    def place(self, name: str) -> str | None:
        path, _, number = self.block.rpartition(".")
        if not name.startswith(f"{path}."):
            return name
        index, dot, rest = name.removeprefix(f"{path}.").partition(".")
        if not index.isdecimal():
            return name
        if int(index) == int(number):
            return None
        return f"{path}.{int(index) - (int(index) > int(number))}{dot}{rest}"


class Configure(Edit):
    """What a smaller model's configuration says otherwise, and what was removed, in words."""

    changes: dict[str, Any]
    """New values by their places in `config.json`, with dots between."""
    removed: str

    def configure(self, config: dict[str, Any]) -> None:
        put_into(config, self.changes)

    def describe(self) -> str:
        return self.removed


EDITS: dict[str, type[Edit]] = {
    "fill_zeros": FillZeros,
    "keep_slices": KeepSlices,
    "drop_block": DropBlock,
    "configure": Configure,
}
"""Every kind of edit, by its name in journals and folders."""


@dataclass(frozen=True)
class Edits:
    """All that was done to a model, by block in the order of the model."""

    by_block: Mapping[str, Sequence[Edit]] = field(default_factory=dict)

    def all(self) -> Iterator[Edit]:
        """Every edit, the first block's first."""
        for edits in self.by_block.values():
            yield from edits

    def apply(self, block: str, module: nn.Module) -> None:
        """Let a block of the source model act as what becomes of it."""
        for edit in self.by_block.get(block, ()):
            edit.apply(module)

    def place(self, name: str) -> str | None:
        """The name that a source tensor, matrix or block has in the edited model; None if it is left out."""
        placed: str | None = name
        for edit in reversed(list(self.all())):
            if placed is None:
                break
            placed = edit.place(placed)
        return placed

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """What is left of a source tensor that is not left out."""
        for edit in self.all():
            tensor = edit.cut(name, tensor)
        return tensor

    def configure(self, config: dict[str, Any]) -> None:
        """Change the content of `config.json`, in place."""
        for edit in reversed(list(self.all())):
            edit.configure(config)

    def checksums(self) -> dict[str, str]:
        """Masks to be found in the edited model, by the matrix's name there."""
        found = {name: mask for edit in self.all() for name, mask in edit.checksums().items()}
        placed = ((self.place(name), mask) for name, mask in found.items())
        return {name: mask for name, mask in placed if name is not None}

    def lines(self) -> list[str]:
        """What was done besides zeros, for people."""
        return [line for edit in self.all() if (line := edit.describe()) is not None]

    def write(self, folder: Path) -> None:
        """Keep them beside a model's weights, with the names that matrices have there."""
        content = {"masks": self.checksums(), "edits": {block: dump_edits(own) for block, own in self.by_block.items()}}
        write_text(folder / EDITS_FILE, json.dumps(content, indent=1) + "\n")

    @classmethod
    def of_results(cls, by_block: Mapping[str, Mapping[str, str]]) -> Self:
        """Edits that only fill in zeros. by_block: checksums by matrix, by block."""
        return cls({block: [FillZeros(masks=dict(masks))] for block, masks in by_block.items()})


def uncut_by(edits: Sequence[Edit]) -> Callable[[str, Tensor], Tensor] | None:
    """What gives a block's tensors their shapes in the source again; None where they have them."""
    cutting = [edit for edit in edits if isinstance(edit, KeepSlices)]
    if not cutting:
        return None

    def uncut(name: str, tensor: Tensor) -> Tensor:
        for edit in reversed(cutting):
            tensor = edit.uncut(name, tensor)
        return tensor

    return uncut


def dump_edits(edits: Sequence[Edit]) -> list[dict[str, Any]]:
    """Edits as JSON values, each with its kind."""
    kinds = {kind: name for name, kind in EDITS.items()}
    return [{"kind": kinds[type(edit)], **edit.model_dump(mode="json")} for edit in edits]


def load_edits(values: Sequence[Mapping[str, Any]]) -> list[Edit]:
    """Read what `dump_edits` wrote. Raises BadInput for what this version does not know."""
    found = []
    for value in values:
        content = dict(value)
        kind = EDITS.get(str(content.pop("kind", None)))
        if kind is None:
            raise BadInput(f"this coprune knows no edits of the kind {value.get('kind')!r}", fix="update coprune")
        try:
            found.append(kind.model_validate(content))
        except ValidationError as error:
            raise BadInput(f"an edit is damaged: {reason(error.errors()[0])}") from None
    return found


def pruned_names(folder: Path) -> set[str]:
    """Names of the matrices that were pruned in a folder's model; empty where nothing tells. Raises BadInput if damaged."""
    path = folder / EDITS_FILE
    if not path.is_file():
        return set()
    try:
        masks = json.loads(path.read_text(encoding="utf-8"))["masks"]
        return {str(name) for name in dict(masks)}
    except (OSError, ValueError, KeyError, TypeError):
        fix = "remove it, and the zeros of the weights tell what was pruned"
        raise BadInput(f"{path} is damaged", fix=fix) from None
