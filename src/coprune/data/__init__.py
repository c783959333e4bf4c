"""Calibration and evaluation data: text, images, speech and pairs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coprune.data.corpora import CORPORA, evaluation_corpus_for
    from coprune.data.windows import EvaluationText, Windows, calibration_windows, evaluation_tokens

__all__ = [
    "CORPORA",
    "EvaluationText",
    "Windows",
    "calibration_windows",
    "evaluation_corpus_for",
    "evaluation_tokens",
]
_HOME = {
    **dict.fromkeys(("CORPORA", "evaluation_corpus_for"), "coprune.data.corpora"),
    **dict.fromkeys(("EvaluationText", "Windows", "calibration_windows", "evaluation_tokens"), "coprune.data.windows"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'coprune.data' has no attribute {name!r}")
    # Imported lazily, since windows need torch, and texts are checked before the slow import of torch.
    return getattr(import_module(_HOME[name]), name)
