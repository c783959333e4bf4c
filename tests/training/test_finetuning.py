"""Whole trainings of a tiny model: every mode keeps every zero, resumes bit for bit, and refuses unsupported settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import coprune
from coprune.base.errors import BadInput, BrokenMask, NumericalError
from coprune.base.progress import Reporter
from coprune.model.checkpoint.companions import Companions
from coprune.recipe.pattern import NM
from coprune.recipe.recipe import Recipe, make_recipe
from coprune.recipe.views import training_recipe
from coprune.runner.run_recipe import run_recipe
from coprune.training.adapter_merge import merge
from coprune.training.adapters import load_adapter
from coprune.training.finetuning import run_finetuning
from coprune.training.keep_zeros import hold_zeros
from coprune.training.masks import find_masks, plain_parameters
from coprune.training.saving import save_model
from coprune.training.trainer import ZeroKeepingTrainer
from support.pico import pico_model, pico_tokens
from support.pruned import StoppedAt, pruned_model, save, settings_for, write_text, zeros_of
from support.together import together
from support.torchrun import run_together, torchrun

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save(pruned_model(num_hidden_layers=2), folder / "llama")
    save(pruned_model("gpt2", n_layer=2), folder / "gpt2")
    save(pruned_model("mixtral", num_hidden_layers=2), folder / "mixtral")
    save(pico_model("llama", vocab_size=1002, num_hidden_layers=2), folder / "dense")
    write_text(folder / "text.txt", 700)
    return folder


def run(home: Path, folder: Path, family: str = "llama", reporter: Reporter = QUIET, **changes: Any) -> Any:
    return run_finetuning(training_recipe(settings_for(folder, home / family, home / "text.txt", **changes)), reporter)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


MODES = [
    ("lora", {}),
    ("dense", {}),
    ("distill", {}),
    ("lora-distill", {"dtype": "bfloat16"}),
    ("distill", {"dtype": "bfloat16", "gradient_checkpointing": True}),
]


@pytest.mark.parametrize(("mode", "more"), MODES)
def test_every_mode_keeps_every_zero(home: Path, tmp_path: Path, mode: str, more: dict[str, Any]) -> None:
    more = {**more, "teacher": str(home / "dense")} if "distill" in mode else more
    report = run(home, tmp_path / "run", mode=mode, max_steps=3, **more)
    assert report.sparsity_after == report.sparsity_before
    assert len(report.curve) == report.steps == 3
    before = AutoModelForCausalLM.from_pretrained(home / "llama")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    zeros = zeros_of(after)
    for name, zero in zeros_of(before).items():
        if float(zero.float().mean()) > 0.05:
            assert torch.equal(zero, zeros[name])
    for matrix in find_masks(after).matrices:
        if matrix.pattern == NM(2, 4):
            kept = (matrix.matrix.read() != 0).reshape(matrix.matrix.shape[0], -1, 4).sum(dim=2)
            assert bool((kept == 2).all())
    assert find_masks(after).patterns == report.patterns == {"unstructured": 7, "2:4": 7}
    assert not torch.equal(before.model.layers[0].mlp.up_proj.weight, after.model.layers[0].mlp.up_proj.weight)
    assert not (tmp_path / "run" / "training").exists()


def test_the_final_measurements_are_of_the_saved_model(home: Path, tmp_path: Path) -> None:
    half = pruned_model(num_hidden_layers=1).bfloat16()
    save(half, tmp_path / "half")
    text = str(home / "text.txt")
    settings = settings_for(tmp_path / "run", tmp_path / "half", home / "text.txt", mode="dense", max_steps=6)
    report = run_finetuning(training_recipe({**settings, "evaluate": True, "eval_data": text}), QUIET)
    (change,) = report.perplexity
    told = coprune.evaluate(tmp_path / "run" / "model", text, seqlen=change.seqlen, dtype="float32", quiet=True)
    assert told.perplexity[0].value == pytest.approx(change.after, rel=1e-9)
    assert change.after < change.before


def test_training_lowers_the_loss_and_the_report_shows_it(home: Path, tmp_path: Path) -> None:
    report = run(
        home,
        tmp_path / "run",
        mode="dense",
        max_steps=10,
        evaluate=True,
        eval_data=str(home / "text.txt"),
        held_out=0.1,
    )
    (change,) = report.perplexity
    assert change.after < 0.8 * change.before
    assert [point.step for point in report.held_out] == [2, 4, 6, 8, 10]
    assert report.held_out[-1].loss < report.held_out[0].loss
    stored = json.loads((tmp_path / "run" / "finetune.json").read_text())
    assert [point["loss"] for point in stored["curve"]] == [point.loss for point in report.curve]
    assert stored["curve"][0]["learning_rate"] < stored["curve"][1]["learning_rate"]
    assert "2:4" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_lora_leaves_an_adapter_that_merges_to_the_saved_model(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "run", mode="lora")
    merge(str(home / "llama"), tmp_path / "run" / "adapter", tmp_path / "merged", quiet=True)
    saved, merged = weights_of(tmp_path / "run" / "model"), weights_of(tmp_path / "merged")
    assert saved.keys() == merged.keys()
    assert all(torch.equal(saved[name], merged[name]) for name in saved)
    pruned = AutoModelForCausalLM.from_pretrained(home / "llama")
    unmerged = load_adapter(pruned, find_masks(pruned), tmp_path / "run" / "adapter").eval()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = unmerged(input_ids=tokens).logits
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=tokens).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_plain_adapters_stay_unmerged(home: Path, tmp_path: Path) -> None:
    report = run(home, tmp_path / "run", mode="lora", masked=False)
    assert report.saved_model is None
    assert not (tmp_path / "run" / "model").exists()
    assert "dense again" in (tmp_path / "run" / "adapter" / "README.md").read_text()
    with pytest.raises(BadInput, match=r"plain one.*nonzero"):
        merge(str(home / "llama"), tmp_path / "run" / "adapter", tmp_path / "merged", quiet=True)


def test_only_selected_matrices_are_trained(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "run", mode="dense", train=("*.v_proj",))
    before, after = weights_of(home / "llama"), weights_of(tmp_path / "run" / "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "v_proj" in name}


@pytest.mark.parametrize(("family", "mode"), [("gpt2", "dense"), ("llama", "lora")])
def test_a_resumed_training_equals_the_uninterrupted_one_bit_for_bit(
    home: Path, tmp_path: Path, family: str, mode: str
) -> None:
    more: dict[str, Any] = {
        "mode": mode,
        "save_every": 2,
        "max_steps": 5,
        "held_out": 0.1,
    }
    whole = run(home, tmp_path / "whole", family, **more)
    with pytest.raises(KeyboardInterrupt):
        run(home, tmp_path / "cut", family, StoppedAt(0.6), **more)
    assert (tmp_path / "cut" / "training" / "checkpoint-2").is_dir()
    with pytest.raises(BadInput, match=r"learning_rate was 0.01 and is 0.5"):
        run(home, tmp_path / "cut", family, **more, learning_rate=0.5)
    resumed = run(home, tmp_path / "cut", family, **more)
    assert [point.loss for point in resumed.curve] == [point.loss for point in whole.curve]
    assert [point.loss for point in resumed.held_out] == [point.loss for point in whole.held_out]
    one, other = weights_of(tmp_path / "whole" / "model"), weights_of(tmp_path / "cut" / "model")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_an_interrupted_run_does_not_resume_from_other_weights(home: Path, tmp_path: Path, name: str) -> None:
    """A single changed weight is enough: the last kept one of a matrix, or one of an unpruned norm."""
    model = AutoModelForCausalLM.from_pretrained(home / "llama")
    save(model, tmp_path / "mine")
    settings = settings_for(tmp_path / "run", tmp_path / "mine", home / "text.txt", save_every=2, max_steps=5)
    with pytest.raises(KeyboardInterrupt):
        run_finetuning(training_recipe(settings), StoppedAt(0.6))
    with torch.no_grad():
        flat = model.get_parameter(name).reshape(-1)
        flat[flat.nonzero()[-1]] *= 1.5
    model.save_pretrained(tmp_path / "mine")
    with pytest.raises(BadInput, match="belongs to an unfinished run in which weights was"):
        run_finetuning(training_recipe(settings), QUIET)


@pytest.mark.parametrize("mode", ["lora", "dense"])
def test_a_run_killed_after_its_model_was_saved_is_finished_by_the_same_command(
    home: Path, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("coprune.training.finetuning.finish_run_folder", killed)
        with pytest.raises(KeyboardInterrupt):
            run(home, tmp_path / "run", mode=mode, max_steps=2)
    weights = weights_of(tmp_path / "run" / "model")
    report = run(home, tmp_path / "run", mode=mode, max_steps=2)
    assert report.steps == 2
    assert (tmp_path / "run" / "finetune.json").is_file()
    assert not (tmp_path / "run" / "training").exists()
    assert all(torch.equal(weights[name], tensor) for name, tensor in weights_of(tmp_path / "run" / "model").items())


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (128, 1), (129, 2), (640, 5)])
def test_a_number_of_tokens_sets_the_number_of_steps(home: Path, tmp_path: Path, tokens: int, steps: int) -> None:
    more: dict[str, Any] = {"tokens": tokens, "max_steps": None, "seqlen": 16, "batch_size": 2, "accumulate": 4}
    assert run(home, tmp_path / "run", mode="dense", **more).steps == steps


def test_two_processes_follow_the_same_curve_as_one(home: Path, tmp_path: Path, one_thread: None) -> None:
    alone = run(home, tmp_path / "one", mode="dense", batch_size=2, accumulate=2)
    shared = dict(mode="dense", accumulate=2, batch_size=1)
    settings = settings_for(tmp_path / "two", home / "llama", home / "text.txt", **shared)
    together(2, lambda: run_finetuning(training_recipe(settings), QUIET))
    both = json.loads((tmp_path / "two" / "finetune.json").read_text())
    assert both["processes"] == 2
    assert [p["loss"] for p in both["curve"]] == pytest.approx([p.loss for p in alone.curve], abs=1e-4)
    assert both["sparsity_after"] == alone.sparsity_before


def test_sharded_parameters_have_their_masks_sharded_alike(home: Path, one_thread: None) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def train() -> None:
        distributed.init_process_group("gloo")
        model = AutoModelForCausalLM.from_pretrained(home / "llama")
        masks = find_masks(model)
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        hold_zeros(model, optimizer, masks)
        for step in range(2):
            seed = 2 * step + distributed.get_rank()
            tokens = torch.randint(1002, (2, 16), generator=torch.Generator().manual_seed(seed))
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        masks.verify(plain_parameters(model))
        parameters = dict(model.named_parameters())
        for name, pruned in masks.pruned.items():
            moment = optimizer.state[parameters[name]]["exp_avg"].full_tensor()
            assert bool(moment.any())
            assert not bool(moment[pruned].any())
        distributed.destroy_process_group()

    together(2, train)


def test_a_dense_model_or_a_bad_rank_or_a_finished_run_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="prune it first"):
        run(home, tmp_path / "run", "dense")
    with pytest.raises(BadInput, match="rank 65 is above the width"):
        run(home, tmp_path / "run", rank=65)
    with pytest.raises(BadInput, match="too short"):
        run(home, tmp_path / "run", seqlen=128, dataset=str(short(tmp_path)))
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "finetune.json").write_text("{}")
    with pytest.raises(BadInput, match="finished run"):
        run(home, tmp_path / "run")


def short(folder: Path) -> Path:
    return write_text(folder / "short.txt", 200)


def test_a_model_is_pruned_and_fine_tuned_in_one_run(home: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model": str(home / "dense"),
        "dataset": str(home / "text.txt"),
        "pattern": "2:4",
        "seqlen": 16,
        "nsamples": 4,
        "device": "cpu",
        "evaluate": False,
        "save": tmp_path / "run",
        "save_model": tmp_path / "model",
        "finetune": "lora",
    }
    with pytest.raises(KeyboardInterrupt):
        run_recipe(make_recipe(settings), reporter=StoppedAt(0.5))
    assert (tmp_path / "run" / "prune" / "report.json").is_file()
    run_recipe(make_recipe(settings), reporter=QUIET)
    pruned = zeros_of(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "prune" / "model"))
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert find_masks(tuned).patterns == {"2:4": 14}
    assert all(torch.equal(zero, zeros_of(tuned)[name]) for name, zero in pruned.items())
    assert Recipe.from_yaml(tmp_path / "run" / "recipe.yaml").train.mode == "lora"
    with pytest.raises(BadInput, match="finished run"):
        run_recipe(make_recipe(settings), reporter=QUIET)


@pytest.mark.slow
def test_two_processes_prune_and_fine_tune_in_one_run(home: Path, tmp_path: Path) -> None:
    options = ["--dataset", str(home / "text.txt"), "--pattern", "2:4", "--seqlen", "16", "--nsamples", "4"]
    options += ["--device", "cpu", "--no-eval", "--save", str(tmp_path / "run"), "--finetune", "dense"]
    run_together(torchrun(2, "-m", "coprune", "prune", str(home / "dense"), *options, "--finetune-minutes", "0.01"))
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "train" / "model")
    assert find_masks(tuned).patterns == {"2:4": 14}
    assert json.loads((tmp_path / "run" / "train" / "finetune.json").read_text())["processes"] == 2


def test_a_teacher_with_another_vocabulary_is_refused(home: Path, tmp_path: Path) -> None:
    save(pico_model("llama", vocab_size=900), tmp_path / "other")
    with pytest.raises(BadInput, match="vocabulary of 900"):
        run(home, tmp_path / "run", mode="distill", teacher=str(tmp_path / "other"))


def test_nothing_is_saved_once_a_zero_is_lost(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned_model()
    masks = find_masks(model)
    matrix = masks.matrices[4].matrix
    matrix.stored()[tuple((matrix.stored() == 0).nonzero()[0].tolist())] = 0.5
    with pytest.raises(BrokenMask, match=matrix.name):
        save_model(model, masks, Companions(None, "float32"), "card", tmp_path / "model", pico_tokens(1, 8))
    assert not any(tmp_path.iterdir())
    # Nor is a training state saved, if weights were changed outside the optimiser.
    step = ZeroKeepingTrainer.training_step

    def careless(self: ZeroKeepingTrainer, model: Any, *args: Any) -> Any:
        loss = step(self, model, *args)
        model.model.layers[0].mlp.up_proj.weight.data.add_(0.1)
        return loss

    monkeypatch.setattr(ZeroKeepingTrainer, "training_step", careless)
    monkeypatch.setattr("coprune.training.trainer.hold_zeros", lambda *_: None)
    with pytest.raises(BrokenMask, match="not zero any more"):
        run(home, tmp_path / "run", mode="dense", save_every=1)
    assert not list((tmp_path / "run" / "training").glob("checkpoint-*/model.safetensors"))


def test_a_loss_that_is_not_finite_ends_a_training(home: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match="not finite"):
        run(home, tmp_path / "run", mode="dense", learning_rate=1e30)
