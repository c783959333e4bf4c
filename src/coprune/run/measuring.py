"""What a run measures of its dense and of its pruned model."""

from __future__ import annotations

from coprune.evaluation.extras import Extras
from coprune.evaluation.measurement import Measured
from coprune.evaluation.tasks import named
from coprune.model.edits import Edits
from coprune.model.low_rank import without_factors
from coprune.run.removal.parts import smaller_model
from coprune.run.session import Session


def measure_dense(session: Session, extras: Extras) -> dict[str, Measured]:
    """Everything that is measured of the dense model."""
    opened = session.opened
    found = measure(session, "dense") if opened.recipe.evaluation.dense else {}
    if opened.around.processes.first:
        extras.measure("dense", opened.loaded, opened.around.reporter)
    return found


def look_at_pruned(session: Session, extras: Extras, edits: Edits) -> None:
    """Let the pruned model answer; what lost parts as the smaller model that is saved, which keeps what it has seen."""
    opened, reporter = session.opened, session.opened.around.reporter
    if extras.look.looks:
        with opened.loaded.whole(reporter) as module:
            model = smaller_model(session, edits) if opened.recipe.structure.remove else module
            extras.look.ask(model, opened.loaded, reporter, opened.recipe.calibration.batch_size)


def measure_alone(session: Session) -> dict[str, Measured]:
    """The same of what is in the weights alone, where matrices of low rank are added to them; nothing elsewhere."""
    if not session.opened.recipe.low_rank.rank:
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
