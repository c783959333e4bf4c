"""Checks of a fit's settings and output folder that need neither a model nor torch."""

from __future__ import annotations

from pathlib import Path

from coprune.base.errors import BadInput, about
from coprune.base.files import require_usable
from coprune.data.corpora import look_at_text
from coprune.fitting.fit_settings import FitSettings
from coprune.fitting.foreign_files import look_at_candidates
from coprune.gguf_files.llama_cpp import require_llama_cpp, require_type
from coprune.model.checkpoint.glance import look

WORK_FOLDER = ".fit"


def look_at_settings(how: FitSettings) -> None:
    """Raise BadInput for a type, candidate, template or text that cannot be used."""
    if how.runtime == "llama.cpp":
        require_llama_cpp("fit measures files in llama.cpp", "runtime", how.runtime)
        for name in how.types:
            require_type(name)
    look_at_candidates(how.candidate)
    if how.like is not None:
        look(how.like)
    if how.text is not None:
        with about("text", how.text):
            look_at_text(how.text)


def require_own_folder(target: Path) -> None:
    """Raise BadInput if a path cannot be a fit's folder, or holds something else."""
    require_usable(target, "output")
    is_folder = target.is_dir()
    if target.exists() and not ((target / WORK_FOLDER).is_dir() or (is_folder and not any(target.iterdir()))):
        what = "holds something else" if is_folder else "is a file"
        raise BadInput(f"{target} {what}", field="output", value=str(target), fix="name another folder")
