"""Two models' answers side by side, as data kept and shown by runs, evaluations and comparisons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from coprune.evaluation.answers.answer_records import Along, Answers, Facts, Figures, Way, is_empty
from coprune.evaluation.bounds import Difference
from coprune.evaluation.measurement import Interval
from coprune.recipe.answers import ALONG, Condition, no_emptier

Reference = Literal["dense", "before"]
_SHOWN = 3
# Answers whose mean length is below this share of the dense model's stop too soon, though they neither loop nor are empty.
_SHORT_SHARE = 1 / 3
_MOST_LETTERS = 160
_PAIRED = {"loops": ("loops", "dense_loops"), "empty": ("empty", "dense_empty")}
_TWO_SIDED = 0.975
"""Level of each side of a 95 % interval."""


class Sample(Facts):
    """One prompt with its greedy answers."""

    prompt: str
    dense: str | None
    answer: str
    loops: bool
    dense_loops: bool | None

    @property
    def empty(self) -> bool:
        """Whether the answer is empty."""
        return is_empty(self.answer)

    @property
    def dense_empty(self) -> bool:
        """Whether the dense model's answer is empty."""
        return self.dense is not None and is_empty(self.dense)


class Asked(Facts):
    """The prompts and the settings of the answers."""

    prompts: str
    """Source of the prompts."""
    fingerprint: str
    chat: bool
    """Whether the prompts used the tokenizer's chat template."""
    new_tokens: int
    temperature: float
    """Temperature of the sampled answers."""
    seed: int
    short: bool = False
    """Whether these are only the few short answers checked whenever a model is saved."""


class AnswerFacts(Asked):
    """A model's answers, compared with the dense model's."""

    greedy: Way
    sampled: Way | None
    along: Along | None
    samples: tuple[Sample, ...]
    reference: Reference = "dense"
    """Which model `dense` is: the dense one, or the one before fine-tuning."""

    def verdict(self) -> str:
        """Return a sentence on degenerate answers: `3 of 16 answers loop; dense 0`, `2 of 16 answers are empty; dense 0`."""
        found, dense = self.greedy.figures, self.greedy.dense
        ills = [
            ("loops", "loop", found.loops, dense.loops if dense else 0),
            ("is empty", "are empty", found.empty, dense.empty if dense else 0),
        ]
        told = [ill for ill in ills if ill[2] or ill[3]]
        if told:
            said = [(f"{count or 'none'}", many if count > 1 else one) for one, many, count, _ in told]
            others = " and ".join(str(other) for *_, other in told)
        else:  # no faults: one phrase for both
            said, others = [("none", " or ".join(one for one, *_ in ills))], "0"
        (first, verb), *more = said
        words = " and ".join([f"{first} of {found.answers} answers {verb}", *(" ".join(one) for one in more)])
        if dense is None:
            return words
        words = f"{words}; {self.reference} {others}"
        if self._stops_soon:
            words += f"; {found.tokens:.1f} tokens an answer, {self.reference} {dense.tokens:.1f}"
        return words

    @property
    def _stops_soon(self) -> bool:
        found, dense = self.greedy.figures, self.greedy.dense
        return dense is not None and found.tokens < _SHORT_SHARE * dense.tokens

    @property
    def degenerates(self) -> bool:
        """Whether more answers loop or are empty than the dense model's, or they are much shorter."""
        found, dense = self.greedy.figures, self.greedy.dense
        if dense is None:
            return bool(found.loops or found.empty)
        return found.loops > dense.loops or found.empty > dense.empty or self._stops_soon

    def beside(self, dense: AnswerFacts | None) -> AnswerFacts:
        """Return the facts with the dense model's figures and answers from another run on the same prompts."""
        if dense is None or (dense.fingerprint, dense.new_tokens) != (self.fingerprint, self.new_tokens):
            return self
        pairs = zip(self.samples, dense.samples, strict=True)
        sampled = self.sampled
        if sampled is not None and dense.sampled is not None:
            sampled = sampled.model_copy(update={"dense": dense.sampled.dense})
        return self.model_copy(
            update={
                "reference": "dense",
                "greedy": self.greedy.model_copy(update={"dense": dense.greedy.dense}),
                "sampled": sampled,
                "samples": tuple(
                    one.model_copy(update={"dense": other.dense, "dense_loops": other.dense_loops})
                    for one, other in pairs
                ),
            }
        )

    def lines(self) -> list[tuple[str, str]]:
        """List the findings as names and values; only the verdict for short answers."""
        rows = [("answers", f"{self.verdict()} (greedy, at most {self.new_tokens} tokens, prompts: {self._source})")]
        if self.short:
            return rows
        rows.append(("greedy", self.line(self.greedy)))
        if self.along is not None:
            shown = _with_interval(self.along.kl, self.along.interval)
            rows.append(("KL", f"{shown} nats a token along the dense model's answers"))
            shown = _with_interval(self.along.acceptance, self.along.acceptance_interval)
            rows.append(("acceptance", f"{shown} along the dense model's answers"))
        if self.sampled is not None:
            rows.append((f"T = {self.temperature:g}", self.line(self.sampled)))
        for sample in self.samples[:_SHOWN]:
            rows.append(("prompt", _one_line(sample.prompt)))
            rows += [] if sample.dense is None else [(self.reference, _one_line(sample.dense))]
            rows.append(("answer", _one_line(sample.answer)))
        return rows

    @property
    def _source(self) -> str:
        return f"{Path(self.prompts).name}{', in the chat template' if self.chat else ''}"

    def line(self, way: Way) -> str:
        """Return the figures of one way, each followed by the reference's."""
        parts = [
            self._pair(way, "loops", lambda found: f"{found.loops} of {found.answers}"),
            self._pair(way, "empty", lambda found: f"{found.empty} of {found.answers}"),
            self._pair(way, "ended", lambda found: f"{found.ended} of {found.answers}"),
            self._pair(way, "tokens", lambda found: f"{found.tokens:.1f}"),
        ]
        return ", ".join(parts)

    def _pair(self, way: Way, name: str, show: Callable[[Figures], str]) -> str:
        return f"{name} {show(way.figures)}" + ("" if way.dense is None else f" ({self.reference} {show(way.dense)})")


def _with_interval(value: float, interval: Interval | None) -> str:
    return f"{value:.4f}" + ("" if interval is None else f" [{interval[0]:.4f}, {interval[1]:.4f}]")


def _one_line(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _MOST_LETTERS else f"{words[:_MOST_LETTERS]} …"


def facts_of(
    asked: Asked, prompts: Sequence[str], models: tuple[Answers | None, Answers], along: Along | None = None
) -> AnswerFacts:
    """Compare two models' answers to the same prompts.

    Args:
        asked: the prompts' settings.
        prompts: the prompts.
        models: the answers of the dense model (None if there is none) and of the other.
        along: the other model's divergence along the dense model's answers.
    """
    dense, answers = models
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


class Requirement(BaseModel):
    """A condition and the measured figure."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    condition: str
    figure: float | None
    """None if it could not be measured; then the condition does not hold."""
    dense: float | None
    """The dense model's figure, if the condition is relative to it."""
    holds: bool
    interval: Interval | None = None
    """95 % interval over the answers, of the figure or its paired difference from the dense model's; for information only."""

    def line(self) -> str:
        """Return a line on the condition and its figures."""
        found = "not measured" if self.figure is None else f"{self.figure:.4g}"
        dense = "" if self.dense is None else f", dense {self.dense:.4g}"
        if self.interval is not None:
            low, high = self.interval
            dense += f", {low:.4g} to {high:.4g}" if self.dense is None else f", difference {low:+.2g} to {high:+.2g}"
        return f"{self.condition} {'holds' if self.holds else 'does not hold'} ({found}{dense})"


def answer_rows(
    facts: AnswerFacts | None, left_out: str | None, required: Sequence[Requirement]
) -> list[tuple[str, str]]:
    """List a report's last lines on answers as names and values. left_out: why there are none."""
    rows = [] if facts is None else facts.lines()
    rows += [] if left_out is None else [("answers", f"not checked: {left_out}")]
    return rows + [("required", one.line()) for one in required]


def judge(conditions: Sequence[Condition], facts: AnswerFacts | None) -> tuple[Requirement, ...]:
    """Check answers against conditions.

    Args:
        conditions: the requirements.
        facts: the answers; without them no condition holds.

    Returns:
        One requirement per condition, and the unmet implicit ones of `no_emptier`.
    """
    found = [_judge(condition, facts) for condition in conditions]
    beside_dense = facts is not None and facts.greedy.dense is not None
    unsaid = [_judge(condition, facts) for condition in no_emptier(conditions, beside_dense)]
    return (*found, *(one for one in unsaid if one.figure is not None and not one.holds))


def _judge(condition: Condition, facts: AnswerFacts | None) -> Requirement:
    figure, dense = (None, None) if facts is None else _figures(condition, facts)
    known = figure is not None and not (condition.against_dense and dense is None)
    holds = known and condition.holds(figure or 0.0, dense)
    return Requirement(
        condition=condition.text,
        figure=figure,
        dense=dense if condition.against_dense else None,
        holds=holds,
        interval=_interval(condition, facts) if known and facts is not None else None,
    )


def _interval(condition: Condition, facts: AnswerFacts) -> Interval | None:
    """Return the interval of a figure along answers, or of a paired difference in loops or empty answers, or None."""
    if condition.name in ALONG and facts.along is not None:
        return facts.along.interval if condition.name == "kl" else facts.along.acceptance_interval
    if condition.sampled or not condition.against_dense or condition.name not in ("loops", "empty"):
        return None
    own, dense = ([getattr(one, name) for one in facts.samples] for name in _PAIRED[condition.name])
    pairs = Counter((bool(one), bool(other)) for one, other in zip(own, dense, strict=True))
    found = Difference(pairs[True, True], pairs[True, False], pairs[False, True], pairs.total()).bounds(_TWO_SIDED)
    return (found.low * found.items, found.high * found.items)


def _figures(condition: Condition, facts: AnswerFacts) -> tuple[float | None, float | None]:
    """Return the figure of a condition, and the dense model's."""
    way = facts.sampled if condition.sampled else facts.greedy
    if condition.name in ALONG:
        return None if facts.along is None else getattr(facts.along, condition.name), None
    if way is None:
        return None, None
    return getattr(way.figures, condition.name), None if way.dense is None else getattr(way.dense, condition.name)
