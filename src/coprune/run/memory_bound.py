"""An upper bound of a run's memory, computed before it starts from the model's shapes alone.

Every phase holds the process as it is, the weights it needs and its tensors; the largest phase is the bound. The factors
were measured over models and methods, and tests compare them with live tensors.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from coprune.base.devices import device_memory, in_host_memory
from coprune.base.errors import BadInput
from coprune.base.memory import available_bytes, resident_memory, unread_weights
from coprune.data.text import lengths_of
from coprune.data.windows import EvaluationText, Windows
from coprune.evaluation.batches import SLICE_VALUES, default_batch_size
from coprune.evaluation.tasks.text_task import PROBED, samples_per_batch
from coprune.model.blocks import Block
from coprune.model.checkpoint.lazy import fetches
from coprune.model.leftovers import lists_of
from coprune.model.loaded_model import Loaded, keeps_experts, streams
from coprune.model.matrices import Matrix
from coprune.model.verification import COMPARED_TOKENS
from coprune.model.walk.activations import GIB, device_room
from coprune.model.walk.inputs import InputSample
from coprune.model.walk.model_structure import FoundModel
from coprune.pruning.pruner import Solver
from coprune.recipe.recipe import Recipe
from coprune.recipe.structure import COMPARED_BY_KL, KL_ROWS, MAP_CANDIDATES, MAP_SPANS, MAP_TOKENS, MIXES, REFIT_TOKENS
from coprune.recipe.train_part import has_adapters, has_teacher
from coprune.run.memory_estimate import DevicePeak, Estimate, Proposal
from coprune.training.footprint import training_bytes

SLACK = 1.1
"""Factor over the counted tensors for memory that the allocator does not return at once."""
STEADY, STEADY_IN_HALF = 20 << 20, 90 << 20
"""Memory that any run adds: late imports, compiled kernels; more for products in half precision."""
OF_WEIGHT, OF_INPUTS, WORKSPACE = 11, 4, 16 << 20
"""Float32 copies of a matrix and of a Gram matrix that solving takes at most, and the libraries' workspace in bytes."""
_TOP = re.compile(r"(?=.*(?:expert|moe)).*(?:per_tok|top_?k|moe_k)")
"""Names in configurations for the number of experts per token."""


@dataclass(frozen=True)
class Shapes:
    """The sizes that decide a model's memory; sizes of a block are those of the largest."""

    total_bytes: int
    rest_bytes: int
    """Bytes of the parameters outside the blocks, and of those that several blocks share."""
    block_bytes: int
    blocks: int
    itemsize: int
    """Bytes of a value in computation."""
    hidden: int
    vocabulary: int
    live: int
    """Values per token alive at once while a block runs, besides its input."""
    waiting: int
    """Values per token alive while a matrix within a block waits to be pruned."""
    kept: int
    """Values per token that a training keeps for the backward pass."""
    heads: int
    """Number of heads whose scores, one value per token and position, are whole tensors; 0 if attention is fused."""
    statistics: int
    """Bytes of the statistics of all matrices of a block, as if none shared inputs."""
    statistic: int
    """Bytes of the statistics gathered at once when matrices are pruned one after another."""
    shared: int
    """Bytes of the statistics of shared matrices: those of all blocks together, and one block's besides."""
    shared_weights: int
    """Bytes of the matrices that blocks share, if they are pruned."""
    solve: int
    """Bytes that solving the largest matrix takes."""
    experts: int
    """Bytes of the experts of the largest block; `expert` of the tensors that one of them is decoded from."""
    expert: int
    written: int
    """Bytes written for the largest block, in the source's encoding."""
    writers: int
    """Inputs of the widest matrix, not of an expert, that writes hidden states."""

    @classmethod
    def of(cls, loaded: Loaded, found: FoundModel, solver: Solver, removes: bool) -> Shapes:
        """Read a model's shapes. removes: whether parts are removed; then only matrices that write hidden states are solved."""
        config = loaded.model.config.get_text_config()
        sizes = [sum(parameter.nbytes for parameter in block.module.parameters()) for block in found.blocks]
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        embedded = next((m.weight.shape[1] for m in loaded.model.modules() if isinstance(m, nn.Embedding)), 0)
        hidden = int(getattr(config, "hidden_size", 0) or embedded)
        heads = getattr(config, "num_attention_heads", 0) if config._attn_implementation == "eager" else 0
        block, candidates = found.blocks[largest], found.chosen.candidates[largest]
        live, waiting, kept = _values_per_token(block, _stored(block, candidates), config, hidden)
        pruned = [_stored(block, own) for block, own in zip(found.blocks, found.chosen.blocks, strict=True)]
        if removes:
            pruned = [[one for one in own if one.outputs == hidden] or own for own in pruned]
        sums = [[one.count * one.statistic_bytes(solver) for one in own] for own in pruned]
        grams = removes or any(len(size) == 2 for size in _sums(solver, 1))
        several = _stored(block, [uses[0] for uses in found.chosen.several])
        solved = [
            one.solve_bytes(grams) for own in [*pruned, several, _stored(block, found.chosen.outside)] for one in own
        ]
        head = loaded.model.get_output_embeddings()
        stacks = [parameter for parameter in block.module.parameters() if parameter.ndim == 3]
        shared = {id(p): p.nbytes for p in map(loaded.model.get_parameter, found.chosen.shared)}
        rest = sum(tensor.nbytes for tensor in loaded.weights.rest_tensors(found.names).values())
        return cls(
            total_bytes=loaded.weights.total_bytes,
            rest_bytes=rest + sum(shared.values()),
            block_bytes=sizes[largest],
            blocks=len(sizes),
            itemsize=loaded.model.dtype.itemsize,
            hidden=hidden,
            vocabulary=0 if head is None else len(head.weight),
            live=live,
            waiting=waiting,
            kept=kept,
            heads=heads if isinstance(heads, int) else max(heads),
            statistics=max(map(sum, sums)),
            statistic=max((size for own in sums for size in own), default=0),
            shared=2 * sum(one.statistic_bytes(solver) for one in several),
            shared_weights=sum(loaded.model.get_parameter(uses[0].parameter).nbytes for uses in found.chosen.several),
            solve=max(solved, default=0),
            experts=sum(stack.nbytes for stack in stacks),
            expert=sum(stack.nbytes // len(stack) for stack in stacks),
            written=int(sizes[largest] * loaded.weights.stored_share),
            writers=max((one.inputs for own in pruned for one in own if not one.experts), default=0),
        )


@dataclass(frozen=True)
class _Stored:
    """The matrices in one parameter: one, or one per expert."""

    outputs: int
    inputs: int
    count: int
    experts: int
    """Number of experts to choose among; 0 for a matrix that every token uses."""

    def statistic_bytes(self, solver: Solver) -> int:
        """Return the size of one matrix's statistics in bytes."""
        return 4 * (sum(map(math.prod, _sums(solver, self.inputs))) + InputSample.tokens * self.inputs)

    def solve_bytes(self, grams: bool) -> int:
        """Return the bytes that solving one matrix takes. grams: whether from a Gram matrix, which is factorised."""
        squares = OF_INPUTS * self.inputs**2 if grams else 0
        return 4 * (OF_WEIGHT * self.outputs * self.inputs + squares) + WORKSPACE


def _sums(solver: Solver, inputs: int) -> list[tuple[int, ...]]:
    """Return the shapes of a matrix's sums."""
    return [] if solver.statistic is None else [*solver.statistic.shapes(inputs).values()]


def _stored(block: Block, matrices: Sequence[Matrix]) -> list[_Stored]:
    """Group a block's matrices by parameter."""
    counts, lists = Counter(matrix.parameter for matrix in matrices), lists_of(block)
    found = []
    for parameter, matrix in {matrix.parameter: matrix for matrix in matrices}.items():
        length = next((size for path, size in lists.items() if parameter.startswith(f"{path}.")), 0)
        experts = length if matrix.expert is None else matrix.stacked
        found.append(_Stored(*matrix.shape, counts[parameter], experts))
    return found


def _values_per_token(block: Block, stored: Sequence[_Stored], config: Any, hidden: int) -> tuple[int, int, int]:
    """Return the values per token alive in a block: at once, while a matrix waits, and for a backward pass."""
    said = ((name, value) for name, value in config.to_dict().items() if _TOP.match(name) and isinstance(value, int))
    top = max((value for _, value in said), default=None)
    used = [min(top or one.experts, one.experts) if one.experts else 1 for one in stored]  # of each, by one token
    # Listed experts have one parameter each, and a token uses only a few.
    shares = [own * one.count / one.experts if one.experts else 1.0 for own, one in zip(used, stored, strict=True)]
    widest = max((own * max(one.outputs, one.inputs) for own, one in zip(used, stored, strict=True)), default=0)
    kept = sum(share * (1.5 * one.outputs + one.inputs) for share, one in zip(shares, stored, strict=True))
    # A recurrence's tables (neither weights nor biases) give one value per token and entry.
    named = block.module.named_parameters()
    tables = (p.numel() for name, p in named if p.ndim == 2 and not name.endswith(("weight", "bias", "proj")))
    live = 3 * hidden + 4 * widest + 3 * max(tables, default=0)
    return live, 4 * hidden + max(widest, 4 * hidden), math.ceil(kept) + 8 * hidden


@dataclass(frozen=True)
class TextSizes:
    """This process's share of the text that a run reads."""

    seqlen: int
    samples: int
    """Number of calibration samples; 0 if none run through the model."""
    lengths: tuple[int, ...]
    """Distinct lengths of the samples."""
    mean: float
    evaluated: tuple[int, ...]
    """Number of windows of each text for perplexity."""

    @classmethod
    def of(cls, seqlen: int, windows: Windows | None, texts: Sequence[EvaluationText], processes: int) -> TextSizes:
        """Count this process's share of a run's text. windows: of the calibration data."""
        lengths = [seqlen] if windows is None else lengths_of(windows.tokens).tolist()
        samples = 0 if windows is None else -(-len(windows.tokens) // processes)
        evaluated = tuple(-(-(len(text.tokens) // seqlen) // processes) for text in texts)
        return cls(seqlen, samples, tuple({*lengths}), sum(lengths) / len(lengths), evaluated)


class Bound:
    """The memory bound of one recipe's run, phase by phase."""

    def __init__(self, recipe: Recipe, shapes: Shapes, text: TextSizes, loaded: Loaded, can_stream: bool) -> None:
        self._recipe, self._shapes = recipe, shapes
        self._text = replace(text, samples=min(text.samples, recipe.calibrate.samples))
        self.streams = streams(recipe) and can_stream
        self._trains = recipe.train.mode
        batch, length = max(
            ((samples_per_batch(recipe, one, loaded.device), one) for one in text.lengths),
            key=lambda pair: pair[0] * pair[1],
        )
        self._batch = min(batch, self._text.samples) * length
        self._longest = length
        self._sizes = [(name, parameter.numel()) for name, parameter in loaded.model.named_parameters()]
        memory = recipe.calibrate.activation_memory
        self._limit = None if memory is None else int(memory * GIB)
        self._room = device_room(loaded.device, recipe.calibrate.device_activation_memory)
        self._ahead = shapes.block_bytes if self.streams and fetches(shapes.block_bytes, loaded.device) else 0
        self.weights = shapes.rest_bytes if self.streams else shapes.total_bytes
        self._block, self._written = shapes.block_bytes, 0
        if self.streams and keeps_experts(recipe) and in_host_memory(loaded.device):
            # Experts are decoded one at a time, while the previous one is still in memory.
            self._block += 2 * shapes.expert - shapes.experts
            self._written = 0 if recipe.output.as_gguf else shapes.written

    def tensors(self, on_device: bool) -> Iterator[tuple[str, float]]:
        """Yield each phase's peak bytes where it computes, besides the permanent weights."""
        shapes, recipe = self._shapes, self._recipe
        limit = self._room.nbytes if on_device and self._room is not None else self._limit
        block = self._block + self._ahead if self.streams else 0
        yield "proof", self._proof(block)
        for windows in self._text.evaluated:
            yield "perplexity", self._perplexity(windows, block, limit)
        yield "pruning", block + max(self._pruning(limit), self._written)
        if "blocks" in recipe.remove.kinds:
            yield "choosing blocks", block + self._choosing()
        if recipe.remove.parts:  # tried block by block if streamed; else built in memory from cut tensors
            yield "smaller model", shapes.rest_bytes + self._block if self.streams else 2 * shapes.total_bytes
        if recipe.output.model is not None:
            compared = 2 * COMPARED_TOKENS * shapes.vocabulary * 4
            yield "verification", shapes.rest_bytes + self._block + compared
        if self._trains is not None:  # the pruned model is reloaded by then
            yield "training", self._training() - self.weights

    def passing(self) -> Iterator[tuple[str, float]]:
        """Yield the host bytes of weights in transit and of tensors that do not fit on the device."""
        shapes, text = self._shapes, self._text
        read = shapes.block_bytes + 2 * self._ahead if self.streams else 0  # pinned, like activations
        yield "reading", read
        for windows in text.evaluated if self.streams else ():
            yield "perplexity", read + self._aside(windows * text.seqlen * self._hidden)
        saved = self._recipe.output.model is not None
        # A finished block exists as pinned tensors and as the file's bytes while the next one is read.
        written = 3 * shapes.block_bytes if saved or self.streams else 0
        yield "pruning", read + written + self._aside(self._all_hidden)
        if saved:
            yield "writing", 2 * shapes.block_bytes
            yield "verification", shapes.rest_bytes + shapes.block_bytes

    @property
    def _hidden(self) -> int:
        """Bytes of a token's hidden states between two blocks."""
        return self._shapes.hidden * self._shapes.itemsize

    @property
    def _all_hidden(self) -> float:
        """Bytes of all samples' hidden states, and of the dense model's if blocks are trained toward them."""
        return (1 + bool(self._recipe.prune.reconstruct.steps)) * self._text.samples * self._text.mean * self._hidden

    def _running(self, length: int) -> int:
        """Return the bytes per token while a block runs on windows of a length."""
        return (self._shapes.live + 3 * self._shapes.heads * length) * self._shapes.itemsize

    def _aside(self, size: float) -> float:
        """Return the host memory of hidden states that do not fit on a device; pinned memory comes in powers of two."""
        over = 0.0 if self._room is None else max(0.0, size - self._room.nbytes)
        return _within(2 * over, self._limit)

    def _proof(self, block: int) -> float:
        """Bound the proof: one sample through every block twice, then its logits twice and their float32 difference."""
        tokens, shapes = min(PROBED, self._text.seqlen), self._shapes
        hidden = 4 * tokens * self._hidden
        logits = min(tokens, COMPARED_TOKENS) * shapes.vocabulary * (2 * shapes.itemsize + 12)
        return hidden + max(block + tokens * self._running(tokens), logits)

    def _perplexity(self, windows: int, block: int, limit: int | None) -> float:
        """Bound perplexity: hidden states of one batch or all, plus the larger of block memory and logits."""
        shapes, seqlen = self._shapes, self._text.seqlen
        batch = self._recipe.calibrate.batch_size or default_batch_size(seqlen, max(1, shapes.vocabulary))
        tokens = min(batch, windows) * seqlen
        waiting = _within(windows * seqlen * self._hidden, limit) if self.streams else 0
        hidden = waiting + tokens * self._hidden
        logits = tokens * shapes.vocabulary * shapes.itemsize + 8 * min(SLICE_VALUES, seqlen * shapes.vocabulary)
        return hidden + max(block + tokens * self._running(seqlen), logits)

    def _pruning(self, limit: int | None) -> float:
        """Bound pruning: activations, statistics and one solve; or block training; or an allocation's gradients."""
        recipe, shapes, tokens = self._recipe, self._shapes, self._text.samples * self._text.mean
        hidden, statistics = _within(self._all_hidden, limit), shapes.statistics
        batch = self._batch * (self._running(self._longest) + self._hidden)
        if recipe.calibrate.propagation == "sequential":
            waiting = hidden + tokens * (shapes.waiting + 3 * shapes.heads * self._longest) * shapes.itemsize
            if self._room is None or self._room.asked:
                waiting = _within(waiting, limit)
            hidden, statistics = max(hidden, waiting), shapes.statistic
        if recipe.remove.parts and not {"channels", "heads"} & {*recipe.remove.kinds}:
            statistics = 0
        sizes = [hidden + max(statistics, shapes.shared) + max(shapes.solve, batch)]
        if recipe.prune.reconstruct.steps:  # in float32: weights, gradients, two moments, first and best states
            parameters = shapes.block_bytes // shapes.itemsize
            sizes.append(hidden + 25 * parameters + 4 * self._batch * self._trained(self._longest))
        if recipe.prune.allocation.name == "fisher":
            sample = self._longest * (shapes.blocks * self._hidden + 2 * shapes.vocabulary * shapes.itemsize)
            sizes.append(sample + 4 * self._longest * self._trained(self._longest) + 2 * shapes.block_bytes)
        dense = recipe.calibrate.propagation == "dense" or recipe.prune.reconstruct.steps
        return max(sizes) + (shapes.shared_weights if dense else 0)

    def _choosing(self) -> float:
        """Bound the choice of blocks: maps of all spans, those of a few, the mixes of a target size, and predictions."""
        shapes, removed, hidden = self._shapes, self._recipe.remove, self._hidden
        logits = 2 * self._batch * shapes.vocabulary * shapes.itemsize + 12 * KL_ROWS * shapes.vocabulary
        running = self._batch * self._running(self._longest)
        compared = COMPARED_BY_KL if self.streams else self._batch
        sizes = [self._some(compared) * hidden * (shapes.blocks + 1) + max(logits, running)]
        if removed.maps_blocks and not self._recipe.output.as_gguf:
            tokens = int(removed.score_of("blocks").options.get("tokens") or MAP_TOKENS)
            ranked, solved, refit = self._some(tokens // 4), self._some(tokens), self._some(REFIT_TOKENS)
            small, wide, change = 4 * shapes.hidden**2, 4 * shapes.writers**2, 4 * shapes.writers * shapes.hidden
            inputs = shapes.writers * shapes.itemsize + hidden
            maps = sum(range(MAP_SPANS + 1)) * MAP_CANDIDATES * small
            numbers = sum(size for _, size in self._sizes)
            each = (shapes.total_bytes - shapes.rest_bytes) // (shapes.blocks * shapes.itemsize)
            gone = removed.most_blocks(shapes.blocks, each, numbers, shapes.itemsize)
            sizes.append(3 * ranked * hidden + gone * (2 * ranked * hidden + 2 * small) + maps + 3 * small)
            sizes.append((3 + MAP_SPANS) * solved * hidden + solved * inputs + 3 * wide + 3 * change)
            if removed.size is not None:
                maps = MIXES * MAP_SPANS * change
                sizes.append(3 * refit * hidden + MIXES * (refit * inputs + 2 * wide) + wide + maps + 2 * change)
                ways = (refit + (1 + MIXES) * self._some(COMPARED_BY_KL)) * hidden
                sizes.append(maps + ways + max(shapes.statistics + shapes.solve + 2 * change, logits, running))
        return max(sizes)

    def _some(self, tokens: int) -> float:
        """Return the number of tokens in the first batches that hold at least `tokens`."""
        return min(-(-tokens // self._batch) * self._batch, self._text.samples * self._text.mean) if self._batch else 0

    def _trained(self, length: int) -> int:
        """Return the values per token of a block's forward pass and of those kept for its backward pass."""
        return self._shapes.live + self._shapes.kept + 4 * self._shapes.heads * length

    def _training(self) -> float:
        """Bound training: weights, gradients, moments, the dense model, and one window's activations and logits."""
        asked, shapes, length = self._recipe.train, self._shapes, self._text.seqlen
        # Adapters are small compared with the weights, which are not copied.
        numbers = sum(size for _, size in self._sizes)
        own = 4 * numbers if has_adapters(asked.mode) else training_bytes(self._sizes, asked.scope)
        halves = asked.dtype == "bfloat16"
        own += 2 * numbers if halves else 0  # half-precision copies for the products
        beside = shapes.total_bytes if has_teacher(asked.mode) else 0
        activations = shapes.blocks * (self._trained(length) - shapes.live) + shapes.live + 4 * shapes.vocabulary
        return own + beside + (2 if halves else 4) * length * activations


def _within(size: float, limit: int | None) -> float:
    return size if limit is None else min(size, limit)


def bound_run(
    recipe: Recipe, solver: Solver, text: TextSizes, loaded: Loaded, found: FoundModel, processes: int
) -> Estimate:
    """Bound the memory of a run that has read its data but no blocks; if it does not fit, propose settings that fit."""
    shapes = Shapes.of(loaded, found, solver, bool(recipe.remove.parts))
    resident, available, device = resident_memory() or 0, available_bytes(), device_memory(loaded.device)
    unread, steady = unread_weights(), STEADY if shapes.itemsize == 4 else STEADY_IN_HALF
    # Other file formats cannot be streamed, whatever the recipe says.
    can_stream = loaded.weights.streams or not (streams(recipe) or loaded.quantised_source)
    held = sum(parameter.nbytes for parameter in loaded.model.parameters() if not parameter.is_meta)

    def bound(asked: Recipe) -> Estimate:
        one = Bound(asked, shapes, text, loaded, can_stream)
        more = one.weights - held  # still to be loaded, or to be freed
        base = max(0, resident + unread + steady + (more if device is None else 0))
        phases = _largest((one.tensors(False) if device is None else one.passing()), base)
        there = None
        if device is not None:
            on_it = _largest(one.tensors(True), max(0, device.allocated + more))
            there = DevicePeak(device.name, max(on_it.values()), device.available, device.allocated, on_it)
        # Peaks of finished phases do not count.
        return Estimate(max(phases.values()), available, resident, phases, processes, device=there)

    asked = bound(recipe)
    if asked.fits:
        return asked

    less, halves = _less(recipe, device is not None, can_stream), shapes.itemsize == 4
    together = [dict(less[:count]) for count in range(2, len(less) + 1)]
    for settings in (*({name: value} for name, value in less), *together):
        with suppress(BadInput):  # settings that exclude each other
            if bound(recipe.replaced(**settings)).fits:
                return replace(asked, proposal=Proposal(settings, True, halves))
    return replace(asked, proposal=Proposal(dict(less), False, halves))


def _less(recipe: Recipe, has_device: bool, can_stream: bool) -> list[tuple[str, bool | int | str]]:
    """Return settings that save memory, those that change no result first."""
    calibrate = recipe.calibrate
    less: list[tuple[str, bool | int | str]] = [("batch_size", 1), ("activation_memory", 0)]
    if has_device:
        less.insert(1, ("device_activation_memory", 0))
    if can_stream and not streams(recipe):
        less.insert(0, ("stream", True))
    if calibrate.propagation == "sequential":  # `dense` needs as much memory as `block`
        less.append(("propagation", "block"))
    less.append(("nsamples", max(1, calibrate.samples // 4)))
    found = []
    for name, value in less:
        with suppress(BadInput):  # conflicts with the rest of the recipe
            found += [(name, value)] if recipe.replaced(**{name: value}) != recipe else []
    return found


def _largest(phases: Iterator[tuple[str, float]], base: int) -> dict[str, int]:
    """Return the peak of each phase. base: bytes that all of them hold."""
    found: dict[str, int] = {}
    for name, size in phases:
        found[name] = max(int(base + SLACK * size), found.get(name, 0))
    return found
