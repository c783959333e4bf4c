"""Removing experts from a streamed model, or with several processes, gives the same result as in memory with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coprune.base.errors import VerificationError
from coprune.base.progress import Reporter
from coprune.model.verification import verify_saved
from coprune.recipe.recipe import make_recipe
from coprune.runner.run_recipe import run_recipe
from coprune.stages import run_stages
from support.killing import count_lines, killed_at
from support.measured_peaks import measured_peaks
from support.pico_folder import listing, save_pico, write_words
from support.saved import load_clean
from support.torchrun import run_together, torchrun


def training_of(folder: Path, out: str, **changes: Any) -> dict[str, Any]:
    places = {"save": str(folder / out / "run"), "save_model": str(folder / out / "small")}
    data = {"model": str(folder / "model"), "dataset": str(folder / "words.txt"), "evaluate": False}
    return data | places | {"align": 16, "nsamples": 4, "seqlen": 16} | changes


def run(folder: Path, out: str, **changes: Any) -> dict[str, bytes | None]:
    """Execute a run and return its model's files except those with folder names."""
    run_recipe(make_recipe(training_of(folder, out, **changes)), reporter=Reporter(quiet=True))
    return without_places(folder / out / "small")


def without_places(folder: Path) -> dict[str, bytes | None]:
    found = listing(folder)
    for name in ("README.md", "tokenizer_config.json"):  # the latter is copied in one case and saved in the other
        found.pop(name)
    return found


@pytest.mark.parametrize(
    ("family", "changes", "remove"),
    [
        ("mixtral", {"tie_word_embeddings": True}, "experts=0.25,channels=0.4"),  # experts saved one by one
        pytest.param("deepseek_v3", {"n_routed_experts": 8}, "experts=0.25", marks=pytest.mark.slow),  # cuts a buffer
    ],
)
def test_streamed_removal_gives_the_bytes_of_memory(
    family: str, changes: dict[str, Any], remove: str, tmp_path: Path
) -> None:
    save_pico(tmp_path / "model", family, num_hidden_layers=2, **changes)
    write_words(tmp_path / "words.txt")
    whole = run(tmp_path, "whole", remove=remove, stream=False)
    assert run(tmp_path, "streamed", remove=remove, stream=True) == whole
    load_clean(tmp_path / "streamed" / "small")


def test_a_wrong_router_row_is_found_on_reloading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pico(tmp_path / "model", "mixtral", num_hidden_layers=1)
    write_words(tmp_path / "words.txt")

    def damage(folder: Path, *args: Any, **options: Any) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith("gate.weight"))
        tensors[name] = tensors[name].flip(0).contiguous()
        save_file(tensors, file, metadata={"format": "pt"})
        verify_saved(folder, *args, **options)

    monkeypatch.setattr(run_stages, "verify_saved", damage)
    with pytest.raises(VerificationError, match="differ from the pruned model's"):
        run(tmp_path, "damaged", remove="experts=0.25", stream=True)


def test_a_refused_run_does_not_block_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pico(tmp_path / "model", "mixtral", num_hidden_layers=1)
    write_words(tmp_path / "words.txt")

    def refuse(*args: Any, **options: Any) -> None:
        raise VerificationError("no")

    with monkeypatch.context() as refusing:
        refusing.setattr(run_stages, "verify_saved", refuse)
        with pytest.raises(VerificationError):
            run(tmp_path, "out", remove="experts=0.25", stream=True)
    assert (tmp_path / "out" / ".small.partial").is_dir()
    assert "model.safetensors" in run(tmp_path, "out", remove="experts=0.5", stream=True)


@pytest.mark.slow
def test_a_killed_streamed_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    save_pico(tmp_path / "model", "mixtral")
    write_words(tmp_path / "words.txt")
    asked: dict[str, Any] = {"remove": "experts=0.25,channels=0.4", "stream": True}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # forked children lose thread pools
    _, lines = count_lines(lambda: run(tmp_path, "whole", **asked), ("run/output",))
    assert killed_at(lambda: run(tmp_path, "killed", **asked), lines * 8 // 10, ("run/output",))
    assert run(tmp_path, "killed", **asked) == without_places(tmp_path / "whole" / "small")
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_two_processes_score_experts_like_one(tmp_path: Path) -> None:
    save_pico(tmp_path / "model", "mixtral")
    write_words(tmp_path / "words.txt")
    alone = run(tmp_path, "alone", remove="experts=0.25", stream=True)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in training_of(tmp_path, "both").items()]
    flags = [flag for flag in flags if "--evaluate" not in flag and "--model" not in flag]
    asked = ["--remove", "experts=0.25", "--stream", "--no-eval", "--quiet"]
    run_together(torchrun(2, "-m", "coprune", "prune", str(tmp_path / "model"), *flags, *asked))
    kept = [json.loads((tmp_path / out / "run" / "experts.json").read_text()) for out in ("alone", "both")]
    for block, sums in kept[0]["sums"]["calibration"].items():
        other = kept[1]["sums"]["calibration"][block]
        assert other["tokens"] == sums["tokens"]
        assert other["weighted"] == pytest.approx(sums["weighted"], rel=1e-6)
    both = listing(tmp_path / "both" / "small")
    assert {name: both[name] for name in alone} == alone


@pytest.mark.slow
def test_streamed_removal_takes_memory_independent_of_depth(tmp_path: Path) -> None:
    write_words(tmp_path / "words.txt")
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_local_experts": 32,
        "num_experts_per_tok": 2,
    }
    cases = {}
    for blocks in (4, 16):
        save_pico(tmp_path / str(blocks), "mixtral", num_hidden_layers=blocks, **sizes)
        cases[str(blocks)] = training_of(tmp_path, f"out{blocks}", remove="experts=0.25", stream=True) | {
            "model": str(tmp_path / str(blocks))
        }
    found = measured_peaks(cases)
    block = 32 * 3 * 128 * 512 * 4
    growth = found["16"].measured - found["4"].measured
    assert growth < 1.5 * block, {name: str(peak) for name, peak in found.items()}  # for twelve more blocks
