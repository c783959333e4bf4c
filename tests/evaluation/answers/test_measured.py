"""`coprune eval --generate` and `coprune compare --generate` against direct computation on pico checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import coprune
from coprune.evaluation import measured_model
from coprune.evaluation.answers import answer_generation
from coprune.evaluation.answers.answer_generation import answers_key
from coprune.evaluation.answers.answer_records import (
    Answers,
    Figures,
    find_loop,
)
from coprune.evaluation.answers.questions import plan_of
from coprune.recipe.views import measuring_recipe
from support.commands import run_command
from support.pico_folder import save_pico

PROMPTS = [[5, 6, 7], [9, 8], [200, 3, 4, 17, 20]]
NEW = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a dense model, another model, and prompts of three lengths."""
    folder = tmp_path_factory.mktemp("models")
    save_pico(folder / "dense")
    model = AutoModelForCausalLM.from_pretrained(save_pico(folder / "pruned"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.ndim == 2:
                parameter[parameter.abs() < parameter.abs().flatten().quantile(0.6)] = 0
    model.save_pretrained(folder / "pruned")
    lines = [json.dumps({"prompt": " ".join(f"w{token}" for token in prompt)}) for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def asked(place: Path, **more: Any) -> dict[str, Any]:
    return {"generate": place / "prompts.jsonl", "generate_tokens": NEW, "quiet": True, **more}


def test_answers_are_shared_whether_the_device_is_named_or_automatic(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = asked(place, generate_temperature=0)
    del few["quiet"]
    part = measuring_recipe(str(place / "dense"), few).model
    plan = plan_of(measuring_recipe(str(place / "dense"), few).evaluate.answers, saves=False)
    assert plan is not None
    monkeypatch.setattr("coprune.model.loaded_model.default_device", lambda: torch.device("cpu"))
    found, named = (answers_key("model", part.model_copy(update={"device": name}), plan) for name in ("auto", "cpu"))
    assert found == named


def greedy(folder: Path) -> list[list[int]]:
    """Return transformers' own greedy answers, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        mask = torch.ones_like(tokens)
        whole = model.generate(tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        found.append(whole[0, len(prompt) :].tolist())
    return found


def words(tokens: list[int]) -> str:
    """Return the text without its end token."""
    tokens = tokens[:-1] if tokens[-1] == 2 else tokens
    return " ".join(f"w{token}" for token in tokens)


def test_figures_are_those_of_direct_computation(place: Path) -> None:
    facts = coprune.evaluate(place / "pruned", against=place / "dense", **asked(place)).answers
    assert facts is not None
    dense, pruned = greedy(place / "dense"), greedy(place / "pruned")
    assert [sample.dense for sample in facts.samples] == [words(tokens) for tokens in dense]
    assert [sample.answer for sample in facts.samples] == [words(tokens) for tokens in pruned]
    found = facts.greedy.figures
    ends = [tokens[-1] == 2 for tokens in pruned]
    assert (found.answers, found.ended) == (3, sum(ends))
    assert found.loops == sum(find_loop(tokens, end) is not None for tokens, end in zip(pruned, ends, strict=True))
    assert found.tokens == pytest.approx(sum(map(len, pruned)) / 3)
    models = [AutoModelForCausalLM.from_pretrained(place / name) for name in ("dense", "pruned")]
    means, accepted = [], []
    for prompt, answer in zip(PROMPTS, dense, strict=True):
        with torch.no_grad():
            logits = [model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1) for model in models]
        rows = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        means.append(sum(float((logits[0][i].exp() * (logits[0][i] - logits[1][i])).sum()) for i in rows) / len(answer))
        accepted.append(sum(float(torch.minimum(*(one[i].exp() for one in logits)).sum()) for i in rows) / len(answer))
    assert facts.along.kl == pytest.approx(sum(means) / 3, rel=1e-4)
    assert facts.along.acceptance == pytest.approx(sum(accepted) / 3, rel=1e-4)
    assert facts.along.acceptance_interval is not None
    low, high = facts.along.acceptance_interval
    assert low <= facts.along.acceptance <= high < 1


def test_a_model_compared_with_itself_shows_no_difference(place: Path) -> None:
    same = coprune.evaluate(place / "dense", against=place / "dense", **asked(place)).answers
    assert same.along.kl == pytest.approx(0, abs=1e-6)
    assert same.along.acceptance == pytest.approx(1)
    assert same.greedy.figures == same.greedy.dense
    assert same.sampled.figures == same.sampled.dense


def test_a_comparison_generates_each_answer_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times: list[int] = []

    def counted(*arguments: Any) -> Answers:
        times.append(1)
        return answer_generation.ask(*arguments)

    monkeypatch.setattr(measured_model, "ask", counted)
    command = ["compare", str(place / "dense"), str(place / "pruned"), "--generate", str(place / "prompts.jsonl")]
    command += [
        "--generate-tokens",
        str(NEW),
        "--csv",
        str(tmp_path / "table.csv"),
        "--json",
        str(tmp_path / "all.json"),
    ]
    first = run_command(command, monkeypatch, capsys)
    assert first.code == 0, first.err
    tables = [(tmp_path / "table.csv").read_text()]
    assert len(times) == 2
    assert run_command(command, monkeypatch, capsys).code == 0
    tables.append((tmp_path / "table.csv").read_text())
    # A later evaluation reuses the answers, too.
    facts = coprune.evaluate(place / "pruned", against=place / "dense", **asked(place)).answers
    assert len(times) == 3
    assert tables[0] == tables[1]
    assert "answers that loop, greedy" in tables[0]
    baseline, row = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert baseline["evaluation"]["answers"]["greedy"]["dense"] is None
    found = row["evaluation"]["answers"]
    assert found["along"]["kl"] == facts.along.kl
    assert Figures.model_validate(found["greedy"]["dense"]) == facts.greedy.dense


def test_the_command_shows_figures_and_answers(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "eval",
        str(place / "pruned"),
        "--generate",
        str(place / "prompts.jsonl"),
        "--generate-tokens",
        "8",
        "-q",
    ]
    ended = run_command([*command, "--generate-prompts", "2", "--against", str(place / "dense")], monkeypatch, capsys)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0].startswith(
        "answers   none of 2 answers loops or is empty; dense 0 (greedy, at most 8 tokens, prompts: prompts.jsonl"
    )
    assert [line.split()[0] for line in lines[1:]] == [
        "greedy",
        "KL",
        "acceptance",
        "T",
        *("prompt", "dense", "answer") * 2,
        "next",
    ]
    assert "perplexity" not in ended.out


def test_requirements_are_judged_in_python_and_by_commands(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = asked(place, generate_tokens=2, generate_temperature=0)
    holds, fails = "tokens<=2,kl<1e3", "kl>1e3"
    for require, expected in ((holds, [True, True]), (fails, [False])):
        found = coprune.evaluate(place / "pruned", against=place / "dense", require=require, **few)
        assert [one.holds for one in found.required] == expected
    words = ["--generate", str(place / "prompts.jsonl"), "--generate-tokens", "2", "--generate-temperature", "0", "-q"]
    models = ["eval", str(place / "pruned"), "--against", str(place / "dense")], ["compare", str(place / "dense")]
    for command in (models[0], [*models[1], str(place / "pruned")]):
        for require, code in ((holds, 0), (fails, 3)):
            ended = run_command([*command, *words, "--require", require], monkeypatch, capsys)
            assert ended.code == code, ended.err
            assert ("does not hold" in ended.out) == (code == 3)
    with pytest.raises(coprune.BadInput, match="kl<1 is about the dense model's answers; name that model with against"):
        coprune.evaluate(place / "pruned", require="kl<1", **few)
