"""What running a block and the head costs, measured on one sample.

The time is processor time (see `clock`), the memory what lives at once within them.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from coprune.base.devices import in_host_memory, synchronize
from coprune.base.errors import UnsupportedModel
from coprune.evaluation.perplexity import window_nll
from coprune.model.blocks import Block
from coprune.model.matrices import Matrix
from coprune.model.walk.observe import Observe, Products, observe_products
from coprune.model.walk.prove import COMPARED_LOGITS
from coprune.model.walk.proven import FoundModel
from coprune.model.walk.record import chooses_positions, guess_call

Shape = tuple[int, int]
"""(out, in) of a matrix."""
PROBE_TOKENS = 512
"""Of the sample that the walk is proved on, at most."""


@dataclass(frozen=True)
class BlockCosts:
    """What running the largest block costs."""

    read_seconds: float
    """To make its weights real."""
    weight_bytes: int
    seconds_per_token: float
    bytes_per_token: float
    """Most that lives at once within the block, besides its input."""
    waiting_bytes_per_token: float
    """Most that lives while a matrix waits to be pruned, likewise (`sequential`)."""
    hidden_bytes_per_token: float
    """Of the hidden states between two blocks."""
    training_bytes_per_token: float
    """Most that lives in a step of reconstruction, in float32, besides the weights and their gradients; 0 without one."""
    groups: tuple[tuple[Shape, ...], ...]
    """Shapes of its matrices; those of one group are fed by the same tensor."""


@torch.no_grad()
def measure_block(model: FoundModel, sample: Tensor, trained: bool = False) -> BlockCosts:
    """Read the largest block, run it on one sample, and let go of it.

    Args:
        model: its blocks are not read.
        sample: 1 × S int64 tokens, or pixels.
        trained: whether a step of reconstruction is to be measured too.

    Returns:
        What that cost.
    """
    weights, blocks, matrices = model.weights, model.blocks, model.chosen.blocks
    sizes = [sum(p.numel() * p.element_size() for p in block.module.parameters()) for block in blocks]
    block = blocks[max(range(len(blocks)), key=sizes.__getitem__)]
    read = seconds_of_reading(lambda: weights.acquire(block.name))
    try:
        hidden, call = guess_call(weights.model, blocks[: block.index + 1], sample)

        def run() -> Tensor:
            return call.run(block.module, hidden)

        products = _products(block, matrices[block.index], run)
        live, stops = LiveBytes(), [0]
        with live, Observe(matrices[block.index], lambda matrix, x: stops.append(live.now)):
            run()
        seconds = seconds_of_call(run, hidden.device)
        # The backward pass lets go of that step by step, and holds about what a forward pass holds at once.
        training = _kept_for_backward(run, block.module) + live.most if trained else 0.0
    finally:
        weights.release(block.name)
    tokens = hidden.shape[0] * hidden.shape[1]
    return BlockCosts(
        read_seconds=read,
        weight_bytes=max(sizes),
        seconds_per_token=seconds / tokens,
        bytes_per_token=live.most / tokens,
        waiting_bytes_per_token=max(stops) / tokens,
        hidden_bytes_per_token=hidden.nbytes / tokens,
        training_bytes_per_token=training / tokens,
        groups=tuple(
            tuple(matrix.shape for matrix in group)
            for group in [*products.groups, *([matrix] for matrix in products.unseen)]
        ),
    )


def _products(block: Block, matrices: Sequence[Matrix], run: Callable[[], Tensor]) -> Products:
    """What is multiplied while a block runs. Raises UnsupportedModel if it does not run as it is called here."""
    try:
        return observe_products(matrices, run)[1]
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise UnsupportedModel(
            f"{block.name} cannot be run alone: how it is called shows only when all blocks before it run"
        ) from error


def _kept_for_backward(run: Callable[[], Tensor], block: nn.Module) -> float:
    """What a forward pass in float32 leaves alive for the backward pass."""
    size = next(parameter.element_size() for parameter in block.parameters() if parameter.is_floating_point())
    try:
        block.requires_grad_(True)
        with torch.enable_grad(), LiveBytes() as live:
            output = run()
            kept = live.now if output.requires_grad else 0
    finally:
        block.requires_grad_(False)
    # In half precision everything takes half of what it will take in float32.
    return kept * 4 / size


@dataclass(frozen=True)
class HeadCosts:
    """What the logits of a model cost; zeros for one without a language head."""

    vocabulary: int
    bytes_per_value: int
    """Of a logit."""
    seconds_per_token: float
    """Of the logits and their likelihood."""
    compared_positions: int
    """So many positions' logits are compared when the walk is proved."""


@torch.no_grad()
def measure_head(model: nn.Module, device: torch.device, tokens: int = 64) -> HeadCosts:
    """Time the head on a few tokens."""
    compared = COMPARED_LOGITS if chooses_positions(model) else PROBE_TOKENS
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        return HeadCosts(0, 4, 0.0, compared)
    weight = head.weight
    x = torch.ones(1, tokens, weight.shape[1], dtype=weight.dtype, device=device)
    targets = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    seconds = seconds_of_call(lambda: window_nll(head(x), targets), device)
    return HeadCosts(weight.shape[0], weight.element_size(), seconds / tokens, compared)


DISK = 200e6
"""Bytes that a slow disk reads in a second."""


def seconds_of_call(run: Callable[[], object], device: torch.device, once: bool = False) -> float:
    """Seconds of a call; the smaller of two, unless it is to be called once only or takes long.

    On the CPU they are of this thread's processor time: it takes part in every product beside torch's other threads, so
    that is how long the call takes if nobody else wants the cores, which go by much slower on a busy machine.
    """
    clock = time.thread_time if in_host_memory(device) else time.perf_counter
    times: list[float] = []
    while not times or (not once and len(times) < 2 and times[0] < 0.3):
        started = clock()
        run()
        synchronize(device)
        times.append(clock() - started)
    return min(times)


class Busyness:
    """How busy others keep the machine while something is computed, which the time of a machine of its own leaves out.

    Args:
        device: where it is computed; what goes by on another device than the CPU is counted anyway.
    """

    def __init__(self, device: torch.device) -> None:
        self._counts = in_host_memory(device)
        self.factor = 1.0
        """How many times as long as its processor time it took."""

    def __enter__(self) -> Self:
        self._began = time.perf_counter(), time.thread_time()
        return self

    def __exit__(self, *_: object) -> None:
        gone, computed = time.perf_counter() - self._began[0], time.thread_time() - self._began[1]
        if self._counts and computed > 0:
            self.factor = max(1.0, gone / computed)


def seconds_of_reading(read: Callable[[], object]) -> float:
    """Seconds of a call that reads files: all processor time of the process, and what a slow disk takes, but no more
    than went by."""
    from_disk, started, computed = _bytes_from_disk(), time.perf_counter(), time.process_time()
    read()
    computed, gone = time.process_time() - computed, time.perf_counter() - started
    return min(gone, computed + (_bytes_from_disk() - from_disk) / DISK)


def _bytes_from_disk() -> int:
    """Bytes that this process made the system read from a disk, not from what it keeps in memory; 0 if it does not tell."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes")), 0)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that come into being while it is active: `now`, and at `most`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.most = 0
        self._known: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._known.setdefault(tensor.untyped_storage(), True)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._known:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._known[storage] = True
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.now -= size
