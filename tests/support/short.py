"""Shorter defaults for hundreds of tiny runs; a few tests restore the users' ones."""

from __future__ import annotations

import os

import pytest

from coprune.evaluation.answers import questions
from coprune.recipe.presets import PRESETS, WHOLE

NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"
"""Variable that keeps transformers from starting threads for every block, which takes longer than reading a tiny one."""
_ANSWER = questions.SHORT_ANSWER
_TRAINED = [
    (settings, word, settings[word])
    for settings in (*PRESETS.values(), *WHOLE.values())
    for word in ("reconstruct_tokens", "finetune_tokens")
    if word in settings
]


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Shorten answers and the training of presets, and do not wait for the disk."""
    patch.setattr(os, "fsync", lambda descriptor: None)
    patch.setenv(NO_THREADS, "1")
    patch.setattr(questions, "SHORT_ANSWER", 4)
    for settings, word, tokens in _TRAINED:
        patch.setitem(settings, word, tokens // 64)


def answer_whole(patch: pytest.MonkeyPatch) -> None:
    """Restore the normal length of answers."""
    patch.setattr(questions, "SHORT_ANSWER", _ANSWER)
