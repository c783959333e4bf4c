"""A run from top to bottom: its parts, each from folder to folder, and the stages of every part that cuts or prunes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from coprune.base.devices import enough_memory, in_host_memory
from coprune.base.files import write_text
from coprune.base.memory import return_free_memory
from coprune.base.processes import ALONE, Processes
from coprune.base.progress import Reporter
from coprune.base.words import Set, Together, Words
from coprune.evaluation.extra_measurements import Extras
from coprune.evaluation.measurement import Measured
from coprune.evaluation.tasks import named
from coprune.model.checkpoint.companions import Companions
from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import GgufFile, ModelFolder
from coprune.model.loaded_model import choose_device, streams
from coprune.model.verification import verify_saved
from coprune.recipe.recipe import Recipe
from coprune.removal.removal_plan import find_removable
from coprune.report.card import model_card
from coprune.report.folder import RECIPE_FILE, announce, announced, finish_run_folder
from coprune.report.hub import require_login
from coprune.report.run_events import Rounded
from coprune.report.schema import Report
from coprune.run.context import NOTHING, Given, Run
from coprune.run.dense_figures import dense_figures
from coprune.run.events import Finished, Phase
from coprune.run.facts import build_report
from coprune.run.output import Destination, Output
from coprune.run.result import Result
from coprune.run.reuse import Reuse
from coprune.run.trackers import final_figures, listening
from coprune.steps.checks import prepare_folders, replace_earlier
from coprune.steps.opening import open_run, prove_run, say_if_sparse
from coprune.steps.parts import Part, check_answers, check_parts, cut, prune, prune_rest, pruned_before, train
from coprune.steps.prune import prune_blocks
from coprune.steps.remove import remove_parts, smaller_model
from coprune.steps.remove_by_bytes import cut_by_bytes, file_cut_by_bytes
from coprune.steps.run_identity import may_round_otherwise, run_identity, weighs_blocks
from coprune.steps.to_gguf import cut_of, refuse_other_changes
from coprune.steps.trim import cut_vocabulary
from coprune.store.store import Store


def run_recipe(
    recipe: Recipe,
    given: Given = NOTHING,
    reporter: Reporter | None = None,
    write: bool = True,
    processes: Processes = ALONE,
    reuse: Reuse | None = None,
) -> Result:
    """Run a recipe.

    Args:
        recipe: the settings.
        given: objects that replace parts of the recipe, such as a loaded model.
        reporter: receives messages and events; by default on standard error.
        write: whether to write a run folder (the model is saved if the recipe names a folder for it).
        processes: this one among those of the run, which all call this.
        reuse: results shared with other runs; by default the dense model's figures, in the user's store.

    Returns:
        The report, with the model and its processor as far as they are in memory.

    Raises:
        BadInput, NumericalError, UnsupportedModel: as `prune`.
        LostProcess: another process ended.
    """
    heard = (reporter or Reporter()) if processes.first else Reporter(quiet=True)
    run = Run(
        recipe, given, heard, processes, write, reuse or Reuse(Store.of_user()), replaces=bool(recipe.output.overwrite)
    )
    return cut_vocabulary(run, do_parts) if recipe.remove.vocabulary is not None else do_parts(run)


def do_parts(run: Run) -> Result:
    """Run the parts one after another, each from the folder that the one before wrote."""
    recipe = run.recipe
    if recipe.output.as_gguf:
        refuse_other_changes(recipe, run.given)
        if (location := file_cut_by_bytes(run)) is not None:
            return cut_by_bytes(run, location)
    parts: list[Part] = [cut, prune_rest] if recipe.cuts_and_prunes else [prune]
    if recipe.train.mode is not None:
        parts.append(train)
    if len(parts) == 1:
        return do_stages(run)
    check_parts(run)
    result = pruned_before(run)
    with run.closing:
        for part in parts if result is None else [train]:
            result = part(run, result, do_stages)
    assert result is not None
    if result.report.saved_model is not None:
        run.push()
    return result


def do_stages(run: Run) -> Result:
    """Run the stages of a run, or of one part of it."""
    recipe, whole = run.recipe, run.whole or run
    if run.processes.size == 1 and run.write and (report := announced(recipe)) is not None:
        finish_run_folder(recipe, report)  # a run that was killed when only this was left
        run.push()
        return Result(report)
    if recipe.output.push_to_hub is not None:
        require_login(recipe.output.push_to_hub)
    if run.first and (run.write or recipe.output.model):
        prepare_folders(whole.recipe if whole.replaces else recipe)
    with listening(recipe, run.reporter) if run.first else nullcontext(), run.reporter.libraries():
        loaded = run.given.loaded
        device = choose_device(recipe.model.device) if loaded is None else loaded.device
        run.count_from_here(device)
        with enough_memory(less_memory(recipe, device, loaded is not None), lambda: run.phase):
            for phase, stages in STAGES.items():
                for stage in stages:
                    stage(run)
                if phase is not Phase.SAVE or (run.first and recipe.output.model is not None):
                    run.done(phase)
            return end(run)


def open_source(run: Run) -> None:
    """Check everything that can be checked, and read the data."""
    run.extras = Extras.prepare(run.recipe, run.processes.size, run.given.loaded is None)
    open_run(run, partial(run.reuse.tokens, run.recipe.model.name))


def estimate(run: Run) -> None:
    """Report the memory bound; raise BadInput if it does not fit."""
    if run.first and (found := run.reuse.estimate(run.recipe, run.estimate)) is not None:
        run.reporter.say(found.line())
        if run.recipe.model.check_memory:
            found.require()
    return_free_memory()  # of the blocks and matrices that were tried


def prove(run: Run) -> None:
    """Prove that the model can be walked, and that it can be asked what it will be asked."""
    prove_run(run)
    if run.first:
        say_if_sparse(run)
        run.extras.look.prepare(run.loaded, run.reporter)
        check_answers(run)


def plan(run: Run) -> None:
    """Find how the blocks change: parts of them are removed, or weights set to zero."""
    if not run.recipe.remove.parts:
        run.change = prune_blocks
        return
    may_go = find_removable(run)
    run.change = partial(remove_parts, found=may_go)
    if run.first and (file := cut_of(run, may_go.routers(run.model.blocks))) is not None:
        run.write_gguf = file.cut


def claim(run: Run) -> None:
    """Take the run's folders: what an earlier run left goes where that is asked for, and the recipe is kept."""
    whole = run.whole or run
    if run.first and whole.replaces:
        replace_earlier(whole.recipe)
    whole.replaces = False
    run.output = Output(run.processes, run.model, _destination(run) if run.first else None)
    if run.writes:
        recipes = {one.run_folder: one for one in (run.recipe, whole.recipe)}  # the whole's where both go to one
        for folder, recipe in recipes.items():
            write_text(folder / RECIPE_FILE, recipe.untold().to_yaml())


def measure_dense(run: Run) -> None:
    """Measure the dense model, unless it was measured before."""

    def measured() -> dict[str, Measured]:
        found = measure(run, "dense") if run.recipe.evaluate.dense else {}
        if run.first:
            run.extras.measure("dense", run.loaded, run.reporter)
        return found

    run.dense = dense_figures(run, measured)
    run.extras.look.keep_rows(run.loaded)


def change_blocks(run: Run) -> None:
    """Walk over the blocks, change them, and write them."""
    run.outcome = run.change(run)
    if (rounded := Rounded.of(run.output.rounding)) is not None:
        run.reporter.say(f"{rounded.line()}.")
        run.outcome = replace(run.outcome, events=[*run.outcome.events, rounded])


def measure_pruned(run: Run) -> None:
    """Measure the pruned model, and let it answer; what lost parts as the smaller model that is saved."""
    run.pruned, recipe = measure(run, "pruned"), run.recipe
    if not run.first:
        return
    run.extras.measure("pruned", run.loaded, run.reporter)
    if run.extras.look.looks:
        with run.loaded.whole(run.reporter) as module:
            model = _smaller_model(run) if recipe.remove.parts else module
            run.extras.look.ask(model, run.loaded, run.reporter, recipe.calibrate.batch_size)


def save(run: Run) -> None:
    """Announce the report, then finish the checkpoint and verify it."""
    run.report = build_report(run)
    if run.writes:
        announce(run.recipe, run.report)
    if run.write_gguf is not None and run.recipe.output.model is not None:
        run.write_gguf(run.recipe.output.model, run.outcome.edits, run.reporter)
    _save(run, run.report)


STAGES: dict[Phase, Sequence[Callable[[Run], None]]] = {
    Phase.PREPARE: (open_source, estimate, prove, plan),
    Phase.MEASURE_DENSE: (claim, measure_dense),
    Phase.PRUNE: (change_blocks,),
    Phase.MEASURE_PRUNED: (measure_pruned,),
    Phase.SAVE: (save,),
}


def end(run: Run) -> Result:
    """Write the report, push the model, and give both back."""
    return_free_memory()
    report = run.finish(run.report.model_copy(update={"phases": run.phases}))
    run.reporter.tell(Finished(final_figures(report)))
    run.push()
    if run.loaded.weights.streams:
        saved = partial(_saved_model, report.saved_model, run.recipe.model.device)
        return Result(report, run.loaded.processor, saved)
    removes = bool(run.recipe.remove.parts)
    return Result(report, run.loaded.processor, lambda: _smaller_model(run) if removes else run.loaded.model)


def _smaller_model(run: Run) -> PreTrainedModel:
    return smaller_model(run, run.outcome.edits)


def _destination(run: Run) -> Destination | None:
    """Return the destination of the blocks, if a checkpoint is wanted or the model is streamed."""
    recipe, model = run.recipe, run.model
    keep = recipe.output.model is not None and not recipe.output.as_gguf
    if not keep and not model.weights.streams:
        return None
    # The beginning of windows is decided by now.
    used = "auto" if run.bos is None or run.bos.used == "as given" else run.bos.used
    weights = run.loaded.fingerprint(model.every_block)
    identity = run_identity(recipe.replaced(bos=used), weights, run.fingerprint, model.weights.streams)
    if run.encoding.name == "source":  # unfinished files are of one encoding
        identity = replace(identity, settings=identity.settings | {"encoding": run.encoding.name})
    folder = recipe.output.model or recipe.run_folder / "checkpoint"
    return Destination(folder, keep, identity, run.encoding)


def _save(run: Run, report: Report) -> None:
    """Finish the checkpoint, or let go of it if nobody wants it."""
    if not run.output.keep:
        run.output.discard()
        return

    def check(folder: Path) -> None:
        run.reporter.say("Reloading the saved model to compare masks and logits")
        verify_saved(folder, run.model, run.outcome.edits)

    asked = run.recipe.model
    beside = Companions(run.loaded.processor, model_card(report), asked.dtype, asked.name)
    run.output.finish(beside, run.outcome.edits, check)


def measure(run: Run, which: str) -> dict[str, Measured]:
    """Measure perplexity or accuracy on all evaluation data."""
    found, reporter, task = dict[str, Measured](), run.reporter, run.task
    for name, data in run.data.items():
        with reporter.bar(f"{task.measure_name}, {which} model", 1) as advance:
            measured = task.measure(run.model, data, run.activations(), advance)
        found[name] = named(measured, name, data)
        reporter.say(found[name].of_model(which))
    return found


def _saved_model(folder: Path | None, device: str) -> PreTrainedModel | None:
    """Load the model of a run that streamed it; None where it was not saved."""
    if folder is None:
        return None
    place = GgufFile(folder, folder.name) if folder.is_file() else ModelFolder(folder, str(folder))
    return load_model(place, device=choose_device(device), processed=False)[0]


def less_memory(recipe: Recipe, device: torch.device, in_memory: bool = False) -> Words:
    """Return settings with which a run takes less memory: those that let it resume, and those that start it again.

    device: whose memory is short; in_memory: whether the model was passed in, and so stays in memory.
    """
    calibration = recipe.calibrate
    batch = [Set("batch_size", 1)] if calibration.batch_size != 1 else []
    activations = "activation_memory" if in_host_memory(device) else "device_activation_memory"
    onward = [Set(activations, 0)] if recipe.setting(activations) != 0 else []
    anew = [Set("nsamples", max(1, calibration.samples // 4))]
    if not (in_memory or streams(recipe)) and streams(recipe.replaced(stream=True)):
        (anew if weighs_blocks(recipe) else onward).append(Set("stream", True))
    if may_round_otherwise(recipe):
        onward = batch + onward
    else:
        anew = batch + anew
    if calibration.propagation == "sequential" and not recipe.remove.parts:
        anew.append(Set("propagation", "block"))
    begun = ("Begun anew, it takes less with ", Together(tuple(anew)))
    if not onward:
        return begun
    # Finished blocks lie in the checkpoint that is being made, if there is one.
    goes_on = (recipe.output.model is not None and not recipe.output.as_gguf) or streams(recipe)
    first = "the same run goes on after its last finished block with " if goes_on else "it takes less with "
    return (first, Together(tuple(onward)), ". ", *begun)
