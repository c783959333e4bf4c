"""Whole runs on a tiny model: every mode keeps every zero, resumes bit for bit, and refuses what it cannot do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pruned import StoppedAt, pruned_model, save, settings_for, write_text, zeros_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from coprune.errors import BadInput, NumericalError
from coprune.finetune.adapters import load_adapter
from coprune.finetune.masks import BrokenMask, find_masks
from coprune.finetune.run import finetune, merge_saved
from coprune.finetune.saving import save_model
from coprune.finetune.settings import make_settings
from coprune.finetune.trainer import ZeroKeepingTrainer
from coprune.patterns import NM
from coprune.progress import Reporter
from pico import pico_model

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save(pruned_model(num_hidden_layers=2), folder / "llama")
    save(pruned_model("gpt2", n_layer=2), folder / "gpt2")
    save(pruned_model("mixtral", num_hidden_layers=2), folder / "mixtral")
    save(pico_model("llama", vocab_size=1002, num_hidden_layers=2), folder / "dense")
    write_text(folder / "text.txt", 700)
    return folder


def run(home, folder, family="llama", reporter=QUIET, **changes):
    return finetune(make_settings(settings_for(folder, home / family, home / "text.txt", **changes)), reporter)


def weights_of(folder: Path):
    return load_file(folder / "model.safetensors")


MODES = [
    ("lora", {}),
    ("dense", {}),
    ("distill", {"top_k": 9}),
    ("distill", {"text_weight": 0.5, "bf16": True, "gradient_checkpointing": True}),
]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor"])
@pytest.mark.parametrize(("mode", "more"), MODES)
def test_every_mode_keeps_every_zero(home, tmp_path, mode, more, optimizer):
    if optimizer != "adamw" and mode == "distill" and "bf16" in more:
        pytest.skip("one optimiser is enough in bfloat16")
    more = {**more, "teacher": str(home / "dense")} if mode == "distill" else more
    report = run(home, tmp_path / "run", mode=mode, optimizer=optimizer, weight_decay=0.1, max_steps=3, **more)
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


def test_training_teaches_and_the_report_tells(home, tmp_path):
    report = run(
        home,
        tmp_path / "run",
        mode="dense",
        max_steps=12,
        evaluate=True,
        eval_data=str(home / "text.txt"),
        evaluations=3,
        held_out=0.1,
    )
    (change,) = report.perplexity
    assert change.after < 0.8 * change.before
    assert [point.step for point in report.held_out] == [4, 8, 12]
    assert report.held_out[-1].loss < report.held_out[0].loss
    stored = json.loads((tmp_path / "run" / "finetune.json").read_text())
    assert [point["loss"] for point in stored["curve"]] == [point.loss for point in report.curve]
    assert stored["curve"][0]["learning_rate"] < stored["curve"][1]["learning_rate"]
    assert "2:4" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_lora_leaves_an_adapter_that_merges_to_the_saved_model(home, tmp_path):
    run(home, tmp_path / "run", mode="lora")
    merge_saved(str(home / "llama"), tmp_path / "run" / "adapter", tmp_path / "merged", QUIET)
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


def test_plain_adapters_stay_unmerged(home, tmp_path):
    report = run(home, tmp_path / "run", mode="lora", masked=False, dropout=0.1)
    assert report.saved_model is None
    assert not (tmp_path / "run" / "model").exists()
    assert "dense again" in (tmp_path / "run" / "adapter" / "README.md").read_text()
    with pytest.raises(BadInput, match=r"plain one.*nonzero"):
        merge_saved(str(home / "llama"), tmp_path / "run" / "adapter", tmp_path / "merged", QUIET)


def test_only_what_is_named_is_trained(home, tmp_path):
    run(home, tmp_path / "run", mode="dense", train=("*.v_proj",))
    before, after = weights_of(home / "llama"), weights_of(tmp_path / "run" / "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "v_proj" in name}


@pytest.mark.parametrize(("family", "mode"), [("gpt2", "dense"), ("mixtral", "dense"), ("llama", "lora")])
def test_interrupted_and_resumed_is_bit_for_bit_the_uninterrupted(home, tmp_path, family, mode):
    more = {"mode": mode, "save_every": 2, "max_steps": 5, "evaluations": 2, "held_out": 0.1, "weight_decay": 0.1}
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


def test_early_stop_keeps_the_best_state(home, tmp_path):
    more = {"mode": "dense", "learning_rate": 0.3, "max_steps": 20, "evaluations": 20, "held_out": 0.1, "patience": 3}
    report = run(home, tmp_path / "run", "mixtral", **more)
    losses = [point.loss for point in report.held_out]
    best = losses.index(min(losses))
    assert report.steps == best + 4 < 20
    # Training on to where the best state was gives the same weights again; the rate does not depend on how it ends.
    weights = weights_of(tmp_path / "run" / "model")
    changed = [n for n, w in weights_of(home / "mixtral").items() if not torch.equal(w, weights[n])]
    assert bool(changed) == (best >= 0)


def test_time_ends_a_training(home, tmp_path):
    report = run(home, tmp_path / "run", mode="lora", max_steps=None, minutes=0.02)
    assert report.steps >= 1
    assert report.curve[-1].seconds < 60


def test_two_processes_follow_the_same_curve_as_one(home, tmp_path):
    alone = run(home, tmp_path / "one", mode="dense", batch_size=2, accumulate=2, weight_decay=0.1)
    together = settings_for(
        tmp_path / "two", home / "llama", home / "text.txt", mode="dense", accumulate=2, weight_decay=0.1, batch_size=1
    )
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\n"
        "from coprune.finetune.run import finetune\n"
        "from coprune.finetune.settings import make_settings\n"
        "finetune(make_settings(json.loads(sys.argv[1])))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    subprocess.run(
        [*command, str(script), json.dumps(together, default=str)],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    both = json.loads((tmp_path / "two" / "finetune.json").read_text())
    assert both["processes"] == 2
    assert [p["loss"] for p in both["curve"]] == pytest.approx([p.loss for p in alone.curve], abs=1e-4)
    assert both["sparsity_after"] == alone.sparsity_before


def test_a_dense_model_or_a_bad_rank_or_a_finished_run_is_refused(home, tmp_path):
    with pytest.raises(BadInput, match="Prune it first"):
        run(home, tmp_path / "run", "dense")
    with pytest.raises(BadInput, match="rank 65 is above the width"):
        run(home, tmp_path / "run", rank=65)
    with pytest.raises(BadInput, match="too short"):
        run(home, tmp_path / "run", block_size=128, dataset=str(short(tmp_path)))
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "finetune.json").write_text("{}")
    with pytest.raises(BadInput, match="finished run"):
        run(home, tmp_path / "run")


def short(folder):
    return write_text(folder / "short.txt", 200)


def test_a_teacher_of_another_vocabulary_is_refused(home, tmp_path):
    save(pico_model("llama", vocab_size=900), tmp_path / "other")
    with pytest.raises(BadInput, match="vocabulary of 900"):
        run(home, tmp_path / "run", mode="distill", teacher=str(tmp_path / "other"))


def test_nothing_is_saved_once_a_zero_is_lost(home, tmp_path, monkeypatch):
    model = pruned_model()
    masks = find_masks(model)
    matrix = masks.matrices[4].matrix
    matrix.stored()[tuple((matrix.stored() == 0).nonzero()[0].tolist())] = 0.5
    with pytest.raises(BrokenMask, match=matrix.name):
        save_model(model, None, masks, torch.float32, tmp_path / "model", "card")
    assert not any(tmp_path.iterdir())
    # Neither is a state to resume from, if somebody's change of the weights escapes the optimiser.
    step = ZeroKeepingTrainer.training_step

    def careless(self, model, *args):
        loss = step(self, model, *args)
        model.model.layers[0].mlp.up_proj.weight.data.add_(0.1)
        return loss

    monkeypatch.setattr(ZeroKeepingTrainer, "training_step", careless)
    monkeypatch.setattr("coprune.finetune.trainer.hold_zeros", lambda *_: None)
    with pytest.raises(BrokenMask, match="not zero any more"):
        run(home, tmp_path / "run", mode="dense", save_every=1)
    assert not list((tmp_path / "run" / "training").glob("checkpoint-*/model.safetensors"))


def test_a_loss_that_is_not_finite_ends_a_training(home, tmp_path):
    with pytest.raises(NumericalError, match="not finite"):
        run(home, tmp_path / "run", mode="dense", optimizer="sgd", learning_rate=1e30, max_grad_norm=0)
