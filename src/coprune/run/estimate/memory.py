"""Peak memory of every phase of a run: the tensors that each holds at once, in host memory or on a device.

What is counted is what the process holds already plus tensors that are yet to come. A run on a device computes there;
the host then only reads and writes weights, and holds the hidden states for which the device has no room.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from coprune.run.estimate.block import PROBE_TOKENS
from coprune.run.estimate.work import Settings, Workload

SLACK = 1.1
"""Beyond the tensors that are counted: what the allocator cannot give back at once."""
STEADY = 20 << 20
"""What a process comes to hold in the course of a run that no tensor accounts for, measured on a model of no size: code
that is imported late, compiled kernels, the report."""
STEADY_IN_HALF = 90 << 20
"""The same where weights are of half precision, whose products leave more behind in the libraries (30 to 110 MiB)."""
SLICE_VALUES = 2**24
"""Logits that become float32 at a time (see `evaluation.batches.slices`)."""
VERIFIED_TOKENS = 64


def host_phases(work: Workload, run: Settings) -> dict[str, int]:
    """The process's resident set at the peak of each phase, in bytes."""
    base = work.resident + work.unread_bytes + (STEADY if run.bytes_per_weight == 4 else STEADY_IN_HALF)
    tensors = _tensors if work.device is None else _passing_through
    found = _largest((name, int(base + SLACK * size)) for name, size in tensors(work, run))
    if run.training is not None and work.device is None:
        # By then the model that was pruned is gone.
        held = work.rest_bytes if run.streamed else work.total_bytes
        found["training"] = max(0, base - held) + run.training.bytes
    return found


def device_phases(work: Workload, run: Settings) -> dict[str, int]:
    """What tensors take on the device at the peak of each phase, in bytes; empty for a run in host memory."""
    if work.device is None:
        return {}
    held, room = work.device.allocated, run.device_room
    there = run if room is None else replace(run, activation_limit=room.nbytes)
    return _largest((name, int(held + SLACK * size)) for name, size in _tensors(work, there))


def _largest(phases: Iterator[tuple[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, size in phases:
        found[name] = max(size, found.get(name, 0))
    return found


def _passing_through(work: Workload, run: Settings) -> Iterator[tuple[str, float]]:
    """Bytes in host memory of weights that are read for the device, or written, and of what it has no room for."""
    weights = work.block.weight_bytes + 2 * work.ahead_bytes if run.streamed else 0  # pinned, as activations are
    yield "reading", weights
    for count in run.evaluation_tokens if run.streamed else ():
        yield "perplexity", weights + _aside(run, count * work.block.hidden_bytes_per_token)
    # A finished block is written as tensors, which are pinned, and as the file's bytes, while the next one is read.
    written = 3 * work.block.weight_bytes if run.saved or run.streamed else 0
    yield "pruning", weights + written + _aside(run, _hidden(work, run))
    if run.saved:
        yield "writing", 2 * work.block.weight_bytes  # as tensors, and as the file's bytes
        yield "verification", work.rest_bytes + work.block.weight_bytes


def _aside(run: Settings, size: float) -> float:
    """What the host keeps of a device's hidden states: pinned memory comes in powers of two, so up to twice their size."""
    over = 0.0 if run.device_room is None else max(0.0, size - run.device_room.nbytes)
    return _within(2 * over, run.activation_limit)


def _hidden(work: Workload, run: Settings) -> float:
    """Bytes of the hidden states that are pruned with, which may be of two models."""
    return (1 + run.dense_beside) * run.tokens * work.block.hidden_bytes_per_token


def _tensors(work: Workload, run: Settings) -> Iterator[tuple[str, float]]:
    """Bytes of the tensors that each phase holds at its peak, besides what is held now."""
    block = work.block
    # A model in memory holds its blocks already.
    weights = block.weight_bytes + work.ahead_bytes if run.streamed else 0
    yield "proof", _proof(work, run, weights)
    for count in run.evaluation_tokens:
        yield "perplexity", _perplexity(work, run, count, weights) + run.added_bytes
    yield "pruning", weights + _pruning(work, run) + run.added_bytes
    if run.saved:
        # The saved folder's rest is read once more, and one of its blocks, to compare them.
        compared = 2 * VERIFIED_TOKENS * work.head.vocabulary * 4
        yield "verification", work.rest_bytes + block.weight_bytes + compared + 2 * run.added_bytes


def _proof(work: Workload, run: Settings, weights: float) -> float:
    """One sample through the model, every block twice; then the logits of a few positions twice, and their difference."""
    tokens, head = min(PROBE_TOKENS, run.seqlen), work.head
    as_float32 = 0 if head.bytes_per_value == 4 else 8
    values = min(tokens, head.compared_positions) * head.vocabulary
    logits = values * (2 * head.bytes_per_value + as_float32 + 4)
    hidden = 4 * tokens * work.block.hidden_bytes_per_token  # both runs' inputs and outputs
    return max(hidden + weights + tokens * work.block.bytes_per_token, hidden + logits)


def _perplexity(work: Workload, run: Settings, count: int, weights: float) -> float:
    """Hidden states, of one batch or all, and the larger of what a block takes and what the logits take."""
    block, head, batch = work.block, work.head, run.evaluation_batch
    own = batch * block.hidden_bytes_per_token
    hidden = _within(count * block.hidden_bytes_per_token, run.activation_limit) + own if run.streamed else own
    window = min(SLICE_VALUES, run.seqlen * head.vocabulary)
    # The slice's logarithm, and the slice itself where it is not float32 already.
    scored = window * (4 if head.bytes_per_value == 4 else 8)
    logits = batch * head.vocabulary * head.bytes_per_value
    return hidden + max(weights + batch * block.bytes_per_token, logits + scored)


def _pruning(work: Workload, run: Settings) -> float:
    """Bytes that pruning needs besides the weights: activations, statistics, and one solve."""
    block, tokens = work.block, run.tokens
    # Several lists share the limit.
    hidden = _within(_hidden(work, run), run.activation_limit)
    sums = [work.solving[group[0]].statistic_bytes for group in block.groups]
    solve = max((work.solving[shape].most_bytes for group in block.groups for shape in group), default=0)
    batch = run.batch_tokens * (block.bytes_per_token + block.hidden_bytes_per_token)
    if run.propagation == "sequential":
        waiting = hidden + tokens * block.waiting_bytes_per_token
        if run.device_room is None or run.device_room.asked:
            waiting = _within(waiting, run.activation_limit)
        first, sums_then = max(hidden, waiting), max(sums, default=0)
    else:
        first, sums_then = hidden, sum(sums)
    trained = _training(work, run, run.batch_tokens) if run.reconstruction_steps else 0
    return max(first + sums_then + max(solve, batch), hidden + trained)


def _training(work: Workload, run: Settings, tokens: int) -> float:
    """Bytes that training a block needs: its weights, gradients, two moments and two best states, all in float32."""
    parameters = work.block.weight_bytes // run.bytes_per_weight
    own = 0 if run.bytes_per_weight == 4 else 4 - run.bytes_per_weight
    return parameters * (own + 5 * 4 + 1) + tokens * work.block.training_bytes_per_token


def _within(size: float, limit: int | None) -> float:
    return size if limit is None else min(size, limit)
