"""Parts removed, and zeros in what is left, as one run: the cut first, then the pattern on the smaller model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from coprune.base.errors import BadInput
from coprune.base.files import write_text
from coprune.base.processes import ALONE, Processes
from coprune.base.words import Setting
from coprune.evaluation.answers.facts import judge
from coprune.model.checkpoint.companions import CARD_FILE
from coprune.model.checkpoint.locate import holds_model
from coprune.model.checkpoint.weights import InMemory
from coprune.model.loaded_model import Loaded
from coprune.pruning.allocation import allocation_named
from coprune.pruning.allocation.by_file import ByFile
from coprune.recipe.choice import USUAL_METHOD, Choice
from coprune.recipe.parts import Decides, refuse_numbers
from coprune.recipe.recipe import Recipe
from coprune.recipe.structure import RemovePart
from coprune.removal.unit_scores import SPREADINGS
from coprune.report.card import model_card
from coprune.report.folder import RECIPE_FILE, REPORT_FILE, announce, finish_run_folder
from coprune.report.schema import Report
from coprune.run.checks import prepare_solver, refuse_finished
from coprune.run.session import Given

# What belongs to the zeros alone, as it is where nothing is said of it.
_NO_ZEROS: dict[str, Any] = {
    "pattern": "unstructured",
    "sparsity": None,
    "permute": False,
    "rotate": False,
    "refine": (),
    "propagation": "block",
    "encoding": "source",
    "report_to": None,
    "push_to_hub": None,
    "private": None,
    "log_json": None,
    "prompt": "",
}

_UNIFORM = Choice(name="uniform")


def cut_and_prune(
    recipe: Recipe,
    given: Given,
    write: bool,
    run: Callable[[Recipe, Given], Any],
    processes: Processes = ALONE,
    anew: bool = False,
) -> Any:
    """Remove parts, then prune what is left.

    Where a run folder is wanted, both halves leave theirs in it (`cut` with the smaller model, `zeros`), so that either can be
    interrupted and goes on.

    Args:
        recipe: of both.
        given: what is taken instead of what the recipe names.
        write: whether a run folder is wanted.
        run: does what one half's recipe says, and gives its `Result`.
        processes: this one among those that do the run together.
        anew: whether the first half replaces a finished run, of which nothing is gone on from.

    Returns:
        The result of the second half, and the report of both. Raises as both halves do.
    """
    prepare_solver(recipe, given.method)
    _check_allocation(recipe)  # of the zeros, whose turn comes late
    target = recipe.output.model
    if not write and given.loaded is None and target is not None and processes.size == 1:
        # On the disk in between, since a folder holds more than the model in memory: what its class does not load.
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as between:
            first = run(cutting_of(recipe, Path(between)), given)
            second = run(pruning_of(recipe, first.report, None), Given(None, given.method))
            report = _of_both(recipe, first.report, second.report)
            _write_card(recipe, report)
            return second, report
    if not write:
        first = run(cutting_of(recipe, None), given)
        if first.model is None:
            wrong = "a streamed model that is cut and pruned lies in a run folder in between"
            raise BadInput(wrong, field="save", fix=("name one with ", Setting("save")))
        loaded = Loaded(InMemory(first.model), first.processor, first.report.model.source, False)
        second = run(pruning_of(recipe, first.report, None), Given(loaded, given.method))
        report = _of_both(recipe, first.report, second.report)
        _write_card(recipe, report)
        return second, report
    recipe_file = recipe.run_folder / RECIPE_FILE
    if processes.first and not anew:
        refuse_finished(recipe.run_folder)
        write_text(recipe_file, recipe.untold().to_yaml())
    cutting = cutting_of(recipe, recipe.run_folder / "cut")
    cut, _ = _once(cutting, processes, lambda: run(cutting, given), anew)
    if processes.first:
        write_text(recipe_file, recipe.untold().to_yaml())
    pruning = pruning_of(recipe, cut, recipe.run_folder / "zeros")
    pruned, second = _once(pruning, processes, lambda: run(pruning, Given(None, given.method)))
    report = _of_both(recipe, cut, pruned)
    if not processes.first:
        return second, report
    _write_card(recipe, report)
    announce(recipe, report)
    finish_run_folder(recipe, report)
    return second, report


def _check_allocation(recipe: Recipe) -> None:
    """Raise BadInput for an allocation of zeros that there is not, or whose file goes by numbers that do not stay."""
    asked = allocation_named(_for_zeros(recipe))
    globs = [glob for glob, _ in asked.entries] if isinstance(asked, ByFile) else []
    if (wrong := refuse_numbers(globs, "allocation", recipe.remove.shares)) is not None:
        raise wrong


def _for_units(recipe: Recipe) -> Choice:
    """How the cut spreads channels and heads."""
    return recipe.prune.allocation if _spreads_units(recipe) else _UNIFORM


def _for_zeros(recipe: Recipe) -> Choice:
    """How the zeros are spread."""
    return _UNIFORM if _spreads_units(recipe) else recipe.prune.allocation


def _spreads_units(recipe: Recipe) -> bool:
    """Whether the recipe's allocation is one of channels and heads, and such are removed."""
    return recipe.remove.spreads and recipe.prune.allocation.name in SPREADINGS


def cutting_of(recipe: Recipe, folder: Path | None) -> Recipe:
    """The recipe of the cut. folder: of its run; None to leave the smaller model in memory."""
    own = recipe.replaced(**_NO_ZEROS, save=folder, save_model=None if folder is None else folder / "model")
    return own.replaced(method=USUAL_METHOD, allocation=_for_units(recipe))


def pruning_of(recipe: Recipe, cut: Report, folder: Path | None) -> Recipe:
    """The recipe of the zeros in what the cut left. folder: of its run, if it leaves one."""
    # As the dense model spoke for, so that all figures are of the same windows.
    bos = recipe.calibrate.bos if cut.bos is None or cut.bos.used == "as given" else cut.bos.used
    model = recipe.model.name if cut.saved_model is None else str(cut.saved_model)
    whole = recipe.model_copy(update={"remove": RemovePart()}).replaced(allocation=_for_zeros(recipe))
    # Answers are held against conditions where the dense model's are known, which is not there; but they are looked at.
    require = None if recipe.evaluate.answers.require is None else "loops>=0"
    # The folder goes to the Hub when the card of both halves is in it.
    own = {"push_to_hub": None, "private": None, "prompt": "", "require": require}
    return whole.replaced(model=model, save=folder, bos=bos, evaluate_dense=False, **own)


def _write_card(recipe: Recipe, report: Report) -> None:
    """Let the saved model's card tell of both halves."""
    if recipe.output.model is not None:
        write_text(recipe.output.model / CARD_FILE, model_card(report))


def _once(recipe: Recipe, processes: Processes, run: Callable[[], Any], anew: bool = False) -> tuple[Report, Any]:
    """The report of one half, and its result unless an earlier run came so far, or all is done anew."""
    earlier = processes.from_first(lambda: None if anew else _earlier(recipe))
    if earlier is not None:
        return earlier, None
    result = run()
    # The others also wait here for the first one, which saves what all of them are about to read.
    return processes.from_first(lambda: result.report), result


def _earlier(recipe: Recipe) -> Report | None:
    """The report of a half that is done."""
    path, model = recipe.run_folder / REPORT_FILE, recipe.output.model
    if path.is_file() and (model is None or holds_model(model)):
        report, what = Report.read(path), Decides.RESULT | Decides.MEASUREMENT
        # Where the other half ran out of memory, it goes on with smaller batches, on which only last bits hang.
        if report.recipe.deciding(what) == recipe.deciding(what):
            return report
    return None


def _of_both(recipe: Recipe, cut: Report, pruned: Report) -> Report:
    """Return the second half's measurements, beside the first half's and the dense model's."""
    texts = {text.data: text.dense for text in cut.perplexity}
    images = {one.data: one for one in cut.accuracy}
    answers = None if pruned.answers is None else pruned.answers.beside(cut.answers)
    return pruned.model_copy(
        update={
            "recipe": recipe,
            "model": cut.model,
            "perplexity": [one.model_copy(update={"dense": texts.get(one.data)}) for one in pruned.perplexity],
            "accuracy": [
                one.model_copy(
                    update={
                        name: getattr(images[one.data], name)
                        for name in ("dense_top1", "dense_top1_interval", "dense_top5")
                        if one.data in images
                    }
                )
                for one in pruned.accuracy
            ],
            "bos": cut.bos,
            "answers": answers,
            "required": judge(recipe.evaluate.answers.conditions, answers),
            "events": [*cut.events, *pruned.events],
            "edits": [*cut.edits, *pruned.edits],
            "covered": cut.covered,
            "left": cut.left,
            "padding": cut.padding,
            "prune_seconds": cut.prune_seconds + pruned.prune_seconds,
            "total_seconds": cut.total_seconds + pruned.total_seconds,
            "peak_memory_bytes": max(cut.peak_memory_bytes, pruned.peak_memory_bytes),
        }
    )
