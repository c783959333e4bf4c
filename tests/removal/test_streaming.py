"""Removing blocks and uneven budgets from a streamed model gives the same bytes as in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coprune.base.progress import Reporter
from coprune.recipe.recipe import make_recipe
from coprune.removal import rehearsal
from coprune.runner.run_recipe import run_recipe
from support.pico_folder import listing, save_pico, write_words
from support.saved import load_clean


def run(folder: Path, out: str, **changes: Any) -> dict[str, bytes | None]:
    """Execute a run and return its model's files except those with folder names."""
    places = {"save": str(folder / out / "run"), "save_model": str(folder / out / "small")}
    data = {"model": str(folder / "model"), "dataset": str(folder / "words.txt"), "evaluate": False}
    settings = data | places | {"align": 16, "nsamples": 6, "seqlen": 16} | changes
    run_recipe(make_recipe(settings), reporter=Reporter(quiet=True))
    found = listing(folder / out / "small")
    for name in ("README.md", "tokenizer_config.json"):  # the latter is copied in one case and saved in the other
        found.pop(name)
    return found


@pytest.mark.parametrize(
    ("family", "changes", "asked"),
    [
        pytest.param("llama", {"num_hidden_layers": 5}, {"remove": "blocks=0.4"}, marks=pytest.mark.slow),
        ("llama", {"num_hidden_layers": 5}, {"remove": "blocks=0.4", "score": "kl:tokens=64,candidates=2"}),
        (
            "gemma3_text",
            {},
            {"remove": "blocks=0.25,channels=0.4", "score": "influence"},
        ),  # two kinds of attention, tied
        pytest.param(
            "deepseek_v3", {"n_routed_experts": 8}, {"remove": "blocks=0.34,experts=0.25"}, marks=pytest.mark.slow
        ),
    ],
)
def test_streamed_removal_gives_the_bytes_of_memory(
    family: str, changes: dict[str, Any], asked: dict[str, Any], tmp_path: Path
) -> None:
    save_pico(tmp_path / "model", family, **changes)
    write_words(tmp_path / "words.txt")
    whole = run(tmp_path, "whole", stream=False, **asked)
    assert run(tmp_path, "streamed", stream=True, **asked) == whole
    load_clean(tmp_path / "streamed" / "small")


def test_a_configuration_with_the_wrong_attention_types_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two kinds of attention have the same shapes."""
    kinds = ["sliding_attention", "full_attention"] * 2
    tried: list[Any] = []

    def wrong_first(model: Any, shapes: Any, resized: Any, layout: Any) -> Iterator[dict[str, Any]]:
        left = [kind for index, kind in enumerate(kinds) if index in resized.lists[0].kept]
        other = {"sliding_attention": "full_attention", "full_attention": "sliding_attention"}
        for found in ([other[kind] for kind in left], left):
            tried.append(found)
            yield {"num_hidden_layers": 3, "layer_types": found}

    monkeypatch.setattr(rehearsal, "possible_changes", wrong_first)
    save_pico(tmp_path / "model", "gemma3_text")
    write_words(tmp_path / "words.txt")
    run(tmp_path, "out", remove="blocks=0.25", score="influence", stream=True)
    assert len(tried) == 4  # two before a block is chosen, and two afterwards
    assert load_clean(tmp_path / "out" / "small").config.layer_types == tried[3]
