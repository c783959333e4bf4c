"""All edits of a model, in the order of its blocks, queried as one and stored as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError
from torch import Tensor, nn

from coprune.base.errors import BadInput
from coprune.base.files import write_text
from coprune.base.validation import reason
from coprune.model.checkpoint.names import EDITS_FILE
from coprune.model.edit import (
    Configure,
    CutVocabulary,
    DropBlock,
    Edit,
    FillZeros,
    KeepCarried,
    KeepExperts,
    KeepSlices,
    MergeMap,
    PadUnits,
)
from coprune.model.removed import AnyRemoval

_LONGEST_PATH = 4096
EDITS: dict[str, type[Edit]] = {
    "fill_zeros": FillZeros,
    "keep_slices": KeepSlices,
    "keep_experts": KeepExperts,
    "keep_carried": KeepCarried,
    "cut_vocabulary": CutVocabulary,
    "drop_block": DropBlock,
    "merge_map": MergeMap,
    "pad_units": PadUnits,
    "configure": Configure,
}
"""Every kind of edit, by its name in journals and saved folders."""


@dataclass(frozen=True)
class Edits:
    """All edits of a model, by block in the order of the model."""

    by_block: Mapping[str, Sequence[Edit]] = field(default_factory=dict)

    def all(self) -> Iterator[Edit]:
        """Yield every edit, in the order of the blocks."""
        for edits in self.by_block.values():
            yield from edits

    def apply(self, block: str, module: nn.Module) -> None:
        """Make a block of the source model act as edited."""
        for edit in self.by_block.get(block, ()):
            edit.apply(module)

    def place(self, name: str) -> str | None:
        """Return the name of a source tensor, matrix or block in the edited model, or None if it is removed."""
        placed: str | None = name
        for edit in reversed(list(self.all())):
            if placed is None:
                break
            placed = edit.place(placed)
        return placed

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """Cut a source tensor, which must not be one that is removed."""
        for edit in self.all():
            tensor = edit.cut(name, tensor)
        return tensor

    def configure(self, config: dict[str, Any]) -> None:
        """Change the content of `config.json`, in place."""
        for edit in reversed(list(self.all())):
            edit.configure(config)

    def checksums(self) -> dict[str, str]:
        """Return masks of the edited model to verify, by the matrix's name there."""
        found = {name: mask for edit in self.all() for name, mask in edit.checksums().items()}
        placed = ((self.place(name), mask) for name, mask in found.items())
        return {name: mask for name, mask in placed if name is not None}

    def removals(self) -> list[AnyRemoval]:
        """Return records of what was removed besides zeros."""
        return [removal for edit in self.all() if (removal := edit.removal()) is not None]

    def write(self, folder: Path, source: str | None = None) -> None:
        """Save the edits beside a model's weights, under the names that matrices have there.

        source: the model's source, as the user named it; None if there is none. The source's own edits are copied into the
            new file.
        """
        before, source = _earlier(source)
        if source is not None and Path(source).is_absolute():
            # A published folder must not contain absolute local paths. Readers resolve links first.
            source = os.path.relpath(source, folder.resolve())
        edits = {block: dump_edits(own) for block, own in self.by_block.items()}
        content = {"source": source, "before": before, "masks": self.checksums(), "edits": edits}
        write_text(folder / EDITS_FILE, json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the last edits of a folder's model; empty without a file of edits. Raises BadInput if that is damaged."""
        return cls(history_of(folder)[1][-1].by_block)

    @classmethod
    def of_results(cls, by_block: Mapping[str, Mapping[str, str]]) -> Self:
        """Return edits that only set zeros. by_block: checksums by matrix, by block."""
        return cls({block: [FillZeros(masks=dict(masks))] for block, masks in by_block.items()})


def uncut_by(edits: Sequence[Edit]) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None:
    """Return the function that restores the source's shapes of a block's tensors; None if nothing was cut."""
    cutting = [edit for edit in edits if isinstance(edit, KeepSlices)]
    if not cutting:
        return None

    def uncut(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = dict(tensors)
        for edit in reversed(cutting):
            found = {name: edit.uncut(name, tensor) for name, tensor in found.items()}
            edit.complete(found)
        return found

    return uncut


def dump_edits(edits: Sequence[Edit]) -> list[dict[str, Any]]:
    """Return edits as JSON values, each with its kind."""
    kinds = {kind: name for name, kind in EDITS.items()}
    return [{"kind": kinds[type(edit)], **edit.model_dump(mode="json")} for edit in edits]


def load_edits(values: Sequence[Mapping[str, Any]]) -> list[Edit]:
    """Read what `dump_edits` wrote. Raises BadInput for kinds that this version does not know."""
    found = []
    for value in values:
        content = dict(value)
        kind = EDITS.get(str(content.pop("kind", None)))
        if kind is None:
            raise BadInput(
                f"this version of coprune does not know edits of the kind {value.get('kind')!r}", fix="update coprune"
            )
        try:
            found.append(kind.model_validate(content))
        except ValidationError as error:
            raise BadInput(f"an edit is damaged: {reason(error.errors()[0])}") from None
    return found


def is_coprunes(folder: Path) -> bool:
    """Return whether coprune wrote the model in a folder."""
    return (folder / EDITS_FILE).is_file() and (folder / "config.json").is_file()


def require_history(folder: Path) -> None:
    """Raise BadInput if a folder's file of edits is damaged, since models made from it will copy that."""
    _content(folder)


def pruned_names(folder: Path) -> set[str]:
    """Return the names of a folder's pruned matrices; empty if not recorded. Raises BadInput if damaged."""
    try:
        return {str(name) for name in dict(_content(folder).get("masks", {}))}
    except (TypeError, ValueError):
        raise _damaged(folder) from None


def source_of(folder: Path) -> str | None:
    """Return the source of a folder's model, as the user named it; None if not recorded. Raises BadInput if damaged."""
    return history_of(folder)[0]


def history_of(folder: Path) -> tuple[str | None, list[Edits]]:
    """Return the source of a folder's model, as the user named it, and all edits since, earliest first.

    Raises BadInput if the file of edits is damaged.
    """
    content = _content(folder)
    source = content.get("source")
    try:
        written = [dict(edits).items() for edits in [*content.get("before", []), content.get("edits", {})]]
        done = [Edits({str(block): load_edits(own) for block, own in edits}) for edits in written]
    except (AttributeError, TypeError, ValueError) as error:
        raise error if isinstance(error, BadInput) else _damaged(folder) from None
    return _found_from(folder, source), done


def _earlier(source: str | None) -> tuple[list[Any], str | None]:
    """Return the edits that led to a new model's source, and the original source: an absolute path or a name."""
    if source is None or not Path(source).exists():
        return [], source
    path = Path(source).resolve()
    content = _content(path) if path.is_dir() else {}
    if content.get("source") is None:
        return [], str(path)
    return [*content.get("before", []), content.get("edits", {})], _found_from(path, content["source"])


def _found_from(folder: Path, source: Any) -> str | None:
    """Resolve a source named in a folder's file: a path relative to the folder, or a name."""
    if source is None or not str(source).startswith(".."):
        return None if source is None else str(source)
    return str((folder / str(source)).resolve())


def _content(folder: Path) -> dict[str, Any]:
    path = folder / EDITS_FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise _damaged(folder) from None
    if not isinstance(content, dict) or "masks" not in content:
        raise _damaged(folder)
    source = content.get("source")
    if source is not None and not (isinstance(source, str) and len(source) < _LONGEST_PATH and "\0" not in source):
        raise _damaged(folder)
    if not isinstance(content.get("before", []), list) or not isinstance(content.get("edits", {}), dict):
        raise _damaged(folder)
    return content


def _damaged(folder: Path) -> BadInput:
    fix = "remove it; coprune then sees what was pruned from the weights' zeros"
    return BadInput(f"{folder / EDITS_FILE} is damaged", fix=fix)
