"""Uneven budgets: the requested total is removed where it costs least, and the padded model matches the silenced one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import coprune
from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.model.edit import PadUnits
from coprune.model.edits import Edits
from coprune.recipe.recipe import make_recipe
from coprune.removal import removal_plan
from coprune.run import context
from coprune.run.result import Result
from coprune.runner.run_recipe import run_recipe
from coprune.stages import run_stages
from coprune.steps import remove as removal_stage
from support.pico import pico_model
from support.pico_folder import listing, save_pico, write_words
from support.pico_pairs import save_pair_model
from support.saved import assert_same_tensors, load_clean, saved_like, tensors_of

IDS = torch.randint(60, (8, 32), generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, Any] = {"dataset": IDS, "align": 16, "evaluate": False, "quiet": True}


def damped(family: str = "llama") -> Any:
    """Return a model whose first block's MLP hardly matters, so that others should keep more."""
    model = pico_model(family)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if ".0.mlp." in name and "down" in name:
                tensor.mul_(0.01)
    return model


def real_counts(folder: Path) -> list[tuple[str, list[int]]]:
    """Return the kind and the number of real units of every part, by consumer."""
    pads = [edit for edit in Edits.read(folder).all() if isinstance(edit, PadUnits)]
    return [(pad.part, [sum(end - start for start, end in runs) for runs in pad.real]) for pad in pads]


@pytest.mark.parametrize(
    ("family", "remove", "allocation", "kept"),
    [
        pytest.param("llama", "channels=0.33", "error", {"channels": 3 * 64}, marks=pytest.mark.slow),
        ("llama", "channels=0.33,heads=0.5", "error", {"channels": 3 * 64, "heads": 3}),
        ("mixtral", "channels=0.33", "error:tokens=0", {"channels": 3 * 64}),  # different channels per expert
        pytest.param("gemma3_text", "channels=0.4,blocks=0.25", "error", None, marks=pytest.mark.slow),
    ],
)
def test_the_exact_total_is_removed_and_the_padded_model_matches_the_silenced_one(
    family: str, remove: str, allocation: str, kept: dict[str, int] | None, tmp_path: Path
) -> None:
    model, folder = damped(family), tmp_path / "small"
    result = coprune.prune(model, remove=remove, allocation=allocation, save_model=folder, **SETTINGS)
    small = saved_like(model, result.model, folder, rounding=1e-5)
    counts = real_counts(folder)
    assert counts
    for kind, total in (kept or {}).items():
        own = [count for part, count in counts if part == kind]
        assert all(len({*count}) == 1 for count in own)
        assert not own or sum(count[0] for count in own) == total
    assert result.report.left is not None
    assert small.num_parameters() == result.report.left + result.report.padding
    assert "padded with zeros to the widest block" in result.report.edits[0].line()
    even = coprune.prune(damped(family), remove=remove, **SETTINGS)
    if "blocks" not in remove:
        assert result.report.left == even.report.left


def test_padding_is_zero_in_every_tensor_and_real_units_are_not(tmp_path: Path) -> None:
    coprune.prune(damped(), remove="channels=0.33", allocation="error", save_model=tmp_path / "small", **SETTINGS)
    small, edits = load_clean(tmp_path / "small"), Edits.read(tmp_path / "small").by_block
    padded = 0
    for block, own in edits.items():
        for pad in (edit for edit in own if isinstance(edit, PadUnits)):
            real = torch.zeros(pad.units, dtype=torch.bool)
            for start, end in pad.real[0]:
                real[start:end] = True
            weights: dict[str, Tensor] = {
                part: small.get_parameter(f"{block}.mlp.{part}_proj.weight") for part in ("gate", "up", "down")
            }
            for rows in (weights["gate"], weights["up"], weights["down"].T):
                assert bool((rows[~real] == 0).all())
                assert bool((rows[real] != 0).any(dim=1).all())
            padded += int((~real).sum())
    assert padded > 0


def test_the_least_important_block_loses_most_and_an_unshrunk_folder_is_reported(tmp_path: Path) -> None:
    settings = SETTINGS | {"remove": "channels=0.33", "allocation": "error", "save_model": tmp_path / "small"}
    report = coprune.prune(damped(), **settings).report
    assert "; the folder is as large as before, padded with zeros" in report.edits[0].line()
    assert report.left is not None
    assert report.left + report.padding == report.model.parameters
    assert "an ordinary model, in part zeros" in (tmp_path / "small" / "README.md").read_text()
    first, *others = (counts[0] for _, counts in real_counts(tmp_path / "small"))
    assert first == 16
    assert min(others) > 64


def training_of(home: Path, out: str) -> dict[str, Any]:
    words = str(home / "words.txt")
    what = {
        "remove": "channels=0.33,heads=0.5",
        "align": 16,
        "allocation": "error",
        "nsamples": 4,
        "seqlen": 16,
    }
    places = {"save": str(home / out / "run"), "save_model": str(home / out / "small")}
    return what | places | {"model": str(home / "llama"), "dataset": words, "evaluate": False}


def run(home: Path, out: str) -> Result:
    return run_recipe(make_recipe(training_of(home, out)), reporter=Reporter(quiet=True))


def interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt


def without_card(folder: Path) -> dict[str, Any]:
    found = listing(folder)
    assert found.pop("README.md") is not None  # contains folder names
    return found


def test_a_streamed_model_is_cut_to_the_same_bytes(tmp_path: Path) -> None:
    save_pico(tmp_path / "llama")
    write_words(tmp_path / "words.txt")
    for out, stream in (("whole", False), ("streamed", True)):
        settings = training_of(tmp_path, out) | {"allocation": "error:tokens=0", "remove": "channels=0.33"}
        run_recipe(make_recipe(settings | {"stream": stream}), reporter=Reporter(quiet=True))
    assert_same_tensors(*(tensors_of(tmp_path / out / "small") for out in ("streamed", "whole")))


def go_whole_and_stop(go: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run once completely, and once up to the first finished block."""
    go("whole")
    with monkeypatch.context() as patched:
        patched.setattr(context.Run, "finish_block", interrupt)
        with pytest.raises(KeyboardInterrupt):
            go("stopped")


@pytest.mark.slow
def test_a_resumed_removal_keeps_the_choices_already_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pico(tmp_path / "llama")
    write_words(tmp_path / "words.txt")

    def go(out: str) -> None:
        asked = training_of(tmp_path, out) | {"allocation": "error:tokens=0", "remove": "channels=0.33,blocks=0.34"}
        asked |= {"score": "kl:tokens=64"}
        run_recipe(make_recipe(asked), reporter=Reporter(quiet=True))

    go_whole_and_stop(go, monkeypatch)
    with monkeypatch.context() as patched:
        for module, name in ((removal_plan, "blocks_that_go"), (removal_stage, "_measured")):
            patched.setattr(module, name, interrupt)
        go("stopped")
    with monkeypatch.context() as patched:
        patched.setattr(removal_stage, "_measured", interrupt)
        with pytest.raises(KeyboardInterrupt):
            go("early")
    with monkeypatch.context() as patched:
        patched.setattr(removal_plan, "blocks_that_go", interrupt)
        go("early")
    assert without_card(tmp_path / "early" / "small") == without_card(tmp_path / "whole" / "small")
    assert without_card(tmp_path / "stopped" / "small") == without_card(tmp_path / "whole" / "small")


@pytest.mark.slow
def test_heads_shared_by_blocks_are_equal_and_chosen_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of cross-attention may differ between blocks."""
    source = save_pair_model(tmp_path / "T5", "T5", num_heads=8, d_kv=4)
    write_words(tmp_path / "words.txt")

    def go(out: str) -> None:
        asked = training_of(tmp_path, out) | {
            "model": str(source),
            "remove": "heads=0.5",
            "allocation": "error:tokens=0",
        }
        run_recipe(make_recipe(asked), reporter=Reporter(quiet=True))

    go_whole_and_stop(go, monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(removal_stage, "choose_shared", interrupt)
        go("stopped")
    assert without_card(tmp_path / "stopped" / "small") == without_card(tmp_path / "whole" / "small")
    edits = Edits.read(tmp_path / "whole" / "small").by_block
    own = {name: [edit for edit in of_block if isinstance(edit, PadUnits)] for name, of_block in edits.items()}
    for half, counts in (("encoder", [1, 1]), ("decoder", [2, 2, 2])):
        pads = [found for name, found in own.items() if name.startswith(half)]
        assert [len(found) for found in pads] == counts  # self-attention, cross-attention
        assert all(found[0].real == pads[0][0].real for found in pads)
    assert len({str(found[1].real) for name, found in own.items() if name.startswith("decoder")}) > 1


@pytest.mark.slow
def test_a_cut_scored_in_memory_does_not_resume_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pico(tmp_path / "llama")
    write_words(tmp_path / "words.txt")
    asked = training_of(tmp_path, "stopped") | {"allocation": "error", "remove": "channels=0.33"}
    with monkeypatch.context() as patched:
        patched.setattr(run_stages, "build_report", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(make_recipe(asked), reporter=Reporter(quiet=True))
    with pytest.raises(BadInput, match="what blocks are weighed by was 'logits' and is 'hidden states'"):
        run_recipe(make_recipe(asked | {"stream": True}), reporter=Reporter(quiet=True))
    run_recipe(make_recipe(asked), reporter=Reporter(quiet=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"remove": "channels=0.3", "allocation": "owl"}, "uniform, error, not by owl"),
        ({"remove": "blocks=0.34", "allocation": "error"}, "none are removed"),
        ({"remove": "experts=0.3", "allocation": "error"}, "none are removed"),
        ({"remove": "channels=0.3", "allocation": "error:tokens=-3"}, "must not be negative"),
        ({"remove": "channels=0.3", "allocation": "error:tries=3"}, "unknown option of allocation 'error'"),
        ({"remove": "channels=0.3", "allocation": "luck"}, "not by luck"),
    ],
)
def test_invalid_uneven_budgets_are_refused_before_anything_starts(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        coprune.prune(pico_model("llama"), **SETTINGS, **settings)
