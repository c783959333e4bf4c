"""The folder of a training, and how an interrupted training resumes with the same settings, model and data."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from coprune.base.errors import BadInput
from coprune.base.files import (
    folder_apart,
)
from coprune.base.validation import read_as
from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import holds_model, locate
from coprune.recipe.parts import Decides
from coprune.recipe.recipe import Recipe
from coprune.recipe.views import TRAINING
from coprune.report.links import PAGE_FILE
from coprune.report.output_folder import OutputFolder
from coprune.store.place import Identity, Place, settings_in
from coprune.training.finetune_page import write_page_of
from coprune.training.finetune_report import REPORT_FILE, FinetuneReport
from coprune.training.masks import masks_of, plain_parameters
from coprune.training.session import Session


def output_of(settings: Recipe) -> OutputFolder:
    """Return where a training writes."""
    return OutputFolder(
        run=settings.training_folder,
        model=settings.trained_folder,
        source=settings.model.name,
        report_file=REPORT_FILE,
        own=("training", "adapter"),
        overwrite=bool(settings.output.overwrite),
    )


def finish_run_folder(report: FinetuneReport) -> None:
    """Announce the report, write its page, remove the states to resume from, and rename the report last."""
    output = output_of(report.settings)

    def write_beside(announced: Path) -> None:
        write_page_of(report, output.run, output.run / PAGE_FILE)
        shutil.rmtree(output.run / "training", ignore_errors=True)

    output.announce(report)
    output.finish(write_beside)


def is_same_training(report: FinetuneReport, settings: Recipe) -> bool:
    """Return whether a report is of the same training: equal settings for results and measurements, and equal folder."""
    what = Decides.RESULT | Decides.MEASUREMENT
    same = _deciding(report.settings, what) == _deciding(settings, what)
    return same and report.settings.trained_folder == settings.trained_folder


def finish_announced(settings: Recipe) -> FinetuneReport | None:
    """Finish a run with these settings that was killed after its model was complete and before its report was.

    Returns the report, or None if there is no such run. Raises BrokenMask if a pruned weight of the model is not zero.
    """
    try:
        report = read_as(FinetuneReport, output_of(settings).announced)
    except BadInput:
        return None
    if not is_same_training(report, settings) or not holds_model(settings.trained_folder):
        return None
    location = locate(settings.model.name, settings.model.cache_dir)
    pruned, _ = load_model(location)
    saved, _ = load_model(locate(settings.trained_folder))
    masks_of(pruned, location.path).verify(plain_parameters(saved))
    finish_run_folder(report)
    return report


def beside_others(settings: Recipe) -> tuple[Recipe, str | None]:
    """Choose another run folder if the default one holds another run and the user named none.

    Returns the settings, and a message if the folder is not the default one.
    """
    if settings.output.run is not None:
        return settings, None
    usual = settings.training_folder
    folder, differing = folder_apart(usual, _deciding(settings), _settings_in)
    if not differing:
        return settings, None
    said = f"{usual} holds a run that differs in {', '.join(differing)}; this one goes to {folder}."
    return settings.replaced(save=folder), said


def _settings_in(folder: Path) -> dict[str, Any] | None:
    """Return the settings that determine the result of the run in a folder, finished or not; None without a run."""
    if not (folder / REPORT_FILE).is_file():
        return settings_in(folder / "training")
    try:
        return _deciding(read_as(FinetuneReport, folder / REPORT_FILE).settings)
    except BadInput:
        return {}


def _deciding(settings: Recipe, what: Decides = Decides.RESULT) -> dict[str, Any]:
    """Return the settings that determine a training by name, in JSON types."""
    found = settings.deciding(what)
    decides = {name: found[setting.word] for name, setting in TRAINING.items() if setting.word in found}
    return dict(json.loads(json.dumps(decides, default=str)))


def resume_from(session: Session, first: bool) -> Path | None:
    """Return the last complete state of an interrupted run with the same settings, model and data, or None.

    Raises BadInput if the folder holds an unfinished run with other settings, model or data.
    """
    folder = session.training_folder
    settings = session.settings
    found = {
        "masks": session.masks.fingerprint(),
        "weights": _fingerprint(session),
        "data": session.data.fingerprint,
    }
    place = Place(folder, Identity.of("training", 1, _deciding(settings) | found))
    # The Trainer writes this file last, so a state with it is complete.
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    if not place.takes_up(bool(whole), "save", settings.training_folder):
        if first:  # also after a run that failed before it saved a state
            shutil.rmtree(folder, ignore_errors=True)
            place.begin()
        return None
    newest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    if newest is not None:
        session.reporter.say(f"Resuming from step {newest.name.rpartition('-')[2]} of an interrupted run.")
    return newest


def _fingerprint(session: Session) -> str:
    """Hash all initial weights except adapters: 16 hex digits."""
    digest = hashlib.sha256()
    for name, parameter in sorted(plain_parameters(session.model).items()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()[:16]
