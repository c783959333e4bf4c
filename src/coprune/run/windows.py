"""Blocks from when they are pruned until they are written: trained alone or in windows, if that is asked for.

A block is written when no training changes it any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from coprune.model.blocks import Block
from coprune.model.walk.recording import Recording
from coprune.model.walk.shown import BlockDone
from coprune.pruning.pruner import MatrixResult
from coprune.pruning.reconstructed import reconstruct_blocks
from coprune.run.journal import BlockOutcome
from coprune.run.session import Session
from coprune.run.share import SharedOutput

Results = dict[str, list[MatrixResult]]
"""What became of the matrices of every block, by its name."""


@dataclass(frozen=True)
class Earlier:
    """What an earlier run left."""

    finished: Mapping[str, BlockOutcome]
    """Blocks that it finished."""
    held: Results
    """Those after them that were pruned, and still held for a window."""
    restore: Callable[[Block], None]
    """Gives any of them its weights."""


def left_by_earlier(session: Session, shared: SharedOutput) -> Earlier:
    """The blocks that an earlier run finished, as far as what it held after them is known."""
    finished, blocks = dict(shared.finished()), session.model.blocks
    held: Results | None = {}
    if session.window > 1:
        while 0 < len(finished) < len(blocks) and (held := shared.held(len(finished) - 1)) is None:
            finished.popitem()
    known, last = {} if held is None or not finished else held, len(finished) - 1

    def restore(block: Block) -> None:
        if block.name in known:
            shared.restore_held(last, block)
        else:
            shared.restore(block)

    return Earlier(finished, known, restore)


class Windows:
    """Takes pruned blocks, trains them, and says which are done. held: those of an earlier run that are not."""

    def __init__(self, session: Session, shared: SharedOutput, held: Results) -> None:
        self._reconstruction = session.reconstruction
        self._shared = shared
        self._results = dict(held)

    def trained(self, done: BlockDone, recording: Recording | None, results: list[MatrixResult]) -> Results:
        """Train a block that was pruned, with those that are held beside it; returns what became of those that leave."""
        self._results[done.block.name] = results
        if self._reconstruction is not None and recording is not None:
            self._results = reconstruct_blocks(self._reconstruction, done, recording, self._results)
        leaving, held = done.window[: done.leaving], done.window[done.leaving :]
        if held and leaving:
            self._shared.keep_held(leaving[-1], held, self._results)
        return {block.name: self._results.pop(block.name) for block in leaving}
