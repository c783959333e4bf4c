"""The stages of a step that walks over the blocks, in order: open, measure, change, measure again, save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from coprune.base.devices import enough_memory, in_host_memory
from coprune.base.memory import return_free_memory
from coprune.base.words import Set, Together, Words
from coprune.evaluation.extra_measurements import Extras
from coprune.evaluation.measurement import Measured
from coprune.evaluation.tasks import Walked, named
from coprune.model.checkpoint.companions import Companions
from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import GgufFile, ModelFolder
from coprune.model.edit import Configure
from coprune.model.loaded_model import choose_device, streams
from coprune.model.saved_slices import smaller_tensors
from coprune.model.verification import verify_saved
from coprune.recipe.parts import ModelPart
from coprune.recipe.recipe import Recipe
from coprune.removal.smaller_model import build_smaller
from coprune.report.run_events import Rounded
from coprune.report.run_folder import announce
from coprune.run.context import Run
from coprune.run.dense_figures import dense_figures
from coprune.run.output import Destination, Output
from coprune.run.phase_events import Finished, Phase
from coprune.run.report_facts import build_report
from coprune.run.result import Result
from coprune.run.trackers import final_figures, listening
from coprune.stages.opening import open_run, prove_run, say_if_sparse
from coprune.stages.run_identity import may_round_otherwise, run_identity, weighs_blocks


def run_stages(run: Run, plan: Callable[[Run], None]) -> Result:
    """Run the stages of a step that walks over the blocks.

    Args:
        run: the run.
        plan: sets `run.change` once the model is proven.
    """
    recipe = run.recipe
    with listening(recipe, run.reporter) if run.first else nullcontext(), run.reporter.libraries():
        loaded = run.given.loaded
        device = choose_device(recipe.model.device) if loaded is None else loaded.device
        run.count_from_here(device)
        with enough_memory(less_memory(recipe, device, loaded is not None), lambda: run.phase):
            for phase, stages in STAGES.items():
                for stage in (*stages, plan) if phase is Phase.PREPARE else stages:
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
    return_free_memory()  # of the trial matrices and blocks


def prove(run: Run) -> None:
    """Prove that the model can be walked and, if requested, that it can answer the prompts."""
    prove_run(run)
    if run.first:
        say_if_sparse(run)
        run.extras.look.prepare(run.loaded, run.reporter)


def claim(run: Run) -> None:
    """Claim the run's folders."""
    with run.taking() if run.first else nullcontext():
        run.output = Output(run.processes, run.model, _destination(run) if run.first else None)


def measure_dense(run: Run) -> None:
    """Measure the dense model, except for what is already stored."""
    run.dense = dense_figures(run, lambda name: measure(run, "dense", name))
    run.extras.look.keep_rows(run.loaded)


def change_blocks(run: Run) -> None:
    """Walk over the blocks, change them, and write them."""
    run.outcome = run.change(run)
    if (rounded := Rounded.of(run.output.rounding)) is not None:
        run.reporter.say(f"{rounded.line()}.")
        run.outcome = replace(run.outcome, events=[*run.outcome.events, rounded])


def measure_pruned(run: Run) -> None:
    """Measure the pruned model and let it answer prompts; if parts were removed, as the smaller model that is saved."""
    run.pruned, recipe = {name: measure(run, "pruned", name) for name in run.data}, run.recipe
    if not run.first:
        return
    run.extras.measure_pruned(run.loaded, run.reporter)
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
    _save(run)


STAGES: dict[Phase, Sequence[Callable[[Run], None]]] = {
    Phase.PREPARE: (open_source, estimate, prove),
    Phase.MEASURE_DENSE: (claim, measure_dense),
    Phase.PRUNE: (change_blocks,),
    Phase.MEASURE_PRUNED: (measure_pruned,),
    Phase.SAVE: (save,),
}


def end(run: Run) -> Result:
    """Write the report and return it with the model."""
    return_free_memory()
    report = run.finish(run.report.model_copy(update={"phases": run.phases}))
    if run.writes and report.saved_model is not None:
        run.extras.look.keep(ModelPart(name=str(report.saved_model), device=run.recipe.model.device))
    run.reporter.tell(Finished(final_figures(report)))
    if run.loaded.weights.streams:
        saved = partial(_saved_model, report.saved_model, run.recipe.model.device)
        return Result(report, run.loaded.processor, saved)
    removes = bool(run.recipe.remove.parts)
    return Result(report, run.loaded.processor, lambda: _smaller_model(run) if removes else run.loaded.model)


def _smaller_model(run: Run) -> PreTrainedModel:
    """Build the smaller model in memory."""
    module, edits = run.model.module, run.outcome.edits
    changes = next(edit.changes for edit in edits.all() if isinstance(edit, Configure))
    layout = partial(run.model.weights.layout, "")
    return build_smaller(module, smaller_tensors(module, edits, layout), changes)


def _destination(run: Run) -> Destination | None:
    """Return the destination of the blocks, if a checkpoint is wanted or the model is streamed."""
    recipe, model = run.recipe, run.model
    keep = recipe.output.model is not None and not recipe.output.as_gguf
    if not keep and not model.weights.streams:
        return None
    # By now it is decided how windows begin.
    used = "auto" if run.bos is None or run.bos.used == "as given" else run.bos.used
    weights = run.loaded.fingerprint(model.every_block)
    identity = run_identity(recipe.replaced(bos=used), weights, run.fingerprint, model.weights.streams)
    if run.encoding.name == "source":  # unfinished files are of one encoding
        identity = identity.model_copy(update={"decides": identity.decides | {"encoding": run.encoding.name}})
    folder = recipe.output.model or recipe.run_folder / "checkpoint"
    return Destination(folder, keep, identity, run.encoding)


def _save(run: Run) -> None:
    """Finish the checkpoint, or discard it if it is not kept."""
    if not run.output.keep:
        run.output.discard()
        return

    def check(folder: Path) -> None:
        run.reporter.say("Reloading the saved model to compare masks and logits")
        verify_saved(folder, run.model, run.outcome.edits)

    asked = run.recipe.model
    beside = Companions(run.loaded.processor, asked.dtype, asked.name)
    run.output.finish(beside, run.outcome.edits, check)


def measure(run: Run, which: str, name: str) -> Measured:
    """Measure perplexity or accuracy on the evaluation data of a name."""
    reporter, metric, data = run.reporter, run.task.metric, run.data[name]
    with reporter.bar(f"{metric.name}, {which} model", 1) as advance:
        found = named(metric.measure(data, advance, Walked(run.model, run.activations())), name, data)
    reporter.say(found.of_model(which))
    return found


def _saved_model(folder: Path | None, device: str) -> PreTrainedModel | None:
    """Load the saved model of a streamed run; None if it was not saved."""
    if folder is None:
        return None
    place = GgufFile(folder, folder.name) if folder.is_file() else ModelFolder(folder, str(folder))
    return load_model(place, device=choose_device(device), processed=False)[0]


def less_memory(recipe: Recipe, device: torch.device, in_memory: bool = False) -> Words:
    """Return settings that reduce a run's memory: those with which it can resume, and those that need a new start.

    device: the one short of memory. in_memory: whether the model was passed in, and so stays in memory.
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
    begun = ("Restarted, it takes less with ", Together(tuple(anew)))
    if not onward:
        return begun
    # A run can only resume if its finished blocks were written to a checkpoint.
    goes_on = (recipe.output.model is not None and not recipe.output.as_gguf) or streams(recipe)
    first = "the same run resumes after its last finished block with " if goes_on else "it takes less with "
    return (first, Together(tuple(onward)), ". ", *begun)
