"""The automatic choice of BOS: it is decided by the dense model, reported, and gives the same run as naming it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import coprune
from coprune.base.errors import BadInput
from coprune.evaluation.bos_choice import BosChoice, choose_bos, score_in_memory, score_of
from coprune.model.checkpoint.load import prepare
from coprune.model.walk.activations import Activations
from coprune.recipe.parts import AskedBos
from support.pico import pico_model, pico_tokens
from support.pico_folder import pico_tokenizer, save, write_words
from support.walking import prove

BOS = 1
SMALL: dict[str, Any] = dict(nsamples=3, seqlen=24, eval_tokens=120, quiet=True, pattern="2:4", prompt="")


def scores(without: float, with_bos: float, seen: list[Tensor]) -> Any:
    def score(windows: Sequence[Tensor]) -> list[Tensor]:
        seen.extend(windows)
        half = len(windows) // 2
        return [torch.tensor([math.log(value)]) for value in [without] * half + [with_bos] * half]

    return score


@pytest.mark.parametrize(
    ("without", "with_bos", "used"),
    [(60.0, 24.0, "every"), (10.0, 9.4, "every"), (10.0, 9.6, "first"), (9, 10, "first")],
)
def test_auto_bos_keeps_the_tokenizers_default_unless_another_is_clearly_better(
    without: float, with_bos: float, used: str
) -> None:
    seen: list[Tensor] = []
    choice = choose_bos("auto", pico_tokenizer("put"), pico_tokens(20, 512), scores(without, with_bos, seen))
    assert (choice.asked, choice.used, choice.windows) == ("auto", used, 4)
    assert choice.without == pytest.approx(without)
    assert choice.with_bos == pytest.approx(with_bos)
    plain, begun = seen[:4], seen[4:]
    assert all(torch.equal(one[:, 1:], other) for one, other in zip(begun, plain, strict=True))
    assert all(int(window[0, 0]) == BOS and window.shape == (1, 512) for window in begun)
    assert f"{with_bos:.2f} with it and {without:.2f} without" in str(choice.line())


@pytest.mark.parametrize("nll", [1e4, float("nan")])
def test_auto_bos_keeps_the_tokenizers_default_for_a_model_without_finite_losses(nll: float) -> None:
    def score(windows: Sequence[Tensor]) -> list[Tensor]:
        return [torch.tensor([nll], dtype=torch.float64) for _ in windows]

    choice = choose_bos("auto", pico_tokenizer("put"), pico_tokens(2, 16), score)
    assert choice.used == "first"
    assert BosChoice.model_validate_json(choice.model_dump_json()).used == "first"


def test_bos_is_not_tried_if_there_is_no_choice() -> None:
    def never(windows: Sequence[Tensor]) -> list[Tensor]:
        raise AssertionError

    begins, windows = pico_tokenizer("put"), pico_tokens(4, 16)
    assert choose_bos("auto", pico_tokenizer(), windows, never) == BosChoice(used="never")
    assert choose_bos("auto", None, windows, never) == BosChoice(used="as given")
    assert choose_bos("auto", begins, None, never) == BosChoice(used="first")
    assert choose_bos("every", begins, windows, never) == BosChoice(asked="every", used="every")
    assert BosChoice(used="never").line() is None
    assert BosChoice(asked="never", used="never").line() == "nowhere"
    with pytest.raises(BadInput, match="no token that begins a text"):
        choose_bos("every", pico_tokenizer(), windows, never)


def test_the_dense_model_reads_the_same_tokens_with_and_without_bos() -> None:
    model, windows = prepare(pico_model("llama")), pico_tokens(4, 16)
    marked = torch.cat([torch.full_like(windows[:, :1], BOS), windows], dim=1)
    parts = [*windows.split(1), *marked.split(1)]
    expected = []
    for part in parts:
        with torch.no_grad():
            logits = model(input_ids=part).logits[0, -16:-1]
        expected.append(float(functional.cross_entropy(logits, part[0, -15:])))
    proven = prove(model, windows[:1])
    found = score_in_memory(model)(parts)
    assert torch.cat(found).tolist() == pytest.approx(expected, rel=1e-5)
    object.__setattr__(proven.weights, "streams", True)
    assert torch.cat(score_of(proven, Activations())(parts)).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bos")
    save(pico_model("llama", num_hidden_layers=2), folder / "dense")
    pico_tokenizer("put").save_pretrained(folder / "dense")
    write_words(folder / "text.txt", count=400)
    write_words(folder / "test.txt", count=200, seed=1)
    return folder


def pruned(home: Path, bos: AskedBos, **more: Any) -> coprune.Result:
    texts: dict[str, Any] = {"dataset": str(home / "text.txt"), "eval_data": str(home / "test.txt")}
    return coprune.prune(home / "dense", "wanda", bos=bos, **texts, **{**SMALL, **more})


def figures(result: coprune.Result) -> Any:
    report = result.report
    assert report.calibration is not None
    (text,) = report.perplexity
    masks = [matrix.mask_checksum for matrix in report.matrices]
    return masks, report.calibration.fingerprint, text.fingerprint, text.dense, text.pruned


@pytest.mark.parametrize("stream", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_auto_bos_gives_the_same_run_as_naming_its_choice(
    home: Path, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: tuple[AskedBos, ...] = ("auto", "first", "every", "never")
    runs = {bos: pruned(home, bos, stream=stream) for bos in asked}
    # A random model is indifferent, so the tokenizer's default stays.
    assert runs["auto"].report.bos is not None
    assert runs["auto"].report.bos.used == "first"
    assert runs["auto"].report.bos.windows == 3
    assert figures(runs["auto"]) == figures(runs["first"])
    assert len({str(figures(runs[bos])) for bos in asked[1:]}) == 3
    monkeypatch.setattr("coprune.evaluation.bos_choice.CLEARLY_BETTER", -10.0)
    again = pruned(home, "auto", stream=stream)
    assert figures(again) == figures(runs["every"])
    assert again.report.bos is not None
    assert again.report.bos.used == "every"
    assert "BOS: at the start of every window (on 3 windows the dense model has perplexity" in " ".join(
        f"{name}: {value}" for name, value in again.report.sheet().rows
    )


def test_an_interrupted_run_resumes_with_the_chosen_bos(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    more = {"save": tmp_path / "run", "save_model": tmp_path / "model"}
    with monkeypatch.context() as patch:
        patch.setattr("coprune.stages.run_stages._save", killed)
        with pytest.raises(KeyboardInterrupt):
            pruned(home, "auto", **more)
    with pytest.raises(BadInput, match=r"calibration\.bos was 'first' and is 'every'|bos was 'first' and is 'every'"):
        pruned(home, "every", **more)
    pruned(home, "first", **more)
    assert (tmp_path / "model" / "config.json").is_file()


def test_eval_and_compare_place_bos_alike(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, text = home / "dense", str(home / "test.txt")
    every = coprune.evaluate(dense, text, seqlen=24, bos="every", quiet=True)
    model = pico_model("llama", num_hidden_layers=2)
    ids = pico_tokenizer()(Path(text).read_text(), verbose=False)["input_ids"]
    losses = []
    for start in range(0, 8 * 23, 23):
        window = torch.tensor([[BOS, *ids[start : start + 23]]])
        with torch.no_grad():
            losses.append(float(model(input_ids=window, labels=window).loss))
    (found,) = every.perplexity
    assert found.window_nll == pytest.approx(losses, rel=1e-5)
    assert every.bos == BosChoice(asked="every", used="every")
    monkeypatch.setattr("coprune.evaluation.bos_choice.CLEARLY_BETTER", -10.0)
    auto = coprune.evaluate(dense, text, seqlen=24, quiet=True)
    assert auto.perplexity == every.perplexity
    assert auto.bos is not None
    assert auto.bos.used == "every"
    # The baseline decides for all models.
    tried: list[str] = []

    def choose(asked: Any, *rest: Any) -> BosChoice:
        tried.append(asked)
        return choose_bos(asked, *rest)

    monkeypatch.setattr("coprune.evaluation.tasks.text_task.choose_bos", choose)
    against = coprune.evaluate(dense, text, against=dense, seqlen=24, quiet=True)
    assert against.closeness[0].kl == pytest.approx(0, abs=1e-6)
    compared = coprune.compare([dense, dense], text, seqlen=24, quiet=True)
    assert [row.evaluation.perplexity[0].value for row in compared.rows] == [found.value] * 2
    assert tried == ["auto"]  # the comparison found it in the cache
