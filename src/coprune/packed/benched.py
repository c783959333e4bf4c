"""What a benchmark measured, and how it is shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from coprune.base.shown import Sheet, Shown
from coprune.packed.runtimes import Turns
from coprune.packed.timing import Timing

NO_GAIN = 1.03


@dataclass(frozen=True)
class Row:
    """One measurement: a form of the model, at one batch size, in one phase."""

    phase: str
    """prefill (a whole prompt at once) or decode (one token per sequence)."""
    form: str
    """dense, packed (every layer that shrinks), accelerated (where a measurement wins) or semi-structured, some of them
    compiled; where several models were measured, one of them in one runtime."""
    batch: int
    seconds: Timing
    """Of one forward pass."""
    tokens_per_second: float
    speedup: float
    """Median time of the baseline over this one's."""

    @property
    def milliseconds(self) -> str:
        """Median and quartiles, for people."""
        seconds = self.seconds
        return f"{seconds.median * 1e3:.2f} ({seconds.low * 1e3:.2f}–{seconds.high * 1e3:.2f})"


@dataclass(repr=False)
class Bench(Shown):
    """Everything that `bench` measured, on this machine."""

    model: str
    device: str
    threads: int
    dtype: str
    instruction_set: str
    bandwidth: float
    """Bytes per second, measured; 0 where it was not (GPU)."""
    bytes: dict[str, int] = field(default_factory=dict)
    """Of each form's weights in memory."""
    rows: list[Row] = field(default_factory=list)
    baselines: dict[str, str] = field(default_factory=dict)
    """Which form each is compared with: dense, unless said otherwise."""
    compiling: dict[str, float] = field(default_factory=dict)
    """Seconds that the first step of each compiled form took, at the first batch size."""
    files: dict[str, int] = field(default_factory=dict)
    """Bytes on the disk of each form's weights, where several models were measured."""

    def baseline(self, form: str) -> str:
        """What a form is compared with."""
        return self.baselines.get(form, "dense")

    @property
    def reference(self) -> str:
        """What all ratios are to, in words."""
        return "the first in the same runtime" if self.baselines else "dense"

    def gains(self, row: Row) -> bool:
        """Whether a form is faster than what it is compared with, or that itself."""
        return row.form == self.baseline(row.form) or row.speedup >= NO_GAIN

    def add(self, phase: str, batch: int, tokens: int, timings: Mapping[str, Timing]) -> None:
        """Note how long a phase took in every form. tokens: of all sequences, in one forward pass."""
        for form, timing in timings.items():
            speedup = timings[self.baseline(form)].median / timing.median
            self.rows.append(Row(phase, form, batch, timing, tokens / timing.median, speedup))

    def add_turns(self, batch: int, prompt: int, turns: Turns, compiled: Iterable[str]) -> None:
        """Note both phases of all forms at one batch size, and what the compiled ones waited for. prompt: tokens."""
        self.add("prefill", batch, batch * prompt, turns.prefill)
        self.add("decode", batch, batch, turns.decode)
        for form in compiled:
            self.compiling.setdefault(form, turns.first[form])

    def headline(self) -> str:
        """Model, device, and the best speed-up of decoding."""
        best = max((row for row in self.rows if row.phase == "decode"), key=lambda row: row.speedup, default=None)
        speed = "" if best is None else f", decodes {best.speedup:.2f}× as fast {best.form} (batch {best.batch})"
        return f"{Path(self.model).name}: {self.dtype}, {self.threads} threads, {self.device}{speed}"

    def sheet(self) -> Sheet:
        """A row per measurement."""
        rows = [
            (
                row.phase,
                str(row.batch),
                row.form,
                row.milliseconds,
                f"{row.tokens_per_second:.1f}",
                f"{row.speedup:.2f}×",
            )
            for row in self.rows
        ]
        return Sheet(self.headline(), rows, ("phase", "batch", "form", "ms (quartiles)", "tokens/s", "speed-up"))

    def __str__(self) -> str:
        """A table for people, which says plainly where there is no gain."""
        lines = [f"{self.model}: {self.dtype}, {self.threads} threads, {self.device}, {self.instruction_set}"]
        wide = max(16, *map(len, self.bytes))
        for form, size in self.bytes.items():
            limit = f", memory allows {self.bandwidth / size:.1f} tokens/s" if self.bandwidth else ""
            share = f"{size / self.bytes[self.baseline(form)]:.2f} of {self.reference}"
            on_disk = f", {self.files[form] / 1e6:.1f} MB on the disk" if form in self.files else ""
            waited = f", compiled in {self.compiling[form]:.0f} s" if form in self.compiling else ""
            lines.append(f"{form:<{wide}} {size / 1e6:9.1f} MB in memory ({share}{limit}){on_disk}{waited}")
        lines.append(
            f"{'phase':<8} {'batch':>5} {'form':<{wide}} {'ms (quartiles)':>24} {'tokens/s':>9} {'speed-up':>9}"
        )
        for row in self.rows:
            verdict = "" if self.gains(row) else "  no gain here"
            lines.append(
                f"{row.phase:<8} {row.batch:>5} {row.form:<{wide}} {row.milliseconds:>24} {row.tokens_per_second:>9.1f} "
                f"{row.speedup:>8.2f}×{verdict}"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the report."""
        return asdict(self)
