"""The folder of a training, and how an interrupted training resumes with the same settings, model and data."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.base.files import (
    folder_apart,
    remove_unfinished,
    require_apart,
    require_own_name,
    require_usable,
    write_text,
)
from coprune.base.validation import read_as
from coprune.base.words import Set, Setting
from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import holds_model, locate
from coprune.model.edits import is_coprunes
from coprune.recipe.parts import Decides
from coprune.recipe.recipe import Recipe
from coprune.recipe.views import TRAINING
from coprune.report.links import PAGE_FILE
from coprune.store.place import Identity, Place, settings_in
from coprune.training.finetune_page import write_page_of
from coprune.training.finetune_report import REPORT_FILE, FinetuneReport
from coprune.training.masks import masks_of, plain_parameters
from coprune.training.session import Session

_ANNOUNCED = f".{REPORT_FILE}"


def announce(report: FinetuneReport, run_folder: Path) -> None:
    """Store a preliminary report, in case the run is killed after its model is complete."""
    write_text(run_folder / _ANNOUNCED, report.model_dump_json(indent=2) + "\n")


def finish_run_folder(report: FinetuneReport) -> None:
    """Write the page, remove the resumable states, and finally name the report, which marks the run as finished."""
    run = report.settings.training_folder
    announce(report, run)
    write_page_of(report, run, run / PAGE_FILE)
    shutil.rmtree(run / "training", ignore_errors=True)
    remove_unfinished(run)
    (run / _ANNOUNCED).replace(run / REPORT_FILE)


def gives_as(report: FinetuneReport, settings: Recipe) -> bool:
    """Return whether a report is of the same training: equal settings for results and measurements, and equal folder."""
    what = Decides.RESULT | Decides.MEASUREMENT
    same = _deciding(report.settings, what) == _deciding(settings, what)
    return same and report.settings.trained_folder == settings.trained_folder


def finish_announced(settings: Recipe) -> FinetuneReport | None:
    """Finish a run with these settings that was killed after its model was complete and before its report was.

    Returns the report, or None if there is no such run. Raises BrokenMask if a pruned weight of the model is not zero.
    """
    try:
        report = read_as(FinetuneReport, settings.training_folder / _ANNOUNCED)
    except BadInput:
        return None
    if not gives_as(report, settings) or not holds_model(settings.trained_folder):
        return None
    location = locate(settings.model.name, settings.model.cache_dir)
    pruned, _ = load_model(location)
    saved, _ = load_model(locate(settings.trained_folder))
    masks_of(pruned, location.path).verify(plain_parameters(saved))
    finish_run_folder(report)
    return report


def prepare_folders(settings: Recipe) -> None:
    """Raise BadInput if an output folder is occupied; a run folder without a report holds an unfinished run and is allowed."""
    folder = settings.training_folder
    require_usable(folder, "save")
    require_own_name(settings.trained_folder, "save_model")
    require_apart(folder, settings.trained_folder, ("training", "adapter"))
    if folder.exists() and not folder.is_dir():
        raise BadInput(
            f"{folder} is a file", field="save", value=folder, fix=("name another run folder with ", Setting("save"))
        )
    replace = (", or replace it with ", Set("overwrite", True))
    if (folder / REPORT_FILE).exists() and not settings.output.overwrite:
        named = ("name another folder with ", Setting("save"), *replace)
        raise BadInput(f"{folder} already holds a finished run", field="save", value=folder, fix=named)
    target = settings.trained_folder
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        mine = is_coprunes(target)
        if mine and settings.output.overwrite and target.resolve() != expand_home(settings.model.name).resolve():
            return
        named = ("name another folder with ", Setting("save_model"), *(replace if mine else ()))
        raise BadInput(f"{target} already exists and is not empty", field="save_model", value=target, fix=named)


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


def replace_earlier(settings: Recipe) -> None:
    """Remove the output of an earlier finished run from the folders of this one."""
    run, model = settings.training_folder, settings.trained_folder
    finished = (run / REPORT_FILE).is_file()
    if finished:
        shutil.rmtree(run / "adapter", ignore_errors=True)
    if is_coprunes(model):
        shutil.rmtree(model)
    if finished:
        (run / REPORT_FILE).unlink()  # last, since it marks the rest as a finished run's


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
