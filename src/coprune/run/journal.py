"""The pruned checkpoint while it comes into being, block by block: it is also the journal that a killed run resumes from.

Every finished block is one file of the future checkpoint, with what was measured in it noted beside. A later run with
the same recipe, model and data takes the good ones over and does the rest. Nothing has its final name before the end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial as partial_of
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.base.files import write_text
from coprune.model.adapter_folder import write_adapter
from coprune.model.blocks import Block
from coprune.model.checkpoint.companions import Companions, change_config
from coprune.model.checkpoint.encoding import DENSE, Encoding
from coprune.model.checkpoint.formats import Rounding
from coprune.model.checkpoint.shards import ADAPTER_FOLDER
from coprune.model.checkpoint.weights import Weights
from coprune.model.checkpoint.writer import REST, CheckpointWriter
from coprune.model.edit import Edit
from coprune.model.edits import Edits, dump_edits, load_edits, uncut_by
from coprune.model.low_rank_factors import factors_below, stored_factors
from coprune.pruning.pruner import MatrixResult
from coprune.recipe.parts import Decides
from coprune.recipe.recipe import Recipe

_IDENTITY = "journal.json"
_SETTLED = "settled.json"
_EARLIER = "changed meanwhile"
_RESULTS = TypeAdapter(list[MatrixResult])


@dataclass(frozen=True)
class BlockOutcome:
    """What was done in one block: figures of its matrices, and the edits that the saved model takes over."""

    results: list[MatrixResult]
    edits: list[Edit]


@dataclass(frozen=True)
class Identity:
    """What a run is, so that another goes on where it stopped."""

    settings: dict[str, Any]
    """What must be the same: recipe, model and data."""
    rounding: dict[str, Any] = field(default_factory=dict)
    """What may differ, since only last bits hang on it."""


class Output:
    """One checkpoint folder in the making.

    folder: its final name; keep: whether it is wanted in the end, or only holds what a streamed run cannot hold in
    memory; encoding: how its tensors are stored. Raises BadInput if the folder is taken, or another run's journal is there.
    """

    def __init__(
        self,
        folder: Path,
        keep: bool,
        weights: Weights,
        blocks: Sequence[Block],
        identity: Identity,
        encoding: Encoding = DENSE,
    ):
        self.folder = folder
        self.keep = keep
        self.encoding = encoding
        self.rounding = Rounding()
        """What was rounded so far to store it."""
        self.changes: list[str] = []
        """What earlier runs, whose blocks this one takes over, computed with otherwise."""
        self._weights = weights
        self._names = [block.name for block in blocks]
        self._unread: Callable[[], None] | None = None
        self._writer = self._new_writer()
        self._claim(identity)
        """Blocks that are pruned and not finished."""

    def _new_writer(self) -> CheckpointWriter:
        return CheckpointWriter(self.folder, [REST, *self._names], self.encoding.bytes_of(self._weights.total_bytes))

    def _claim(self, identity: Identity) -> None:
        path = self._writer.partial / _IDENTITY
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = None  # without a readable note of whose they are, finished blocks cannot be trusted
        differing = [] if before is None else _changes(before, identity.settings)
        if before is None or (differing and not self._writer.holds_work):
            self._writer.discard()
            self._writer = self._new_writer()
            write_text(path, json.dumps(identity.settings | identity.rounding, indent=2))
            return
        if differing:
            raise BadInput(
                f"{self._writer.partial} is the journal of an unfinished run in which {'; '.join(differing)}",
                field="save_model",
                value=self.folder,
                fix="Finish that run with its own settings, or remove the folder, or choose another name",
            )
        changed = _changes(before, identity.rounding)
        self.changes = [*before.get(_EARLIER, []), *changed]
        if changed:
            now = identity.settings | identity.rounding | {_EARLIER: self.changes}
            write_text(path, json.dumps(now, indent=2))

    def finished(self) -> dict[str, BlockOutcome]:
        """Names of the blocks that an earlier run finished, with what was done in them.

        Only the blocks before the first that is missing or damaged count, since later ones are done again anyway.
        """
        found: dict[str, BlockOutcome] = {}
        for name in self._names:
            remembered = self._writer.recall(name)
            if remembered is None:
                break
            results = _RESULTS.validate_python(remembered["results"])
            self.rounding += Rounding(**remembered.get("rounding", {}))
            found[name] = BlockOutcome(results, load_edits(remembered["edits"]))
        return found

    def settled_before(self) -> dict[str, Any] | None:
        """What an earlier run settled before its first block; None if it did not come so far."""
        try:
            found: dict[str, Any] = json.loads((self._writer.partial / _SETTLED).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found

    def keep_settled(self, settled: Mapping[str, Any]) -> None:
        """Keep what was settled, as JSON, for a later run that goes on."""
        write_text(self._writer.partial / _SETTLED, json.dumps(settled))

    def file(self, block: Block) -> Path:
        """Where a finished block lies until the checkpoint is finished."""
        return self._writer.file(block.name)

    def write_block(self, block: Block, outcome: BlockOutcome, beside: bool = False) -> None:
        """Write a finished block, which is read from there from now on; beside: only once it is settled."""
        self.settle()
        remember: dict[str, Any] = {
            "results": _RESULTS.dump_python(outcome.results, mode="json"),
            "edits": dump_edits(outcome.edits),
        }
        tensors, rounding = self._stored(self._weights.original_tensors(block.name), outcome.edits)
        remember["rounding"] = asdict(rounding)
        self.rounding += rounding
        tensors |= stored_factors(factors_below(block.module, block.name), self._weights.model.dtype)
        beside = beside and not rounding.values
        self._writer.write(block.name, tensors, remember, beside)

        def read() -> None:
            if self._weights.streams or rounding.values:
                self._weights.read_from(self._writer.file(block.name), uncut_by(outcome.edits))
            if rounding.values:
                self._weights.acquire(block.name)  # what follows computes with what was rounded

        if beside:
            self._unread = read
        else:
            read()

    def _stored(self, tensors: Mapping[str, Tensor], edits: Sequence[Edit]) -> tuple[dict[str, Tensor], Rounding]:
        """What is written of dense tensors of the source, by names there, and what was rounded for that."""
        found, rounding = dict[str, Tensor](), Rounding()
        for name, tensor in tensors.items():
            if not any(edit.leaves_out(name) for edit in edits):
                kept = [slices for edit in edits if (slices := edit.slices(name)) is not None]
                stored, own = self.encoding.store(name, tensor, kept)
                found, rounding = found | stored, rounding + own
        return found, rounding

    def settle(self) -> None:
        """Wait until the last finished block is on the disk and noted, and let one written beside be read from there."""
        self._writer.settle()
        if self._unread is not None:
            read, self._unread = self._unread, None
            read()

    def finish(self, beside: Companions, edits: Edits, check: Callable[[Path], object]) -> None:
        """Write what lies outside the blocks and beside the weights, and give the folder its final name.

        Args:
            beside: what makes a folder of weights a model.
            edits: what was done to the model.
            check: called with the whole checkpoint before it gets its name.
        """
        partial = self._writer.partial
        rest = self._weights.rest_tensors(self._names)
        self._writer.write(REST, self._stored(rest, edits.by_block.get(REST, ()))[0])
        self._weights.write_companions(partial, beside)
        edits.write(partial, beside.source)
        change_config(partial, edits.configure, partial_of(self.encoding.configure, place=edits.place))
        self.encoding.complete(partial, edits.place)
        if factors := factors_below(self._weights.model):
            write_adapter(partial / ADAPTER_FOLDER, self._weights.model, factors)
        self._writer.finish([_IDENTITY, _SETTLED], check, edits.place, self.encoding)

    def discard(self) -> None:
        """Remove what was written; the run is over and nobody asked for the model."""
        self._writer.discard()


def may_round_otherwise(recipe: Recipe) -> bool:
    """Whether a run may go on with settings on which only last bits hang.

    Not where a step of training takes one batch, nor where what goes from one block must fit what goes from the others.
    """
    fits = recipe.remove.parts or recipe.prune.reshapes
    return not (recipe.prune.reconstruct.steps or fits)


def weighs_blocks(recipe: Recipe) -> bool:
    """Whether blocks are weighed by what a run does with all of the model in memory, and by something else without."""
    if not recipe.remove.parts:
        return False  # options of the same name are others for zeros
    from coprune.run.to_removal import ByError, spreading_named

    by = spreading_named(recipe.prune.allocation)
    return isinstance(by, ByError) and by.tokens > 0


def run_identity(
    recipe: Recipe, model_fingerprint: str, data_fingerprint: str | None, streams: bool = False
) -> Identity:
    """What a run is by its recipe, its model and its data. streams: whether the model's blocks stay on the disk."""
    settings, rounding = recipe.deciding(Decides.RESULT), recipe.deciding(Decides.ROUNDING)
    if not may_round_otherwise(recipe):
        settings, rounding = settings | rounding, {}
    if recipe.prune.allocation.is_file:
        settings["allocation file"] = Path(recipe.prune.allocation.name).read_text(encoding="utf-8")
    if (kept := recipe.remove.kept_scores) is not None and kept.is_file():
        settings["experts' scores"] = hashlib.sha256(kept.read_bytes()).hexdigest()
    if weighs_blocks(recipe):
        settings["what blocks are weighed by"] = "hidden states" if streams else "logits"
    known = {**settings, "model weights": model_fingerprint, "calibration tokens": data_fingerprint}
    return Identity(known, rounding)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what an unfinished run differs from this one."""
    written = json.loads(json.dumps(now))
    return [
        f"{key} was {before.get(key)!r} and is {value!r}" for key, value in written.items() if before.get(key) != value
    ]
