"""What decides what a run takes: its settings, and what was measured of model and machine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from coprune.base.devices import DeviceMemory
from coprune.model.walk.activations import DeviceRoom
from coprune.run.estimate.block import BlockCosts, HeadCosts, Shape
from coprune.run.estimate.solving import SolveCosts


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
