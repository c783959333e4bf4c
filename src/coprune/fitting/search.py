"""The search: plain quants, then fewer tokens and parts; one at a time, and only what is smaller than the best so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Literal

from coprune.base.errors import BadInput, CopruneError
from coprune.evaluation.bounds import LEAST_ITEMS, Share
from coprune.fitting.budget import EXACT_DENSE, Budget
from coprune.fitting.candidates import (
    AS_GIVEN,
    DENSE,
    EMBEDDINGS,
    EXACT,
    MIXED,
    STRUCTURES,
    VOCABULARIES,
    Candidate,
    Cut,
)
from coprune.fitting.finding import Finding, Wish
from coprune.fitting.fit_notes import Looks, Measured, Sizes, noted
from coprune.fitting.made_model import is_file_of
from coprune.fitting.require import Condition, Held, Verdict, pairs, refuse_few
from coprune.fitting.score import DENSE_SOUND, answer_text
from coprune.fitting.tasks import METRICS_OF, Task
from coprune.fitting.team import Team, places_ahead
from coprune.fitting.type_mixtures import has_time, mixtures
from coprune.fitting.workshop import VERDICTS_FILE, Workshop
from coprune.fitting.writing import REQUIRED, provable
from coprune.store.notes import write_note

_RUNGS = (8, 4, 2, 1)
"""Parts of the seen items after which it may be told already."""
_FIRST = "q4_k_m"
"""The type that is tried first."""
_ALIGN = 64
_GAIN = 0.01
"""Of what was given that a result saves at least."""
_DISTILLED_SHARE = 0.3
"""Share of the remaining budget for one distillation."""
_DISTILLED = (8_192, 262_144)
"""Tokens of a distillation at least and at most."""


class Search:
    """Looks for the cheapest candidate that keeps what is required."""

    def __init__(self, workshop: Workshop, wish: Wish, team: Team) -> None:
        """Begin a search for what `wish` asks of the workshop's tasks."""
        self.workshop, self.wish, self.tasks = workshop, wish, workshop.asked.tasks
        self._writing = workshop.asked.writing
        self._all = workshop.asked.every_task
        self._can_cut = all(provable(task) for task in self._writing)
        self._team = team
        self.tried: dict[Candidate, Measured] = {}
        self._safety: dict[Candidate, float] = {}  # by the seen half
        self._kept: list[Candidate] = []  # what keeps everything on the seen half, the best last
        self._kept_elsewhere: list[Candidate] = []  # the same of files from elsewhere, which nothing is cut from
        self._lost: list[Candidate] = []  # what does not, so that nothing is tried that is cut more
        self._vocabulary = len(workshop.making.tokenizer)
        self.budget = Budget(workshop, wish.budget, team.count)
        self._least = {task.key: 0 for task in self.tasks}  # items that prove something at all
        for condition, task in self._pairs():
            self._least[task.key] = max(self._least[task.key], condition.least_items() or 0)
        self.untried: list[Candidate] = []

    def measure_dense(self) -> Measured:
        """Measure the dense model on both halves. Raises BadInput where it keeps nothing, or items cannot tell."""
        self.tasks = self.budget.carried(self._least)
        every = {task.name: [*task.seen, *task.unseen] for task in self.tasks}
        found = self.workshop.measure(EXACT_DENSE, every)
        if found.refused:
            raise BadInput(
                f"the dense model cannot be measured: {found.refused}", field="model", value=self.workshop.asked.model
            )
        for task in self.tasks:
            self._refuse_chance(task, found)
        for condition, task in self._pairs():
            figures = found.of(task, condition.metric, task.apart(task.unseen))
            refuse_few(condition, task, figures)
            self.workshop.reporter.say(f"Dense: {condition.metric} {fmean(figures):.3f} on {task.name}")
        self.workshop.collect(self.tasks, self.budget.own)
        return found

    def _refuse_chance(self, task: Task, dense: Measured) -> None:
        if "accuracy" not in METRICS_OF[task.kind]:
            return
        places = task.apart([*task.seen, *task.unseen])
        right = dense.of(task, "accuracy", places)
        share = sum(right) / len(right)
        if task.kind == "answer" and not any(right):
            item, making = task.items[places[0]], self.workshop.making
            reader = making.reader(making.file(EXACT_DENSE), DENSE)
            cause = f"none of the dense model's {len(right)} answers to {task.name} matches"
            said = (
                f"{answer_text(reader, item).strip()[:60]!r} was written where {item.regex or item.answer!r} is right"
            )
            raise BadInput(cause, field="task", value=task.name, fix=f"{said}; give examples in the prompt, or a regex")
        if task.kind == "choice" and not Share(sum(right), 0, 0, len(right)).is_above(task.chance):
            what = f"the dense model's accuracy on {task.name}, {share:.3f} of {len(right)} items,"
            cause = f"{what} is not proven to be above chance ({task.chance:.3f})"
            fix = "there is nothing to keep: take another model, prompts that it understands, or more items"
            raise BadInput(cause, field="task", value=task.name, fix=fix)

    def _pairs(self) -> list[tuple[Condition, Task]]:
        return [*pairs(self.wish.conditions, self.tasks)]

    def _report(self, candidate: Candidate, held: Sequence[Held], half: str) -> None:
        """Print what a candidate keeps."""
        found = self.tried[candidate]
        said = f"refused: {found.refused}" if found.refused else f"{found.bytes / 1e6:.1f} MB, no cheaper than the best"
        if held:
            first = min(held, key=lambda one: one.margin[1])
            margin = f"margin {first.margin[0]:+.4f}, {first.bounds.items} {half} items"
            said = f"{found.bytes / 1e6:.1f} MB, {verdict_of(held)} ({margin})"
        self.workshop.reporter.say_once(f"{candidate.name}: {said}")

    def _has_time(self, candidate: Candidate) -> bool:
        """Return whether the budget has time for a candidate and for all that is to be proven then."""
        proof = self.budget.proof(len(_chain([*self._all_kept, candidate])))
        enough = self.budget.expected(candidate, [*self.tried]) + proof <= self.budget.left
        return not self.tried or enough or not self._is_new(candidate, self._seen())

    def _measure(
        self, candidate: Candidate, wanted: Mapping[str, Sequence[int]], ahead: Sequence[Candidate]
    ) -> Measured:
        """Measure a candidate, and with other workers those that may be asked for next."""
        anew = [one for one in (candidate, *ahead) if self._is_new(one, wanted)]
        if candidate in anew:
            self.workshop.note_rest()
            if self._team.alone:
                # Where something is kept already, the proof of that must have its time.
                kept = self._all_kept
                until = self.budget.until(self.budget.proof(len(_chain(kept)))) if kept else math.inf
                self.workshop.measure(candidate, wanted, until)
            else:
                self._team.measure(self.workshop, anew, wanted)
                self.workshop.note_rest(counts=False)
        self.tried[candidate] = self.workshop.known(candidate)
        return self.tried[candidate]

    @property
    def _all_kept(self) -> list[Candidate]:
        """What keeps everything on the seen half, made here or not, the best last."""
        return sorted([*self._kept, *self._kept_elsewhere], key=self.cost, reverse=True)

    def _is_new(self, candidate: Candidate, wanted: Mapping[str, Sequence[int]]) -> bool:
        known = self.workshop.known(candidate)
        return not known.refused and (not known.bytes or bool(self._missing(known, wanted)))

    def _missing(self, known: Measured, wanted: Mapping[str, Sequence[int]]) -> list[int]:
        return [place for task in self._all for place in known.missing(task, wanted.get(task.name, ()))]

    def _seen(self, part: int = 1) -> dict[str, list[int]]:
        return {task.name: [*task.seen[: max(1, len(task.seen) // part)]] for task in self.tasks}

    def cost(self, candidate: Candidate) -> float:
        """Return the target quantity of a measured candidate, which is minimised."""
        found = self.workshop.known(candidate)
        return {"size": float(found.bytes), "memory": float(found.memory), "speed": -found.speed}[self.wish.target]

    def judged(self, candidate: Candidate, places: Mapping[str, Sequence[int]]) -> list[Held]:
        """Test all conditions on some items, and where prompts were continued, whether the model still writes."""
        found, dense = self.workshop.known(candidate), self.workshop.known(EXACT_DENSE)
        held = [
            condition.judge(*(one.of(task, condition.metric, task.apart(places[task.name])) for one in (found, dense)))
            for condition, task in self._pairs()
        ]
        for task in self._writing:
            if own := places.get(task.name):
                beside = {"sound": DENSE_SOUND}
                held += [
                    one.judge(*(found.of(task, name, own) for name in (one.metric, beside.get(one.metric, one.metric))))
                    for one in REQUIRED
                ]
        return held

    def judged_so_far(self, candidate: Candidate) -> list[Held]:
        """Test all conditions on the items of the seen half measured so far; empty without any."""
        known, seen = self.workshop.known(candidate), self._seen()
        asked = seen | self._continued("seen")
        places = {name: [one for one in own if not self._missing(known, {name: [one]})] for name, own in asked.items()}
        return self.judged(candidate, places) if all(places[name] for name in seen) else []

    def _continued(self, half: Literal["seen", "unseen"], cut: Cut | None = None) -> dict[str, list[int]]:
        """Return the prompts of a half that show whether a cut model still writes; none of the dense model."""
        return {} if cut == DENSE else {task.name: [*getattr(task, half)] for task in self._writing}

    def _tried_on(
        self, candidate: Candidate, best: Candidate | None, ahead: Sequence[Candidate]
    ) -> Literal["kept", "lost", "no cheaper", "refused", "late"]:
        """Make and measure a candidate, on a part of the seen items first, as far as it takes to tell."""
        if self._measure(candidate, {}, ahead).refused:
            return "refused"
        if best is not None and self.cost(candidate) >= self.cost(best):
            return "no cheaper"
        verdict = Verdict.OPEN
        for part in self._parts(candidate.cut):
            if verdict is Verdict.OPEN:
                found = self._measure(candidate, seen := self._seen(part), ahead)
                if self._missing(found, seen):
                    return "late"
                verdict = self._verdict(candidate, seen)
        if verdict is Verdict.KEPT and (continued := self._continued("seen", candidate.cut)):
            found = self._measure(candidate, continued, ())
            if self._missing(found, continued):
                return "late"
            verdict = self._verdict(candidate, seen | continued)
        return "kept" if verdict is Verdict.KEPT else "lost"

    def _verdict(self, candidate: Candidate, places: Mapping[str, Sequence[int]]) -> Verdict:
        """Judge a candidate by some of the seen items, and keep how clearly."""
        held = self.judged(candidate, places)
        self._safety[candidate] = min(one.safety for one in held)
        return verdict_of(held)

    def _parts(self, cut: Cut) -> Sequence[int]:
        """Return parts of the seen items that tell about a cut: if they are many, not those whose text made it."""
        few = any(len(task.seen) < 4 * max(LEAST_ITEMS, self._least[task.key]) for task in self.tasks)
        return _RUNGS if cut == DENSE or few else _RUNGS[:-1]

    def _is_larger(self, candidate: Candidate, best: Candidate) -> bool:
        """Return whether a quant is known not to be smaller than the best before it is made itself."""
        workshop = self.workshop
        known = workshop.is_sized(candidate) or workshop.making.is_made(candidate.cut.sized_by)
        if self.wish.target != "size" or candidate.type == EXACT or not known:
            return False
        try:
            return self.workshop.bytes_of(candidate) >= self.workshop.bytes_of(best)
        except CopruneError:  # the reason is kept when it is measured
            return False

    def _halve(
        self, pool: Sequence[Candidate], first: int | None = None, one: bool = False, plain: bool = False
    ) -> None:
        """Look for the cheapest of a pool that keeps everything, by halves: among the smaller ones after one that does.

        Only what is cheaper than the best so far is measured. Where the time is too short it ends, and cheaper pools go on.

        Args:
            pool: the largest first; what is smaller keeps no more.
            first: place of the one to begin with; by default the middle.
            one: whether any that keeps everything ends it.
            plain: whether they are compared with the best plain quant.
        """
        low, high, left, lost = 0, len(pool), list(pool), list[Candidate]()
        types = [one.type for one in self._plain()]
        place = (high - 1) // 2 if first is None else first
        while low < high and not (one and self._kept):
            candidate = left[place]
            best = _best_plain(self._kept) if plain else self._kept[-1] if self._kept else None
            if best is not None and self._is_larger(candidate, best):
                said = "no cheaper"
            elif any(other.spares(candidate, types) for other in self._lost):
                said = "lost"
            elif self._has_time(candidate):
                ahead = [left[next] for next in places_ahead(low, place, high, self._team.count)[1:]]
                said = self._tried_on(candidate, best, ahead)
            else:
                said = "late"
            if said == "late":
                self.untried += [candidate, *(other for other in left[low:high] if other != candidate)]
                lost += [candidate] if self.tried.pop(candidate, None) else []
                break
            if candidate in self.tried:
                self._report(candidate, self.judged_so_far(candidate), "seen")
            if said == "kept":
                self._kept = sorted([*self._kept, candidate], key=self.cost, reverse=True)
            elif candidate not in self._kept:
                lost.append(candidate)
            if said == "refused":
                del left[place]
                high -= 1
            elif said == "lost":
                self._lost.append(candidate)
                high = place
            else:
                low = place + 1
            place = (low + high) // 2
        for candidate in lost:  # now, since others of the pool copy tensors of their files
            self.workshop.making.drop(candidate)

    def run(self) -> Finding:
        """Search, and judge the best on the unseen half. Raises BadInput where the budget is too short for one candidate."""
        self.measure_dense()
        self._measure_elsewhere()
        self._climb()
        return self._or_as_given(self._proven())

    def _or_as_given(self, finding: Finding) -> Finding:
        """Return what was given where nothing clearly better than it is proven."""
        if not is_file_of(self.workshop.making.source, self.workshop.asked.runtime):
            if finding.chosen == AS_GIVEN:
                said = "; ".join(f"{one.name}: {found.refused}" for one, found in self.tried.items() if found.refused)
                raise BadInput(f"nothing can be made of this model ({said})", field="types", value=self.wish.types)
            return finding
        self.workshop.measure(AS_GIVEN, {})
        given = self.cost(AS_GIVEN)
        if finding.kept and given - self.cost(finding.chosen) > _GAIN * abs(given):
            return finding
        return replace(finding, chosen=AS_GIVEN, kept=False, plain=None)

    def _measure_elsewhere(self) -> None:
        """Measure the files from elsewhere, the smallest first; nothing is concluded from one about another."""
        for candidate in sorted(self.workshop.asked.elsewhere, key=self.workshop.bytes_of):
            said = self._tried_on(candidate, None, ()) if self._has_time(candidate) else "late"
            if said == "late":
                self.untried.append(candidate)
                self.tried.pop(candidate, None)
                continue
            self._report(candidate, self.judged_so_far(candidate), "seen")
            if said == "kept":
                self._kept_elsewhere.append(candidate)

    def _climb(self) -> None:
        """Collect what keeps everything."""
        plain, bits, tokens = self._plain(), self._embeddings, self._vocabularies
        usual = Candidate(DENSE, _FIRST)
        first = usual if usual in plain else plain[(len(plain) - 1) // 2]
        # Fewer bits for the embeddings alone save more than the smallest type where the tables are larger than the blocks.
        fewer = bits(first)
        large_tables = not fewer or self.workshop.bytes_of(fewer[-1]) < self.workshop.bytes_of(plain[-1])
        self._halve(plain, plain.index(first), one=large_tables)
        if not self._kept:  # what is smaller keeps no more than the largest quant
            return
        if not self._can_cut:
            self.workshop.reporter.say("Too few items to tell whether a model still writes: no parts or tokens are cut")
        largest, smallest = self._kept[0], self._kept[-1]
        smaller = partial(self._smaller, last=(plain[-1] if large_tables else smallest).type)
        # A cut may save more bytes than smaller types do, for less: so from both ends.
        for base in dict.fromkeys((smallest, largest)):
            for pool in (tokens, self._fewer_bits, smaller) if large_tables else (self._fewer_bits, tokens, smaller):
                before = self._kept[-1]
                self._halve(pool(base))
                base = base if self._kept[-1] == before else self._kept[-1]
        if large_tables:  # too large to win, perhaps, but what the result is compared with
            self._halve(plain[plain.index(largest) + 1 :], plain=True)
        for amounts in STRUCTURES:
            self._halve(self._structures(self._kept[-1], amounts))

    def _plain(self) -> list[Candidate]:
        """Return the quants of the dense model, largest first."""
        return sorted((Candidate(DENSE, one) for one in self.wish.types), key=self.workshop.bytes_of, reverse=True)

    def _embeddings(self, base: Candidate) -> list[Candidate]:
        """Return variants with smaller embeddings, which may not be smaller than the quantiser's own."""
        if "embedding" in self.wish.without or base.type in (EXACT, MIXED):
            return []
        found = [replace(base, embedding=stored) for stored in EMBEDDINGS]
        sizes = {one: self.workshop.bytes_of(one) for one in (base, *found)}
        return sorted((one for one in found if sizes[one] < sizes[base]), key=sizes.__getitem__, reverse=True)

    def _fewer_bits(self, base: Candidate) -> list[Candidate]:
        """Return variants with a type for each tensor that are smaller than the best, or else with smaller embeddings."""
        found = list[Candidate]()
        if "mixed" not in self.wish.without and base.type != EXACT:
            if has_time(self.workshop, self.budget, self._kept[0]):
                found = mixtures(self.workshop, base.cut)
            else:
                self.untried.append(Candidate(DENSE, MIXED))
        best = self.workshop.bytes_of(self._kept[-1])
        return [one for one in found if self.workshop.bytes_of(one) < best] if found else self._embeddings(base)

    def _vocabularies(self, base: Candidate) -> list[Candidate]:
        if "vocabulary" in self.wish.without or not self._can_cut:
            return []
        sizes = [int(share * self._vocabulary) // _ALIGN * _ALIGN for share in VOCABULARIES]
        return [base.of(Cut((f"vocabulary={size}",))) for size in sizes if size]

    def _smaller(self, base: Candidate, last: str) -> list[Candidate]:
        """Return a cut in the types from the one below its own to the last, the smallest that keeps everything without it.

        Beside types by tensor, which few items may judge otherwise than was predicted, the smallest plain quant's types and
        embeddings are tried.
        """
        types, mixed = [one.type for one in self._plain()], base.type == MIXED
        plain = _best_plain(self._kept) if mixed else base
        if plain is None or plain.type not in types:
            return []
        plain = plain.of(base.cut)
        lower = [replace(plain, type=one) for one in types[types.index(plain.type) + 1 : types.index(last) + 1]]
        return sorted([*lower, *self._embeddings(plain)], key=self.workshop.bytes_of, reverse=True) if mixed else lower

    def _structures(self, base: Candidate, amounts: Sequence[str]) -> list[Candidate]:
        left_out = (*self.wish.without, *(() if self.workshop.making.may_have_experts else ("experts",)))
        asked = [one for one in amounts if one.partition("=")[0] not in left_out]
        if not asked or not self._can_cut:
            return []
        tokens = 0 if self.untried else self._distilled()  # takes more time than what there was none for
        found = [base.of(Cut((*base.cut.removed, one), tokens or _DISTILLED[0])) for one in asked]
        if not tokens:
            self.untried += found
            return []
        return found

    def _distilled(self) -> int:
        """Return the tokens of a distillation that fits the time budget, or an earlier one; 0 for too few.

        By what reading them takes the dense model, in powers of two, so that a few seconds more or less change nothing.
        """
        file = self.workshop.folder / "text" / "distilled.json"
        if tokens := noted(file, Sizes, {}).get("tokens", 0):
            return tokens
        carried, (least, most) = _DISTILLED_SHARE * self.budget.left * self.budget.reads, _DISTILLED
        found = 0 if carried < least else min(most, 1 << (int(carried).bit_length() - 1))
        write_note(file, Sizes({"tokens": found}))
        return found

    def _proven(self) -> Finding:
        """Test on the unseen half what the seen half keeps, in the order of how clearly, up to the first that fails.

        In an order that the seen half decides each is tested at the full level, and still at most one in twenty searches ends
        with a model that misses a requirement (testing in a fixed sequence). The largest quant goes first. What there is no
        time for is passed over; no verdict decides that.
        """
        unseen = {task.name: [*task.unseen] for task in self.tasks}
        surest, least = self._surest(), _chain(self._all_kept)
        first = [] if self._kept_elsewhere and not self._kept else [self._plain()[0]]
        chain = [*dict.fromkeys([*first, *surest])]
        judged: dict[Candidate, list[Held]] = {}
        passed, unproven = list[Candidate](), list[Candidate]()
        for place, candidate in enumerate(chain):
            asked = unseen | self._continued("unseen", candidate.cut)
            after = self.budget.proof(1 + sum(one in least for one in chain[place + 1 :]))
            made = 0.0 if candidate in self.tried else self.budget.expected(candidate, [*self.tried])
            late = made + after > self.budget.left
            if surest and late and candidate not in least and self._is_new(candidate, asked):
                unproven.append(candidate)
                continue
            self.tried[candidate] = self.workshop.measure(candidate, asked)
            if self.tried[candidate].refused:
                self._report(candidate, (), "unseen")
                continue
            judged[candidate] = self.judged(candidate, asked)
            self._report(candidate, judged[candidate], "unseen")
            if verdict_of(judged[candidate]) is not Verdict.KEPT:
                break
            passed.append(candidate)
        passed.sort(key=self.cost, reverse=True)
        tried, untried = [*self.tried], [one for one in dict.fromkeys(self.untried) if one not in self.tried]
        if not judged:
            return Finding(AS_GIVEN, [], False, None, tried, judged, untried)
        chosen, looks = (passed or [*judged])[-1], self._looks([candidate.key for candidate in judged])
        untried += [one for one in unproven if not passed or (one in tried and self.cost(one) < self.cost(chosen))]
        return Finding(chosen, judged[chosen], bool(passed), _best_plain(passed), tried, judged, untried, looks)

    def _surest(self) -> list[Candidate]:
        """Order what the seen half keeps by how clearly. What is cut less is as safe as what is cut more, quants untried, too."""
        plain = self._plain()
        types, pool = (
            [one.type for one in plain],
            [*self._kept, *(one for one in plain if one not in self.tried)],
        )
        safe = {one: [self._safety[other] for other in self._kept if one.spares(other, types)] for one in pool}
        safe |= {one: [self._safety[one]] for one in self._kept_elsewhere}
        sizes = {one: self.workshop.known(one).bytes or self.workshop.bytes_of(one) for one in safe if safe[one]}
        found = sorted(sizes, key=lambda one: (-max(safe[one]), -sizes[one]))
        # Files that cannot win come last, where they keep nothing else from its verdict.
        dear = [one for one in self._kept_elsewhere if self._kept and self.cost(one) >= self.cost(self._kept[-1])]
        return [*(one for one in found if one not in dear), *(one for one in found if one in dear)]

    def _looks(self, judged: list[str]) -> int:
        """Record a sequence of candidates that the unseen half has judged by these conditions, and count such records.

        The same candidates judged by looser conditions are another attempt to have one kept.
        """
        file = self.workshop.folder / VERDICTS_FILE
        damaged: tuple[list[str], list[str]] = ([], ["a note that is damaged now"])
        known = noted(file, Looks, [damaged] if file.exists() else [])
        look = (sorted("".join(condition.text.split()) for condition in self.wish.conditions), judged)
        if look not in known:
            known.append(look)
            write_note(file, Looks(known))
        return len(known)


def _best_plain(kept: Sequence[Candidate]) -> Candidate | None:
    return next((one for one in reversed(kept) if one.plain), None)


def _chain(kept: Sequence[Candidate]) -> list[Candidate]:
    """Return what is proven however short the time is: the largest, the best plain quant, and the two best."""
    return [*dict.fromkeys(one for one in (*kept[:1], _best_plain(kept), *kept[-2:]) if one is not None)]


def verdict_of(held: Sequence[Held]) -> Verdict:
    """Combine the verdicts of all conditions."""
    said = {one.verdict for one in held}
    return next((one for one in (Verdict.LOST, Verdict.OPEN) if one in said), Verdict.KEPT)
