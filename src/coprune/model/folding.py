"""Fold a permutation of a matrix's inputs into the matrices that produce them, without changing the model's output.

The input channels of a down projection come from rows of the gate and up projections. Those of an output projection come from
rows of the value projection, within each head, even if query and key share its matrix or a gate multiplies the heads' outputs.
No names are used: every arrangement with fitting shapes is tried with a random permutation on a recorded call of the block,
and accepted only if the block's output stays the same (and changes if only the consumers are permuted).
Inputs from the residual stream through a norm (query, key, value, gate, up) cannot be permuted this way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coprune.model.matrices import Matrix


@dataclass(frozen=True)
class Layout:
    """The mapping of a producer's rows to a consumer's inputs: the channels that can be permuted.

    segments: independent permutations (key-value heads), each of `size` channels; repeats: number of consecutive copies of
    each segment in the consumer (query heads per key-value head); copies: rows of a producer per channel (2 if gate and up are
    one matrix), interleaved or stacked; before: rows of the producer before a segment's channels (queries and keys, or keys
    alone); stacks: whether the rows are all queries, then all keys, then all channels.
    """

    segments: int
    size: int
    repeats: int = 1
    copies: int = 1
    interleaved: bool = False
    before: int = 0
    stacks: bool = False

    def columns(self, orders: Tensor) -> Tensor:
        """Return the order of the consumer's inputs. orders: segments × size int64, within each segment."""
        starts = torch.arange(self.segments * self.repeats)[:, None] * self.size
        return (orders.repeat_interleave(self.repeats, dim=0) + starts).reshape(-1)

    def rows(self, orders: Tensor) -> Tensor:
        """Return the order of the producer's outputs."""
        if self.before:
            rows = torch.arange(self.segments * (self.before + self.size))
            values = self._values(rows)
            rows[values] = values.gather(1, orders)
            return rows
        channels = (orders + torch.arange(self.segments)[:, None] * self.size).reshape(-1)
        copy = torch.arange(self.copies)
        if self.interleaved:
            return (channels[:, None] * self.copies + copy).reshape(-1)
        return (channels + copy[:, None] * len(channels)).reshape(-1)

    def channels(self) -> Tensor:
        """Return the producer's outputs that are channels: segments × size int64."""
        return self._values(torch.arange(self.segments * (self.before + self.size)))

    def _values(self, rows: Tensor) -> Tensor:
        """Select the channels from a producer's outputs, skipping the rows before them: segments × size."""
        if self.stacks:
            return rows[-self.segments * self.size :].view(self.segments, self.size).clone()
        return rows.view(self.segments, self.before + self.size)[:, -self.size :].clone()

    def rows_of(self, units: Tensor) -> Tensor:
        """Expand a value per unit (segment, or channel if there is one segment) to every row of the producer."""
        if self.stacks:
            return torch.cat([units.repeat_interleave(times * self.size) for times in (self.repeats, 1, 1)])
        if self.before:
            return units.repeat_interleave(self.before + self.size)
        channels = units if len(units) == self.segments * self.size else units.repeat_interleave(self.size)
        return channels.repeat_interleave(self.copies) if self.interleaved else channels.repeat(self.copies)

    def scores(self, score: Tensor) -> Tensor:
        """Stack every segment's scores over its repeats. score: O × I → segments × O' × size."""
        parts = score.reshape(score.shape[0], self.segments, self.repeats, self.size)
        return parts.permute(1, 2, 0, 3).reshape(self.segments, -1, self.size)

    def is_heads(self) -> bool:
        """Return whether the channels belong to attention heads."""
        return self.segments > 1 or self.repeats > 1 or self.before > 0


@dataclass(frozen=True)
class Heads:
    """Attention heads, as far as the configuration describes them."""

    size: int | None
    """Width of a head."""
    count: int | None
    """Number of query heads."""


def heads_of(model: Any) -> Heads:
    """Read the attention heads from the configuration."""
    config = model.config.get_text_config()
    size, count = getattr(config, "head_dim", None), getattr(config, "num_attention_heads", None)
    # A list has one number per stage.
    count = count if isinstance(count, int) and count else None
    width = getattr(config, "hidden_size", None)
    return Heads(width // count if size is None and count and width else size, count)


def head_size(model: Any) -> int | None:
    """Return the width of an attention head if the configuration has it."""
    return heads_of(model).size


# A correct fold only changes the order of additions; a wrong one changes everything.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_HALF_TOLERANCE = 3e-2
_TOKENS = 64


@dataclass(frozen=True)
class Fold:
    """A consumer with its producers: one matrix each, or all experts of a parameter side by side."""

    layout: Layout
    consumers: tuple[Matrix, ...]
    producers: tuple[tuple[Matrix, ...], ...]
    """Producers of each consumer's inputs."""
    gate: Matrix | None = None
    """The matrix that computes a gate for every input of the only consumer, after each head's queries or by itself."""

    def apply(self, orders: Sequence[Tensor]) -> None:
        """Permute in place. orders: for each consumer, segments × size int64."""
        self.permute_consumers(orders)
        for producers, order in zip(self.producers, orders, strict=True):
            for producer in producers:
                _permute_outputs(producer, self.layout.rows(order))
        if self.gate is not None:
            layout, width = self.layout, self.consumers[0].shape[1]
            gates = Layout(
                layout.segments * layout.repeats, layout.size, before=layout.size * (self.gate.shape[0] // width - 1)
            )
            _permute_outputs(self.gate, gates.rows(orders[0].repeat_interleave(layout.repeats, dim=0)))

    def permute_consumers(self, orders: Sequence[Tensor]) -> None:
        """Permute only the consumers' inputs, in place, which changes the model's output."""
        for consumer, order in zip(self.consumers, orders, strict=True):
            consumer.write(consumer.read()[:, self.layout.columns(order).to(consumer.stored().device)])

    def undo(self, orders: Sequence[Tensor]) -> None:
        """Undo `apply`."""
        self.apply([order.argsort(dim=1) for order in orders])


def find_folds(groups: Sequence[Sequence[Matrix]], heads: Heads, run: Callable[[], Tensor]) -> list[Fold]:
    """Find the matrices of a block whose inputs can be permuted, and prove each on the block's output.

    groups: the block's matrices by input tensor, in the order of use; heads: of its attention, as far as known; run: runs the
    block on a sample and returns its output. The weights are restored.
    """
    dense = run()
    units = _by_parameter(groups)
    found = []
    for position, consumers in enumerate(units):
        if len(consumers) != 1:
            continue  # several matrices share these inputs
        candidates = (
            fold for producers in reversed(units[:position]) for fold in _candidates(consumers[0], producers, heads)
        )
        fold = next((fold for fold in candidates if _holds(fold, dense, run)), None)
        if fold is not None:
            found.append(fold)
    return found


def _by_parameter(groups: Sequence[Sequence[Matrix]]) -> list[list[list[Matrix]]]:
    """Group matrices in the order of use, combining the experts of a parameter to one entry."""
    units: list[list[list[Matrix]]] = []
    experts: dict[str, list[Matrix]] = {}
    for group in groups:
        own = []
        for matrix in group:
            if matrix.expert is None:
                own.append([matrix])
                continue
            name = matrix.name.partition("[")[0]
            if name not in experts:
                experts[name] = []
                own.append(experts[name])
            experts[name].append(matrix)
        if own:
            units.append(own)
    return units


def _candidates(consumer: list[Matrix], producers: list[list[Matrix]], heads: Heads) -> Iterator[Fold]:
    """Yield every arrangement with fitting shapes: all fitting producers together, or one of them."""
    width = consumer[0].shape[1]
    fitting = [p for p in producers if len(p) == len(consumer) and not any(m.name == consumer[0].name for m in p)]
    consumers = sorted(consumer, key=_expert)

    def fold(layout: Layout, chosen: Sequence[list[Matrix]], gate: Matrix | None = None) -> Fold:
        by_expert = [sorted(producer, key=_expert) for producer in chosen]
        return Fold(layout, tuple(consumers), tuple(zip(*by_expert, strict=True)), gate)

    alike = [p for p in fitting if p[0].shape[0] == width]
    if len(alike) > 1:
        yield fold(Layout(1, width), alike)
    for producer in fitting:
        rows = producer[0].shape[0]
        if rows == width:
            yield fold(Layout(1, width), [producer])
        elif rows == 2 * width:
            yield fold(Layout(1, width, copies=2), [producer])
            yield fold(Layout(1, width, copies=2, interleaved=True), [producer])
    values = [(p, layout) for p in fitting for layout in _of_heads(width, p[0].shape[0], heads.size)]
    for producer, layout in values:
        yield fold(layout, [producer])
    for producer in fitting:
        for layout in _beside_keys(width, producer[0].shape[0], heads):
            yield fold(layout, [producer])
    for producer, layout in values:
        for other in fitting:
            if other is not producer and other[0].expert is None and other[0].shape[0] in (width, 2 * width):
                yield fold(layout, [producer], other[0])


def _of_heads(width: int, rows: int, size: int | None) -> Iterator[Layout]:
    """Yield layouts of `rows` as the heads' values behind the consumer's `width` inputs."""
    if size and rows % size == 0 and width % rows == 0:
        yield Layout(rows // size, size, repeats=width // rows)


def _beside_keys(width: int, rows: int, heads: Heads) -> Iterator[Layout]:
    """Yield layouts of values stored with queries and keys, or with heads' projections of compressed keys and values."""
    if rows <= width:
        return
    if (size := heads.size) and width % size == 0 and (rows - width) % (2 * size) == 0:
        count, segments = width // size, (rows - width) // (2 * size)
        if count % segments == 0:
            repeats = count // segments
            ways = (
                Layout(segments, size, repeats, before=(repeats + 1) * size, stacks=stacks) for stacks in (True, False)
            )
            yield from ways
    if (count := heads.count or 0) and width % count == 0 and rows % count == 0:
        yield Layout(count, width // count, before=(rows - width) // count)


def _expert(matrix: Matrix) -> int:
    return matrix.expert or 0


def _holds(fold: Fold, dense: Tensor, run: Callable[[], Tensor]) -> bool:
    """Return whether a random permutation preserves the block's output, and permuting the consumers alone does not."""
    generator = torch.Generator().manual_seed(0)
    layout = fold.layout
    orders = [
        torch.stack([torch.randperm(layout.size, generator=generator) for _ in range(layout.segments)])
        for _ in fold.consumers
    ]
    fold.apply(orders)
    same = close(run(), dense)
    fold.undo(orders)
    if not same:
        return False
    fold.permute_consumers(orders)
    without = close(run(), dense)
    fold.permute_consumers([order.argsort(dim=1) for order in orders])
    return not without


def close(output: Tensor, dense: Tensor, blocks: int = 1) -> bool:
    """Return whether two outputs (… × H, of one dtype) differ only by rounding, token by token.

    blocks: number of consecutive blocks that round.
    """
    tolerance = min(blocks * _TOLERANCE.get(dense.dtype, _HALF_TOLERANCE), _HALF_TOLERANCE)
    apart, norms = distances(output, dense)
    return bool((apart <= tolerance * norms).all())


def distances(output: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norms of two outputs' difference (… × H) and of the second output, per token in float32.

    Computed a few tokens at a time, since logits in float32 can take more memory than the model.
    """
    width, apart, norms = dense.shape[-1], [], []
    for a, b in zip(output.reshape(-1, width).split(_TOKENS), dense.reshape(-1, width).split(_TOKENS), strict=True):
        given, wanted = a.float(), b.float()
        apart.append((given - wanted).norm(dim=-1))
        norms.append(wanted.norm(dim=-1))
    return torch.cat(apart), torch.cat(norms)


def _permute_outputs(matrix: Matrix, rows: Tensor) -> None:
    """Permute a matrix's outputs with its bias."""
    order = rows.to(matrix.stored().device)
    matrix.write(matrix.read()[order])
    bias = bias_of(matrix)
    if bias is not None:
        with torch.no_grad():
            bias.copy_(bias[order])


def bias_of(matrix: Matrix) -> Tensor | None:
    """Return a view of a weight's bias; for an expert, its row of the parameter `…_bias`."""
    name = "bias" if matrix.expert is None else f"{matrix.attribute}_bias"
    bias = getattr(matrix.owner, name, None)
    if not isinstance(bias, nn.Parameter):
        return None
    return bias.detach() if matrix.expert is None else bias.detach()[matrix.expert]
