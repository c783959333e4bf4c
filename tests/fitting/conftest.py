"""A small model with text, and a finished fit of it."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

import coprune
from coprune.base.environment import user_cache
from support.fits import WORDS, how, tokens
from support.pico import pico_model
from support.pico_gguf import distinct_norms, write_pico_gguf
from support.vocabularies import content_of


@pytest.fixture(scope="package")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a pico llama as a GGUF file, text, and prompts."""
    folder, tokenizer = tmp_path_factory.mktemp("fit"), content_of("bytes")
    model = pico_model("llama", vocab_size=tokens(), max_position_embeddings=1024, tie_word_embeddings=True)
    write_pico_gguf(distinct_norms(model), folder / "model.gguf", tokenizer=tokenizer)
    generator = random.Random(0)
    (folder / "text.txt").write_text("\n".join(" ".join(generator.sample(WORDS, 60)) for _ in range(60)))
    return folder


@pytest.fixture(scope="package")
def found(place: Path) -> Any:
    return coprune.fit(
        place / "model.gguf", place / "text.txt", "bits<=dense*1.1", output=place / "small", **how(place)
    )


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty store for this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "coprune" / "store"


@pytest.fixture
def known_store(found: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a store for this test with the finished fit's measurements."""
    shutil.copytree(user_cache() / "store", own := tmp_path / "cache" / "coprune" / "store")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return own
