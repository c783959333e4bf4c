"""The search: plain quants, then smaller vocabularies and fewer parts, skipping candidates no smaller than the best so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Literal

from coprune.base.errors import BadInput, CopruneError
from coprune.evaluation.bounds import LEAST_ITEMS
from coprune.fitting.budget import DISTILLED, EXACT_DENSE, Budget
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
from coprune.fitting.chance import refuse_chance
from coprune.fitting.finding import Finding, Wish, best_plain, verdict_line
from coprune.fitting.fit_notes import Measured, count_looks
from coprune.fitting.made_model import is_file_of
from coprune.fitting.require import Condition, Held, Verdict, few_items, items_needed, pairs, refuse_few, verdict_of
from coprune.fitting.score import DENSE_SOUND
from coprune.fitting.tasks import Task
from coprune.fitting.team import Team, places_ahead
from coprune.fitting.type_mixtures import has_time, mixtures
from coprune.fitting.workshop import VERDICTS_FILE, Workshop
from coprune.fitting.writing import REQUIRED, provable

_RUNGS = (8, 4, 2, 1)
"""Divisors of the seen half: a candidate is judged on an eighth first, and on more while the verdict is open."""
_FIRST = "q4_k_m"
"""Type to try first."""
_ALIGN = 64
_SLOW = 0.5
"""Share of the time left that one plain quant may take before other candidates were tried."""
_GAIN = 0.01
"""Minimum relative saving over the given model; with less, the given model is returned."""


class Search:
    """Search for the cheapest candidate that meets all requirements."""

    def __init__(self, workshop: Workshop, wish: Wish, team: Team) -> None:
        """Prepare a search with the workshop's tasks and the requirements of `wish`."""
        self.workshop, self.wish, self.tasks = workshop, wish, workshop.asked.tasks
        self._writing = workshop.asked.writing
        self._all = workshop.asked.every_task
        self._can_cut = all(provable(task) for task in self._writing)
        self._team = team
        self.tried: dict[Candidate, Measured] = {}
        self._safety: dict[Candidate, float] = {}  # on the seen half
        self._kept: list[Candidate] = []  # passed on the seen half, the cheapest last
        self._kept_foreign: list[Candidate] = []  # the same for the user's files, which are not cut further
        self._lost: list[Candidate] = []  # failed on the seen half; anything reduced more is skipped
        self._vocabulary = len(workshop.making.tokenizer)
        self.budget = Budget(workshop, wish.budget, team.count)
        self._least = {task.key: 0 for task in self.tasks}  # minimum unseen items for a proof
        for condition, task in self._pairs():
            self._least[task.key] = max(self._least[task.key], condition.least_items() or 0)
        self.untried: list[Candidate] = []
        self._interrupted: list[Candidate] = []  # before they were made

    def measure_dense(self) -> Measured:
        """Measure the dense model on both halves. Raises BadInput if it is no better than chance, or items are too few."""
        self.tasks = self.budget.affordable_tasks(self._least)
        every = {task.name: [*task.seen, *task.unseen] for task in self.tasks}
        found = self.workshop.measure(EXACT_DENSE, every)
        if found.refused:
            raise BadInput(
                f"the dense model cannot be measured: {found.refused}", field="model", value=self.workshop.asked.model
            )
        for task in self.tasks:
            refuse_chance(self.workshop, task, found)
        for condition, task in self._pairs():
            figures = found.of(task, condition.metric, task.apart(task.unseen))
            refuse_few(condition, task, figures)
            if few := few_items(condition, task, figures):
                self.workshop.reporter.say(few)
            self.workshop.reporter.say(f"Dense: {condition.metric} {fmean(figures):.3f} on {task.name}")
        self.workshop.collect(self.tasks, self.budget.own)
        return found

    def _pairs(self) -> list[tuple[Condition, Task]]:
        return [*pairs(self.wish.conditions, self.tasks)]

    def _report(self, candidate: Candidate, held: Sequence[Held], half: str) -> None:
        """Report a candidate's size and verdict."""
        self.workshop.reporter.say_once(f"{candidate.name}: {verdict_line(self.tried[candidate], held, half)}")

    def _has_time(self, candidate: Candidate, share: float = 1.0) -> bool:
        """Return whether the budget has time for a candidate and for the final test afterwards.

        share: of the time before that test, which the candidate may take.
        """
        left = self.budget.left - self.budget.proof(_chain([*self._all_kept, candidate]))
        enough = self._expected(candidate) <= share * left
        return not self.tried or enough or not self.workshop.lacks(candidate, self._seen())

    def _expected(self, candidate: Candidate) -> float:
        return self.budget.expected(candidate, [*self.tried, *self._interrupted])

    def _measure(
        self, candidate: Candidate, wanted: Mapping[str, Sequence[int]], ahead: Sequence[Candidate], share: float = 1.0
    ) -> Measured:
        """Measure a candidate, and in other workers those that may be needed next. share: of the time left."""
        anew = [one for one in (candidate, *ahead) if self.workshop.lacks(one, wanted)]
        if candidate in anew:
            self.workshop.note_rest()
            kept = self._all_kept  # once there is one, time is reserved to prove it
            until = self.budget.until(self.budget.proof(_chain(kept)), share) if kept else math.inf
            if self._team.alone:
                self.workshop.measure(candidate, wanted, until)
            else:
                self._team.measure(self.workshop, anew, wanted, until)
                self.workshop.note_rest(counts=False)
        self.tried[candidate] = self.workshop.known(candidate)
        return self.tried[candidate]

    @property
    def _all_kept(self) -> list[Candidate]:
        """All candidates that passed on the seen half, the user's files included, the cheapest last."""
        return sorted([*self._kept, *self._kept_foreign], key=self.cost, reverse=True)

    def _missing(self, known: Measured, wanted: Mapping[str, Sequence[int]]) -> list[int]:
        return [place for task in self._all for place in known.missing(task, wanted.get(task.name, ()))]

    def _seen(self, part: int = 1) -> dict[str, list[int]]:
        return {task.name: [*task.seen[: max(1, len(task.seen) // part)]] for task in self.tasks}

    def cost(self, candidate: Candidate) -> float:
        """Return the quantity to minimise, for a measured candidate."""
        found = self.workshop.known(candidate)
        return {"size": float(found.bytes), "memory": float(found.memory), "speed": -found.speed}[self.wish.target]

    def judged(self, candidate: Candidate, places: Mapping[str, Sequence[int]]) -> list[Held]:
        """Test all conditions on some items and, if prompts were continued, whether the model still writes."""
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
        """Test all conditions on the seen items measured so far; empty if a task has none."""
        known, seen = self.workshop.known(candidate), self._seen()
        asked = seen | self._continued("seen")
        places = {name: [one for one in own if not self._missing(known, {name: [one]})] for name, own in asked.items()}
        return self.judged(candidate, places) if all(places[name] for name in seen) else []

    def _continued(self, half: Literal["seen", "unseen"], cut: Cut | None = None) -> dict[str, list[int]]:
        """Return the prompts of a half that test whether a cut model still writes; none for the dense model."""
        return {} if cut == DENSE else {task.name: [*getattr(task, half)] for task in self._writing}

    def _tried_on(
        self, candidate: Candidate, best: Candidate | None, ahead: Sequence[Candidate], share: float = 1.0
    ) -> Literal["kept", "lost", "no cheaper", "refused", "late"]:
        """Make a candidate and measure it on more and more of the seen items, until the verdict is clear."""
        found = self._measure(candidate, {}, ahead, share)
        if found.refused:
            return "refused"
        if found.unmade:
            self._interrupted.append(candidate)
            return "late"
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
        """Judge a candidate on some seen items, and record its margin of safety."""
        held = self.judged(candidate, places)
        self._safety[candidate] = min(one.safety for one in held)
        return verdict_of(held)

    def _parts(self, cut: Cut) -> Sequence[int]:
        """Return the divisors of the seen half; if items are many, a cut is not judged on those that calibrated it."""
        few = any(len(task.seen) < 4 * max(LEAST_ITEMS, self._least[task.key]) for task in self.tasks)
        return _RUNGS if cut == DENSE or few else _RUNGS[:-1]

    def _is_larger(self, candidate: Candidate, best: Candidate) -> bool:
        """Return whether a quant, before it is made, is known not to be smaller than the best."""
        workshop = self.workshop
        known = workshop.is_sized(candidate) or workshop.making.is_made(candidate.cut.sized_by)
        if self.wish.target != "size" or candidate.type == EXACT or not known:
            return False
        try:
            return self.workshop.bytes_of(candidate) >= self.workshop.bytes_of(best)
        except CopruneError:  # measuring it will record the reason
            return False

    def _halve(
        self,
        pool: Sequence[Candidate],
        first: int | None = None,
        one: bool = False,
        plain: bool = False,
        share: float = 1.0,
    ) -> None:
        """Find the cheapest candidate of a pool that meets all requirements, by binary search.

        Only candidates cheaper than the best so far are measured, and only those that the time left suffices for. When time runs
        out the search of this pool ends; the next, cheaper pools may still fit.

        Args:
            pool: descending in size; a smaller candidate is assumed to be no better.
            first: index to begin with; by default the middle.
            one: whether to stop at the first that passes.
            plain: whether to compare with the best plain quant.
            share: of the time left, which a candidate may take.
        """
        low, high, left, lost = 0, len(pool), list(pool), list[Candidate]()
        types = [one.type for one in self._plain()]
        place = (high - 1) // 2 if first is None else first
        while low < high and not (one and self._kept):
            candidate = left[place]
            best = best_plain(self._kept) if plain else self._kept[-1] if self._kept else None
            if best is not None and self._is_larger(candidate, best):
                said = "no cheaper"
            elif any(other.spares(candidate, types) for other in self._lost):
                said = "lost"
            elif self._has_time(candidate, share):
                ahead = [left[next] for next in places_ahead(low, place, high, self._team.count)[1:]]
                said = self._tried_on(candidate, best, ahead, share)
            else:  # others of the pool may be made faster: i-quants take several times as long
                self.untried.append(candidate)
                said = "skipped"
            if said == "late":
                self.untried.append(candidate)
                lost += [candidate] if self.tried.pop(candidate, None) else []
                if share == 1:
                    self.untried += [other for other in left[low:high] if other != candidate]
                    break
                said = "skipped"
            if candidate in self.tried:
                self._report(candidate, self.judged_so_far(candidate), "seen")
            if said == "kept":
                self._kept = sorted([*self._kept, candidate], key=self.cost, reverse=True)
            elif candidate not in self._kept:
                lost.append(candidate)
            if said in ("refused", "skipped"):
                del left[place]
                high -= 1
            elif said == "lost":
                self._lost.append(candidate)
                high = place
            else:
                low = place + 1
            place = (low + high) // 2
        for candidate in lost:  # not earlier: others of the pool copy tensors from their files
            self.workshop.making.drop(candidate)

    def run(self) -> Finding:
        """Search, then test the best on the unseen half. Raises BadInput if the budget is too short for one candidate."""
        self.measure_dense()
        self._measure_foreign()
        self._climb()
        while self._takes_more_items():
            self._climb()
        return self._or_as_given(self._proven())

    def _takes_more_items(self) -> bool:
        """If nothing has won so far, take as many more items as may prove the closest candidate; return whether there are more.

        Only the seen half decides this, so the unseen one still proves at the full level.
        """
        given = is_file_of(self.workshop.making.source, self.workshop.asked.runtime)
        most = (1 - _GAIN) * self.workshop.bytes_of(AS_GIVEN) if given else math.inf
        if self.wish.target != "size" or any(self.cost(one) < most for one in self._all_kept):
            return False
        able = [one for one in self.tried if not self._all_kept or self.cost(one) < most]
        needed = [count for one in able if (count := items_needed(self.judged_so_far(one)))]
        before = self.tasks
        if needed:
            more = max(min(needed), *(3 * len(task.unseen) // 2 for task in before))
            try:
                self.budget.affordable_tasks(dict.fromkeys(self._least, more))
            except BadInput:  # no time for them
                return False
            self.measure_dense()
        if self.tasks == before:
            return False
        self._kept, self._kept_foreign, self._lost, self.untried = [], [], [], []
        self._measure_foreign()
        return True

    def _or_as_given(self, finding: Finding) -> Finding:
        """Return the finding, or the given model if nothing clearly better is proven."""
        if not is_file_of(self.workshop.making.source, self.workshop.asked.runtime):
            if finding.chosen == AS_GIVEN:
                said = "; ".join(f"{one.name}: {found.refused}" for one, found in self.tried.items() if found.refused)
                raise BadInput(
                    f"no candidate could be made of this model ({said})", field="types", value=self.wish.types
                )
            return finding
        self.workshop.measure(AS_GIVEN, {})
        given = self.cost(AS_GIVEN)
        if finding.kept and given - self.cost(finding.chosen) > _GAIN * abs(given):
            return finding
        return replace(finding, chosen=AS_GIVEN, kept=False, plain=None)

    def _measure_foreign(self) -> None:
        """Measure the user's files, ascending in size; the result of one says nothing about another."""
        for candidate in sorted(self.workshop.asked.foreign, key=self.workshop.bytes_of):
            said = self._tried_on(candidate, None, ()) if self._has_time(candidate) else "late"
            if said == "late":
                self.untried.append(candidate)
                self.tried.pop(candidate, None)
                continue
            self._report(candidate, self.judged_so_far(candidate), "seen")
            if said == "kept":
                self._kept_foreign.append(candidate)

    def _climb(self) -> None:
        """Search all pools and collect the candidates that pass on the seen half."""
        plain, bits, tokens = self._plain(), self._embeddings, self._vocabularies
        usual = Candidate(DENSE, _FIRST)
        first = usual if usual in plain else plain[(len(plain) - 1) // 2]
        # If the embedding tables are larger than the blocks, storing only them in fewer bits saves more than the smallest type.
        fewer = bits(first)
        large_tables = not fewer or self.workshop.bytes_of(fewer[-1]) < self.workshop.bytes_of(plain[-1])
        self._halve(plain, plain.index(first), one=large_tables, share=_SLOW)
        if not self._can_cut:
            self.workshop.reporter.say("Too few items to tell whether a model still writes: no parts or tokens are cut")
        for step in self.workshop.asked.step if self._can_cut else ():
            self._halve([one.of(Cut((step,))) for one in plain])
        if not self._kept:
            self._halve_slow(plain)
        if not self._kept:  # even the largest quant failed, so smaller ones would too
            return
        largest, smallest = self._kept[0], self._kept[-1]
        smaller = partial(self._smaller, last=(plain[-1] if large_tables else smallest).type)
        # A cut may save more than a smaller type at less loss, so it starts from the smallest and from the largest quant.
        for base in dict.fromkeys((smallest, largest)):
            for pool in (tokens, self._fewer_bits, smaller) if large_tables else (self._fewer_bits, tokens, smaller):
                before = self._kept[-1]
                self._halve(pool(base))
                base = base if self._kept[-1] == before else self._kept[-1]
        if large_tables:  # perhaps too large to win, but the result is compared with them
            self._halve(plain[plain.index(largest) + 1 :], plain=True)
        self._halve_slow(plain)
        for amounts in STRUCTURES:
            self._halve(self._structures(self._kept[-1], amounts))

    def _halve_slow(self, plain: Sequence[Candidate]) -> None:
        """Search the plain quants that were skipped, with all the time left."""
        skipped = [one for one in plain if one in self.untried]
        self.untried = [one for one in self.untried if one not in skipped]
        self._halve(skipped)

    def _plain(self) -> list[Candidate]:
        """Return the quants of the dense model, descending in size."""
        return sorted((Candidate(DENSE, one) for one in self.wish.types), key=self.workshop.bytes_of, reverse=True)

    def _worth_proving(self) -> list[Candidate]:
        """Return the quants that are no larger than the given file, which is the result if nothing smaller is proven."""
        if self.wish.target != "size" or not is_file_of(self.workshop.making.source, self.workshop.asked.runtime):
            return self._plain()
        most = (1 + _GAIN) * self.workshop.bytes_of(AS_GIVEN)
        return [one for one in self._plain() if self.workshop.bytes_of(one) <= most]

    def _embeddings(self, base: Candidate) -> list[Candidate]:
        """Return the variants with embeddings in fewer bits that are smaller than `base`, descending in size."""
        if "embedding" in self.wish.without or base.type in (EXACT, MIXED):
            return []
        found = [replace(base, embedding=stored) for stored in EMBEDDINGS]
        sizes = {one: self.workshop.bytes_of(one) for one in (base, *found)}
        return sorted((one for one in found if sizes[one] < sizes[base]), key=sizes.__getitem__, reverse=True)

    def _fewer_bits(self, base: Candidate) -> list[Candidate]:
        """Return variants with types by tensor that are smaller than the best; if there are none, smaller embeddings."""
        found = list[Candidate]()
        if "mixed" not in self.wish.without and base.type != EXACT:
            if has_time(self.workshop, self.budget):
                found = mixtures(self.workshop, base.cut)
            else:
                self.untried.append(Candidate(DENSE, MIXED))
        best = self.workshop.bytes_of(self._kept[-1])
        return [one for one in found if self.workshop.bytes_of(one) < best] if found else self._embeddings(base)

    def _vocabularies(self, base: Candidate) -> list[Candidate]:
        if "vocabulary" in self.wish.without or not self._can_cut:
            return []
        sizes = [int(share * self._vocabulary) // _ALIGN * _ALIGN for share in VOCABULARIES]
        return [base.of(Cut((*base.cut.removed, f"vocabulary={size}"))) for size in sizes if size]

    def _smaller(self, base: Candidate, last: str) -> list[Candidate]:
        """Return a cut in lower plain types, from the one below its own down to `last`.

        For a base with types by tensor, start from the smallest plain quant that passed, and vary its embeddings too: on few
        items, types by tensor may do worse than predicted.
        """
        types, mixed = [one.type for one in self._plain()], base.type == MIXED
        plain = best_plain(self._kept) if mixed else base
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
        tokens = 0 if self.untried else self.budget.distilled()  # slower than what already had no time
        found = [base.of(Cut((*base.cut.removed, one), tokens or DISTILLED[0])) for one in asked]
        if not tokens:
            self.untried += found
            return []
        return found

    def _proven(self) -> Finding:
        """Test candidates that passed on the seen half on the unseen one, in order of confidence, until one fails.

        Since the seen half alone decides the order, each is tested at the full level, and still at most one in twenty searches
        ends with a model that misses a requirement (fixed-sequence testing). The largest quant is tested first, if it is not
        larger than the given file. Candidates that no longer fit the budget are skipped, whatever the verdicts so far.
        """
        unseen = {task.name: [*task.unseen] for task in self.tasks}
        surest, least = self._surest(), _chain(self._all_kept)
        # One that is not safe on the seen half would end the sequence before what may win.
        first = [one for one in self._worth_proving()[:1] if not surest or one in surest]
        chain = [*dict.fromkeys([*first, *surest])]
        judged: dict[Candidate, list[Held]] = {}
        passed, unproven = list[Candidate](), list[Candidate]()
        for place, candidate in enumerate(chain):
            asked = unseen | self._continued("unseen", candidate.cut)
            after = self.budget.proof([candidate, *(one for one in chain[place + 1 :] if one in least)])
            made = 0.0 if candidate in self.tried else self._expected(candidate)
            late = made + after > self.budget.left
            if surest and late and candidate not in least and self.workshop.lacks(candidate, asked):
                unproven.append(candidate)
                continue
            found = self.workshop.measure(candidate, {}, self.budget.until(after) if surest else math.inf)
            if found.unmade:  # its quantisation took longer than expected
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
        chosen = (passed or [*judged])[-1]
        texts = [condition.text for condition in self.wish.conditions]
        looks = count_looks(self.workshop.folder / VERDICTS_FILE, texts, [one.key for one in judged])
        untried += [one for one in unproven if not passed or (one in tried and self.cost(one) < self.cost(chosen))]
        return Finding(chosen, judged[chosen], bool(passed), best_plain(passed), tried, judged, untried, looks)

    def _surest(self) -> list[Candidate]:
        """Order candidates by their confidence on the seen half; each is as safe as any that is reduced more, even if untried."""
        types = [one.type for one in self._plain()]
        pool = [*self._kept, *(one for one in self._worth_proving() if one not in self.tried)]
        safe = {one: [self._safety[other] for other in self._kept if one.spares(other, types)] for one in pool}
        safe |= {one: [self._safety[one]] for one in self._kept_foreign}
        sizes = {one: self.workshop.known(one).bytes or self.workshop.bytes_of(one) for one in safe if safe[one]}
        found = sorted(sizes, key=lambda one: (-max(safe[one]), -sizes[one]))
        # Files that cannot win are tested last, so that their failure does not end the sequence before the others.
        dear = [one for one in self._kept_foreign if self._kept and self.cost(one) >= self.cost(self._kept[-1])]
        return [*(one for one in found if one not in dear), *(one for one in found if one in dear)]


def _chain(kept: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates for which proof time is always reserved: the largest, the best plain quant, and the two best."""
    return [*dict.fromkeys(one for one in (*kept[:1], best_plain(kept), *kept[-2:]) if one is not None)]
