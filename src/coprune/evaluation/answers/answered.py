"""Answers of a model and figures of them, as data: what runs, evaluations and comparisons keep and show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal

from pydantic import BaseModel, ConfigDict

from coprune.evaluation.answers.likeness import agreed_share, script_agreement
from coprune.evaluation.answers.repetition import distinct, find_loop, longest_repeat
from coprune.evaluation.measurement import Interval

Reference = Literal["dense", "before"]


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")


class Answered(_Facts):
    """One answer."""

    text: str
    tokens: tuple[int, ...]
    """With the mark that ended it, if it ended by itself."""
    ended: bool
    """Whether the model ended it, or the limit did."""
    seconds: float

    @property
    def loops(self) -> bool:
        """Whether it is stuck in a loop."""
        return find_loop(self.tokens, self.ended) is not None


class Answers(_Facts):
    """One model's answers to the same prompts, the likeliest ones and sampled ones (empty where none were sampled)."""

    greedy: tuple[Answered, ...]
    sampled: tuple[Answered, ...] = ()


class Along(_Facts):
    """Divergence from the dense model along its own answers."""

    kl: float
    """KL(dense ‖ this) in nats per token, the mean over answers of the mean over their tokens."""
    interval: Interval | None
    """95 % bootstrap interval over the answers."""


class Figures(_Facts):
    """Figures of one model's answers: counts, and means over the answers."""

    answers: int
    loops: int
    ended: int
    tokens: float
    seconds: float
    distinct1: float
    distinct2: float
    distinct3: float
    repeat: int
    """Of all answers the longest stretch that says something at least twice in a row, in tokens."""

    @classmethod
    def of(cls, answers: Sequence[Answered]) -> Figures:
        """Of one answer or more."""
        shares = {f"distinct{n}": fmean(distinct(answer.tokens, n) for answer in answers) for n in (1, 2, 3)}
        return cls(
            answers=len(answers),
            loops=sum(answer.loops for answer in answers),
            ended=sum(answer.ended for answer in answers),
            tokens=fmean(len(answer.tokens) for answer in answers),
            seconds=fmean(answer.seconds for answer in answers),
            repeat=max(longest_repeat(answer.tokens) for answer in answers),
            **shares,
        )


class Likeness(_Facts):
    """Figures of one model's answers against another's: means over the answers."""

    length: float | None
    """Mean tokens over the other's; None where that says nothing."""
    agreed: float
    """Share of the other's tokens before the first difference."""
    script: float | None
    """Share of letters in the other's scripts; None where it wrote no letters."""

    @classmethod
    def of(cls, dense: Sequence[Answered], answers: Sequence[Answered]) -> Likeness:
        """Of answers to the same prompts in the same order."""
        pairs = list(zip(dense, answers, strict=True))
        written = [script_agreement(one.text, other.text) for one, other in pairs]
        known = [share for share in written if share is not None]
        before, after = (sum(len(answer.tokens) for answer in side) for side in (dense, answers))
        return cls(
            length=after / before if before else None,
            agreed=fmean(agreed_share(one.tokens, other.tokens) for one, other in pairs),
            script=fmean(known) if known else None,
        )


class Way(_Facts):
    """Answers of one way of choosing tokens, of a model and of the one that it is compared with."""

    figures: Figures
    dense: Figures | None = None
    likeness: Likeness | None = None

    @classmethod
    def of(cls, dense: Sequence[Answered], answers: Sequence[Answered]) -> Way | None:
        """None where nothing was answered this way. dense: empty if there is no other model."""
        if not answers:
            return None
        likeness = Likeness.of(dense, answers) if dense else None
        return cls(figures=Figures.of(answers), dense=Figures.of(dense) if dense else None, likeness=likeness)


class Sample(_Facts):
    """One prompt with the likeliest answers to it."""

    prompt: str
    dense: str | None
    answer: str
    loops: bool
    dense_loops: bool | None


class Asked(_Facts):
    """What was asked, and how."""

    prompts: str
    """Where the prompts are from."""
    fingerprint: str
    chat: bool
    """Whether the tokenizer's chat template was put around them."""
    new_tokens: int
    temperature: float
    """Of the sampled answers."""
    seed: int
    short: bool = False
    """Whether these are the few short ones that every run looks at which saves a model."""


class AnswerFacts(Asked):
    """What a model answered, beside the dense model."""

    greedy: Way
    sampled: Way | None
    along: Along | None
    samples: tuple[Sample, ...]
    reference: Reference = "dense"
    """Which model stands under `dense`: that one, or the one before a fine-tuning."""

    def verdict(self) -> str:
        """Whether it degenerates, in plain words: `3 of 16 answers loop; dense 0`."""
        found, dense = self.greedy.figures, self.greedy.dense
        loops = f"{found.loops or 'none'} of {found.answers} answers {'loops' if found.loops < 2 else 'loop'}"
        return loops if dense is None else f"{loops}; {self.reference} {dense.loops}"

    @property
    def degenerates(self) -> bool:
        """Whether more answers loop than the dense model's."""
        dense = self.greedy.dense
        return self.greedy.figures.loops > (0 if dense is None else dense.loops)

    def lines(self) -> list[tuple[str, str]]:
        """What was found, for people: names and values; of the short ones only whether they loop."""
        rows = [("answers", f"{self.verdict()} (greedy, at most {self.new_tokens} tokens, prompts: {self._source})")]
        if self.short:
            return rows
        rows.append(("greedy", self.line(self.greedy)))
        if self.along is not None:
            low, high = self.along.interval or (self.along.kl, self.along.kl)
            rows.append(
                ("KL", f"{self.along.kl:.4f} [{low:.4f}, {high:.4f}] nats a token along the dense model's answers")
            )
        if self.sampled is not None:
            rows.append((f"T = {self.temperature:g}", self.line(self.sampled)))
        return rows

    @property
    def _source(self) -> str:
        return f"{Path(self.prompts).name}{', in the chat template' if self.chat else ''}"

    def line(self, way: Way) -> str:
        """The figures of one way, each with the other model's behind it."""
        parts = [
            self._pair(way, "loops", lambda found: f"{found.loops} of {found.answers}"),
            self._pair(way, "ended", lambda found: f"{found.ended} of {found.answers}"),
            self._pair(way, "tokens", lambda found: f"{found.tokens:.1f}"),
            self._pair(way, "distinct-2", lambda found: f"{found.distinct2:.2f}"),
            self._pair(way, "longest repeat", lambda found: f"{found.repeat}"),
            self._pair(way, "seconds", lambda found: f"{found.seconds:.2f}"),
        ]
        if way.likeness is not None:
            parts.append(f"agrees {way.likeness.agreed:.1%}")
            parts += [] if way.likeness.script is None else [f"same script {way.likeness.script:.1%}"]
        return ", ".join(parts)

    def _pair(self, way: Way, name: str, show: Callable[[Figures], str]) -> str:
        return f"{name} {show(way.figures)}" + ("" if way.dense is None else f" ({self.reference} {show(way.dense)})")


def facts_of(
    asked: Asked, prompts: Sequence[str], dense: Answers | None, answers: Answers, along: Along | None = None
) -> AnswerFacts:
    """Put two models' answers to the same prompts side by side. dense: None if there is one model only."""
    greedy = Way.of(() if dense is None else dense.greedy, answers.greedy)
    assert greedy is not None
    samples = tuple(
        Sample(
            prompt=prompt,
            dense=None if dense is None else dense.greedy[place].text,
            answer=answers.greedy[place].text,
            loops=answers.greedy[place].loops,
            dense_loops=None if dense is None else dense.greedy[place].loops,
        )
        for place, prompt in enumerate(prompts)
    )
    sampled = Way.of(() if dense is None else dense.sampled, answers.sampled)
    return AnswerFacts(**dict(asked), greedy=greedy, sampled=sampled, along=along, samples=samples)
