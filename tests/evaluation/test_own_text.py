"""What the dense model writes to be calibrated on: seeded, once, and counted where that is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import coprune
from coprune.base.environment import kernel_cache
from coprune.data.local_text import rows_of
from coprune.evaluation import own_text
from support.commands import run_command
from support.pico import pico_model
from support.pico_folder import pico_tokenizer, save_pico, write_words


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COPRUNE_CACHE", str(kernel_cache()))  # nothing is compiled anew
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_words(Path("words.txt"))
    rows = [{"prompt": f"w{number} w{number + 1}"} for number in range(20, 26)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def prune(dataset: Any, **settings: Any) -> coprune.Result:
    return coprune.prune(
        pico_model("llama"),
        "sparsegpt",
        **dict(dataset=dataset, nsamples=6, seqlen=24, evaluate=False, quiet=True, processor=pico_tokenizer("known"))
        | settings,
    )


def test_own_text_in_a_mixture_is_generated_once_and_reported(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = "self=0.34,self:prompts.jsonl:temperature=0.5,length=8=0.33,words.txt=0.33"
    report = prune(data).report
    assert report.calibration is not None
    assert [part.nsamples for part in report.calibration.sources] == [2, 2, 2]
    assert report.calibration.counted is None
    assert {matrix.tokens for matrix in report.matrices} == {6 * 24}
    calls: list[int] = []
    monkeypatch.setattr(own_text, "generate", lambda *args: calls.append(1))
    again = prune(data).report
    assert again.calibration == report.calibration
    assert [m.mask_checksum for m in again.matrices] == [m.mask_checksum for m in report.matrices]
    assert not calls
    counted = prune(data, calibrate_on="generated").report
    assert counted.calibration is not None
    assert counted.calibration.counted is not None
    # Of two texts from BOS all but that; of answers of 8 tokens to prompts of two, most; of words all.
    assert 2 * 23 + 2 * 24 + 2 * 16 <= counted.calibration.counted < 6 * 24 - 2
    assert {matrix.tokens for matrix in counted.matrices} == {counted.calibration.counted}
    assert "Statistics are over" in counted.calibration.details()


def test_shares_are_given_from_python_as_a_mapping(place: Path) -> None:
    texts = [Path("words.txt").read_text()]
    report = prune({"self": 0.5, "mine": (texts, 0.5)}).report
    assert report.calibration is not None
    assert [part.nsamples for part in report.calibration.sources] == [3, 3]
    assert report.calibration.sources[1].name.startswith("given:mine:")
    with pytest.raises(coprune.BadInput, match=r"the shares add up to 0\.7, not to 1"):
        prune({"self": 0.5, "words.txt": 0.2})


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("self:absent.jsonl", "there is no file of prompts 'absent.jsonl'"),
        ("self:prompts.jsonl:column=question", "has no column 'question', only 'prompt'"),
        ("self:prompts.jsonl:template=chat", "the tokenizer has no chat template, which prompt 1 of"),
        ("self:long.jsonl", "prompt 1 of long.jsonl has 200 tokens, and the model 128 positions"),
        ("self:temperature=0", "at temperature 0 all texts without a prompt are the same"),
        ("words.txt:template=chat", "has no rows"),
    ],
)
def test_own_text_that_cannot_be_generated_is_refused(place: Path, dataset: str, message: str) -> None:
    Path("long.jsonl").write_text(json.dumps({"prompt": " ".join(["w5"] * 200)}))
    with pytest.raises(coprune.BadInput) as raised:
        prune(dataset)
    assert message in str(raised.value)
    assert raised.value.field == "dataset"
    with pytest.raises(coprune.BadInput, match="no token of the calibration data is marked as generated"):
        prune("words.txt", calibrate_on="generated")


def test_own_text_depends_on_the_seed_alone(place: Path) -> None:
    one, other = prune("self", nsamples=2).report.calibration, prune("self", nsamples=2, seed=1).report.calibration
    assert one is not None
    assert other is not None
    assert one.fingerprint != other.fingerprint
    for file in (place / "cache").rglob("*.json"):
        file.unlink()
    again = prune("self", nsamples=2).report.calibration
    assert again == one


def test_a_written_file_calibrates_another_run(place: Path) -> None:
    model, tokenizer = pico_model("llama"), pico_tokenizer("known")
    file = coprune.generate(
        model, "own.jsonl", "prompts.jsonl", samples=8, seqlen=16, processor=tokenizer, quiet=True, seed=3
    )
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 8
    assert rows[0]["prompt_ids"] == [20, 21]
    assert rows[0]["prompt"] == "w20 w21"
    assert rows[0]["answer_ids"] != rows[6]["answer_ids"], "the same prompt draws anew"
    assert all(len(row["answer_ids"]) == 16 or row["ended"] for row in rows)
    report = prune("own.jsonl", calibrate_on="generated").report
    assert report.calibration is not None
    assert 6 * 24 - 2 * 8 <= (report.calibration.counted or 0) < 6 * 24 - 2
    with pytest.raises(coprune.BadInput, match=r"own\.jsonl already exists"):
        coprune.generate(model, "own.jsonl", processor=tokenizer, quiet=True)
    begun = coprune.generate(model, "begun.jsonl", samples=2, seqlen=5, processor=tokenizer, quiet=True)
    assert [json.loads(line)["prompt_ids"] for line in begun.read_text().splitlines()] == [[1], [1]]


def test_a_file_of_prompts_is_read_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def rows(path: Path) -> list[Any]:
        read.append(path)
        return rows_of(path)

    monkeypatch.setattr("coprune.data.conversations.rows_of", rows)
    coprune.generate(
        pico_model("llama"), "own.jsonl", "prompts.jsonl", seqlen=4, processor=pico_tokenizer("known"), quiet=True
    )
    assert read == [Path("prompts.jsonl")]


def test_the_command_writes_what_python_writes(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pico(Path("model"), "llama")
    typed = ["generate", "model", "one.jsonl", "--prompts", "prompts.jsonl", "--seqlen", "6", "--quiet"]
    ended = run_command(typed, monkeypatch, capsys)
    assert (ended.code, ended.out.splitlines()[0]) == (0, "written   one.jsonl"), ended.err
    assert len(Path("one.jsonl").read_text().splitlines()) == 6
