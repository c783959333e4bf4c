"""What hundreds of runs of tiny models leave short: users get more of it, and a few tests ask for that."""

from __future__ import annotations

import os

import pytest

from coprune.evaluation.answers import questions
from coprune.recipe.presets import PRESETS, WHOLE

NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"
"""The variable without which transformers starts threads for every block that is read, which takes longer than a tiny block."""
_ANSWER = questions.SHORT_ANSWER
_TRAINED = [
    (settings, word, settings[word])
    for settings in (*PRESETS.values(), *WHOLE.values())
    for word in ("reconstruct_tokens", "finetune_tokens")
    if word in settings
]


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Write few tokens of an answer, train few where a preset trains, and wait for no disk: nobody cuts the power."""
    patch.setattr(os, "fsync", lambda descriptor: None)
    patch.setenv(NO_THREADS, "1")
    patch.setattr(questions, "SHORT_ANSWER", 4)
    for settings, word, tokens in _TRAINED:
        patch.setitem(settings, word, tokens // 64)


def answer_whole(patch: pytest.MonkeyPatch) -> None:
    """Write answers as long as users have them."""
    patch.setattr(questions, "SHORT_ANSWER", _ANSWER)
