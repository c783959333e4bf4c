"""Peak memory and time of a run before it is done: from shapes and a short calibration of this machine.

The memory is what is held already plus the largest of the run's phases, each of which holds the weights and activations
that it needs; the time is the sum of all passes, solves and transfers. A run that would not fit is refused with settings
that would.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from coprune.base.devices import DeviceMemory
from coprune.model.walk.activations import DeviceRoom
from coprune.run.estimate.block import PROBE_TOKENS, BlockCosts, HeadCosts, Shape
from coprune.run.estimate.found import DevicePeak, Estimate, Proposal
from coprune.run.estimate.solving import SolveCosts


def estimate(workload: Workload, settings: Settings, available: int | None) -> Estimate:
    """Estimate peak and time, and find settings that fit if these do not.

    Args:
        workload: what was measured.
        settings: what is asked for.
        available: bytes of host memory that the process may still take; None if the system does not tell.

    Returns:
        The estimate, with a proposal if the run would not fit.
    """
    found = _peaks(workload, settings, available)
    seconds = seconds_of(workload, settings)
    found = replace(found, seconds=seconds, busy_seconds=seconds * max(1.0, workload.busy))
    return found if found.fits else replace(found, proposal=_proposal(workload, settings, available))


def _peaks(work: Workload, run: Settings, available: int | None) -> Estimate:
    """The memory of a run, and whether that fits."""
    phases, there = host_phases(work, run), device_phases(work, run)
    on_device = None
    if work.device is not None:
        peak = max(there.values())
        on_device = DevicePeak(work.device.name, peak, work.device.available, work.device.allocated, there)
    return Estimate(
        peak_bytes=max(work.peak_so_far, *phases.values()),
        seconds=0.0,
        available_bytes=available,
        resident_bytes=work.resident,
        phases=phases,
        processes=run.processes,
        device=on_device,
    )


def _proposal(work: Workload, run: Settings, available: int | None) -> Proposal:
    """The first single change that makes the run fit, or several together."""
    fewer = max(1, run.samples // 4)
    changes: list[tuple[str, bool | int | str, Callable[[Settings], Settings]]] = [
        ("batch_size", 1, lambda s: replace(s, batch=1, evaluation_batch=s.seqlen)),
        ("activation_memory", 0, lambda s: replace(s, activation_limit=0)),
        # `dense` holds as much at once as `block`.
        ("propagation", "block", lambda s: replace(s, propagation="block") if s.propagation == "sequential" else s),
        ("nsamples", fewer, lambda s: replace(s, samples=fewer)),
    ]
    if work.device is not None:
        none = DeviceRoom(0, asked=True)
        changes.insert(1, ("device_activation_memory", 0, lambda s: replace(s, device_room=none)))
    if not run.streamed:
        # What the blocks hold now is let go of.
        changes.insert(0, ("stream", True, lambda s: replace(s, streamed=True)))

    def fits(settings: Settings) -> bool:
        return _peaks(
            _without_blocks(work) if settings.streamed and not run.streamed else work, settings, available
        ).fits

    halves = run.dtype == "float32"
    useful = [(name, value, change) for name, value, change in changes if change(run) != run]
    for name, value, change in useful:
        if fits(change(run)):
            return Proposal({name: value}, True, halves)
    settings = run
    taken: dict[str, bool | int | str] = {}
    for name, value, change in useful:
        settings, taken[name] = change(settings), value
        if fits(settings):
            return Proposal(taken, True, halves)
    return Proposal(taken, False, halves)


def _without_blocks(work: Workload) -> Workload:
    """The same where the blocks, which are in memory, stay on the disk."""
    blocks = work.total_bytes - work.rest_bytes
    if work.device is not None:
        held = work.device.allocated - blocks
        return replace(
            work, device=replace(work.device, allocated=held, available=_more(work.device.available, blocks))
        )
    unread = min(work.unread_bytes, blocks)
    return replace(work, unread_bytes=work.unread_bytes - unread, resident=work.resident - (blocks - unread))


def _more(available: int | None, freed: int) -> int | None:
    return None if available is None else available + freed


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


def seconds_of(work: Workload, run: Settings) -> float:
    """Seconds from now to the end."""
    block, read = work.block, work.block.read_seconds * work.blocks if run.streamed else 0.0
    tokens, head = run.tokens, work.head
    one_pass = block.seconds_per_token * work.blocks
    passes = 2 if run.propagation == "block" else 1
    passes += 1 if run.dense_beside else 0
    statistics = sum(work.solving[s].statistic_seconds_per_token * count for s, count in work.leaders.items())
    first = sum(work.solving[s].seconds * count for s, count in work.leaders.items())
    again = sum(work.solving[s].seconds_again * (count - work.leaders[s]) for s, count in work.matrices.items())
    probed = min(PROBE_TOKENS, run.seqlen)
    proof = 2 * (probed * one_pass + min(probed, head.compared_positions) * head.seconds_per_token)
    evaluation = sum(run.evaluation_tokens) * (one_pass + head.seconds_per_token) * run.evaluations
    # Half of a step's passes are forward, the rest backward; and a tenth of the batches watch after every tenth step.
    trained = 3.0 * run.reconstruction_steps * run.batch * (run.batch_length or run.seqlen)
    trained += 1.1 * tokens if run.reconstruction_steps else 0
    # Reading for the proof, for every evaluation, for pruning and for verifying, and writing, which takes about as long
    # as reading and its checksum once more.
    transfers = read * (2 + run.evaluations * len(run.evaluation_tokens)) + 3 * read * run.saved
    afterwards = 0.0
    if run.training is not None:
        # A step goes forward, and back in twice the time; a teacher goes forward beside it.
        each = (3 + run.training.distils) * (one_pass + head.seconds_per_token)
        afterwards = run.training.seconds + run.training.tokens * each
    return (
        proof
        + afterwards
        + evaluation
        + passes * tokens * one_pass
        + tokens * statistics
        + ((first + again) / run.processes + trained * one_pass + transfers)
    )


@dataclass(frozen=True)
class Training:
    """The training of the whole model once it is pruned."""

    tokens: int
    """None of them if it is limited by time."""
    seconds: float
    """Where it is."""
    bytes: int
    """Of weights, gradients, moments and teacher; activations are not counted."""
    distils: bool


@dataclass(frozen=True)
class Settings:
    """What of a recipe decides its memory and time."""

    samples: int
    """Calibration samples of this process; 0 if none run through the model."""
    seqlen: int
    batch: int
    """Samples per batch."""
    evaluation_tokens: tuple[int, ...]
    """Of each text that perplexity is measured on (this process's share)."""
    evaluation_batch: int
    """Tokens per batch of the evaluation."""
    evaluations: int
    """1 to 3: the pruned model's, the dense model's, and that of the sparse part alone."""
    propagation: str
    streamed: bool
    dense_beside: bool
    """Whether the dense model's hidden states go along."""
    reconstruction_steps: int
    activation_limit: int | None
    """Bytes of hidden states in host memory; None for no limit."""
    saved: bool
    dtype: str
    device_room: DeviceRoom | None = None
    """What hidden states may take of the memory of a device that has its own."""
    processes: int = 1
    """That share this machine and the solving."""
    mean_length: float | None = None
    """Tokens of a calibration sample in the mean, where they have lengths of their own; None for seqlen."""
    batch_length: int | None = None
    """Likewise of a sample in the largest batch."""
    added_bytes: int = 0
    """Of what is added to pruned matrices."""
    training: Training | None = None
    """Of the whole model afterwards; None without one, or where nobody knows how long it will be."""

    @property
    def tokens(self) -> float:
        """Of all calibration samples."""
        return self.samples * (self.seqlen if self.mean_length is None else self.mean_length)

    @property
    def batch_tokens(self) -> int:
        """Of the largest calibration batch."""
        return min(self.batch, self.samples) * (self.batch_length or self.seqlen)

    @property
    def bytes_per_weight(self) -> int:
        """Of the dtype that the model is computed in."""
        return 4 if self.dtype == "float32" else 2


@dataclass(frozen=True)
class Workload:
    """A model on this machine with a method: everything that is measured."""

    resident: int
    """Bytes that the process holds now."""
    peak_so_far: int
    unread_bytes: int
    """Of weights in files that are mapped into memory and come into it only when they are used."""
    rest_bytes: int
    """Of what lies outside the blocks."""
    total_bytes: int
    blocks: int
    block: BlockCosts
    solving: dict[Shape, SolveCosts]
    matrices: Counter[Shape]
    """Number of matrices of each shape in all blocks."""
    leaders: Counter[Shape]
    """Number of groups by the shape of their first matrix."""
    head: HeadCosts
    device: DeviceMemory | None = None
    """Of the device that the model is computed on; None if that is host memory, or its device does not tell."""
    busy: float = 1.0
    """How many times as long as on a machine of its own a computation took while this was measured."""
    ahead_bytes: int = 0
    """Of the block that is fetched to a device while another computes, if the model is streamed."""
