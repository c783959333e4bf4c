"""A tuned or merged model gets its name last, after verification, and never with NaN."""

from __future__ import annotations

import errno
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from coprune.base.errors import CopruneError, NumericalError, VerificationError
from coprune.base.progress import Reporter
from coprune.recipe.views import training_recipe
from coprune.training.adapter_merge import merge
from coprune.training.finetuning import run_finetuning
from coprune.training.saving import bring_to
from support.pruned import pruned_model, save, settings_for, write_text

QUIET = Reporter(quiet=True)
WEIGHTS = "adapter_model.safetensors"


class Killed(BaseException):
    """A stand-in for SIGKILL, which nothing in coprune catches."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a pruned model, a text, and a finished training with its adapter."""
    folder = tmp_path_factory.mktemp("models")
    save(pruned_model(num_hidden_layers=1), folder / "llama")
    write_text(folder / "text.txt", 700)
    tune(folder, folder / "run")
    return folder


def tune(home: Path, folder: Path, **changes: Any) -> Any:
    settings = settings_for(folder, home / "llama", home / "text.txt", max_steps=2, **changes)
    return run_finetuning(training_recipe(settings), QUIET)


def refuse(*_: Any) -> None:
    raise VerificationError("the logits differ")


def test_half_precision_keeps_rotary_frequencies_in_float32() -> None:
    model = pruned_model(tie_word_embeddings=True)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    bring_to(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_model_that_fails_its_verification_gets_no_name(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("coprune.training.saving.verify_saved", refuse)
        for _ in range(2):  # nor is it reused as finished
            with pytest.raises(VerificationError):
                tune(home, tmp_path / "run")
            assert not (tmp_path / "run" / "model").exists()
            assert not (tmp_path / "run" / "finetune.json").exists()
        with pytest.raises(VerificationError):
            merge(home / "llama", home / "run" / "adapter", tmp_path / "merged", quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert tune(home, tmp_path / "run").saved_model == tmp_path / "run" / "model"


def test_adapters_that_are_not_finite_leave_nothing(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "run" / "adapter", tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, tmp_path / "adapter" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(NumericalError, match="not finite"):
        merge(home / "llama", tmp_path / "adapter", tmp_path / "merged", quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_an_announced_training_without_its_model_is_resumed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's folder existed, empty, when the training was killed between announcing and renaming."""
    (tmp_path / "model").mkdir()

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("coprune.training.finetuning.save_model", killed)
        with pytest.raises(Killed):
            tune(home, tmp_path / "run", save_model=tmp_path / "model")
    assert (tmp_path / "run" / ".finetune.json").is_file()
    assert tune(home, tmp_path / "run", save_model=tmp_path / "model").saved_model == tmp_path / "model"
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("most", [3_000, 40_000], ids=["in the first file", "in a later one"])
def test_a_full_disk_is_one_message_and_loses_nothing(home: Path, tmp_path: Path, most: int) -> None:
    """A limit on file sizes simulates the full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        with pytest.raises(CopruneError, match="could not be written") as caught:
            tune(home, tmp_path / "run", save_every=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "model").exists()
    assert tune(home, tmp_path / "run", save_every=1).saved_model == tmp_path / "run" / "model"


@pytest.mark.parametrize("at", ["trainer.save", "torch.save", "save_model"])
def test_any_full_disk_is_one_message(at: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: dict[str, Exception] = {
        "trainer.save": OSError(errno.ENOSPC, "No space left on device"),
        "torch.save": RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598"),
        "save_model": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    }

    def full(*_: Any, **__: Any) -> None:
        raise errors[at]

    places = {
        "trainer.save": "transformers.Trainer._save_checkpoint",
        "torch.save": "transformers.Trainer._save_optimizer_and_scheduler",
        "save_model": "coprune.model.checkpoint.writer.save_file",
    }
    with monkeypatch.context() as patch:
        patch.setattr(places[at], full)
        with pytest.raises(CopruneError, match="could not be written"):
            tune(home, tmp_path / "run", save_every=1)
    assert not (tmp_path / "run" / "model").exists()
