"""Peak memory and time of a run before it is done: from shapes and a short calibration of this machine.

The memory is what the process holds already plus the largest of the run's phases, each of which holds the weights and
activations that it needs; the time is the sum of all passes, solves and transfers. A run that would not fit is refused
with settings that would.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from coprune.run.estimate.found import Estimate
from coprune.run.estimate.machine import BlockCosts, Shape, SolveCosts
from coprune.run.estimate.proposal import Proposal

# Beyond the tensors that are counted: workspaces of the libraries, and what the allocator cannot give back at once.
SLACK = 1.1
PROBE_TOKENS = 512
SLICE_BYTES = 2 * 4 * 2**24  # a slice of logits in float32 and its logarithm (see evaluate.perplexity.window_nll)


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
    """1 or 2: the pruned model's, the dense model's."""
    propagation: str
    streamed: bool
    dense_target: bool
    """Whether the dense model's hidden states go along."""
    reconstruction_steps: int
    activation_limit: int | None
    saved: bool
    dtype: str
    processes: int = 1
    """That share this machine and the solving."""


@dataclass(frozen=True)
class Workload:
    """A model on this machine with a method: everything that is measured."""

    resident: int
    """Bytes that the process holds now."""
    peak_so_far: int
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
    head_seconds_per_token: float
    logit_bytes_per_token: float


def estimate(workload: Workload, settings: Settings, available: int | None) -> Estimate:
    """Estimate peak and time, and find settings that fit if these do not."""
    phases = dict(_phases(workload, settings))
    peak = max(workload.peak_so_far, *phases.values())
    found = Estimate(peak, _seconds(workload, settings), available, workload.resident, phases, settings.processes)
    return found if found.fits else replace(found, proposal=_proposal(workload, settings, available))


def _phases(work: Workload, run: Settings) -> Iterator[tuple[str, int]]:
    """Resident set at the peak of each phase."""
    block, base = work.block, work.resident
    # A model in memory holds its blocks already.
    weights = block.weight_bytes if run.streamed else 0
    logits, tokens = work.logit_bytes_per_token, min(PROBE_TOKENS, run.seqlen)

    def bytes_of(extra: float) -> int:
        return int(base + SLACK * extra)

    # Both logits, and for the comparison their difference and what is not float32 already in float32.
    compared = tokens * logits * (5 if logits == 4 * _vocabulary(work) else 8) / 2
    yield "proof", bytes_of(weights + tokens * block.bytes_per_token + compared)
    for count in run.evaluation_tokens:
        hidden = _within(count * block.hidden_bytes_per_token, run.activation_limit) if run.streamed else 0
        inside = weights + run.evaluation_batch * block.bytes_per_token
        yield "perplexity", bytes_of(hidden + max(inside, run.evaluation_batch * logits + SLICE_BYTES))
    yield "pruning", bytes_of(weights + _pruning(work, run))
    if run.saved:
        # The saved folder's rest is read once more, and one of its blocks, to compare them.
        yield "verification", bytes_of(work.rest_bytes + block.weight_bytes + 2 * 64 * logits)


def _vocabulary(work: Workload) -> float:
    return work.logit_bytes_per_token / 4


def _pruning(work: Workload, run: Settings) -> float:
    """Bytes that pruning needs besides the weights: activations, statistics, and one solve."""
    block, tokens = work.block, run.samples * run.seqlen
    lists = 2 if run.dense_target else 1
    hidden = lists * _within(tokens * block.hidden_bytes_per_token, run.activation_limit)
    sums = [work.solving[group[0]].statistic_bytes for group in block.groups]
    solve = max((work.solving[shape].most_bytes for group in block.groups for shape in group), default=0)
    batch = min(run.batch, run.samples) * run.seqlen * block.bytes_per_token
    if run.propagation == "sequential":
        waiting = _within(hidden + tokens * block.waiting_bytes_per_token, run.activation_limit)
        return max(hidden, waiting) + max(sums, default=0) + max(solve, batch)
    training = 0.0
    if run.reconstruction_steps:
        # float32 weights, gradients, two moments, best state; activations are kept for the backward pass.
        training = 5 * block.weight_bytes + 3 * batch
    return hidden + max(sum(sums) + max(solve, batch), training)


def _within(size: float, limit: int | None) -> float:
    return size if limit is None else min(size, limit)


def _seconds(work: Workload, run: Settings) -> float:
    """Time from now to the end."""
    block, read = work.block, work.block.read_seconds * work.blocks if run.streamed else 0.0
    tokens = run.samples * run.seqlen
    one_pass = block.seconds_per_token * work.blocks
    passes = 2 if run.propagation == "block" else 1
    passes += 1 if run.dense_target else 0
    statistics = sum(work.solving[s].statistic_seconds_per_token * count for s, count in work.leaders.items())
    first = sum(work.solving[s].seconds * count for s, count in work.leaders.items())
    again = sum(work.solving[s].seconds_again * (count - work.leaders[s]) for s, count in work.matrices.items())
    proof = 2 * min(PROBE_TOKENS, run.seqlen) * (one_pass + work.head_seconds_per_token)
    evaluation = sum(run.evaluation_tokens) * (one_pass + work.head_seconds_per_token) * run.evaluations
    # Half of a step's passes are forward, the rest backward; and a tenth of the batches watch after every tenth step.
    trained = run.reconstruction_steps * run.batch * run.seqlen * 3 + (1.1 * tokens if run.reconstruction_steps else 0)
    # Reading for the proof, for every evaluation, for pruning and for verifying, and writing, which takes about as long
    # as reading and its checksum once more.
    transfers = read * (2 + run.evaluations * len(run.evaluation_tokens)) + 3 * read * run.saved
    return (
        proof
        + evaluation
        + passes * tokens * one_pass
        + tokens * statistics
        + ((first + again) / run.processes + trained * one_pass + transfers)
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
    if not run.streamed:
        # What the blocks hold now is let go of.
        changes.insert(0, ("stream", True, lambda s: replace(s, streamed=True)))

    def fits(settings: Settings) -> bool:
        resident = work.resident - (work.total_bytes - work.rest_bytes if settings.streamed and not run.streamed else 0)
        peak = max(size for _, size in _phases(replace(work, resident=resident), settings))
        return Estimate(peak, 0.0, available, work.resident, processes=run.processes).fits

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
