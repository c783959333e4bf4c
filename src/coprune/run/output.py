"""The finished blocks of a run: written by the first process, read by all, and reused by a resumed run.

Each finished block is one file of the future checkpoint, with a note of its figures. A later run with the same recipe,
model and data reuses the intact ones and does the rest. Nothing gets its final name before the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial as partial_of
from pathlib import Path
from typing import Any

from pydantic import RootModel, TypeAdapter
from safetensors.torch import load_file
from torch import Tensor

from coprune.base.devices import in_host_memory
from coprune.base.errors import LostProcess
from coprune.base.processes import Processes
from coprune.base.words import Setting
from coprune.model.blocks import Block
from coprune.model.checkpoint.companions import Companions, change_config
from coprune.model.checkpoint.encoding import DENSE, Encoding
from coprune.model.checkpoint.formats import Rounding
from coprune.model.checkpoint.writer import REST, SHARED, CheckpointWriter
from coprune.model.edit import Edit
from coprune.model.edits import Edits, dump_edits, load_edits, uncut_by
from coprune.model.walk.model_structure import FoundModel
from coprune.pruning.block_training import BlockTraining
from coprune.pruning.pruner import MatrixResult
from coprune.report.run_events import AnyEvent, ResumedOtherwise
from coprune.store.notes import read_note, write_note
from coprune.store.place import FILE as PLACE_FILE
from coprune.store.place import Identity, Place

_SETTLED = "settled.json"


class _Settled(RootModel[dict[str, Any]]):
    """Choices made before the first block."""


@dataclass(frozen=True)
class BlockOutcome:
    """Result of one block: figures of its matrices, and its edits."""

    results: list[MatrixResult]
    edits: list[Edit]
    training: BlockTraining | None = None
    """Training of the block, if it was trained."""
    rounded: Rounding = field(default_factory=Rounding)
    """Rounding to the source's grid while pruning; for a block of an earlier run, also for storage."""


_RESULTS = TypeAdapter(list[MatrixResult])
_TRAINING = TypeAdapter(BlockTraining | None)


def _remembered(outcome: BlockOutcome, rounding: Rounding) -> dict[str, Any]:
    """Return a block's note for a later run, as JSON. rounding: while pruning and for storage."""
    return {
        "results": _RESULTS.dump_python(outcome.results, mode="json"),
        "edits": dump_edits(outcome.edits),
        "training": _TRAINING.dump_python(outcome.training, mode="json"),
        "rounding": asdict(rounding),
    }


@dataclass(frozen=True)
class Destination:
    """Folder of the blocks, with the identity of their run."""

    folder: Path
    """Final folder of the checkpoint."""
    keep: bool
    """Whether the checkpoint is kept, or only holds blocks that a streamed run cannot keep in memory."""
    identity: Identity
    encoding: Encoding = DENSE


class Output:
    """Finished blocks of a run and the checkpoint made of them.

    Args:
        processes: of the run; each has an Output.
        model: whose blocks are finished in order; blocks that a forward skips come first, unchanged.
        to: where the blocks are written; None if nothing is written, and in every process but the first.

    Raises:
        BadInput: the folder is in use, or holds another run's blocks.
    """

    def __init__(self, processes: Processes, model: FoundModel, to: Destination | None) -> None:
        self.outcomes: dict[str, BlockOutcome] = {}
        """Outcome of every finished block, by this run or an earlier one."""
        self.rounding = Rounding()
        """Rounding for storage so far."""
        self.changes: list[AnyEvent] = []
        """Differences to the earlier runs whose blocks are reused."""
        self.keep = to is not None and to.keep
        self.encoding = DENSE if to is None else to.encoding
        self._processes, self._weights, self._passed = processes, model.weights, model.passed
        self._names = [block.name for block in model.every_block]
        self._shared = [uses[0].parameter for uses in model.chosen.several]
        self._writer = None if to is None else self._claimed(to)

    def _claimed(self, to: Destination) -> CheckpointWriter:
        def writer() -> CheckpointWriter:
            total = to.encoding.bytes_of(self._weights.total_bytes)
            return CheckpointWriter(to.folder, [REST, *self._names], total)

        found = writer()
        place = Place(found.partial, to.identity)
        if not place.takes_up(found.holds_work, "save_model", to.folder):
            found.discard()  # blocks without a readable note of their run cannot be trusted
            found = writer()
            place.begin()
        changes = place.identity.changes()
        self.changes = [ResumedOtherwise(setting=name, before=before, now=now) for name, before, now in changes]
        return found

    def finished(self) -> dict[str, BlockOutcome]:
        """Return the outcomes of blocks finished by an earlier run, as found by the first process.

        Only blocks before the first missing or damaged one count, since later ones are redone anyway; and none count without
        the shared weights, which are pruned before them.
        """
        found = self._processes.from_first(lambda: dict(self._recalled()))
        self.outcomes |= found
        unchanged = {block.name for block in self._passed}
        return {name: outcome for name, outcome in found.items() if name not in unchanged}

    def _recalled(self) -> Iterator[tuple[str, BlockOutcome]]:
        if self._shared and self._recall(SHARED) is None:
            return
        for name in self._names:
            if (outcome := self._recall(name)) is None:
                return
            self.rounding += outcome.rounded
            yield name, outcome

    def _recall(self, part: str) -> BlockOutcome | None:
        remembered = None if self._writer is None else self._writer.recall(part)
        if remembered is None:
            return None
        results = _RESULTS.validate_python(remembered["results"])
        training = _TRAINING.validate_python(remembered.get("training"))
        rounded = Rounding(**remembered.get("rounding", {}))
        return BlockOutcome(results, load_edits(remembered["edits"]), training, rounded)

    def shared_before(self) -> BlockOutcome | None:
        """Restore shared weights pruned by an earlier run; None if it did not get that far."""
        outcome = self._processes.from_first(lambda: self._recall(SHARED))
        if outcome is not None:
            self.rounding += outcome.rounded
            for name, values in load_file(self._file_of(SHARED)).items():
                self._weights.model.get_parameter(name).data.copy_(values)
        return outcome

    def write_shared(self, outcome: BlockOutcome) -> None:
        """Save the pruned shared weights for a resumed run."""
        self.rounding += outcome.rounded
        if self._writer is not None:
            tensors = {name: self._weights.model.get_parameter(name) for name in self._shared}
            self._writer.write(SHARED, tensors, _remembered(outcome, outcome.rounded))

    @property
    def trainings(self) -> list[BlockTraining]:
        """Trainings of the blocks finished so far."""
        return [outcome.training for outcome in self.outcomes.values() if outcome.training is not None]

    def edits(self, *rest: Edit) -> Edits:
        """Return the edits of the whole model once all blocks are finished. rest: edits outside the blocks."""
        return Edits({name: self.outcomes[name].edits for name in self._names} | {REST: [*rest]})

    def settled_before(self) -> dict[str, Any] | None:
        """Return the choices of an earlier run before its first block; None if it did not get that far."""

        def read() -> dict[str, Any] | None:
            note = None if self._writer is None else read_note(self._writer.partial / _SETTLED, _Settled)
            return None if note is None else note.record.root

        return self._processes.from_first(read)

    def keep_settled(self, settled: Mapping[str, Any]) -> None:
        """Save choices, as JSON, for a resumed run."""
        if self._writer is not None:
            write_note(self._writer.partial / _SETTLED, _Settled(dict(settled)))

    def restore(self, block: Block) -> None:
        """Restore a block finished by an earlier run."""
        edits = self.outcomes[block.name].edits
        self._weights.read_from(self._file_of(block.name), uncut_by(edits))
        self._weights.acquire(block.name)
        for edit in edits:
            edit.apply(block.module)

    def write_block(self, block: Block, outcome: BlockOutcome) -> None:
        """Write a finished block; a streamed model reads it from its file from now on."""
        self.outcomes[block.name] = outcome
        if self._writer is not None:
            self._write(self._writer, block, outcome)
        coded = self._weights.stored_as is not None
        if self._processes.size > 1 and (self._weights.streams or coded):
            self._weights.read_from(self._file_of(block.name), uncut_by(outcome.edits))
            if coded:
                self._weights.acquire(block.name)  # with the rounded values

    def _write(self, writer: CheckpointWriter, block: Block, outcome: BlockOutcome) -> None:
        writer.settle()
        tensors, rounding = self._stored(self._weights.original_tensors(block.name), outcome.edits)
        self.rounding += rounding + outcome.rounded

        def ready() -> None:
            if self._weights.streams or rounding.values:
                self._weights.read_from(writer.file(block.name), uncut_by(outcome.edits))
            if rounding.values:
                self._weights.acquire(block.name)  # later blocks need the rounded values

        # Tensors on a device are copied anyway; in host memory this would keep one more block.
        there = all(not in_host_memory(tensor.device) for tensor in block.module.parameters())
        writer.write(
            block.name,
            tensors,
            _remembered(outcome, rounding + outcome.rounded),
            beside=there and self._processes.size == 1 and not rounding.values,
            ready=ready,
        )

    def _stored(self, tensors: Mapping[str, Tensor], edits: Sequence[Edit]) -> tuple[dict[str, Tensor], Rounding]:
        """Encode dense tensors for writing; return them with the rounding that took."""
        found, rounding = dict[str, Tensor](), Rounding()
        for name, tensor in tensors.items():
            if not any(edit.leaves_out(name) for edit in edits):
                kept = [slices for edit in edits if (slices := edit.slices(name)) is not None]
                stored, own = self.encoding.store(name, tensor, kept)
                found, rounding = found | stored, rounding + own
        return found, rounding

    def write_skipped(self) -> None:
        """Write the blocks that a forward skips, unless an earlier run did."""
        for block in self._passed:
            if block.name not in self.outcomes:
                self._weights.acquire(block.name)
                self.write_block(block, BlockOutcome([], []))
                self._weights.release(block.name)

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Finish pending writes and checks at the end of the body, even after an error."""
        try:
            yield
        finally:
            if self._writer is not None:
                self._writer.settle()

    def _file_of(self, part: str) -> Path:
        """Return the path of a block that the first process wrote. part: the block's name, or `SHARED`."""
        writer = self._writer
        file = self._processes.from_first(lambda: None if writer is None else writer.file(part).resolve())
        assert file is not None
        if not file.is_file():
            raise LostProcess(
                f"process {self._processes.rank} cannot see {file}, which process 0 wrote: all processes need a "
                "shared file system",
                fix=("name folders on one with ", Setting("save"), " and ", Setting("save_model")),
            )
        return file

    def finish(self, beside: Companions, edits: Edits, check: Callable[[Path], object]) -> None:
        """Write everything outside the blocks and beside the weights, and give the folder its final name.

        Args:
            beside: the files that make a folder of weights a model.
            edits: the edits of the model.
            check: called with the whole checkpoint before it gets its name.
        """
        writer = self._writer
        assert writer is not None
        partial = writer.partial
        rest = self._weights.rest_tensors(self._names)
        writer.write(REST, self._stored(rest, edits.by_block.get(REST, ()))[0])
        self._weights.write_companions(partial, beside)
        edits.write(partial, beside.source)
        change_config(partial, edits.configure, partial_of(self.encoding.configure, place=edits.place))
        self.encoding.complete(partial, edits.place)
        writer.finish([PLACE_FILE, _SETTLED], check, edits.place)

    def discard(self) -> None:
        """Delete what was written after a run whose model is not kept."""
        if self._writer is not None:
            self._writer.discard()
