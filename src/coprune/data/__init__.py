"""Text and images that a model is calibrated and measured on."""

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
