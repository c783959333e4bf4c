"""Fold a permutation of a matrix's inputs into what produces them, so that the model computes what it did before.

The inputs of a down projection are, channel by channel, what rows of the gate and up projections give; those of an
output projection what rows of the value projection give, within each head, also where query and key are in the same matrix.
Which matrices these are is not known by name: every arrangement that fits by its shapes is tried with a random permutation on
a recorded call of the block, and only one that leaves the block's output as it was (while the permutation without its
producers does not) is taken.
Inputs that come from the residual stream through a norm (query, key, value, gate, up) stay as they are: permuting them
would mean permuting the stream of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coprune.model.matrices import Matrix

# A folded permutation only changes the order of additions; a wrong one changes everything.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_HALF_TOLERANCE = 3e-2


Fused = Literal["stacks", "together"]


@dataclass(frozen=True)
class Layout:
    """How rows of a producer become inputs of a consumer: channels that may be permuted among each other.

    segments: permutations that are independent of each other (key-value heads), each of `size` channels; repeats: how
    many times in a row the consumer has each segment (query heads per key-value head); copies: rows of a producer for
    each channel (2 where gate and up are one matrix), interleaved or one stack after the other; fused: where the producer
    gives queries and keys too, whether all queries, all keys and all values are three stacks, or each segment's stand together.
    """

    segments: int
    size: int
    repeats: int = 1
    copies: int = 1
    interleaved: bool = False
    fused: Fused | None = None

    def columns(self, orders: Tensor) -> Tensor:
        """The order of the consumer's inputs. orders: segments × size int64, within each segment."""
        starts = torch.arange(self.segments * self.repeats)[:, None] * self.size
        return (orders.repeat_interleave(self.repeats, dim=0) + starts).reshape(-1)

    def rows(self, orders: Tensor) -> Tensor:
        """The order of the producer's outputs."""
        if self.fused is not None:
            rows = torch.arange(self.segments * (self.repeats + 2) * self.size)
            values = self._rows_of_values(rows)
            rows[values] = values.gather(1, orders)
            return rows
        channels = (orders + torch.arange(self.segments)[:, None] * self.size).reshape(-1)
        copy = torch.arange(self.copies)
        if self.interleaved:
            return (channels[:, None] * self.copies + copy).reshape(-1)
        return (channels + copy[:, None] * len(channels)).reshape(-1)

    def _rows_of_values(self, rows: Tensor) -> Tensor:
        """Those of a fused producer's outputs that are values: segments × size."""
        if self.fused == "stacks":
            return rows[-self.segments * self.size :].view(self.segments, self.size).clone()
        return rows.view(self.segments, self.repeats + 2, self.size)[:, -1].clone()

    def rows_of(self, units: Tensor) -> Tensor:
        """What is said of every unit (of every segment, or channel where there is one), said of every row of the producer."""
        if self.fused == "together":
            return units.repeat_interleave((self.repeats + 2) * self.size)
        if self.fused == "stacks":
            return torch.cat([units.repeat_interleave(times * self.size) for times in (self.repeats, 1, 1)])
        channels = units if len(units) == self.segments * self.size else units.repeat_interleave(self.size)
        return channels.repeat_interleave(self.copies) if self.interleaved else channels.repeat(self.copies)

    def scores(self, score: Tensor) -> Tensor:
        """Every segment's scores, with those of its repeats below each other. score: O × I → segments × O' × size."""
        parts = score.reshape(score.shape[0], self.segments, self.repeats, self.size)
        return parts.permute(1, 2, 0, 3).reshape(self.segments, -1, self.size)


@dataclass(frozen=True)
class Fold:
    """A consumer with its producers: one matrix each, or all experts of a parameter side by side."""

    layout: Layout
    consumers: tuple[Matrix, ...]
    producers: tuple[tuple[Matrix, ...], ...]
    """For each consumer what produces its inputs."""

    def apply(self, orders: Sequence[Tensor]) -> None:
        """Permute in place. orders: for each consumer, segments × size int64."""
        self.permute_consumers(orders)
        for producers, order in zip(self.producers, orders, strict=True):
            for producer in producers:
                _permute_outputs(producer, self.layout.rows(order))

    def permute_consumers(self, orders: Sequence[Tensor]) -> None:
        """Permute the inputs of the consumers alone, in place, which changes what the model computes."""
        for consumer, order in zip(self.consumers, orders, strict=True):
            consumer.write(consumer.read()[:, self.layout.columns(order).to(consumer.stored().device)])

    def undo(self, orders: Sequence[Tensor]) -> None:
        """Take back `apply`."""
        self.apply([order.argsort(dim=1) for order in orders])


def find_folds(groups: Sequence[Sequence[Matrix]], head_size: int | None, run: Callable[[], Tensor]) -> list[Fold]:
    """Find the matrices of a block whose inputs can be permuted, and prove each on the block's output.

    groups: the block's matrices by the tensor that feeds them, in the order of use; head_size: width of an attention
    head, if it is known; run: runs the block on a sample and returns its output. The weights are as before in the end.
    """
    dense = run()
    units = _by_parameter(groups)
    found = []
    for position, consumers in enumerate(units):
        if len(consumers) != 1:
            continue  # the same inputs feed several matrices
        candidates = (
            fold for producers in reversed(units[:position]) for fold in _candidates(consumers[0], producers, head_size)
        )
        fold = next((fold for fold in candidates if _holds(fold, dense, run)), None)
        if fold is not None:
            found.append(fold)
    return found


def _by_parameter(groups: Sequence[Sequence[Matrix]]) -> list[list[list[Matrix]]]:
    """Groups in the order of use, in which the experts of one parameter count as one entry."""
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


def _candidates(consumer: list[Matrix], producers: list[list[Matrix]], head_size: int | None) -> Iterator[Fold]:
    """Every arrangement that fits by its shapes: all fitting producers together, or one of them."""
    width = consumer[0].shape[1]
    fitting = [p for p in producers if len(p) == len(consumer) and not any(m.name == consumer[0].name for m in p)]
    consumers = sorted(consumer, key=_expert)

    def fold(layout: Layout, chosen: Sequence[list[Matrix]]) -> Fold:
        by_expert = [sorted(producer, key=_expert) for producer in chosen]
        return Fold(layout, tuple(consumers), tuple(zip(*by_expert, strict=True)))

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
    for producer in fitting:
        rows = producer[0].shape[0]
        if head_size and rows % head_size == 0 and width % rows == 0:
            yield fold(Layout(rows // head_size, head_size, repeats=width // rows), [producer])
    for producer in fitting:
        for layout in _fused(width, producer[0].shape[0], head_size):
            yield fold(layout, [producer])


def _fused(width: int, rows: int, head_size: int | None) -> Iterator[Layout]:
    """How query, key and value may be one matrix of so many rows, whose answers make the consumer's so many inputs."""
    if not head_size or width % head_size or (rows - width) % (2 * head_size) or rows <= width:
        return
    heads, segments = width // head_size, (rows - width) // (2 * head_size)
    if heads % segments == 0:
        ways: tuple[Fused, ...] = ("stacks", "together")
        yield from (Layout(segments, head_size, repeats=heads // segments, fused=way) for way in ways)


def _expert(matrix: Matrix) -> int:
    return matrix.expert or 0


def _holds(fold: Fold, dense: Tensor, run: Callable[[], Tensor]) -> bool:
    """Whether a random permutation leaves the block's output as it was, and would not without its producers."""
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


def close(output: Tensor, dense: Tensor) -> bool:
    """Whether two outputs differ by rounding alone, token by token. … × H, of one dtype."""
    tolerance = _TOLERANCE.get(dense.dtype, _HALF_TOLERANCE)
    a, b = output.to(torch.float32), dense.to(torch.float32)
    return bool(((a - b).norm(dim=-1) <= tolerance * b.norm(dim=-1)).all())


def _permute_outputs(matrix: Matrix, rows: Tensor) -> None:
    """Put a matrix's outputs, with their biases, into another order."""
    order = rows.to(matrix.stored().device)
    matrix.write(matrix.read()[order])
    bias = bias_of(matrix)
    if bias is not None:
        with torch.no_grad():
            bias.copy_(bias[order])


def bias_of(matrix: Matrix) -> Tensor | None:
    """One value per output, beside the weight; for an expert its row of the parameter `…_bias`. A view."""
    name = "bias" if matrix.expert is None else f"{matrix.attribute}_bias"
    bias = getattr(matrix.owner, name, None)
    if not isinstance(bias, nn.Parameter):
        return None
    return bias.detach() if matrix.expert is None else bias.detach()[matrix.expert]


def head_size(model: Any) -> int | None:
    """Width of an attention head by the configuration, if it says so."""
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None)
    if size is None:
        heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
        # Where stages have numbers of their own, a list says them.
        size = width // heads if isinstance(heads, int) and heads and width else None
    return size
