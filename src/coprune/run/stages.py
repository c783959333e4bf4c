"""One run from recipe to report: load, measure, walk and prune, measure again, save, verify, write down."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coprune.base.errors import BadInput
from coprune.base.files import write_text
from coprune.base.processes import Processes
from coprune.base.progress import Reporter
from coprune.evaluation.extras import Beside
from coprune.evaluation.tasks import Measured
from coprune.model.checkpoint.load import prepare
from coprune.model.checkpoint.weights import InMemory
from coprune.model.opened import Loaded
from coprune.model.verify import verify_saved
from coprune.recipe.recipe import Recipe, make_recipe
from coprune.report.card import model_card
from coprune.report.folder import announce, announced, finish_run_folder
from coprune.report.hub import push, require_login
from coprune.report.schema import Report
from coprune.run.checks import RECIPE_FILE, path_of, prepare_folders, settings_for
from coprune.run.estimate.estimate import Estimate
from coprune.run.facts import build_report
from coprune.run.journal import Output, run_identity
from coprune.run.phases import Phases
from coprune.run.prune_blocks import activations_of, prune_blocks
from coprune.run.session import Session, open_run, prepare_run
from coprune.run.trackers import final_figures, listening


@dataclass(frozen=True)
class Result:
    """A run's report, and its model and tokenizer if they are in memory (a streamed model is only on the disk)."""

    report: Report
    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None


def prune(
    model: str | Path | PreTrainedModel,
    method: str = "wanda",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    image_processor: Any = None,
    quiet: bool = False,
    **settings: Any,
) -> Result:
    """Prune a model and measure what that did.

    model: a Hub id, folder, GGUF file or `smollm2-135m`; or a transformers model in memory, which is changed in place
    (then give its tokenizer or image processor too). method: a name from `coprune methods`. settings: the fields of a
    recipe (sparsity, pattern, dataset, nsamples, seqlen, save_model …) and the method's own options, by name. A model
    given by name is loaded into memory unless stream=True. Nothing is written unless `save` or `save_model` is given.
    Raises BadInput for what cannot be done as asked, NumericalError and UnsupportedModel.
    """
    loaded = None
    if not isinstance(model, str | Path):
        loaded = Loaded(
            InMemory(prepare(model)), tokenizer or image_processor, model.name_or_path or type(model).__name__, False
        )
    name = str(model) if loaded is None else loaded.source
    recipe = make_recipe({"stream": False, "model": name, **settings_for(method, settings)})
    return run_recipe(recipe, loaded, Reporter(quiet), write=recipe.save is not None)


def run_recipe(
    recipe: Recipe,
    loaded: Loaded | None = None,
    reporter: Reporter | None = None,
    write: bool = True,
    processes: Processes | None = None,
) -> Result:
    """Do what a recipe says.

    loaded: a model that is open already, instead of the one that the recipe names; write: whether to leave a run
    folder (the model is saved if the recipe names a folder for it); processes: this one among those that do the run
    together, which all call this. Raises as `prune`, and LostProcess.
    """
    started = time.perf_counter()
    processes = processes or Processes()
    reporter = (reporter or Reporter()) if processes.first else Reporter(quiet=True)
    if recipe.finetune is not None:
        return _run_with_finetuning(recipe, loaded, reporter, processes)
    if processes.size == 1 and write and (report := announced(recipe)) is not None:
        finish_run_folder(recipe, report)
        return Result(report, None, None)
    if recipe.push_to_hub is not None:
        require_login(recipe.push_to_hub)
    if processes.first and (write or recipe.save_model):
        prepare_folders(recipe)
    with listening(recipe, reporter) if processes.first else nullcontext():
        return _run(recipe, loaded, reporter, write and processes.first, processes, started)


def _run(
    recipe: Recipe, loaded: Loaded | None, reporter: Reporter, write: bool, processes: Processes, started: float
) -> Result:
    """Do what a recipe says, now that its folders are free and all who want to hear of it listen."""
    phases = Phases(reporter)
    beside = Beside.prepare(recipe, processes.size)
    session = prepare_run(recipe, loaded, reporter, processes)
    phases.done("load and prepare")
    output = _open_output(session) if processes.first else None
    if write:
        write_text(path_of(recipe.run_folder, RECIPE_FILE), recipe.to_yaml())
    dense = session.loaded.reuse.dense(session, beside, lambda: _measure_dense(session, beside))
    phases.done("measure the dense model")
    results, seconds = prune_blocks(session, output)
    phases.done("prune")
    pruned = _measure(session, "pruned")
    if processes.first:
        beside.measure("pruned", session.loaded, reporter)
    phases.done("measure the pruned model")
    total = time.perf_counter() - started
    report = build_report(session, results, dense, pruned, beside, phases.facts, seconds, total)
    if write:
        announce(recipe, report)
    _save(session, output, report)
    if write:
        finish_run_folder(recipe, report)
    reporter.event("finished", figures=final_figures(report))
    if processes.first and recipe.push_to_hub is not None and recipe.save_model is not None:
        reporter.say(f"Pushed to {push(recipe.save_model, recipe.push_to_hub)}")
    in_memory = session.loaded.model if isinstance(session.loaded.weights, InMemory) else None
    return Result(report, in_memory, session.loaded.tokenizer)


def _run_with_finetuning(recipe: Recipe, loaded: Loaded | None, reporter: Reporter, processes: Processes) -> Result:
    from coprune.training.after_pruning import prune_and_finetune

    def prune_only(pruning: Recipe) -> Report:
        return run_recipe(pruning, loaded, reporter, processes=processes).report

    return Result(prune_and_finetune(recipe, prune_only, reporter, processes), None, None)


def estimate_recipe(recipe: Recipe, reporter: Reporter | None = None) -> Estimate:
    """Estimate the memory and time of a run, which is prepared up to where its blocks would be read. Raises as `prune`."""
    found = open_run(recipe, None, reporter or Reporter(), Processes()).estimate()
    if found is None:
        raise BadInput("only runs on language models can be estimated so far.")
    return found


def _open_output(session: Session) -> Output | None:
    """The checkpoint to write, if one is wanted or a streamed run has no other place for its blocks."""
    recipe, loaded = session.recipe, session.loaded
    if recipe.save_model is None and isinstance(loaded.weights, InMemory):
        return None
    data = None if session.samples is None else session.samples.fingerprint
    identity = run_identity(recipe, loaded.fingerprint(session.blocks), data)
    folder = recipe.save_model or path_of(recipe.run_folder, "checkpoint")
    return Output(folder, recipe.save_model is not None, loaded.weights, session.blocks, identity)


def _measure_dense(session: Session, beside: Beside) -> dict[str, Measured]:
    """Everything that is measured of the dense model."""
    found = _measure(session, "dense") if session.recipe.evaluate_dense else {}
    if session.processes.first:
        beside.measure("dense", session.loaded, session.reporter)
    return found


def _measure(session: Session, which: str) -> dict[str, Measured]:
    """Perplexity or accuracy on everything that is measured on."""
    found: dict[str, Measured] = {}
    for name, data in session.data.items():
        with session.reporter.bar(f"{session.task.measure_name}, {which} model", 1) as advance:
            found[name] = session.task.measure(session, data, activations_of(session.recipe), advance)
        session.reporter.say(session.task.line(which, name, found[name]))
    return found


def _save(session: Session, output: Output | None, report: Report) -> None:
    """Finish the checkpoint and prove that it holds what was pruned, or let go of it if nobody wants it."""
    if output is None:
        return
    if not output.keep:
        output.discard()
        return

    def check(folder: Path) -> None:
        session.reporter.say("Reloading the saved model to compare masks and logits")
        verify_saved(folder, session.loaded.weights, session.blocks, session.structure, report.matrices)

    output.finish(session.loaded.processor, session.recipe, model_card(report), check)
