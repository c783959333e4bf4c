"""The tasks of the EleutherAI harness, lm-eval: find them and their data before anything slow starts."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import logging
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput, about
from coprune.base.words import Set, Setting, Words, parts_of
from coprune.data.hub_datasets import require_dataset
from coprune.evaluation.harness_trust import DEFINITIONS, Foreign, foreign_definitions
from coprune.evaluation.zero_shot import ZeroShotSettings
from coprune.recipe.choice import read_named

LOCAL_TASKS_HINT: Words = (
    "To use local files, write a task definition that names them and give its folder with ",
    Setting("include_path"),
    *([] if DEFINITIONS is None else [f"; {DEFINITIONS} has such definitions of the common tasks"]),
)
# Dataset builders that read files and do not need the Hub.
_FILE_BUILDERS = {"json", "csv", "parquet", "arrow", "text"}
# Upstream's seed for few-shot examples and everything else.
SEED = 1234


def find_tasks(settings: ZeroShotSettings) -> dict[str, Any]:
    """Load the tasks with their data, as returned by the harness's `TaskManager.load`.

    Raises BadInput if lm-eval is missing, a name is unknown, data cannot be downloaded, or a definition runs code that the user
    did not trust.
    """
    if settings.include_path is not None and not settings.include_path.is_dir():
        raise BadInput(
            f"{settings.include_path} is not a folder",
            field="include_path",
            value=settings.include_path,
            fix=("give a folder of task definitions (YAML) with ", Setting("include_path")),
        )
    generation_settings(settings)
    if not settings.tasks:
        raise BadInput("no task is named", field="tasks", fix=("name some, as in ", Set("tasks", "boolq,arc_easy")))
    manager, foreign = _manager(settings), foreign_in(settings)
    with isolated(), foreign.sandboxed():
        for name in settings.tasks:
            _require_known(name, manager)
        foreign.require_no_code(_in_use(settings.tasks, manager))
        for name in settings.tasks:
            _require_data(name, manager)
        try:
            loaded: dict[str, Any] = manager.load(list(settings.tasks))
        except BadInput:
            raise
        except (Exception, SystemExit) as error:  # a definition may run any code, which may raise anything
            raise BadInput(
                f"a task cannot be loaded: {one_line(error)}",
                field="tasks",
                value=",".join(settings.tasks),
                fix=LOCAL_TASKS_HINT,
            ) from error
    return loaded


def foreign_in(settings: ZeroShotSettings) -> Foreign:
    """Return the definitions that must not run code; none if the user trusts them."""
    return Foreign() if settings.trusted else foreign_definitions(settings.include_path, settings.tasks)


def _in_use(names: Sequence[str], manager: Any) -> set[Path] | None:
    """Return the definition files of tasks; None (all) if a name is a group or tag, whose members may be anywhere."""
    found = set[Path]()
    for name in names:
        entry = _entry(name, manager)
        if entry is not None and (entry.kind.name not in ("TASK", "PY_TASK") or entry.yaml_path is None):
            return None
        found.add((expand_home(name) if entry is None else entry.yaml_path).resolve())
    return found


def generation_settings(settings: ZeroShotSettings) -> dict[str, Any]:
    """Parse the settings of generative tasks. Raises BadInput if they are invalid."""
    if settings.gen_kwargs is None:
        return {}
    with about("gen_kwargs", settings.gen_kwargs):
        return dict(read_named(f"gen_kwargs:{settings.gen_kwargs}")[1])


def tasks_fingerprint(tasks: dict[str, Any], limit: int | None = None) -> str:
    """Hash tasks by their first `limit` items, templates and metrics: 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name, task in tasks["tasks"].items():
        settings = {key: value for key, value in task.dump_config().items() if key != "num_fewshot"}
        digest.update(json.dumps([name, settings], sort_keys=True, default=_named).encode())
        for item in itertools.islice(task.eval_docs, limit):
            digest.update(json.dumps(item, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _manager(settings: ZeroShotSettings) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise BadInput("zero-shot tasks need lm-eval", field="tasks", fix="pip install 'coprune[eval]'") from error
    with isolated():
        if settings.include_path is None:
            return _upstream_tasks()
        own = TaskManager(include_path=str(settings.include_path), include_defaults=False)
        entries = [_entry(name, own) for name in settings.tasks]
        if all(entry is not None and entry.kind.name == "TASK" for entry in entries):
            return own
        return TaskManager(include_path=str(settings.include_path))


@cache
def _upstream_tasks() -> Any:
    """Return the harness's own definitions, thousands that take seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _entry(name: str, manager: Any) -> Any | None:
    """Return what a manager knows of a task, by its name or the path of its definition."""
    if name in manager.task_index:
        return manager.task_index[name]
    path = expand_home(name).resolve()
    return next((one for one in manager.task_index.values() if one.yaml_path and one.yaml_path.resolve() == path), None)


def _require_known(name: str, manager: Any) -> None:
    if name in manager.all_tasks or Path(name).is_file():
        return
    near = difflib.get_close_matches(name, manager.all_tasks, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    fix = f"{hint}List its tasks with: lm-eval ls tasks"
    raise BadInput(f"lm-eval knows no task {name!r}", field="tasks", value=name, fix=fix)


def _require_data(name: str, manager: Any) -> None:
    """Check once that a task's dataset is on the Hub; the harness itself would retry for half a minute."""
    definition = getattr(_entry(name, manager), "cfg", None) or {}
    dataset = definition.get("dataset_path")
    local = definition.get("custom_dataset") is not None or dataset in _FILE_BUILDERS
    if dataset is None or local or Path(dataset).exists():
        return
    try:
        require_dataset(dataset)
    except BadInput as error:
        cause = ("the data of task ", repr(name), " is not available: ", *parts_of(error.cause))
        raise BadInput(cause, field="tasks", value=name, fix=LOCAL_TASKS_HINT) from error


@contextmanager
def isolated() -> Iterator[None]:
    """Silence the harness and seed the global generators; restore the caller's states."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        # Its bars cannot be disabled, so discard standard error (coprune's bar bypasses that) and standard output.
        silent, nowhere = redirect_stderr(StringIO()), redirect_stdout(StringIO())
        with silent, nowhere, warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            random.seed(0)
            np.random.seed(SEED)  # noqa: NPY002
            torch.manual_seed(SEED)
            yield
    finally:
        logger.setLevel(level)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _named(value: Any) -> str:
    # A function's repr contains its address, which differs between processes.
    return getattr(value, "__qualname__", None) or str(value)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
