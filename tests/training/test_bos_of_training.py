"""Windows of training and its perplexity begin like those of pruning."""

from __future__ import annotations

from pathlib import Path

import pytest

import coprune
from coprune.base.progress import Reporter
from coprune.training.finetune_report import FinetuneReport
from coprune.training.session import prepare_session
from support.pico import pico_model
from support.pico_folder import pico_tokenizer, save, write_words


def test_fine_tuning_keeps_the_bos_choice_of_the_pruning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(pico_model("llama", num_hidden_layers=1), tmp_path / "dense")
    pico_tokenizer("put").save_pretrained(tmp_path / "dense")
    text = str(write_words(tmp_path / "text.txt", count=400))
    monkeypatch.setattr("coprune.evaluation.bos_choice.CLEARLY_BETTER", -10.0)
    result = coprune.prune(
        tmp_path / "dense",
        "wanda",
        dataset=text,
        eval_data=text,
        eval_tokens=96,
        nsamples=2,
        seqlen=24,
        finetune="dense",
        finetune_minutes=0.005,
        save=tmp_path / "run",
        quiet=True,
    )
    assert result.report.bos is not None
    assert result.report.bos.used == "every"
    tuned = FinetuneReport.model_validate_json((tmp_path / "run" / "train" / "finetune.json").read_text())
    assert tuned.settings.calibrate.bos == "every"
    (change,) = tuned.perplexity
    assert change.before == pytest.approx(result.report.perplexity[0].pruned, rel=1e-4)
    data = prepare_session(tuned.settings, Reporter(quiet=True)).data
    bos = pico_tokenizer("put").bos_token_id
    assert bool((data.train.tokens[:, 0] == bos).all())
    # All but the first, where the tokenizer added BOS, have one text token less.
    as_it_is = prepare_session(tuned.settings.replaced(bos="first"), Reporter(quiet=True)).data
    assert data.train.tokens[0].equal(as_it_is.train.tokens[0])
    assert data.train.tokens[1:, 1:].equal(as_it_is.train.tokens[1:, :-1])
    assert data.fingerprint != as_it_is.fingerprint
