"""`coprune.fit`: find the cheapest file that still does a task, and prove it."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput, VerificationError
from coprune.base.files import require_usable, write_durably, write_text
from coprune.base.progress import Reporter
from coprune.base.validation import settings_of
from coprune.base.words import Command, LeaveOut, Set, say
from coprune.data.keyword_arguments import FitArguments
from coprune.fitting.budget import EXACT_DENSE
from coprune.fitting.candidates import AS_GIVEN, EXACT, FOREIGN, Candidate
from coprune.fitting.finding import Finding, Wish
from coprune.fitting.fit_notes import Asked
from coprune.fitting.fit_page import fit_card, fit_page
from coprune.fitting.fit_recipe import RECIPE_FILE, TEXT_FILE, FitRecipe
from coprune.fitting.fit_result import PAGE_FILE, Fitted, Row
from coprune.fitting.fit_settings import FitSettings
from coprune.fitting.foreign_files import require_same_model
from coprune.fitting.in_transformers import InTransformers
from coprune.fitting.looking import WORK_FOLDER, look_at_settings, require_own_folder
from coprune.fitting.made_model import bytes_given, copy, digest_of
from coprune.fitting.making import Making
from coprune.fitting.require import Held, Verdict, verdict_of, wanted
from coprune.fitting.search import Search
from coprune.fitting.tasks import METRICS_OF, Task
from coprune.fitting.team import Team
from coprune.fitting.workshop import Workshop
from coprune.gguf_files.converter import find_converter, no_template
from coprune.model.checkpoint.digest import bytes_of_weights, source_digest
from coprune.model.checkpoint.locate import ModelFolder, locate
from coprune.report.provenance import MadeFacts
from coprune.report.run_folder import REPORT_FILE, model_of
from coprune.report.schema import Report
from coprune.steps.export import template_of

FACTS_FILE, CARD_FILE = "fit.json", "README.md"
TEMPLATE_FOLDER = ".template"
_UNITS = {
    "bytes": "bytes of the file, or of a folder's weights",
    "cost": "bytes (size, memory) or tokens per second (speed)",
    "speed": "tokens per second",
    "seconds": "seconds",
    "mean, low, high": "margin of the first condition: share of items (accuracy, acceptance), ratio to dense (with a factor), "
    "bits per byte (bits) or nats per token (kl)",
}
_TEXTS = 50
"""Items on which tokenizers are compared."""
_TIMES = 3
"""Factor by which the suggested budget exceeds one that was too short."""


@dataclass(frozen=True)
class Request:
    """What a fit is asked for, as in the arguments of `fit`."""

    model: str | Path
    task: str | Path | Sequence[str | Path]
    require: str | None
    output: str | Path
    how: FitArguments


def fit(
    model: str | Path,
    task: str | Path | Sequence[str | Path],
    require: str | None = None,
    *,
    output: str | Path,
    quiet: bool = False,
    **how: Unpack[FitArguments],
) -> Fitted:
    """Find the smallest (or fastest) file of a model that still does your tasks, and prove it on items unseen by the search.

    Call it again to resume an interrupted search.

    Args:
        model: a folder, a Hub id, a GGUF file or `smollm2-135m`.
        task: files of items (.jsonl of choices, answers or prompts, or text), or tasks of lm-eval; `file:0.7` sets a task's
            share of the calibration text.
        require: conditions separated by commas: `accuracy>=dense-0.01`, `bits<=dense*1.02`, `acceptance>=0.9`, `kl<=0.1`.
        output: folder for the model, its recipe, page and card.
        quiet: show no progress bars and messages.
        how: settings of the search, as listed by `coprune fit --help`.

    Returns:
        The file, the verdict on the unseen half, and all candidates.

    Raises:
        BadInput: the request cannot be fulfilled, there are too few items, the dense model is no better than chance, or the
            budget is too short.
    """
    return run_fit(Request(model, task, require, output, how), quiet, time.monotonic())


def run_fit(request: Request, quiet: bool, began: float) -> Fitted:
    """Run a fit as `fit` does, with a budget that counts from `began` by `time.monotonic`."""
    target, reporter, settings = expand_home(request.output), Reporter(quiet), settings_of(FitSettings, request.how)
    asked, wish = _read(request, settings)
    require_own_folder(target)
    _require_apart(target, asked)
    asked = _with_template(asked, target, settings.converter, reporter)
    _require_same_model(asked)
    team = Team(settings.workers, target / WORK_FOLDER / "workers.log", settings.ray)
    try:
        workshop = Workshop(target / WORK_FOLDER, asked, reporter, began)
        with workshop.refusing():
            search = Search(workshop, wish, team)
            finding = search.run()
    finally:
        team.stop()
    fewer = search.tasks != asked.tasks  # than there are items
    said = {"task": request.task, "require": request.require, "output": request.output, **request.how}
    said["budget"] = _minutes(_TIMES * wish.budget)
    usual = FitSettings().model_dump()
    own = [Set(name, value) for name, value in said.items() if value is not None and usual.get(name) != value]
    more = say(Command("fit", request.model, *own)) if finding.untried or (fewer and not finding.kept) else ""
    return _leave(target, search, finding, more)


def _minutes(seconds: float) -> str:
    """Format a time as a value of `budget`."""
    return f"{seconds / 60:{'.3g' if seconds < 6000 else '.0f'}}m"


def remake(recipe: str | Path, output: str | Path, quiet: bool = False, converter: str | Path | None = None) -> Path:
    """Rebuild the model of a recipe written by `fit`, without a search.

    Args:
        recipe: the recipe file; it needs the calibration text in the same folder.
        output: folder for the model.
        quiet: show no progress bars and messages.
        converter: as in `fit`, if that used one.

    Returns:
        The file.

    Raises:
        BadInput: the recipe cannot be read, or a file is missing.
        VerificationError: the rebuilt file has other bytes.
    """
    source, target, reporter = expand_home(recipe), expand_home(output), Reporter(quiet)
    said = FitRecipe.read(source)
    chosen, asked = said.candidate, said.asked
    file = target / _name(asked, chosen)
    require_usable(file, "output")
    if file.exists():
        raise BadInput(f"{file} already exists", field="output", value=str(target), fix="name another folder")
    if asked.digests["model"] != said.source:
        cause = f"{said.model} is another model than the one that {source} was made from: its files hold other bytes"
        raise BadInput(cause, field="model", value=str(recipe), fix="restore the original files")
    _require_template(asked, converter)
    work = target / WORK_FOLDER
    making = Making(work, _with_template(asked, work, converter, reporter), reporter)
    if chosen.type == FOREIGN and digest_of(making.file(chosen)) != said.sha256:
        cause = f"{said.file} holds other bytes than the file that the fit chose"
        raise BadInput(cause, field="model", value=str(recipe), fix="restore the original file")
    making.text.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source.with_name(said.text), making.text)
    made = making.file(chosen)
    if digest_of(made) != said.sha256:  # checked before it gets its final name
        shutil.rmtree(work)
        raise VerificationError(
            f"the bytes of {file.name}, rebuilt from {source}, differ from those of the fit, so it was not kept: the version or "
            "processor differs, or coprune[languages] is installed in only one of the two environments"
        )
    copy(made, file)
    shutil.rmtree(work)
    return file


def _name(asked: Asked, chosen: Candidate) -> str:
    if asked.runtime == "transformers":
        return "model"
    return f"model-{Path(chosen.title).stem if chosen.type == FOREIGN else chosen.type}.gguf"


def _read(request: Request, how: FitSettings) -> tuple[Asked, Wish]:
    """Read and check everything that needs no model."""
    look_at_settings(how)
    types = how.types if how.runtime == "llama.cpp" else (EXACT,)
    tasks, conditions = wanted(_paths(request.task), request.require, how.seed, how.items, how.trust_tasks)
    asked = Asked(
        model_of(str(request.model)), tasks, how.seed, how.text, how.like, how.runtime, how.candidate, how.step
    )
    asked.check_steps()
    _require_template(asked, how.converter)
    return asked, Wish(conditions, how.target, how.budget, how.without, types)


def _require_same_model(asked: Asked) -> None:
    """Raise BadInput for a candidate file that is of another model, or is the model itself."""
    if not asked.foreign:
        return
    model = locate(asked.like or asked.model).path
    texts = [task.items[place].asked for task in asked.tasks for place in task.unseen[:_TEXTS]]
    require_same_model(asked.foreign.values(), model, texts)
    if (same := next((one for one in asked.foreign if one.file == asked.digests["model"]), None)) is not None:
        cause, fix = f"{same.name} is the model itself", LeaveOut("candidate")
        raise BadInput(cause, field="candidate", value=str(asked.foreign[same]), fix=fix)


def _require_apart(target: Path, asked: Asked) -> None:
    """Raise BadInput for a model or candidate in the output folder, where it could be overwritten."""
    for name in (asked.model, *asked.files):
        path = expand_home(name)
        if path.is_file() and path.resolve().parent == target.resolve():
            cause = f"{name} is in {target}, where the result goes"
            raise BadInput(cause, field="output", value=str(target), fix="name another folder")


def _untemplated(asked: Asked) -> ModelFolder | None:
    """Return the model's folder if llama.cpp's converter has to make a template GGUF file from it."""
    if asked.runtime != "llama.cpp" or asked.like is not None:
        return None
    location = locate(asked.model)
    return location if isinstance(location, ModelFolder) else None


def _require_template(asked: Asked, converter: str | Path | None) -> None:
    """Raise BadInput if a template is needed and there is no converter."""
    if (folder := _untemplated(asked)) is not None and find_converter(converter) is None:
        raise no_template(folder.path, folder.name)


def _with_template(asked: Asked, folder: Path, converter: str | Path | None, reporter: Reporter) -> Asked:
    """Return the inputs with a template GGUF file, which is made once in the fit's folder. Raises BadInput."""
    if (location := _untemplated(asked)) is None:
        return asked
    file = folder / TEMPLATE_FOLDER / f"{source_digest(location)[:16]}.gguf"
    if not file.is_file():
        for name in (WORK_FOLDER, TEMPLATE_FOLDER):  # the first marks the folder as a fit's
            (folder / name).mkdir(parents=True, exist_ok=True)
        write_durably(file, lambda final: template_of(location, final, converter, reporter))
    return replace(asked, like=str(file))


def _paths(task: Any) -> list[str]:
    names = [str(one) for one in ([task] if isinstance(task, str | Path) else task)]
    if not names:
        raise BadInput("no task is named", field="task", fix="name a file of items")
    return names


def _leave(target: Path, search: Search, finding: Finding, more: str) -> Fitted:
    """Write the model, its recipe, page, card and facts, and remove the other files."""
    workshop, chosen = search.workshop, finding.chosen
    file = target / _name(workshop.asked, chosen)
    source = file if _is_there(target, chosen, file) else workshop.making.file(chosen)
    notes = [*_notes(search, finding), *_tokenised_alike(search, chosen, source)]
    for old in target.glob("model-*.gguf"):
        if old != file:
            old.unlink()
    if source != file:
        copy(source, file)
    write_text(target / TEXT_FILE, workshop.making.text.read_text(encoding="utf-8"))
    size, digest = bytes_of_weights(file), digest_of(file)
    own_template = Path(workshop.asked.like or "").parent == target / TEMPLATE_FOLDER
    asked = replace(workshop.asked, like=None) if own_template else workshop.asked  # the template can be made again
    write_text(target / RECIPE_FILE, FitRecipe.of(asked, chosen, size, digest).written())
    rows = _rows(search, finding)
    better = chosen != AS_GIVEN
    tried = [f"{name.name}: {one.line()}" for name, held in finding.unseen.items() for one in held]
    lines = tuple(one.line() for one in finding.held) if better else tuple(tried)
    plain = None if finding.plain is None else finding.plain.name
    found = Fitted(
        file,
        size,
        finding.kept,
        chosen.name,
        lines,
        rows,
        plain,
        tuple(notes),
        bytes_given(workshop.making.source),
        better,
        more,
    )
    named = _named(workshop.asked.model)
    write_text(target / PAGE_FILE, fit_page(found, named, search.wish.target))
    write_text(target / CARD_FILE, fit_card(found, named))
    write_text(target / FACTS_FILE, json.dumps(_facts(search, finding, found, digest), indent=1, default=list))
    workshop.making.clear()
    return found


def _facts(search: Search, finding: Finding, found: Fitted, digest: str) -> dict[str, Any]:
    """Return the result for programs, with everything that identifies what was measured."""
    asked, made = search.workshop.asked, MadeFacts.here()
    return {
        "model": _named(asked.model),
        "digests": asked.digests | {"chosen": digest},
        "version": made.version,
        "commit": made.commit,
        "date": made.date.isoformat(),
        "machine": made.machine,
        "units": _UNITS,
        "runtime": asked.runtime,
        "target": search.wish.target,
        "seed": asked.seed,
        "conditions": [condition.text for condition in search.wish.conditions],
        "tasks": [_counts(search, task, finding.chosen) for task in search.tasks],
        "candidates": {one.name: one.file for one in asked.foreign},
        "chosen": asdict(finding.chosen),
        "bytes": found.bytes,
        "given bytes": found.given_bytes,
        "kept": found.kept,
        "unseen": found.lines,
        "notes": found.notes,
        "seconds": search.workshop.spent,
        "rows": [vars(row) for row in found.rows],
    }


def _counts(search: Search, task: Task, chosen: Candidate) -> dict[str, Any]:
    """Count the unseen items of a task, and for accuracy, which of the two models answered them right."""
    facts = {"name": task.name, "kind": task.kind, "seen items": len(task.seen), "unseen items": len(task.unseen)}
    if "accuracy" not in METRICS_OF[task.kind]:
        return facts
    both = EXACT_DENSE, EXACT_DENSE if chosen == AS_GIVEN else chosen
    pairs = Counter(
        zip(
            *(search.workshop.known(one).of(task, "accuracy", task.unseen) for one in both),
            strict=True,
        )
    )
    names = {(1.0, 1.0): "both right", (1.0, 0.0): "only dense right", (0.0, 1.0): "only chosen right"}
    return facts | {names.get(pair, "both wrong"): pairs[pair] for pair in (*names, (0.0, 0.0))}


def _named(model: str) -> str:
    """Return a model's name without its path on this machine."""
    place = Path(model)
    return place.name if place.exists() else model


def _is_there(target: Path, chosen: Candidate, file: Path) -> bool:
    """Return whether an earlier call already wrote this model."""
    try:
        said = FitRecipe.read(target / RECIPE_FILE)
        return said.candidate == chosen and digest_of(file) == said.sha256
    except (BadInput, OSError):
        return False


def _notes(search: Search, finding: Finding) -> list[str]:
    found = []
    if finding.untried:
        first, *others = (one.name for one in finding.untried)
        more = f" (and {len(others)} others)" if others else ""
        spent, budget = search.workshop.spent / 60, search.wish.budget / 60
        found = [f"time was up after {spent:.1f} of {budget:.3g} minutes; with more, {first} would be next{more}"]
    if finding.plain is not None and finding.plain != finding.chosen and finding.kept:
        sizes = [search.workshop.known(one).bytes for one in (finding.chosen, finding.plain)]
        found.append(
            f"{sizes[0] / sizes[1]:.2f} of the bytes of the best plain quant that passes, {finding.plain.name}"
        )
    if finding.chosen == AS_GIVEN:
        found.append("nothing better than the given model is proven: this is your own model, byte for byte")
    elif finding.chosen.type == FOREIGN:
        found.append(f"this is {finding.chosen.title}, which was given as a candidate, byte for byte")
    elif finding.chosen.plain and not finding.untried:
        what = "the dense model" if finding.chosen == EXACT_DENSE else "a plain quant"
        failed = any(not one.plain for one in finding.unseen)
        found.append(f"{'the unseen items confirm no cut' if failed else 'no cut helps here'}: this is {what}")
    found += _beside(search, finding)
    if (fewer := finding.chosen.cut.fewer) is not None:
        facts = Report.read(search.workshop.making.run_of(fewer) / REPORT_FILE).vocabulary
        found += [f"fewer tokens: {lost}"] if facts is not None and (lost := facts.warning()) else []
    if finding.looks > 1:
        found.append(
            f"these unseen items have now given {finding.looks} verdicts, with other budgets or conditions: the 95 % confidence "
            "holds for the first only, so use new items for a proof"
        )
    if not finding.kept and (unproven := [one for one in finding.held if one.verdict is not Verdict.KEPT]):
        needed = [one.more for one in unproven]
        would = f"about {max(one or 0 for one in needed):,} more items would prove it"
        found.append(would if all(needed) else "more items would not prove it")
    return found


def _beside(search: Search, finding: Finding) -> list[str]:
    """Compare the given candidate files with the result."""
    found, size = [], search.workshop.known(finding.chosen).bytes
    for one in search.workshop.asked.foreign:
        known, (part, held) = search.workshop.known(one), _judged(search, finding, one)
        if known.refused:
            found.append(f"{one.name} could not be measured: {known.refused}")
        elif one != finding.chosen and held:
            times = f"{known.bytes:,} bytes, {known.bytes / size:.2f} times those of the result"
            found.append(f"{one.name}: {times}, {verdict_of(held)} on the {part} items")
    return found


def _judged(search: Search, finding: Finding, candidate: Candidate) -> tuple[str, Sequence[Held]]:
    """Return the half of the items that a candidate was last judged on, and the verdicts there."""
    held = finding.unseen.get(candidate)
    return ("seen", search.judged_so_far(candidate)) if held is None else ("unseen", held)


def _tokenised_alike(search: Search, chosen: Candidate, file: Path) -> list[str]:
    """Compare the file's own tokenizer with the one used to measure. Raises VerificationError if no text agrees."""
    reader = search.workshop.making.reader(file, chosen.cut)
    if isinstance(reader.engine, InTransformers):  # uses the same tokenizer
        return ["transformers loads the folder; what was measured was measured there"]
    texts = [task.items[place].asked for task in search.tasks for place in task.unseen][:_TEXTS]
    differing = [text for text in texts if reader.engine.tokenize(text) != reader.all_ids(text)]
    reader.engine.close()
    if len(differing) == len(texts):
        raise VerificationError(f"llama.cpp tokenises {differing[0][:40]!r} differently from the model's tokenizer")
    return [
        f"llama.cpp tokenises {len(texts) - len(differing)} of {len(texts)} unseen items as the model's tokenizer does"
    ]


def _rows(search: Search, finding: Finding) -> tuple[Row, ...]:
    found = []
    for candidate in dict.fromkeys([EXACT_DENSE, *finding.tried, finding.chosen]):
        known, (part, held) = search.workshop.known(candidate), _judged(search, finding, candidate)
        found.append(
            Row(
                name="dense f16" if candidate == EXACT_DENSE else candidate.name,
                plain=candidate.plain,
                chosen=candidate == finding.chosen,
                cost=abs(search.cost(candidate)),
                bytes=known.bytes,
                speed=known.speed,
                refused=known.refused,
                part=part,
                verdict=str(verdict_of(held)) if held else "",
                mean=held[0].margin[0] if held else None,
                low=held[0].margin[1] if held else None,
                high=held[0].bounds.high - held[0].least if held else None,
                foreign=candidate.type == FOREIGN,
            )
        )
    return tuple(found)
