"""The blocks that a walk holds: one, or so many as a caller may change together."""

from __future__ import annotations

from collections.abc import Callable

from coprune.model.blocks import Block
from coprune.model.checkpoint.weights import Weights
from coprune.model.walk.recording import Recording


class Held:
    """Blocks whose weights are real, in their order; a new one is held until so many less one after it are done."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.blocks: list[Block] = []

    def take(self, block: Block, following: Block | None) -> None:
        """Make a block's weights real, and expect the following one's."""
        self._weights.acquire(block.name)
        self.blocks.append(block)
        if following is not None:
            self._weights.expect(following.name)

    def let_go(self, count: int) -> None:
        """Let go of the first ones."""
        leaving, self.blocks = self.blocks[:count], self.blocks[count:]
        for block in leaving:
            self._weights.release(block.name)

    def run(self, recording: Recording, leaving: int, advance: Callable[[float], None]) -> None:
        """Run the blocks on the inputs of the first, as they are now; what those leave that leave is what enters next."""
        entering = recording.entering
        assert entering is not None
        for batch in range(len(entering)):
            hidden = entering[batch]
            for position, block in enumerate(self.blocks, 1):
                hidden = recording.run(block, batch, hidden)
                if position == leaving:
                    entering[batch] = hidden
            recording.hidden[batch] = hidden
            advance(1 / len(entering))
