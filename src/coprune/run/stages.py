"""One run from recipe to report: load, measure, walk and prune, measure again, save, verify, write down."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from coprune.base.devices import device_memory, enough_memory, in_host_memory, reset_peak
from coprune.base.files import write_text
from coprune.base.memory import resident_memory, return_free_memory
from coprune.base.processes import ALONE, Processes
from coprune.base.progress import Reporter
from coprune.base.words import Set, Together, Words
from coprune.evaluation.extras import Extras
from coprune.evaluation.measurement import Measured
from coprune.evaluation.tasks import named
from coprune.model.checkpoint.companions import Companions
from coprune.model.checkpoint.load import load_model, quiet_transformers
from coprune.model.checkpoint.locate import GgufFile, ModelFolder
from coprune.model.checkpoint.shards import ADAPTER_FOLDER
from coprune.model.edits import Edits
from coprune.model.loaded_model import choose_device, streams
from coprune.model.low_rank_factors import without_factors
from coprune.model.verification import verify_saved
from coprune.recipe.recipe import Recipe
from coprune.report.card import model_card
from coprune.report.folder import RECIPE_FILE, announce, announced, finish_run_folder
from coprune.report.hub import require_login
from coprune.report.schema import PhaseFacts, Report
from coprune.run.checks import prepare_folders, replace_earlier
from coprune.run.events import Finished, Phase, PhaseDone
from coprune.run.facts import Found, build_report
from coprune.run.halves import finished, push_if_asked, run_halves
from coprune.run.journal import Output, may_round_otherwise, run_identity, weighs_blocks
from coprune.run.look_at_dense import pruned_before
from coprune.run.low_rank import with_adapter
from coprune.run.prune_blocks import Outcome, prune_blocks
from coprune.run.result import Result
from coprune.run.session import NOTHING, Given, Reuse, Session, Surroundings, open_run, prove_run
from coprune.run.stored_as import encoding_for
from coprune.run.to_gguf import cut_of, refuse_other_changes
from coprune.run.trackers import final_figures, listening
from coprune.run.vocabulary import cut_vocabulary

if TYPE_CHECKING:
    from coprune.run.to_removal import Removable


def run_recipe(
    recipe: Recipe,
    given: Given = NOTHING,
    reporter: Reporter | None = None,
    write: bool = True,
    processes: Processes = ALONE,
    reuse: Reuse | None = None,
) -> Result:
    """Do what a recipe says.

    Args:
        recipe: what is asked for.
        given: what is taken instead of what the recipe names, such as a model that is open already.
        reporter: who hears of it; without it, standard error.
        write: whether to leave a run folder (the model is saved if the recipe names a folder for it).
        processes: this one among those that do the run together, which all call this.
        reuse: what the run takes over from others.

    Returns:
        The report, with the model and its processor as far as they are in memory.

    Raises:
        BadInput, NumericalError, UnsupportedModel: as `prune`.
        LostProcess: another process ended.
    """
    writes = write and processes.first
    around = Surroundings((reporter or Reporter()) if processes.first else Reporter(quiet=True), processes, writes)
    return _run_among(recipe, given, around, write, reuse)


def _run_among(recipe: Recipe, given: Given, around: Surroundings, write: bool, reuse: Reuse | None = None) -> Result:
    """As `run_recipe`, of a whole run or of its half."""
    started, processes = time.perf_counter(), around.processes
    if recipe.remove.vocabulary is not None:
        return cut_vocabulary(recipe, given, around, write, _run_among)
    if recipe.output.as_gguf:
        refuse_other_changes(recipe, given)
    if recipe.train.mode is not None or recipe.cuts_and_prunes:
        return run_halves(recipe, given, around, write, _run_among, reuse)
    if processes.size == 1 and write and (report := announced(recipe)) is not None:
        finish_run_folder(recipe, report)
        push_if_asked(recipe.output, around.reporter)
        return Result(report)
    if recipe.output.push_to_hub is not None:
        require_login(recipe.output.push_to_hub)
    if processes.first and (write or recipe.output.model):
        prepare_folders(around.replaces or recipe)
    told = listening(recipe, around.reporter) if processes.first else nullcontext()
    with told, around.reporter.libraries():
        device = choose_device(recipe.model.device) if given.loaded is None else given.loaded.device
        phases = Phases(around.reporter, device, started)
        with enough_memory(less_memory(recipe, device, given.loaded is not None), lambda: phases.now):
            return _run(recipe, given, around, reuse or Reuse(), phases)


def _run(recipe: Recipe, given: Given, around: Surroundings, reuse: Reuse, phases: Phases) -> Result:
    """Do what a recipe says, now that its folders are free and all who want to hear of it listen."""
    first, write = around.processes.first, around.writes
    extras = Extras.prepare(recipe, around.processes.size, given.loaded is None)
    session = _open(recipe, given, around, reuse)
    loaded, may_go = session.opened.loaded, _what_may_go(session)
    file = cut_of(session, may_go.routers(session.model.blocks)) if first and may_go is not None else None
    if first:
        extras.look.prepare(loaded, around.reporter)
    phases.done(Phase.PREPARE)
    if first and (around.replaces is not None or recipe.output.overwrite):
        replace_earlier(around.replaces or recipe)
    output = _open_output(session) if first else None
    if write:
        write_text(recipe.run_folder / RECIPE_FILE, (around.whole or recipe).untold().to_yaml())
    dense = reuse.dense(session, extras, lambda: measure_dense(session, extras))
    extras.look.keep_rows(loaded)
    phases.done(Phase.MEASURE_DENSE)
    outcome = prune_blocks(session, output, reuse) if may_go is None else _remove_parts(session, output, may_go)
    if output is not None and (note := output.rounding.line()) is not None:
        around.reporter.say(f"{note}.")
        outcome = replace(outcome, notes=[*outcome.notes, note])
    phases.done(Phase.PRUNE)
    pruned, alone = measure(session, "pruned"), measure_alone(session)
    if first:
        extras.measure("pruned", loaded, around.reporter)
        look_at_pruned(session, extras, outcome.edits)
    phases.done(Phase.MEASURE_PRUNED)
    total = time.perf_counter() - phases.began
    report = build_report(session, Found(outcome, dense, pruned, extras, phases.facts, total, alone))
    if write:
        announce(recipe, report)
    if file is not None and recipe.output.model is not None:
        file.cut(recipe.output.model, outcome.edits, around.reporter)
    _save(session, output, report, outcome.edits)
    if recipe.output.model is not None and first:
        phases.done(Phase.SAVE)
    return_free_memory()
    report = finished(recipe, report.model_copy(update={"phases": phases.facts}), phases.began, around)
    around.reporter.tell(Finished(final_figures(report)))
    if first:
        push_if_asked(recipe.output, around.reporter)
    if loaded.weights.streams:
        return Result(report, loaded.processor, partial(_saved_model, report.saved_model, recipe.model.device))
    made = (
        partial(_smaller_model, session, outcome.edits) if may_go is not None else partial(with_adapter, loaded.model)
    )
    return Result(report, loaded.processor, made)


def _what_may_go(session: Session) -> Removable | None:
    if not session.opened.recipe.remove.parts:
        return None
    from coprune.run.to_removal import what_may_go

    return what_may_go(session)


def _remove_parts(session: Session, output: Output | None, may_go: Removable) -> Outcome:
    from coprune.run.to_removal import remove_parts

    return remove_parts(session, output, may_go)


def _smaller_model(session: Session, edits: Edits) -> PreTrainedModel:
    from coprune.run.to_removal import smaller_model

    return smaller_model(session, edits)


def _saved_model(folder: Path | None, device: str) -> PreTrainedModel | None:
    """Load the model of a run that streamed it, with what its layers add; None where it was not saved."""
    if folder is None:
        return None
    place = GgufFile(folder, folder.name) if folder.is_file() else ModelFolder(folder, str(folder))
    model, _ = load_model(place, device=choose_device(device), processed=False)
    if (folder / ADAPTER_FOLDER).is_dir():
        with quiet_transformers():
            model.load_adapter(str(folder / ADAPTER_FOLDER))
        model.requires_grad_(False)
    return model


def _open(recipe: Recipe, given: Given, around: Surroundings, reuse: Reuse) -> Session:
    """Check everything that can be checked, say what the run will take, and prove that the model can be walked."""
    opened = open_run(recipe, given, around, reuse.tokens)
    if around.processes.first and (estimate := reuse.estimate(opened.estimate)) is not None:
        around.reporter.say(estimate.line())
        if recipe.model.check_memory:
            estimate.require()
    return_free_memory()  # of the blocks and matrices that were tried
    session = prove_run(opened)
    if around.processes.first and (pruned := pruned_before(session)) is not None:
        around.reporter.say(pruned)
    return session


def _open_output(session: Session) -> Output | None:
    """The checkpoint to write, if one is wanted or a streamed run has no other place for its blocks."""
    opened, model = session.opened, session.model
    recipe = opened.recipe
    keep = recipe.output.model is not None and not recipe.output.as_gguf
    if not keep and not model.weights.streams:
        return None
    # How windows begin is decided by now, whoever decided it.
    used = "auto" if opened.bos is None or opened.bos.used == "as given" else opened.bos.used
    weights = opened.loaded.fingerprint(model.blocks)
    identity = run_identity(recipe.replaced(bos=used), weights, opened.fingerprint, model.weights.streams)
    folder = recipe.output.model or recipe.run_folder / "checkpoint"
    encoding = encoding_for(recipe, model.weights)
    if encoding.name == "source":  # unfinished files are of one encoding
        identity = replace(identity, settings=identity.settings | {"encoding": encoding.name})
    return Output(folder, keep, model.weights, model.blocks, identity, encoding)


def _save(session: Session, output: Output | None, report: Report, edits: Edits) -> None:
    """Finish the checkpoint and prove that it holds what was pruned, or let go of it if nobody wants it."""
    if output is None:
        return
    if not output.keep:
        output.discard()
        return

    def check(folder: Path) -> None:
        session.opened.around.reporter.say("Reloading the saved model to compare masks and logits")
        verify_saved(folder, session.model, edits, output.encoding)

    opened = session.opened
    asked = opened.recipe.model
    beside = Companions(opened.loaded.processor, model_card(report), asked.dtype, asked.name)
    output.finish(beside, edits, check)


class Phases:
    """Notes every phase as it ends, and tells whoever listens to the reporter."""

    def __init__(self, reporter: Reporter, device: torch.device, began: float | None = None) -> None:
        """device: that the run computes on, whose peak is counted from now on; began: when the run did, if not now."""
        reset_peak(device)
        self.began = time.perf_counter() if began is None else began
        self._device = device
        self.facts: list[PhaseFacts] = []
        self._reporter = reporter
        self._started = time.perf_counter()

    @property
    def now(self) -> str:
        """What the run is doing: the phase that has not ended, or what comes after all of them."""
        return next((phase.value for phase in list(Phase)[len(self.facts) :]), "finish the report")

    def done(self, phase: Phase) -> None:
        """Note that a phase has just ended, and give back what it left free."""
        return_free_memory()
        now = time.perf_counter()
        there = device_memory(self._device)
        device = None if there is None else there.allocated
        seconds, self._started = now - self._started, now
        facts = PhaseFacts(name=phase.value, seconds=seconds, resident_bytes=resident_memory(), device_bytes=device)
        self.facts.append(facts)
        self._reporter.tell(PhaseDone(phase, facts))


def measure_dense(session: Session, extras: Extras) -> dict[str, Measured]:
    """Everything that is measured of the dense model."""
    opened = session.opened
    found = measure(session, "dense") if opened.recipe.evaluate.dense else {}
    if opened.around.processes.first:
        extras.measure("dense", opened.loaded, opened.around.reporter)
    return found


def look_at_pruned(session: Session, extras: Extras, edits: Edits) -> None:
    """Let the pruned model answer; what lost parts as the smaller model that is saved, which keeps what it has seen."""
    opened, reporter = session.opened, session.opened.around.reporter
    if extras.look.looks:
        with opened.loaded.whole(reporter) as module:
            model = _smaller_model(session, edits) if opened.recipe.remove.parts else module
            extras.look.ask(model, opened.loaded, reporter, opened.recipe.calibrate.batch_size)


def measure_alone(session: Session) -> dict[str, Measured]:
    """The same of what is in the weights alone, where matrices of low rank are added to them; nothing elsewhere."""
    if not session.opened.recipe.prune.low_rank.rank:
        return {}
    with without_factors(session.model.module):
        return measure(session, "sparse")


def measure(session: Session, which: str) -> dict[str, Measured]:
    """Perplexity or accuracy on everything that is measured on."""
    opened, found = session.opened, dict[str, Measured]()
    reporter, task = opened.around.reporter, opened.task
    for name, data in opened.data.items():
        with reporter.bar(f"{task.measure_name}, {which} model", 1) as advance:
            measured = task.measure(session.model, data, opened.activations(), advance)
        found[name] = named(measured, name, data)
        reporter.say(found[name].of_model(which))
    return found


def less_memory(recipe: Recipe, device: torch.device, in_memory: bool = False) -> Words:
    """What would make a run take less memory: with what it goes on where it stopped, and with what it begins anew.

    device: whose memory that is about; in_memory: whether the model was handed over, and so is there whatever is asked for.
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
